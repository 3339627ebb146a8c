// SPDX-License-Identifier: Apache-2.0
// What few_rows-inl.h and its caller share: how a call screens sequences with few rows.
#pragma once

#include <cstdint>

#include "src/cpu/bf16_max.h"

namespace msa::cpu {

struct FewRowsScreen {
  Bf16BlockMax block_max = nullptr;
  bool needs_amx_tiles = false;  ///< of the thread that calls block_max
  std::int64_t dim = 0;          ///< the index dimension, padded to what block_max takes
};

/// In place of a block's magnitude: its scores are exact.
inline constexpr float kExactScore = -1;

}  // namespace msa::cpu
