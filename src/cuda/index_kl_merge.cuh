// SPDX-License-Identifier: Apache-2.0
// Puts together what the pairs of index_kl.cuh left: a query's parts in ascending order of its slots, a block's in
// ascending order of its items. And the call: one group after the other, so that what a group needs is used again by
// the next and the index keys' gradient adds up in the order of the groups. Tested in tests/cuda/index_kl_test.cc.
#pragma once

#include <cstdint>

#include "msa/context.h"
#include "src/cuda/attention_maps.cuh"
#include "src/cuda/generic/index_kl.cuh"
#include "src/cuda/index_kl.cuh"
#include "src/cuda/sorted_visits.cuh"

namespace msa::cuda {

inline constexpr unsigned kMergeThreads = 256, kMergeWarps = kMergeThreads / kWarpSize;

/// The parts of a query, slots 0..63 as bits. A warp asks together.
template <class T>
__device__ std::uint64_t find_parts(const KlArguments<T>& a, std::int32_t query) {
  if (a.schedule != KlSchedule::kVisits) return a.index.batch.place(query).sequence >= 0 ? 1 : 0;
  return visited_slots(a.index.batch, a.index.blocks, 0, query, a.slots, a.index.block_size);
}

/// This warp's query of the chunk, counted from its first; not below a.queries: none.
__device__ inline std::int32_t warp_query() {
  return static_cast<std::int32_t>(blockIdx.x * kMergeWarps + threadIdx.x / kWarpSize);
}

/// A warp a query: a lane a head, the index branch last.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_sums(KlArguments<T> a) {
  const std::int32_t local = warp_query(), query = a.first_query + local;
  if (local >= a.queries) return;
  const std::uint64_t parts = find_parts(a, query);
  const std::int32_t branches = a.group_size + 1;
  const KlSums* first = a.sums + std::int64_t{local} * a.slots * branches;
  for (std::int32_t branch = static_cast<std::int32_t>(threadIdx.x % kWarpSize); branch < branches;
       branch += kWarpSize) {
    KlSums sums{-infinity(), 0};
    for (std::int32_t slot = 0; slot < a.slots; ++slot) {
      if ((parts >> slot & 1) != 0) sums = add_sums(sums, first[slot * branches + branch]);
    }
    const float lse = sums.sum == 0.0f ? -infinity() : sums.top + logf(sums.sum);
    if (branch < a.group_size) {
      *a.lse_main.at(query, a.group * a.group_size + branch) = lse;
    } else {
      *a.lse_index.at(query, a.group) = lse;
    }
  }
}

/// A warp a query. KL of m / sum m and q / sum q, as kl_rows of the generic path.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_values(KlArguments<T> a, double* row_values, std::int32_t kv_heads) {
  const std::int32_t local = warp_query(), query = a.first_query + local;
  if (local >= a.queries) return;
  const std::uint64_t parts = find_parts(a, query);
  if (threadIdx.x % kWarpSize != 0) return;
  KlValue sum{0, 0, 0};
  for (std::int32_t slot = 0; slot < a.slots; ++slot) {
    if ((parts >> slot & 1) == 0) continue;
    const KlValue part = a.values[std::int64_t{local} * a.slots + slot];
    sum = {sum.value + part.value, sum.mass + part.mass, sum.student + part.student};
  }
  const double value = parts == 0 ? 0.0 : sum.value / sum.mass - log(sum.mass) + log(sum.student);
  const auto norm = a.takes_max ? static_cast<float>(sum.mass) : static_cast<float>(a.group_size);
  *a.teacher_norm.at(query, a.group) = parts == 0 ? 0.0f : norm;
  row_values[std::int64_t{query} * kv_heads + a.group] = value;
}

/// What the sums of (Q - P) products are multiplied with.
template <class T>
__device__ float gradient_factor(const KlArguments<T>& a, const float* grad_output, std::int32_t kv_heads) {
  const float rows = static_cast<float>(a.index.batch.queries()) * static_cast<float>(kv_heads);
  return *grad_output * a.index_scale / rows / kKlGradientScale;
}

/// A warp a query, neighbouring lanes at neighbouring dimensions.
template <class T, int kIndexDim>
__global__ void __launch_bounds__(kMergeThreads)
    merge_dq(KlArguments<T> a, const float* grad_output, std::int32_t kv_heads, Strided<T> dq_idx) {
  const std::int32_t local = warp_query(), query = a.first_query + local;
  if (local >= a.queries) return;
  const std::uint64_t parts = find_parts(a, query);
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const float* first = a.dq_parts + std::int64_t{local} * a.slots * kIndexDim + lane;
  float sums[kIndexDim / kWarpSize] = {};
  for (std::int32_t slot = 0; slot < a.slots; ++slot) {
    if ((parts >> slot & 1) == 0) continue;
#pragma unroll
    for (int i = 0; i < kIndexDim / kWarpSize; ++i) sums[i] += first[slot * kIndexDim + i * kWarpSize];
  }
  const float factor = parts == 0 ? 0.0f : gradient_factor(a, grad_output, kv_heads);
  T* to = dq_idx.at(query, a.group) + lane;
#pragma unroll
  for (int i = 0; i < kIndexDim / kWarpSize; ++i) to[i * kWarpSize] = from_float<T>(sums[i] * factor);
}

/// A thread block an item; the first of a block's items adds them all to dk [Tk, index_dim].
template <class T, int kBlock, int kIndexDim>
__global__ void __launch_bounds__(kMergeThreads) merge_dk(KlArguments<T> a, float* dk) {
  const std::int32_t number = static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t total = a.schedule == KlSchedule::kVisits ? a.index.totals->items : a.item_count;
  if (number >= total) return;
  const KlItem item = find_item(a, number);
  if (item.count <= 0 || item.piece != 0) return;
  std::int32_t pieces = item.pieces;
  while (pieces > 1 && find_item(a, number + pieces - 1).count <= 0) --pieces;  // padding: nobody wrote its sum

  const BatchView& batch = a.index.batch;
  const std::int32_t s = batch.last_sequence(item.row, [&](std::int32_t i) { return batch.cu_seqlens_k[i]; });
  const std::int32_t keys = min_of(kBlock, batch.cu_seqlens_k[s + 1] - item.row);
  for (std::int32_t i = static_cast<std::int32_t>(threadIdx.x); i < keys * kIndexDim; i += kMergeThreads) {
    float sum = 0;
    for (std::int64_t from = number; from < number + pieces; ++from) {
#pragma unroll
      for (int part = 0; part < 128 / kBlock; ++part) {
        sum += a.dk_parts[from * 128 * kIndexDim + part * kBlock * kIndexDim + i];
      }
    }
    dk[std::int64_t{item.row} * kIndexDim + i] += sum;
  }
}

/// A thread an element of dk_idx [Tk, index_dim]; rows behind the last sequence were never added to.
template <class T, int kIndexDim>
__global__ void __launch_bounds__(kMergeThreads)
    store_dk(KlArguments<T> a, const float* grad_output, std::int32_t kv_heads, const float* dk, Strided<T> dk_idx,
             std::int64_t count) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  if (i >= count) return;
  // Without queries every sum is 0 and the factor is not a number.
  const float sum = dk[i];
  dk_idx.at(i / kIndexDim)[i % kIndexDim] =
      from_float<T>(sum == 0.0f ? 0.0f : sum * gradient_factor(a, grad_output, kv_heads));
}

// The call
// -------------------------------------------------------------------------------------------------------------

template <class T, int kBlock>
class KlRun {
 public:
  KlRun(const Context& context, const IndexKlParams& params, const IndexKlPlan& plan, const IndexKlSaved& saved,
        unsigned thread_blocks)
      : context_(context),
        params_(params),
        plan_(plan),
        workspace_(static_cast<std::byte*>(context.workspace)),
        thread_blocks_(thread_blocks),
        kv_heads_(static_cast<std::int32_t>(params.q_idx.size(1))) {
    const bool is_paged = params.batch.is_paged;
    has_keys_ = params.q.size(0) > 0 && params.batch.sequences() > 0 && params.k.size(0) > 0 &&
                (!is_paged || params.k.size(1) > 0);
    ReverseIndex& index = a_.index;
    index.batch = view_of(params.batch);
    index.kv_heads = 1;
    index.topk = static_cast<std::int32_t>(plan.slots);
    index.block_size = kBlock;
    index.page = is_paged ? static_cast<std::int32_t>(params.k.size(1)) : 0;
    index.blocks_bound = static_cast<std::int32_t>(plan.blocks_bound);
    index.visits_per_item = static_cast<std::int32_t>(plan.item_queries);
    index.counts = at<std::int32_t>(plan.counts);
    index.partial = at<std::int32_t>(plan.partial_flags);
    index.totals = at<WorkTotals>(plan.totals);
    index.visits = at<Visit>(plan.visit_list);
    index.items = at<WorkItem>(plan.items);
    a_.group_size = static_cast<std::int32_t>(params.q.size(1)) / kv_heads_;
    a_.columns = static_cast<std::int32_t>(params.q.size(2) / 64);
    a_.index_columns = static_cast<std::int32_t>(params.q_idx.size(2) / 64);
    a_.slots = index.topk;
    a_.item_queries = index.visits_per_item;
    a_.block_items = static_cast<std::int32_t>(plan.block_items);
    a_.scale = static_cast<float>(*params.scale);
    a_.index_scale = static_cast<float>(*params.index_scale);
    a_.takes_max = params.teacher == Teacher::kMax;
    a_.q = strided<T>(params.q);
    a_.q_idx = strided<T>(params.q_idx);
    a_.lse_main = strided<float>(saved.lse_main);
    a_.lse_index = strided<float>(saved.lse_index);
    a_.teacher_norm = strided<float>(saved.teacher_norm);
    if (!has_keys_) return;
    k_map_ = map_keys(params.k, is_paged, kBlock);
    ConstTensorView k_idx = params.k_idx;  // with a dimension of one head, before the last
    k_idx.rank = params.k.rank;
    const int last = k_idx.rank - 1;
    k_idx.shape[static_cast<std::size_t>(last)] = params.k_idx.size(last - 1);
    k_idx.strides[static_cast<std::size_t>(last)] = params.k_idx.stride(last - 1);
    k_idx.shape[static_cast<std::size_t>(last - 1)] = 1;
    k_idx_map_ = map_keys(k_idx, is_paged, kBlock);
  }

  void forward(float* kl) {
    a_.sums = at<KlSums>(plan_.sums);
    a_.values = at<KlValue>(plan_.values);
    for_each_group([&] {
      for_each_chunk([&] {
        list_visits(a_.first_query, a_.queries);
        multiply<64, KlMode::kSums>(own_schedule());
        launch(query_grid(), dim3(kMergeThreads), 0, context_.stream, merge_sums<T>, a_);
        multiply<64, KlMode::kValue>(own_schedule());
        launch(query_grid(), dim3(kMergeThreads), 0, context_.stream, merge_values<T>, a_, at<double>(plan_.row_values),
               kv_heads_);
      });
    });
    const generic::KlSumArgs sum{at<double>(plan_.row_values), generic::pointers_of(params_.batch), kv_heads_, kl};
    generic::start(context_.stream, generic::kl_sum<>, generic::kl_sum_shape(), sum);
  }

  template <int kIndexDim>
  void backward(const float* grad_output, const TensorView& dq_idx, const TensorView& dk_idx) {
    float* dk = at<float>(plan_.dk);
    clear_memory(context_.stream, dk, plan_.dk_end - plan_.dk);
    for_each_group([&] {
      a_.dq_parts = at<float>(plan_.dq_parts);
      a_.dk_parts = at<float>(plan_.dk_parts);
      list_visits(0, static_cast<std::int32_t>(params_.q.size(0)));
      sort_lists();
      for_each_chunk([&] {
        if (plan_.is_dense) {
          multiply<kIndexDim, KlMode::kQueriesGradient>(KlSchedule::kRows);
        } else {
          multiply<kIndexDim, KlMode::kKeysGradient>(KlSchedule::kVisits);
        }
        launch(query_grid(), dim3(kMergeThreads), 0, context_.stream, merge_dq<T, kIndexDim>, a_, grad_output,
               kv_heads_, strided<T>(dq_idx));
      });
      if (plan_.is_dense) {
        a_.dq_parts = nullptr;
        multiply<kIndexDim, KlMode::kKeysGradient>(KlSchedule::kKeys);
      }
      if (!has_keys_) return;
      launch(dim3(static_cast<unsigned>(plan_.key_items())), dim3(kMergeThreads), 0, context_.stream,
             merge_dk<T, kBlock, kIndexDim>, a_, dk);
    });
    const std::int64_t count = params_.k_idx.size(0) * kIndexDim;
    launch(dim3(static_cast<unsigned>(ceil_div(count, std::int64_t{kMergeThreads}))), dim3(kMergeThreads), 0,
           context_.stream, store_dk<T, kIndexDim>, a_, grad_output, kv_heads_, dk, strided<T>(dk_idx), count);
  }

 private:
  template <class V>
  V* at(std::size_t offset) const {
    return reinterpret_cast<V*>(workspace_ + offset);
  }
  dim3 query_grid() const { return dim3(static_cast<unsigned>(ceil_div<std::int64_t>(a_.queries, kMergeWarps))); }
  /// Of the kernels that go through queries.
  KlSchedule own_schedule() const { return plan_.is_dense ? KlSchedule::kRows : KlSchedule::kVisits; }

  template <class Body>
  void for_each_group(const Body& body) {
    for (a_.group = 0; a_.group < kv_heads_; ++a_.group) {
      a_.schedule = own_schedule();
      if (!plan_.is_dense) {
        a_.index.blocks = strided<std::int32_t>(params_.blocks);
        a_.index.blocks.data += a_.group * a_.index.blocks.strides[0];
      }
      body();
    }
  }
  template <class Body>
  void for_each_chunk(const Body& body) {
    const std::int64_t queries = params_.q.size(0);
    for (std::int64_t first = 0; first < queries; first += plan_.queries_at_once) {
      a_.first_query = static_cast<std::int32_t>(first);
      a_.queries = static_cast<std::int32_t>(min_of(plan_.queries_at_once, queries - first));
      body();
    }
  }

  /// Selected stage: the group's lists of visits, of these queries.
  void list_visits(std::int32_t first, std::int32_t queries) {
    if (!has_keys_ || plan_.is_dense) return;
    ReverseIndex& index = a_.index;
    index.first_query = first;
    index.queries = queries;
    index.visits = at<Visit>(plan_.visit_list);
    clear_memory(context_.stream, workspace_ + plan_.totals, plan_.zero_end - plan_.totals);
    const dim3 grid(static_cast<unsigned>(ceil_div<std::int64_t>(queries, kIndexThreads)));
    launch(grid, dim3(kIndexThreads), 0, context_.stream, count_visits, index);
    launch(dim3(1), dim3(kPlanThreads), kPlanThreads * 8, context_.stream, plan_items, index);
    launch(grid, dim3(kIndexThreads), 0, context_.stream, place_visits, index);
  }
  void sort_lists() {
    if (!has_keys_ || plan_.is_dense) return;
    Visit* sorted = at<Visit>(plan_.sorted_list);
    launch(dim3(static_cast<unsigned>(plan_.blocks_bound)), dim3(kIndexThreads),
           sort_shared_bytes(a_.index.queries, kSortSpan), context_.stream, sort_visits, a_.index, sorted, kSortSpan);
    a_.index.visits = sorted;
  }

  template <int kIndexDim, KlMode kMode>
  void multiply(KlSchedule schedule) {
    if (!has_keys_) return;
    a_.schedule = schedule;
    a_.item_count = static_cast<std::int32_t>(schedule == KlSchedule::kRows   ? plan_.row_items
                                              : schedule == KlSchedule::kKeys ? plan_.key_items()
                                                                              : 0);
    clear_memory(context_.stream, &a_.index.totals->next, sizeof(a_.index.totals->next));
    launch(dim3(thread_blocks_), dim3(kKlThreads), KlMemory<kBlock>::kBytes, context_.stream,
           kl_pairs<T, kBlock, kIndexDim, kMode>, k_map_, k_idx_map_, a_);
  }

  const Context& context_;
  const IndexKlParams& params_;
  const IndexKlPlan& plan_;
  std::byte* workspace_;
  unsigned thread_blocks_;
  std::int32_t kv_heads_;
  bool has_keys_ = false;
  KlArguments<T> a_{};
  TensorMap k_map_{}, k_idx_map_{};
};

/// Calls body.template operator()<T, kBlock>() for what the geometry asks for.
template <class Body>
void with_kl_geometry(const IndexKlParams& params, const Body& body) {
  const auto with_block = [&]<class T>() {
    if (params.block_size == 64) {
      body.template operator()<T, 64>();
    } else {
      body.template operator()<T, 128>();
    }
  };
  if (params.q.dtype == DType::kBFloat16) {
    with_block.template operator()<BFloat16>();
  } else {
    with_block.template operator()<Float16>();
  }
}

inline void run_kl(const Context& context, const IndexKlParams& params, const IndexKlPlan& plan,
                   const IndexKlSaved& saved, unsigned thread_blocks, float* kl) {
  with_kl_geometry(params, [&]<class T, int kBlock>() {
    KlRun<T, kBlock>(context, params, plan, saved, thread_blocks).forward(kl);
  });
}

inline void run_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlPlan& plan,
                            const IndexKlSaved& saved, unsigned thread_blocks, const float* grad_output,
                            const TensorView& dq_idx, const TensorView& dk_idx) {
  with_kl_geometry(params, [&]<class T, int kBlock>() {
    KlRun<T, kBlock> run(context, params, plan, saved, thread_blocks);
    if (params.q_idx.size(2) == 64) {
      run.template backward<64>(grad_output, dq_idx, dk_idx);
    } else {
      run.template backward<128>(grad_output, dq_idx, dk_idx);
    }
  });
}

}  // namespace msa::cuda
