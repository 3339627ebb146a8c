// SPDX-License-Identifier: Apache-2.0
// See screen_blocks.h.
#include "src/cuda/screen_blocks.h"

#include <algorithm>

#include "src/cuda/select_blocks.h"
#include "src/cuda/workspace_layout.h"

namespace msa::cuda {
namespace {

std::int64_t block_numbers(const SelectShape& shape) {
  const std::int64_t blocks = shape.max_keys / shape.block_size;
  // Two more: the last tile of keys may begin in the last block.
  return (shape.is_paged ? shape.sequences * blocks : blocks + shape.sequences + 1) + 2;
}

bool pays(const SelectShape& shape, std::int64_t blocks) {
  const std::int64_t rows = shape.query_rows * shape.groups / std::max<std::int64_t>(shape.sequences, 1);
  return rows >= kScreenRows && shape.max_keys / shape.block_size >= kScreenBlocksPerSlot * shape.topk &&
         blocks * shape.block_size * shape.index_dim <= kScreenMostKeyBytes;
}

}  // namespace

ScreenPlan plan_screening(const SelectShape& shape, bool many_rows, std::int64_t chunk_queries,
                          std::int64_t most_key_tiles, core::ScreenSwitch wanted, WorkspaceLayout& layout) {
  ScreenPlan plan;
  // Without forced local blocks a row chooses among blocks it sees only a part of, which no copy of a block bounds.
  const bool can = many_rows && shape.local_blocks > 0 && chunk_queries > 0 && most_key_tiles > 0;
  plan.blocks = block_numbers(shape);
  plan.use = can && wanted != core::ScreenSwitch::kNever &&
             (wanted == core::ScreenSwitch::kAlways || pays(shape, plan.blocks));
  if (!plan.use) return ScreenPlan{};

  plan.always = wanted == core::ScreenSwitch::kAlways;
  const std::int64_t rows = chunk_queries * shape.groups;
  // An eighth of a chunk, in multiples of 64 queries, which are whole tiles whatever the groups.
  plan.first_queries = std::min((chunk_queries / 8 + 63) / 64 * 64, chunk_queries);
  if (plan.first_queries == 0) plan.first_queries = chunk_queries;
  plan.row_words = (rows + 31) / 32;
  plan.keys = layout.place(plan.blocks * shape.block_size * shape.index_dim);
  plan.key_bounds = layout.place(plan.blocks * 16);
  plan.queries = layout.place(rows * shape.index_dim);
  plan.row_bounds = layout.place(rows * 16);
  plan.leaders = layout.place(rows * shape.topk * 4);
  for (std::size_t& doubts : plan.doubts) doubts = layout.place(most_key_tiles * plan.row_words * 4);
  plan.state = layout.place(256);
  plan.doubt_bytes = static_cast<std::int64_t>(plan.state - plan.doubts[0]);
  return plan;
}

}  // namespace msa::cuda
