// SPDX-License-Identifier: Apache-2.0
// See attention_backward.h.
#include "src/cuda/attention_backward.h"

#include <algorithm>

#include "src/cuda/chunks.h"
#include "src/cuda/sparse_attention.h"
#include "src/cuda/workspace_layout.h"

namespace msa::cuda {
namespace {

constexpr std::int64_t kVisitBytes = 8, kItemBytes = 32, kStatsBytes = 8;

AttentionBackwardPlan lay_out(const SparseAttentionParams& params, std::int64_t tiles_per_piece, std::int64_t heads,
                              std::int64_t queries) {
  const std::int64_t rows = params.q.size(0), query_heads = params.q.size(1), head_dim = params.q.size(2);
  const std::int64_t group = query_heads / params.k.size(1);
  const bool is_dense = params.blocks.empty();
  const std::int64_t topk = is_dense ? 0 : params.blocks.size(2);
  const BackwardTiles tiles = backward_tiles(head_dim, params.block_size);

  AttentionBackwardPlan plan;
  plan.heads_at_once = heads;
  plan.queries_at_once = queries;
  plan.positions_per_tile = tiles.rows / group;
  plan.visits_per_piece = plan.positions_per_tile * tiles_per_piece;
  plan.blocks_bound = params.k.size(0) / params.block_size + params.batch.sequences();
  const std::int64_t visits = heads * rows * topk;
  const std::int64_t bins = heads * plan.blocks_bound;
  plan.max_items = is_dense ? bins : std::min(visits, bins + visits / plan.visits_per_piece);

  WorkspaceLayout layout;
  plan.totals = layout.place(8);
  plan.counts = layout.place(bins * 4);
  plan.partial_flags = layout.place(bins * 4);
  plan.zero_end = layout.bytes();
  plan.visits = layout.place(visits * kVisitBytes);
  plan.sorted = layout.place(visits * kVisitBytes);
  plan.items = layout.place(plan.max_items * kItemBytes);
  plan.stats = layout.place(rows * query_heads * kStatsBytes);
  plan.sums = layout.place(plan.max_items * tiles.slot_floats * 4);
  plan.partial = layout.place(heads * queries * topk * group * head_dim * 2);
  plan.bytes = layout.bytes();
  return plan;
}

}  // namespace

bool takes_backward(const SparseAttentionParams& params) { return is_fast_geometry(params) && has_fast_layout(params); }

bool takes_gradient(const ConstTensorView& dout) { return is_copyable(dout); }

AttentionBackwardPlan plan_attention_backward(const SparseAttentionParams& params, std::size_t limit,
                                              std::int64_t tiles_per_piece) {
  const std::int64_t kv_heads = params.k.size(1);
  const std::int64_t rows = std::max<std::int64_t>(1, params.q.size(0));
  const auto lay = [&](std::int64_t heads, std::int64_t queries) {
    return lay_out(params, tiles_per_piece, heads, queries);
  };
  if (limit == 0) {
    limit = std::max(kDefaultBackwardWorkspace, lay(1, std::min(rows, kMinBackwardQueries)).bytes);
  }
  // Fewer heads first: they share nothing. Fewer queries cost what is said in the page.
  if (lay(1, rows).bytes <= limit) {
    return lay(largest_chunk(kv_heads, 1, limit, [&](std::int64_t n) { return lay(n, rows).bytes; }), rows);
  }
  return lay(1, largest_chunk(rows, 1, limit, [&](std::int64_t n) { return lay(1, n).bytes; }));
}

}  // namespace msa::cuda
