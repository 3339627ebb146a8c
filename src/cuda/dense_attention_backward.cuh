// SPDX-License-Identifier: Apache-2.0
// Gradients of dense attention. dk and dv by the tile code of attention_backward.cuh: the visitors of a block are all
// queries from its first key on, so there are no lists. dq by a second kernel that owns 128 query rows and walks the
// blocks they see, ascending: S = Q K^T, P = 2^(S - lse), dP = dout V^T, dS = P (dP - delta), and dq += dS K in
// registers. One warp feeds, two warpgroups of 64 rows compute. No atomics but the item counter.
// docs/cuda-attention-backward.md says why dq has a pass of its own. Tested in
// tests/cuda/dense_attention_backward_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cuda/attention_backward.cuh"

namespace msa::cuda {

inline constexpr int kDenseBlock = 128;  ///< keys a block

/// The visits of an item: queries item.first and on. item.page is what takes a query's row, or its position where the
/// batch has positions, to the packed row of the key at its position.
struct PrefixVisits {
  static constexpr bool kWritesDq = false;
  const std::int32_t* query_positions;  ///< null: none
  __device__ Visit at(const WorkItem& item, std::int32_t index) const {
    const std::int32_t query = item.first + index;
    const std::int32_t key = item.page + (query_positions != nullptr ? query_positions[query] : query);
    return Visit{query, max_of(0, min_of(kDenseBlock, key - item.row + 1)) << 8};
  }
  __device__ std::int32_t before(const WorkItem& item, std::int32_t query) const {
    return max_of(0, min_of(item.count, query - item.first));
  }
};

/// An item a (block, kv head), the longest first; no visitors: count 0. One thread an item.
[[maybe_unused]] static __global__ void plan_prefix_items(ReverseIndex a) {
  const std::int32_t number = static_cast<std::int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (number == 0) a.totals->items = a.kv_heads * a.blocks_bound;
  if (number >= a.kv_heads * a.blocks_bound) return;
  const std::int32_t block = number / a.kv_heads;
  const std::int32_t s = sequence_of_block(a.batch, block, a.block_size, a.page);
  const std::int32_t first_key = a.batch.cu_seqlens_k[s], last_key = a.batch.cu_seqlens_k[s + 1];
  const std::int32_t last_query = a.batch.cu_seqlens_q[s + 1];
  WorkItem item{};
  item.kv_head = number % a.kv_heads;
  locate_block(a, block, item);
  item.pieces = 1;
  item.first = a.batch.cu_seqlens_q[s];
  if (a.batch.query_positions != nullptr) {
    item.page = first_key;
    std::int32_t high = last_query;  // the first query that sees the block's first key is in [item.first, high]
    while (item.first < high) {
      const std::int32_t middle = item.first + (high - item.first) / 2;
      if (first_key + a.batch.query_positions[middle] >= item.row) {
        high = middle;
      } else {
        item.first = middle + 1;
      }
    }
  } else {
    item.page = last_key - last_query;
    item.first = max_of(item.first, item.row - item.page);
  }
  if (item.row < last_key) item.count = max_of(0, last_query - item.first);
  a.items[number] = item;
}

// The pass by queries
// --------------------------------------------------------------------------------------------

template <class T>
struct PrefixArguments {
  BatchView batch;
  const RowStats* stats;  ///< [queries, query_heads]
  Strided<T> dq;
  std::int32_t query_heads, kv_heads, group_size;
  std::int32_t positions;    ///< query positions a tile
  std::uint32_t reciprocal;  ///< as BackwardArguments::reciprocal
  std::int32_t tiles_bound;  ///< tile numbers of the batch lie below it
  float scale, scale_log2;
};

/// Where things lie in shared memory, in bytes, as in BackwardMemory.
template <int D>
struct PrefixMemory {
  static constexpr std::int32_t kRows = 128;
  static constexpr std::uint32_t kColumns = D / 64;
  static constexpr std::uint32_t kColumn = 128 * 128;  ///< of 128 rows or keys
  static constexpr std::uint32_t kTile = kColumns * kColumn;
  static constexpr std::uint32_t kQueries = 0;          ///< q, then dout
  static constexpr std::uint32_t kKeys = 2 * kTile;     ///< two stages of K, then V
  static constexpr std::uint32_t kBadKeys = 6 * kTile;  ///< a stage: a flag a key
  static constexpr std::uint32_t kBarriers = kBadKeys + 2 * kDenseBlock * 4;
  static constexpr std::uint32_t kBytes = kBarriers + 5 * 8;
};
static_assert(PrefixMemory<128>::kBytes <= 227 * 1024, "what a block may have on this chip");

struct PrefixBarriers {
  std::uint64_t* rows_full;   ///< an arrival a lane of the feeder, and the bytes
  std::uint64_t* keys_full;   ///< two stages: an arrival by the feeder, and the bytes
  std::uint64_t* keys_empty;  ///< two stages: an arrival a computing warp
  __device__ explicit PrefixBarriers(std::byte* at)
      : rows_full(reinterpret_cast<std::uint64_t*>(at)), keys_full(rows_full + 1), keys_empty(rows_full + 3) {}
};

/// A thread block's work: some positions of one sequence, and the blocks that they see.
struct PrefixTile {
  std::int32_t kv_head = 0;
  std::int32_t first_query = 0, queries = 0;
  std::int32_t first_key = 0;  ///< row of the sequence's first key
  std::int32_t first_position = 0;
  std::int32_t blocks = 0;
};

/// Tile numbers are as block numbers are (first_block): a sequence's tiles begin at floor(begin / positions) + s.
template <class T>
__device__ PrefixTile find_tile(const PrefixArguments<T>& a) {
  const std::int32_t number = static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t wanted = a.tiles_bound - 1 - number / a.kv_heads;  // the last see most, and begin first
  const auto first_tile = [&](std::int32_t s) { return a.batch.cu_seqlens_q[s] / a.positions + s; };
  std::int32_t low = 0, high = a.batch.sequences - 1;
  while (low < high) {
    const std::int32_t middle = low + (high - low + 1) / 2;
    if (first_tile(middle) <= wanted) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  PrefixTile tile;
  tile.kv_head = number % a.kv_heads;
  tile.first_query = a.batch.cu_seqlens_q[low] + (wanted - first_tile(low)) * a.positions;
  tile.queries = min_of(a.positions, a.batch.cu_seqlens_q[low + 1] - tile.first_query);
  if (tile.queries <= 0) return tile;
  tile.first_key = a.batch.cu_seqlens_k[low];
  tile.first_position = a.batch.place(tile.first_query).position;
  tile.blocks = a.batch.place(tile.first_query + tile.queries - 1).position / kDenseBlock + 1;
  return tile;
}

template <class T, int D>
__device__ void feed_prefix(const PrefixArguments<T>& a, const PrefixTile& tile, const TensorMap& q_map,
                            const TensorMap& k_map, const TensorMap& v_map, const TensorMap& dout_map,
                            std::byte* memory) {
  using Memory = PrefixMemory<D>;
  const PrefixBarriers barriers(memory + Memory::kBarriers);
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::uint32_t box = static_cast<std::uint32_t>(a.group_size) * 128;
  const std::int32_t mine = lane < tile.queries ? ceil_div(tile.queries - lane, kWarpSize) : 0;
  ptx::arrive_expect_bytes(barriers.rows_full, static_cast<std::uint32_t>(mine) * 2 * Memory::kColumns * box);
#pragma unroll 1
  for (std::int32_t position = lane; position < tile.queries; position += kWarpSize) {
    std::byte* to = memory + Memory::kQueries + static_cast<std::uint32_t>(position) * box;
    for (std::uint32_t column = 0; column < Memory::kColumns; ++column, to += Memory::kColumn) {
      const std::int32_t c0 = static_cast<std::int32_t>(column * 64), head = tile.kv_head * a.group_size;
      ptx::tensor_load(to, q_map, barriers.rows_full, c0, head, tile.first_query + position);
      ptx::tensor_load(to + Memory::kTile, dout_map, barriers.rows_full, c0, head, tile.first_query + position);
    }
  }
  if (lane != 0) return;
  Ring<2> ring;
  for (std::int32_t block = 0; block < tile.blocks; ++block, ring.advance()) {
    ptx::wait(barriers.keys_empty + ring.stage, ring.parity ^ 1);
    std::uint64_t* full = barriers.keys_full + ring.stage;
    ptx::arrive_expect_bytes(full, 2 * Memory::kTile);
    std::byte* to = memory + Memory::kKeys + ring.stage * 2 * Memory::kTile;
    for (std::uint32_t column = 0; column < Memory::kColumns; ++column, to += Memory::kColumn) {
      const std::int32_t c0 = static_cast<std::int32_t>(column * 64), row = tile.first_key + block * kDenseBlock;
      ptx::tensor_load(to, k_map, full, c0, tile.kv_head, row, 0);
      ptx::tensor_load(to + Memory::kTile, v_map, full, c0, tile.kv_head, row, 0);
    }
  }
}

/// A thread's two rows of a tile, eight apart.
struct PrefixRows {
  RowStats stats[2];
  std::int32_t position[2];  ///< -1: no row
  std::int64_t query[2];
  std::int32_t head[2];
};

template <class T>
__device__ __forceinline__ PrefixRows find_rows(const PrefixArguments<T>& a, const PrefixTile& tile) {
  PrefixRows rows;
  const std::uint32_t first = threadIdx.x - 128;
#pragma unroll
  for (std::uint32_t h = 0; h < 2; ++h) {
    const std::uint32_t row = first / kWarpSize * 16 + threadIdx.x % kWarpSize / 4 + 8 * h;
    const std::int32_t position = static_cast<std::int32_t>(row * a.reciprocal >> 16);
    rows.stats[h] = RowStats{infinity(), 0.0f};
    rows.position[h] = -1;
    rows.query[h] = tile.first_query + position;
    rows.head[h] = tile.kv_head * a.group_size + static_cast<std::int32_t>(row) - position * a.group_size;
    if (position >= tile.queries) continue;
    rows.stats[h] = a.stats[rows.query[h] * a.query_heads + rows.head[h]];
    rows.position[h] = a.batch.place(static_cast<std::int32_t>(rows.query[h])).position;
  }
  return rows;
}

/// dS of 64 keys, the first at position `key`, packed as the next product takes it.
template <class T, bool kMasks>
__device__ __forceinline__ void make_row_slopes(const float (&s)[32], const float (&dp)[32], const PrefixRows& rows,
                                                std::int32_t key, float scale_log2, const std::int32_t* bad_keys,
                                                std::uint32_t (&ds)[4][4]) {
#pragma unroll
  for (std::uint32_t j = 0; j < 8; ++j) {
    const std::uint32_t column = 8 * j + 2 * (threadIdx.x % 4);
    int2 bad = make_int2(0, 0);
    if (kMasks) bad = *reinterpret_cast<const int2*>(bad_keys + column);
#pragma unroll
    for (std::uint32_t h = 0; h < 2; ++h) {
      float slope[2];
#pragma unroll
      for (std::uint32_t i = 0; i < 2; ++i) {
        const std::uint32_t at = 4 * j + 2 * h + i;
        const float weight = ptx::exp2_fast(fmaf(s[at], scale_log2, -rows.stats[h].lse2));
        slope[i] = weight * (dp[at] - rows.stats[h].delta);
        if (kMasks) {
          if ((i == 0 ? bad.x : bad.y) != 0) slope[i] = quiet_nan();
          if (key + static_cast<std::int32_t>(column + i) > rows.position[h]) slope[i] = 0.0f;
        }
      }
      ds[j / 2][j % 2 * 2 + h] = pack_two<T>(slope[0], slope[1]);
    }
  }
}

/// A row with a NaN is NaN as a whole: which of its columns are depends on the blocks in which it was masked.
template <class T, int D>
__device__ __forceinline__ void write_query_gradient(const PrefixArguments<T>& a, const PrefixRows& rows,
                                                     const float (&dq)[D / 2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    bool has_nan = false;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) has_nan = has_nan || (i / 2 % 2 == h && dq[i] != dq[i]);
    int any = has_nan ? 1 : 0;  // a row lies in four neighbouring lanes
    any |= __shfl_xor_sync(kFullMask, any, 1);
    any |= __shfl_xor_sync(kFullMask, any, 2);
    if (rows.position[h] < 0) continue;
    T* to = a.dq.at(rows.query[h], rows.head[h]) + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        to[8 * j + i] = from_float<T>(any != 0 ? quiet_nan() : dq[4 * j + 2 * h + i] * a.scale);
      }
    }
  }
}

template <class T, int D>
__device__ __forceinline__ void compute_prefix(const PrefixArguments<T>& a, const PrefixTile& tile, std::byte* memory) {
  using Memory = PrefixMemory<D>;
  const PrefixBarriers barriers(memory + Memory::kBarriers);
  const std::uint32_t thread = threadIdx.x - 128;
  const PrefixRows rows = find_rows(a, tile);
  const std::byte* queries = memory + Memory::kQueries + thread / 128 * 64 * 128;
  const std::uint64_t q = ptx::matrix_descriptor(queries, 16, 1024, Swizzle::k128);
  const std::uint64_t dout = ptx::matrix_descriptor(queries + Memory::kTile, 16, 1024, Swizzle::k128);
  float dq[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) dq[i] = 0.0f;
  ptx::wait(barriers.rows_full, 0);
  Ring<2> ring;
  for (std::int32_t block = 0; block < tile.blocks; ++block, ring.advance()) {
    ptx::wait(barriers.keys_full + ring.stage, ring.parity);
    std::byte* keys = memory + Memory::kKeys + ring.stage * 2 * Memory::kTile;
    auto* bad_keys = reinterpret_cast<std::int32_t*>(memory + Memory::kBadKeys) + ring.stage * kDenseBlock;
    const bool masks = (block + 1) * kDenseBlock - 1 > tile.first_position;
    if (masks) remove_bad_keys<T, D, kDenseBlock>(keys, bad_keys, thread);
#pragma unroll 1
    for (std::uint32_t half = 0; half < 2; ++half) {
      const std::byte* k = keys + half * 64 * 128;
      const std::uint64_t k_rows = ptx::matrix_descriptor(k, 16, 1024, Swizzle::k128);
      const std::uint64_t v_rows = ptx::matrix_descriptor(k + Memory::kTile, 16, 1024, Swizzle::k128);
      const std::uint64_t k_columns = ptx::matrix_descriptor(k, Memory::kColumn, 1024, Swizzle::k128);
      float s[32], dp[32];
      ptx::fence_registers(s);
      ptx::fence_registers(dp);
      ptx::wgmma_fence();
#pragma unroll
      for (std::uint32_t step = 0; step < D / 16; ++step) {
        const std::uint32_t at = step / 4 * Memory::kColumn + step % 4 * 32;
        ptx::wgmma<64, T>(s, ptx::advance(q, at), ptx::advance(k_rows, at), step > 0);
      }
#pragma unroll
      for (std::uint32_t step = 0; step < D / 16; ++step) {
        const std::uint32_t at = step / 4 * Memory::kColumn + step % 4 * 32;
        ptx::wgmma<64, T>(dp, ptx::advance(dout, at), ptx::advance(v_rows, at), step > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::fence_registers(s);
      ptx::fence_registers(dp);
      std::uint32_t ds[4][4];
      const std::int32_t key = block * kDenseBlock + static_cast<std::int32_t>(half * 64);
      if (masks) {
        make_row_slopes<T, true>(s, dp, rows, key, a.scale_log2, bad_keys + half * 64, ds);
      } else {
        make_row_slopes<T, false>(s, dp, rows, key, a.scale_log2, nullptr, ds);
      }
      ptx::fence_registers(dq);
      ptx::wgmma_fence();
#pragma unroll
      for (std::uint32_t step = 0; step < 4; ++step) {
        ptx::wgmma<D, T, ptx::Major::kOuter>(dq, ds[step], ptx::advance(k_columns, step * 16 * 128), true);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::fence_registers(dq);
    }
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::arrive(barriers.keys_empty + ring.stage);
  }
  write_query_gradient<T, D>(a, rows, dq);
}

template <class T, int D>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    attend_prefix_backward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                           const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dout_map,
                           PrefixArguments<T> a) {
  using Memory = PrefixMemory<D>;
  std::byte* memory = shared_memory();
  const PrefixBarriers barriers(memory + Memory::kBarriers);
  const PrefixTile tile = find_tile(a);
  if (tile.queries <= 0) return;
  if (threadIdx.x == 0) {
    ptx::barrier_init(barriers.rows_full, kWarpSize);
    for (int stage = 0; stage < 2; ++stage) {
      ptx::barrier_init(barriers.keys_full + stage, 1);
      ptx::barrier_init(barriers.keys_empty + stage, kConsumerWarps);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  // 65536 registers: 128 * 40 + 256 * 232 = 64512.
  if (threadIdx.x < 128) {
    ptx::lower_registers<40>();
    if (threadIdx.x < kWarpSize) feed_prefix<T, D>(a, tile, q_map, k_map, v_map, dout_map, memory);
  } else {
    ptx::raise_registers<232>();
    compute_prefix<T, D>(a, tile, memory);
  }
}

// The call
// -------------------------------------------------------------------------------------------------------------

/// run_dense_attention_backward of one instantiation; `thread_blocks` of the persistent kernel, one a multiprocessor.
template <class T, int D>
void run_fast_dense_backward(const Context& context, const SparseAttentionParams& params,
                             const AttentionBackwardPlan& plan, const AttentionSaved& saved,
                             const AttentionGrads& grads, unsigned thread_blocks) {
  const std::int64_t rows = params.q.size(0), query_heads = params.q.size(1), kv_heads = params.k.size(1);
  const Batch& batch = params.batch;
  const RowStatsArguments<T> stats = prepare_backward<T, D>(context, params, plan, saved, grads);
  if (rows == 0) return;

  PrefixArguments<T> prefix{};
  prefix.batch = view_of(batch);
  prefix.stats = stats.stats;
  prefix.dq = strided<T>(grads.dq);
  launch(row_grid(rows * query_heads), dim3(kRowWarps * kWarpSize), 0, context.stream, clear_rows<T, D>, prefix.dq,
         prefix.batch.cu_seqlens_q + batch.sequences(), rows, stats.query_heads);
  if (params.k.size(0) == 0 || batch.sequences() == 0) return;  // without a key no sequence has a query

  ReverseIndex index = backward_index(context, params, plan);
  auto backward = backward_arguments<T, PrefixVisits>(context, params, plan, index);
  backward.visits = {index.batch.query_positions};
  prefix.query_heads = backward.query_heads;
  prefix.kv_heads = static_cast<std::int32_t>(kv_heads);
  prefix.group_size = backward.group_size;
  prefix.positions = PrefixMemory<D>::kRows / backward.group_size;
  prefix.reciprocal = backward.reciprocal;
  prefix.tiles_bound = static_cast<std::int32_t>(rows / prefix.positions + batch.sequences());
  prefix.scale = backward.scale;
  prefix.scale_log2 = backward.scale_log2;

  const BackwardMaps maps = map_backward<kDenseBlock>(params, saved);
  launch(dim3(static_cast<unsigned>(prefix.tiles_bound * prefix.kv_heads)), dim3(kBackwardThreads),
         PrefixMemory<D>::kBytes, context.stream, attend_prefix_backward<T, D>, maps.q, maps.k, maps.v, maps.dout,
         prefix);
  for (std::int64_t head = 0; head < kv_heads; head += plan.heads_at_once) {
    index.kv_heads = backward.kv_heads = static_cast<std::int32_t>(min_of(plan.heads_at_once, kv_heads - head));
    backward.first_head = static_cast<std::int32_t>(head);
    const auto items = static_cast<unsigned>(index.kv_heads * index.blocks_bound);
    clear_memory(context.stream, index.totals, sizeof(*index.totals));
    launch(dim3(ceil_div(items, kIndexThreads)), dim3(kIndexThreads), 0, context.stream, plan_prefix_items, index);
    launch(dim3(thread_blocks), dim3(kBackwardThreads), BackwardMemory<D, kDenseBlock>::kBytes, context.stream,
           attend_blocks_backward<T, D, kDenseBlock, PrefixVisits>, maps.q, maps.k, maps.v, maps.dout, backward);
    finish_key_gradients<T, D, kDenseBlock>(context, plan, index, grads, backward.sums, backward.first_head,
                                            backward.scale);
  }
}

/// Calls body.template operator()<T, D>() for the instantiation that the geometry asks for.
template <class Body>
void with_dense_geometry(const SparseAttentionParams& params, const Body& body) {
  const auto with_dim = [&]<class T>() {
    if (params.q.size(2) == 64) {
      body.template operator()<T, 64>();
    } else {
      body.template operator()<T, 128>();
    }
  };
  if (params.q.dtype == DType::kBFloat16) {
    with_dim.template operator()<BFloat16>();
  } else {
    with_dim.template operator()<Float16>();
  }
}

}  // namespace msa::cuda
