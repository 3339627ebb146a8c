// SPDX-License-Identifier: Apache-2.0
// The lists of visits, the work items and the tiles of queries made of a selection: every valid (query, slot) once,
// under the right block, nothing else, items that cover the lists,
// lists in order where that is asked for, and tiles that share as much as they must.
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "src/core/layout.h"
#include "src/cuda/query_tiles.cuh"
#include "src/cuda/reverse_index.cuh"
#include "src/cuda/sorted_visits.cuh"
#include "tests/unit/support/problem.h"

namespace msa::cuda {
namespace {

using msa::testing::Case;
using msa::testing::PagedProblem;
using msa::testing::Problem;

/// kv head, page, row of a block, query, slot, visible tokens.
using Entry = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

std::multiset<Entry> expected_visits(const SparseAttentionParams& params, std::int64_t first, std::int64_t queries) {
  std::multiset<Entry> entries;
  const Batch& batch = params.batch;
  for (std::int64_t s = 0; s < batch.sequences(); ++s) {
    const core::Sequence sequence = core::get_sequence(batch, s);
    for (std::int64_t i = 0; i < sequence.queries; ++i) {
      const std::int64_t row = sequence.query_begin + i, position = core::query_position(batch, sequence, i);
      if (row < first || row >= first + queries) continue;
      for (std::int64_t head = 0; head < params.blocks.size(0); ++head) {
        for (std::int64_t slot = 0; slot < params.blocks.size(2); ++slot) {
          std::int32_t id = 0;
          std::memcpy(&id,
                      params.blocks.data + 4 * (head * params.blocks.stride(0) + row * params.blocks.stride(1) +
                                                slot * params.blocks.stride(2)),
                      4);
          if (id < 0 || id > position / params.block_size) continue;
          std::int64_t page = 0, token = id * params.block_size;
          if (batch.is_paged) {
            const std::int64_t size = params.k.size(1);
            page = batch.page_table[static_cast<std::size_t>(s * batch.max_pages + token / size)];
            token %= size;
          } else {
            token += batch.cu_seqlens_k[static_cast<std::size_t>(s)];
          }
          entries.emplace(head, page, token, row, slot,
                          std::min(params.block_size, position - id * params.block_size + 1));
        }
      }
    }
  }
  return entries;
}

ReverseIndex index_of(const SparseAttentionParams& params, std::int64_t first, std::int64_t queries) {
  const Batch& batch = params.batch;
  ReverseIndex index{};
  index.batch = view_of(batch);
  index.blocks = strided<std::int32_t>(params.blocks);
  index.kv_heads = static_cast<std::int32_t>(params.blocks.size(0));
  index.topk = static_cast<std::int32_t>(params.blocks.size(2));
  index.block_size = static_cast<std::int32_t>(params.block_size);
  index.page = batch.is_paged ? static_cast<std::int32_t>(params.k.size(1)) : 0;
  index.first_query = static_cast<std::int32_t>(first);
  index.queries = static_cast<std::int32_t>(queries);
  index.blocks_bound = static_cast<std::int32_t>(
      batch.is_paged ? batch.sequences() * batch.max_pages * (params.k.size(1) / params.block_size)
                     : params.k.size(0) / params.block_size + batch.sequences());
  return index;
}

/// The tiles of `positions` queries that plan_tiles finds: blocks and members are those of the visits, and a tile is
/// shared when its blocks serve enough of it. Returns the visits of the tiles that are not.
std::multiset<Entry> expect_tiles(ReverseIndex& index, const SparseAttentionParams& params,
                                  const std::multiset<Entry>& visits, std::vector<std::int32_t>& counts) {
  QueryTiles& t = index.tiles;
  t.tiles = (index.queries + t.positions - 1) / t.positions;
  t.most_blocks = index.topk * std::min(t.most_waste, t.positions);
  counts.assign(static_cast<std::size_t>(index.kv_heads * t.tiles), -7);
  std::vector<std::int32_t> shared(counts.size(), -7);
  std::vector<TileBlock> blocks(counts.size() * static_cast<std::size_t>(t.most_blocks));
  t.counts = counts.data();
  t.shared = shared.data();
  t.blocks = blocks.data();
  launch(dim3(static_cast<unsigned>(counts.size() + kPlanTilesWarps - 1) / kPlanTilesWarps),
         dim3(kPlanTilesWarps * kWarpSize), 0, nullptr, plan_tiles, index);

  std::multiset<Entry> left;
  std::set<std::int32_t> listed(shared.begin(), shared.begin() + index.totals->shared_tiles);
  EXPECT_EQ(listed.size(), static_cast<std::size_t>(index.totals->shared_tiles));
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(counts.size()); ++i) {
    std::multiset<Entry> mine;
    std::map<std::pair<std::int64_t, std::int64_t>, bool> wanted;  // block -> whether a visit sees a part of it
    for (const Entry& entry : visits) {
      const auto& [head, page, row, query, slot, visible] = entry;
      if (head * t.tiles + (query - index.first_query) / t.positions != i) continue;
      mine.insert(entry);
      wanted[{page, row}] |= visible < params.block_size;
    }
    const bool is_shared = !mine.empty() && static_cast<std::int64_t>(wanted.size()) * t.positions <=
                                                t.most_waste * static_cast<std::int64_t>(mine.size());
    EXPECT_EQ(counts[static_cast<std::size_t>(i)], is_shared ? static_cast<std::int32_t>(wanted.size()) : 0);
    EXPECT_EQ(listed.count(i), is_shared ? 1u : 0u);
    if (!is_shared) {
      left.insert(mine.begin(), mine.end());
      continue;
    }
    std::multiset<Entry> got;
    std::size_t members = 0;
    for (std::int32_t j = 0; j < counts[static_cast<std::size_t>(i)]; ++j) {
      const TileBlock& block = blocks[static_cast<std::size_t>(i * t.most_blocks + j)];
      EXPECT_EQ(block.is_partial, (wanted[{block.page, block.row}] ? 1 : 0));
      members += static_cast<std::size_t>(__popc(block.members));
      for (const auto& [head, page, row, query, slot, visible] : mine) {
        const std::int64_t member = (query - index.first_query) % t.positions;
        if (page == block.page && row == block.row && (block.members >> member & 1) != 0) {
          got.emplace(head, page, row, query, slot, visible);
        }
      }
    }
    EXPECT_EQ(got, mine);
    EXPECT_EQ(members, mine.size());
  }
  return left;
}

/// What direct_item gives, as lists: a warp an item.
__global__ void list_direct(ReverseIndex a, std::int32_t together) {
  const auto i = static_cast<std::int32_t>(blockIdx.x);
  DirectItem direct = direct_item(a, i, together);
  direct.item.first = i * kWarpSize;
  if (direct.place >= 0) a.visits[direct.item.first + direct.place] = direct.visit;
  if (threadIdx.x == 0) a.items[i] = direct.item;
}

void expect_index(const SparseAttentionParams& params, std::int64_t first, std::int64_t queries, bool is_direct,
                  std::int32_t per_item, std::int32_t tile_positions = 0, std::int32_t most_waste = 0) {
  ReverseIndex index = index_of(params, first, queries);
  index.visits_per_item = per_item;
  const auto bins = static_cast<std::size_t>(index.kv_heads * index.blocks_bound);
  const auto most = static_cast<std::size_t>(index.kv_heads * queries * index.topk);
  std::vector<std::int32_t> counts(bins, 0), partial(bins, 0);
  WorkTotals totals{};
  std::vector<Visit> visits(is_direct ? most * kWarpSize : most, Visit{-7, -7});
  std::vector<WorkItem> items(most);
  index.counts = counts.data();
  index.partial = partial.data();
  index.totals = &totals;
  index.visits = visits.data();
  index.items = items.data();
  std::multiset<Entry> expected = expected_visits(params, first, queries);
  std::vector<std::int32_t> tile_counts;
  if (tile_positions > 0) {
    index.tiles.positions = tile_positions;
    index.tiles.most_waste = most_waste;
    expected = expect_tiles(index, params, expected, tile_counts);
  }
  if (is_direct) {
    launch(dim3(static_cast<unsigned>(most)), dim3(kWarpSize), 0, nullptr, list_direct, index, per_item);
    totals.items = static_cast<std::int32_t>(most);
  } else {
    const dim3 grid(static_cast<unsigned>((queries + kIndexThreads - 1) / kIndexThreads),
                    static_cast<unsigned>(index.kv_heads));
    launch(grid, dim3(kIndexThreads), 0, nullptr, count_visits, index);
    launch(dim3(1), dim3(kPlanThreads), kPlanThreads * 8, nullptr, plan_items, index);
    launch(grid, dim3(kIndexThreads), 0, nullptr, place_visits, index);
    const std::int32_t span = per_item == 5 ? kSortSpan : 96;  // one look at a list, or several
    std::vector<Visit> sorted(most, Visit{-7, -7});
    launch(dim3(static_cast<unsigned>(bins)), dim3(kIndexThreads), sort_shared_bytes(queries, span), nullptr,
           sort_visits, index, sorted.data(), span);
    visits = sorted;
  }

  std::multiset<Entry> got;
  std::set<std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>> led;
  ASSERT_LE(static_cast<std::size_t>(totals.items), most);
  for (std::int32_t i = 0; i < totals.items; ++i) {
    const WorkItem& item = items[static_cast<std::size_t>(i)];
    EXPECT_LE(item.count, per_item);
    if (!is_direct) {
      ASSERT_LT(item.piece, item.pieces);
      const WorkItem& before = items[static_cast<std::size_t>(item.piece > 0 ? i - 1 : i)];
      if (item.piece > 0) {
        EXPECT_EQ(before.piece, item.piece - 1);
        EXPECT_EQ(before.first + before.count, item.first);
      }
      for (std::int32_t j = before.first + 1; j < item.first + item.count; ++j) {
        const auto at = static_cast<std::size_t>(j);
        ASSERT_LT(visits[at - 1].query, visits[at].query) << "a list is not in order";
      }
    }
    bool is_partial = false;
    for (std::int32_t j = item.first; j < item.first + item.count; ++j) {
      const Visit visit = visits[static_cast<std::size_t>(j)];
      got.emplace(item.kv_head, item.page, item.row, visit.query, visit.slot_and_visible & 0xff,
                  visit.slot_and_visible >> 8);
      is_partial = is_partial || visit.slot_and_visible >> 8 < params.block_size;
    }
    if (is_partial) {
      EXPECT_EQ(item.is_partial, 1);
    }
    if (is_direct && item.count > 0) {  // one item a block and group of rows
      EXPECT_TRUE(led.emplace(item.kv_head, item.page, item.row,
                              (visits[static_cast<std::size_t>(item.first)].query - first) / per_item)
                      .second);
    }
  }
  EXPECT_EQ(got, expected);
}

void expect_all(const SparseAttentionParams& params) {
  const std::int64_t rows = params.q.size(0);
  for (const auto order : {emulator::BlockOrder::kAscending, emulator::BlockOrder::kShuffled}) {
    const emulator::WithOptions with({false, order, order == emulator::BlockOrder::kShuffled, 2});
    for (const bool is_direct : {false, true}) {
      expect_index(params, 0, rows, is_direct, 5);
      expect_index(params, rows / 3, rows / 2, is_direct, is_direct ? 32 : 64);
    }
    expect_index(params, 0, rows, false, 5, 8, 2);
    expect_index(params, rows / 3, rows / 2, false, 5, 32, 32);
  }
}

TEST(ReverseIndex, ListsEveryVisitOnceUnderItsBlock) {
  for (const std::int64_t block_size : {16, 64}) {
    Case c{{4, 2, 16, 16, 16, block_size, 3},
           {{1, 1}, {0, 0}, {300, 300 + block_size + 3}, {0, 9}, {2, block_size}, {5, 5}}};
    c.padding_rows = 7;
    const Problem problem(c);
    expect_all(problem.sparse_params());
    for (const std::int64_t pages : {1, 2}) expect_all(PagedProblem(problem, pages * block_size).sparse_params());
    expect_all(
        Problem(Case{{2, 2, 16, 16, 16, block_size, 2}, {{40, 90}, {3, 3}}}).sample({0, 5, 39, 40}).sparse_params());
  }
}

TEST(ReverseIndex, DropsIdsThatAreNoBlockOfTheirQuery) {
  Problem problem(Case{{4, 2, 16, 16, 16, 16, 4}, {{60, 60}, {9, 70}}});
  problem.blocks.set(-5, 0, 10, 0);
  problem.blocks.set(1, 1, 10, 0);  // position 10 sees block 0 alone
  problem.blocks.set(1 << 30, 0, 65, 1);
  problem.blocks.set(-2147483647, 1, 66, 2);
  for (std::int64_t slot = 0; slot < 4; ++slot) problem.blocks.set(-1, 0, 30, slot);
  expect_all(problem.sparse_params());
}

TEST(ReverseIndex, ASinkIsCutIntoItems) {
  Problem problem(Case{{2, 1, 16, 16, 16, 16, 2}, {{500, 500}}});
  for (std::int64_t row = 0; row < 500; ++row) {
    problem.blocks.set(0, 0, row, 0);
    problem.blocks.set(row / 16 > 0 ? row / 16 : -1, 0, row, 1);
  }
  expect_all(problem.sparse_params());
}

}  // namespace
}  // namespace msa::cuda
