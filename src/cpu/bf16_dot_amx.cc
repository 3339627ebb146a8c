// SPDX-License-Identifier: Apache-2.0
// bf16 products with AMX tiles: 16 x 16 sums a tile, a step adds 16 pairs to each. See bf16_dot.h.
#if defined(__x86_64__)

#include "src/cpu/bf16_dot.h"

#include <cstring>

#include "src/cpu/amx_tiles.h"

namespace msa::cpu {
namespace {

constexpr std::int64_t kTile = 16;       // rows and columns of sums
constexpr std::int64_t kMaxInner = 256;  // what a row that has to be copied may hold

// kRowTiles x kColTiles tiles of sums (2 x 2: a step loads 4 tiles for 4 products, 8 cycles a load against 16 a
// product). a: row tiles of `a_stride` elements a row.
template <int kRowTiles, int kColTiles>
MSA_AMX_TARGET void tiles(const Bf16Product& p, const std::uint16_t* const* a, const std::int64_t* a_stride,
                          std::int64_t row, std::int64_t column) {
  _tile_zero(0);
  if constexpr (kColTiles == 2) _tile_zero(1);
  if constexpr (kRowTiles == 2) _tile_zero(2);
  if constexpr (kRowTiles == 2 && kColTiles == 2) _tile_zero(3);
  const std::uint16_t* b = p.b + 2 * column;
  const std::int64_t b_bytes = p.b_stride * 2;
  for (std::int64_t k = 0; k < p.inner; k += kBf16Inner) {
    _tile_loadd(6, b + k / 2 * p.b_stride, b_bytes);
    _tile_loadd(4, a[0] + k, a_stride[0] * 2);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColTiles == 2) {
      _tile_loadd(7, b + k / 2 * p.b_stride + 2 * kTile, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, a[1] + k, a_stride[1] * 2);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColTiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  float* c = p.c + row * p.c_stride + column;
  const std::int64_t c_bytes = p.c_stride * 4;
  _tile_stored(0, c, c_bytes);
  if constexpr (kColTiles == 2) _tile_stored(1, c + kTile, c_bytes);
  if constexpr (kRowTiles == 2) _tile_stored(2, c + kTile * p.c_stride, c_bytes);
  if constexpr (kRowTiles == 2 && kColTiles == 2) _tile_stored(3, c + kTile * p.c_stride + kTile, c_bytes);
}

// Sixteen rows as a tile load wants them, one stride apart: where they lie, or copied. Rows behind the last are the
// first.
const std::uint16_t* tile_rows(const Bf16Product& p, std::int64_t row, std::uint16_t* copy, std::int64_t& stride) {
  const std::uint16_t* const* rows = p.a + row;
  const std::int64_t count = p.rows - row < kTile ? p.rows - row : kTile;
  if (count == kTile) {
    stride = rows[1] - rows[0];
    bool even = true;
    for (std::int64_t i = 2; i < kTile; ++i) even = even && rows[i] - rows[i - 1] == stride;
    if (even) return rows[0];
  }
  stride = p.inner;
  for (std::int64_t i = 0; i < kTile; ++i) {
    std::memcpy(copy + i * stride, rows[i < count ? i : 0], static_cast<std::size_t>(stride) * sizeof(std::uint16_t));
  }
  return copy;
}

template <int kRowTiles>
MSA_AMX_TARGET void row_tiles(const Bf16Product& p, std::int64_t row) {
  alignas(64) std::uint16_t copies[kRowTiles][kTile * kMaxInner];
  const std::uint16_t* a[kRowTiles];
  std::int64_t a_stride[kRowTiles];
  for (int t = 0; t < kRowTiles; ++t) a[t] = tile_rows(p, row + t * kTile, copies[t], a_stride[t]);
  std::int64_t column = 0;
  for (; column + 2 * kTile <= p.cols; column += 2 * kTile) tiles<kRowTiles, 2>(p, a, a_stride, row, column);
  if (column < p.cols) tiles<kRowTiles, 1>(p, a, a_stride, row, column);
}

}  // namespace

void multiply_bf16_amx(const Bf16Product& p) {
  std::int64_t row = 0;
  for (; row + kTile < p.rows; row += 2 * kTile) row_tiles<2>(p, row);
  if (row < p.rows) row_tiles<1>(p, row);
}

}  // namespace msa::cpu

#endif  // defined(__x86_64__)
