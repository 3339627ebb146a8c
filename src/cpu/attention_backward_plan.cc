// SPDX-License-Identifier: Apache-2.0
// See attention_backward_plan.h.
#include "src/cpu/attention_backward_plan.h"

#include "msa/error.h"
#include "src/cpu/attention_backward_problem.h"
#include "src/cpu/block_lists.h"
#include "src/cpu/plan_chunks.h"
#include "src/cpu/tile.h"

namespace msa::cpu {

BackwardLayout lay_out_backward(const AttentionShape& shape, std::int64_t blocks) {
  const std::int64_t chunk = std::min(backward_chunk(shape.queries.longest, shape.kv_heads), shape.queries.longest);
  const std::int64_t rows = chunk * shape.group_size;
  const std::int64_t tile = std::min(backward_tile_queries(shape.group_size), chunk) * shape.group_size;
  const std::int64_t block_stride = padded_stride(shape.block_size);
  BackwardLayout layout;
  LayoutCursor cursor;
  layout.terms = cursor.take(floats_for(rows, sizeof(RowTerms)));
  layout.query_grads = cursor.take(rows * shape.head_dim);
  layout.lists = cursor.take(BlockLists::scratch_elements(chunk, shape.topk, blocks));
  layout.keys = cursor.take(shape.block_size * padded_stride(shape.head_dim));
  layout.keys_t = cursor.take(shape.head_dim * block_stride);
  layout.values_t = cursor.take(shape.value_dim * block_stride);
  layout.queries = cursor.take(tile * padded_stride(shape.head_dim));
  layout.out_grads = cursor.take(tile * padded_stride(shape.value_dim));
  layout.scores = cursor.take(tile * block_stride);
  layout.grads = cursor.take(tile * block_stride);
  layout.part = cursor.take(shape.block_size * (shape.head_dim + shape.value_dim));
  layout.end = cursor.end();
  return layout;
}

std::string to_string(const BackwardPlan& plan) {
  return std::to_string(plan.workers) + " workers x " + std::to_string(plan.worker_bytes) + " bytes, " +
         std::to_string(plan.heads_at_once) + " heads at once, shared " + std::to_string(plan.shared_bytes) + " bytes";
}

BackwardPlan plan_attention_backward(const std::string& op, const AttentionShape& shape, const Batch& batch, int threads,
                                     std::size_t workspace_limit) {
  BackwardPlan plan;
  plan.heads_at_once = shape.kv_heads;
  plan.worker_bytes = bytes_of(lay_out_backward(shape, count_blocks(batch, shape.block_size)).end);
  const auto measure = [&] {
    const BackwardTasks work = list_backward_tasks(batch, shape.kv_heads, plan.heads_at_once, shape.block_size, false);
    const auto tasks = static_cast<std::int64_t>(work.tasks.size());
    plan.workers = static_cast<int>(std::clamp<std::int64_t>(tasks, 1, std::max(threads, 1)));
    plan.shared_bytes =
        bytes_of(work.sum_blocks * shape.block_size * (shape.head_dim + shape.value_dim));
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
