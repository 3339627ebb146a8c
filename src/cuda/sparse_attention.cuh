// SPDX-License-Identifier: Apache-2.0
// Attention of the queries that visit a block, block by block: a persistent kernel over the work items of
// reverse_index.cuh. One warp feeds: it takes an item, has the copy engine bring the block's K and V, and gathers tiles
// of 128 query rows. Two warpgroups of 64 rows each compute S = Q K^T, the softmax within the block and O = P V, and
// write O and its log-sum to the slot that the selection assigned to (query, block). No atomics but the item counter; a
// row's bits depend on its query and its block alone. docs/cuda-sparse-attention.md has the picture. Tested in
// tests/cuda/sparse_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/context.h"
#include "src/cuda/attention_combine.cuh"
#include "src/cuda/attention_maps.cuh"
#include "src/cuda/attention_tile.cuh"
#include "src/cuda/finite_values.cuh"
#include "src/cuda/ptx.cuh"
#include "src/cuda/reverse_index.cuh"
#include "src/cuda/sparse_attention.h"

namespace msa::cuda {

inline constexpr unsigned kAttendThreads = 384;  // a warpgroup that feeds (one warp of it), two that compute
inline constexpr std::uint32_t kConsumerWarps = 8;
inline constexpr std::uint32_t kConsumerThreads = 256;

template <class T>
struct AttendArguments {
  Strided<const T> q;  ///< [queries, query_heads, D]
  const Visit* visits;
  const WorkItem* items;
  WorkTotals* totals;
  T* partial;   ///< [queries, kv_heads, topk, group_size, D] of this chunk, every row normalised
  float* lse2;  ///< the same without D: log2 of the sum of exponentials
  std::int32_t first_query;
  std::int32_t kv_heads, group_size, topk;
  std::int32_t positions;  ///< query positions a tile: kTileRows / group_size
  /// 1 / group_size in 16 fractional bits, rounded up. row * it >> 16 is row / group_size, exactly: it is too large by
  /// less than 2^-16, and row * group_size < 2^16.
  std::uint32_t reciprocal;
  float scale_log2;  ///< scale * log2(e)

  /// The query position of a tile that `row` belongs to.
  __device__ std::int32_t position_of(std::int32_t row) const {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(row) * reciprocal >> 16);
  }
  /// Whether a position's rows fill groups of eight, which the swizzle permutes among: the copy engine brings them, one
  /// box a position and column. Else they would be many small boxes at odd places, and the feeding warp copies 16 bytes
  /// a lane instead: at group size 1, 64 instructions a tile in place of 256 boxes.
  __device__ bool has_whole_boxes() const { return group_size % 8 == 0; }
};

/// Where things lie in shared memory, in bytes. Tiles are columns of 128 bytes (64 elements), swizzled: [column][row].
template <int D, int kBlock>
struct AttendMemory {
  static constexpr std::uint32_t kColumns = D / 64;
  static constexpr std::uint32_t kKeyColumn = kBlock * 128;  ///< bytes of one column of K or V
  static constexpr std::uint32_t kKeyTile = kColumns * kKeyColumn;
  static constexpr std::uint32_t kQueryColumn = kTileRows * 128;
  static constexpr std::uint32_t kQueryTile = kColumns * kQueryColumn;
  static constexpr std::uint32_t kKeys = 0;                              ///< two stages of K, then V
  static constexpr std::uint32_t kQueries = kKeys + 2 * 2 * kKeyTile;    ///< two stages
  static constexpr std::uint32_t kStagings = kQueries + 2 * kQueryTile;  ///< one a consumer warp
  static constexpr std::uint32_t kVisits =
      kStagings + kConsumerWarps * kStagingBytes;  ///< two stages of a tile's visits
  static constexpr std::uint32_t kItems = kVisits + 2 * kTileRows * sizeof(Visit);
  static constexpr std::uint32_t kNonFinite = kItems + 2 * sizeof(WorkItem);  ///< a stage: NonFinite<D>
  static constexpr std::uint32_t kBarriers = round_up<std::uint32_t>(kNonFinite + 2 * sizeof(NonFinite<D>), 8);
  static constexpr std::uint32_t kBytes = kBarriers + 8 * 8;
  static_assert(sizeof(NonFinite<D>) <= kStagingBytes);
};
static_assert(AttendMemory<128, 128>::kBytes <= 227 * 1024, "what a block may have on this chip");

/// The kernel's barriers, two stages each.
struct AttendBarriers {
  std::uint64_t* keys_full;      ///< an arrival by the feeder, and the bytes
  std::uint64_t* keys_empty;     ///< an arrival a consumer warp
  std::uint64_t* queries_full;   ///< an arrival a lane of the feeder, and the bytes; two a lane without boxes
  std::uint64_t* queries_empty;  ///< an arrival a consumer warp
  __device__ explicit AttendBarriers(std::byte* at)
      : keys_full(reinterpret_cast<std::uint64_t*>(at)),
        keys_empty(keys_full + 2),
        queries_full(keys_full + 4),
        queries_empty(keys_full + 6) {}
};

/// Has the copy engine bring an item's K and V into a stage. One lane calls it.
template <class T, int D, int kBlock>
__device__ void feed_keys(const WorkItem& item, const TensorMap& k_map, const TensorMap& v_map, std::byte* k,
                          std::uint64_t* full) {
  using Memory = AttendMemory<D, kBlock>;
  ptx::arrive_expect_bytes(full, 2 * Memory::kKeyTile);
  const auto load = [&](std::byte* to, const TensorMap& map) {
    for (std::uint32_t column = 0; column < Memory::kColumns; ++column) {
      ptx::tensor_load(to + column * Memory::kKeyColumn, map, full, static_cast<std::int32_t>(column * 64),
                       item.kv_head, item.row, item.page);
    }
  };
  load(k, k_map);
  load(k + Memory::kKeyTile, v_map);
}

/// The rows of `positions` query positions by the copy engine: a box a position and column.
template <class T, int D, int kBlock>
__device__ void feed_boxes(const AttendArguments<T>& a, const TensorMap& q_map, std::int32_t kv_head,
                           const Visit* visits, std::int32_t positions, std::byte* rows, std::uint64_t* full) {
  using Memory = AttendMemory<D, kBlock>;
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::uint32_t box = static_cast<std::uint32_t>(a.group_size) * 128;
  const std::int32_t mine = lane < positions ? ceil_div(positions - lane, kWarpSize) : 0;
  // The arrival makes the visits visible to those who wait for the tile.
  ptx::arrive_expect_bytes(full, static_cast<std::uint32_t>(mine) * Memory::kColumns * box);
  for (std::int32_t position = lane; position < positions; position += kWarpSize) {
    for (std::uint32_t column = 0; column < Memory::kColumns; ++column) {
      ptx::tensor_load(rows + column * Memory::kQueryColumn + static_cast<std::uint32_t>(position) * box, q_map, full,
                       static_cast<std::int32_t>(column * 64), kv_head * a.group_size, visits[position].query);
    }
  }
}

/// The same by the warp's own copies, swizzled as the copy engine does. A row is D / 8 neighbouring lanes.
template <class T, int D, int kBlock>
__device__ void feed_pieces(const AttendArguments<T>& a, std::int32_t kv_head, const Visit* visits,
                            std::int32_t positions, std::byte* rows, std::uint64_t* full) {
  using Memory = AttendMemory<D, kBlock>;
  constexpr std::int32_t kPieces = D / 8, kRowsAtOnce = kWarpSize / kPieces;
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::int32_t piece = lane % kPieces;
  rows += static_cast<std::uint32_t>(piece / 8) * Memory::kQueryColumn;
  const std::uint32_t in_row = static_cast<std::uint32_t>(piece % 8 * 16);
  const T* q = a.q.at(0, kv_head * a.group_size) + piece * 8;
#pragma unroll 4
  for (std::int32_t row = lane / kPieces; row < positions * a.group_size; row += kRowsAtOnce) {
    const std::int32_t position = a.position_of(row);
    ptx::copy_16(rows + swizzled(static_cast<std::uint32_t>(row) * 128 + in_row, Swizzle::k128),
                 q + visits[position].query * a.q.strides[0] + (row - position * a.group_size) * a.q.strides[1]);
  }
  ptx::copy_arrive(full);
  ptx::arrive(full);  // for the visits
}

/// Feeds items until there are none, then an item of count -1.
template <class T, int D, int kBlock>
__device__ void feed(const AttendArguments<T>& a, const TensorMap& q_map, const TensorMap& k_map,
                     const TensorMap& v_map, std::byte* memory, const AttendBarriers& barriers) {
  using Memory = AttendMemory<D, kBlock>;
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::int32_t total = a.totals->items;
  std::uint32_t tile = 0;
  for (std::uint32_t number = 0;; ++number) {
    std::int32_t index = lane == 0 ? atomicAdd(&a.totals->next, 1) : 0;
    index = __shfl_sync(kFullMask, index, 0);
    WorkItem item{};
    item.count = -1;
    if (index < total) {
      item = a.items[index];
      if (item.count == 0) {
        --number;  // the stage stays free
        continue;
      }
    }
    const std::uint32_t stage = number % 2;
    ptx::wait(barriers.keys_empty + stage, (number / 2 & 1) ^ 1);
    if (lane == 0) {
      reinterpret_cast<WorkItem*>(memory + Memory::kItems)[stage] = item;
      if (item.count < 0) {
        ptx::arrive(barriers.keys_full + stage);
      } else {
        feed_keys<T, D, kBlock>(item, k_map, v_map, memory + Memory::kKeys + stage * 2 * Memory::kKeyTile,
                                barriers.keys_full + stage);
      }
    }
    if (item.count < 0) return;

    for (std::int32_t done = 0; done < item.count; done += a.positions, ++tile) {
      const std::uint32_t at = tile % 2;
      std::byte* rows = memory + Memory::kQueries + at * Memory::kQueryTile;
      auto* visits = reinterpret_cast<Visit*>(memory + Memory::kVisits) + at * kTileRows;
      const std::int32_t positions = min_of(a.positions, item.count - done);
      ptx::wait(barriers.queries_empty + at, (tile / 2 & 1) ^ 1);
      for (std::int32_t position = lane; position < positions; position += kWarpSize) {
        visits[position] = a.visits[item.first + done + position];
      }
      __syncwarp();
      if (a.has_whole_boxes()) {
        feed_boxes<T, D, kBlock>(a, q_map, item.kv_head, visits, positions, rows, barriers.queries_full + at);
      } else {
        feed_pieces<T, D, kBlock>(a, item.kv_head, visits, positions, rows, barriers.queries_full + at);
      }
    }
  }
}

/// Takes what is not finite out of V and notes where it was. All consumers call it.
template <class T, int D, int kBlock>
__device__ void remove_non_finite(std::byte* values, NonFinite<D>& found, std::uint32_t thread) {
  for (std::uint32_t column = thread; column < D; column += kConsumerThreads) found.clear(column, kBlock);
  if (thread == 0) found.any = 0;
  ptx::named_sync(1, kConsumerThreads);
  zero_non_finite<T, D, kBlock>(values, thread, kConsumerThreads, [&](std::uint32_t column, std::int32_t key, T value) {
    found.note(column, key, value);
  });
  ptx::fence_proxy_async();
  ptx::named_sync(1, kConsumerThreads);
}

/// One warpgroup's 64 rows of a tile. `rows` of the tile are valid.
template <class T, int D, int kBlock>
__device__ __forceinline__ void attend_tile(const AttendArguments<T>& a, const WorkItem& item, const std::byte* queries,
                                            const std::byte* keys, const std::byte* values, const Visit* visits,
                                            std::byte* staging, const NonFinite<D>& non_finite, std::int32_t rows) {
  using Memory = AttendMemory<D, kBlock>;
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  const std::uint32_t group = threadIdx.x / 128 - 1, warp = threadIdx.x / kWarpSize % 4;

  // S[64, kBlock] = Q K^T, 16 of the head dimension a step.
  float s[kBlock / 2];
  start_scores<T, D, kBlock>(s, queries + group * 64 * 128, Memory::kQueryColumn, keys);

  // Meanwhile: whose rows these are. A thread holds two rows, eight apart.
  const auto place_of = [&](std::int32_t row, std::int32_t& visible) {
    const std::int32_t position = a.position_of(row);
    const Visit visit = visits[position];
    visible = visit.slot_and_visible >> 8;
    const std::int64_t query = visit.query - a.first_query;
    return ((query * a.kv_heads + item.kv_head) * a.topk + (visit.slot_and_visible & 0xff)) * a.group_size + row -
           position * a.group_size;
  };
  const std::int32_t first_row = static_cast<std::int32_t>(group * 64 + warp * 16);
  std::int64_t places[2] = {0, 0};
  std::int32_t visible[2] = {kBlock, kBlock};
#pragma unroll
  for (std::int32_t h = 0; h < 2; ++h) {
    const std::int32_t row = first_row + static_cast<std::int32_t>(lane / 4) + 8 * h;
    if (row < rows) places[h] = place_of(row, visible[h]);
  }
  ptx::wgmma_wait<0>();
  ptx::fence_registers(s);

  // Softmax within the block, base 2.
  float top[2] = {-infinity(), -infinity()};
#pragma unroll
  for (int i = 0; i < kBlock / 2; ++i) {
    const int h = fragment_half(i);
    const std::int32_t column = fragment_column(i, lane);
    s[i] = column < visible[h] ? __fmul_rn(s[i], a.scale_log2) : -infinity();  // never fused: top is such a product
    top[h] = fmaxf(top[h], s[i]);
  }
  float sum[2] = {0, 0};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = row_max(top[h]);
    if (top[h] == -infinity()) top[h] = 0;  // nothing but -inf, or NaN: keep the subtraction defined
  }
  std::uint32_t p[kBlock / 16][4];
#pragma unroll
  for (int i = 0; i < kBlock / 2; i += 2) {
    const int h = fragment_half(i);
    const float low = ptx::exp2_fast(s[i] - top[h]), high = ptx::exp2_fast(s[i + 1] - top[h]);
    sum[h] += low + high;
    p[i / 8][i / 2 % 4] = pack_two<T>(low, high);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) sum[h] = row_sum(sum[h]);

  float o[D / 2];
  start_outputs<T, D, kBlock>(o, p, values, false);
#pragma unroll
  for (std::int32_t h = 0; h < 2; ++h) {
    const std::int32_t row = first_row + static_cast<std::int32_t>(lane / 4) + 8 * h;
    if (lane % 4 == 0 && row < rows) a.lse2[places[h]] = top[h] + log2f(sum[h]);
  }
  const float inverse[2] = {sum[0] == 0.0f ? 0.0f : 1.0f / sum[0], sum[1] == 0.0f ? 0.0f : 1.0f / sum[1]};
  ptx::wgmma_wait<0>();
  ptx::fence_registers(o);

  const NonFinite<D>* found = item.is_partial != 0 && non_finite.any != 0 ? &non_finite : nullptr;
  if (item.is_partial == 0) {
    float probes[2] = {0, 0};  // 0 times what is finite
#pragma unroll
    for (int i = 0; i < D / 2; ++i) probes[fragment_half(i)] = fmaf(o[i], 0.0f, probes[fragment_half(i)]);
    const std::int32_t row = first_row + static_cast<std::int32_t>(lane / 4);
    if (__any_sync(kFullMask, (row < rows && probes[0] != 0.0f) || (row + 8 < rows && probes[1] != 0.0f))) {
      auto* mine = reinterpret_cast<NonFinite<D>*>(staging);
      note_non_finite<T, D, kBlock>(values, *mine);
      found = mine;
    }
  }
  if (found != nullptr) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      o[i] = found->correct(o[i], fragment_column(i, lane), visible[fragment_half(i)]);
    }
  }

  T* targets[4];
#pragma unroll
  for (std::int32_t i = 0; i < 4; ++i) {
    const std::int32_t row = first_row + copied_row(i, lane);
    std::int32_t unused = 0;
    targets[i] = row < rows ? a.partial + place_of(row, unused) * D : nullptr;
  }
  store_rows<T, D>(o, inverse, staging, targets);
}

template <class T, int D, int kBlock>
__device__ __forceinline__ void consume(const AttendArguments<T>& a, std::byte* memory,
                                        const AttendBarriers& barriers) {
  using Memory = AttendMemory<D, kBlock>;
  const std::uint32_t thread = threadIdx.x - 128;
  const std::uint32_t lane = thread % kWarpSize;
  std::byte* staging = memory + Memory::kStagings + thread / kWarpSize * kStagingBytes;
  std::uint32_t tile = 0;
  for (std::uint32_t number = 0;; ++number) {
    const std::uint32_t stage = number % 2;
    ptx::wait(barriers.keys_full + stage, number / 2 & 1);
    const WorkItem item = reinterpret_cast<const WorkItem*>(memory + Memory::kItems)[stage];
    if (item.count < 0) return;
    std::byte* keys = memory + Memory::kKeys + stage * 2 * Memory::kKeyTile;
    std::byte* values = keys + Memory::kKeyTile;
    // A stage has its own: a warpgroup may start the next item while the other still reads this one's.
    NonFinite<D>& non_finite = reinterpret_cast<NonFinite<D>*>(memory + Memory::kNonFinite)[stage];
    if (item.is_partial != 0) remove_non_finite<T, D, kBlock>(values, non_finite, thread);
    for (std::int32_t done = 0; done < item.count; done += a.positions, ++tile) {
      const std::uint32_t at = tile % 2;
      ptx::wait(barriers.queries_full + at, tile / 2 & 1);
      if (!a.has_whole_boxes()) ptx::fence_proxy_async();  // what threads copied, a matrix product reads
      const std::int32_t rows = min_of(a.positions, item.count - done) * a.group_size;
      if (static_cast<std::int32_t>(thread / 128 * 64) < rows) {
        attend_tile<T, D, kBlock>(a, item, memory + Memory::kQueries + at * Memory::kQueryTile, keys, values,
                                  reinterpret_cast<const Visit*>(memory + Memory::kVisits) + at * kTileRows, staging,
                                  non_finite, rows);
      }
      __syncwarp();
      if (lane == 0) ptx::arrive(barriers.queries_empty + at);
    }
    if (lane == 0) ptx::arrive(barriers.keys_empty + stage);
  }
}

template <class T, int D, int kBlock>
__global__ void __launch_bounds__(kAttendThreads, 1)
    attend_blocks(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                  const __grid_constant__ TensorMap v_map, AttendArguments<T> a) {
  using Memory = AttendMemory<D, kBlock>;
  std::byte* memory = shared_memory();
  const AttendBarriers barriers(memory + Memory::kBarriers);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      ptx::barrier_init(barriers.keys_full + stage, 1);
      ptx::barrier_init(barriers.keys_empty + stage, kConsumerWarps);
      ptx::barrier_init(barriers.queries_full + stage, a.has_whole_boxes() ? kWarpSize : 2 * kWarpSize);
      ptx::barrier_init(barriers.queries_empty + stage, kConsumerWarps);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_launch();  // the merge may be set up behind this; it waits for this kernel's end
  // 65536 registers: 128 * 72 + 256 * 216 = 64512.
  if (threadIdx.x < 128) {
    ptx::lower_registers<72>();
    if (threadIdx.x < kWarpSize) feed<T, D, kBlock>(a, q_map, k_map, v_map, memory, barriers);
  } else {
    ptx::raise_registers<216>();
    consume<T, D, kBlock>(a, memory, barriers);
  }
}

// The call
// -------------------------------------------------------------------------------------------------------------

/// run_sparse_attention of one instantiation; `thread_blocks` of the persistent kernel, one a multiprocessor.
template <class T, int D, int kBlock>
void run_fast_attention(const Context& context, const SparseAttentionParams& params, const SparseAttentionPlan& plan,
                        unsigned thread_blocks, const TensorView& out, const TensorView& lse) {
  const Batch& batch = params.batch;
  const std::int64_t rows = params.q.size(0), query_heads = params.q.size(1);
  const std::int64_t kv_heads = params.k.size(params.k.rank - 2);
  if (rows == 0) return;
  const std::int64_t key_rows = params.k.size(0);
  std::byte* workspace = static_cast<std::byte*>(context.workspace);

  ReverseIndex index{};
  index.batch = view_of(batch);
  index.blocks = strided<std::int32_t>(params.blocks);
  index.kv_heads = static_cast<std::int32_t>(kv_heads);
  index.topk = static_cast<std::int32_t>(params.blocks.size(2));
  index.block_size = kBlock;
  index.page = batch.is_paged ? static_cast<std::int32_t>(params.k.size(1)) : 0;
  index.blocks_bound = static_cast<std::int32_t>(plan.blocks_bound);
  index.visits_per_item = static_cast<std::int32_t>(plan.positions_per_tile * kTilesPerItem);
  index.counts = reinterpret_cast<std::int32_t*>(workspace + plan.counts);
  index.partial = reinterpret_cast<std::int32_t*>(workspace + plan.partial_flags);
  index.totals = reinterpret_cast<WorkTotals*>(workspace + plan.totals);
  index.visits = reinterpret_cast<Visit*>(workspace + plan.visits);
  index.items = reinterpret_cast<WorkItem*>(workspace + plan.items);

  AttendArguments<T> attend{};
  attend.q = strided<T>(params.q);
  attend.visits = index.visits;
  attend.items = index.items;
  attend.totals = index.totals;
  attend.partial = reinterpret_cast<T*>(workspace + plan.partial);
  attend.lse2 = reinterpret_cast<float*>(workspace + plan.lse);
  attend.kv_heads = index.kv_heads;
  attend.group_size = static_cast<std::int32_t>(query_heads / kv_heads);
  attend.topk = index.topk;
  attend.positions = static_cast<std::int32_t>(plan.positions_per_tile);
  attend.reciprocal = ceil_div(65536u, static_cast<std::uint32_t>(attend.group_size));
  attend.scale_log2 = static_cast<float>(*params.scale * 1.4426950408889634);

  CombineArguments<T> combine{};
  combine.batch = index.batch;
  combine.blocks = index.blocks;
  combine.partial = attend.partial;
  combine.lse2 = attend.lse2;
  combine.out = strided<T>(out);
  combine.lse = strided<float>(lse);
  combine.kv_heads = index.kv_heads;
  combine.group_size = attend.group_size;
  combine.topk = index.topk;
  combine.block_size = kBlock;
  combine.out_is_aligned =
      reinterpret_cast<std::uintptr_t>(out.data) % 8 == 0 && out.stride(0) % 4 == 0 && out.stride(1) % 4 == 0;

  // Without a key there is nothing to attend to, and nothing a tensor map could describe.
  const bool has_keys = key_rows > 0 && (!batch.is_paged || params.k.size(1) > 0);
  TensorMap q_map{}, k_map{}, v_map{};
  if (has_keys) {
    q_map = map_queries(params.q, attend.group_size, 1);
    k_map = map_keys(params.k, batch.is_paged, kBlock);
    v_map = map_keys(params.v, batch.is_paged, kBlock);
  }
  for (std::int64_t first = 0; first < rows; first += plan.queries_at_once) {
    const std::int64_t queries = min_of(plan.queries_at_once, rows - first);
    index.first_query = attend.first_query = combine.first_query = static_cast<std::int32_t>(first);
    index.queries = combine.queries = static_cast<std::int32_t>(queries);
    if (has_keys) {
      clear_memory(context.stream, workspace + plan.totals, plan.zero_end - plan.totals);
      if (plan.is_direct) {
        const std::int64_t visits = kv_heads * queries * index.topk;
        launch(dim3(static_cast<unsigned>(ceil_div(visits, std::int64_t{kIndexThreads}))), dim3(kIndexThreads), 0,
               context.stream, list_visits, index);
      } else {
        const dim3 grid(static_cast<unsigned>(ceil_div(queries, std::int64_t{kIndexThreads})),
                        static_cast<unsigned>(kv_heads));
        launch(grid, dim3(kIndexThreads), 0, context.stream, count_visits, index);
        launch(dim3(1), dim3(kPlanThreads), kPlanThreads * 8, context.stream, plan_items, index);
        launch(grid, dim3(kIndexThreads), 0, context.stream, place_visits, index);
      }
      launch(dim3(thread_blocks), dim3(kAttendThreads), AttendMemory<D, kBlock>::kBytes, context.stream,
             attend_blocks<T, D, kBlock>, q_map, k_map, v_map, attend);
    }
    const std::int64_t warps = queries * query_heads;
    launch_dependent(dim3(static_cast<unsigned>(ceil_div(warps, std::int64_t{kCombineWarps}))),
                     dim3(kCombineWarps * kWarpSize), 0, context.stream, combine_partials<T, D>, combine);
  }
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
