// SPDX-License-Identifier: Apache-2.0
// Attention of tiles of neighbouring queries that share most of their blocks (query_tiles.cuh): a persistent kernel
// that keeps a tile's queries and sums on the chip while the blocks of all of them pass by, so that no partial result
// is written. A row merges its blocks in the order of its slots by the operations of attention_combine.cuh, each
// block's result rounded as a partial result is, and so gets the bits that attend_blocks and combine_partials give. One
// warp feeds, two warpgroups of 64 rows compute. Tested in tests/cuda/sparse_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cuda/sparse_attention.cuh"

namespace msa::cuda {

template <class T>
struct SharedTilesArguments {
  BatchView batch;
  QueryTiles tiles;
  WorkTotals* totals;
  Strided<T> out;  ///< rows 16-byte aligned
  Strided<float> lse;
  std::int32_t first_query, queries;  ///< the rows of this chunk
  TileShape shape;
};

/// A tile of queries as the feeder hands it over.
struct alignas(8) QueryTile {
  std::int32_t blocks;  ///< how many pass by; -1: no more tiles
  std::int32_t kv_head;
  std::int32_t first, count;  ///< rows of the query buffers
  std::int32_t positions[kWarpSize];
};

/// The memory of attend_blocks, with a QueryTile in place of a tile's visits and a TileBlock in place of an item.
template <int D, int kBlock>
struct SharedTilesMemory : AttendMemory<D, kBlock> {
  static constexpr std::uint32_t kTileBytes = kTileRows * sizeof(Visit);
  static_assert(sizeof(QueryTile) <= kTileBytes && sizeof(TileBlock) <= sizeof(WorkItem));
  __device__ static QueryTile& tile(std::byte* memory, std::uint32_t stage) {
    return *reinterpret_cast<QueryTile*>(memory + SharedTilesMemory::kVisits + stage * kTileBytes);
  }
  __device__ static TileBlock& block(std::byte* memory, std::uint32_t stage) {
    return *reinterpret_cast<TileBlock*>(memory + SharedTilesMemory::kItems + stage * sizeof(WorkItem));
  }
};

/// Fills in the next tile. A warp calls it; every lane returns the tile's place in QueryTiles::counts, -1 at the end.
template <class T>
__device__ std::int32_t take_tile(const SharedTilesArguments<T>& a, QueryTile& tile) {
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  std::int32_t number = lane == 0 ? atomicAdd(&a.totals->next_tile, 1) : 0;
  number = __shfl_sync(kFullMask, number, 0);
  const std::int32_t index = number < a.totals->shared_tiles ? a.tiles.shared[number] : -1;
  if (index >= 0) {
    const std::int32_t first = index % a.tiles.tiles * a.tiles.positions;
    const std::int32_t count = min_of(a.tiles.positions, a.queries - first);
    if (lane < count) tile.positions[lane] = a.batch.place(a.first_query + first + lane).position;
    if (lane == 0) {
      tile.kv_head = index / a.tiles.tiles;
      tile.first = a.first_query + first;
      tile.count = count;
    }
  }
  if (lane == 0) tile.blocks = index < 0 ? -1 : a.tiles.counts[index];
  __syncwarp();
  return index;
}

template <class T, int D, int kBlock>
__device__ void feed_shared_tiles(const SharedTilesArguments<T>& a, const TensorMap& q_map, const TensorMap& k_map,
                                  const TensorMap& v_map, std::byte* memory, const AttendBarriers& barriers) {
  using Memory = SharedTilesMemory<D, kBlock>;
  const bool leads = threadIdx.x % kWarpSize == 0;
  std::uint32_t key_tile = 0;
  for (std::uint32_t number = 0;; ++number) {
    const std::uint32_t at = number % 2;
    ptx::wait(barriers.queries_empty + at, (number / 2 & 1) ^ 1);
    QueryTile& tile = Memory::tile(memory, at);
    const std::int32_t index = take_tile(a, tile);
    std::uint64_t* full = barriers.queries_full + at;
    if (index < 0) {
      if (leads) ptx::arrive(full);
      return;
    }
    if (leads) {  // the tile's rows are neighbours: one box a column, with zeros behind the last query
      const std::uint32_t box = static_cast<std::uint32_t>(a.tiles.positions * a.shape.group_size) * 128;
      ptx::arrive_expect_bytes(full, Memory::kColumns * box);
      for (std::uint32_t column = 0; column < Memory::kColumns; ++column) {
        ptx::tensor_load(memory + Memory::kQueries + at * Memory::kQueryTile + column * Memory::kQueryColumn, q_map,
                         full, static_cast<std::int32_t>(column * 64), tile.kv_head * a.shape.group_size, tile.first);
      }
    }
    const TileBlock* blocks = a.tiles.blocks + std::int64_t{index} * a.tiles.most_blocks;
    for (std::int32_t i = 0; i < tile.blocks; ++i, ++key_tile) {
      const std::uint32_t stage = key_tile % 2;
      ptx::wait(barriers.keys_empty + stage, (key_tile / 2 & 1) ^ 1);
      if (!leads) continue;
      Memory::block(memory, stage) = blocks[i];
      WorkItem where{};
      where.kv_head = tile.kv_head;
      where.page = blocks[i].page;
      where.row = blocks[i].row;
      feed_keys<T, D, kBlock>(where, k_map, v_map, memory + Memory::kKeys + stage * 2 * Memory::kKeyTile,
                              barriers.keys_full + stage);
    }
    __syncwarp();
  }
}

/// A thread's two rows of a tile, and what they have merged so far.
template <int D>
struct MergedRows {
  std::uint32_t members[2];   ///< the row's bit of TileBlock::members; 0: no such row
  std::int32_t positions[2];  ///< in its sequence
  RunningWeights weights[2];
  float sums[D / 2] = {};

  __device__ std::int32_t visible(int h, const TileBlock& block, std::int32_t block_size) const {
    if ((block.members & members[h]) == 0) return 0;
    return min_of(block_size, positions[h] - block.id * block_size + 1);
  }

  /// Takes a block's result, rounded as a partial result is.
  template <class T>
  __device__ __forceinline__ void merge(const BlockRows<D>& block, const bool (&sees)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float weight = 0, rescale = 0;
      weights[h].add(block.lse2[h], weight, rescale);
      if (rescale != 1.0f) {
#pragma unroll
        for (int i = 2 * h; i < D / 2; i += 4) {
          sums[i] = rescale_sum(sums[i], rescale);
          sums[i + 1] = rescale_sum(sums[i + 1], rescale);
        }
      }
      if (!sees[h]) continue;
#pragma unroll
      for (int i = 2 * h; i < D / 2; i += 4) {
        const std::uint32_t both = pack_two<T>(block.o[i] * block.inverse[h], block.o[i + 1] * block.inverse[h]);
        sums[i] = add_weighted(sums[i], weight, to_float(T{static_cast<std::uint16_t>(both)}));
        sums[i + 1] = add_weighted(sums[i + 1], weight, to_float(T{static_cast<std::uint16_t>(both >> 16)}));
      }
    }
  }
};

/// The bits of the queries whose rows are among the 64 of a warpgroup.
__device__ inline std::uint32_t members_of_group(const TileShape& shape, std::int32_t first_row, std::int32_t rows) {
  if (first_row >= rows) return 0;
  const std::int32_t first = shape.position_of(first_row), last = shape.position_of(min_of(rows, first_row + 64) - 1);
  return ~0u >> (31 - last) & ~0u << first;
}

template <class T, int D, int kBlock>
__device__ __forceinline__ void consume_shared_tiles(const SharedTilesArguments<T>& a, std::byte* memory,
                                                     const AttendBarriers& barriers) {
  using Memory = SharedTilesMemory<D, kBlock>;
  const std::uint32_t thread = threadIdx.x - 128, lane = thread % kWarpSize;
  const std::uint32_t group = thread / 128, warp = thread / kWarpSize % 4;
  const std::int32_t first_row = static_cast<std::int32_t>(group * 64 + warp * 16);
  std::byte* staging = memory + Memory::kStagings + thread / kWarpSize * kStagingBytes;
  std::uint32_t key_tile = 0;
  for (std::uint32_t number = 0;; ++number) {
    const std::uint32_t at = number % 2;
    ptx::wait(barriers.queries_full + at, number / 2 & 1);
    const QueryTile& tile = Memory::tile(memory, at);
    const std::int32_t blocks = tile.blocks;
    if (blocks < 0) return;
    const std::int32_t rows = tile.count * a.shape.group_size;
    const std::uint32_t group_members = members_of_group(a.shape, static_cast<std::int32_t>(group * 64), rows);
    MergedRows<D> merged;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int32_t row = first_row + static_cast<std::int32_t>(lane / 4) + 8 * h;
      const std::int32_t position = a.shape.position_of(row);
      merged.members[h] = row < rows ? 1u << position : 0u;
      merged.positions[h] = row < rows ? tile.positions[position] : -1;
    }
    for (std::int32_t i = 0; i < blocks; ++i, ++key_tile) {
      const std::uint32_t stage = key_tile % 2;
      ptx::wait(barriers.keys_full + stage, key_tile / 2 & 1);
      const TileBlock block = Memory::block(memory, stage);
      std::byte* keys = memory + Memory::kKeys + stage * 2 * Memory::kKeyTile;
      std::byte* values = keys + Memory::kKeyTile;
      NonFinite<D>& non_finite = reinterpret_cast<NonFinite<D>*>(memory + Memory::kNonFinite)[stage];
      if (block.is_partial != 0) remove_non_finite<T, D, kBlock>(values, non_finite, thread);
      if ((block.members & group_members) != 0) {
        BlockRows<D> result;
        bool sees[2] = {false, false};
        attend_block<T, D, kBlock>(
            BlockTile<D>{keys, values, block.is_partial != 0, &non_finite},
            memory + Memory::kQueries + at * Memory::kQueryTile + group * 64 * 128, Memory::kQueryColumn,
            a.shape.scale_log2, staging,
            [&](std::int32_t(&visible)[2]) {
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                visible[h] = merged.visible(h, block, kBlock);
                sees[h] = visible[h] > 0;
              }
            },
            result);
        merged.template merge<T>(result, sees);
      }
      __syncwarp();
      if (lane == 0) ptx::arrive(barriers.keys_empty + stage);
    }

    T* targets[4];
#pragma unroll
    for (std::int32_t i = 0; i < 4; ++i) {
      const std::int32_t row = first_row + copied_row(i, lane);
      const std::int32_t position = a.shape.position_of(row);
      const std::int32_t head = tile.kv_head * a.shape.group_size + row - position * a.shape.group_size;
      targets[i] = row < rows ? a.out.at(tile.first + position, head) : nullptr;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int32_t row = first_row + static_cast<std::int32_t>(lane / 4) + 8 * h;
      const std::int32_t position = a.shape.position_of(row);
      const std::int32_t head = tile.kv_head * a.shape.group_size + row - position * a.shape.group_size;
      if (lane % 4 == 0 && row < rows) *a.lse.at(tile.first + position, head) = merged.weights[h].lse();
    }
    __syncwarp();
    if (lane == 0) ptx::arrive(barriers.queries_empty + at);
    const float inverse[2] = {merged.weights[0].inverse(), merged.weights[1].inverse()};
    store_rows<T, D>(merged.sums, inverse, staging, targets);
  }
}

template <class T, int D, int kBlock>
__global__ void __launch_bounds__(kAttendThreads, 1)
    attend_shared_tiles(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                        const __grid_constant__ TensorMap v_map, SharedTilesArguments<T> a) {
  using Memory = SharedTilesMemory<D, kBlock>;
  std::byte* memory = shared_memory();
  const AttendBarriers barriers(memory + Memory::kBarriers);
  barriers.init(1);
  ptx::griddepcontrol_launch();  // the merge of the other tiles waits for this kernel's end
  if (threadIdx.x < 128) {
    ptx::lower_registers<40>();  // 128 * 40 + 256 * 232 = 64512
    if (threadIdx.x < kWarpSize) feed_shared_tiles<T, D, kBlock>(a, q_map, k_map, v_map, memory, barriers);
  } else {
    ptx::raise_registers<232>();
    consume_shared_tiles<T, D, kBlock>(a, memory, barriers);
  }
  // It may run beside attend_blocks, which it does not depend on; who waits for its end relies on that one's, too.
  ptx::griddepcontrol_wait();
}

}  // namespace msa::cuda
