// SPDX-License-Identifier: Apache-2.0
// See select_blocks_plan.h.
#include "src/cpu/select_blocks_plan.h"

#include <algorithm>
#include <numeric>

#include "src/cpu/bf16_dot.h"
#include "src/cpu/plan_chunks.h"
#include "src/cpu/screen.h"
#include "src/cpu/tile.h"
#include "src/cpu/topk.h"

namespace msa::cpu {
namespace {

// Queries of a screened chunk. Screened rows are small, and every chunk reads all keys: 512 rows a chunk, as long as
// that leaves two chunks a thread, else half as many chunks; all of a size, since three for two threads would take as
// long as four. Rows fill pairs of 16, as they are multiplied.
std::int64_t screened_chunk(const SelectionShape& shape, int threads) {
  constexpr std::int64_t kRows = 512;
  constexpr std::int64_t kPair = 2 * kInt8Rows;
  const std::int64_t rows = shape.queries.total * shape.kv_heads;
  std::int64_t tasks = std::max<std::int64_t>((rows + kRows - 1) / kRows, threads * (rows >= threads * kRows ? 2 : 1));
  tasks = (tasks + threads - 1) / threads * threads;
  const std::int64_t chunk = (shape.queries.total + tasks - 1) / tasks;
  const std::int64_t pair = kPair / std::gcd(kPair, shape.kv_heads);  // queries
  return std::max<std::int64_t>(1, chunk > pair ? (chunk + pair - 1) / pair * pair : chunk);
}

}  // namespace

SelectionLayout lay_out_selection(const SelectionShape& shape, std::int64_t chunk) {
  const std::int64_t rows = padded_columns(chunk * shape.kv_heads);
  const std::int64_t strips = (rows + kStripRows - 1) / kStripRows;
  SelectionLayout layout;
  LayoutCursor cursor;
  layout.queries = cursor.take(rows * shape.index_dim);
  layout.packed = cursor.take(strips * kStripRows * shape.index_dim);
  layout.keys = cursor.take(shape.block_size * shape.index_dim);
  layout.scores = cursor.take(shape.block_size * kStripRows);
  layout.best = cursor.take(rows * 2 * shape.topk);
  layout.rows = cursor.take(floats_for(rows, sizeof(RowTopk)));
  layout.limits = cursor.take(rows);
  layout.least = cursor.take(strips * kStripRows);
  layout.row_ids = cursor.take(rows);
  if (shape.screen_bytes != 0) {
    const std::int64_t capacity = candidate_capacity(shape.topk);
    layout.row_keys = cursor.take(rows * shape.screen_bytes / 4);
    layout.row_bounds = cursor.take((7 + kWindowBlocks) * rows);
    layout.lower = cursor.take(rows * bound_buckets(shape.topk));
    layout.candidates = cursor.take(floats_for(rows * capacity, sizeof(Candidate)));
    layout.visits = cursor.take(floats_for(rows * capacity, sizeof(std::uint64_t)));
    layout.block_keys = cursor.take(shape.is_screened_in_place ? 0 : shape.block_size * shape.screen_bytes / 4);
  }
  layout.end = cursor.end();
  return layout;
}

SelectionPlan plan_selection(const std::string& op, const SelectionShape& shape, int threads,
                             std::size_t workspace_limit) {
  // Every block passes all rows of the chunk. Unscreened they are floats, and should lie in half an L2 cache.
  const std::int64_t state = std::int64_t{1} << 17;  // floats
  const std::int64_t wanted = shape.screen_bytes != 0 ? screened_chunk(shape, threads)
                                                      : state / (shape.kv_heads * (shape.index_dim + 2 * shape.topk));
  const std::int64_t least = std::max<std::int64_t>(1, shape.screen_bytes != 0 ? wanted : kStripRows / shape.kv_heads);
  SelectionPlan plan;
  static_cast<ChunkPlan&>(plan) =
      plan_chunks(op, shape.queries, 1, std::max(least, wanted), least, threads, workspace_limit,
                  [&](std::int64_t c) { return bytes_of(lay_out_selection(shape, c).end); });
  if (shape.screen_bytes != 0) {
    // Quantising a block costs as much as screening some 50 rows: worth sharing, but not at any price.
    constexpr std::size_t kMostShared = std::size_t{32} << 20;
    const std::size_t room = workspace_limit == 0 ? kMostShared : std::min(kMostShared, workspace_limit - plan.bytes());
    const std::int64_t copy_bytes = shape.is_screened_in_place ? 0 : shape.block_size * shape.screen_bytes;
    const std::size_t block_bytes = static_cast<std::size_t>(copy_bytes) + sizeof(BlockBounds);
    plan.shared_blocks = std::min(shape.screen_blocks, static_cast<std::int64_t>(room / block_bytes));
    plan.shared_bytes = static_cast<std::size_t>(plan.shared_blocks) * block_bytes;
  }
  return plan;
}

SpanLayout lay_out_span(const SelectionShape& shape) {
  SpanLayout layout;
  LayoutCursor cursor;
  layout.queries = cursor.take(kFewRows * shape.index_dim);
  layout.keys = cursor.take(shape.index_dim * kStripRows);
  layout.scores = cursor.take(kFewRows * padded_stride(shape.block_size));
  layout.best = cursor.take(4 * (shape.topk + 1));
  const std::int64_t inner = shape.screens_few ? padded_inner(shape.index_dim) : 0;
  layout.row_keys = cursor.take(floats_for(kFewRows * inner, 2));
  layout.block_keys = cursor.take(floats_for(shape.block_size * inner, 2));
  layout.end = cursor.end();
  return layout;
}

SpanPlan plan_spans(const SelectionShape& shape, std::int64_t largest_scores, std::int64_t all_scores, int threads,
                    std::size_t workspace_limit) {
  constexpr std::int64_t kScores = std::int64_t{1} << 20;  // floats in work at a time: enough for all threads
  SpanPlan plan;
  plan.workers = std::max(1, threads);
  plan.worker_bytes = bytes_of(lay_out_span(shape).end);
  plan.score_floats = std::max(largest_scores, std::min(all_scores, kScores));
  if (workspace_limit == 0) return plan;
  while (plan.bytes() > workspace_limit && plan.workers > 1) --plan.workers;
  if (plan.bytes() > workspace_limit) plan.score_floats = largest_scores;
  if (plan.bytes() > workspace_limit) plan.score_floats = 0;
  return plan;
}

}  // namespace msa::cpu
