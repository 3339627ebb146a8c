// SPDX-License-Identifier: Apache-2.0
// The KL loss of the index branch, value and gradients, over both supports and with both teachers, on every backend and
// instruction set (SPEC section 4).
#include "msa/index_kl.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/unit/support/differences.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::testing {
namespace {

class IndexKl : public ::testing::TestWithParam<Case> {
 protected:
  // Calls body for both supports and both teachers.
  template <class Body>
  void for_each_variant(Problem& problem, const Body& body) {
    for (const bool whole_prefix : {false, true}) {
      for (const Teacher teacher : {Teacher::kMean, Teacher::kMax}) {
        SCOPED_TRACE(std::string(whole_prefix ? "whole prefix" : "selected blocks") + ", teacher " +
                     (teacher == Teacher::kMean ? "mean" : "max"));
        problem.teacher = teacher;
        body(whole_prefix);
      }
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Cases, IndexKl, ::testing::ValuesIn(all_cases()), case_name);

// The coarser of the two storage types: the value depends on both.
DType coarser(const Problem& problem) {
  return unit_roundoff(problem.q.dtype()) > unit_roundoff(problem.q_idx.dtype()) ? problem.q.dtype()
                                                                                 : problem.q_idx.dtype();
}

// teacher_norm of rows without a support is nobody's business.
std::vector<double> norms_of_rows(const Tensor& norms, std::int64_t queries) {
  return copy_of(slice(norms.view(), 0, queries)).values();
}

TEST_P(IndexKl, ValueAndSavedAreWithinTheRule) {
  Problem problem(GetParam());
  for_each_variant(problem, [&](bool whole_prefix) {
    const Problem wide = problem.as_float32();
    const KlResult exact = run_kl(reference_context(), wide.kl_params(whole_prefix));
    const KlResult naive = naive_kl(problem.kl_params(whole_prefix));
    for_each_target(Targets::kAll, [&](const Context& context) {
      const KlResult got = run_kl(context, problem.kl_params(whole_prefix));
      expect_within_rule("value", {got.value}, {exact.value}, {naive.value}, coarser(problem));
      expect_within_rule("lse_main", got.lse_main, exact.lse_main, naive.lse_main);
      expect_within_rule("lse_index", got.lse_index, exact.lse_index, naive.lse_index);
      expect_within_rule("teacher_norm", norms_of_rows(got.teacher_norm, problem.queries()),
                         norms_of_rows(exact.teacher_norm, problem.queries()),
                         norms_of_rows(naive.teacher_norm, problem.queries()), DType::kFloat32);
    });
  });
}

TEST_P(IndexKl, GradientsAreWithinTheRule) {
  Problem problem(GetParam());
  // A loss scale keeps the gradients of a mean over many rows within float16's range.
  const auto grad_output = static_cast<float>(std::max<std::int64_t>(1, problem.queries()));
  for_each_variant(problem, [&](bool whole_prefix) {
    const Problem wide = problem.as_float32();
    KlResult wide_forward = run_kl(reference_context(), wide.kl_params(whole_prefix));
    const KlGradients exact =
        run_kl_backward(reference_context(), wide.kl_params(whole_prefix), wide_forward, grad_output);
    const KlGradients naive = naive_kl_backward(problem.kl_params(whole_prefix), grad_output);
    for_each_target(Targets::kCpu, [&](const Context& context) {
      KlResult forward = run_kl(context, problem.kl_params(whole_prefix));
      const KlGradients got = run_kl_backward(context, problem.kl_params(whole_prefix), forward, grad_output);
      expect_within_rule("dq_idx", got.dq_idx, exact.dq_idx, naive.dq_idx);
      expect_within_rule("dk_idx", got.dk_idx, exact.dk_idx, naive.dk_idx);
    });
  });
}

TEST(IndexKlRules, GradientsOfManyQueriesAreWithinTheRule) {
  if (emulates_device()) GTEST_SKIP() << "long; tests/cuda has a smaller one";
  // Queries enough for several tasks, which add to the same keys.
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Problem problem(Case{{4, 2, 16, 16, 32, 64, 3}, {{520, 600}, {300, 300}}, dtype, dtype});
    for (const bool whole_prefix : {false, true}) {
      const Problem wide = problem.as_float32();
      KlResult wide_forward = run_kl(reference_context(), wide.kl_params(whole_prefix));
      const KlGradients exact = run_kl_backward(reference_context(), wide.kl_params(whole_prefix), wide_forward, 820);
      const KlGradients naive = naive_kl_backward(problem.kl_params(whole_prefix), 820);
      for_each_target(Targets::kCpu, [&](const Context& context) {
        KlResult forward = run_kl(context, problem.kl_params(whole_prefix));
        const KlGradients got = run_kl_backward(context, problem.kl_params(whole_prefix), forward, 820);
        expect_within_rule("dq_idx", got.dq_idx, exact.dq_idx, naive.dq_idx);
        expect_within_rule("dk_idx", got.dk_idx, exact.dk_idx, naive.dk_idx);
      });
    }
  }
}

TEST(IndexKlRules, NoQueriesGiveZero) {
  Case c{{2, 1, 16, 16, 16, 16, 2}, {{0, 20}, {0, 0}}};
  c.padding_rows = 2;
  const Problem problem(c);
  for_each_target(Targets::kAll, [&](const Context& context) {
    for (const bool whole_prefix : {false, true}) {
      KlResult forward = run_kl(context, problem.kl_params(whole_prefix));
      EXPECT_EQ(forward.value, 0.0f);
      const KlGradients grads = run_kl_backward(context, problem.kl_params(whole_prefix), forward, 1);
      for (const double value : grads.dq_idx.values()) EXPECT_EQ(value, 0);
      for (const double value : grads.dk_idx.values()) EXPECT_EQ(value, 0);
    }
  });
}

TEST(IndexKlRules, OneVisibleTokenGivesZero) {
  // Both distributions are certain; every row has a single token.
  const Problem problem(Case{{2, 2, 16, 16, 16, 16, 2}, {{1, 1}, {1, 1}}});
  for_each_target(Targets::kAll, [&](const Context& context) {
    // log(P / Q) of two probabilities 1 that each went through exp and log of a float32 lse of order 1.
    EXPECT_NEAR(run_kl(context, problem.kl_params(true)).value, 0.0f, 8 * 0x1p-24);
  });
}

TEST(IndexKlRules, EqualDistributionsGiveZeroAndTheStudentCannotImprove) {
  // With one head a group and the same vectors in both branches P = Q.
  Problem problem(Case{{2, 2, 32, 16, 32, 16, 2}, {{30, 60}}});
  for (std::int64_t j = 0; j < 60; ++j) {
    for (std::int64_t d = 0; d < 32; ++d) {
      problem.k.set(problem.k_idx.at(j, d), j, 0, d);
      problem.k.set(problem.k_idx.at(j, d), j, 1, d);
    }
  }
  problem.q = problem.q_idx;
  for_each_target(Targets::kAll, [&](const Context& context) {
    for (const bool whole_prefix : {false, true}) {
      KlResult forward = run_kl(context, problem.kl_params(whole_prefix));
      // sum P (log P - log Q): every log carries a few roundings of lse and score, which are of order 8.
      EXPECT_NEAR(forward.value, 0.0f, 8 * 0x1p-24 * 8);
      const KlGradients grads = run_kl_backward(context, problem.kl_params(whole_prefix), forward, 1);
      for (const double value : grads.dq_idx.values()) EXPECT_NEAR(value, 0, 8 * 0x1p-24 * 8);
    }
  });
}

TEST(IndexKlRules, RowsWithoutBlocksAddNothingAndCount) {
  Problem problem(Case{{4, 2, 32, 16, 16, 16, 2}, {{8, 60}}});
  Problem half = problem;
  for (std::int64_t group = 0; group < 2; ++group) {
    for (std::int64_t row = 0; row < 4; ++row) {
      for (std::int64_t slot = 0; slot < 2; ++slot) half.blocks.set(-1, group, row, slot);
    }
  }
  const Problem tail = problem.sample({4, 5, 6, 7});
  for_each_target(Targets::kAll, [&](const Context& context) {
    // Four of eight rows: the mean is half of that of the four alone. Halving is exact; sums may be split differently.
    const float expected = run_kl(context, tail.kl_params(false)).value / 2;
    KlResult forward = run_kl(context, half.kl_params(false));
    EXPECT_NEAR(forward.value, expected, 8 * 0x1p-24 * expected);
    const KlGradients grads = run_kl_backward(context, half.kl_params(false), forward, 1);
    for (std::int64_t row = 0; row < 4; ++row) {
      for (std::int64_t d = 0; d < 16; ++d) EXPECT_EQ(grads.dq_idx.at(row, 1, d), 0);
    }
  });
}

TEST(IndexKlRules, VanishingTeacherProbabilitiesAddNothing) {
  // Logits so far apart that all probabilities but one underflow to 0 in any arithmetic: p log p -> 0, never NaN.
  Problem problem(Case{{2, 1, 16, 16, 16, 16, 2}, {{1, 20}}});
  problem.q.fill(100);
  problem.k.fill(0);
  for (std::int64_t d = 0; d < 16; ++d) problem.k.set(100, 7, 0, d);
  for (const Teacher teacher : {Teacher::kMean, Teacher::kMax}) {
    problem.teacher = teacher;
    const KlResult exact = run_kl(reference_context(), problem.kl_params(true));
    const KlResult naive = naive_kl(problem.kl_params(true));
    for_each_target(Targets::kCpu, [&](const Context& context) {
      KlResult got = run_kl(context, problem.kl_params(true));
      expect_within_rule("value", {got.value}, {exact.value}, {naive.value}, DType::kFloat32);
      const KlGradients grads = run_kl_backward(context, problem.kl_params(true), got, 1);
      for (const double value : grads.dk_idx.values()) ASSERT_TRUE(std::isfinite(value));
    });
  }
}

TEST(IndexKlRules, ScalesAreArguments) {
  Problem problem(Case{{4, 2, 32, 16, 16, 16, 2}, {{9, 50}}});
  problem.scale = 0.3;
  problem.index_scale = 0.07;
  const KlResult exact = run_kl(reference_context(), problem.kl_params(false));
  const KlResult naive = naive_kl(problem.kl_params(false));
  const KlGradients exact_grads = [&] {
    KlResult forward = run_kl(reference_context(), problem.kl_params(false));
    return run_kl_backward(reference_context(), problem.kl_params(false), forward, 1);
  }();
  const KlGradients naive_grads = naive_kl_backward(problem.kl_params(false), 1);
  for_each_target(Targets::kCpu, [&](const Context& context) {
    KlResult got = run_kl(context, problem.kl_params(false));
    expect_within_rule("value", {got.value}, {exact.value}, {naive.value}, DType::kFloat32);
    const KlGradients grads = run_kl_backward(context, problem.kl_params(false), got, 1);
    expect_within_rule("dq_idx", grads.dq_idx, exact_grads.dq_idx, naive_grads.dq_idx);
    expect_within_rule("dk_idx", grads.dk_idx, exact_grads.dk_idx, naive_grads.dk_idx);
  });
}

TEST(IndexKlReference, GradientEqualsFiniteDifferences) {
  Problem problem(Case{{4, 2, 16, 16, 16, 16, 2}, {{3, 40}, {2, 2}}});
  for (const bool whole_prefix : {false, true}) {
    for (const Teacher teacher : {Teacher::kMean, Teacher::kMax}) {
      problem.teacher = teacher;
      const auto loss = [&] {
        const double value = run_kl(reference_context(), problem.kl_params(whole_prefix)).value;
        return Loss{value, std::abs(value) * 0x1p-24};
      };
      KlResult forward = run_kl(reference_context(), problem.kl_params(whole_prefix));
      const KlGradients grads = run_kl_backward(reference_context(), problem.kl_params(whole_prefix), forward, 1);
      expect_gradient_of(loss, problem.q_idx, grads.dq_idx, "q_idx");
      expect_gradient_of(loss, problem.k_idx, grads.dk_idx, "k_idx");
    }
  }
}

TEST(IndexKlReference, MeanTeacherByHand) {
  // Two heads, two tokens, all vectors along the first axis: P and Q in closed form.
  Problem problem(Case{{2, 1, 16, 16, 16, 16, 2}, {{1, 2}}});
  for (Tensor* tensor : {&problem.q, &problem.k, &problem.q_idx, &problem.k_idx}) tensor->fill(0);
  problem.q.set(1, 0, 0, 0);
  problem.q.set(3, 0, 1, 0);
  problem.k.set(1, 1, 0, 0);
  problem.q_idx.set(1, 0, 0, 0);
  problem.k_idx.set(2, 1, 0);
  problem.scale = 1;
  problem.index_scale = 1;
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const double student = sigmoid(2);
  const auto kl = [&](double p) { return p * std::log(p / student) + (1 - p) * std::log((1 - p) / (1 - student)); };
  const double mean = (sigmoid(1) + sigmoid(3)) / 2;
  const double largest = sigmoid(3) / (sigmoid(3) + sigmoid(-1));  // max over heads of either token, renormalised
  for_each_target(Targets::kAll, [&](const Context& context) {
    for (const bool whole_prefix : {false, true}) {
      problem.teacher = Teacher::kMean;
      EXPECT_NEAR(run_kl(context, problem.kl_params(whole_prefix)).value, kl(mean), 8 * 0x1p-24);
      problem.teacher = Teacher::kMax;
      EXPECT_NEAR(run_kl(context, problem.kl_params(whole_prefix)).value, kl(largest), 8 * 0x1p-24);
    }
  });
}

}  // namespace
}  // namespace msa::testing
