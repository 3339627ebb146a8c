// SPDX-License-Identifier: Apache-2.0
// See split_attention.h.
#include "src/cpu/split_attention.h"

#include <algorithm>
#include <numeric>

#include "src/core/layout.h"
#include "src/cpu/bf16_dot.h"
#include "src/cpu/plan_chunks.h"
#include "src/cpu/sparse_visits.h"
#include "src/cpu/tile.h"

namespace msa::cpu {
namespace {

// Scores between the two halves: they should stay in the caches of two cores.
constexpr std::int64_t kMostScores = std::int64_t{1} << 20;  // floats
// Spans of an item, for each thread: the last to end costs an eighth of a thread's share, and every span copies the
// item's queries.
constexpr std::int64_t kSpansPerThread = 8;

void add_item(const AttentionInput& input, const ChunkTask& task, SplitWork& work) {
  const std::int64_t item = static_cast<std::int64_t>(work.items.size());
  const auto first_block = static_cast<std::int64_t>(work.blocks.size());
  std::vector<std::uint64_t> visits(
      static_cast<std::size_t>(visit_room(task.chunk.end - task.chunk.begin, input.shape.topk)));
  const std::int64_t count = sort_visits(input, task.chunk, task.head, visits.data());
  for_each_block(visits.data(), count, [&](std::int64_t block, std::int64_t first, std::int64_t last, const NextBlock&) {
    work.blocks.push_back({block, static_cast<std::int64_t>(work.members.size()), last - first, work.score_floats});
    for (std::int64_t v = first; v < last; ++v) {
      work.members.push_back(visit_query(visits[static_cast<std::size_t>(v)]));
    }
    work.score_floats += split_score_floats(input.shape, (last - first) * input.shape.group_size);
  });
  const auto last_block = static_cast<std::int64_t>(work.blocks.size());
  work.items.push_back({task, first_block, last_block});
  const std::int64_t blocks = last_block - first_block;
  const std::int64_t spans = std::min(blocks, kSpansPerThread * work.workers);
  for (std::int64_t s = 0; s < spans; ++s) {
    work.spans.push_back({item, first_block + s * blocks / spans, first_block + (s + 1) * blocks / spans});
  }
}

AttentionInput take_slice(const AttentionInput& input, std::int64_t first, std::int64_t last) {
  AttentionInput slice = input;
  slice.shape.value_dim = last - first;  // a part of the layout's
  slice.v.data += first * static_cast<std::int64_t>(dtype_size(input.v.dtype));
  slice.v.shape[static_cast<std::size_t>(input.v.rank - 1)] = last - first;
  slice.out.data += first * static_cast<std::int64_t>(dtype_size(input.out.dtype));
  slice.out.shape[2] = last - first;
  if (first != 0) slice.lse = {};
  return slice;
}

}  // namespace

bool should_split(std::int64_t tasks, int threads) {
  const std::int64_t rounds = tasks / threads;
  const std::int64_t left = tasks % threads;
  // In rounds of whole tasks. In halves a task takes kHalves times as long, shared by all threads.
  constexpr double kHalves = 1.4;
  const double split = static_cast<double>(rounds) + kHalves * static_cast<double>(left) / threads;
  return left != 0 && split < 0.95 * static_cast<double>(rounds + 1);
}

std::int64_t split_score_floats(const AttentionShape& shape, std::int64_t rows) {
  return padded_columns(rows) * std::max(padded_stride(shape.block_size), padded_inner(shape.block_size));
}

std::optional<SplitWork> split_attention(const AttentionInput& input, int threads, std::size_t workspace_limit) {
  const QueryCounts& queries = input.shape.queries;
  const std::int64_t tiles = input.shape.value_dim / 16;
  if (queries.total == 0 || queries.longest > kMostSplitQueries || tiles < 2) return {};
  const std::int64_t token_bytes = input.shape.head_dim * static_cast<std::int64_t>(dtype_size(input.k.dtype)) +
                                   input.shape.value_dim * static_cast<std::int64_t>(dtype_size(input.v.dtype));
  const std::int64_t blocks = std::min(input.shape.topk, count_blocks(input.batch, input.shape.block_size));
  if (queries.longest * blocks * input.shape.block_size * token_bytes < kLeastSplitBytes) return {};
  SplitWork work;
  work.whole_tasks = list_tasks(cut_queries(input.batch, queries.longest), input.shape.kv_heads, 1);
  const auto tasks = static_cast<std::int64_t>(work.whole_tasks.size());
  if (!should_split(tasks, threads)) return {};
  work.workers = threads;
  const std::int64_t left = tasks % threads;
  for (std::int64_t i = tasks - left; i < tasks; ++i) {
    add_item(input, work.whole_tasks[static_cast<std::size_t>(i)], work);
    if (work.score_floats > kMostScores) return {};
  }
  work.whole_tasks.resize(static_cast<std::size_t>(tasks - left));
  work.whole = input;
  work.whole.layout = lay_out_attention(input.shape, queries.longest);
  const std::int64_t slices = std::min<std::int64_t>(threads / std::gcd<std::int64_t>(left, threads), tiles);
  for (std::int64_t s = 0; s < slices; ++s) {
    work.slices.push_back(take_slice(work.whole, s * tiles / slices * 16, (s + 1) * tiles / slices * 16));
  }
  const std::size_t tasks_at_once =
      std::max(work.whole_tasks.size() + work.spans.size(), work.items.size() * work.slices.size());
  work.workers = static_cast<int>(std::min<std::size_t>(static_cast<std::size_t>(threads), tasks_at_once));
  work.worker_bytes = bytes_of(work.whole.layout.end);
  if (workspace_limit != 0 && work.bytes() > workspace_limit) return {};
  return work;
}

}  // namespace msa::cpu
