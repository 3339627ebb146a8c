// SPDX-License-Identifier: Apache-2.0
// Plans of the cpu backend as pure functions: every query in exactly one chunk, scratch memory inside the limit, parts
// of a worker's scratch apart from each other, and an error that names the bytes when nothing fits.
#include "src/cpu/bf16_dot.h"
#include "src/cpu/attention_amx.h"
#include "src/cpu/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "msa/error.h"
#include "src/cpu/attention_backward_plan.h"
#include "src/cpu/attention_backward_problem.h"
#include "src/cpu/block_lists.h"
#include "src/cpu/index_kl_plan.h"
#include "src/cpu/ordered_sums.h"
#include "src/cpu/screen.h"
#include "src/cpu/select_blocks_plan.h"
#include "src/cpu/split_attention.h"
#include "src/cpu/tile.h"
#include "src/cpu/topk.h"

namespace msa::cpu {
namespace {

// The paper's layer: 64 query heads, 4 kv heads, dimensions of 128, blocks of 128, topk 16.
AttentionShape paper_attention(std::int64_t queries, std::int64_t topk) {
  return {.queries = {queries, queries},
          .kv_heads = 4,
          .group_size = 16,
          .head_dim = 128,
          .value_dim = 128,
          .block_size = 128,
          .topk = topk};
}

SelectionShape paper_selection(std::int64_t queries) {
  return {.queries = {queries, queries}, .kv_heads = 4, .index_dim = 128, .block_size = 128, .topk = 16};
}

BlockMassShape paper_mass(std::int64_t queries, std::int64_t blocks) {
  return {.queries = {queries, queries},
          .kv_heads = 4,
          .group_size = 16,
          .head_dim = 128,
          .block_size = 128,
          .blocks = blocks,
          .topk = 16};
}

TEST(CutQueries, PutsEveryQueryIntoOneChunkLastOnesFirst) {
  const std::vector<std::int32_t> cu_seqlens_q = {0, 0, 1, 9, 9, 16, 24};
  const std::vector<std::int32_t> cu_seqlens_k = {0, 5, 6, 20, 20, 40, 48};
  const Batch batch = Batch::packed(cu_seqlens_q, cu_seqlens_k);
  for (const std::int64_t chunk : {1, 2, 3, 7, 8, 9, 100}) {
    std::vector<std::vector<int>> taken;
    for (std::int64_t s = 0; s < batch.sequences(); ++s) {
      const auto i = static_cast<std::size_t>(s);
      taken.emplace_back(static_cast<std::size_t>(cu_seqlens_q[i + 1] - cu_seqlens_q[i]), 0);
    }
    std::int64_t last_sequence = -1;
    std::int64_t last_begin = 0;
    for (const QueryChunk& part : cut_queries(batch, chunk)) {
      EXPECT_LT(part.begin, part.end);
      EXPECT_LE(part.end - part.begin, chunk);
      if (part.sequence == last_sequence) {
        EXPECT_EQ(part.end, last_begin);
      } else {
        EXPECT_GT(part.sequence, last_sequence);
      }
      last_sequence = part.sequence;
      last_begin = part.begin;
      for (std::int64_t q = part.begin; q < part.end; ++q) {
        ++taken[static_cast<std::size_t>(part.sequence)].at(static_cast<std::size_t>(q));
      }
    }
    for (const auto& sequence : taken) {
      for (const int times : sequence) EXPECT_EQ(times, 1) << "chunk " << chunk;
    }
  }
}

TEST(CutQueries, OfNoSequencesIsEmpty) {
  const std::vector<std::int32_t> cu_seqlens = {0};
  EXPECT_TRUE(cut_queries(Batch::packed(cu_seqlens, cu_seqlens), 4).empty());
}

// Queries of each worker when whoever is free takes the next task and all queries cost the same.
std::vector<std::int64_t> share_out(const std::vector<ChunkTask>& tasks, int workers) {
  std::vector<std::int64_t> load(static_cast<std::size_t>(workers), 0);
  for (const ChunkTask& task : tasks) *std::min_element(load.begin(), load.end()) += task.chunk.end - task.chunk.begin;
  return load;
}

TEST(ListTasks, HoldEveryQueryOfEveryHeadOnce) {
  const std::vector<std::int32_t> cu_seqlens = {0, 1, 70, 70, 570};
  const Batch batch = Batch::packed(cu_seqlens, cu_seqlens);
  for (const int workers : {1, 2, 3, 16}) {
    for (const std::int64_t heads : {1, 3, 4}) {
      std::vector<int> taken(static_cast<std::size_t>(570 * heads), 0);
      for (const ChunkTask& task : list_tasks(cut_queries(batch, 200), heads, workers)) {
        EXPECT_LT(task.chunk.begin, task.chunk.end);
        EXPECT_LE(task.chunk.end - task.chunk.begin, 200);
        const std::int64_t first = cu_seqlens[static_cast<std::size_t>(task.chunk.sequence)];
        for (std::int64_t q = task.chunk.begin; q < task.chunk.end; ++q) {
          ++taken.at(static_cast<std::size_t>((first + q) * heads + task.head));
        }
      }
      for (const int times : taken) EXPECT_EQ(times, 1);
    }
  }
}

TEST(ListTasks, EndTogetherWhateverTheHeads) {
  const std::vector<std::int32_t> cu_seqlens = {0, 512};
  const Batch batch = Batch::packed(cu_seqlens, cu_seqlens);
  for (const int workers : {2, 3, 4, 8}) {
    for (std::int64_t heads = 1; heads <= 9; ++heads) {
      for (const std::int64_t chunk : {512, 256}) {
        const std::vector<std::int64_t> load =
            share_out(list_tasks(cut_queries(batch, chunk), heads, workers), workers);
        // Pieces of 512 / 3 differ by a query.
        EXPECT_LE(*std::max_element(load.begin(), load.end()), *std::min_element(load.begin(), load.end()) + heads)
            << workers << " workers, " << heads << " heads, chunk " << chunk;
      }
    }
  }
}

TEST(ListTasks, CutNoMoreThanTheyMust) {
  const std::vector<std::int32_t> cu_seqlens = {0, 512};
  const std::vector<QueryChunk> chunks = cut_queries(Batch::packed(cu_seqlens, cu_seqlens), 512);
  EXPECT_EQ(list_tasks(chunks, 4, 2).size(), 4u);  // nothing is left over
  EXPECT_EQ(list_tasks(chunks, 3, 1).size(), 3u);
  const std::vector<ChunkTask> tasks = list_tasks(chunks, 3, 2);
  ASSERT_EQ(tasks.size(), 4u);
  EXPECT_EQ(tasks[1].chunk.end - tasks[1].chunk.begin, 512);
  EXPECT_EQ(tasks[2].chunk.end - tasks[2].chunk.begin, 256);
  const std::vector<std::int32_t> few = {0, kLeastPiece};
  EXPECT_EQ(list_tasks(cut_queries(Batch::packed(few, few), 512), 3, 2).size(), 3u);
}

TEST(CountQueries, CountsAllAndTheLongestSequence) {
  const std::vector<std::int32_t> cu_seqlens_q = {0, 3, 3, 8};
  const std::vector<std::int32_t> cu_seqlens_k = {0, 3, 70, 75};
  const Batch batch = Batch::packed(cu_seqlens_q, cu_seqlens_k);
  EXPECT_EQ(count_queries(batch).total, 8);
  EXPECT_EQ(count_queries(batch).longest, 5);
  EXPECT_EQ(count_blocks(batch, 16), 5);  // ceil(67 / 16)
}

TEST(LayOutAttention, KeepsPartsApart) {
  for (const std::int64_t group_size : {1, 3, 16}) {
    for (const std::int64_t chunk : {1, 5, 64}) {
      AttentionShape shape = paper_attention(64, 7);
      shape.group_size = group_size;
      shape.block_size = 16;
      shape.value_dim = 48;
      const AttentionLayout at = lay_out_attention(shape, chunk);
      const std::int64_t rows = chunk * group_size;
      EXPECT_GE(at.sums - at.queries, rows * 128);
      EXPECT_GE(at.largest - at.sums, rows * 48);
      EXPECT_GE(at.totals - at.largest, rows);
      EXPECT_GE(at.keys - at.totals, rows);
      EXPECT_GE(at.values - at.keys, 128 * padded_stride(16));
      EXPECT_GE(at.scores - at.values, 16 * padded_stride(48));
      EXPECT_GE(at.visits - at.scores, kScoreRows * padded_stride(16));
      EXPECT_GE(at.members - at.visits, chunk * 7 * 2);  // two floats a 64-bit pair
      EXPECT_GE(at.seen - at.members, chunk);
      EXPECT_GE(at.end - at.seen, chunk);
      for (const std::int64_t part :
           {at.sums, at.largest, at.totals, at.keys, at.values, at.scores, at.visits, at.members, at.seen, at.end}) {
        EXPECT_EQ(part % 16, 0);  // cache lines
      }
    }
  }
}

TEST(LayOutAttention, KeepsPartsApartWithBf16Dots) {
  AttentionShape shape = paper_attention(64, 7);
  shape.has_bf16_dots = true;
  shape.group_size = 3;
  shape.head_dim = 80;
  shape.value_dim = 48;
  shape.block_size = 16;
  const AttentionLayout at = lay_out_attention(shape, 5);
  const std::int64_t rows = 5 * 3;
  EXPECT_GE(at.sums - at.queries, rows * 96 / 2);  // bf16, 80 padded to 96
  EXPECT_GE(at.largest - at.sums, rows * 48);
  EXPECT_GE(at.keys - at.totals, rows);
  EXPECT_GE(at.values - at.keys, 48 * padded_pair_stride(16) / 2);
  EXPECT_GE(at.scores - at.values, 16 * padded_pair_stride(48) / 2);  // 16 keys padded to 32: 16 pairs
  EXPECT_GE(at.products - at.scores, kBf16Rows * padded_stride(16));
  EXPECT_GE(at.probabilities - at.products, kBf16Rows * padded_stride(48));
  EXPECT_GE(at.visits - at.probabilities, kBf16Rows * 32 / 2);
}

TEST(LayOutAttention, KeepsPartsApartInTiles) {
  AttentionShape shape = paper_attention(64, 7);
  shape.has_bf16_dots = true;
  shape.has_tiles = true;
  shape.group_size = 3;
  shape.head_dim = 80;
  shape.value_dim = 48;
  shape.block_size = 16;
  const AttentionLayout at = lay_out_attention(shape, 6);
  const std::int64_t rows = 32;                    // 6 * 3 in whole tiles
  EXPECT_GE(at.sums - at.queries, rows * 96 / 2);  // bf16, 80 padded to 96
  EXPECT_GE(at.largest - at.sums, rows * 48);
  EXPECT_GE(at.totals - at.largest, rows);
  EXPECT_GE(at.keys - at.totals, rows);
  EXPECT_GE(at.values - at.keys, 16 * 96 / 2);
  EXPECT_GE(at.scores - at.values, 32 * 48 / 2);  // 16 keys padded to 32
  EXPECT_GE(at.staged_queries - at.scores, 32 * 32);
  EXPECT_GE(at.staged_sums - at.staged_queries, 2 * kStagedRows * 96 / 2);
  EXPECT_GE(at.visits - at.staged_sums, 2 * kStagedRows * 48);
  EXPECT_GE(at.members - at.visits, 6 * 7 * 2);
  EXPECT_EQ(at.scores % 16, 0);
  EXPECT_EQ(at.keys % 16, 0);
}

TEST(LayOutSelection, KeepsPartsApart) {
  SelectionShape shape = paper_selection(512);
  for (const std::int64_t screen_bytes : {0, 128}) {
    shape.screen_bytes = screen_bytes;
    const SelectionLayout at = lay_out_selection(shape, 5);
    EXPECT_GE(at.packed - at.queries, 5 * 4 * 128);
    EXPECT_GE(at.keys - at.packed, 32 * 128);
    EXPECT_GE(at.scores - at.keys, 128 * 128);
    EXPECT_GE(at.best - at.scores, 128 * kStripRows);
    EXPECT_GE(at.rows - at.best, 5 * 4 * 2 * 16);
    EXPECT_GE((at.limits - at.rows) * 4, static_cast<std::int64_t>(5 * 4 * sizeof(RowTopk)));
    EXPECT_GE(at.least - at.limits, 5 * 4);
    EXPECT_GE(at.row_ids - at.least, 32);
    if (screen_bytes == 0) {
      EXPECT_GE(at.end - at.row_ids, 5 * 4);
      continue;
    }
    EXPECT_GE(at.row_keys - at.row_ids, 5 * 4);
    EXPECT_GE((at.row_bounds - at.row_keys) * 4, 32 * 128);
    EXPECT_GE(at.lower - at.row_bounds, (7 + kWindowBlocks) * 32);
    EXPECT_GE(at.candidates - at.lower, 5 * 4 * bound_buckets(16));
    EXPECT_GE((at.visits - at.candidates) * 4,
              static_cast<std::int64_t>(sizeof(Candidate)) * 5 * 4 * candidate_capacity(16));
    EXPECT_GE((at.block_keys - at.visits) * 4, 8 * 5 * 4 * candidate_capacity(16));
    EXPECT_GE((at.end - at.block_keys) * 4, 128 * 128);
  }
}

TEST(PaddedStride, IsAnOddNumberOfCacheLines) {
  for (std::int64_t cols = 1; cols <= 256; ++cols) {
    EXPECT_GE(padded_stride(cols), padded_columns(cols));
    EXPECT_GE(padded_columns(cols), cols);
    EXPECT_EQ(padded_columns(cols) % 16, 0);
    EXPECT_EQ(padded_stride(cols) % 32, 16);
  }
}

// Plans a thing at limits from far too small to ample: it fits or throws, and it throws only where the least plan, one
// query at a time on one thread, does not fit.
template <class Plan>
void expect_limit_kept(const std::string& op, const Plan& plan_at) {
  const ChunkPlan free = plan_at(4, 0);
  EXPECT_GT(free.bytes(), 0u);
  std::size_t least = 0;
  for (std::size_t limit = 1024; limit <= 2 * free.bytes(); limit += limit / 8) {
    try {
      const ChunkPlan plan = plan_at(4, limit);
      EXPECT_LE(plan.bytes(), limit);
      EXPECT_GE(plan.chunk, 1);
      EXPECT_GE(plan.workers, 1);
      if (least == 0) least = limit;
    } catch (const Error& error) {
      EXPECT_EQ(least, 0u) << "fits a smaller limit but not " << limit;
      const std::string message = error.what();
      EXPECT_NE(message.find(op), std::string::npos) << message;
      EXPECT_NE(message.find(std::to_string(limit)), std::string::npos) << message;
      EXPECT_NE(message.find("bytes of workspace"), std::string::npos) << message;
    }
  }
  EXPECT_GT(least, 0u);
  EXPECT_LT(least, free.bytes());
}

TEST(Plans, KeepTheWorkspaceLimit) {
  expect_limit_kept("sparse_attention", [](int threads, std::size_t limit) {
    return plan_attention("sparse_attention", paper_attention(512, 16), threads, limit);
  });
  expect_limit_kept("dense_attention", [](int threads, std::size_t limit) {
    return plan_attention("dense_attention", paper_attention(512, 0), threads, limit);
  });
  expect_limit_kept("select_blocks", [](int threads, std::size_t limit) {
    return plan_selection("select_blocks", paper_selection(512), threads, limit);
  });
  expect_limit_kept("select_blocks_oracle", [](int threads, std::size_t limit) {
    return plan_block_mass("select_blocks_oracle", paper_mass(512, 512), threads, limit);
  });
}

TEST(Plans, NameTheBytesThatWouldDo) {
  const auto plan_with = [](std::size_t limit) {
    return plan_attention("dense_attention", paper_attention(512, 0), 2, limit);
  };
  std::size_t needed = 0;
  try {
    plan_with(1);
    FAIL() << "one byte is not enough";
  } catch (const Error& error) {
    const std::string message = error.what();
    needed = std::stoull(message.substr(message.find("at least ") + 9));
  }
  EXPECT_EQ(plan_with(needed).bytes(), needed);
  EXPECT_THROW(plan_with(needed - 1), Error);
}

TEST(Plans, GiveEveryThreadSeveralTasksWhereTheQueriesAllow) {
  for (const int threads : {2, 3, 8}) {
    const ChunkPlan selection = plan_selection("select_blocks", paper_selection(2048), threads, 0);
    EXPECT_EQ(selection.workers, threads);
    EXPECT_GE((2048 + selection.chunk - 1) / selection.chunk, 4 * threads);
    const ChunkPlan attention = plan_attention("sparse_attention", paper_attention(2048, 16), threads, 0);
    EXPECT_EQ(attention.workers, threads);
    EXPECT_GE((2048 + attention.chunk - 1) / attention.chunk * 4, 4 * threads);
  }
}

TEST(Plans, OfOneQueryUseOneWorkerAKvHead) {
  const ChunkPlan plan = plan_attention("sparse_attention", paper_attention(1, 16), 16, 0);
  EXPECT_EQ(plan.chunk, 1);
  EXPECT_EQ(plan.workers, 4);
}

TEST(Plans, OfNoQueriesAreValid) {
  EXPECT_GE(plan_attention("dense_attention", paper_attention(0, 0), 2, 0).chunk, 1);
  EXPECT_GE(plan_selection("select_blocks", paper_selection(0), 2, 0).chunk, 1);
  EXPECT_GE(plan_block_mass("select_blocks_oracle", paper_mass(0, 0), 2, 0).chunk, 1);
}

// Selection of 512 queries takes no more than 64 MiB, whatever the number of keys: its shape does not even hold them.
TEST(Plans, OfSelectionStaySmall) {
  EXPECT_LE(plan_selection("select_blocks", paper_selection(512), 2, 0).bytes(), std::size_t{64} << 20);
  SelectionShape widest = paper_selection(1 << 20);
  widest.kv_heads = 64;
  widest.index_dim = 256;
  widest.block_size = 256;
  widest.topk = 64;
  EXPECT_LE(plan_selection("select_blocks", widest, 2, 0).bytes(), std::size_t{64} << 20);
}

TEST(SplitAttention, HalvesWhatTheThreadsCannotShareOut) {
  EXPECT_TRUE(should_split(1, 2));
  EXPECT_TRUE(should_split(3, 2));
  EXPECT_TRUE(should_split(1, 16));
  EXPECT_FALSE(should_split(4, 2));    // nothing is left over
  EXPECT_FALSE(should_split(15, 16));  // next to nothing to gain
  EXPECT_FALSE(should_split(101, 2));
  EXPECT_FALSE(should_split(3, 1));
}

// A sequence of three queries and one of one, three kv heads; query 1 has fewer blocks.
struct SplitProblem {
  std::vector<std::int32_t> cu_q = {0, 3, 4};
  std::vector<std::int32_t> cu_k = {0, 4096, 8192};
  std::vector<std::int32_t> blocks;
  std::vector<std::byte> row = std::vector<std::byte>(80 * 4);  // of values and of out: planning reads neither
  AttentionInput input;

  SplitProblem() {
    constexpr std::int64_t kHeads = 3, kTopk = 16;
    for (std::int64_t row = 0; row < kHeads * 4; ++row) {
      for (std::int64_t slot = 0; slot < kTopk; ++slot) {
        blocks.push_back(row % 4 == 1 && slot > 2 ? -1 : static_cast<std::int32_t>(slot + row));
      }
    }
    input.batch = Batch::packed(cu_q, cu_k);
    input.blocks = make_view(static_cast<const std::int32_t*>(blocks.data()), {kHeads, 4, kTopk});
    input.k.dtype = input.v.dtype = DType::kBFloat16;
    input.v.rank = input.out.rank = 3;
    input.v.data = row.data();
    input.out.data = row.data();
    input.shape = paper_attention(4, kTopk);
    input.shape.queries = {4, 3};
    input.shape.kv_heads = kHeads;
    input.shape.value_dim = 80;
  }
};

TEST(SplitAttention, HoldsEveryVisitOnce) {
  const SplitProblem problem;
  for (const int threads : {4, 5}) {
    const std::optional<SplitWork> work = split_attention(problem.input, threads, 0);
    ASSERT_TRUE(work.has_value());
    EXPECT_EQ(work->whole_tasks.size(), static_cast<std::size_t>(6 / threads * threads));
    ASSERT_EQ(work->items.size(), static_cast<std::size_t>(6 % threads));
    std::int64_t next_block = 0;
    std::int64_t scores = 0;
    for (const SplitItem& item : work->items) {
      EXPECT_EQ(item.first_block, next_block);
      next_block = item.last_block;
      std::vector<std::vector<std::int32_t>> got(static_cast<std::size_t>(item.task.chunk.end));
      for (std::int64_t b = item.first_block; b < item.last_block; ++b) {
        const SplitBlock& block = work->blocks[static_cast<std::size_t>(b)];
        EXPECT_EQ(block.scores, scores);
        scores += split_score_floats(problem.input.shape, block.member_count * 16);
        for (std::int64_t m = 0; m < block.member_count; ++m) {
          const std::int32_t query = work->members[static_cast<std::size_t>(block.first_member + m)];
          got.at(static_cast<std::size_t>(query)).push_back(static_cast<std::int32_t>(block.block));
        }
      }
      for (std::size_t i = 0; i < got.size(); ++i) {
        const std::int64_t row =
            problem.cu_q[static_cast<std::size_t>(item.task.chunk.sequence)] + static_cast<std::int64_t>(i);
        const std::int32_t* ids = problem.blocks.data() + (item.task.head * 4 + row) * 16;
        const std::vector<std::int32_t> wanted(ids, std::find(ids, ids + 16, -1));
        EXPECT_EQ(got[i], wanted);
      }
    }
    EXPECT_EQ(scores, work->score_floats);
    std::int64_t next = 0;
    for (const SplitSpan& span : work->spans) {
      EXPECT_EQ(span.first, next);
      EXPECT_LT(span.first, span.last);
      EXPECT_LE(span.last, work->items[static_cast<std::size_t>(span.item)].last_block);
      next = span.last;
    }
    EXPECT_EQ(next, next_block);
    std::int64_t dims = 0;
    for (const AttentionInput& slice : work->slices) {
      EXPECT_EQ(slice.shape.value_dim % 16, 0);
      EXPECT_GT(slice.shape.value_dim, 0);
      EXPECT_EQ(slice.v.data - problem.input.v.data, 2 * dims);
      dims += slice.shape.value_dim;
    }
    EXPECT_EQ(dims, 80);
  }
}

TEST(SplitAttention, LeavesOthersWhole) {
  SplitProblem problem;
  const std::optional<SplitWork> work = split_attention(problem.input, 4, 0);
  ASSERT_TRUE(work.has_value());
  EXPECT_TRUE(split_attention(problem.input, 4, work->bytes()).has_value());
  EXPECT_FALSE(split_attention(problem.input, 4, work->bytes() - 1).has_value());
  EXPECT_FALSE(split_attention(problem.input, 1, 0).has_value());
  EXPECT_FALSE(split_attention(problem.input, 2, 0).has_value());  // six tasks
  problem.input.shape.value_dim = 16;
  EXPECT_FALSE(split_attention(problem.input, 4, 0).has_value());
  problem.input.shape.value_dim = 80;
  problem.input.shape.block_size = 16;  // too little to read
  EXPECT_FALSE(split_attention(problem.input, 4, 0).has_value());
}

// Sequences of four chunks of the backward, of none, of one and of two, with and without a prefix.
const std::vector<std::int32_t> kBackwardQueries = {0, 2000, 2000, 2001, 2301};
const std::vector<std::int32_t> kBackwardKeys = {0, 2500, 2540, 2541, 3041};

TEST(BackwardTasks, PutEveryQueryIntoOneTaskAHead) {
  const Batch batch = Batch::packed(kBackwardQueries, kBackwardKeys);
  for (const bool keys_shared : {false, true}) {
    const BackwardTasks work = list_backward_tasks(batch, 4, 3, 16, keys_shared);
    std::vector<std::vector<int>> taken(3, std::vector<int>(2301, 0));
    for (const BackwardTask& task : work.tasks) {
      const auto first = kBackwardQueries[static_cast<std::size_t>(task.chunk.sequence)];
      for (std::int64_t i = task.chunk.begin; i < task.chunk.end; ++i) {
        ++taken.at(static_cast<std::size_t>(task.head)).at(static_cast<std::size_t>(first + i));
      }
    }
    for (const auto& head : taken) {
      for (const int times : head) EXPECT_EQ(times, 1);
    }
  }
}

// Follows the sums of each block of keys through the tasks: whoever adds first has none before it, whoever adds last
// knows.
TEST(BackwardTasks, AddToABlockOneAfterTheOther) {
  const Batch batch = Batch::packed(kBackwardQueries, kBackwardKeys);
  const std::int64_t heads = 3;
  for (const bool keys_shared : {false, true}) {
    SCOPED_TRACE(keys_shared);
    const BackwardTasks work = list_backward_tasks(batch, 4, heads, 16, keys_shared);
    std::int64_t longest = 0;
    for (std::size_t i = 0; i < work.tasks.size(); ++i) {
      const BackwardTask& task = work.tasks[i];
      EXPECT_LT(task.previous, static_cast<std::int64_t>(i));  // what is waited for has started
      if (task.previous >= 0) {
        const BackwardTask& before = work.tasks[static_cast<std::size_t>(task.previous)];
        EXPECT_EQ(before.chunk.sequence, task.chunk.sequence);
        EXPECT_EQ(before.sum_begin, task.sum_begin);
        EXPECT_GE(before.blocks, task.blocks);      // it has been through every block of this one
        EXPECT_GE(before.last_begin, task.blocks);  // and was not the last at any of them
        EXPECT_TRUE(keys_shared || before.head == task.head);
      }
      EXPECT_LE(task.last_begin, task.blocks);
      // Whoever neither starts nor ends a sum has room for it.
      if (task.previous >= 0 || task.last_begin > 0) {
        EXPECT_LE(task.sum_begin + (task.previous >= 0 ? task.blocks : task.last_begin), work.sum_blocks);
      }
      longest = std::max(longest, task.chunk.end - task.chunk.begin);
    }
    EXPECT_EQ(longest, backward_chunk(2000, 4));
    // 2500, 1 and 500 keys in blocks of 16; the second has one chunk, and needs sums only where heads share its key.
    EXPECT_EQ(work.sum_blocks, keys_shared ? 157 + 1 + 32 : heads * (157 + 32));
  }
}

TEST(BackwardTasks, DependOnTheSequenceAlone) {
  // Alone or in company, a sequence is cut at the same queries: its sums over tasks are part of its result.
  const Batch together = Batch::packed(kBackwardQueries, kBackwardKeys);
  const std::vector<std::int32_t> cu_seqlens_q = {0, 2000};
  const std::vector<std::int32_t> cu_seqlens_k = {0, 2500};
  const BackwardTasks alone = list_backward_tasks(Batch::packed(cu_seqlens_q, cu_seqlens_k), 4, 4, 16, false);
  const BackwardTasks all = list_backward_tasks(together, 4, 4, 16, false);
  ASSERT_GE(all.tasks.size(), alone.tasks.size());
  for (std::size_t i = 0; i < alone.tasks.size(); ++i) {
    EXPECT_EQ(all.tasks[i].chunk.begin, alone.tasks[i].chunk.begin);
    EXPECT_EQ(all.tasks[i].chunk.end, alone.tasks[i].chunk.end);
  }
}

TEST(BlockLists, TurnSelectionsRound) {
  const std::vector<std::int32_t> cu_seqlens_q = {0, 5};
  const std::vector<std::int32_t> cu_seqlens_k = {0, 50};
  const Batch batch = Batch::packed(cu_seqlens_q, cu_seqlens_k);  // positions 45..49, blocks of 16: 0..3
  std::vector<std::int32_t> ids = {0, 2, -1, 2, -1, -1, -1, -1, -1, 0, 1, 3, 2, 3, -1};
  ConstTensorView blocks;
  blocks.data = reinterpret_cast<const std::byte*>(ids.data());
  blocks.dtype = DType::kInt32;
  blocks.rank = 3;
  blocks.shape = {1, 5, 3};
  blocks.strides = {15, 3, 1};
  const core::Sequence sequence = core::get_sequence(batch, 0);
  const auto lists_of = [&](const ConstTensorView& selection, std::int64_t begin, std::int64_t end) {
    const std::int64_t topk = selection.empty() ? 0 : 3;
    std::vector<std::int32_t> scratch(static_cast<std::size_t>(BlockLists::scratch_elements(end - begin, topk, 4)));
    const BlockLists lists(batch, sequence, selection, 0, 16, begin, end, scratch.data());
    std::vector<std::vector<std::int32_t>> result;
    for (std::int64_t b = 0; b < lists.blocks(); ++b) {
      result.emplace_back(lists.members(b), lists.members(b) + lists.count(b));
      for (const std::int32_t i : result.back()) {
        EXPECT_EQ(lists.visible_keys(i, b), std::min<std::int64_t>(16, 45 + begin + i + 1 - b * 16));
      }
    }
    return result;
  };
  using Lists = std::vector<std::vector<std::int32_t>>;
  EXPECT_EQ(lists_of(blocks, 0, 5), (Lists{{0, 3}, {3}, {0, 1, 4}, {3, 4}}));
  EXPECT_EQ(lists_of(blocks, 1, 3), (Lists{{}, {}, {0}}));
  EXPECT_EQ(lists_of(ConstTensorView(), 1, 5), (Lists{{0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}, {2, 3}}));
}

// As expect_limit_kept, for plans whose chunks are part of the result: they give up workers and heads at once.
template <class Plan>
void expect_backward_limit_kept(const std::string& op, const Plan& plan_at) {
  const std::size_t free = plan_at(4, 0).bytes();
  EXPECT_EQ(plan_at(4, 0).workers, 4);
  EXPECT_EQ(plan_at(4, free).bytes(), free);
  std::size_t needed = 0;
  try {
    plan_at(4, 1);
    FAIL() << "one byte is not enough";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find(op), std::string::npos) << message;
    needed = std::stoull(message.substr(message.find("at least ") + 9));
  }
  EXPECT_LT(needed, free);
  EXPECT_EQ(plan_at(4, needed).bytes(), needed);
  EXPECT_EQ(plan_at(4, needed).workers, 1);
  EXPECT_THROW(plan_at(4, needed - 1), Error);
  for (std::size_t limit = needed; limit < free; limit += limit / 8) EXPECT_LE(plan_at(4, limit).bytes(), limit);
}

TEST(Plans, OfBackwardsKeepTheWorkspaceLimit) {
  const Batch batch = Batch::packed(kBackwardQueries, kBackwardKeys);
  for (const bool has_bf16_dots : {false, true}) {
    for (const std::int64_t topk : {0, 16}) {
      AttentionShape shape = paper_attention(2301, topk);
      shape.queries = count_queries(batch);
      shape.has_bf16_dots = has_bf16_dots;
      expect_backward_limit_kept("some_backward", [&](int threads, std::size_t limit) {
        return plan_attention_backward("some_backward", shape, batch, threads, limit);
      });
      const IndexKlShape kl = {.queries = count_queries(batch),
                               .kv_heads = 4,
                               .group_size = 16,
                               .head_dim = 128,
                               .index_dim = 128,
                               .block_size = 128,
                               .blocks = 20,
                               .topk = topk,
                               .has_bf16_dots = has_bf16_dots};
      expect_backward_limit_kept("index_kl_backward", [&](int threads, std::size_t limit) {
        return plan_index_kl_backward("index_kl_backward", kl, batch, threads, limit);
      });
      expect_limit_kept("index_kl", [&](int threads, std::size_t limit) {
        return plan_index_kl("index_kl", kl, threads, limit).chunks;
      });
    }
  }
}

// The backward of 32K tokens of the paper's layer: the sums of dk and dv in float, and 20 MiB a thread.
TEST(Plans, OfBackwardsStaySmall) {
  const std::vector<std::int32_t> cu_seqlens = {0, 32768};
  const Batch batch = Batch::packed(cu_seqlens, cu_seqlens);
  for (const bool has_bf16_dots : {false, true}) {
    AttentionShape shape = paper_attention(32768, 16);
    shape.has_bf16_dots = has_bf16_dots;
    const BackwardPlan plan = plan_attention_backward("sparse_attention_backward", shape, batch, 2, 0);
    EXPECT_EQ(plan.shared_bytes, std::size_t{32768} * 4 * 256 * 4);
    EXPECT_LE(plan.worker_bytes, std::size_t{20} << 20);
  }
}

TEST(LayOutBackward, KeepsPartsApart) {
  for (const std::int64_t group_size : {1, 3, 16, 300}) {
    AttentionShape shape = paper_attention(700, 7);
    shape.group_size = group_size;
    shape.block_size = 16;
    shape.value_dim = 48;
    const std::int64_t rows = backward_chunk(700, 4) * group_size;
    const std::int64_t tile = backward_tile_queries(group_size) * group_size;
    const BackwardLayout at = lay_out_backward(shape, 40);
    EXPECT_GE((at.totals - at.terms) * 4, rows * static_cast<std::int64_t>(sizeof(RowTerms)));
    EXPECT_GE((at.query_grads - at.totals) * 4, rows * static_cast<std::int64_t>(sizeof(double)));
    EXPECT_GE(at.lists - at.query_grads, rows * 128);
    EXPECT_GE(at.keys - at.lists, BlockLists::scratch_elements(backward_chunk(700, 4), 7, 40));
    EXPECT_GE(at.keys_t - at.keys, 16 * padded_stride(128));
    EXPECT_GE(at.values_t - at.keys_t, 128 * padded_stride(16));
    EXPECT_GE(at.queries - at.values_t, 48 * padded_stride(16));
    EXPECT_GE(at.out_grads - at.queries, tile * padded_stride(128));
    EXPECT_GE(at.scores - at.out_grads, tile * padded_stride(48));
    EXPECT_GE(at.grads - at.scores, tile * padded_stride(16));
    EXPECT_GE(at.part - at.grads, tile * padded_stride(16));
    EXPECT_GE(at.end - at.part, 16 * (128 + 48));

    shape.has_bf16_dots = true;
    const BackwardLayout bf16 = lay_out_backward(shape, 40);
    const std::int64_t tile16 = padded_inner(backward_bf16_tile_queries(group_size) * group_size);
    EXPECT_GE((bf16.query_grads - bf16.terms) * 4, rows * static_cast<std::int64_t>(sizeof(RowTerms)));
    EXPECT_GE((bf16.keys_t - bf16.keys) * 2, 32 / 2 * padded_pair_stride(128));
    EXPECT_GE((bf16.values_t - bf16.keys_t) * 2, 128 / 2 * padded_pair_stride(16));
    EXPECT_GE((bf16.queries - bf16.values_t) * 2, 64 / 2 * padded_pair_stride(16));
    EXPECT_GE((bf16.out_grads - bf16.queries) * 2, tile16 * 128);
    EXPECT_GE((bf16.queries_t - bf16.out_grads) * 2, tile16 * 64);
    EXPECT_GE((bf16.out_grads_t - bf16.queries_t) * 2, 128 * tile16);
    EXPECT_GE((bf16.scores - bf16.out_grads_t) * 2, 48 * tile16);
    EXPECT_GE(bf16.grads - bf16.scores, kBf16Rows * 32);
    EXPECT_GE(bf16.gradient_rows - bf16.grads, kBf16Rows * 32);
    EXPECT_GE((bf16.gradient_pairs - bf16.gradient_rows) * 2, tile16 * 64);
    EXPECT_GE((bf16.probability_pairs - bf16.gradient_pairs) * 2, tile16 / 2 * padded_pair_stride(16));
    EXPECT_GE((bf16.products - bf16.probability_pairs) * 2, tile16 / 2 * padded_pair_stride(16));
    EXPECT_GE(bf16.tile_rows - bf16.products, std::max(kBf16Rows * padded_stride(128), 128 * padded_stride(16)));
    EXPECT_GE(bf16.part - bf16.tile_rows, tile16);
    EXPECT_GE(bf16.end - bf16.part, 16 * (128 + 48));
  }
}

// Screened, 512 queries of 64K keys share all quantised blocks; more keys than fit are quantised by the tasks.
TEST(Plans, OfScreenedSelectionShareWhatFits) {
  SelectionShape shape = paper_selection(512);
  shape.screen_bytes = 128;
  shape.screen_blocks = 512;
  const SelectionPlan plan = plan_selection("select_blocks", shape, 2, 0);
  EXPECT_EQ(plan.shared_blocks, 512);
  EXPECT_GE(plan.shared_bytes, std::size_t{512} * (128 * 128 + sizeof(BlockBounds)));
  EXPECT_LE(plan.total_bytes(), std::size_t{64} << 20);
  shape.screen_blocks = 1 << 20;
  const SelectionPlan longer = plan_selection("select_blocks", shape, 2, 0);
  EXPECT_LT(longer.shared_blocks, shape.screen_blocks);
  EXPECT_LE(longer.total_bytes(), std::size_t{64} << 20);
  expect_limit_kept("select_blocks", [&](int threads, std::size_t limit) {
    return plan_selection("select_blocks", shape, threads, limit);
  });
  for (std::size_t limit = std::size_t{1} << 20; limit <= longer.total_bytes(); limit += limit / 4) {
    EXPECT_LE(plan_selection("select_blocks", shape, 2, limit).total_bytes(), limit);
  }
}

TEST(Plans, OfSpansKeepTheWorkspaceLimit) {
  const SelectionShape shape = paper_selection(4);
  const SpanPlan free = plan_spans(shape, 1000, 100000, 8, 0);
  EXPECT_EQ(free.workers, 8);
  EXPECT_EQ(free.score_floats, 100000);
  EXPECT_EQ(plan_spans(shape, 1000, std::int64_t{1} << 40, 8, 0).score_floats, 1 << 20);
  for (std::size_t limit = 1; limit < free.bytes(); limit += 1 + limit / 8) {
    const SpanPlan plan = plan_spans(shape, 1000, 100000, 8, limit);
    if (plan.score_floats == 0) {
      EXPECT_LT(limit, free.worker_bytes + 1000 * sizeof(float));
    } else {
      EXPECT_LE(plan.bytes(), limit);
      EXPECT_GE(plan.score_floats, 1000);
      EXPECT_GE(plan.workers, 1);
    }
  }
}

TEST(Plans, ArePrintable) {
  ChunkPlan plan;
  plan.chunk = 128;
  plan.workers = 2;
  plan.worker_bytes = 3 << 19;
  EXPECT_EQ(to_string(plan), "chunk 128 queries, 2 workers x 1.50 MiB");
}

}  // namespace
}  // namespace msa::cpu
