// SPDX-License-Identifier: Apache-2.0
// See bf16_max.h: the definition as plain loops.
#include "src/cpu/bf16_max.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "src/core/float_convert.h"

namespace msa::cpu {

void bf16_block_max_portable(const std::uint16_t* keys, std::int64_t key_stride, std::int64_t key_count,
                             std::int64_t dim, const std::uint16_t* rows, std::int64_t groups,
                             const std::byte* /*next*/, float* largest) {
  for (std::int64_t g = 0; g < groups; ++g, rows += kBf16GroupRows * dim, largest += kBf16GroupRows) {
    std::fill(largest, largest + kBf16GroupRows, -std::numeric_limits<float>::infinity());
    for (std::int64_t j = 0; j < key_count; ++j) {
      const std::uint16_t* key = keys + j * key_stride;
      float sums[kBf16GroupRows] = {};
      for (std::int64_t d = 0; d < dim; ++d) {
        const std::uint16_t* lane = rows + d / 2 * 32 + d % 2;
        const float factor = core::bf16_to_float(key[d]);
        for (std::int64_t r = 0; r < kBf16GroupRows; ++r) sums[r] += factor * core::bf16_to_float(lane[r * 2]);
      }
      for (std::int64_t r = 0; r < kBf16GroupRows; ++r) largest[r] = std::max(largest[r], sums[r]);
    }
  }
}

}  // namespace msa::cpu
