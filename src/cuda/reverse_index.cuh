// SPDX-License-Identifier: Apache-2.0
// From a selection, which says of each query what blocks it visits, to lists that say of each (kv head, block) what
// queries visit it: a counting sort in three kernels (count_visits, plan_items, place_visits), and the work items of
// the attention kernel, each a stretch of one list. Only counts and places are taken by atomics: which queries share a
// tile does not change a bit of any row's result. Rows behind the last sequence and ids that are no block of their
// query drop out. Tested in tests/cuda/reverse_index_test.cc.
#pragma once

#include <cstdint>

#include "src/cuda/batch.cuh"

namespace msa::cuda {

/// One (query, block) pair.
struct alignas(8) Visit {
  std::int32_t query;             ///< row of the query buffers
  std::int32_t slot_and_visible;  ///< column of `blocks`, and how many of the block's tokens the query sees << 8
};

/// Visits [first, first + count) of one block, for one thread block to work off.
struct alignas(16) WorkItem {
  std::int32_t first, count;  ///< count 0: nothing to do
  std::int32_t kv_head;
  std::int32_t page, row;   ///< of the block's first key: page id (0 when packed) and token within it
  std::int32_t is_partial;  ///< 1: some visit sees less than the whole block
  std::int32_t piece;       ///< number of this item among those of its list
  std::int32_t pieces;      ///< how many its list has
};

/// Counters of a chunk, zeroed before it.
struct alignas(16) WorkTotals {
  std::int32_t items;         ///< written by plan_items
  std::int32_t next;          ///< first item nobody took yet
  std::int32_t shared_tiles;  ///< of QueryTiles::shared
  std::int32_t next_tile;     ///< first of them nobody took yet
};

/// A block of a tile of queries.
struct alignas(8) TileBlock {
  std::int32_t page, row;   ///< as in WorkItem
  std::int32_t id;          ///< within its sequence
  std::uint32_t members;    ///< bit i: query i of the tile visits it
  std::int32_t is_partial;  ///< 1: some member sees less than the whole block
  std::int32_t unused;
};

/// Tiles of neighbouring queries of a chunk, see query_tiles.cuh.
struct QueryTiles {
  std::int32_t positions;    ///< queries a tile, at most 32; 0: there are no tiles
  std::int32_t tiles;        ///< of the chunk
  std::int32_t most_blocks;  ///< of a shared tile
  std::int32_t most_waste;   ///< of a shared tile: blocks * positions / visits
  std::int32_t* counts;      ///< [kv_heads, tiles]: its blocks, 0 when it is not shared
  std::int32_t* shared;      ///< [kv_heads * tiles]: places in `counts` of those that are
  TileBlock* blocks;         ///< [kv_heads, tiles, most_blocks]

  /// Whether query `local` of the chunk is in a shared tile.
  __device__ bool has(std::int32_t kv_head, std::int32_t local) const {
    return positions > 0 && counts[kv_head * tiles + local / positions] > 0;
  }
};

struct ReverseIndex {
  BatchView batch;
  Strided<const std::int32_t> blocks;  ///< [kv_heads, queries, topk]
  std::int32_t kv_heads, topk;
  std::int32_t block_size;
  std::int32_t page;                  ///< tokens a page; 0 when packed
  std::int32_t first_query, queries;  ///< the rows of this chunk
  std::int32_t blocks_bound;          ///< block numbers of a batch lie below it
  std::int32_t visits_per_item;       ///< at most
  std::int32_t* counts;               ///< [kv_heads * blocks_bound]; zeroed before; later the place of the next visit
  std::int32_t* partial;              ///< the same: whether a visit sees only a part; zeroed before
  QueryTiles tiles;                   ///< what they share is left out
  WorkTotals* totals;
  Visit* visits;  ///< [kv_heads * queries * topk]
  WorkItem* items;
};

/// Tokens of block `id` that a query at `position` sees; 0 when id is none of its blocks.
__device__ inline std::int32_t visible_tokens(std::int32_t id, std::int32_t position, std::int32_t block_size) {
  if (id < 0 || position < 0 || id > position / block_size) return 0;
  return min_of(block_size, position - id * block_size + 1);
}

/// Bit i: slot i of the query holds a block that it visits. All lanes of a warp call it with the same arguments.
__device__ inline std::uint64_t visited_slots(const BatchView& batch, const Strided<const std::int32_t>& blocks,
                                              std::int32_t kv_head, std::int32_t query, std::int32_t topk,
                                              std::int32_t block_size) {
  const QueryPlace place = batch.place(query);
  std::uint64_t slots = 0;
  for (std::int32_t base = 0; base < topk; base += kWarpSize) {
    const std::int32_t slot = base + static_cast<std::int32_t>(threadIdx.x % kWarpSize);
    const bool is_visit = place.sequence >= 0 && slot < topk &&
                          visible_tokens(*blocks.at(kv_head, query, slot), place.position, block_size) > 0;
    slots |= static_cast<std::uint64_t>(__ballot_sync(kFullMask, is_visit)) << base;
  }
  return slots;
}

/// The lane's visit of `slot`: its bin, and what it sees (0: no visit).
__device__ inline std::int32_t visit_of(const ReverseIndex& a, const QueryPlace& place, std::int32_t kv_head,
                                        std::int32_t query, std::int32_t slot, std::int32_t& visible) {
  visible = 0;
  if (place.sequence < 0) return -1;
  const std::int32_t id = *a.blocks.at(kv_head, query, slot);
  visible = visible_tokens(id, place.position, a.block_size);
  return visible > 0 ? kv_head * a.blocks_bound + first_block(a.batch, place.sequence, a.block_size, a.page) + id : -1;
}

// A thread a (kv head, query), neighbouring queries in neighbouring lanes: those of a warp mostly name the same sink
// and local block, and one lane adds for all of them.
inline constexpr unsigned kIndexThreads = 256;

template <class Body>
__device__ void for_each_visit(const ReverseIndex& a, const Body& body) {
  const std::int32_t i = static_cast<std::int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  const std::int32_t kv_head = static_cast<std::int32_t>(blockIdx.y);
  const std::int32_t query = a.first_query + i;
  const QueryPlace place = i < a.queries && !a.tiles.has(kv_head, i) ? a.batch.place(query) : QueryPlace{};
  const unsigned lane = threadIdx.x % kWarpSize;
  for (std::int32_t slot = 0; slot < a.topk; ++slot) {
    std::int32_t visible = 0;
    const std::int32_t bin = visit_of(a, place, kv_head, query, slot, visible);
    const unsigned same = __match_any_sync(kFullMask, static_cast<unsigned>(bin));
    const unsigned leader = static_cast<unsigned>(__ffs(static_cast<int>(same))) - 1;
    const std::int32_t rank = __popc(same & ((1u << lane) - 1));
    body(bin, query, slot, visible, lane == leader, __popc(same), rank, static_cast<int>(leader));
  }
}

[[maybe_unused]] static __global__ void count_visits(ReverseIndex a) {
  for_each_visit(a, [&](std::int32_t bin, std::int32_t, std::int32_t, std::int32_t visible, bool leads,
                        std::int32_t count, std::int32_t, int) {
    if (bin < 0) return;
    if (leads) atomicAdd(a.counts + bin, count);
    if (visible < a.block_size) a.partial[bin] = 1;  // many may write the same value
  });
}

[[maybe_unused]] static __global__ void place_visits(ReverseIndex a) {
  for_each_visit(a, [&](std::int32_t bin, std::int32_t query, std::int32_t slot, std::int32_t visible, bool leads,
                        std::int32_t count, std::int32_t rank, int leader) {
    std::int32_t place = 0;
    if (bin >= 0 && leads) place = atomicAdd(a.counts + bin, count);
    place = __shfl_sync(kFullMask, place, leader);
    if (bin >= 0) a.visits[place + rank] = Visit{query, slot | visible << 8};
  });
}

inline constexpr unsigned kPlanThreads = 1024;

/// Where the block with number `block` begins: page id and token.
__device__ inline void locate_block(const ReverseIndex& a, std::int32_t block, WorkItem& item) {
  if (a.page > 0) {
    const std::int32_t blocks_per_page = a.page / a.block_size;
    // Row-major [sequences, max_pages] of the table, so the sequence does not matter.
    item.page = a.batch.page_table[block / blocks_per_page];
    item.row = block % blocks_per_page * a.block_size;
    return;
  }
  const std::int32_t s = sequence_of_block(a.batch, block, a.block_size, a.page);
  item.page = 0;
  item.row = a.batch.cu_seqlens_k[s] + (block - first_block(a.batch, s, a.block_size, a.page)) * a.block_size;
}

/// One block of kPlanThreads, 8 bytes of shared memory each: turns counts into places and writes the items.
[[maybe_unused]] static __global__ void plan_items(ReverseIndex a) {
  auto* visits_before = reinterpret_cast<std::int32_t*>(shared_memory());
  std::int32_t* items_before = visits_before + kPlanThreads;
  const std::int32_t thread = static_cast<std::int32_t>(threadIdx.x);
  const std::int32_t bins = a.kv_heads * a.blocks_bound;
  const std::int32_t each = ceil_div(bins, static_cast<std::int32_t>(kPlanThreads));
  const std::int32_t begin = min_of(bins, thread * each), end = min_of(bins, begin + each);

  std::int32_t visits = 0, items = 0;
  for (std::int32_t bin = begin; bin < end; ++bin) {
    visits += a.counts[bin];
    items += ceil_div(a.counts[bin], a.visits_per_item);
  }
  visits_before[thread] = visits;
  items_before[thread] = items;
  for (std::int32_t step = 1; step < static_cast<std::int32_t>(kPlanThreads); step *= 2) {
    __syncthreads();
    const std::int32_t more_visits = thread >= step ? visits_before[thread - step] : 0;
    const std::int32_t more_items = thread >= step ? items_before[thread - step] : 0;
    __syncthreads();
    visits_before[thread] += more_visits;
    items_before[thread] += more_items;
  }
  if (thread == static_cast<std::int32_t>(kPlanThreads) - 1) a.totals->items = items_before[thread];
  std::int32_t place = visits_before[thread] - visits, number = items_before[thread] - items;
  for (std::int32_t bin = begin; bin < end; ++bin) {
    const std::int32_t count = a.counts[bin];
    a.counts[bin] = place;
    if (count == 0) continue;
    WorkItem item{};
    item.kv_head = bin / a.blocks_bound;
    item.is_partial = a.partial[bin];
    locate_block(a, bin % a.blocks_bound, item);
    item.pieces = ceil_div(count, a.visits_per_item);
    for (; item.piece < item.pieces; ++item.piece) {
      const std::int32_t done = item.piece * a.visits_per_item;
      item.first = place + done;
      item.count = min_of(a.visits_per_item, count - done);
      a.items[number++] = item;
    }
    place += count;
  }
}

/// A work item of one tile that a warp works out by itself, and the lane's visit of it.
struct DirectItem {
  WorkItem item;  ///< count 0: nothing to do; first is not set
  Visit visit;
  std::int32_t place = -1;  ///< of the visit among the item's; -1: the lane has none
};

/// In place of the lists where there are few visits (decode, verification): item `index` of kv_heads * queries * topk
/// is the visit of that (kv head, query, slot), with those that the other queries of its sequence among `together` (at
/// most 32) neighbouring rows pay to the same block. It is empty when an earlier one of them has it. Every lane calls
/// it.
__device__ inline DirectItem direct_item(const ReverseIndex& a, std::int32_t index, std::int32_t together) {
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::int32_t slot = index % a.topk, local = index / a.topk % a.queries, kv_head = index / a.topk / a.queries;
  const std::int32_t first = local / together * together;
  const bool is_row = lane < together && first + lane < a.queries;
  const std::int32_t query = a.first_query + first + lane;
  const QueryPlace place = is_row ? a.batch.place(query) : QueryPlace{};

  DirectItem result{};
  const std::int32_t sequence = __shfl_sync(kFullMask, place.sequence, local - first);
  if (sequence < 0) return result;
  const std::int32_t id = *a.blocks.at(kv_head, a.first_query + local, slot);
  std::int32_t found = -1;
  if (place.sequence == sequence) {
    for (std::int32_t other = a.topk - 1; other >= 0; --other) {
      if (*a.blocks.at(kv_head, query, other) == id) found = other;
    }
  }
  const std::int32_t visible = found >= 0 ? visible_tokens(id, place.position, a.block_size) : 0;
  const unsigned members = __ballot_sync(kFullMask, visible > 0);
  const unsigned partial = __ballot_sync(kFullMask, visible > 0 && visible < a.block_size);
  const bool leads = __ffs(static_cast<int>(members)) - 1 == local - first;
  if (!leads || __shfl_sync(kFullMask, found, local - first) != slot) return result;
  result.item.count = __popc(members);
  result.item.kv_head = kv_head;
  result.item.is_partial = partial != 0 ? 1 : 0;
  locate_block(a, first_block(a.batch, sequence, a.block_size, a.page) + id, result.item);
  if (visible > 0) {
    result.visit = Visit{query, found | visible << 8};
    result.place = __popc(members & ((1u << lane) - 1));
  }
  return result;
}

}  // namespace msa::cuda
