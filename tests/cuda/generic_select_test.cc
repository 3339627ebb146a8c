// SPDX-License-Identifier: Apache-2.0
// The generic CUDA selection, its oracle and the recall in the emulator: what the operators' unit tests, which run on
// them too, do not ask. Workspace of exactly the stated size, float8 index keys, page tables with holes.
#include <gtest/gtest.h>

#include "tests/cuda/generic_support.h"

namespace msa::testing {
namespace {

TEST(GenericSelect, OracleAndRecallStayInTheirWorkspace) {
  Case c{{6, 3, 32, 16, 16, 16, 3}, {{40, 150}, {0, 4}, {5, 20}}};
  c.padding_rows = 2;
  Problem problem(c);
  expect_same_bytes("oracle", generic_oracle(problem.oracle_params()),
                    run_oracle(reference_context(), problem.oracle_params()));
  const SelectionRecall exact = selection_recall(reference_context(), problem.recall_params());
  const SelectionRecall got = generic_recall(problem.recall_params());
  EXPECT_EQ(got.rows, exact.rows);
  EXPECT_NEAR(got.block_recall, exact.block_recall, 0x1p-20);
  EXPECT_NEAR(got.score_recall, exact.score_recall, 0x1p-18);
  problem.blocks = generic_oracle(problem.oracle_params());
  EXPECT_EQ(generic_recall(problem.recall_params()).block_recall, 1.0);
}

TEST(GenericSelect, Float8IndexKeys) {
  for (const DType dtype : kFloatTypes) {
    Problem problem(Case{{6, 2, 16, 16, 48, 16, 3}, {{9, 170}, {1, 33}}, dtype, dtype});
    Random random(3);
    problem.q_idx.fill_integers(random, 2);
    problem.k_idx.fill_integers(random, 2);
    problem.k_idx = problem.k_idx.as(DType::kFloat8E4M3);
    expect_same_bytes("blocks", generic_select(problem.select_params()),
                      run_select(reference_context(), problem.select_params()));
  }
}

TEST(GenericSelect, PagesThatAreMissingAreNotRead) {
  // A page table that was never checked: ids outside the buffer count as zeros.
  const Problem problem(Case{{2, 1, 16, 16, 16, 16, 2}, {{3, 100}}});
  PagedProblem paged(problem, 16);
  const Tensor clean = generic_select(paged.select_params());
  paged.page_table[1] = -1;
  paged.page_table[2] = 1000000;
  const Tensor blocks = generic_select(paged.select_params());
  for (std::int64_t row = 0; row < 3; ++row) {
    EXPECT_EQ(blocks.at(0, row, 1), clean.at(0, row, 1)) << "the local block";
    EXPECT_GE(blocks.at(0, row, 0), 0);
    EXPECT_LT(blocks.at(0, row, 0), 7);
  }
}

}  // namespace
}  // namespace msa::testing
