// SPDX-License-Identifier: Apache-2.0
// A call of the sparse attention forward on the device: fills in the kernels' arguments from the plan and launches
// them, chunk after chunk of the queries. Tested in tests/cuda/sparse_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/context.h"
#include "src/cuda/attention_combine.cuh"
#include "src/cuda/attention_maps.cuh"
#include "src/cuda/query_tiles.cuh"
#include "src/cuda/shared_tiles.cuh"
#include "src/cuda/sparse_attention.cuh"
#include "src/cuda/sparse_attention.h"

namespace msa::cuda {

static_assert(sizeof(Visit) == kVisitBytes && sizeof(WorkItem) == kItemBytes && sizeof(TileBlock) == kTileBlockBytes &&
              sizeof(WorkTotals) == kTotalsBytes);

inline bool is_aligned(const TensorView& rows, std::uintptr_t bytes) {
  const auto stride_bytes = [&](int d) { return static_cast<std::uintptr_t>(rows.stride(d)) * dtype_size(rows.dtype); };
  return (reinterpret_cast<std::uintptr_t>(rows.data) | stride_bytes(0) | stride_bytes(1)) % bytes == 0;
}

/// The call of one instantiation.
template <class T, int D, int kBlock>
class FastAttention {
 public:
  /// `thread_blocks` of the persistent kernels, one a multiprocessor.
  FastAttention(const Context& context, const SparseAttentionParams& params, const SparseAttentionPlan& plan,
                unsigned thread_blocks, const TensorView& out, const TensorView& lse)
      : stream_(context.stream), plan_(plan), thread_blocks_(thread_blocks), workspace_(context.workspace) {
    set_index(params, out);
    shape_.group_size = static_cast<std::int32_t>(params.q.size(1)) / index_.kv_heads;
    shape_.reciprocal = ceil_div(65536u, static_cast<std::uint32_t>(shape_.group_size));
    shape_.scale_log2 = static_cast<float>(*params.scale * 1.4426950408889634);
    set_attend(params);
    set_shared(out, lse);
    set_combine(out, lse);
    // Without a key there is nothing to attend to, and nothing a tensor map could describe.
    const Batch& batch = params.batch;
    has_keys_ = params.k.size(0) > 0 && (!batch.is_paged || params.k.size(1) > 0);
    if (!has_keys_) return;
    q_map_ = map_queries(params.q, shape_.group_size, 1);
    k_map_ = map_keys(params.k, batch.is_paged, kBlock);
    v_map_ = map_keys(params.v, batch.is_paged, kBlock);
    if (index_.tiles.positions > 0) tile_map_ = map_queries(params.q, shape_.group_size, index_.tiles.positions);
  }

  void run(std::int64_t rows) {
    for (std::int64_t first = 0; first < rows; first += plan_.queries_at_once) {
      run_chunk(static_cast<std::int32_t>(first),
                static_cast<std::int32_t>(min_of(plan_.queries_at_once, rows - first)));
    }
  }

 private:
  template <class P>
  P* at(std::size_t offset) const {
    return reinterpret_cast<P*>(static_cast<std::byte*>(workspace_) + offset);
  }

  void set_index(const SparseAttentionParams& params, const TensorView& out) {
    index_.batch = view_of(params.batch);
    index_.blocks = strided<std::int32_t>(params.blocks);
    index_.kv_heads = static_cast<std::int32_t>(params.k.size(params.k.rank - 2));
    index_.topk = static_cast<std::int32_t>(params.blocks.size(2));
    index_.block_size = kBlock;
    index_.page = params.batch.is_paged ? static_cast<std::int32_t>(params.k.size(1)) : 0;
    index_.blocks_bound = static_cast<std::int32_t>(plan_.blocks_bound);
    index_.visits_per_item = static_cast<std::int32_t>(plan_.positions_per_tile * kTilesPerItem);
    index_.counts = at<std::int32_t>(plan_.counts);
    index_.partial = at<std::int32_t>(plan_.partial_flags);
    index_.totals = at<WorkTotals>(plan_.totals);
    index_.visits = at<Visit>(plan_.visits);
    index_.items = at<WorkItem>(plan_.items);
    if (plan_.most_blocks == 0 || !is_aligned(out, 16)) return;
    index_.tiles.positions = static_cast<std::int32_t>(plan_.positions_per_tile);
    index_.tiles.most_blocks = static_cast<std::int32_t>(plan_.most_blocks);
    index_.tiles.most_waste = static_cast<std::int32_t>(plan_.most_waste);
    index_.tiles.counts = at<std::int32_t>(plan_.tile_counts);
    index_.tiles.shared = at<std::int32_t>(plan_.shared_tiles);
    index_.tiles.blocks = at<TileBlock>(plan_.tile_blocks);
  }
  void set_attend(const SparseAttentionParams& params) {
    attend_.q = strided<T>(params.q);
    attend_.partial = at<T>(plan_.partial);
    attend_.lse2 = at<float>(plan_.lse);
    attend_.positions = static_cast<std::int32_t>(plan_.positions_per_tile);
    attend_.shape = shape_;
  }
  void set_shared(const TensorView& out, const TensorView& lse) {
    shared_.batch = index_.batch;
    shared_.totals = index_.totals;
    shared_.out = strided<T>(out);
    shared_.lse = strided<float>(lse);
    shared_.shape = shape_;
  }
  void set_combine(const TensorView& out, const TensorView& lse) {
    combine_.batch = index_.batch;
    combine_.blocks = index_.blocks;
    combine_.partial = attend_.partial;
    combine_.lse2 = attend_.lse2;
    combine_.out = strided<T>(out);
    combine_.lse = strided<float>(lse);
    combine_.kv_heads = index_.kv_heads;
    combine_.group_size = shape_.group_size;
    combine_.topk = index_.topk;
    combine_.block_size = kBlock;
    combine_.out_is_aligned = is_aligned(out, 8);
  }

  void run_chunk(std::int32_t first, std::int32_t queries) {
    index_.first_query = shared_.first_query = combine_.first_query = first;
    index_.queries = shared_.queries = combine_.queries = queries;
    if (index_.tiles.positions > 0) index_.tiles.tiles = ceil_div(queries, index_.tiles.positions);
    shared_.tiles = combine_.tiles = index_.tiles;
    attend_.index = index_;
    attend_.direct_items = plan_.is_direct ? index_.kv_heads * queries * index_.topk : 0;
    if (has_keys_) {
      if (!plan_.is_direct) make_lists();
      constexpr std::size_t kShared = AttendMemory<D, kBlock>::kBytes;
      launch_dependent(dim3(thread_blocks_), dim3(kAttendThreads), kShared, stream_, attend_blocks<T, D, kBlock>,
                       q_map_, k_map_, v_map_, attend_);
      if (index_.tiles.positions > 0) {
        launch_dependent(dim3(thread_blocks_), dim3(kAttendThreads), kShared, stream_,
                         attend_shared_tiles<T, D, kBlock>, tile_map_, k_map_, v_map_, shared_);
      }
    }
    const std::int64_t warps = std::int64_t{queries} * index_.kv_heads * shape_.group_size;
    launch_dependent(dim3(static_cast<unsigned>(ceil_div(warps, std::int64_t{kCombineWarps}))),
                     dim3(kCombineWarps * kWarpSize), 0, stream_, combine_partials<T, D>, combine_);
  }

  void make_lists() {
    clear_memory(stream_, at<std::byte>(plan_.totals), plan_.zero_end - plan_.totals);
    if (index_.tiles.positions > 0) {
      const auto tiles = static_cast<unsigned>(index_.kv_heads * index_.tiles.tiles);
      launch(dim3(ceil_div(tiles, kPlanTilesWarps)), dim3(kPlanTilesWarps * kWarpSize), 0, stream_, plan_tiles, index_);
    }
    const dim3 grid(ceil_div(static_cast<unsigned>(index_.queries), kIndexThreads),
                    static_cast<unsigned>(index_.kv_heads));
    launch(grid, dim3(kIndexThreads), 0, stream_, count_visits, index_);
    launch(dim3(1), dim3(kPlanThreads), kPlanThreads * 8, stream_, plan_items, index_);
    launch(grid, dim3(kIndexThreads), 0, stream_, place_visits, index_);
  }

  void* stream_;
  SparseAttentionPlan plan_;
  unsigned thread_blocks_;
  void* workspace_;
  bool has_keys_ = false;
  TileShape shape_{};
  ReverseIndex index_{};
  AttendArguments<T> attend_{};
  SharedTilesArguments<T> shared_{};
  CombineArguments<T> combine_{};
  TensorMap q_map_{}, tile_map_{}, k_map_{}, v_map_{};
};

/// run_sparse_attention of one instantiation.
template <class T, int D, int kBlock>
void run_fast_attention(const Context& context, const SparseAttentionParams& params, const SparseAttentionPlan& plan,
                        unsigned thread_blocks, const TensorView& out, const TensorView& lse) {
  const std::int64_t rows = params.q.size(0);
  if (rows > 0) FastAttention<T, D, kBlock>(context, params, plan, thread_blocks, out, lse).run(rows);
}

/// Calls body.template operator()<T, D, kBlock>() for the instantiation that the geometry asks for.
template <class Body>
void with_attention_geometry(const SparseAttentionParams& params, const Body& body) {
  const auto with_block = [&]<class T, int D>() {
    if (params.block_size == 64) {
      body.template operator()<T, D, 64>();
    } else {
      body.template operator()<T, D, 128>();
    }
  };
  const auto with_dim = [&]<class T>() {
    if (params.q.size(2) == 64) {
      with_block.template operator()<T, 64>();
    } else {
      with_block.template operator()<T, 128>();
    }
  };
  if (params.q.dtype == DType::kBFloat16) {
    with_dim.template operator()<BFloat16>();
  } else {
    with_dim.template operator()<Float16>();
  }
}

}  // namespace msa::cuda
