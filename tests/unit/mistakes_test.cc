// SPDX-License-Identifier: Apache-2.0
// One named test for each mistake that SPEC section 11 lists: others shipped them, so they are easy to make. Those of
// the cache stand in tests/unit/cache_test.cc.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "msa/msa.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Mistake: token causality forgotten inside the local block (selection is causal by block, so nothing else catches it).
TEST(Mistakes, TokenCausalityInsideTheLocalBlock) {
  // One block; the value of token j is j. With equal scores row p averages 0..p, not 0..15.
  Problem problem(Case{{2, 1, 16, 16, 16, 16, 1}, {{16, 16}}});
  problem.k.fill(0);
  for (std::int64_t j = 0; j < 16; ++j) {
    for (std::int64_t d = 0; d < 16; ++d) problem.v.set(static_cast<double>(j), j, 0, d);
  }
  for_each_target(Targets::kAll, [&](const Context& context) {
    for (const AttentionResult& result :
         {run_sparse(context, problem.sparse_params()), run_dense(context, problem.dense_params())}) {
      for (std::int64_t p = 0; p < 16; ++p) {
        EXPECT_NEAR(result.out.at(p, 1, 3), static_cast<double>(p) / 2, 8 * 0x1p-24 * 8) << "row " << p;
        EXPECT_NEAR(result.lse.at(p, 1), std::log(static_cast<double>(p + 1)), 8 * 0x1p-24 * 3) << "row " << p;
      }
    }
  });
}

// The same mistake in the selection: a future token of the local block must not score for it.
TEST(Mistakes, TokenCausalityInTheScoresOfTheLocalBlock) {
  Problem problem(Case{{1, 1, 16, 16, 16, 16, 1}, {{48, 48}}});
  problem.local_blocks = 0;
  problem.q_idx.fill(1);
  problem.k_idx.fill(0);
  for (std::int64_t d = 0; d < 16; ++d) {
    problem.k_idx.set(1, 3, d);   // block 0 scores 16
    problem.k_idx.set(9, 47, d);  // block 2 scores 144, from row 47 on
  }
  for_each_target(Targets::kAll, [&](const Context& context) {
    const Tensor blocks = run_select(context, problem.select_params());
    for (std::int64_t p = 32; p < 47; ++p) EXPECT_EQ(blocks.at(0, p, 0), 0) << "row " << p;
    EXPECT_EQ(blocks.at(0, 47, 0), 2);
  });
}

// Mistake: index scores max-pooled (or summed) over heads instead of a selection for each group.
TEST(Mistakes, EveryGroupSelectsForItself) {
  Problem problem(Case{{6, 3, 16, 16, 16, 16, 2}, {{1, 80}}});
  problem.q_idx.fill(0);
  problem.k_idx.fill(0);
  for (std::int64_t group = 0; group < 3; ++group) {
    problem.q_idx.set(1, 0, group, group);
    problem.k_idx.set(static_cast<double>(10 - group), group * 16 + 5, group);  // group r wants block r
  }
  for_each_target(Targets::kAll, [&](const Context& context) {
    const Tensor blocks = run_select(context, problem.select_params());
    for (std::int64_t group = 0; group < 3; ++group) {
      EXPECT_EQ(blocks.at(group, 0, 0), group);
      EXPECT_EQ(blocks.at(group, 0, 1), 4);
    }
  });
}

// Mistake: [T, H, k] read as [H, T, k]. Same number of queries and heads, so that no shape check can notice.
TEST(Mistakes, BlocksAreHeadsFirst) {
  Problem problem(Case{{4, 4, 16, 16, 16, 16, 1}, {{4, 80}}});
  problem.local_blocks = 0;
  for (std::int64_t head = 0; head < 4; ++head) {
    for (std::int64_t row = 0; row < 4; ++row)
      problem.blocks.set(static_cast<double>((2 * head + row) % 5), head, row, 0);
  }
  for (std::int64_t j = 0; j < 80; ++j) {
    for (std::int64_t head = 0; head < 4; ++head) {
      for (std::int64_t d = 0; d < 16; ++d) problem.v.set(static_cast<double>(j / 16), j, head, d);
    }
  }
  for_each_target(Targets::kAll, [&](const Context& context) {
    const AttentionResult result = run_sparse(context, problem.sparse_params());
    for (std::int64_t head = 0; head < 4; ++head) {
      for (std::int64_t row = 0; row < 4; ++row) {
        EXPECT_NEAR(result.out.at(row, head, 0), static_cast<double>((2 * head + row) % 5), 32 * 0x1p-24 * 4);
      }
    }
  });
}

// Mistake: the tail of the last partial block unmasked. What lies behind it is another sequence, the end of the buffer
// or of the page.
TEST(Mistakes, TailOfTheLastPartialBlock) {
  Problem problem(Case{{2, 1, 16, 16, 16, 16, 2}, {{1, 19}, {1, 5}}});
  problem.q.fill(0);
  problem.v.fill(1);
  const PagedProblem paged(problem, 32);  // NaN behind the last token of every page
  for_each_target(Targets::kAll, [&](const Context& context) {
    for (const AttentionResult& result :
         {run_sparse(context, problem.sparse_params()), run_dense(context, problem.dense_params()),
          run_sparse(context, paged.sparse_params()), run_dense(context, paged.dense_params())}) {
      EXPECT_NEAR(result.lse.at(0, 0), std::log(19.0), 8 * 0x1p-24 * 3);
      EXPECT_NEAR(result.lse.at(1, 0), std::log(5.0), 8 * 0x1p-24 * 2);
      EXPECT_NEAR(result.out.at(0, 0, 0), 1, 32 * 0x1p-24);
      EXPECT_NEAR(result.out.at(1, 0, 0), 1, 32 * 0x1p-24);
    }
  });
}

// Mistake: -1 sentinels used as addresses. Sequence 1's block -1 would be the end of sequence 0, which holds NaN.
TEST(Mistakes, SentinelsAreNotAddresses) {
  Problem problem(Case{{2, 2, 16, 16, 16, 16, 8}, {{0, 32}, {3, 40}, {1, 1}}});
  for (std::int64_t j = 0; j < 32; ++j) {
    for (std::int64_t head = 0; head < 2; ++head) {
      for (std::int64_t d = 0; d < 16; ++d) {
        problem.k.set(kNaN, j, head, d);
        problem.v.set(kNaN, j, head, d);
      }
    }
  }
  const Tensor dout = make_dout(problem);
  for_each_target(Targets::kAll, [&](const Context& context) {
    for (const bool trusted : {false, true}) {
      SparseAttentionParams params = problem.sparse_params();
      params.trusted_blocks = trusted;
      const AttentionResult result = run_sparse(context, params);
      for (const double value : result.out.values()) ASSERT_TRUE(std::isfinite(value));
      const AttentionGradients grads = run_sparse_backward(context, params, result, dout, nullptr);
      for (const double value : grads.dq.values()) ASSERT_TRUE(std::isfinite(value));
      for (const double value : grads.dk.values()) ASSERT_TRUE(std::isfinite(value));
      for (const double value : grads.dv.values()) ASSERT_TRUE(std::isfinite(value));
    }
    const KlResult kl = run_kl(context, problem.kl_params(false));
    EXPECT_TRUE(std::isfinite(kl.value));
  });
}

// Mistake: padding tokens of a captured graph selecting blocks (and contributing to attention, loss and gradients).
TEST(Mistakes, PaddingRowsAreInert) {
  Case c{{4, 2, 16, 16, 16, 16, 2}, {{3, 50}, {2, 20}}};
  const Problem without(c);
  c.padding_rows = 11;
  Problem with(c);
  // The same tokens; the padding rows of `with` stay NaN, and their blocks name valid ids.
  for (std::int64_t row = 0; row < 5; ++row) {
    for (std::int64_t head = 0; head < 4; ++head) {
      for (std::int64_t d = 0; d < 16; ++d) with.q.set(without.q.at(row, head, d), row, head, d);
    }
    for (std::int64_t group = 0; group < 2; ++group) {
      for (std::int64_t d = 0; d < 16; ++d) with.q_idx.set(without.q_idx.at(row, group, d), row, group, d);
    }
  }
  for (std::int64_t j = 0; j < 70; ++j) {
    for (std::int64_t d = 0; d < 16; ++d) {
      for (std::int64_t group = 0; group < 2; ++group) {
        with.k.set(without.k.at(j, group, d), j, group, d);
        with.v.set(without.v.at(j, group, d), j, group, d);
      }
      with.k_idx.set(without.k_idx.at(j, d), j, d);
    }
  }
  for_each_target(Targets::kAll, [&](const Context& context) {
    const Tensor blocks = run_select(context, with.select_params());
    expect_same_bytes("blocks", blocks.bytes(1, 0, 5), run_select(context, without.select_params()).bytes());
    for (std::int64_t group = 0; group < 2; ++group) {
      for (std::int64_t row = 5; row < 16; ++row) {
        for (std::int64_t slot = 0; slot < 2; ++slot) EXPECT_EQ(blocks.at(group, row, slot), -1);
      }
    }
    Problem padded = with;
    padded.blocks = blocks;
    for (std::int64_t group = 0; group < 2; ++group) {
      for (std::int64_t row = 5; row < 16; ++row) {
        padded.blocks.set(0, group, row, 0);
        padded.blocks.set(1, group, row, 1);
      }
    }
    Problem plain = without;
    plain.blocks = run_select(context, without.select_params());
    for (const auto& [padded_result, plain_result] :
         {std::pair{run_sparse(context, padded.sparse_params()), run_sparse(context, plain.sparse_params())},
          std::pair{run_dense(context, padded.dense_params()), run_dense(context, plain.dense_params())}}) {
      expect_same_bytes("out", padded_result.out.bytes(0, 0, 5), plain_result.out.bytes());
      for (std::int64_t row = 5; row < 16; ++row) {
        EXPECT_EQ(padded_result.out.at(row, 3, 7), 0);
        EXPECT_EQ(padded_result.lse.at(row, 3), -kInfinity);
      }
    }
    for (const bool whole_prefix : {false, true}) {
      KlResult padded_kl = run_kl(context, padded.kl_params(whole_prefix));
      KlResult plain_kl = run_kl(context, plain.kl_params(whole_prefix));
      EXPECT_EQ(padded_kl.value, plain_kl.value);
      const KlGradients padded_grads = run_kl_backward(context, padded.kl_params(whole_prefix), padded_kl, 1);
      const KlGradients plain_grads = run_kl_backward(context, plain.kl_params(whole_prefix), plain_kl, 1);
      expect_same_bytes("dk_idx", padded_grads.dk_idx.bytes(0, 0, 70), plain_grads.dk_idx.bytes());
      for (std::int64_t row = 5; row < 16; ++row) EXPECT_EQ(padded_grads.dq_idx.at(row, 1, 3), 0);
    }
    EXPECT_EQ(selection_recall(context, padded.recall_params()).rows,
              selection_recall(context, plain.recall_params()).rows);
  });
}

// Mistake: page size taken for block size when they differ.
TEST(Mistakes, PagesLargerThanBlocks) {
  Problem problem(Case{{2, 1, 16, 16, 16, 16, 2}, {{2, 150}}});
  Random random(9);
  problem.q_idx.fill_integers(random, 3);
  problem.k_idx.fill_integers(random, 3);
  problem.select();
  for (const std::int64_t page : {16, 32, 64, 128, 48}) {
    const PagedProblem paged(problem, page);
    for_each_target(Targets::kAll, [&](const Context& context) {
      expect_same_bytes("blocks", run_select(context, paged.select_params()), problem.blocks);
      const AttentionResult result = run_sparse(context, paged.sparse_params());
      expect_same_bytes("out", result.out, run_sparse(context, problem.sparse_params()).out);
    });
  }
}

// Mistake: draft tokens of speculative verification sharing one selection.
TEST(Mistakes, EveryDraftTokenSelectsForItself) {
  Problem problem(Case{{1, 1, 16, 16, 16, 16, 2}, {{4, 100}}});
  problem.q_idx.fill(0);
  problem.k_idx.fill(0);
  for (std::int64_t i = 0; i < 4; ++i) {
    problem.q_idx.set(1, i, 0, i);
    problem.k_idx.set(5, i * 16 + 2, i);  // draft token i wants block i
  }
  for_each_target(Targets::kAll, [&](const Context& context) {
    const Tensor blocks = run_select(context, problem.select_params());
    for (std::int64_t i = 0; i < 4; ++i) {
      EXPECT_EQ(blocks.at(0, i, 0), i);
      EXPECT_EQ(blocks.at(0, i, 1), 6);
    }
  });
}

// Mistake: head counts that are not powers of two, or groups that are not.
TEST(Mistakes, HeadCountsThatAreNoPowersOfTwo) {
  for (const auto& [query_heads, kv_heads] :
       std::vector<std::pair<int, int>>{{3, 1}, {9, 3}, {5, 5}, {14, 2}, {7, 7}, {48, 3}, {13, 1}}) {
    SCOPED_TRACE(std::to_string(query_heads) + " query heads, " + std::to_string(kv_heads) + " kv heads");
    const Problem problem(Case{{query_heads, kv_heads, 16, 16, 16, 16, 2}, {{5, 70}, {17, 17}}});
    const AttentionResult exact = run_sparse(reference_context(), problem.sparse_params());
    const AttentionResult naive = naive_attention(problem.sparse_params());
    const Tensor dout = make_dout(problem);
    const AttentionGradients exact_grads =
        run_sparse_backward(reference_context(), problem.sparse_params(), exact, dout, nullptr);
    const AttentionGradients naive_grads = naive_attention_backward(problem.sparse_params(), dout, nullptr);
    for_each_target(Targets::kCpu, [&](const Context& context) {
      const AttentionResult got = run_sparse(context, problem.sparse_params());
      expect_within_rule("out", got.out, exact.out, naive.out);
      expect_within_rule("lse", got.lse, exact.lse, naive.lse);
      const AttentionGradients grads = run_sparse_backward(context, problem.sparse_params(), got, dout, nullptr);
      expect_within_rule("dq", grads.dq, exact_grads.dq, naive_grads.dq);
      expect_within_rule("dk", grads.dk, exact_grads.dk, naive_grads.dk);
      expect_within_rule("dv", grads.dv, exact_grads.dv, naive_grads.dv);
    });
  }
}

// Mistake: a score buffer reused without clearing. A long sequence with large scores comes first, on one thread.
TEST(Mistakes, ScoreBuffersAreCleared) {
  Problem problem(Case{{2, 2, 16, 16, 16, 16, 3}, {{40, 200}, {2, 70}, {1, 1}, {30, 30}}});
  Random random(10);
  problem.q_idx.fill_integers(random, 2);
  problem.k_idx.fill_integers(random, 2);
  for (std::int64_t j = 0; j < 200; ++j) {
    for (std::int64_t d = 0; d < 16; ++d) {
      problem.k_idx.set(1000 * problem.k_idx.at(j, d), j, d);
      problem.k.set(30 * problem.k.at(j, 0, d), j, 0, d);
    }
  }
  problem.select();
  for_each_target(Targets::kCpu, [&](Context context) {
    context.threads = 1;
    expect_same_bytes("blocks", run_select(context, problem.select_params()), problem.blocks);
    const AttentionResult sparse = run_sparse(context, problem.sparse_params());
    const AttentionResult dense = run_dense(context, problem.dense_params());
    const Tensor oracle = run_oracle(context, problem.oracle_params());
    for (std::int64_t s = 1; s < 4; ++s) {
      const Problem alone = problem.only(s);
      const auto i = static_cast<std::size_t>(s);
      const std::int64_t begin = problem.cu_seqlens_q[i];
      const std::int64_t end = problem.cu_seqlens_q[i + 1];
      expect_same_bytes("sparse", sparse.out.bytes(0, begin, end),
                        run_sparse(context, alone.sparse_params()).out.bytes());
      expect_same_bytes("dense", dense.out.bytes(0, begin, end), run_dense(context, alone.dense_params()).out.bytes());
      expect_same_bytes("oracle", oracle.bytes(1, begin, end), run_oracle(context, alone.oracle_params()).bytes());
    }
  });
}

// Mistake: left padding moving the block boundaries. Blocks are anchored at a sequence's own start, wherever it lies.
TEST(Mistakes, BlocksAreAnchoredAtTheSequence) {
  Problem alone(Case{{2, 1, 16, 16, 16, 16, 2}, {{9, 75}}});
  Random random(11);
  alone.q_idx.fill_integers(random, 3);
  alone.k_idx.fill_integers(random, 3);
  alone.select();
  for (const std::int64_t offset : {1, 7, 15, 16, 17, 33}) {
    SCOPED_TRACE("offset " + std::to_string(offset));
    Problem shifted(Case{{2, 1, 16, 16, 16, 16, 2}, {{0, offset}, {9, 75}}});
    shifted.q = alone.q;
    shifted.q_idx = alone.q_idx;
    for (std::int64_t j = 0; j < 75; ++j) {
      for (std::int64_t d = 0; d < 16; ++d) {
        shifted.k.set(alone.k.at(j, 0, d), offset + j, 0, d);
        shifted.v.set(alone.v.at(j, 0, d), offset + j, 0, d);
        shifted.k_idx.set(alone.k_idx.at(j, d), offset + j, d);
      }
    }
    shifted.blocks = alone.blocks;
    for_each_target(Targets::kAll, [&](const Context& context) {
      expect_same_bytes("blocks", run_select(context, shifted.select_params()), alone.blocks);
      expect_same_bytes("out", run_sparse(context, shifted.sparse_params()).out,
                        run_sparse(context, alone.sparse_params()).out);
    });
  }
}

// Mistake: score tensors of [tokens, heads, keys] allocated. Every operator runs in a fraction of the smallest such
// tensor.
TEST(Mistakes, NoTensorOfQueriesTimesKeys) {
  if (emulates_device()) GTEST_SKIP() << "a device's workspace is what its plans say: see tests/cuda";
  const std::int64_t tokens = 6144;
  const std::int64_t queries = 512;
  const Problem problem(Case{{2, 2, 16, 16, 16, 64, 4}, {{4, tokens}}});
  Problem large = problem;  // many queries; the reference, which chose the blocks of `problem`, sees only a few
  large.cu_seqlens_q = {0, static_cast<std::int32_t>(queries)};
  large.q = Tensor(DType::kFloat32, {queries, 2, 16});
  large.q_idx = Tensor(DType::kFloat32, {queries, 2, 16});
  Random random(12);
  large.q.fill_normal(random);
  large.q_idx.fill_normal(random);
  Tensor dout(DType::kFloat32, {queries, 2, 16});
  dout.fill_normal(random);
  for_each_target(Targets::kCpu, [&](Context context) {
    // One byte a (query, key) pair would already be 3 MiB.
    context.workspace_limit = static_cast<std::size_t>(queries * tokens);
    large.blocks = run_select(context, large.select_params());
    run_oracle(context, large.oracle_params());
    const AttentionResult sparse = run_sparse(context, large.sparse_params());
    const AttentionResult dense = run_dense(context, large.dense_params());
    run_sparse_backward(context, large.sparse_params(), sparse, dout, nullptr);
    run_dense_backward(context, large.dense_params(), dense, dout, nullptr);
    for (const bool whole_prefix : {false, true}) {
      KlResult kl = run_kl(context, large.kl_params(whole_prefix));
      run_kl_backward(context, large.kl_params(whole_prefix), kl, 1);
    }
    selection_recall(context, large.recall_params());
  });
}

}  // namespace
}  // namespace msa::testing
