// SPDX-License-Identifier: Apache-2.0
// See selection.h.
#include "tests/unit/support/selection.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "src/core/layout.h"
#include "src/reference/rows.h"

namespace msa::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

Ids row_of(const Tensor& blocks, std::int64_t group, std::int64_t row) {
  Ids ids;
  for (std::int64_t slot = 0; slot < blocks.size(2); ++slot)
    ids.push_back(static_cast<int>(blocks.at(group, row, slot)));
  return ids;
}

void expect_well_formed(const Problem& problem, const Tensor& blocks) {
  for (std::int64_t group = 0; group < blocks.size(0); ++group) {
    for (std::int64_t row = 0; row < problem.queries(); ++row) {
      const Ids ids = row_of(blocks, group, row);
      const std::int64_t visible = problem.position(row) / problem.geometry.block_size + 1;
      const std::int64_t expected = std::min<std::int64_t>(visible, problem.geometry.topk);
      for (std::int64_t slot = 0; slot < blocks.size(2); ++slot) {
        const auto i = static_cast<std::size_t>(slot);
        if (slot >= expected) {
          ASSERT_EQ(ids[i], -1) << "group " << group << " row " << row << " slot " << slot;
        } else {
          ASSERT_GT(ids[i], slot == 0 ? -1 : ids[i - 1]) << "group " << group << " row " << row << " slot " << slot;
          ASSERT_LT(ids[i], visible) << "group " << group << " row " << row << " slot " << slot;
        }
      }
      const auto forced =
          core::forced_blocks(visible, problem.geometry.topk, problem.local_blocks, problem.init_blocks);
      for (std::int64_t b = 0; b < visible; ++b) {
        if (forced.contains(b)) {
          ASSERT_NE(std::find(ids.begin(), ids.end(), static_cast<int>(b)), ids.end())
              << "forced block " << b << " of row " << row;
        }
      }
    }
  }
  for (std::int64_t group = 0; group < blocks.size(0); ++group) {
    for (std::int64_t row = problem.queries(); row < problem.rows(); ++row) {
      for (const int id : row_of(blocks, group, row)) ASSERT_EQ(id, -1) << "padding row " << row;
    }
  }
}

void expect_selection_within_rounding(const Problem& problem, const Tensor& blocks) {
  const std::int64_t block_size = problem.geometry.block_size;
  const double n = static_cast<double>(problem.geometry.index_dim);
  const double gamma = n * 0x1p-24 / (1 - n * 0x1p-24);
  const SelectBlocksParams params = problem.select_params();
  const reference::Keys keys(params.k_idx, params.batch);
  reference::for_each_query(params.batch, [&](const reference::Query& query) {
    for (std::int64_t group = 0; group < blocks.size(0); ++group) {
      const reference::Row q = reference::read_row(params.q_idx, query.row, group);
      const std::int64_t visible = query.position / block_size + 1;
      std::vector<double> score(static_cast<std::size_t>(visible), -kInfinity);
      std::vector<double> bound(static_cast<std::size_t>(visible), 0.0);
      for (std::int64_t j = 0; j <= query.position; ++j) {
        const reference::Row k = keys.read(query.sequence, j);
        double sum = 0;
        double magnitude = 0;
        for (std::size_t d = 0; d < k.size(); ++d) {
          sum += q[d] * k[d];
          magnitude += std::abs(q[d] * k[d]);
        }
        const auto b = static_cast<std::size_t>(j / block_size);
        score[b] = std::max(score[b], sum);
        bound[b] = std::max(bound[b], gamma * magnitude);
      }
      const auto forced =
          core::forced_blocks(visible, problem.geometry.topk, problem.local_blocks, problem.init_blocks);
      const Ids ids = row_of(blocks, group, query.row);
      double least = kInfinity;  // what an unselected block may not exceed
      for (const int id : ids) {
        if (id < 0 || forced.contains(id)) continue;
        const auto i = static_cast<std::size_t>(id);
        least = std::min(least, score[i] + bound[i]);
      }
      for (std::int64_t b = 0; b < visible; ++b) {
        if (std::find(ids.begin(), ids.end(), static_cast<int>(b)) != ids.end()) continue;
        const auto i = static_cast<std::size_t>(b);
        ASSERT_LE(score[i] - bound[i], least) << "row " << query.row << " group " << group << " left out block " << b;
      }
    }
  });
}

}  // namespace msa::testing
