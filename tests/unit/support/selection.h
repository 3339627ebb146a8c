// SPDX-License-Identifier: Apache-2.0
// What every selection must be, whoever made it: well formed (SPEC section 2), and right within the rounding of two dot
// products (SPEC section 6).
#pragma once

#include <cstdint>
#include <vector>

#include "tests/unit/support/problem.h"

namespace msa::testing {

using Ids = std::vector<int>;

Ids row_of(const Tensor& blocks, std::int64_t group, std::int64_t row);

/// Rule 4 of SPEC section 2, and rules 3 and 1: ascending, packed to the left, the right count, forced blocks present.
void expect_well_formed(const Problem& problem, const Tensor& blocks);

/// No unselected block's exact score exceeds a selected, non-forced one's by more than the float32 rounding bounds of
/// the two dot products: gamma_n * sum |q_i k_i| each, gamma_n = n u / (1 - n u), whatever the order of the sum.
void expect_selection_within_rounding(const Problem& problem, const Tensor& blocks);

}  // namespace msa::testing
