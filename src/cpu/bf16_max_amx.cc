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
// own loads need. kLevel: the cache to bring it to.
template <int kLevel>
class Ahead {
 public:
  Ahead(const std::byte* next, std::int64_t bytes, std::int64_t tiles)
      : at_(reinterpret_cast<const char*>(next)),
        left_(next == nullptr ? 0 : bytes),
        step_((bytes / kLine + tiles - 1) / tiles * kLine) {}
  MSA_AMX_TARGET void ask() {
    for (const std::int64_t end = std::max<std::int64_t>(0, left_ - step_); left_ > end; left_ -= kLine, at_ += kLine) {
      __builtin_prefetch(at_, 0, 4 - kLevel);
    }
  }

 private:
  const char* at_;
  std::int64_t left_;  // bytes
  std::int64_t step_;
};
using KeysAhead = Ahead<2>;
using RowsAhead = Ahead<1>;

// The largest sums of kGroups groups of rows side by side and each block, in the order in which they are multiplied:
// all blocks of the groups, then those of the next.
template <int kGroups>
class Largest {
 public:
  MSA_AMX_TARGET Largest(const Bf16Blocks& blocks, const Bf16Largest& to)
      : out_(to.first),
        group_stride_(to.group_stride),
        block_stride_(to.block_stride),
        to_next_groups_(kGroups * to.group_stride - blocks.count * to.block_stride),
        tiles_(blocks.key_count / kTileKeys),
        tiles_left_(tiles_),
        blocks_(blocks.count),
        blocks_left_(blocks_) {
    for (__m512& best : best_) best = nothing();
  }
  // The next tile of sums of a group; end_tile() follows when all groups had theirs.
  template <int kGroup>
  MSA_AMX_TARGET void add(const Sums& sums) {
    best_[kGroup] = tile_max(sums, best_[kGroup]);
  }
  // Behind the last tile of a block writes what it had.
  MSA_AMX_TARGET void end_tile() {
    if (--tiles_left_ > 0) return;
    for (int g = 0; g < kGroups; ++g) {
      _mm512_storeu_ps(out_ + g * group_stride_, best_[g]);
      best_[g] = nothing();
    }
    tiles_left_ = tiles_;
    out_ += block_stride_;
    if (--blocks_left_ > 0) return;
    blocks_left_ = blocks_;
    out_ += to_next_groups_;
  }

 private:
  __m512 best_[kGroups];
  float* out_;
  std::int64_t group_stride_;
  std::int64_t block_stride_;
  std::int64_t to_next_groups_;
  std::int64_t tiles_;
  std::int64_t tiles_left_;
  std::int64_t blocks_;
  std::int64_t blocks_left_;
};

MSA_AMX_TARGET inline void load_four_row_tiles(const std::uint16_t* rows) {
  _tile_loadd(4, rows, 64);
  _tile_loadd(5, rows + kRowTile, 64);
  _tile_loadd(6, rows + 2 * kRowTile, 64);
  _tile_loadd(7, rows + 3 * kRowTile, 64);
}

// 128 dimensions. Registers: rows 4 to 7, keys 2 and 3, sums 0 and 1 in turn. Sums are stored right before their
// register is needed again, when the tile in between has its products, and reduced two tiles later, when memory has
// them; also across groups, so that the tile unit does not idle where one ends.
MSA_AMX_TARGET inline void max_of_128(const Bf16Blocks& blocks, const std::uint16_t* rows, std::int64_t groups,
                                      KeysAhead& ahead, Largest<1> largest) {
  alignas(64) Sums sums[4];
  const auto add = [&](std::int64_t tile) MSA_AMX_TARGET {
    if (tile < 0) return;
    largest.add<0>(sums[tile % 4]);
    largest.end_tile();
  };
  const std::int64_t stride = blocks.stride * 2;
  const std::int64_t keys = blocks.count * blocks.key_count;
  std::int64_t tile = 0;
  for (std::int64_t g = 0; g < groups; ++g, rows += 4 * kRowTile) {
    load_four_row_tiles(rows);
    const std::byte* next_rows = g + 1 < groups ? reinterpret_cast<const std::byte*>(rows + 4 * kRowTile) : nullptr;
    RowsAhead rows_ahead(next_rows, 8 * kRowTile, keys / kTileKeys);
    const std::uint16_t* key = blocks.keys;
    for (std::int64_t j = 0; j < keys; j += kTileKeys, key += kTileKeys * blocks.stride, ++tile) {
      ahead.ask();
      rows_ahead.ask();
      _tile_loadd(2, key, stride);
      _tile_loadd(3, key + kTileInner, stride);
      if (tile % 2 == 0) {
        if (tile > 1) _tile_stored(0, sums[(tile - 2) % 4], 64);
        _tile_zero(0);
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(0, 3, 5);
        _tile_loadd(2, key + 2 * kTileInner, stride);
        _tile_loadd(3, key + 3 * kTileInner, stride);
        add(tile - 4);
        _tile_dpbf16ps(0, 2, 6);
        _tile_dpbf16ps(0, 3, 7);
      } else {
        if (tile > 1) _tile_stored(1, sums[(tile - 2) % 4], 64);
        _tile_zero(1);
        _tile_dpbf16ps(1, 2, 4);
        _tile_dpbf16ps(1, 3, 5);
        _tile_loadd(2, key + 2 * kTileInner, stride);
        _tile_loadd(3, key + 3 * kTileInner, stride);
        add(tile - 4);
        _tile_dpbf16ps(1, 2, 6);
        _tile_dpbf16ps(1, 3, 7);
      }
    }
  }
  const std::int64_t last = tile - 1;
  _tile_stored(0, sums[(last - last % 2) % 4], 64);
  if (last > 0) _tile_stored(1, sums[(last - 1 + last % 2) % 4], 64);
  for (std::int64_t left = tile - 4; left < tile; ++left) add(left);
}

// 64 dimensions, pairs of groups of rows, so that each tile of keys is loaded for two products. Registers: rows 4, 5
// and 6, 7, keys 2 and 3, sums 0 and 1. Stored and reduced as in max_of_128.
MSA_AMX_TARGET inline void max_of_64(const Bf16Blocks& blocks, const std::uint16_t* rows, std::int64_t pairs,
                                     KeysAhead& ahead, Largest<2> largest) {
  alignas(64) Sums sums[2][2];
  const std::int64_t stride = blocks.stride * 2;
  const std::int64_t keys = blocks.count * blocks.key_count;
  std::int64_t tile = 0;
  for (std::int64_t p = 0; p < pairs; ++p, rows += 4 * kRowTile) {
    load_four_row_tiles(rows);
    const std::uint16_t* key = blocks.keys;
    for (std::int64_t j = 0; j < keys; j += kTileKeys, key += kTileKeys * blocks.stride, ++tile) {
      Sums* two_before = sums[tile % 2];
      Sums* before = sums[(tile + 1) % 2];
      ahead.ask();
      _tile_loadd(2, key, stride);
      _tile_loadd(3, key + kTileInner, stride);
      if (tile > 0) _tile_stored(0, before[0], 64);
      _tile_zero(0);
      _tile_dpbf16ps(0, 2, 4);
      if (tile > 0) _tile_stored(1, before[1], 64);
      _tile_zero(1);
      _tile_dpbf16ps(1, 2, 6);
      if (tile > 1) largest.add<0>(two_before[0]);
      _tile_dpbf16ps(0, 3, 5);
      _tile_dpbf16ps(1, 3, 7);
      if (tile > 1) {
        largest.add<1>(two_before[1]);
        largest.end_tile();
      }
    }
  }
  Sums* last = sums[(tile + 1) % 2];
  Sums* before = sums[tile % 2];
  _tile_stored(0, last[0], 64);
  _tile_stored(1, last[1], 64);
  for (const Sums* sums : {before, last}) {
    if (sums == before && tile == 1) continue;
    largest.add<0>(sums[0]);
    largest.add<1>(sums[1]);
    largest.end_tile();
  }
}

// Any other: two tiles of keys a time, each tile of rows loaded for both.
MSA_AMX_TARGET inline void max_of_any(const Bf16Blocks& blocks, const std::uint16_t* rows, KeysAhead& ahead,
                                      Largest<1> largest) {
  alignas(64) Sums sums0;
  alignas(64) Sums sums1;
  const auto add = [&](const Sums& sums) MSA_AMX_TARGET {
    largest.add<0>(sums);
    largest.end_tile();
  };
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
    add(sums0);
    if (is_pair) add(sums1);
  }
}

}  // namespace

MSA_AMX_TARGET void bf16_block_max_amx(const Bf16Blocks& blocks, const std::uint16_t* rows, std::int64_t groups,
                                       const std::byte* next, const Bf16Largest& largest) {
  const std::int64_t keys = blocks.count * blocks.key_count;
  const std::int64_t pairs = blocks.dim == 64 ? groups / 2 : 0;
  KeysAhead ahead(next, keys * blocks.stride * 2, (groups - pairs) * (keys / kTileKeys));
  if (blocks.dim == 128) return max_of_128(blocks, rows, groups, ahead, Largest<1>(blocks, largest));
  if (pairs > 0) max_of_64(blocks, rows, pairs, ahead, Largest<2>(blocks, largest));
  for (std::int64_t g = 2 * pairs; g < groups; ++g) {
    Bf16Largest to = largest;
    to.first += g * largest.group_stride;
    max_of_any(blocks, rows + g * kBf16GroupRows * blocks.dim, ahead, Largest<1>(blocks, to));
  }
}

}  // namespace msa::cpu

#endif  // defined(__x86_64__)
