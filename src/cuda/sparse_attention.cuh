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
#include "src/cuda/block_rows.cuh"
#include "src/cuda/finite_values.cuh"
#include "src/cuda/ptx.cuh"
#include "src/cuda/reverse_index.cuh"
#include "src/cuda/sparse_attention.h"

namespace msa::cuda {

inline constexpr unsigned kAttendThreads = 384;  // a warpgroup that feeds (one warp of it), two that compute
inline constexpr std::uint32_t kConsumerWarps = 8;
inline constexpr std::uint32_t kConsumerThreads = 256;

/// How query rows lie in a tile: position after position, the heads of a group each.
struct TileShape {
  std::int32_t group_size;
  /// 1 / group_size in 16 fractional bits, rounded up. row * it >> 16 is row / group_size, exactly: it is too large by
  /// less than 2^-16, and row * group_size < 2^16.
  std::uint32_t reciprocal;
  float scale_log2;  ///< scale * log2(e), for the scores of the rows

  /// The query position of a tile that `row` belongs to.
  __device__ std::int32_t position_of(std::int32_t row) const {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(row) * reciprocal >> 16);
  }
  /// Whether a position's rows fill groups of eight, which the swizzle permutes among: the copy engine brings them, one
  /// box a position and column. Else they would be many small boxes at odd places, and the feeding warp copies 16 bytes
  /// a lane instead: at group size 1, 64 instructions a tile in place of 256 boxes.
  __device__ bool has_whole_boxes() const { return group_size % 8 == 0; }
};

template <class T>
struct AttendArguments {
  Strided<const T> q;         ///< [queries, query_heads, D]
  ReverseIndex index;         ///< whose items are worked off
  std::int32_t direct_items;  ///< > 0: so many of direct_item, and no lists
  T* partial;                 ///< [queries, kv_heads, topk, group_size, D] of this chunk, every row normalised
  float* lse2;                ///< the same without D: log2 of the sum of exponentials
  std::int32_t positions;     ///< query positions a tile
  TileShape shape;
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

  /// Every thread of the block calls it.
  __device__ void init(std::uint32_t query_arrivals) const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < 2; ++stage) {
        ptx::barrier_init(keys_full + stage, 1);
        ptx::barrier_init(keys_empty + stage, kConsumerWarps);
        ptx::barrier_init(queries_full + stage, query_arrivals);
        ptx::barrier_init(queries_empty + stage, kConsumerWarps);
      }
      ptx::fence_barrier_init();
    }
    __syncthreads();
  }
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
  const std::uint32_t box = static_cast<std::uint32_t>(a.shape.group_size) * 128;
  const std::int32_t mine = lane < positions ? ceil_div(positions - lane, kWarpSize) : 0;
  // The arrival makes the visits visible to those who wait for the tile.
  ptx::arrive_expect_bytes(full, static_cast<std::uint32_t>(mine) * Memory::kColumns * box);
  for (std::int32_t position = lane; position < positions; position += kWarpSize) {
    for (std::uint32_t column = 0; column < Memory::kColumns; ++column) {
      ptx::tensor_load(rows + column * Memory::kQueryColumn + static_cast<std::uint32_t>(position) * box, q_map, full,
                       static_cast<std::int32_t>(column * 64), kv_head * a.shape.group_size, visits[position].query);
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
  const T* q = a.q.at(0, kv_head * a.shape.group_size) + piece * 8;
#pragma unroll 4
  for (std::int32_t row = lane / kPieces; row < positions * a.shape.group_size; row += kRowsAtOnce) {
    const std::int32_t position = a.shape.position_of(row);
    ptx::copy_16(rows + swizzled(static_cast<std::uint32_t>(row) * 128 + in_row, Swizzle::k128),
                 q + visits[position].query * a.q.strides[0] + (row - position * a.shape.group_size) * a.q.strides[1]);
  }
  ptx::copy_arrive(full);
  ptx::arrive(full);  // for the visits
}

/// The warp's next item, count -1 when there is none; turn counts the calls. Lists are drawn from, direct items dealt.
template <class T>
__device__ DirectItem take_item(const AttendArguments<T>& a, std::int32_t turn) {
  DirectItem result{};
  if (a.direct_items > 0) {
    const std::int32_t index = static_cast<std::int32_t>(blockIdx.x) + turn * static_cast<std::int32_t>(gridDim.x);
    if (index < a.direct_items) return direct_item(a.index, index, min_of(a.positions, kWarpSize));
  } else {
    std::int32_t index = threadIdx.x % kWarpSize == 0 ? atomicAdd(&a.index.totals->next, 1) : 0;
    index = __shfl_sync(kFullMask, index, 0);
    if (index < a.index.totals->items) {
      result.item = a.index.items[index];
      return result;
    }
  }
  result.item.count = -1;
  return result;
}

/// Feeds items until there are none, then an item of count -1.
template <class T, int D, int kBlock>
__device__ void feed(const AttendArguments<T>& a, const TensorMap& q_map, const TensorMap& k_map,
                     const TensorMap& v_map, std::byte* memory, const AttendBarriers& barriers) {
  using Memory = AttendMemory<D, kBlock>;
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  std::uint32_t tile = 0, number = 0;
  for (std::int32_t turn = 0;; ++turn) {
    const DirectItem taken = take_item(a, turn);
    const WorkItem& item = taken.item;
    if (item.count == 0) continue;
    const std::uint32_t stage = number % 2;
    ptx::wait(barriers.keys_empty + stage, (number / 2 & 1) ^ 1);
    ++number;
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
      if (a.direct_items > 0) {
        if (taken.place >= 0) visits[taken.place] = taken.visit;
      } else {
        for (std::int32_t position = lane; position < positions; position += kWarpSize) {
          visits[position] = a.index.visits[item.first + done + position];
        }
      }
      __syncwarp();
      if (a.shape.has_whole_boxes()) {
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
__device__ __forceinline__ void attend_tile(const AttendArguments<T>& a, std::int32_t kv_head,
                                            const BlockTile<D>& block, const std::byte* queries, const Visit* visits,
                                            std::byte* staging, std::int32_t rows) {
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  const std::uint32_t group = threadIdx.x / 128 - 1, warp = threadIdx.x / kWarpSize % 4;
  const std::int32_t first_row = static_cast<std::int32_t>(group * 64 + warp * 16);
  const auto place_of = [&](std::int32_t row) {
    const std::int32_t position = a.shape.position_of(row);
    const Visit visit = visits[position];
    const std::int64_t query = visit.query - a.index.first_query;
    return ((query * a.index.kv_heads + kv_head) * a.index.topk + (visit.slot_and_visible & 0xff)) *
               a.shape.group_size +
           row - position * a.shape.group_size;
  };
  std::int64_t places[2] = {-1, -1};  // a thread holds two rows, eight apart
  BlockRows<D> result;
  attend_block<T, D, kBlock>(
      block, queries + group * 64 * 128, AttendMemory<D, kBlock>::kQueryColumn, a.shape.scale_log2, staging,
      [&](std::int32_t(&visible)[2]) {
#pragma unroll
        for (std::int32_t h = 0; h < 2; ++h) {
          const std::int32_t row = first_row + static_cast<std::int32_t>(lane / 4) + 8 * h;
          if (row >= rows) continue;
          places[h] = place_of(row);
          visible[h] = visits[a.shape.position_of(row)].slot_and_visible >> 8;
        }
      },
      result);
#pragma unroll
  for (std::int32_t h = 0; h < 2; ++h) {
    if (lane % 4 == 0 && places[h] >= 0) a.lse2[places[h]] = result.lse2[h];
  }
  T* targets[4];
#pragma unroll
  for (std::int32_t i = 0; i < 4; ++i) {
    const std::int32_t row = first_row + copied_row(i, lane);
    targets[i] = row < rows ? a.partial + place_of(row) * D : nullptr;
  }
  store_rows<T, D>(result.o, result.inverse, staging, targets);
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
    const BlockTile<D> block{keys, values, item.is_partial != 0, &non_finite};
    for (std::int32_t done = 0; done < item.count; done += a.positions, ++tile) {
      const std::uint32_t at = tile % 2;
      ptx::wait(barriers.queries_full + at, tile / 2 & 1);
      if (!a.shape.has_whole_boxes()) ptx::fence_proxy_async();  // what threads copied, a matrix product reads
      const std::int32_t rows = min_of(a.positions, item.count - done) * a.shape.group_size;
      if (static_cast<std::int32_t>(thread / 128 * 64) < rows) {
        attend_tile<T, D, kBlock>(a, item.kv_head, block, memory + Memory::kQueries + at * Memory::kQueryTile,
                                  reinterpret_cast<const Visit*>(memory + Memory::kVisits) + at * kTileRows, staging,
                                  rows);
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
  barriers.init(a.shape.has_whole_boxes() ? kWarpSize : 2 * kWarpSize);
  ptx::griddepcontrol_wait();    // for the selection, or the lists
  ptx::griddepcontrol_launch();  // the merge may be set up behind this; it waits for this kernel's end
  // 65536 registers: 128 * 88 + 256 * 208 = 64512.
  if (threadIdx.x < 128) {
    ptx::lower_registers<88>();
    if (threadIdx.x < kWarpSize) feed<T, D, kBlock>(a, q_map, k_map, v_map, memory, barriers);
  } else {
    ptx::raise_registers<208>();
    consume<T, D, kBlock>(a, memory, barriers);
  }
}

}  // namespace msa::cuda
