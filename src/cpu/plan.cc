// SPDX-License-Identifier: Apache-2.0
// See plan.h.
#include "src/cpu/plan.h"

#include <algorithm>
#include <cstdio>

#include "msa/error.h"
#include "src/core/layout.h"
#include "src/cpu/tile.h"
#include "src/cpu/topk.h"

namespace msa::cpu {
namespace {

// Hands out parts of a worker's scratch memory, in floats, each starting on a cache line.
class LayoutCursor {
 public:
  std::int64_t take(std::int64_t floats) {
    const std::int64_t begin = next_;
    next_ += padded_columns(floats);  // 16 floats are a cache line
    return begin;
  }
  std::int64_t end() const { return next_; }

 private:
  std::int64_t next_ = 0;
};

// Starts at `chunk` and halves it until there are tasks enough for the threads to finish together (but not below
// `least`, where loading a block would cost more than using it), and until the memory fits.
template <class Bytes>
ChunkPlan plan_chunks(const std::string& op, const QueryCounts& queries, std::int64_t heads, std::int64_t chunk,
                      std::int64_t least, int threads, std::size_t workspace_limit, const Bytes& bytes_of_chunk) {
  constexpr std::int64_t kTasksPerThread = 4;  // the last task to end then costs at most a quarter of a thread's share
  ChunkPlan plan;
  plan.chunk = std::clamp<std::int64_t>(chunk, 1, std::max<std::int64_t>(queries.longest, 1));
  const auto tasks = [&] { return (queries.total + plan.chunk - 1) / plan.chunk * heads; };
  const auto halve = [&] { plan.chunk = (plan.chunk + 1) / 2; };
  while (threads > 1 && plan.chunk > least && tasks() < kTasksPerThread * threads) halve();
  plan.workers = static_cast<int>(std::clamp<std::int64_t>(tasks(), 1, threads));
  plan.worker_bytes = bytes_of_chunk(plan.chunk);
  while (workspace_limit != 0 && plan.bytes() > workspace_limit) {
    if (plan.chunk > 1) {
      halve();
    } else if (plan.workers > 1) {
      --plan.workers;
    } else {
      throw Error(op + ": needs at least " + std::to_string(plan.bytes()) +
                  " bytes of workspace, but Context::workspace_limit is " + std::to_string(workspace_limit));
    }
    plan.worker_bytes = bytes_of_chunk(plan.chunk);
  }
  return plan;
}

std::size_t bytes_of(std::int64_t floats) { return static_cast<std::size_t>(floats) * sizeof(float); }

// 32-bit elements behind a count of 64-bit ones, and so on.
std::int64_t floats_for(std::int64_t count, std::size_t element) {
  return (count * static_cast<std::int64_t>(element) + 3) / 4;
}

}  // namespace

std::vector<QueryChunk> cut_queries(const Batch& batch, std::int64_t chunk) {
  std::vector<QueryChunk> chunks;
  for (std::int64_t s = 0; s < batch.sequences(); ++s) {
    for (std::int64_t end = core::get_sequence(batch, s).queries; end > 0; end = std::max<std::int64_t>(end - chunk, 0)) {
      chunks.push_back({s, std::max<std::int64_t>(end - chunk, 0), end});
    }
  }
  return chunks;
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
  const std::int64_t rows = chunk * shape.group_size;
  AttentionLayout layout;
  LayoutCursor cursor;
  layout.queries = cursor.take(rows * shape.head_dim);
  layout.sums = cursor.take(rows * shape.value_dim);
  layout.largest = cursor.take(rows);
  layout.totals = cursor.take(rows);
  layout.keys = cursor.take(shape.head_dim * padded_stride(shape.block_size));
  layout.values = cursor.take(shape.block_size * padded_stride(shape.value_dim));
  layout.scores = cursor.take(kScoreRows * padded_stride(shape.block_size));
  layout.visits = cursor.take(floats_for(chunk * shape.topk, sizeof(std::uint64_t)));
  layout.members = cursor.take(chunk);
  layout.seen = cursor.take(chunk);
  layout.end = cursor.end();
  return layout;
}

ChunkPlan plan_attention(const std::string& op, const AttentionShape& shape, int threads,
                         std::size_t workspace_limit) {
  // What a chunk carries from block to block: its queries and sums. Dense attention passes all of it for every block, so
  // half an L2 cache (1 MiB on today's cores) is right. In sparse attention a block is visited by few queries of the
  // chunk, and loading it costs as much as about 8 rows' arithmetic: larger chunks let more rows share a block, and their
  // rows are read once a visit only, 4 bytes for every 2 * block_size operations: L3 or memory keep up.
  const std::int64_t state = shape.topk == 0 ? std::int64_t{1} << 17 : std::int64_t{1} << 20;  // floats
  const std::int64_t least = 16;
  const std::int64_t chunk = std::max(least, state / (shape.group_size * (shape.head_dim + shape.value_dim)));
  return plan_chunks(op, shape.queries, shape.kv_heads, chunk, least, threads, workspace_limit,
                     [&](std::int64_t c) { return bytes_of(lay_out_attention(shape, c).end); });
}

SelectionLayout lay_out_selection(const SelectionShape& shape, std::int64_t chunk) {
  const std::int64_t rows = chunk * shape.kv_heads;
  SelectionLayout layout;
  LayoutCursor cursor;
  layout.queries = cursor.take(rows * shape.index_dim);
  layout.keys = cursor.take(shape.index_dim * padded_stride(shape.block_size));
  layout.scores = cursor.take(kScoreRows * padded_stride(shape.block_size));
  layout.best = cursor.take(rows * 2 * shape.topk);
  layout.rows = cursor.take(floats_for(rows, sizeof(RowTopk)));
  layout.end = cursor.end();
  return layout;
}

ChunkPlan plan_selection(const std::string& op, const SelectionShape& shape, int threads,
                         std::size_t workspace_limit) {
  // Every block passes all rows of the chunk: they should lie in half an L2 cache.
  const std::int64_t state = std::int64_t{1} << 17;  // floats
  const std::int64_t least = 16;
  const std::int64_t chunk = std::max(least, state / (shape.kv_heads * (shape.index_dim + 2 * shape.topk)));
  return plan_chunks(op, shape.queries, 1, chunk, least, threads, workspace_limit,
                     [&](std::int64_t c) { return bytes_of(lay_out_selection(shape, c).end); });
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
  const std::int64_t chunk = std::max<std::int64_t>(
      1, state / (shape.group_size * (shape.head_dim + 2 * shape.blocks) + shape.blocks));
  return plan_chunks(op, shape.queries, shape.kv_heads, chunk, 16, threads, workspace_limit,
                     [&](std::int64_t c) { return bytes_of(lay_out_block_mass(shape, c).end); });
}

}  // namespace msa::cpu
