// SPDX-License-Identifier: Apache-2.0
// The bf16 products that screen key blocks (docs/select-blocks.md): the largest dot product of each row with the keys
// of one block, summed in whatever order is fastest. bf16_max_amx.cc (tdpbf16ps) is used where there are AMX tiles;
// the plain loops in bf16_max.cc serve tests on other machines. Tested in tests/unit/screen_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

namespace msa::cpu {

/// Rows of one group: the columns of a tile.
inline constexpr std::int64_t kBf16GroupRows = 16;

/// Blocks of keys, one behind the other.
struct Bf16Blocks {
  const std::uint16_t* keys = nullptr;  ///< bf16 [count * key_count, dim], rows of `stride` elements
  std::int64_t stride = 0;
  std::int64_t key_count = 0;  ///< of a block, a multiple of 16
  std::int64_t dim = 0;        ///< a multiple of 32
  std::int64_t count = 1;
};

/// Where the largest products go: that of row r of group g with the keys of block b to first[b * block_stride + g *
/// group_stride + r].
struct Bf16Largest {
  float* first = nullptr;
  std::int64_t block_stride = 0;
  std::int64_t group_stride = kBf16GroupRows;
};

/// The largest of block b and row r of group g = max over the keys of block b of sum over d < dim of key(j, d) * row(g,
/// r, d), up to rounding: each sum is made of the exact products by `dim` float additions in any order. Subnormal
/// operands and sums may count as 0.
///   rows  bf16 [groups, dim / 2, 16, 2], 64-byte aligned
///   next  bytes that the caller reads next, as many as the keys' rows take up; may be asked for ahead. Null: none
/// All elements are finite.
using Bf16BlockMax = void (*)(const Bf16Blocks& blocks, const std::uint16_t* rows, std::int64_t groups,
                              const std::byte* next, const Bf16Largest& largest);

/// Where the `dim` elements of row r of a group start; element d lies at 32 * (d / 2) + d % 2 from there.
inline std::int64_t bf16_row_offset(std::int64_t r, std::int64_t dim) {
  return r / kBf16GroupRows * kBf16GroupRows * dim + r % kBf16GroupRows * 2;
}

void bf16_block_max_portable(const Bf16Blocks& blocks, const std::uint16_t* rows, std::int64_t groups,
                             const std::byte* next, const Bf16Largest& largest);
#if defined(__x86_64__)
/// The calling thread must hold AmxTiles.
void bf16_block_max_amx(const Bf16Blocks& blocks, const std::uint16_t* rows, std::int64_t groups, const std::byte* next,
                        const Bf16Largest& largest);
#endif

}  // namespace msa::cpu
