// SPDX-License-Identifier: Apache-2.0
// See bf16_max.h: the definition as plain loops.
#include "src/cpu/bf16_max.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "src/core/float_convert.h"

namespace msa::cpu {

void bf16_block_max_portable(const Bf16Blocks& blocks, const std::uint16_t* rows, std::int64_t groups,
                             const std::byte* /*next*/, const Bf16Largest& largest) {
  for (std::int64_t b = 0; b < blocks.count; ++b) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::uint16_t* group = rows + g * kBf16GroupRows * blocks.dim;
      float* out = largest.first + b * largest.block_stride + g * largest.group_stride;
      std::fill(out, out + kBf16GroupRows, -std::numeric_limits<float>::infinity());
      for (std::int64_t j = 0; j < blocks.key_count; ++j) {
        const std::uint16_t* key = blocks.keys + (b * blocks.key_count + j) * blocks.stride;
        float sums[kBf16GroupRows] = {};
        for (std::int64_t d = 0; d < blocks.dim; ++d) {
          const std::uint16_t* lane = group + d / 2 * 32 + d % 2;
          const float factor = core::bf16_to_float(key[d]);
          for (std::int64_t r = 0; r < kBf16GroupRows; ++r) sums[r] += factor * core::bf16_to_float(lane[r * 2]);
        }
        for (std::int64_t r = 0; r < kBf16GroupRows; ++r) out[r] = std::max(out[r], sums[r]);
      }
    }
  }
}

}  // namespace msa::cpu
