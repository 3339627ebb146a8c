// SPDX-License-Identifier: Apache-2.0
// The vector building blocks every CPU kernel is made of: loading rows of any storage type as float, and one small
// matrix product. Both give each output element the same chain of roundings whatever the shape of the tile around it,
// which is what makes results independent of threads, chunks, batches and packing. Included once for each instruction
// set (Highway's foreach_target); tested through the operators and in tests/unit/tile_test.cc.
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
#include <type_traits>
#include <utility>

#include "msa/tensor.h"
#include "src/core/float_convert.h"
#include "src/cpu/tile.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using FloatTag = hn::ScalableTag<float>;
using FloatVec = hn::Vec<FloatTag>;

#if HWY_TARGET == HWY_SSE4
// Highway's emulated f16 to float has no infinities; integer code, as core::f16_to_float.
inline HWY_ATTR FloatVec f16_to_float(hn::Vec<hn::RebindToUnsigned<FloatTag>> bits) {
  const FloatTag df;
  const hn::RebindToUnsigned<FloatTag> du;
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(du, 0x8000u)));
  const auto magnitude = hn::And(bits, hn::Set(du, 0x7fffu));
  // Exponent moved up by 112; infinities and NaN by another 112; subnormals by one multiplication that is exact.
  auto shifted = hn::Add(hn::ShiftLeft<13>(magnitude), hn::Set(du, 112u << 23));
  const hn::RebindToSigned<FloatTag> di;
  const auto is_special = hn::BitCast(du, hn::VecFromMask(di, hn::Gt(hn::BitCast(di, magnitude), hn::Set(di, 0x7bff))));
  shifted = hn::Add(shifted, hn::And(is_special, hn::Set(du, 112u << 23)));
  const auto subnormal = hn::Mul(hn::ConvertTo(df, hn::BitCast(di, magnitude)), hn::Set(df, 0x1p-24f));
  const auto is_normal = hn::BitCast(df, hn::VecFromMask(di, hn::Gt(hn::BitCast(di, magnitude), hn::Set(di, 0x3ff))));
  const auto value = hn::IfThenElse(hn::MaskFromVec(is_normal), hn::BitCast(df, shifted), subnormal);
  return hn::Or(value, hn::BitCast(df, sign));
}
#endif

// As core::f8_to_float. Subnormals are counted in steps of 2^-9, the others get float's exponent; integer code and one
// conversion, because multiplications with subnormals are slow.
inline HWY_ATTR FloatVec f8_to_float(hn::Vec<hn::RebindToUnsigned<FloatTag>> bits) {
  const FloatTag df;
  const hn::RebindToUnsigned<FloatTag> du;
  const hn::RebindToSigned<FloatTag> di;
  const auto sign = hn::ShiftLeft<24>(hn::And(bits, hn::Set(du, 0x80u)));
  const auto magnitude = hn::And(bits, hn::Set(du, 0x7fu));
  const auto normal = hn::BitCast(df, hn::Add(hn::ShiftLeft<20>(magnitude), hn::Set(du, 120u << 23)));
  const auto subnormal = hn::Mul(hn::ConvertTo(df, hn::BitCast(di, magnitude)), hn::Set(df, 0x1p-9f));
  const auto is_normal = hn::RebindMask(df, hn::Gt(hn::BitCast(di, magnitude), hn::Set(di, 7)));
  const auto is_nan = hn::RebindMask(df, hn::Eq(magnitude, hn::Set(du, 0x7fu)));
  auto value = hn::IfThenElse(is_normal, normal, subnormal);
  value = hn::IfThenElse(is_nan, hn::BitCast(df, hn::Set(du, 0x7fc00000u)), value);
  return hn::Or(value, hn::BitCast(df, sign));
}

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
  if (dtype == DType::kFloat8E4M3) {
    const hn::Rebind<std::uint8_t, FloatTag> d8;
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(row);
    for (; i + lanes <= count; i += lanes)
      hn::StoreU(f8_to_float(hn::PromoteTo(du, hn::LoadU(d8, bytes + i))), df, out + i);
  } else if (dtype == DType::kBFloat16) {
    for (; i + lanes <= count; i += lanes) {
      const auto wide = hn::PromoteTo(du, hn::LoadU(d16, bits + i));
      hn::StoreU(hn::BitCast(df, hn::ShiftLeft<16>(wide)), df, out + i);
    }
  } else {
    for (; i + lanes <= count; i += lanes) {
#if HWY_TARGET == HWY_SSE4
      hn::StoreU(f16_to_float(hn::PromoteTo(du, hn::LoadU(d16, bits + i))), df, out + i);
#else
      const hn::Rebind<hwy::float16_t, FloatTag> dh;
      hn::StoreU(hn::PromoteTo(df, hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(row) + i)), df, out + i);
#endif
    }
  }
  for (; i < count; ++i) out[i] = core::load_element(row, dtype, i);
}

/// Rounds `count` floats into a row of the storage type, to nearest even.
inline HWY_ATTR void store_row(const float* HWY_RESTRICT values, std::int64_t count, DType dtype, std::byte* row) {
  if (dtype == DType::kFloat32) {
    std::memcpy(row, values, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  std::int64_t i = 0;
  if (dtype == DType::kBFloat16) {
    const FloatTag df;
    const hn::Rebind<std::uint16_t, FloatTag> d16;
    const hn::RebindToUnsigned<FloatTag> du;
    const hn::RebindToSigned<FloatTag> di;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
    auto* bits = reinterpret_cast<std::uint16_t*>(row);
    for (; i + lanes <= count; i += lanes) {
      const auto value = hn::LoadU(df, values + i);
      const auto raw = hn::BitCast(du, value);
      const auto odd = hn::And(hn::ShiftRight<16>(raw), hn::Set(du, 1u));
      const auto rounded = hn::ShiftRight<16>(hn::Add(raw, hn::Add(odd, hn::Set(du, 0x7fffu))));
      const auto nan = hn::Or(hn::ShiftRight<16>(raw), hn::Set(du, 0x40u));  // keep NaN a NaN
      const auto is_nan = hn::RebindMask(du, hn::IsNaN(value));
      hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, hn::IfThenElse(is_nan, nan, rounded))), d16, bits + i);
    }
  }
  for (; i < count; ++i) core::store_element(row, dtype, i, values[i]);
}

/// out[c * out_stride + r] = in[r * in_stride + c] for r < rows, c < cols.
inline HWY_ATTR void transpose(const float* HWY_RESTRICT in, std::int64_t in_stride, std::int64_t rows,
                               std::int64_t cols, float* HWY_RESTRICT out, std::int64_t out_stride) {
  // 4 x 4 patches in registers, on every instruction set; wider ones gain little next to the products that follow.
  const hn::FixedTag<float, 4> d4;
  const hn::Repartition<double, decltype(d4)> d2;
  const std::int64_t whole_rows = rows / 4 * 4;
  const std::int64_t whole_cols = cols / 4 * 4;
  for (std::int64_t r = 0; r < whole_rows; r += 4) {
    for (std::int64_t c = 0; c < whole_cols; c += 4) {
      const float* from = in + r * in_stride + c;
      const auto row0 = hn::LoadU(d4, from);
      const auto row1 = hn::LoadU(d4, from + in_stride);
      const auto row2 = hn::LoadU(d4, from + 2 * in_stride);
      const auto row3 = hn::LoadU(d4, from + 3 * in_stride);
      const auto low01 = hn::BitCast(d2, hn::InterleaveLower(d4, row0, row1));
      const auto low23 = hn::BitCast(d2, hn::InterleaveLower(d4, row2, row3));
      const auto high01 = hn::BitCast(d2, hn::InterleaveUpper(d4, row0, row1));
      const auto high23 = hn::BitCast(d2, hn::InterleaveUpper(d4, row2, row3));
      float* to = out + c * out_stride + r;
      hn::StoreU(hn::BitCast(d4, hn::InterleaveLower(d2, low01, low23)), d4, to);
      hn::StoreU(hn::BitCast(d4, hn::InterleaveUpper(d2, low01, low23)), d4, to + out_stride);
      hn::StoreU(hn::BitCast(d4, hn::InterleaveLower(d2, high01, high23)), d4, to + 2 * out_stride);
      hn::StoreU(hn::BitCast(d4, hn::InterleaveUpper(d2, high01, high23)), d4, to + 3 * out_stride);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = r < whole_rows ? whole_cols : 0; c < cols; ++c)
      out[c * out_stride + r] = in[r * in_stride + c];
  }
}

// The register tile. Its sums must cover the latency of the multiply-adds (4 cycles x 2 a cycle = 8 chains on today's
// cores) and, with a row of b and one broadcast, fit the registers: 6 x 2 sums + 2 + 1 = 15 of 16 (SSE4, AVX2),
// 6 x 4 + 4 + 1 = 29 of 32 (AVX-512, NEON). Few rows, because each needs an address register of 16: 12 x 2 fits the
// vectors, too, but keeps half its addresses on the stack.
inline constexpr int kTileRows = 6;
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON
inline constexpr int kTileVecs = 4;
#else
inline constexpr int kTileVecs = 2;
#endif

/// Rows of a matrix that lie one stride apart.
template <class T>
struct StridedRows {
  T* first;
  std::int64_t stride;
  T* operator[](std::int64_t i) const { return first + i * stride; }
};

// Calls body(0), ..., body(kCount - 1) with the index as a constant: a loop that every compiler unrolls, which is what
// lets the sums below live in registers.
template <class Body, int... kIndex>
HWY_INLINE HWY_ATTR void unroll(const Body& body, std::integer_sequence<int, kIndex...>) {
  (body(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, class Body>
HWY_INLINE HWY_ATTR void unroll(const Body& body) {
  unroll(body, std::make_integer_sequence<int, kCount>{});
}

/// Where the sums of a product start and end.
enum class Sums {
  kReplace,   ///< from 0, c is overwritten
  kContinue,  ///< from c: one chain through several products
  kAdd,       ///< from 0, added to c at the end: long sums made of many products lose fewer digits than in one chain,
              ///< and zeros at either end of a row of a leave no trace
};

// One register tile: kRows x (kVecs vectors) of c (+)= a * b, the sum over k running in order, one multiply-add a step.
// Columns of b and c are counted from `column`.
template <int kRows, int kVecs, class ARows, class CRows>
HWY_ATTR void product_tile(std::int64_t inner, const ARows& a_rows, std::int64_t a_inner, const float* HWY_RESTRICT b,
                           std::int64_t b_row, const CRows& c_rows, std::int64_t first_row, std::int64_t column,
                           Sums sums) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const float* a[kRows];
  FloatVec sum[kRows * kVecs];
  unroll<kRows>([&](auto i) { a[i] = a_rows[first_row + i]; });
  if (sums == Sums::kContinue) {
    unroll<kRows * kVecs>(
        [&](auto t) { sum[t] = hn::LoadU(df, c_rows[first_row + t / kVecs] + column + t % kVecs * lanes); });
  } else {
    unroll<kRows * kVecs>([&](auto t) { sum[t] = hn::Zero(df); });
  }
  b += column;
  for (std::int64_t k = 0; k < inner; ++k) {
    FloatVec row[kVecs];
    unroll<kVecs>([&](auto j) { row[j] = hn::LoadU(df, b + j * lanes); });
    b += b_row;
    unroll<kRows>([&](auto i) {
      const FloatVec factor = hn::Set(df, a[i][k * a_inner]);
      unroll<kVecs>([&](auto j) { sum[i * kVecs + j] = hn::MulAdd(factor, row[j], sum[i * kVecs + j]); });
    });
  }
  unroll<kRows * kVecs>([&](auto t) {
    float* c = c_rows[first_row + t / kVecs] + column + t % kVecs * lanes;
    hn::StoreU(sums == Sums::kAdd ? hn::Add(hn::LoadU(df, c), sum[t]) : sum[t], df, c);
  });
}

// The last rows, fewer than a tile has.
template <int kRows, int kVecs, class ARows, class CRows>
HWY_ATTR void product_rest(std::int64_t rest, std::int64_t inner, const ARows& a_rows, std::int64_t a_inner,
                           const float* HWY_RESTRICT b, std::int64_t b_row, const CRows& c_rows, std::int64_t first_row,
                           std::int64_t column, Sums sums) {
  if constexpr (kRows > 0) {
    if (rest == kRows) {
      product_tile<kRows, kVecs>(inner, a_rows, a_inner, b, b_row, c_rows, first_row, column, sums);
    } else {
      product_rest<kRows - 1, kVecs>(rest, inner, a_rows, a_inner, b, b_row, c_rows, first_row, column, sums);
    }
  }
}

template <int kVecs, class ARows, class CRows>
HWY_ATTR void product_rows(std::int64_t rows, std::int64_t inner, const ARows& a_rows, std::int64_t a_inner,
                           const float* HWY_RESTRICT b, std::int64_t b_row, const CRows& c_rows, std::int64_t column,
                           Sums sums) {
  std::int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    product_tile<kTileRows, kVecs>(inner, a_rows, a_inner, b, b_row, c_rows, i, column, sums);
  }
  product_rest<kTileRows - 1, kVecs>(rows - i, inner, a_rows, a_inner, b, b_row, c_rows, i, column, sums);
}

/// As `product`, for rows of a and c that lie anywhere: a_rows[i] and c_rows[i] are the first elements of row i (arrays
/// of pointers or StridedRows). A strip of b as wide as a register tile stays in the L1 cache while all rows pass it.
template <class ARows, class CRows>
HWY_ATTR void product_of_rows(std::int64_t rows, std::int64_t cols, std::int64_t inner, const ARows& a_rows,
                              std::int64_t a_inner, const float* HWY_RESTRICT b, std::int64_t b_row,
                              const CRows& c_rows, Sums sums) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  std::int64_t j = 0;
  for (; j + kTileVecs * lanes <= cols; j += kTileVecs * lanes) {
    product_rows<kTileVecs>(rows, inner, a_rows, a_inner, b, b_row, c_rows, j, sums);
  }
  if constexpr (kTileVecs == 4) {
    if (j + 2 * lanes <= cols) {
      product_rows<2>(rows, inner, a_rows, a_inner, b, b_row, c_rows, j, sums);
      j += 2 * lanes;
    }
  }
  for (; j < cols; j += lanes) {
    product_rows<1>(rows, inner, a_rows, a_inner, b, b_row, c_rows, j, sums);
  }
}

/// c[rows, cols] (+)= a[rows, inner] * b[inner, cols]. Element (i, k) of a is a[i * a_row + k * a_inner], so a
/// transposed a costs nothing; b and c are row-major with row strides b_row and c_row. cols must be a multiple of 16
/// (the buffers padded so), which every vector width divides. Element (i, j) is one chain of multiply-adds over k in
/// order, starting from c(i, j) or 0: it depends on row i of a and column j of b alone. Fastest with b_row =
/// padded_stride(cols).
inline HWY_ATTR void product(std::int64_t rows, std::int64_t cols, std::int64_t inner, const float* HWY_RESTRICT a,
                             std::int64_t a_row, std::int64_t a_inner, const float* HWY_RESTRICT b, std::int64_t b_row,
                             float* HWY_RESTRICT c, std::int64_t c_row, Sums sums) {
  product_of_rows(rows, cols, inner, StridedRows<const float>{a, a_row}, a_inner, b, b_row,
                  StridedRows<float>{c, c_row}, sums);
}

/// e^x for x <= 88 to within 2 units in the last place; 0 below -87.33 (where the result would be subnormal); NaN of
/// NaN. A lane's result depends on that lane alone.
inline HWY_ATTR FloatVec exp_lanes(FloatVec x) {
  const FloatTag df;
  const hn::RebindToUnsigned<FloatTag> du;
  // x = n ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to an integer, left in the low bits; 127 more make it
  // the biased exponent of 2^n, which one shift puts in place.
  const auto magic = hn::Set(df, 12582912.0f + 127.0f);
  const auto shifted = hn::MulAdd(x, hn::Set(df, 1.44269504f), magic);
  const auto n = hn::Sub(shifted, magic);
  const auto power = hn::BitCast(df, hn::ShiftLeft<23>(hn::BitCast(du, shifted)));
  // ln 2 in two parts, the first of 16 bits so that n times it is exact without fused multiply-adds, too.
  auto r = hn::NegMulAdd(n, hn::Set(df, 0.693145752f), x);
  r = hn::NegMulAdd(n, hn::Set(df, 1.42860677e-6f), r);
  // e^r = 1 + r + r^2 p(r); p of degree 4, fitted to the least largest relative error of e^r: 4e-9, a 15th of a
  // rounding.
  auto p = hn::Set(df, 1.38145988e-3f);
  p = hn::MulAdd(p, r, hn::Set(df, 8.36871658e-3f));
  p = hn::MulAdd(p, r, hn::Set(df, 4.16683890e-2f));
  p = hn::MulAdd(p, r, hn::Set(df, 1.66665211e-1f));
  p = hn::MulAdd(p, r, hn::Set(df, 4.99999940e-1f));
  const auto one = hn::Set(df, 1.0f);
  p = hn::MulAdd(hn::MulAdd(p, r, one), r, one);
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(df, -87.33f)), hn::Mul(p, power));
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_TILE_INL_H_
