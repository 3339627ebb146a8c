// SPDX-License-Identifier: Apache-2.0
// Plans of the cpu backend as pure functions: every query in exactly one chunk, scratch memory inside the limit, parts
// of a worker's scratch apart from each other, and an error that names the bytes when nothing fits.
#include "src/cpu/bf16_dot.h"
#include "src/cpu/plan.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "msa/error.h"
#include "src/cpu/screen.h"
#include "src/cpu/select_blocks_plan.h"
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

TEST(LayOutSelection, KeepsPartsApart) {
  SelectionShape shape = paper_selection(512);
  for (const std::int64_t screen_dim : {0, 128}) {
    shape.screen_dim = screen_dim;
    const SelectionLayout at = lay_out_selection(shape, 5);
    EXPECT_GE(at.packed - at.queries, 5 * 4 * 128);
    EXPECT_GE(at.keys - at.packed, 32 * 128);
    EXPECT_GE(at.scores - at.keys, 128 * 128);
    EXPECT_GE(at.best - at.scores, 128 * kStripRows);
    EXPECT_GE(at.rows - at.best, 5 * 4 * 2 * 16);
    EXPECT_GE((at.limits - at.rows) * 4, static_cast<std::int64_t>(5 * 4 * sizeof(RowTopk)));
    EXPECT_GE(at.least - at.limits, 5 * 4);
    EXPECT_GE(at.row_ids - at.least, 32);
    if (screen_dim == 0) {
      EXPECT_GE(at.end - at.row_ids, 5 * 4);
      continue;
    }
    EXPECT_GE(at.row_keys - at.row_ids, 5 * 4);
    EXPECT_GE((at.row_bounds - at.row_keys) * 4, 32 * 128);
    EXPECT_GE(at.lower - at.row_bounds, 8 * 32);
    EXPECT_GE(at.candidates - at.lower, 5 * 4 * 16);
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

TEST(Plans, ArePrintable) {
  ChunkPlan plan;
  plan.chunk = 128;
  plan.workers = 2;
  plan.worker_bytes = 3 << 19;
  EXPECT_EQ(to_string(plan), "chunk 128 queries, 2 workers x 1.50 MiB");
}

}  // namespace
}  // namespace msa::cpu
