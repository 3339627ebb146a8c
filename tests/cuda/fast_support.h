// SPDX-License-Identifier: Apache-2.0
// What the emulated tests of the fast kernels share: the orders of blocks and threads in which bits must not change,
// and sequence lengths around a block's edges.
#pragma once

#include <cstdint>
#include <vector>

#include "src/cuda/device.cuh"
#include "tests/unit/support/problem.h"

namespace msa::testing {

/// Asynchronous operations early and late, blocks and threads in several orders.
inline std::vector<cuda::emulator::Options> all_options() {
  using cuda::emulator::BlockOrder;
  return {{true, BlockOrder::kAscending, false, 1},
          {true, BlockOrder::kShuffled, true, 2},
          {false, BlockOrder::kDescending, true, 3}};
}

/// A batch of sequences that end around the edges of blocks of `bk` keys, empty ones among them.
inline std::vector<Lengths> edges(std::int64_t bk) {
  return {{1, 1}, {0, 0}, {3, bk - 1}, {0, 5}, {2, bk}, {bk / 4 + 1, bk + 1}, {2, 2 * bk}};
}

}  // namespace msa::testing
