// SPDX-License-Identifier: Apache-2.0
// See index_kl_plan.h.
#include "src/cpu/index_kl_plan.h"

#include "msa/error.h"
#include "src/cpu/bf16_dot.h"
#include "src/cpu/block_lists.h"
#include "src/cpu/plan_chunks.h"

namespace msa::cpu {
namespace {

// Queries of a chunk with bf16 dot products take this much in bf16: half of a second-level cache, in which they stay
// from block to block.
constexpr std::int64_t kBf16ChunkBytes = std::int64_t{1} << 20;

// Score tiles kept for the second time through the blocks: writing and reading a score costs far less than head_dim
// multiply-adds, even in memory. 16 MiB hold the tiles of 6 queries of the paper's layer, one score tile, over 32K
// keys, or of 107 queries with 16 blocks each.
constexpr std::int64_t kStripFloats = std::int64_t{1} << 22;

std::int64_t query_strip_floats(const IndexKlShape& shape) {
  const std::int64_t row_blocks = shape.topk == 0 ? shape.blocks : std::min(shape.topk, shape.blocks);
  return row_blocks * (shape.group_size + 1) * kl_tile_stride(shape.block_size);
}

std::int64_t bf16_query_floats(const IndexKlShape& shape, std::int64_t rows) {
  return floats_for(rows * padded_inner(shape.head_dim), sizeof(std::uint16_t));
}

std::int64_t bf16_floats(std::int64_t elements) { return floats_for(elements, sizeof(std::uint16_t)); }

// Keys of `dim` elements turned round.
std::int64_t key_floats(const IndexKlShape& shape, std::int64_t dim, bool is_bf16) {
  if (!is_bf16) return dim * padded_stride(shape.block_size);
  return bf16_floats(padded_inner(dim) / 2 * padded_pair_stride(shape.block_size));
}

IndexKlLayout lay_out_bf16_index_kl(const IndexKlShape& shape, std::int64_t chunk) {
  const std::int64_t row_count = kl_bf16_row_count(shape.group_size);
  const std::int64_t tile_rows = std::max<std::int64_t>(1, kBf16Rows / shape.group_size) * shape.group_size;
  IndexKlLayout layout;
  LayoutCursor cursor;
  layout.queries = cursor.take(bf16_query_floats(shape, chunk * shape.group_size));
  layout.index_queries =
      cursor.take(shape.has_bf16_index ? bf16_floats(chunk * padded_inner(shape.index_dim)) : chunk * shape.index_dim);
  layout.keys = cursor.take(key_floats(shape, shape.head_dim, true));
  layout.index_keys = cursor.take(key_floats(shape, shape.index_dim, shape.has_bf16_index));
  layout.largest = cursor.take(chunk * row_count);
  layout.totals = cursor.take(chunk * row_count);
  layout.factors = cursor.take(2 * chunk * row_count);
  layout.norms = cursor.take(chunk);
  layout.values = cursor.take(floats_for(chunk, sizeof(double)));
  layout.lists = cursor.take(BlockLists::scratch_elements(chunk, shape.topk, shape.blocks));
  layout.tile = cursor.take(kBf16Rows * padded_stride(shape.block_size));
  layout.scores = cursor.take((tile_rows + 16) * padded_stride(shape.block_size));
  layout.strip = layout.end = cursor.end();
  return layout;
}

}  // namespace

IndexKlLayout lay_out_index_kl(const IndexKlShape& shape, std::int64_t chunk, bool keep_tiles) {
  if (shape.has_bf16_dots) return lay_out_bf16_index_kl(shape, chunk);
  const std::int64_t row_floats = (shape.group_size + 1) * kl_tile_stride(shape.block_size);  // of a query and a block
  IndexKlLayout layout;
  LayoutCursor cursor;
  layout.queries = cursor.take(chunk * shape.group_size * shape.head_dim);
  layout.index_queries = cursor.take(chunk * shape.index_dim);
  layout.keys = cursor.take(shape.head_dim * padded_stride(shape.block_size));
  layout.index_keys = cursor.take(shape.index_dim * padded_stride(shape.block_size));
  layout.largest = cursor.take(chunk * (shape.group_size + 1));
  layout.totals = cursor.take(floats_for(chunk * (shape.group_size + 1), sizeof(double)));
  layout.norms = cursor.take(chunk);
  layout.factors = cursor.take(shape.group_size);
  layout.values = cursor.take(floats_for(chunk, sizeof(double)));
  layout.lists = cursor.take(BlockLists::scratch_elements(chunk, shape.topk, shape.blocks));
  layout.tile = cursor.take(std::min(chunk, kl_tile_queries(shape.group_size)) * row_floats);
  layout.strip_floats = keep_tiles ? std::min(kStripFloats, chunk * query_strip_floats(shape)) : 0;
  layout.strip = cursor.take(layout.strip_floats);
  layout.end = cursor.end();
  return layout;
}

IndexKlPlan plan_index_kl(const std::string& op, const IndexKlShape& shape, int threads, std::size_t workspace_limit) {
  if (shape.has_bf16_dots) {
    const std::int64_t query_bytes = shape.group_size * padded_inner(shape.head_dim) * 2;
    const std::int64_t chunk = std::clamp<std::int64_t>(kBf16ChunkBytes / query_bytes, 16, 1024);
    IndexKlPlan plan;
    plan.keep_tiles = false;
    plan.chunks = plan_chunks(op, shape.queries, shape.kv_heads, chunk, 16, threads, workspace_limit,
                              [&](std::int64_t c) { return bytes_of(lay_out_index_kl(shape, c, false).end); });
    return plan;
  }
  // As many queries as the strip holds, within one score tile of rows (a block's loading costs a few rows' arithmetic)
  // and 128 queries (enough for that where blocks are chosen by few).
  const std::int64_t least = kl_tile_queries(shape.group_size);
  const std::int64_t in_strip = kStripFloats / std::max<std::int64_t>(query_strip_floats(shape), 1);
  const std::int64_t chunk = std::clamp<std::int64_t>(in_strip, least, std::max<std::int64_t>(least, 128));
  IndexKlPlan plan;
  const auto bytes = [&](std::int64_t c) { return bytes_of(lay_out_index_kl(shape, c, plan.keep_tiles).end); };
  plan.chunks = plan_chunks(op, shape.queries, shape.kv_heads, chunk, least, threads, 0, bytes);
  if (workspace_limit != 0 && plan.chunks.bytes() > workspace_limit) {
    plan.keep_tiles = false;
    plan.chunks = plan_chunks(op, shape.queries, shape.kv_heads, chunk, least, threads, workspace_limit, bytes);
  }
  return plan;
}

IndexKlBackwardLayout lay_out_index_kl_backward(const IndexKlShape& shape) {
  const std::int64_t chunk = std::min(backward_chunk(shape.queries.longest, shape.kv_heads), shape.queries.longest);
  const std::int64_t tile_rows = std::min(chunk, kl_tile_queries(shape.group_size)) * shape.group_size;
  const std::int64_t index_rows = std::min(chunk, kScoreRows);
  const std::int64_t block_stride = padded_stride(shape.block_size);
  IndexKlBackwardLayout layout;
  LayoutCursor cursor;
  layout.lse = cursor.take(chunk * (shape.group_size + 1));
  layout.norms = cursor.take(chunk);
  layout.query_grads = cursor.take(chunk * shape.index_dim);
  layout.lists = cursor.take(BlockLists::scratch_elements(chunk, shape.topk, shape.blocks));
  const std::int64_t index_inner = padded_inner(shape.index_dim);
  const std::int64_t index_pair_stride = padded_pair_stride(shape.index_dim);
  layout.keys_t = cursor.take(key_floats(shape, shape.head_dim, shape.has_bf16_dots));
  layout.index_keys =
      cursor.take(shape.has_bf16_index ? bf16_floats(padded_inner(shape.block_size) / 2 * index_pair_stride)
                                       : shape.block_size * padded_stride(shape.index_dim));
  layout.index_keys_t = cursor.take(key_floats(shape, shape.index_dim, shape.has_bf16_index));
  layout.queries = cursor.take(shape.has_bf16_dots ? bf16_query_floats(shape, tile_rows)
                                                   : tile_rows * padded_stride(shape.head_dim));
  layout.index_queries = cursor.take(shape.has_bf16_index ? bf16_floats(kScoreRows * index_inner)
                                                          : index_rows * padded_stride(shape.index_dim));
  layout.scores = cursor.take((tile_rows + (shape.has_bf16_dots ? 16 : 0)) * block_stride);
  layout.index_scores = cursor.take((index_rows + (shape.has_bf16_index ? 16 : 0)) * block_stride);
  if (shape.has_bf16_index) {
    layout.index_pairs = cursor.take(bf16_floats(kScoreRows / 2 * index_pair_stride));
    layout.gradient_rows = cursor.take(bf16_floats(kScoreRows * padded_inner(shape.block_size)));
    layout.gradients_t = cursor.take(bf16_floats(shape.block_size * kScoreRows));
    layout.products = cursor.take(std::max(kScoreRows, shape.block_size) * padded_stride(shape.index_dim));
  }
  layout.part = cursor.take(shape.block_size * shape.index_dim);
  layout.end = cursor.end();
  return layout;
}

IndexKlBackwardPlan plan_index_kl_backward(const std::string& op, const IndexKlShape& shape, const Batch& batch,
                                           int threads, std::size_t workspace_limit) {
  const BackwardTasks work = list_backward_tasks(batch, shape.kv_heads, shape.kv_heads, shape.block_size, true);
  const auto tasks = static_cast<std::int64_t>(work.tasks.size());
  IndexKlBackwardPlan plan;
  plan.workers = static_cast<int>(std::clamp<std::int64_t>(tasks, 1, std::max(threads, 1)));
  plan.worker_bytes = bytes_of(lay_out_index_kl_backward(shape).end);
  plan.shared_bytes = bytes_of(work.sum_blocks * shape.block_size * shape.index_dim);
  while (workspace_limit != 0 && plan.bytes() > workspace_limit) {
    if (plan.workers == 1) {
      throw Error(op + ": needs at least " + std::to_string(plan.bytes()) +
                  " bytes of workspace, but Context::workspace_limit is " + std::to_string(workspace_limit));
    }
    --plan.workers;
  }
  return plan;
}

}  // namespace msa::cpu
