// SPDX-License-Identifier: Apache-2.0
// Attention over the whole prefix, forward and backward, on every backend and instruction set: within the tolerance
// rule of SPEC section 6 of the reference, and equal to sparse attention over all blocks.
#include <gtest/gtest.h>

#include <limits>

#include "msa/attention.h"
#include "tests/unit/support/differences.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::testing {
namespace {

class DenseAttention : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, DenseAttention, ::testing::ValuesIn(all_cases()), case_name);

TEST_P(DenseAttention, ForwardIsWithinTheRule) {
  const Problem problem(GetParam());
  const Problem wide = problem.as_float32();
  const AttentionResult exact = run_dense(reference_context(), wide.dense_params());
  const AttentionResult naive = naive_attention(over_whole_prefix(problem.dense_params()));
  for_each_target(Targets::kAll, [&](const Context& context) {
    const AttentionResult got = run_dense(context, problem.dense_params());
    expect_within_rule("out", got.out, exact.out, naive.out);
    expect_within_rule("lse", got.lse, exact.lse, naive.lse);
  });
}

TEST_P(DenseAttention, BackwardIsWithinTheRule) {
  const Problem problem(GetParam());
  const Problem wide = problem.as_float32();
  const Tensor dout = make_dout(problem);
  const Tensor dlse = make_dlse(problem);
  const AttentionResult wide_forward = run_dense(reference_context(), wide.dense_params());
  const AttentionGradients exact =
      run_dense_backward(reference_context(), wide.dense_params(), wide_forward, dout.as(DType::kFloat32), &dlse);
  const AttentionGradients naive = naive_attention_backward(over_whole_prefix(problem.dense_params()), dout, &dlse);
  for_each_target(Targets::kCpu, [&](const Context& context) {
    const AttentionResult forward = run_dense(context, problem.dense_params());
    const AttentionGradients got = run_dense_backward(context, problem.dense_params(), forward, dout, &dlse);
    expect_within_rule("dq", got.dq, exact.dq, naive.dq);
    expect_within_rule("dk", got.dk, exact.dk, naive.dk);
    expect_within_rule("dv", got.dv, exact.dv, naive.dv);
  });
}

TEST(DenseAttentionRules, NoDlseMeansZero) {
  const Problem problem(Case{{4, 2, 32, 16, 16, 16, 2}, {{9, 50}, {20, 20}}});
  const Tensor dout = make_dout(problem);
  Tensor zero = make_dlse(problem);
  zero.fill(0);
  for_each_target(Targets::kAll, [&](const Context& context) {
    const AttentionResult forward = run_dense(context, problem.dense_params());
    const AttentionGradients without = run_dense_backward(context, problem.dense_params(), forward, dout, nullptr);
    const AttentionGradients with = run_dense_backward(context, problem.dense_params(), forward, dout, &zero);
    expect_same_bytes("dq", without.dq, with.dq);
    expect_same_bytes("dk", without.dk, with.dk);
    expect_same_bytes("dv", without.dv, with.dv);
  });
}

TEST(DenseAttentionRules, EqualsSparseAttentionOverAllBlocks) {
  // topk covers every block, so both compute the same function; each is within its own rule of the other's reference.
  const Problem problem(Case{{6, 2, 48, 32, 16, 16, 8}, {{20, 100}, {31, 31}}});
  const AttentionResult exact = run_sparse(reference_context(), problem.sparse_params());
  const AttentionResult naive = naive_attention(problem.sparse_params());
  for_each_target(Targets::kAll, [&](const Context& context) {
    const AttentionResult dense = run_dense(context, problem.dense_params());
    expect_within_rule("out", dense.out, exact.out, naive.out);
    expect_within_rule("lse", dense.lse, exact.lse, naive.lse);
  });
}

TEST(DenseAttentionRules, PaddingRowsAreInert) {
  Case c{{4, 2, 32, 48, 16, 16, 2}, {{6, 40}, {3, 3}}};
  c.padding_rows = 4;
  const Problem problem(c);
  const Tensor dout = make_dout(problem);
  for_each_target(Targets::kAll, [&](const Context& context) {
    const AttentionResult got = run_dense(context, problem.dense_params());
    const AttentionGradients grads = run_dense_backward(context, problem.dense_params(), got, dout, nullptr);
    for (std::int64_t i = 0; i < 4; ++i) {
      for (std::int64_t head = 0; head < 4; ++head) {
        EXPECT_EQ(got.lse.at(9 + i, head), -std::numeric_limits<double>::infinity());
        for (std::int64_t d = 0; d < 48; ++d) EXPECT_EQ(got.out.at(9 + i, head, d), 0);
        for (std::int64_t d = 0; d < 32; ++d) EXPECT_EQ(grads.dq.at(9 + i, head, d), 0);
      }
      for (std::int64_t head = 0; head < 2; ++head) {
        for (std::int64_t d = 0; d < 32; ++d) EXPECT_EQ(grads.dk.at(43 + i, head, d), 0);
        for (std::int64_t d = 0; d < 48; ++d) EXPECT_EQ(grads.dv.at(43 + i, head, d), 0);
      }
    }
  });
}

TEST(DenseAttentionReference, GradientEqualsFiniteDifferences) {
  Problem problem(Case{{4, 2, 16, 32, 16, 16, 2}, {{3, 40}, {2, 2}}});
  const Tensor dout = make_dout(problem);
  const Tensor dlse = make_dlse(problem);
  const auto forward = [&] { return run_dense(reference_context(), problem.dense_params()); };
  const AttentionGradients grads =
      run_dense_backward(reference_context(), problem.dense_params(), forward(), dout, &dlse);
  const auto loss = [&] { return weigh_outputs(forward(), dout, dlse); };
  expect_gradient_of(loss, problem.q, grads.dq, "q");
  expect_gradient_of(loss, problem.k, grads.dk, "k");
  expect_gradient_of(loss, problem.v, grads.dv, "v");
}

}  // namespace
}  // namespace msa::testing
