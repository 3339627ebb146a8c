// SPDX-License-Identifier: Apache-2.0
// See bf16_max.h: AMX tiles. tdpbf16ps multiplies a tile of 16 keys x 32 dimensions by one of 32 dimensions x 16 rows,
// in 16 cycles; the 16 x 16 sums must then be stored to find the largest of each row, another 16. With the dimensions
// of the reference geometries the rows stay in tile registers while the keys pass, and a tile is stored amid the
// products of the next one, where the store waits for nothing (docs/select-blocks.md). Tested in
// tests/unit/screen_test.cc.
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
constexpr std::int64_t kRowTile = kTileInner * kBf16GroupRows;  // elements of a tile of rows
constexpr std::int64_t kLine = 64;

using Sums = float[kTileKeys * kBf16GroupRows];

// A mask of all lanes, because g++ 12 warns of _mm512_max_ps.
MSA_AMX_TARGET inline __m512 larger(__m512 a, __m512 b) { return _mm512_maskz_max_ps(0xffff, a, b); }

MSA_AMX_TARGET inline __m512 nothing() { return _mm512_set1_ps(-std::numeric_limits<float>::infinity()); }

// best[lane] = max over the 16 keys of a tile of sums.
MSA_AMX_TARGET inline __m512 tile_max(const Sums& sums, __m512 best) {
  __m512 other = _mm512_load_ps(sums);  // two chains: each maximum waits for the one before
#pragma GCC unroll 8
  for (int j = 1; j < 15; j += 2) {
    best = larger(best, _mm512_load_ps(sums + j * kBf16GroupRows));
    other = larger(other, _mm512_load_ps(sums + (j + 1) * kBf16GroupRows));
  }
  return larger(larger(best, _mm512_load_ps(sums + 15 * kBf16GroupRows)), other);
}

// Asks for what is read next, some lines a tile of sums: many at once would fill the queue of misses that the tiles'
// own loads need.
class Ahead {
 public:
  Ahead(const std::byte* next, std::int64_t bytes, std::int64_t tiles)
      : at_(reinterpret_cast<const char*>(next)),
        left_(next == nullptr ? 0 : bytes),
        step_((bytes / kLine + tiles - 1) / tiles * kLine) {}
  MSA_AMX_TARGET void ask() {
    for (const std::int64_t end = std::max<std::int64_t>(0, left_ - step_); left_ > end; left_ -= kLine, at_ += kLine) {
      _mm_prefetch(at_, _MM_HINT_T1);
    }
  }

 private:
  const char* at_;
  std::int64_t left_;  // bytes
  std::int64_t step_;
};

// The largest sums of a group of rows, block after block.
class Largest {
 public:
  MSA_AMX_TARGET Largest(const Bf16Blocks& blocks, float* out, std::int64_t stride)
      : best_(nothing()), out_(out), stride_(stride), tiles_(blocks.key_count / kTileKeys), left_(tiles_) {}
  // The next tile of sums. The last one of a block writes what it had.
  MSA_AMX_TARGET void add(const Sums& sums) {
    best_ = tile_max(sums, best_);
    if (--left_ > 0) return;
    _mm512_storeu_ps(out_, best_);
    out_ += stride_;
    left_ = tiles_;
    best_ = nothing();
  }

 private:
  __m512 best_;
  float* out_;
  std::int64_t stride_;
  std::int64_t tiles_;
  std::int64_t left_;
};

// 128 dimensions. Registers: rows 4 to 7, keys 2 and 3, sums 0 and 1 in turn. Amid the products of a tile the one
// before is stored, and the one before that, which memory has by then, reduced.
MSA_AMX_TARGET inline void max_of_128(const Bf16Blocks& blocks, const std::uint16_t* rows, Ahead& ahead,
                                      Largest largest) {
  alignas(64) Sums even;
  alignas(64) Sums odd;
  _tile_loadd(4, rows, 64);
  _tile_loadd(5, rows + kRowTile, 64);
  _tile_loadd(6, rows + 2 * kRowTile, 64);
  _tile_loadd(7, rows + 3 * kRowTile, 64);
  const std::int64_t stride = blocks.stride * 2;
  const std::int64_t tiles = blocks.count * blocks.key_count / kTileKeys;
  const std::uint16_t* key = blocks.keys;
  for (std::int64_t t = 0; t < tiles; ++t, key += kTileKeys * blocks.stride) {
    ahead.ask();
    if (t % 2 == 0) {
      _tile_zero(0);
      _tile_loadd(2, key, stride);
      _tile_dpbf16ps(0, 2, 4);
      _tile_loadd(3, key + kTileInner, stride);
      _tile_dpbf16ps(0, 3, 5);
      if (t > 0) _tile_stored(1, odd, 64);
      if (t > 1) largest.add(even);
      _tile_loadd(2, key + 2 * kTileInner, stride);
      _tile_dpbf16ps(0, 2, 6);
      _tile_loadd(3, key + 3 * kTileInner, stride);
      _tile_dpbf16ps(0, 3, 7);
    } else {
      _tile_zero(1);
      _tile_loadd(2, key, stride);
      _tile_dpbf16ps(1, 2, 4);
      _tile_loadd(3, key + kTileInner, stride);
      _tile_dpbf16ps(1, 3, 5);
      _tile_stored(0, even, 64);
      if (t > 1) largest.add(odd);
      _tile_loadd(2, key + 2 * kTileInner, stride);
      _tile_dpbf16ps(1, 2, 6);
      _tile_loadd(3, key + 3 * kTileInner, stride);
      _tile_dpbf16ps(1, 3, 7);
    }
  }
  if (tiles % 2 == 0) {
    _tile_stored(1, odd, 64);
    largest.add(even);
    largest.add(odd);
  } else {
    _tile_stored(0, even, 64);
    if (tiles > 1) largest.add(odd);
    largest.add(even);
  }
}

// 64 dimensions, two groups of rows, so that each tile of keys is loaded for two products. Registers: rows 4, 5 and 6,
// 7, keys 2 and 3, sums 0 and 1.
MSA_AMX_TARGET inline void max_of_64(const Bf16Blocks& blocks, const std::uint16_t* rows, Ahead& ahead,
                                     Largest largest0, Largest largest1) {
  alignas(64) Sums sums0;
  alignas(64) Sums sums1;
  _tile_loadd(4, rows, 64);
  _tile_loadd(5, rows + kRowTile, 64);
  _tile_loadd(6, rows + 2 * kRowTile, 64);
  _tile_loadd(7, rows + 3 * kRowTile, 64);
  const std::int64_t stride = blocks.stride * 2;
  const std::uint16_t* key = blocks.keys;
  for (std::int64_t j = 0; j < blocks.count * blocks.key_count; j += kTileKeys, key += kTileKeys * blocks.stride) {
    ahead.ask();
    if (j > 0) _tile_stored(0, sums0, 64);
    _tile_zero(0);
    _tile_loadd(2, key, stride);
    _tile_dpbf16ps(0, 2, 4);
    if (j > 0) _tile_stored(1, sums1, 64);
    _tile_zero(1);
    _tile_dpbf16ps(1, 2, 6);
    if (j > 0) largest0.add(sums0);
    _tile_loadd(3, key + kTileInner, stride);
    _tile_dpbf16ps(0, 3, 5);
    _tile_dpbf16ps(1, 3, 7);
    if (j > 0) largest1.add(sums1);
  }
  _tile_stored(0, sums0, 64);
  _tile_stored(1, sums1, 64);
  largest0.add(sums0);
  largest1.add(sums1);
}

// Any other: two tiles of keys a time, each tile of rows loaded for both.
MSA_AMX_TARGET inline void max_of_any(const Bf16Blocks& blocks, const std::uint16_t* rows, Ahead& ahead,
                                      Largest largest) {
  alignas(64) Sums sums0;
  alignas(64) Sums sums1;
  const std::int64_t stride = blocks.stride * 2;
  const std::int64_t keys = blocks.count * blocks.key_count;
  for (std::int64_t j = 0; j < keys; j += 2 * kTileKeys) {
    const std::uint16_t* key = blocks.keys + j * blocks.stride;
    const bool is_pair = j + kTileKeys < keys;
    const std::uint16_t* other = is_pair ? key + kTileKeys * blocks.stride : key;
    ahead.ask();
    ahead.ask();
    _tile_zero(0);
    _tile_zero(1);
    for (std::int64_t d = 0; d < blocks.dim; d += kTileInner) {
      _tile_loadd(4, rows + d * kBf16GroupRows, 64);
      _tile_loadd(2, key + d, stride);
      _tile_dpbf16ps(0, 2, 4);
      _tile_loadd(3, other + d, stride);
      _tile_dpbf16ps(1, 3, 4);
    }
    _tile_stored(0, sums0, 64);
    _tile_stored(1, sums1, 64);
    largest.add(sums0);
    if (is_pair) largest.add(sums1);
  }
}

}  // namespace

MSA_AMX_TARGET void bf16_block_max_amx(const Bf16Blocks& blocks, const std::uint16_t* rows, std::int64_t groups,
                                       const std::byte* next, float* largest, std::int64_t largest_stride) {
  const std::int64_t keys = blocks.count * blocks.key_count;
  const std::int64_t passes = blocks.dim == 64 ? groups / 2 + groups % 2 : groups;
  Ahead ahead(next, keys * blocks.stride * 2, passes * (keys / kTileKeys));
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::uint16_t* here = rows + g * kBf16GroupRows * blocks.dim;
    float* out = largest + g * kBf16GroupRows;
    const Largest first(blocks, out, largest_stride);
    if (blocks.dim == 128) {
      max_of_128(blocks, here, ahead, first);
    } else if (blocks.dim == 64 && g + 1 < groups) {
      max_of_64(blocks, here, ahead, first, Largest(blocks, out + kBf16GroupRows, largest_stride));
      ++g;
    } else {
      max_of_any(blocks, here, ahead, first);
    }
  }
}

}  // namespace msa::cpu

#endif  // defined(__x86_64__)
