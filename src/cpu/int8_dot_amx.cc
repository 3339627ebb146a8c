// SPDX-License-Identifier: Apache-2.0
// See int8_dot.h: AMX tiles. tdpbusd multiplies a tile of 16 keys x 64 bytes by one of 64 bytes x 16 rows. Tested in
// tests/unit/screen_test.cc.
#include "src/cpu/int8_dot.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "src/cpu/amx_tiles.h"

namespace msa::cpu {
namespace {

constexpr std::int64_t kTileBytes = 64;
constexpr std::int64_t kTileKeys = 16;

using IntVec = int __attribute__((vector_size(64)));  // for its comparison: g++ 12 warns of _mm512_max_epi32

MSA_AMX_TARGET inline IntVec larger(IntVec a, IntVec b) { return a > b ? a : b; }

// best[lane] = max over the 16 keys of a tile of sums.
MSA_AMX_TARGET inline IntVec tile_max(const IntVec* sums, IntVec best) {
  IntVec other = sums[0];  // two chains: each maximum waits for the one before
#pragma GCC unroll 8
  for (int j = 1; j < 15; j += 2) {
    best = larger(best, sums[j]);
    other = larger(other, sums[j + 1]);
  }
  return larger(larger(best, sums[15]), other);
}

// Two groups of rows: per 32 keys four tiles of sums, whose products cover each other's latency.
MSA_AMX_TARGET inline void pair_max(const std::uint8_t* keys, std::int64_t key_count, std::int64_t dim,
                                    const std::int8_t* rows, std::int32_t* largest) {
  IntVec sums[4][kTileKeys];
  const std::int64_t group_bytes = kInt8Rows * dim;
  IntVec best0 = reinterpret_cast<IntVec>(_mm512_set1_epi32(INT32_MIN));
  IntVec best1 = best0;
  std::int64_t j = 0;
  for (; j + 2 * kTileKeys <= key_count; j += 2 * kTileKeys) {
    const std::uint8_t* key = keys + j * dim;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t d = 0; d < dim; d += kTileBytes) {
      _tile_loadd(4, key + d, dim);
      _tile_loadd(6, rows + d * kInt8Rows, 64);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(7, rows + group_bytes + d * kInt8Rows, 64);
      _tile_dpbusd(1, 4, 7);
      _tile_loadd(5, key + kTileKeys * dim + d, dim);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    best0 = tile_max(sums[0], best0);
    best1 = tile_max(sums[1], best1);
    best0 = tile_max(sums[2], best0);
    best1 = tile_max(sums[3], best1);
  }
  for (; j < key_count; j += kTileKeys) {
    const std::uint8_t* key = keys + j * dim;
    _tile_zero(0);
    _tile_zero(1);
    for (std::int64_t d = 0; d < dim; d += kTileBytes) {
      _tile_loadd(4, key + d, dim);
      _tile_loadd(6, rows + d * kInt8Rows, 64);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(7, rows + group_bytes + d * kInt8Rows, 64);
      _tile_dpbusd(1, 4, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    best0 = tile_max(sums[0], best0);
    best1 = tile_max(sums[1], best1);
  }
  _mm512_storeu_si512(largest, reinterpret_cast<__m512i>(best0));
  _mm512_storeu_si512(largest + kInt8Rows, reinterpret_cast<__m512i>(best1));
}

MSA_AMX_TARGET inline void single_max(const std::uint8_t* keys, std::int64_t key_count, std::int64_t dim,
                                      const std::int8_t* rows, std::int32_t* largest) {
  IntVec sums[kTileKeys];
  IntVec best = reinterpret_cast<IntVec>(_mm512_set1_epi32(INT32_MIN));
  for (std::int64_t j = 0; j < key_count; j += kTileKeys) {
    _tile_zero(0);
    for (std::int64_t d = 0; d < dim; d += kTileBytes) {
      _tile_loadd(4, keys + j * dim + d, dim);
      _tile_loadd(6, rows + d * kInt8Rows, 64);
      _tile_dpbusd(0, 4, 6);
    }
    _tile_stored(0, sums, 64);
    best = tile_max(sums, best);
  }
  _mm512_storeu_si512(largest, reinterpret_cast<__m512i>(best));
}

}  // namespace

MSA_AMX_TARGET void int8_block_max_amx(const std::uint8_t* keys, std::int64_t key_count, std::int64_t dim,
                                       const std::int8_t* rows, std::int64_t groups, std::int32_t* largest) {
  const AmxTiles tiles;
  const std::int64_t group_bytes = kInt8Rows * dim;
  std::int64_t g = 0;
  for (; g + 2 <= groups; g += 2) {
    pair_max(keys, key_count, dim, rows + g * group_bytes, largest + g * kInt8Rows);
  }
  if (g < groups) single_max(keys, key_count, dim, rows + g * group_bytes, largest + g * kInt8Rows);
}

}  // namespace msa::cpu

#endif  // defined(__x86_64__)
