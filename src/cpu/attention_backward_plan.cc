// SPDX-License-Identifier: Apache-2.0
// See attention_backward_plan.h.
#include "src/cpu/attention_backward_plan.h"

#include "msa/error.h"
#include "src/cpu/attention_backward_problem.h"
#include "src/cpu/block_lists.h"
#include "src/cpu/plan_chunks.h"
#include "src/cpu/tile.h"

namespace msa::cpu {

namespace {

void take_bf16_tiles(const AttentionShape& shape, LayoutCursor& cursor, BackwardLayout& layout) {
  const auto take = [&](std::int64_t elements) { return cursor.take(floats_for(elements, sizeof(std::uint16_t))); };
  const std::int64_t head_inner = padded_inner(shape.head_dim);
  const std::int64_t value_inner = padded_inner(shape.value_dim);
  const std::int64_t key_inner = padded_inner(shape.block_size);
  const std::int64_t key_pair_stride = padded_pair_stride(shape.block_size);
  const std::int64_t row_stride = backward_bf16_row_stride(shape.group_size);
  const std::int64_t rows = padded_inner(backward_bf16_tile_queries(shape.group_size) * shape.group_size);
  layout.keys = take(key_inner / 2 * padded_pair_stride(shape.head_dim));
  layout.keys_t = take(head_inner / 2 * key_pair_stride);
  layout.values_t = take(value_inner / 2 * key_pair_stride);
  layout.queries = take(rows * head_inner);
  layout.out_grads = take(rows * value_inner);
  layout.queries_t = take(head_inner * row_stride);
  layout.out_grads_t = take(value_inner * row_stride);
  layout.scores = cursor.take(kBf16Rows * padded_stride(key_inner));
  layout.grads = cursor.take(kBf16Rows * padded_stride(key_inner));
  layout.gradient_rows = take(rows * (key_inner + 32));
  layout.gradient_pairs = take(rows / 2 * key_pair_stride);
  layout.probability_pairs = take(rows / 2 * key_pair_stride);
  const std::int64_t dim = std::max(shape.head_dim, shape.value_dim);
  layout.products = cursor.take(std::max(kBf16Rows * padded_stride(dim), dim * padded_stride(shape.block_size)));
  layout.tile_rows = cursor.take(rows);
}

}  // namespace

BackwardLayout lay_out_backward(const AttentionShape& shape, std::int64_t blocks) {
  const std::int64_t chunk = std::min(backward_chunk(shape.queries.longest, shape.kv_heads), shape.queries.longest);
  const std::int64_t rows = chunk * shape.group_size;
  const std::int64_t tile = std::min(backward_tile_queries(shape.group_size), chunk) * shape.group_size;
  const std::int64_t block_stride = padded_stride(shape.block_size);
  BackwardLayout layout;
  LayoutCursor cursor;
  layout.terms = cursor.take(floats_for(rows, sizeof(RowTerms)));
  if (!shape.has_bf16_dots) layout.totals = cursor.take(floats_for(rows, sizeof(double)));
  layout.query_grads = cursor.take(rows * shape.head_dim);
  layout.lists = cursor.take(BlockLists::scratch_elements(chunk, shape.topk, blocks));
  if (shape.has_bf16_dots) {
    take_bf16_tiles(shape, cursor, layout);
  } else {
    layout.keys = cursor.take(shape.block_size * padded_stride(shape.head_dim));
    layout.keys_t = cursor.take(shape.head_dim * block_stride);
    layout.values_t = cursor.take(shape.value_dim * block_stride);
    layout.queries = cursor.take(tile * padded_stride(shape.head_dim));
    layout.out_grads = cursor.take(tile * padded_stride(shape.value_dim));
    layout.scores = cursor.take(tile * block_stride);
    layout.grads = cursor.take(tile * block_stride);
  }
  layout.part = cursor.take(shape.block_size * (shape.head_dim + shape.value_dim));
  layout.end = cursor.end();
  return layout;
}

std::string to_string(const BackwardPlan& plan) {
  return std::to_string(plan.workers) + " workers x " + std::to_string(plan.worker_bytes) + " bytes, " +
         std::to_string(plan.heads_at_once) + " heads at once, shared " + std::to_string(plan.shared_bytes) + " bytes";
}

BackwardPlan plan_attention_backward(const std::string& op, const AttentionShape& shape, const Batch& batch,
                                     int threads, std::size_t workspace_limit) {
  BackwardPlan plan;
  plan.heads_at_once = shape.kv_heads;
  plan.worker_bytes = bytes_of(lay_out_backward(shape, count_blocks(batch, shape.block_size)).end);
  const auto measure = [&] {
    const BackwardTasks work = list_backward_tasks(batch, shape.kv_heads, plan.heads_at_once, shape.block_size, false);
    const auto tasks = static_cast<std::int64_t>(work.tasks.size());
    plan.workers = static_cast<int>(std::clamp<std::int64_t>(tasks, 1, std::max(threads, 1)));
    plan.shared_bytes = bytes_of(work.sum_blocks * shape.block_size * (shape.head_dim + shape.value_dim));
  };
  measure();
  while (workspace_limit != 0 && plan.bytes() > workspace_limit) {
    if (plan.heads_at_once > 1) {
      plan.heads_at_once = (plan.heads_at_once + 1) / 2;
      measure();
    } else if (plan.workers > 1) {
      --plan.workers;
    } else {
      throw Error(op + ": needs at least " + std::to_string(plan.bytes()) +
                  " bytes of workspace, but Context::workspace_limit is " + std::to_string(workspace_limit));
    }
  }
  return plan;
}

}  // namespace msa::cpu
