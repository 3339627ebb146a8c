// SPDX-License-Identifier: Apache-2.0
// See int8_dot.h: the definition as plain loops.
#include "src/cpu/int8_dot.h"

#include <algorithm>
#include <cstdint>

namespace msa::cpu {

void int8_block_max_portable(const std::uint8_t* keys, std::int64_t key_count, std::int64_t dim,
                             const std::int8_t* rows, std::int64_t groups, std::int32_t* largest) {
  for (std::int64_t g = 0; g < groups; ++g, rows += kInt8Rows * dim, largest += kInt8Rows) {
    std::fill(largest, largest + kInt8Rows, INT32_MIN);
    for (std::int64_t j = 0; j < key_count; ++j) {
      const std::uint8_t* key = keys + j * dim;
      std::int32_t sums[kInt8Rows] = {};
      for (std::int64_t d = 0; d < dim; ++d) {
        const std::int8_t* lane = rows + d / 4 * 64 + d % 4;
        for (std::int64_t r = 0; r < kInt8Rows; ++r) sums[r] += std::int32_t{key[d]} * lane[r * 4];
      }
      for (std::int64_t r = 0; r < kInt8Rows; ++r) largest[r] = std::max(largest[r], sums[r]);
    }
  }
}

}  // namespace msa::cpu
