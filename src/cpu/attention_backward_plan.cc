// SPDX-License-Identifier: Apache-2.0
// See attention_backward_plan.h.
#include "src/cpu/attention_backward_plan.h"

#include <algorithm>

#include "msa/error.h"
#include "src/cpu/attention_backward_problem.h"
#include "src/cpu/block_walk.h"
#include "src/cpu/plan_chunks.h"
#include "src/cpu/tile.h"

namespace msa::cpu {
namespace {

std::int64_t tile_rows(const AttentionShape& shape) {
  return backward_tile_queries(shape.group_size) * shape.group_size;
}

// What all workers share: the terms of each row and head, the reverse index, the sums of the splits.
std::size_t count_shared_bytes(const BackwardShape& shape, const BackwardPlan& plan) {
  const AttentionShape& a = shape.attention;
  std::int64_t floats = floats_for(a.queries.total * a.kv_heads * a.group_size, sizeof(RowTerms));
  if (a.topk > 0) {
    const std::int64_t entries = a.queries.total * a.topk;
    std::int64_t head_floats = entries + floats_for(shape.blocks + shape.sequences, sizeof(std::int64_t));
    // A list of n > split queries has ceil(n / split) < 2 n / split splits.
    const std::int64_t splits = 2 * entries / backward_split_queries(a);
    if (plan.share_splits) head_floats += splits * a.block_size * (a.head_dim + a.value_dim);
    floats += plan.heads_at_once * head_floats;
  }
  return bytes_of(floats);
}

}  // namespace

QueryPassLayout lay_out_query_pass(const BackwardShape& backward, std::int64_t chunk, bool keep_tiles) {
  const AttentionShape& shape = backward.attention;
  const std::int64_t rows = chunk * shape.group_size;
  const std::int64_t tile = std::min(kScoreRows, rows);
  const std::int64_t tile_stride = backward_tile_stride(shape.block_size);
  // Several times an L2 cache: writing and reading a score costs less than head_dim multiply-adds even in L3 or memory.
  constexpr std::int64_t kStripFloats = std::int64_t{1} << 21;
  QueryPassLayout layout;
  LayoutCursor cursor;
  layout.queries = cursor.take(rows * shape.head_dim);
  layout.out_grads = cursor.take(rows * shape.value_dim);
  layout.query_grads = cursor.take(rows * shape.head_dim);
  layout.keys = cursor.take(shape.block_size * padded_stride(shape.head_dim));
  layout.keys_t = cursor.take(shape.head_dim * padded_stride(shape.block_size));
  layout.values_t = cursor.take(shape.value_dim * padded_stride(shape.block_size));
  layout.sums = cursor.take(tile * shape.head_dim);
  layout.row_sums = cursor.take(floats_for(rows, sizeof(RowSums)));
  layout.walk = cursor.take(BlockWalk::scratch_elements(chunk));
  layout.tile = cursor.take(2 * tile * tile_stride);
  layout.strip_floats = keep_tiles ? std::min(kStripFloats, 2 * rows * backward.row_blocks * tile_stride) : 0;
  layout.strip = cursor.take(layout.strip_floats);
  layout.end = cursor.end();
  return layout;
}

KeyPassLayout lay_out_key_pass(const AttentionShape& shape) {
  const std::int64_t rows = tile_rows(shape);
  const std::int64_t block = shape.block_size * (shape.head_dim + shape.value_dim);
  KeyPassLayout layout;
  LayoutCursor cursor;
  layout.queries = cursor.take(rows * padded_stride(shape.head_dim));
  layout.out_grads = cursor.take(rows * padded_stride(shape.value_dim));
  layout.keys_t = cursor.take(shape.head_dim * padded_stride(shape.block_size));
  layout.values_t = cursor.take(shape.value_dim * padded_stride(shape.block_size));
  layout.scores = cursor.take(rows * padded_stride(shape.block_size));
  layout.grads = cursor.take(rows * padded_stride(shape.block_size));
  layout.part = cursor.take(block);
  layout.split = cursor.take(block);
  layout.total = cursor.take(block);
  layout.end = cursor.end();
  return layout;
}

std::size_t BackwardPlan::bytes() const {
  return shared_bytes + std::max(query_pass.bytes(), key_worker_bytes * static_cast<std::size_t>(key_workers));
}

std::string to_string(const BackwardPlan& plan) {
  return "query pass: " + to_string(plan.query_pass) + "; key pass: " + std::to_string(plan.key_workers) +
         " workers x " + std::to_string(plan.key_worker_bytes) + " bytes, " + std::to_string(plan.heads_at_once) +
         " heads at once; shared " + std::to_string(plan.shared_bytes) + " bytes";
}

BackwardPlan plan_attention_backward(const std::string& op, const BackwardShape& shape, int threads,
                                     std::size_t workspace_limit) {
  const AttentionShape& a = shape.attention;
  BackwardPlan plan;
  plan.heads_at_once = a.kv_heads;
  plan.key_workers = static_cast<int>(std::clamp<std::int64_t>(shape.blocks * a.kv_heads, 1, threads));
  plan.key_worker_bytes = bytes_of(lay_out_key_pass(a).end);
  const auto key_bytes = [&] {
    plan.shared_bytes = count_shared_bytes(shape, plan);
    return plan.shared_bytes + plan.key_worker_bytes * static_cast<std::size_t>(plan.key_workers);
  };
  while (key_bytes() > workspace_limit && workspace_limit != 0) {
    if (plan.share_splits) {
      plan.share_splits = false;
    } else if (plan.heads_at_once > 1) {
      plan.heads_at_once = (plan.heads_at_once + 1) / 2;
    } else if (plan.key_workers > 1) {
      --plan.key_workers;
    } else {
      throw Error(op + ": needs at least " + std::to_string(key_bytes()) +
                  " bytes of workspace, but Context::workspace_limit is " + std::to_string(workspace_limit));
    }
  }
  // Chunks as in the forward (plan_attention), with two arrays of head_dim a row in place of one.
  const std::int64_t state = a.topk == 0 ? std::int64_t{1} << 17 : std::int64_t{1} << 20;  // floats
  const std::int64_t least = 16;
  const std::int64_t chunk = std::max(least, state / (a.group_size * (2 * a.head_dim + a.value_dim)));
  const auto bytes_of_chunk = [&](std::int64_t c) {
    return bytes_of(lay_out_query_pass(shape, c, plan.keep_tiles).end);
  };
  const auto plan_query_pass = [&](std::size_t limit) {
    plan.query_pass =
        plan_chunks(op, a.queries, a.kv_heads, chunk, least, threads, limit, bytes_of_chunk, plan.shared_bytes);
  };
  plan_query_pass(0);
  if (workspace_limit != 0 && plan.bytes() > workspace_limit) {
    plan.keep_tiles = false;
    plan_query_pass(workspace_limit);
  }
  return plan;
}

}  // namespace msa::cpu
