// SPDX-License-Identifier: Apache-2.0
// See index_kl_plan.h.
#include "src/cpu/index_kl_plan.h"

#include "msa/error.h"
#include "src/core/layout.h"
#include "src/cpu/block_walk.h"
#include "src/cpu/plan_chunks.h"

namespace msa::cpu {

IndexKlLayout lay_out_index_kl(const IndexKlShape& shape, std::int64_t chunk, bool keep_tiles) {
  const std::int64_t row_floats = (shape.group_size + 1) * kl_tile_stride(shape.block_size);  // of a query and a block
  // Several times an L2 cache: writing and reading a score costs less than head_dim multiply-adds even in L3 or memory.
  constexpr std::int64_t kStripFloats = std::int64_t{1} << 21;
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
  layout.walk = cursor.take(BlockWalk::scratch_elements(chunk));
  layout.tile = cursor.take(std::min(chunk, kl_tile_queries(shape.group_size)) * row_floats);
  layout.strip_floats = keep_tiles ? std::min(kStripFloats, chunk * shape.row_blocks * row_floats) : 0;
  layout.strip = cursor.take(layout.strip_floats);
  layout.end = cursor.end();
  return layout;
}

IndexKlPlan plan_index_kl(const std::string& op, const IndexKlShape& shape, int threads, std::size_t workspace_limit) {
  // Loading a block costs as much as the arithmetic of about 8 rows; two score tiles of rows make that small.
  const std::int64_t least = std::max<std::int64_t>(16, 48 / shape.group_size);
  const std::int64_t chunk = std::max(least, 2 * kl_tile_queries(shape.group_size));
  IndexKlPlan plan;
  const auto bytes = [&](std::int64_t c) { return bytes_of(lay_out_index_kl(shape, c, plan.keep_tiles).end); };
  plan.chunks = plan_chunks(op, shape.queries, shape.kv_heads, chunk, least, threads, 0, bytes);
  if (workspace_limit != 0 && plan.chunks.bytes() > workspace_limit) {
    plan.keep_tiles = false;
    plan.chunks = plan_chunks(op, shape.queries, shape.kv_heads, chunk, least, threads, workspace_limit, bytes);
  }
  return plan;
}

IndexKlBackwardLayout lay_out_index_kl_backward(const IndexKlShape& shape, bool keep_tiles) {
  const std::int64_t chunk = kl_backward_chunk(shape.queries.longest);
  const std::int64_t tile_queries = std::min(chunk, kl_tile_queries(shape.group_size));
  IndexKlBackwardLayout layout;
  layout.chunk = lay_out_index_kl(shape, chunk, keep_tiles);
  LayoutCursor cursor;
  cursor.take(layout.chunk.end);
  layout.index_query_tile = cursor.take(tile_queries * padded_stride(shape.index_dim));
  layout.index_query_grads = cursor.take(chunk * shape.index_dim);
  layout.index_key_rows = cursor.take(shape.block_size * padded_stride(shape.index_dim));
  layout.sums = cursor.take(tile_queries * shape.index_dim);
  layout.end = cursor.end();
  return layout;
}

IndexKlBackwardPlan plan_index_kl_backward(const std::string& op, const IndexKlShape& shape, const Batch& batch,
                                           int threads, std::size_t workspace_limit) {
  IndexKlBackwardPlan plan;
  std::int64_t key_blocks = 0;   // of all sequences
  std::int64_t largest = 0;      // blocks of the largest task
  std::int64_t all_blocks = 0;   // of all tasks
  for (std::int64_t s = 0; s < batch.sequences(); ++s) {
    const core::Sequence sequence = core::get_sequence(batch, s);
    key_blocks += (sequence.keys + shape.block_size - 1) / shape.block_size;
    const std::int64_t chunk = kl_backward_chunk(sequence.queries);
    // Longest prefixes first, for the balance of the threads.
    for (std::int64_t begin = (sequence.queries - 1) / chunk * chunk; sequence.queries > 0 && begin >= 0; begin -= chunk) {
      IndexKlTask task;
      task.chunk = {s, begin, std::min(begin + chunk, sequence.queries)};
      task.blocks = core::query_position(batch, sequence, task.chunk.end - 1) / shape.block_size + 1;
      largest = std::max(largest, task.blocks);
      all_blocks += task.blocks * shape.kv_heads;
      for (task.group = 0; task.group < shape.kv_heads; ++task.group) plan.tasks.push_back(task);
    }
  }
  const std::int64_t block_floats = shape.block_size * shape.index_dim;
  const std::size_t block_bytes = bytes_of(block_floats) + 1;  // and a flag: touched or not
  plan.workers = static_cast<int>(std::clamp<std::int64_t>(static_cast<std::int64_t>(plan.tasks.size()), 1, threads));
  plan.worker_bytes = bytes_of(lay_out_index_kl_backward(shape, plan.keep_tiles).end);
  // Sums in flight: 256 MiB are enough for balance; beyond, one task a thread.
  constexpr std::size_t kRoundBytes = std::size_t{256} << 20;
  std::int64_t room = std::max(largest * plan.workers, static_cast<std::int64_t>(kRoundBytes / block_bytes));
  room = std::min(room, all_blocks);
  const std::size_t dk_bytes = static_cast<std::size_t>(key_blocks) * bytes_of(block_floats);
  const auto bytes = [&] {
    plan.shared_bytes = dk_bytes + static_cast<std::size_t>(room) * block_bytes;
    return plan.shared_bytes + plan.worker_bytes * static_cast<std::size_t>(plan.workers);
  };
  while (workspace_limit != 0 && bytes() > workspace_limit) {
    if (plan.keep_tiles) {
      plan.keep_tiles = false;
      plan.worker_bytes = bytes_of(lay_out_index_kl_backward(shape, plan.keep_tiles).end);
    } else if (room > largest) {
      room = std::max(largest, room / 2);
    } else if (plan.workers > 1) {
      --plan.workers;
    } else {
      throw Error(op + ": needs at least " + std::to_string(bytes()) +
                  " bytes of workspace, but Context::workspace_limit is " + std::to_string(workspace_limit));
    }
  }
  bytes();
  std::int64_t used = 0;
  for (std::size_t i = 0; i < plan.tasks.size(); ++i) {
    if (used + plan.tasks[i].blocks > room) {
      plan.round_ends.push_back(static_cast<std::int64_t>(i));
      used = 0;
    }
    plan.tasks[i].sum_begin = used;
    used += plan.tasks[i].blocks;
    plan.round_blocks = std::max(plan.round_blocks, used);
  }
  plan.round_ends.push_back(static_cast<std::int64_t>(plan.tasks.size()));
  return plan;
}

}  // namespace msa::cpu
