// SPDX-License-Identifier: Apache-2.0
// See index_kl.h.
#include "src/cuda/index_kl.h"

#include <algorithm>

#include "src/cuda/attention_maps.h"
#include "src/cuda/chunks.h"
#include "src/cuda/sparse_attention.h"
#include "src/cuda/workspace_layout.h"

namespace msa::cuda {
namespace {

// Visit and WorkItem of reverse_index.cuh, KlSums and KlValue of index_kl.cuh.
constexpr std::int64_t kVisitBytes = 8, kItemBytes = 32, kSumsBytes = 8, kValueBytes = 24;

constexpr std::int64_t kFewestQueries = 1024;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Both directions' common part: the items and, in the selected stage, the lists of the visits of `queries`.
IndexKlPlan lay_out_items(const IndexKlParams& params, std::int64_t queries, std::int64_t item_queries, bool sorts,
                          WorkspaceLayout& layout) {
  const Batch& batch = params.batch;
  IndexKlPlan plan;
  plan.is_dense = params.blocks.empty();
  plan.blocks_bound = batch.is_paged ? batch.sequences() * (batch.max_pages * (params.k.size(1) / params.block_size))
                                     : params.k.size(0) / params.block_size + batch.sequences();
  plan.item_queries = item_queries > 0 ? item_queries : plan.is_dense ? kKlRowsPerItem : kKlVisitsPerItem;
  plan.totals = layout.place(16);
  if (plan.is_dense) {
    plan.slots = 1;
    plan.row_items = params.q.size(0) / kKlTileRows + batch.sequences();
    plan.block_items = divide_up(params.q.size(0), plan.item_queries);
    plan.zero_end = layout.bytes();
    return plan;
  }
  plan.slots = params.blocks.size(2);
  const std::int64_t visits = queries * plan.slots;
  plan.visit_items = std::min(visits, plan.blocks_bound + visits / plan.item_queries);
  plan.counts = layout.place(plan.blocks_bound * 4);
  plan.partial_flags = layout.place(plan.blocks_bound * 4);
  plan.zero_end = layout.bytes();
  plan.visit_list = layout.place(visits * kVisitBytes);
  if (sorts) plan.sorted_list = layout.place(visits * kVisitBytes);
  plan.items = layout.place(plan.visit_items * kItemBytes);
  return plan;
}

IndexKlPlan lay_out_forward(const IndexKlParams& params, std::int64_t queries) {
  WorkspaceLayout layout;
  const std::int64_t kv_heads = params.q_idx.size(1);
  IndexKlPlan plan = lay_out_items(params, queries, 0, false, layout);
  plan.queries_at_once = queries;
  plan.row_values = layout.place(params.q.size(0) * kv_heads * 8);
  plan.sums = layout.place(queries * plan.slots * (params.q.size(1) / kv_heads + 1) * kSumsBytes);
  plan.values = layout.place(queries * plan.slots * kValueBytes);
  plan.bytes = layout.bytes();
  return plan;
}

/// The lists are those of all queries, whatever is kept of them: tiles, and so sums over them, must not depend on it.
IndexKlPlan lay_out_backward(const IndexKlParams& params, std::int64_t queries, std::int64_t item_queries) {
  WorkspaceLayout layout;
  const std::int64_t index_dim = params.q_idx.size(2);
  IndexKlPlan plan = lay_out_items(params, params.q.size(0), item_queries, true, layout);
  plan.queries_at_once = queries;
  plan.dk = layout.place(params.k_idx.size(0) * index_dim * 4);
  plan.dk_end = layout.bytes();
  plan.dq_parts = layout.place(queries * plan.slots * index_dim * 4);
  // 128 keys a part: a block's, or what either warpgroup adds to a block of 64.
  plan.dk_parts = layout.place(plan.key_items() * 128 * index_dim * 4);
  plan.bytes = layout.bytes();
  return plan;
}

/// The plan of the most queries that stays within the limit. The warmup stage keeps little of a query: all at once.
template <class LayOut>
IndexKlPlan fit(const IndexKlParams& params, std::size_t limit, const LayOut& lay_out) {
  if (limit == 0) limit = kDefaultWorkspace;
  const std::int64_t queries = std::max<std::int64_t>(1, params.q.size(0));
  const IndexKlPlan whole = lay_out(queries);
  if (whole.is_dense) return whole;
  const std::int64_t chunk = largest_chunk(queries, 1, limit, [&](std::int64_t n) { return lay_out(n).bytes; });
  return lay_out(std::max(chunk, std::min(kFewestQueries, queries)));
}

}  // namespace

bool takes_index_kl(const IndexKlParams& params) {
  const DType dtype = params.q.dtype;
  const auto is_width = [](std::int64_t n) { return n == 64 || n == 128; };
  return (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && params.k.dtype == dtype &&
         params.q_idx.dtype == dtype && params.k_idx.dtype == dtype && is_width(params.q.size(2)) &&
         is_width(params.q_idx.size(2)) && is_width(params.block_size) &&
         params.q.size(1) / params.q_idx.size(1) <= kMaxGroupSize && is_copyable(params.q) && is_copyable(params.k) &&
         is_copyable(params.q_idx) && is_copyable(params.k_idx);
}

IndexKlPlan plan_fast_index_kl(const IndexKlParams& params, std::size_t limit) {
  return fit(params, limit, [&](std::int64_t queries) { return lay_out_forward(params, queries); });
}

IndexKlPlan plan_fast_index_kl_backward(const IndexKlParams& params, std::size_t limit, std::int64_t item_queries) {
  return fit(params, limit, [&](std::int64_t queries) { return lay_out_backward(params, queries, item_queries); });
}

}  // namespace msa::cuda
