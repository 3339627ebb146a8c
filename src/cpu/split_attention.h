// SPDX-License-Identifier: Apache-2.0
// Sparse attention of few queries on all threads (docs/attention.md, Decode): (chunk, kv head) pairs that the threads
// cannot share out evenly are done in two halves. First the scores of their blocks, a span of them a task; then the
// softmax and the weighted sums, a slice of the value dimensions a task. A number is made by the same operations in the
// same order as in one go. What is planned here are pure functions; the halves are in sparse_attention-inl.h. Tested in
// tests/unit/plan_test.cc and sparse_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "src/cpu/attention.h"
#include "src/cpu/plan.h"

namespace msa::cpu {

/// The most queries of a sequence that is split: below, chunks would not be cut any further.
inline constexpr std::int64_t kMostSplitQueries = kLeastPiece;

/// Bytes of keys and values that an item must read to be halved: a thread reads them in some 50 microseconds. Half as
/// many gained nothing: what the halves take less is what starting threads twice and repeating the softmax takes more.
inline constexpr std::int64_t kLeastSplitBytes = std::int64_t{1} << 19;

/// One block of an item and the queries that chose it.
struct SplitBlock {
  std::int64_t block = 0;
  std::int64_t first_member = 0;  ///< in SplitWork::members
  std::int64_t member_count = 0;
  std::int64_t scores = 0;  ///< where its scores are, in floats
};

/// The queries of a sequence and a kv head.
struct SplitItem {
  ChunkTask task;
  std::int64_t first_block = 0;  ///< [first_block, last_block) of SplitWork::blocks, ascending
  std::int64_t last_block = 0;
};

/// Blocks [first, last) of an item: a task of the first half.
struct SplitSpan {
  std::int64_t item = 0;
  std::int64_t first = 0;
  std::int64_t last = 0;
};

struct SplitWork {
  AttentionInput whole;
  std::vector<ChunkTask> whole_tasks;  ///< in one go, a multiple of the workers
  std::vector<SplitItem> items;        ///< the others
  std::vector<SplitBlock> blocks;
  std::vector<std::int32_t> members;  ///< queries, counted from the chunk's begin, ascending in every block
  std::vector<SplitSpan> spans;
  std::vector<AttentionInput> slices;  ///< the input with a part of v and out each; the first one writes lse
  std::int64_t score_floats = 0;
  int workers = 1;
  std::size_t worker_bytes = 0;

  std::size_t bytes() const {
    return worker_bytes * static_cast<std::size_t>(workers) + static_cast<std::size_t>(score_floats) * sizeof(float);
  }
};

/// Whether it pays to halve the tasks beyond a multiple of the threads.
bool should_split(std::int64_t tasks, int threads);

/// Floats for the scores of `rows` rows and a block, whatever the arithmetic.
std::int64_t split_score_floats(const AttentionShape& shape, std::int64_t rows);

/// The work of a call in halves; none when whole items are the better tasks, or when its memory would pass the limit
/// (0: none).
std::optional<SplitWork> split_attention(const AttentionInput& input, int threads, std::size_t workspace_limit);

}  // namespace msa::cpu
