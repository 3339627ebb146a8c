// SPDX-License-Identifier: Apache-2.0
// Which of a row's visible blocks are taken, given one score a block: the forced ones, then the best (SPEC section 2,
// rules 1 to 4). Shared by the selection, its oracle and the recalls. Tested in tests/unit/select_blocks_test.cc.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "src/core/layout.h"
#include "src/reference/rows.h"

namespace msa::reference {

/// Ids of the chosen blocks, ascending. Every visible block is a candidate at any score, -inf and NaN included.
inline std::vector<std::int64_t> choose_blocks(const Row& scores, std::int64_t topk, std::int64_t local_blocks,
                                               std::int64_t init_blocks) {
  const auto visible = static_cast<std::int64_t>(scores.size());
  const core::ForcedBlocks forced = core::forced_blocks(visible, topk, local_blocks, init_blocks);
  std::vector<std::int64_t> chosen;
  std::vector<std::int64_t> candidates;
  for (std::int64_t b = 0; b < visible; ++b) (forced.contains(b) ? chosen : candidates).push_back(b);

  // A stable sort keeps the lower id first among equal scores, -0 and +0 being equal. NaN ranks below every number.
  std::stable_sort(candidates.begin(), candidates.end(), [&](std::int64_t a, std::int64_t b) {
    const double score_a = scores[static_cast<std::size_t>(a)];
    const double score_b = scores[static_cast<std::size_t>(b)];
    if (std::isnan(score_b)) return !std::isnan(score_a);
    return score_a > score_b;
  });
  for (const std::int64_t b : candidates) {
    if (static_cast<std::int64_t>(chosen.size()) == topk) break;
    chosen.push_back(b);
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

/// Main-branch probability mass of every visible block of a (query, group) row: full causal softmax, averaged over the
/// group's heads (SPEC section 4).
inline Row read_block_mass(const ConstTensorView& q, const Keys& keys, const Query& query, std::int64_t group,
                           std::int64_t group_size, std::int64_t block_size, double scale) {
  const std::vector<std::int64_t> prefix = row_support(ConstTensorView(), block_size, group, query);
  Row mass(static_cast<std::size_t>(query.position / block_size + 1), 0.0);
  for (std::int64_t head = group * group_size; head < (group + 1) * group_size; ++head) {
    const Row row = read_row(q, query.row, head);
    const Row p = softmax(read_scores(row, keys, query, group, prefix, scale)).probabilities;
    for (std::size_t j = 0; j < p.size(); ++j) {
      mass[j / static_cast<std::size_t>(block_size)] += p[j] / static_cast<double>(group_size);
    }
  }
  return mass;
}

}  // namespace msa::reference
