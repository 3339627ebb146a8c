// SPDX-License-Identifier: Apache-2.0
// See sparse_attention.h.
#include "src/cuda/sparse_attention.h"

#include <algorithm>

#include "src/cuda/chunks.h"
#include "src/cuda/workspace_layout.h"

namespace msa::cuda {
namespace {

constexpr std::int64_t kMostTilePositions = 32;  // a lane each
constexpr std::int64_t kFewVisits = 4096;        // some 32 a multiprocessor
constexpr std::int64_t kMostVerified = 16;       // tokens a sequence and call

SparseAttentionPlan lay_out(const SparseAttentionParams& params, std::int64_t queries, const AttentionOrders& orders) {
  const std::int64_t kv_heads = params.k.size(params.k.rank - 2);
  const std::int64_t query_heads = params.q.size(1);
  const std::int64_t group = query_heads / kv_heads;
  const std::int64_t topk = params.blocks.size(2);
  const std::int64_t value_dim = params.v.size(params.v.rank - 1);
  const Batch& batch = params.batch;

  SparseAttentionPlan plan;
  plan.queries_at_once = queries;
  plan.positions_per_tile = kTileRows / group;
  plan.blocks_bound = batch.is_paged ? batch.sequences() * (batch.max_pages * (params.k.size(1) / params.block_size))
                                     : params.k.size(0) / params.block_size + batch.sequences();
  const std::int64_t visits = kv_heads * queries * topk;
  const std::int64_t bins = kv_heads * plan.blocks_bound;
  // Lists take four launches more. They pay where a block's queries are many, or lie farther apart than direct items
  // look: with less than one visit a block on average, or next to none at all, they do not.
  const bool is_decode = params.q.size(0) <= kMostVerified * batch.sequences();
  plan.is_direct = orders.is_direct.value_or(visits <= kFewVisits || (is_decode && visits < bins));
  const std::int64_t listed = plan.is_direct ? 0 : visits;
  plan.bins = plan.is_direct ? 0 : bins;
  plan.max_items = std::min(listed, bins + listed / (plan.positions_per_tile * kTilesPerItem));
  if (!plan.is_direct && orders.most_waste > 0 && plan.positions_per_tile <= kMostTilePositions) {
    plan.most_waste = orders.most_waste;
    plan.most_blocks = topk * std::min(plan.most_waste, plan.positions_per_tile);
  }
  const std::int64_t tiles = plan.most_blocks > 0 ? kv_heads * (queries / plan.positions_per_tile + 1) : 0;

  WorkspaceLayout layout;
  plan.totals = layout.place(kTotalsBytes);
  plan.counts = layout.place(plan.bins * 4);
  plan.partial_flags = layout.place(plan.bins * 4);
  plan.zero_end = layout.bytes();
  plan.visits = layout.place(listed * kVisitBytes);
  plan.items = layout.place(plan.max_items * kItemBytes);
  plan.tile_counts = layout.place(tiles * 4);
  plan.shared_tiles = layout.place(tiles * 4);
  plan.tile_blocks = layout.place(tiles * plan.most_blocks * kTileBlockBytes);
  plan.lse = layout.place(queries * query_heads * topk * 4);
  plan.partial = layout.place(queries * query_heads * topk * value_dim * 2);
  plan.bytes = layout.bytes();
  return plan;
}

}  // namespace

bool is_fast_geometry(const SparseAttentionParams& params) {
  const DType dtype = params.q.dtype;
  const std::int64_t head_dim = params.q.size(2);
  const std::int64_t group = params.q.size(1) / params.k.size(params.k.rank - 2);
  return (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && params.k.dtype == dtype &&
         params.v.dtype == dtype && (head_dim == 64 || head_dim == 128) &&
         params.v.size(params.v.rank - 1) == head_dim && (params.block_size == 64 || params.block_size == 128) &&
         group <= kMaxGroupSize;
}

bool has_fast_layout(const SparseAttentionParams& params) {
  return is_copyable(params.q) && is_copyable(params.k) && is_copyable(params.v);
}

SparseAttentionPlan plan_sparse_attention(const SparseAttentionParams& params, std::size_t limit,
                                          const AttentionOrders& orders) {
  const std::int64_t queries = std::max<std::int64_t>(1, params.q.size(0));
  // Bytes grow with the queries but for the step where sorting begins: a chunk below it is found, if not the largest.
  const auto bytes_of = [&](std::int64_t chunk) { return lay_out(params, chunk, orders).bytes; };
  return lay_out(params, largest_chunk(queries, 1, limit == 0 ? kDefaultWorkspace : limit, bytes_of), orders);
}

}  // namespace msa::cuda
