// SPDX-License-Identifier: Apache-2.0
// The int8 products that screen key blocks (docs/select-blocks.md): the largest dot product of each row with the keys
// of one block. Debian's Highway has no such instruction, so each implementation is a translation unit with intrinsics
// behind this seam: int8_dot_avx512.cc (vpdpbusd), and plain loops in int8_dot.cc that define the result. Tested in
// tests/unit/screen_test.cc.
#pragma once

#include <cstdint>

namespace msa::cpu {

/// Rows of one group: the 32-bit lanes of a 64-byte vector.
inline constexpr std::int64_t kInt8Rows = 16;

/// largest[g * 16 + r] = max over j < keys of sum over d < dim of key(j, d) * row(g, r, d).
///   keys  uint8 [keys, dim]: k + 128 for a k in [-127, 127]; keys a multiple of 16, dim of 4
///   rows  int8 [groups, dim / 4, 16, 4], in [-127, 127], 64-byte aligned
/// Sums stay below 255 * 127 * 256 < 2^23.
using Int8BlockMax = void (*)(const std::uint8_t* keys, std::int64_t key_count, std::int64_t dim,
                              const std::int8_t* rows, std::int64_t groups, std::int32_t* largest);

/// Where the `dim` elements of row r of a group start; element d lies at 64 * (d / 4) + d % 4 from there.
inline std::int64_t int8_row_offset(std::int64_t r, std::int64_t dim) {
  return r / kInt8Rows * kInt8Rows * dim + r % kInt8Rows * 4;
}

void int8_block_max_portable(const std::uint8_t* keys, std::int64_t key_count, std::int64_t dim,
                             const std::int8_t* rows, std::int64_t groups, std::int32_t* largest);
#if defined(__x86_64__)
void int8_block_max_avx512(const std::uint8_t* keys, std::int64_t key_count, std::int64_t dim, const std::int8_t* rows,
                           std::int64_t groups, std::int32_t* largest);
#endif

}  // namespace msa::cpu
