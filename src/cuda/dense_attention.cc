// SPDX-License-Identifier: Apache-2.0
// See dense_attention.h.
#include "src/cuda/dense_attention.h"

#include <algorithm>

#include "src/cuda/chunks.h"
#include "src/cuda/workspace_layout.h"

namespace msa::cuda {
namespace {

constexpr std::int64_t kItemBytes = 32, kTotalsBytes = 8;  // DenseItem and DenseTotals of dense_attention.cuh

std::int64_t ceil_of(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Tiles of one kv head: every sequence, and the rows behind the last one, may end with a tile that is not full.
std::int64_t most_tiles(const DenseAttentionParams& params, std::int64_t queries, std::int64_t positions) {
  return std::min(queries, queries / positions + params.batch.sequences() + 1);
}

DenseAttentionPlan lay_out(const DenseAttentionParams& params, std::int64_t queries, std::int64_t span_keys) {
  const std::int64_t kv_heads = params.k.size(params.k.rank - 2);
  const std::int64_t query_heads = params.q.size(1);
  const std::int64_t most_keys = params.batch.is_paged ? params.batch.max_pages * params.k.size(1) : params.k.size(0);

  DenseAttentionPlan plan;
  plan.positions_per_tile = kTileRows / (query_heads / kv_heads);
  plan.span_keys = span_keys;
  plan.max_spans = ceil_of(most_keys, span_keys);
  plan.is_split = plan.max_spans > 1 &&
                  most_tiles(params, params.q.size(0), plan.positions_per_tile) * kv_heads < kDenseEnoughTiles;
  plan.queries_at_once = queries;
  const std::int64_t results = plan.is_split ? plan.max_spans : 0;  // of a row, in the workspace
  plan.max_items = most_tiles(params, queries, plan.positions_per_tile) * (plan.is_split ? plan.max_spans : 1);

  WorkspaceLayout layout;
  plan.totals = layout.place(kTotalsBytes);
  plan.items = layout.place(plan.max_items * kItemBytes);
  plan.lse2 = layout.place(queries * query_heads * results * 4);
  plan.partial = layout.place(queries * query_heads * results * params.q.size(2) * 4);
  plan.bytes = layout.bytes();
  return plan;
}

}  // namespace

bool is_fast_geometry(const DenseAttentionParams& params) {
  const DType dtype = params.q.dtype;
  const std::int64_t head_dim = params.q.size(2);
  const std::int64_t group = params.q.size(1) / params.k.size(params.k.rank - 2);
  return (dtype == DType::kBFloat16 || dtype == DType::kFloat16) &&
         (params.k.dtype == dtype || params.k.dtype == DType::kFloat8E4M3) && params.v.dtype == params.k.dtype &&
         (head_dim == 64 || head_dim == 128) && params.v.size(params.v.rank - 1) == head_dim && group <= kMaxGroupSize;
}

bool has_fast_layout(const DenseAttentionParams& params) {
  return is_copyable(params.q) && is_copyable(params.k) && is_copyable(params.v);
}

DenseAttentionPlan plan_dense_attention(const DenseAttentionParams& params, std::size_t limit, std::int64_t span_keys) {
  const std::int64_t queries = std::max<std::int64_t>(1, params.q.size(0));
  const DenseAttentionPlan plan = lay_out(params, queries, span_keys);
  if (!plan.is_split) return plan;  // a list of tiles, small beside the queries themselves
  const auto bytes_of = [&](std::int64_t chunk) { return lay_out(params, chunk, span_keys).bytes; };
  const std::int64_t chunk = largest_chunk(queries, 1, limit == 0 ? kDenseWorkspace : limit, bytes_of);
  return lay_out(params, chunk, span_keys);
}

}  // namespace msa::cuda
