// SPDX-License-Identifier: Apache-2.0
// Addresses of key rows, packed and paged, positions of queries, and the forced blocks of a row.
#include "src/core/layout.h"

#include <gtest/gtest.h>

#include <vector>

#include "src/core/float_convert.h"
#include "tests/unit/support/tensor.h"

namespace msa::core {
namespace {

using testing::Layout;
using testing::Tensor;

TEST(Layout, SequencesAndPositions) {
  const std::vector<std::int32_t> cu_q = {0, 3, 3, 5};
  const std::vector<std::int32_t> cu_k = {0, 10, 10, 12};
  Batch batch = Batch::packed(cu_q, cu_k);
  EXPECT_EQ(batch.sequences(), 3);
  EXPECT_EQ(total_queries(batch), 5);
  const Sequence first = get_sequence(batch, 0);
  EXPECT_EQ(first.query_begin, 0);
  EXPECT_EQ(first.queries, 3);
  EXPECT_EQ(first.keys, 10);
  EXPECT_EQ(query_position(batch, first, 0), 7);
  EXPECT_EQ(query_position(batch, first, 2), 9);
  EXPECT_EQ(get_sequence(batch, 1).queries, 0);
  const Sequence last = get_sequence(batch, 2);
  EXPECT_EQ(last.query_begin, 3);
  EXPECT_EQ(query_position(batch, last, 0), 0);
  const std::vector<std::int32_t> positions = {1, 4, 8, 0, 1};
  batch.query_positions = positions;
  EXPECT_EQ(query_position(batch, first, 1), 4);
  EXPECT_EQ(query_position(batch, last, 1), 1);
}

TEST(Layout, PackedRows) {
  for (const testing::Layout layout : {Layout::kContiguous, Layout::kGaps, Layout::kHeadsFirst}) {
    Tensor keys(DType::kFloat16, {12, 3, 16}, layout);
    for (std::int64_t j = 0; j < 12; ++j) {
      for (std::int64_t h = 0; h < 3; ++h) keys.set(static_cast<double>(10 * j + h), j, h, 0);
    }
    const std::vector<std::int32_t> cu = {0, 5, 12};
    const Batch batch = Batch::packed(cu, cu);
    const ConstTensorView view = keys.view();
    const KeyRows rows(view, batch);
    EXPECT_EQ(load_element(rows.row(0, 4, 2), DType::kFloat16, 0), 42);
    EXPECT_EQ(load_element(rows.row(1, 0, 1), DType::kFloat16, 0), 51);
    EXPECT_EQ(load_element(rows.row(1, 6), DType::kFloat16, 0), 110);
    EXPECT_EQ(rows.run_length(3), INT64_MAX);
    EXPECT_EQ(rows.row(1, 1) - rows.row(1, 0), rows.token_stride_bytes());
  }
}

TEST(Layout, PagedRows) {
  Tensor pages(DType::kFloat32, {4, 8, 2, 16}, Layout::kGaps);
  for (std::int64_t page = 0; page < 4; ++page) {
    for (std::int64_t i = 0; i < 8; ++i) {
      for (std::int64_t h = 0; h < 2; ++h) pages.set(static_cast<double>(100 * page + 10 * i + h), page, i, h, 0);
    }
  }
  const std::vector<std::int32_t> cu_q = {0, 0, 0};
  const std::vector<std::int32_t> table = {3, 0, -1, 2, -1, -1};
  const std::vector<std::int32_t> keys = {13, 8};
  const Batch batch = Batch::paged(cu_q, table, 3, keys);
  const ConstTensorView view = pages.view();
  const KeyRows rows(view, batch);
  EXPECT_EQ(load_element(rows.row(0, 0, 0), DType::kFloat32, 0), 300);
  EXPECT_EQ(load_element(rows.row(0, 7, 1), DType::kFloat32, 0), 371);
  EXPECT_EQ(load_element(rows.row(0, 8, 0), DType::kFloat32, 0), 0);
  EXPECT_EQ(load_element(rows.row(0, 12, 1), DType::kFloat32, 0), 41);
  EXPECT_EQ(load_element(rows.row(1, 5, 0), DType::kFloat32, 0), 250);
  EXPECT_EQ(rows.run_length(0), 8);
  EXPECT_EQ(rows.run_length(7), 1);
  EXPECT_EQ(rows.run_length(8), 8);
  const std::byte* listed[11] = {};
  rows.list(0, 2, 1, 11, listed);  // of both pages, from the middle of the first to that of the second
  for (std::int64_t j = 0; j < 11; ++j) EXPECT_EQ(listed[j], rows.row(0, 2 + j, 1)) << j;
  EXPECT_EQ(get_sequence(batch, 0).keys, 13);
}

TEST(Layout, RowsWithoutHeads) {
  Tensor index_keys(DType::kFloat32, {6, 16}, Layout::kGaps);
  for (std::int64_t j = 0; j < 6; ++j) index_keys.set(static_cast<double>(j), j, 0);
  const std::vector<std::int32_t> cu = {0, 2, 6};
  const Batch batch = Batch::packed(cu, cu);
  const ConstTensorView view = index_keys.view();
  EXPECT_EQ(load_element(KeyRows(view, batch).row(1, 3), DType::kFloat32, 0), 5);
}

TEST(ForcedBlocks, MatchTheirDefinition) {
  // Against a set built straight from SPEC section 2: local blocks nearest first, then init blocks, while there is
  // room.
  for (std::int64_t visible = 1; visible <= 9; ++visible) {
    for (std::int64_t topk = 1; topk <= 6; ++topk) {
      for (std::int64_t local = 0; local <= 10; ++local) {
        for (std::int64_t init = 0; init <= 10; ++init) {
          std::vector<bool> expected(static_cast<std::size_t>(visible), false);
          std::int64_t room = topk;
          for (std::int64_t b = visible - 1; b >= 0 && b >= visible - local && room > 0; --b, --room) {
            expected[static_cast<std::size_t>(b)] = true;
          }
          for (std::int64_t b = 0; b < init && b < visible && room > 0; ++b) {
            if (expected[static_cast<std::size_t>(b)]) break;
            expected[static_cast<std::size_t>(b)] = true;
            --room;
          }
          const ForcedBlocks forced = forced_blocks(visible, topk, local, init);
          for (std::int64_t b = 0; b < visible; ++b) {
            ASSERT_EQ(forced.contains(b), expected[static_cast<std::size_t>(b)])
                << "visible " << visible << " topk " << topk << " local " << local << " init " << init << " block "
                << b;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace msa::core
