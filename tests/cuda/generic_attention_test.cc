// SPDX-License-Identifier: Apache-2.0
// The generic CUDA attention in the emulator: what the operators' unit tests, which run on it too, do not ask. Rows and
// ids that must not be touched, more visitors than one look through the rows finds, float8 keys.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/cuda/generic_support.h"

namespace msa::testing {
namespace {

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

TEST(GenericAttention, MoreVisitorsThanOnePortion) {
  expect_within_rule_of_reference(Problem(Case{{3, 1, 16, 32, 16, 64, 3}, {{300, 330}, {40, 40}}}), false);
  expect_within_rule_of_reference(Problem(Case{{1, 1, 16, 16, 16, 64, 3}, {{270, 270}}}), true);
}

TEST(GenericAttention, ScoresOfMinusInfinityWeighNothing) {
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

TEST(GenericAttention, RowsWithoutBlocksAndPaddingAreInert) {
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

TEST(GenericAttention, Float8KeysAndValues) {
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

TEST(GenericAttention, BadIdsCountAsAbsent) {
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
