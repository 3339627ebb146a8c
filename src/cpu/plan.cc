// SPDX-License-Identifier: Apache-2.0
// See plan.h.
#include "src/cpu/plan.h"

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "src/core/layout.h"
#include "src/cpu/attention_amx.h"
#include "src/cpu/bf16_dot.h"
#include "src/cpu/plan_chunks.h"
#include "src/cpu/sparse_visits.h"
#include "src/cpu/tile.h"

namespace msa::cpu {

std::vector<QueryChunk> cut_queries(const Batch& batch, std::int64_t chunk) {
  std::vector<QueryChunk> chunks;
  for (std::int64_t s = 0; s < batch.sequences(); ++s) {
    for (std::int64_t end = core::get_sequence(batch, s).queries; end > 0;
         end = std::max<std::int64_t>(end - chunk, 0)) {
      chunks.push_back({s, std::max<std::int64_t>(end - chunk, 0), end});
    }
  }
  return chunks;
}

std::vector<ChunkTask> list_tasks(const std::vector<QueryChunk>& chunks, std::int64_t heads, int workers) {
  const std::int64_t count = static_cast<std::int64_t>(chunks.size()) * heads;
  const std::int64_t whole = count / workers * workers;
  const std::int64_t shares = workers / std::gcd<std::int64_t>(workers, count - whole);
  std::vector<ChunkTask> tasks;
  for (const QueryChunk& chunk : chunks) {
    const std::int64_t queries = chunk.end - chunk.begin;
    for (std::int64_t head = 0; head < heads; ++head) {
      const bool is_cut = static_cast<std::int64_t>(tasks.size()) >= whole;
      const std::int64_t pieces = is_cut ? std::clamp<std::int64_t>(queries / kLeastPiece, 1, shares) : 1;
      for (std::int64_t p = pieces - 1; p >= 0; --p) {
        const QueryChunk piece = {chunk.sequence, chunk.begin + p * queries / pieces,
                                  chunk.begin + (p + 1) * queries / pieces};
        tasks.push_back({piece, head});
      }
    }
  }
  return tasks;
}

QueryCounts count_queries(const Batch& batch) {
  QueryCounts counts;
  for (std::int64_t s = 0; s < batch.sequences(); ++s) {
    counts.longest = std::max(counts.longest, core::get_sequence(batch, s).queries);
  }
  counts.total = core::total_queries(batch);
  return counts;
}

std::int64_t count_blocks(const Batch& batch, std::int64_t block_size) {
  std::int64_t keys = 0;
  for (std::int64_t s = 0; s < batch.sequences(); ++s) keys = std::max(keys, core::get_sequence(batch, s).keys);
  return (keys + block_size - 1) / block_size;
}

std::string to_string(const ChunkPlan& plan) {
  char text[96];
  std::snprintf(text, sizeof text, "chunk %lld queries, %d workers x %.2f MiB", static_cast<long long>(plan.chunk),
                plan.workers, static_cast<double>(plan.worker_bytes) / (1 << 20));
  return text;
}

AttentionLayout lay_out_attention(const AttentionShape& shape, std::int64_t chunk) {
  const std::int64_t rows = shape.has_tiles ? padded_columns(chunk * shape.group_size) : chunk * shape.group_size;
  AttentionLayout layout;
  LayoutCursor cursor;
  const std::int64_t inner = padded_inner(shape.head_dim);
  layout.queries = cursor.take(shape.has_bf16_dots ? floats_for(rows * inner, 2) : rows * shape.head_dim);
  layout.sums = cursor.take(rows * shape.value_dim);
  layout.largest = cursor.take(rows);
  layout.totals = cursor.take(rows);
  if (shape.has_tiles) {
    const std::int64_t keys = padded_inner(shape.block_size);
    layout.keys = cursor.take(floats_for(keys * inner, 2));
    layout.values = cursor.take(floats_for(keys * shape.value_dim, 2));
    layout.scores = cursor.take(16 * ((keys + 63) / 64 * 64));
    layout.probabilities = cursor.take(floats_for(kMaxRowTiles * 16 * keys, 2));
    layout.staged_queries = cursor.take(floats_for(2 * kStagedRows * inner, 2));
    layout.staged_sums = cursor.take(2 * kStagedRows * shape.value_dim);
  } else if (shape.has_bf16_dots) {
    layout.keys = cursor.take(floats_for(inner / 2 * padded_pair_stride(shape.block_size), 2));
    layout.values =
        cursor.take(floats_for(padded_inner(shape.block_size) / 2 * padded_pair_stride(shape.value_dim), 2));
    layout.scores = cursor.take(kBf16Rows * padded_stride(shape.block_size));
    layout.products = cursor.take(kBf16Rows * padded_stride(shape.value_dim));
    layout.probabilities = cursor.take(floats_for(kBf16Rows * padded_inner(shape.block_size), 2));
  } else {
    layout.keys = cursor.take(shape.head_dim * padded_stride(shape.block_size));
    layout.values = cursor.take(shape.block_size * padded_stride(shape.value_dim));
    layout.scores = cursor.take(kScoreRows * padded_stride(shape.block_size));
  }
  layout.visits = cursor.take(floats_for(visit_room(chunk, shape.topk), sizeof(std::uint64_t)));
  layout.members = cursor.take(chunk);
  layout.seen = cursor.take(chunk);
  layout.end = cursor.end();
  return layout;
}

ChunkPlan plan_attention(const std::string& op, const AttentionShape& shape, int threads, std::size_t workspace_limit) {
  // What a chunk carries from block to block: its queries and sums. Dense attention passes all of it for every block,
  // so half an L2 cache (1 MiB on today's cores) is right; twice that in AMX tiles, where preparing a block weighs more
  // beside the arithmetic. In sparse attention a block is visited by few queries of the
  // chunk, and loading it costs as much as about 8 rows' arithmetic: larger chunks let more rows share a block, and
  // their rows are read once a visit only, 4 bytes for every 2 * block_size operations: L3 or memory keep up. With bf16
  // dots the arithmetic is 2 to 16 times as fast and the loading is not, hence chunks twice as large, and no more tasks
  // than it takes to give every thread one: list_tasks sees to it that they end together.
  const bool is_dense = shape.topk == 0;
  const std::int64_t state = std::int64_t{1} << (is_dense              ? (shape.has_tiles ? 18 : 17)
                                                 : shape.has_bf16_dots ? 21
                                                                       : 20);  // floats
  const std::int64_t least = 16;
  const std::int64_t chunk = std::max(least, state / (shape.group_size * (shape.head_dim + shape.value_dim)));
  return plan_chunks(
      op, shape.queries, shape.kv_heads, chunk, least, threads, workspace_limit,
      [&](std::int64_t c) { return bytes_of(lay_out_attention(shape, c).end); }, 0,
      shape.has_bf16_dots && !is_dense ? 1 : 4);
}

BlockMassLayout lay_out_block_mass(const BlockMassShape& shape, std::int64_t chunk) {
  const std::int64_t rows = chunk * shape.group_size;
  BlockMassLayout layout;
  LayoutCursor cursor;
  layout.queries = cursor.take(rows * shape.head_dim);
  layout.keys = cursor.take(shape.head_dim * padded_stride(shape.block_size));
  layout.scores = cursor.take(kScoreRows * padded_stride(shape.block_size));
  layout.largest = cursor.take(rows * shape.blocks);
  layout.sums = cursor.take(rows * shape.blocks);
  layout.mass = cursor.take(chunk * shape.blocks);
  layout.best = cursor.take(2 * shape.topk);
  layout.end = cursor.end();
  return layout;
}

ChunkPlan plan_block_mass(const std::string& op, const BlockMassShape& shape, int threads,
                          std::size_t workspace_limit) {
  const std::int64_t state = std::int64_t{1} << 18;  // floats: an L2 cache
  const std::int64_t chunk =
      std::max<std::int64_t>(1, state / (shape.group_size * (shape.head_dim + 2 * shape.blocks) + shape.blocks));
  return plan_chunks(op, shape.queries, shape.kv_heads, chunk, 16, threads, workspace_limit,
                     [&](std::int64_t c) { return bytes_of(lay_out_block_mass(shape, c).end); });
}

}  // namespace msa::cpu
