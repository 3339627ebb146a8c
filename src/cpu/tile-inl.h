// SPDX-License-Identifier: Apache-2.0
// The vector building blocks every CPU kernel is made of: loading rows of any storage type as float, and one small matrix
// product. Both give each output element the same chain of roundings whatever the shape of the tile around it, which is
// what makes results independent of threads, chunks, batches and packing. Included once for each instruction set
// (Highway's foreach_target); tested through the operators and in tests/unit/tile_test.cc.
#if defined(MSA_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_TILE_INL_H_
#undef MSA_CPU_TILE_INL_H_
#else
#define MSA_CPU_TILE_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "msa/tensor.h"
#include "src/core/float_convert.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using FloatTag = hn::ScalableTag<float>;
using FloatVec = hn::Vec<FloatTag>;

/// out[0, count) = the row's elements as float. count is a multiple of 16 for every dimension the library accepts.
inline HWY_ATTR void load_row(const std::byte* row, DType dtype, std::int64_t count, float* HWY_RESTRICT out) {
  if (dtype == DType::kFloat32) {
    std::memcpy(out, row, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  const FloatTag df;
  const hn::Rebind<std::uint16_t, FloatTag> d16;
  const hn::RebindToUnsigned<FloatTag> du;
  const auto* bits = reinterpret_cast<const std::uint16_t*>(row);
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  std::int64_t i = 0;
  if (dtype == DType::kBFloat16) {
    for (; i + lanes <= count; i += lanes) {
      const auto wide = hn::PromoteTo(du, hn::LoadU(d16, bits + i));
      hn::StoreU(hn::BitCast(df, hn::ShiftLeft<16>(wide)), df, out + i);
    }
  } else {
    const hn::Rebind<hwy::float16_t, FloatTag> dh;
    const auto* halves = reinterpret_cast<const hwy::float16_t*>(row);
    for (; i + lanes <= count; i += lanes) {
      hn::StoreU(hn::PromoteTo(df, hn::LoadU(dh, halves + i)), df, out + i);
    }
  }
  for (; i < count; ++i) out[i] = core::load_element(row, dtype, i);
}

/// Rounds `count` floats into a row of the storage type.
inline void store_row(const float* HWY_RESTRICT values, std::int64_t count, DType dtype, std::byte* row) {
  if (dtype == DType::kFloat32) {
    std::memcpy(row, values, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) core::store_element(row, dtype, i, values[i]);
}

/// out[c * out_stride + r] = in[r * in_stride + c] for r < rows, c < cols.
inline void transpose(const float* HWY_RESTRICT in, std::int64_t in_stride, std::int64_t rows, std::int64_t cols,
                      float* HWY_RESTRICT out, std::int64_t out_stride) {
  // 8 x 8 patches keep both sides within a few cache lines.
  constexpr std::int64_t kPatch = 8;
  for (std::int64_t r0 = 0; r0 < rows; r0 += kPatch) {
    const std::int64_t r1 = r0 + kPatch < rows ? r0 + kPatch : rows;
    for (std::int64_t c0 = 0; c0 < cols; c0 += kPatch) {
      const std::int64_t c1 = c0 + kPatch < cols ? c0 + kPatch : cols;
      for (std::int64_t r = r0; r < r1; ++r) {
        for (std::int64_t c = c0; c < c1; ++c) out[c * out_stride + r] = in[r * in_stride + c];
      }
    }
  }
}

// One register tile: kRows x (kVecs vectors) of c += a * b, the sum over k running in order with one multiply-add a step.
template <int kRows, int kVecs>
HWY_ATTR void product_tile(std::int64_t inner, const float* HWY_RESTRICT a, std::int64_t a_row, std::int64_t a_inner,
                           const float* HWY_RESTRICT b, std::int64_t b_row, float* HWY_RESTRICT c, std::int64_t c_row,
                           bool accumulate) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  FloatVec sum[kRows][kVecs];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVecs; ++j) sum[i][j] = accumulate ? hn::LoadU(df, c + i * c_row + j * lanes) : hn::Zero(df);
  }
  for (std::int64_t k = 0; k < inner; ++k) {
    FloatVec row[kVecs];
    for (int j = 0; j < kVecs; ++j) row[j] = hn::LoadU(df, b + k * b_row + j * lanes);
    for (int i = 0; i < kRows; ++i) {
      const FloatVec factor = hn::Set(df, a[i * a_row + k * a_inner]);
      for (int j = 0; j < kVecs; ++j) sum[i][j] = hn::MulAdd(factor, row[j], sum[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVecs; ++j) hn::StoreU(sum[i][j], df, c + i * c_row + j * lanes);
  }
}

template <int kVecs>
HWY_ATTR void product_rows(std::int64_t rows, std::int64_t inner, const float* HWY_RESTRICT a, std::int64_t a_row,
                           std::int64_t a_inner, const float* HWY_RESTRICT b, std::int64_t b_row,
                           float* HWY_RESTRICT c, std::int64_t c_row, bool accumulate) {
  // 6 rows x 2 vectors: 12 independent sums cover FMA latency 4 x 2 ports with slack, and with 2 vectors of b and one
  // broadcast they fill 15 of AVX2's 16 registers.
  constexpr int kTileRows = 6;
  std::int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    product_tile<kTileRows, kVecs>(inner, a + i * a_row, a_row, a_inner, b, b_row, c + i * c_row, c_row, accumulate);
  }
  const float* a_rest = a + i * a_row;
  float* c_rest = c + i * c_row;
  switch (rows - i) {
    case 1: product_tile<1, kVecs>(inner, a_rest, a_row, a_inner, b, b_row, c_rest, c_row, accumulate); break;
    case 2: product_tile<2, kVecs>(inner, a_rest, a_row, a_inner, b, b_row, c_rest, c_row, accumulate); break;
    case 3: product_tile<3, kVecs>(inner, a_rest, a_row, a_inner, b, b_row, c_rest, c_row, accumulate); break;
    case 4: product_tile<4, kVecs>(inner, a_rest, a_row, a_inner, b, b_row, c_rest, c_row, accumulate); break;
    case 5: product_tile<5, kVecs>(inner, a_rest, a_row, a_inner, b, b_row, c_rest, c_row, accumulate); break;
    default: break;
  }
}

/// c[rows, cols] (+)= a[rows, inner] * b[inner, cols]. Element (i, k) of a is a[i * a_row + k * a_inner], so a transposed a
/// costs nothing; b and c are row-major with row strides b_row and c_row. cols must be a multiple of 16 (the buffers
/// padded so), which every vector width divides. Element (i, j) is one chain of multiply-adds over k in order, starting
/// from c(i, j) or 0: it depends on row i of a and column j of b alone.
inline HWY_ATTR void product(std::int64_t rows, std::int64_t cols, std::int64_t inner, const float* HWY_RESTRICT a,
                             std::int64_t a_row, std::int64_t a_inner, const float* HWY_RESTRICT b, std::int64_t b_row,
                             float* HWY_RESTRICT c, std::int64_t c_row, bool accumulate) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  std::int64_t j = 0;
  for (; j + 2 * lanes <= cols; j += 2 * lanes) {
    product_rows<2>(rows, inner, a, a_row, a_inner, b + j, b_row, c + j, c_row, accumulate);
  }
  for (; j < cols; j += lanes) {
    product_rows<1>(rows, inner, a, a_row, a_inner, b + j, b_row, c + j, c_row, accumulate);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_TILE_INL_H_
