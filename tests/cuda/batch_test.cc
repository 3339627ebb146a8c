// SPDX-License-Identifier: Apache-2.0
// Sequences, positions and key addresses as kernels compute them, against src/core/layout.h.
#include <gtest/gtest.h>

#include "src/core/layout.h"
#include "src/cuda/batch.cuh"
#include "tests/unit/support/problem.h"

namespace msa::cuda {
namespace {

using msa::testing::Case;
using msa::testing::PagedProblem;
using msa::testing::Problem;

// Compares every row of the batch, and the rows behind it.
void expect_as_on_host(const Batch& batch, const ConstTensorView& k) {
  const BatchView view = view_of(batch);
  const KeyRowsView<float> rows = key_rows<float>(k, batch);
  const core::KeyRows host(k, batch);
  std::int32_t row = 0;
  for (std::int64_t s = 0; s < batch.sequences(); ++s) {
    const core::Sequence sequence = core::get_sequence(batch, s);
    for (std::int64_t i = 0; i < sequence.queries; ++i, ++row) {
      const QueryPlace place = view.place(row);
      EXPECT_EQ(place.sequence, s);
      EXPECT_EQ(place.position, core::query_position(batch, sequence, i));
      EXPECT_EQ(place.keys, sequence.keys);
    }
    for (std::int64_t position = 0; position < sequence.keys; ++position) {
      for (std::int64_t head = 0; head < k.size(k.rank - 2); ++head) {
        EXPECT_EQ(reinterpret_cast<const std::byte*>(rows.row(view, static_cast<std::int32_t>(s),
                                                              static_cast<std::int32_t>(position),
                                                              static_cast<std::int32_t>(head))),
                  host.row(s, position, head));
      }
    }
  }
  EXPECT_EQ(view.queries(), row);
  for (std::int32_t behind = row; behind < row + 3; ++behind) EXPECT_EQ(view.place(behind).sequence, -1);
}

TEST(BatchView, AgreesWithTheHost) {
  const Problem problem(Case{{4, 2, 16, 16, 16, 16, 2}, {{0, 0}, {3, 40}, {0, 7}, {1, 1}, {17, 33}, {0, 0}}});
  expect_as_on_host(problem.batch(), problem.k.view());
  const PagedProblem paged(problem, 32);
  expect_as_on_host(paged.batch(), paged.k.view());
  const Problem sample = Problem(Case{{4, 2, 16, 16, 16, 16, 2}, {{20, 40}, {9, 9}}}).sample({0, 3, 19, 20, 28});
  expect_as_on_host(sample.batch(), sample.k.view());
}

TEST(BatchView, UnusableNumbersMakeARowInert) {
  const std::int32_t cu_q[] = {0, 4}, cu_k[] = {0, 2}, positions[] = {0, 7, -1, 1};
  BatchView view = view_of(Batch::packed(cu_q, cu_k));
  EXPECT_EQ(view.place(0).sequence, -1) << "more queries than keys";
  EXPECT_EQ(view.place(3).position, 1);
  view.query_positions = positions;
  EXPECT_EQ(view.place(0).sequence, 0);
  EXPECT_EQ(view.place(1).sequence, -1);
  EXPECT_EQ(view.place(2).sequence, -1);
  EXPECT_EQ(view.place(3).position, 1);
}

}  // namespace
}  // namespace msa::cuda
