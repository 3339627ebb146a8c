// SPDX-License-Identifier: Apache-2.0
// The generic CUDA kernels of the KL loss in the emulator: what the operators' unit tests, which run on them too, do
// not ask. Workspace of exactly the stated size, and more visitors than one look through the rows finds.
#include <gtest/gtest.h>

#include "tests/cuda/generic_support.h"

namespace msa::testing {
namespace {

void expect_within_rule_of_reference(const Problem& problem, bool whole_prefix) {
  const auto grad_output = static_cast<float>(problem.queries());
  KlResult exact = run_kl(reference_context(), problem.kl_params(whole_prefix));
  const KlResult naive = naive_kl(problem.kl_params(whole_prefix));
  KlResult got = generic_kl(problem.kl_params(whole_prefix));
  expect_within_rule("value", {got.value}, {exact.value}, {naive.value}, DType::kFloat32);
  expect_within_rule("lse_main", got.lse_main, exact.lse_main, naive.lse_main);
  expect_within_rule("lse_index", got.lse_index, exact.lse_index, naive.lse_index);
  expect_within_rule("teacher_norm", got.teacher_norm, exact.teacher_norm, exact.teacher_norm);
  const KlGradients exact_grads =
      run_kl_backward(reference_context(), problem.kl_params(whole_prefix), exact, grad_output);
  const KlGradients naive_grads = naive_kl_backward(problem.kl_params(whole_prefix), grad_output);
  const KlGradients grads = generic_kl_backward(problem.kl_params(whole_prefix), got, grad_output);
  expect_within_rule("dq_idx", grads.dq_idx, exact_grads.dq_idx, naive_grads.dq_idx);
  expect_within_rule("dk_idx", grads.dk_idx, exact_grads.dk_idx, naive_grads.dk_idx);
}

TEST(GenericIndexKl, MoreVisitorsThanOnePortion) {
  expect_within_rule_of_reference(Problem(Case{{3, 3, 16, 16, 32, 64, 3}, {{290, 300}, {5, 5}}}), false);
  expect_within_rule_of_reference(Problem(Case{{2, 1, 16, 16, 16, 64, 3}, {{260, 260}}}), true);
}

TEST(GenericIndexKl, EmptySequencesAndPadding) {
  Case c{{7, 1, 48, 16, 80, 16, 2}, {{0, 0}, {0, 9}, {17, 40}, {0, 3}, {1, 1}}};
  c.padding_rows = 3;
  const Problem problem(c);
  for (const bool whole_prefix : {false, true}) {
    expect_within_rule_of_reference(problem, whole_prefix);
    KlResult got = generic_kl(problem.kl_params(whole_prefix));
    const KlGradients grads = generic_kl_backward(problem.kl_params(whole_prefix), got, 1);
    for (std::int64_t row = problem.queries(); row < problem.rows(); ++row) {
      EXPECT_EQ(got.teacher_norm.at(row, 0), 0);
      for (std::int64_t d = 0; d < 80; ++d) EXPECT_EQ(grads.dq_idx.at(row, 0, d), 0);
    }
    for (std::int64_t row = 53; row < 56; ++row) {
      for (std::int64_t d = 0; d < 80; ++d) EXPECT_EQ(grads.dk_idx.at(row, d), 0);
    }
  }
}

}  // namespace
}  // namespace msa::testing
