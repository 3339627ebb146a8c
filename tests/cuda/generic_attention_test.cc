// SPDX-License-Identifier: Apache-2.0
// The generic CUDA attention, sparse and dense, forward and backward, in the emulator: within the tolerance rule of SPEC
// section 6 of the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/cuda/generic_support.h"

namespace msa::testing {
namespace {

class GenericAttention : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, GenericAttention, ::testing::ValuesIn(all_cases()), case_name);

void expect_within_rule_of_reference(const Problem& problem, bool dense) {
  const Problem wide = problem.as_float32();
  const SparseAttentionParams params = dense ? over_whole_prefix(problem.dense_params()) : problem.sparse_params();
  const SparseAttentionParams wide_params = dense ? over_whole_prefix(wide.dense_params()) : wide.sparse_params();
  const AttentionResult exact = dense ? run_dense(reference_context(), wide.dense_params())
                                      : run_sparse(reference_context(), wide.sparse_params());
  const AttentionResult naive = naive_attention(params);
  const AttentionResult got = generic_attention(params);
  expect_within_rule("out", got.out, exact.out, naive.out);
  expect_within_rule("lse", got.lse, exact.lse, naive.lse);

  const Tensor dout = make_dout(problem);
  const Tensor wide_dout = dout.as(DType::kFloat32);
  const Tensor dlse = make_dlse(problem);
  const AttentionGradients exact_grads =
      dense ? run_dense_backward(reference_context(), wide.dense_params(), exact, wide_dout, &dlse)
            : run_sparse_backward(reference_context(), wide_params, exact, wide_dout, &dlse);
  const AttentionGradients naive_grads = naive_attention_backward(params, dout, &dlse);
  const AttentionGradients grads = generic_attention_backward(params, got, dout, &dlse);
  expect_within_rule("dq", grads.dq, exact_grads.dq, naive_grads.dq);
  expect_within_rule("dk", grads.dk, exact_grads.dk, naive_grads.dk);
  expect_within_rule("dv", grads.dv, exact_grads.dv, naive_grads.dv);
}

TEST_P(GenericAttention, SparseIsWithinTheRule) { expect_within_rule_of_reference(Problem(GetParam()), false); }
TEST_P(GenericAttention, DenseIsWithinTheRule) { expect_within_rule_of_reference(Problem(GetParam()), true); }

TEST(GenericAttentionRules, MoreVisitorsThanOnePortion) {
  expect_within_rule_of_reference(Problem(Case{{3, 1, 16, 32, 16, 64, 3}, {{300, 330}, {270, 270}}}), false);
}

TEST(GenericAttentionRules, NoDlseMeansZero) {
  const Problem problem(Case{{4, 2, 32, 16, 16, 16, 2}, {{9, 50}, {20, 20}}});
  const Tensor dout = make_dout(problem);
  Tensor zero = make_dlse(problem);
  zero.fill(0);
  const AttentionResult forward = generic_attention(problem.sparse_params());
  const AttentionGradients without = generic_attention_backward(problem.sparse_params(), forward, dout, nullptr);
  const AttentionGradients with = generic_attention_backward(problem.sparse_params(), forward, dout, &zero);
  expect_same_bytes("dq", without.dq, with.dq);
  expect_same_bytes("dk", without.dk, with.dk);
  expect_same_bytes("dv", without.dv, with.dv);
}

TEST(GenericAttentionRules, LargeLogitsDoNotOverflow) {
  Problem problem(Case{{4, 2, 64, 32, 16, 16, 3}, {{20, 70}}});
  Random random(8);
  problem.q.fill_normal(random, 100);
  problem.k.fill_normal(random, 100);
  const AttentionResult exact = run_sparse(reference_context(), problem.sparse_params());
  const AttentionResult naive = naive_attention(problem.sparse_params());
  const AttentionResult got = generic_attention(problem.sparse_params());
  expect_within_rule("out", got.out, exact.out, naive.out);
  expect_within_rule("lse", got.lse, exact.lse, naive.lse);
}

TEST(GenericAttentionRules, ScaleIsAnArgument) {
  Problem problem(Case{{4, 2, 32, 16, 16, 16, 2}, {{9, 50}}});
  for (const double scale : {1.0, 0.0, -0.5}) {
    problem.scale = scale;
    expect_within_rule_of_reference(problem, false);
  }
}

TEST(GenericAttentionRules, AHugeScoreAloneIsCertain) {
  for (const DType dtype : kFloatTypes) {
    for (const double size : {152.0, 24576.0}) {
      Problem problem(Case{{4, 2, 128, 64, 16, 16, 1}, {{1, 1}, {1, 1}}, dtype});
      problem.q.fill(size);
      problem.k.fill(size);
      const Tensor dout = make_dout(problem);
      const AttentionResult got = generic_attention(problem.sparse_params());
      const AttentionGradients grads = generic_attention_backward(problem.sparse_params(), got, dout, nullptr);
      for (std::int64_t t = 0; t < 2; ++t) {
        for (std::int64_t e = 0; e < 64; ++e) {
          for (std::int64_t h = 0; h < 4; ++h) ASSERT_EQ(got.out.at(t, h, e), problem.v.at(t, h / 2, e));
          for (std::int64_t g = 0; g < 2; ++g) {
            const double exact = dout.at(t, 2 * g, e) + dout.at(t, 2 * g + 1, e);
            ASSERT_NEAR(grads.dv.at(t, g, e), exact, 0x1p-7 * std::abs(exact) + 1e-6) << name_of(dtype) << " " << size;
          }
        }
      }
    }
  }
}

TEST(GenericAttentionRules, ScoresOfMinusInfinityWeighNothing) {
  // A whole tile of -inf before the first finite score: the running maximum must not turn that into NaN.
  Problem problem(Case{{1, 1, 16, 16, 16, 16, 4}, {{1, 70}}});
  problem.q.fill(1);
  for (std::int64_t j = 0; j < 40; ++j) problem.k.set(-std::numeric_limits<double>::infinity(), j, 0, 3);
  const SparseAttentionParams params = over_whole_prefix(problem.dense_params());
  const AttentionResult exact = run_dense(reference_context(), problem.dense_params());
  const AttentionResult got = generic_attention(params);
  expect_within_rule("out", got.out, exact.out, naive_attention(params).out);
  EXPECT_NEAR(got.lse.at(0, 0), exact.lse.at(0, 0), 1e-5);
}

TEST(GenericAttentionRules, RowsWithoutBlocksAndPaddingAreInert) {
  Case c{{4, 2, 32, 48, 16, 16, 2}, {{6, 40}, {0, 0}, {3, 3}}};
  c.padding_rows = 4;
  Problem problem(c);
  const std::vector<std::int64_t> inert = {0, 3, 8, 9, 10, 11, 12};
  for (const std::int64_t row : inert) {
    for (std::int64_t slot = 0; slot < 2; ++slot) problem.blocks.set(-1, 1, row, slot);
  }
  const Tensor dout = make_dout(problem);
  const Tensor dlse = make_dlse(problem);
  const AttentionResult got = generic_attention(problem.sparse_params());
  const AttentionGradients grads = generic_attention_backward(problem.sparse_params(), got, dout, &dlse);
  for (const std::int64_t row : inert) {
    for (std::int64_t head = 2; head < 4; ++head) {
      EXPECT_EQ(got.lse.at(row, head), -std::numeric_limits<double>::infinity());
      for (std::int64_t d = 0; d < 48; ++d) EXPECT_EQ(got.out.at(row, head, d), 0);
      for (std::int64_t d = 0; d < 32; ++d) EXPECT_EQ(grads.dq.at(row, head, d), 0);
    }
  }
  for (std::int64_t row = 43; row < 47; ++row) {
    for (std::int64_t head = 0; head < 2; ++head) {
      for (std::int64_t d = 0; d < 32; ++d) EXPECT_EQ(grads.dk.at(row, head, d), 0);
      for (std::int64_t d = 0; d < 48; ++d) EXPECT_EQ(grads.dv.at(row, head, d), 0);
    }
  }
  for (const Tensor* tensor : {&grads.dq, &grads.dk, &grads.dv}) {
    for (const double value : tensor->values()) ASSERT_TRUE(std::isfinite(value));
  }
}

TEST(GenericAttentionRules, Float8KeysAndValues) {
  for (const DType dtype : kFloatTypes) {
    Problem problem(Case{{6, 2, 48, 80, 16, 16, 3}, {{9, 70}, {1, 33}}, dtype});
    problem.k = problem.k.as(DType::kFloat8E4M3);
    problem.v = problem.v.as(DType::kFloat8E4M3);
    const Problem wide = problem.as_float32();
    const AttentionResult exact = run_sparse(reference_context(), wide.sparse_params());
    const AttentionResult naive = naive_attention(problem.sparse_params());
    const AttentionResult got = generic_attention(problem.sparse_params());
    expect_within_rule("out", got.out, exact.out, naive.out);
    expect_within_rule("lse", got.lse, exact.lse, naive.lse);
  }
}

TEST(GenericAttentionRules, BadIdsCountAsAbsent) {
  Problem problem(Case{{2, 1, 16, 16, 16, 16, 4}, {{3, 60}}});
  Problem clean = problem;
  const std::vector<std::vector<double>> bad = {{0, 0, 9999, 3}, {2, 1, 3, -7}, {-2147483648.0, 1, 4, 2147483647}};
  const std::vector<std::vector<double>> good = {{0, 3, -1, -1}, {2, 3, -1, -1}, {1, -1, -1, -1}};
  for (std::int64_t row = 0; row < 3; ++row) {
    for (std::int64_t slot = 0; slot < 4; ++slot) {
      const auto i = static_cast<std::size_t>(row);
      const auto j = static_cast<std::size_t>(slot);
      problem.blocks.set(bad[i][j], 0, row, slot);
      clean.blocks.set(good[i][j], 0, row, slot);
    }
  }
  const Tensor dout = make_dout(problem);
  const AttentionResult got = generic_attention(problem.sparse_params());
  const AttentionResult wanted = generic_attention(clean.sparse_params());
  expect_same_bytes("out", got.out, wanted.out);
  expect_same_bytes("lse", got.lse, wanted.lse);
  const AttentionGradients grads = generic_attention_backward(problem.sparse_params(), got, dout, nullptr);
  const AttentionGradients wanted_grads = generic_attention_backward(clean.sparse_params(), wanted, dout, nullptr);
  expect_same_bytes("dq", grads.dq, wanted_grads.dq);
  expect_same_bytes("dk", grads.dk, wanted_grads.dk);
  expect_same_bytes("dv", grads.dv, wanted_grads.dv);
}

}  // namespace
}  // namespace msa::testing
