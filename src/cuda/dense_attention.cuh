// SPDX-License-Identifier: Apache-2.0
// Attention over the whole visible prefix: tiles of 128 query rows, some neighbouring positions times the heads of one
// kv head, against one tile of 128 keys after the other. One warp feeds, two warpgroups of 64 rows compute S = Q K^T,
// a running softmax and O += P V, with the next S under way while a tile's softmax is taken. The softmax starts anew
// at every span of keys and the spans are merged in ascending order, in shared memory, or, where there are too few
// tiles to go round, by merge_spans: the same arithmetic, so that a decode step and a prefill agree bit for bit. A
// row's bits depend on its query and its keys alone. docs/cuda-dense-attention.md has the bounds and a picture. Tested
// in tests/cuda/dense_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "msa/context.h"
#include "src/cuda/attention_maps.cuh"
#include "src/cuda/dense_attention.h"
#include "src/cuda/dense_consumer.cuh"
#include "src/cuda/dense_items.cuh"
#include "src/cuda/dense_memory.cuh"
#include "src/cuda/float8_tile.cuh"

namespace msa::cuda {

// Feeding
// ---------------------------------------------------------------------------------------------------------------

/// Starts the copies of the tile of keys or values that begins at `key`, when its stage is free. All lanes of a warp
/// call it. Float8 comes in whole rows, 16-bit types in columns of 64.
template <int D, bool kWidens, class T, class Ring>
__device__ __forceinline__ void load_tile(const DenseArguments<T, kWidens>& a, const DenseItem& item,
                                          const TensorMap& map, std::int32_t key, const Ring& ring,
                                          std::uint32_t number) {
  constexpr std::uint32_t kColumns = kWidens ? 1 : D / 64, kRowBytes = kWidens ? D : 128;
  ring.wait_free(number);
  std::uint64_t* full = ring.full(number);
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  // Copies that would begin behind the last key are left out: the page table has no entry there.
  const std::int32_t keys = min_of(item.end - key, static_cast<std::int32_t>(kDenseTileKeys));
  const std::int32_t copies = ceil_div(keys, a.copy_keys);
  if (lane == 0)
    ptx::arrive_expect_bytes(full, static_cast<std::uint32_t>(copies * a.copy_keys) * kColumns * kRowBytes);
  __syncwarp();
#pragma unroll 1
  for (std::int32_t i = lane; i < copies; i += kWarpSize) {
    const std::int32_t at = key + i * a.copy_keys;
    std::int32_t page = 0, row = at;
    if (a.page > 0) {
      const std::int32_t slot = at / a.page;
      // What is no page of the tensor comes as zeros.
      page = slot < a.batch.max_pages ? a.batch.page_table[std::int64_t{item.sequence} * a.batch.max_pages + slot] : -1;
      row = at % a.page;
    } else {
      row += a.batch.cu_seqlens_k[item.sequence];
    }
#pragma unroll 1
    for (std::uint32_t column = 0; column < kColumns; ++column) {
      const std::uint32_t to =
          (column * static_cast<std::uint32_t>(kDenseTileKeys) + static_cast<std::uint32_t>(i * a.copy_keys)) *
          kRowBytes;
      ptx::tensor_load(ring.tile(number) + to, map, full, static_cast<std::int32_t>(column * 64), item.kv_head, row,
                       page);
    }
  }
}

/// Feeds items until there are none, then one of count -1.
template <class T, int D, bool kWidens>
__device__ void feed_dense(const DenseArguments<T, kWidens>& a, const TensorMap& q_map, const TensorMap& k_map,
                           const TensorMap& v_map, const DenseRings<D, kWidens>& rings) {
  using Memory = DenseMemory<D, kWidens>;
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::int32_t total = a.totals->items * a.kv_heads;
  const std::int32_t positions = static_cast<std::int32_t>(kTileRows) / a.group_size;
  std::uint32_t number = 0;  // of the next tile of keys
  for (std::uint32_t taken = 0;; ++taken) {
    std::int32_t index = lane == 0 ? atomicAdd(&a.totals->next, 1) : 0;
    index = __shfl_sync(kFullMask, index, 0);
    DenseItem item{};
    item.count = -1;
    if (index < total) {  // the kv heads of a tile are neighbours: they begin together
      item = a.items[index / a.kv_heads];
      item.kv_head = index % a.kv_heads;
    }
    ptx::wait(rings.queries_free, (taken & 1) ^ 1);
    if (lane == 0) {
      *rings.item = item;
      if (item.end <= item.first_key) {  // no keys: nobody looks at the queries
        ptx::arrive(rings.queries_full);
      } else {
        ptx::arrive_expect_bytes(rings.queries_full, static_cast<std::uint32_t>(positions * a.group_size) * D * 2);
        for (std::uint32_t column = 0; column < D / 64; ++column) {
          ptx::tensor_load(rings.queries + column * Memory::kQueryColumn, q_map, rings.queries_full,
                           static_cast<std::int32_t>(column * 64), item.kv_head * a.group_size, item.first_query);
        }
      }
    }
    if (item.count < 0) break;
    for (std::int32_t key = item.first_key; key < item.end; key += static_cast<std::int32_t>(kDenseTileKeys)) {
      if constexpr (kWidens) {
        load_tile<D, kWidens>(a, item, k_map, key, rings.stored, 2 * number);
        load_tile<D, kWidens>(a, item, v_map, key, rings.stored, 2 * number + 1);
      } else {
        load_tile<D, kWidens>(a, item, k_map, key, rings.keys, number);
        load_tile<D, kWidens>(a, item, v_map, key, rings.values, number);
      }
      ++number;
    }
  }
  if constexpr (kWidens) {
    // Those who widen wait for one tile more: when all others are free, they find that it is none.
    for (std::uint32_t i = 0; i < Memory::kStages; ++i) rings.stored.wait_free(2 * number + i);
    if (lane == 0) {
      *rings.stored_end = 1;
      ptx::arrive(rings.stored.full(2 * number));
    }
  }
}

/// Writes the tiles of float8 once more, as T: the other warps of the feeding warpgroup.
template <class T, int D>
__device__ void widen_dense(const DenseRings<D, true>& rings) {
  constexpr int kKeys = static_cast<int>(kDenseTileKeys);
  const std::uint32_t thread = threadIdx.x - kWarpSize;
  const auto widen = [&](const std::byte* stored, const auto& ring, std::uint32_t number) {
    ring.wait_free(number);
    widen_tile<T, D, kKeys, kWidenWarps * kWarpSize, 1>(stored, ring.tile(number), thread);
    ptx::fence_proxy_async();
    __syncwarp();
    if (thread % kWarpSize == 0) ptx::arrive(ring.full(number));
  };
  for (std::uint32_t number = 0;; ++number) {
    rings.stored.wait_full(number);
    if (*rings.stored_end != 0) return;
    if (number % 2 == 0) {
      widen(rings.stored.tile(number), rings.keys, number / 2);
    } else {
      widen(rings.stored.tile(number), rings.values, number / 2);
    }
    rings.stored.release(number);
  }
}

// The kernel
// ------------------------------------------------------------------------------------------------------------

template <class T, int D, bool kWidens>
__device__ __forceinline__ void consume_dense(const DenseArguments<T, kWidens>& a, std::byte* memory,
                                              const DenseRings<D, kWidens>& rings) {
  const std::uint32_t thread = threadIdx.x - 128;
  DenseConsumer<T, D, kWidens> consumer{a, rings, memory, thread, thread % kWarpSize, thread / kWarpSize};
  std::uint32_t number = 0;
  for (std::uint32_t taken = 0;; ++taken) {
    ptx::wait(rings.queries_full, taken & 1);
    consumer.begin(taken);
    const DenseItem& item = consumer.item;
    if (item.count < 0) return;
    if (item.end <= item.first_key) {  // no tile of keys will free the queries
      __syncwarp();
      if (consumer.lane == 0) ptx::arrive(rings.queries_free);
    }
    if (consumer.is_idle) {
      consumer.skip_span(item.first_key, item.end, number);
    } else {
      consumer.attend_item(number);
    }
  }
}

template <class T, int D, bool kWidens>
__global__ void __launch_bounds__(kDenseThreads, 1)
    attend_prefix(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                  const __grid_constant__ TensorMap v_map, DenseArguments<T, kWidens> a) {
  std::byte* memory = shared_memory();
  const DenseRings<D, kWidens> rings(memory);
  if (threadIdx.x == 0) {
    rings.keys.init(kWidens ? kWidenWarps : 1, kDenseConsumerWarps);
    rings.values.init(kWidens ? kWidenWarps : 1, kDenseConsumerWarps);
    if constexpr (kWidens) rings.stored.init(1, kWidenWarps);
    *rings.stored_end = 0;
    ptx::barrier_init(rings.queries_full, 1);
    ptx::barrier_init(rings.queries_free, kDenseConsumerWarps);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_launch();  // the merge may be set up behind this; it waits for this kernel's end
  // 65536 registers: 128 * 40 + 256 * 232 = 64512.
  if (threadIdx.x < 128) {
    ptx::lower_registers<40>();
    if (threadIdx.x < kWarpSize) {
      feed_dense<T, D, kWidens>(a, q_map, k_map, v_map, rings);
    } else if constexpr (kWidens) {
      widen_dense<T, D>(rings);
    }
  } else {
    ptx::raise_registers<232>();
    consume_dense<T, D, kWidens>(a, memory, rings);
  }
}

// The merge of spans
// ----------------------------------------------------------------------------------------------------

inline constexpr unsigned kMergeWarps = 4;

/// One warp a (query of the chunk, head): out and lse from the row's spans, in ascending order.
template <class T, int D>
__global__ void __launch_bounds__(kMergeWarps* kWarpSize) merge_spans(DenseResults<T> a, std::int32_t queries) {
  constexpr int kColumns = D / kWarpSize;  // a lane
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::int64_t row = std::int64_t{blockIdx.x} * kMergeWarps + threadIdx.x / kWarpSize;
  const std::int64_t query_heads = std::int64_t{a.kv_heads} * a.group_size;
  if (row >= queries * query_heads) return;
  const std::int32_t query = a.first_query + static_cast<std::int32_t>(row / query_heads);
  const std::int32_t spans = ceil_div(a.batch.place(query).position + 1, a.span_keys);
  ptx::griddepcontrol_wait();

  RunningWeights weights;
  float sums[kColumns] = {};
#pragma unroll 4
  for (std::int32_t span = 0; span < spans; ++span) {
    const std::int64_t at = row * a.max_spans + span;
    float weight = 0, rescale = 0;
    weights.add(a.lse2[at], weight, rescale);
    const float* values = a.partial + at * D + lane * kColumns;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] = merge(sums[i], rescale, weight, values[i]);
  }
  const float inverse = weights.inverse();
  const std::int32_t head = static_cast<std::int32_t>(row % query_heads);
  T* out = a.out.at(query, head) + lane * kColumns;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) out[i] = from_float<T>(sums[i] * inverse);
  if (lane == 0) *a.lse.at(query, head) = weights.lse();
}

// The call
// -------------------------------------------------------------------------------------------------------------

template <class T, bool kWidens>
DenseArguments<T, kWidens> dense_arguments(const DenseAttentionParams& params, const DenseAttentionPlan& plan,
                                           std::byte* workspace, const TensorView& out, const TensorView& lse) {
  DenseArguments<T, kWidens> a{};
  a.batch = view_of(params.batch);
  a.items = reinterpret_cast<DenseItem*>(workspace + plan.items);
  a.totals = reinterpret_cast<DenseTotals*>(workspace + plan.totals);
  a.out = strided<T>(out);
  a.lse = strided<float>(lse);
  if (plan.is_split) {
    a.partial = reinterpret_cast<float*>(workspace + plan.partial);
    a.lse2 = reinterpret_cast<float*>(workspace + plan.lse2);
  }
  a.kv_heads = static_cast<std::int32_t>(params.k.size(params.k.rank - 2));
  a.group_size = static_cast<std::int32_t>(params.q.size(1)) / a.kv_heads;
  a.span_keys = static_cast<std::int32_t>(plan.span_keys);
  a.max_spans = static_cast<std::int32_t>(plan.max_spans);
  a.v = key_rows<typename DenseArguments<T, kWidens>::Stored>(params.v, params.batch);
  a.tokens = params.v.size(0) * (params.batch.is_paged ? params.v.size(1) : 1);
  a.page = params.batch.is_paged ? static_cast<std::int32_t>(params.k.size(1)) : 0;
  a.copy_keys = std::gcd(a.page, static_cast<std::int32_t>(kDenseTileKeys));
  const float scale = static_cast<float>(*params.scale * 1.4426950408889634);
  a.scale_log2 = scale == 0.0f ? 1.0f : std::abs(scale);
  a.sign = scale == 0.0f ? 0.0f : scale < 0.0f ? -1.0f : 1.0f;
  a.out_is_aligned =
      reinterpret_cast<std::uintptr_t>(out.data) % 16 == 0 && out.stride(0) % 8 == 0 && out.stride(1) % 8 == 0;
  return a;
}

template <class T, bool kWidens>
DenseOrder dense_order(const DenseArguments<T, kWidens>& a, const DenseAttentionPlan& plan, std::byte* workspace) {
  DenseOrder order{};
  order.batch = a.batch;
  order.items = reinterpret_cast<DenseItem*>(workspace + plan.items);
  order.totals = a.totals;
  order.positions = static_cast<std::int32_t>(plan.positions_per_tile);
  order.span_keys = plan.is_split ? a.span_keys : 0x7fffffff;
  order.most_items = static_cast<std::int32_t>(plan.max_items);
  order.is_split = plan.is_split;
  std::int64_t most_tiles = (plan.is_split ? 1 : plan.max_spans) * (plan.span_keys / kDenseTileKeys);
  for (; most_tiles >= kOrderThreads; most_tiles /= 2) ++order.bucket_shift;
  return order;
}

/// run_dense_attention of one instantiation; `thread_blocks` of the persistent kernel, one a multiprocessor.
template <class T, int D, bool kWidens>
void run_fast_dense(const Context& context, const DenseAttentionParams& params, const DenseAttentionPlan& plan,
                    unsigned thread_blocks, const TensorView& out, const TensorView& lse) {
  const std::int64_t rows = params.q.size(0);
  if (rows == 0) return;
  auto* workspace = static_cast<std::byte*>(context.workspace);
  DenseArguments<T, kWidens> a = dense_arguments<T, kWidens>(params, plan, workspace, out, lse);
  DenseOrder order = dense_order(a, plan, workspace);
  TensorMap q_map = map_queries(params.q, a.group_size, plan.positions_per_tile), k_map{}, v_map{};
  if (params.k.elements() > 0) {  // without a key there is nothing a tensor map could describe, and nobody asks
    k_map = map_keys(params.k, params.batch.is_paged, a.copy_keys);
    v_map = map_keys(params.v, params.batch.is_paged, a.copy_keys);
  }
  for (std::int64_t first = 0; first < rows; first += plan.queries_at_once) {
    const std::int64_t queries = min_of(plan.queries_at_once, rows - first);
    order.first_query = a.first_query = static_cast<std::int32_t>(first);
    order.queries = static_cast<std::int32_t>(queries);
    launch(dim3(1), dim3(kOrderThreads), 0, context.stream, order_items, order);
    launch(dim3(thread_blocks), dim3(kDenseThreads), DenseMemory<D, kWidens>::kBytes, context.stream,
           attend_prefix<T, D, kWidens>, q_map, k_map, v_map, a);
    if (!plan.is_split) continue;
    const std::int64_t warps = queries * params.q.size(1);
    launch_dependent(dim3(static_cast<unsigned>(ceil_div(warps, std::int64_t{kMergeWarps}))),
                     dim3(kMergeWarps * kWarpSize), 0, context.stream, merge_spans<T, D>, DenseResults<T>(a),
                     static_cast<std::int32_t>(queries));
  }
}

/// Calls body.template operator()<T, D, kWidens>() for the instantiation that the geometry asks for.
template <class Body>
void with_dense_geometry(const DenseAttentionParams& params, const Body& body) {
  const auto with_storage = [&]<class T, int D>() {
    if (params.k.dtype == DType::kFloat8E4M3) {
      body.template operator()<T, D, true>();
    } else {
      body.template operator()<T, D, false>();
    }
  };
  const auto with_dim = [&]<class T>() {
    if (params.q.size(2) == 64) {
      with_storage.template operator()<T, 64>();
    } else {
      with_storage.template operator()<T, 128>();
    }
  };
  if (params.q.dtype == DType::kBFloat16) {
    with_dim.template operator()<BFloat16>();
  } else {
    with_dim.template operator()<Float16>();
  }
}

}  // namespace msa::cuda
