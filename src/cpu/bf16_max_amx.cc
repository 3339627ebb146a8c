// SPDX-License-Identifier: Apache-2.0
// See bf16_max.h: AMX tiles. tdpbf16ps multiplies a tile of 16 keys x 32 dimensions by one of 32 dimensions x 16 rows.
// A tile of sums takes 16 cycles of products for every 32 dimensions, and must then be stored to be reduced, which
// neither overlaps with products (docs/select-blocks.md). Tested in tests/unit/screen_test.cc.
#if defined(__x86_64__)

#include "src/cpu/bf16_max.h"

#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "src/cpu/amx_tiles.h"

namespace msa::cpu {
namespace {

constexpr std::int64_t kTileInner = 32;  // dimensions
constexpr std::int64_t kTileKeys = 16;

// A mask of all lanes, because g++ 12 warns of _mm512_max_ps.
MSA_AMX_TARGET inline __m512 larger(__m512 a, __m512 b) { return _mm512_maskz_max_ps(0xffff, a, b); }

// best[lane] = max over the 16 keys of a tile of sums.
MSA_AMX_TARGET inline __m512 tile_max(const float* sums, __m512 best) {
  __m512 other = _mm512_load_ps(sums);  // two chains: each maximum waits for the one before
#pragma GCC unroll 8
  for (int j = 1; j < 15; j += 2) {
    best = larger(best, _mm512_load_ps(sums + j * kBf16GroupRows));
    other = larger(other, _mm512_load_ps(sums + (j + 1) * kBf16GroupRows));
  }
  return larger(larger(best, _mm512_load_ps(sums + 15 * kBf16GroupRows)), other);
}

struct Keys {
  const std::uint16_t* first;
  std::int64_t stride;
  std::int64_t count;
  std::int64_t dim;
};

// kGroups (1 or 2) groups of rows: per 32 keys and 2 groups four tiles of sums, so that each tile loaded is used twice.
template <int kGroups>
MSA_AMX_TARGET inline void groups_max(const Keys& keys, const std::uint16_t* rows, float* largest) {
  alignas(64) float sums[2 * kGroups][kTileKeys * kBf16GroupRows];
  const std::uint16_t* other_rows = rows + kBf16GroupRows * keys.dim;
  const std::int64_t stride = keys.stride * 2;
  __m512 best0 = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 best1 = best0;
  std::int64_t j = 0;
  for (; j + 2 * kTileKeys <= keys.count; j += 2 * kTileKeys) {
    const std::uint16_t* key = keys.first + j * keys.stride;
    _tile_zero(0);
    if constexpr (kGroups == 2) _tile_zero(1);
    _tile_zero(2);
    if constexpr (kGroups == 2) _tile_zero(3);
    for (std::int64_t d = 0; d < keys.dim; d += kTileInner) {
      _tile_loadd(4, key + d, stride);
      _tile_loadd(6, rows + d * kBf16GroupRows, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kGroups == 2) {
        _tile_loadd(7, other_rows + d * kBf16GroupRows, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_loadd(5, key + kTileKeys * keys.stride + d, stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kGroups == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    if constexpr (kGroups == 2) _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[kGroups], 64);
    if constexpr (kGroups == 2) _tile_stored(3, sums[3], 64);
    best0 = tile_max(sums[0], best0);
    if constexpr (kGroups == 2) best1 = tile_max(sums[1], best1);
    best0 = tile_max(sums[kGroups], best0);
    if constexpr (kGroups == 2) best1 = tile_max(sums[3], best1);
  }
  if (j < keys.count) {
    const std::uint16_t* key = keys.first + j * keys.stride;
    _tile_zero(0);
    if constexpr (kGroups == 2) _tile_zero(1);
    for (std::int64_t d = 0; d < keys.dim; d += kTileInner) {
      _tile_loadd(4, key + d, stride);
      _tile_loadd(6, rows + d * kBf16GroupRows, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kGroups == 2) {
        _tile_loadd(7, other_rows + d * kBf16GroupRows, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    _tile_stored(0, sums[0], 64);
    if constexpr (kGroups == 2) _tile_stored(1, sums[1], 64);
    best0 = tile_max(sums[0], best0);
    if constexpr (kGroups == 2) best1 = tile_max(sums[1], best1);
  }
  _mm512_storeu_ps(largest, best0);
  if constexpr (kGroups == 2) _mm512_storeu_ps(largest + kBf16GroupRows, best1);
}

}  // namespace

MSA_AMX_TARGET void bf16_block_max_amx(const std::uint16_t* keys, std::int64_t key_stride, std::int64_t key_count,
                                       std::int64_t dim, const std::uint16_t* rows, std::int64_t groups,
                                       const std::byte* next, float* largest) {
  const AmxTiles tiles;
  const Keys block{keys, key_stride, key_count, dim};
  // The next keys come to the L2 cache a part beside every pair of groups: one after the other they would wait.
  constexpr std::int64_t kLine = 64;
  const std::int64_t lines = next == nullptr ? 0 : key_count * key_stride * 2 / kLine;
  const std::int64_t lines_a_pair = (lines + (groups + 1) / 2 - 1) / ((groups + 1) / 2);
  std::int64_t line = 0;
  for (std::int64_t g = 0; g < groups; g += 2) {
    for (const std::int64_t end = std::min(lines, line + lines_a_pair); line < end; ++line) {
      _mm_prefetch(reinterpret_cast<const char*>(next + line * kLine), _MM_HINT_T1);
    }
    const std::uint16_t* here = rows + g * kBf16GroupRows * dim;
    if (g + 1 < groups) {
      groups_max<2>(block, here, largest + g * kBf16GroupRows);
    } else {
      groups_max<1>(block, here, largest + g * kBf16GroupRows);
    }
  }
}

}  // namespace msa::cpu

#endif  // defined(__x86_64__)
