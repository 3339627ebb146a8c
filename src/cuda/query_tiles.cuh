// SPDX-License-Identifier: Apache-2.0
// Which tiles of neighbouring queries share most of their blocks, and the blocks of each such tile: every block that a
// query of the tile selects, once, with the queries that do. These tiles go query by query (shared_tiles.cuh) and leave
// no partial results; the others stay in the reverse index. The choice changes no bit: both orders merge a row's blocks
// by the same operations. Tested in tests/cuda/reverse_index_test.cc.
#pragma once

#include <cstdint>

#include "src/cuda/reverse_index.cuh"

namespace msa::cuda {

inline constexpr unsigned kPlanTilesWarps = 8;

/// A lane's way through the blocks of its query.
struct BlockCursor {
  static constexpr std::uint32_t kNone = ~0u;
  std::int32_t slot = -1;
  std::uint32_t bin = kNone;  ///< as in visit_of; kNone behind the last
  std::int32_t visible = 0;

  __device__ void advance(const ReverseIndex& a, const QueryPlace& place, std::int32_t kv_head, std::int32_t query) {
    bin = kNone;
    while (bin == kNone && ++slot < a.topk) {
      bin = static_cast<std::uint32_t>(visit_of(a, place, kv_head, query, slot, visible));
    }
  }
};

/// A warp a (kv head, tile), a lane a query. Ids ascend along a row, and so do bins, so that the least bin that any
/// lane stands at is the next block of the union.
[[maybe_unused]] static __global__ void plan_tiles(ReverseIndex a) {
  const QueryTiles& t = a.tiles;
  const std::int32_t index = static_cast<std::int32_t>(blockIdx.x * kPlanTilesWarps + threadIdx.x / kWarpSize);
  if (index >= a.kv_heads * t.tiles) return;
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::int32_t kv_head = index / t.tiles, first = index % t.tiles * t.positions;
  const std::int32_t query = a.first_query + first + lane;
  const bool is_real = lane < t.positions && first + lane < a.queries;
  const QueryPlace place = is_real ? a.batch.place(query) : QueryPlace{};
  TileBlock* blocks = t.blocks + std::int64_t{index} * t.most_blocks;

  BlockCursor cursor;
  cursor.advance(a, place, kv_head, query);
  std::int32_t count = 0, visits = 0;
  for (; count <= t.most_blocks; ++count) {
    const std::uint32_t least = __reduce_min_sync(kFullMask, cursor.bin);
    if (least == BlockCursor::kNone) break;
    const bool is_member = cursor.bin == least;
    TileBlock block{};
    block.members = __ballot_sync(kFullMask, is_member);
    block.is_partial = __any_sync(kFullMask, is_member && cursor.visible < a.block_size);
    visits += __popc(block.members);
    if (lane == __ffs(static_cast<int>(block.members)) - 1 && count < t.most_blocks) {
      WorkItem where{};
      locate_block(a, static_cast<std::int32_t>(least) % a.blocks_bound, where);
      block.page = where.page;
      block.row = where.row;
      block.id = *a.blocks.at(kv_head, query, cursor.slot);
      blocks[count] = block;
    }
    if (is_member) cursor.advance(a, place, kv_head, query);
  }
  const bool is_shared = visits > 0 && count <= t.most_blocks && count * t.positions <= t.most_waste * visits;
  if (lane != 0) return;
  t.counts[index] = is_shared ? count : 0;
  if (is_shared) t.shared[atomicAdd(&a.totals->shared_tiles, 1)] = index;  // in any order
}

}  // namespace msa::cuda
