// SPDX-License-Identifier: Apache-2.0
// Block recall and score recall of a selection against the main branch's own mass (SPEC section 4), on every backend.
#include <gtest/gtest.h>

#include <cmath>

#include "msa/index_kl.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"

namespace msa::testing {
namespace {

class SelectionRecallCases : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, SelectionRecallCases, ::testing::ValuesIn(all_cases()), case_name);

TEST_P(SelectionRecallCases, AgreesWithTheReference) {
  const Problem problem(GetParam());
  const SelectionRecall exact = selection_recall(reference_context(), problem.recall_params());
  for_each_target(Targets::kCpu, [&](const Context& context) {
    const SelectionRecall got = selection_recall(context, problem.recall_params());
    EXPECT_EQ(got.rows, exact.rows);
    if (exact.rows == 0) {
      EXPECT_TRUE(std::isnan(got.block_recall));
      EXPECT_TRUE(std::isnan(got.score_recall));
      return;
    }
    // Masses are sums of float32 probabilities with logits of a few units: relative errors of some 2^-20. Random masses
    // lie further apart than that, so I* is the same set.
    EXPECT_NEAR(got.block_recall, exact.block_recall, 0x1p-20);
    EXPECT_NEAR(got.score_recall, exact.score_recall, 0x1p-18);
  });
}

TEST(SelectionRecallRules, TheOracleHasFullRecall) {
  Problem problem(Case{{6, 3, 32, 16, 16, 16, 3}, {{40, 150}, {5, 20}}});
  for_each_target(Targets::kAll, [&](const Context& context) {
    problem.blocks = run_oracle(context, problem.oracle_params());
    const SelectionRecall recall = selection_recall(context, problem.recall_params());
    EXPECT_EQ(recall.rows, 3 * 40);
    EXPECT_EQ(recall.block_recall, 1.0);
    EXPECT_NEAR(recall.score_recall, 1.0, 0x1p-40);
  });
}

TEST(SelectionRecallRules, NaNWithoutRowsThatChoose) {
  const Problem problem(Case{{2, 1, 16, 16, 16, 16, 4}, {{64, 64}, {0, 0}}});
  for_each_target(Targets::kAll, [&](const Context& context) {
    const SelectionRecall recall = selection_recall(context, problem.recall_params());
    EXPECT_EQ(recall.rows, 0);
    EXPECT_TRUE(std::isnan(recall.block_recall));
    EXPECT_TRUE(std::isnan(recall.score_recall));
  });
}

TEST(SelectionRecallRules, CountsByHand) {
  // Four blocks, all mass of a block in its first token: e^{0, 3, 1, 2} over the sum. topk 2: I* = {1, 3}, 3 local.
  Problem problem(Case{{1, 1, 16, 16, 16, 16, 2}, {{1, 64}}});
  problem.q.fill(0);
  problem.q.set(1, 0, 0, 0);
  problem.k.fill(0);
  problem.scale = 1;
  const double score[] = {0, 3, 1, 2};
  for (std::int64_t j = 0; j < 64; ++j) problem.k.set(j % 16 == 0 ? score[j / 16] : -200, j, 0, 0);
  const auto set = [&](int a, int b) {
    problem.blocks.set(a, 0, 0, 0);
    problem.blocks.set(b, 0, 0, 1);
  };
  for_each_target(Targets::kAll, [&](const Context& context) {
    set(1, 3);
    SelectionRecall recall = selection_recall(context, problem.recall_params());
    EXPECT_EQ(recall.rows, 1);
    EXPECT_NEAR(recall.block_recall, 1.0, 0x1p-40);
    EXPECT_NEAR(recall.score_recall, 1.0, 0x1p-40);
    set(2, 3);
    recall = selection_recall(context, problem.recall_params());
    EXPECT_NEAR(recall.block_recall, 0.5, 0x1p-40);
    EXPECT_NEAR(recall.score_recall, std::exp(2) / (std::exp(2) + std::exp(3)), 0x1p-20);
    set(0, 2);
    recall = selection_recall(context, problem.recall_params());
    EXPECT_EQ(recall.block_recall, 0);
    EXPECT_EQ(recall.score_recall, 0);
  });
}

TEST(SelectionRecallRules, RowsWithoutBlocksCountAsNothingFound) {
  Problem problem(Case{{1, 1, 16, 16, 16, 16, 2}, {{1, 64}}});
  problem.blocks.fill(-1);
  for_each_target(Targets::kAll, [&](const Context& context) {
    const SelectionRecall recall = selection_recall(context, problem.recall_params());
    EXPECT_EQ(recall.rows, 1);
    EXPECT_EQ(recall.block_recall, 0);
    EXPECT_EQ(recall.score_recall, 0);
  });
}

}  // namespace
}  // namespace msa::testing
