// SPDX-License-Identifier: Apache-2.0
// Rows of bf16 brought into the shapes that sums over rows need (bf16_dot.h): turned round, or side by side in pairs;
// and their product. Shared by the backward of attention and of the KL loss. Tested through the operators.
#if defined(MSA_CPU_BF16_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_BF16_ROWS_INL_H_
#undef MSA_CPU_BF16_ROWS_INL_H_
#else
#define MSA_CPU_BF16_ROWS_INL_H_
#endif

#include <hwy/highway.h>  // before any intrinsics: it silences what g++ says about them

#include <algorithm>
#include <cstdint>

#include "msa/attention.h"
#include "msa/select_blocks.h"
#include "src/cpu/attention_bf16-inl.h"
#include "src/cpu/bf16_dot.h"

#if HWY_TARGET == HWY_AVX3

#include <immintrin.h>

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// 32 rows of bf16, `stride` apart, become columns: element d of row r at out[d * out_stride + r]; dim a multiple
/// of 16.
inline HWY_ATTR void transpose_32_rows(const std::uint16_t* HWY_RESTRICT rows, std::int64_t stride, std::int64_t dim,
                                       std::uint16_t* HWY_RESTRICT out, std::int64_t out_stride) {
  const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                        22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  alignas(64) std::uint32_t words[2][16 * 16];  // pairs of 16 rows, turned round
  for (std::int64_t d = 0; d < dim; d += 32) {
    const std::int64_t pairs = std::min<std::int64_t>(16, (dim - d) / 2);
    const auto mask = static_cast<__mmask16>((1u << pairs) - 1);
    for (std::int64_t half = 0; half < 2; ++half) {
      __m512i r[16];
      for (std::int64_t i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi32(mask, rows + (half * 16 + i) * stride + d);
      transpose_words(r, words[half], 16);
    }
    for (std::int64_t pair = 0; pair < pairs; ++pair) {
      const __m512i low = _mm512_load_si512(words[0] + pair * 16);
      const __m512i high = _mm512_load_si512(words[1] + pair * 16);
      std::uint16_t* to = out + (d + 2 * pair) * out_stride;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(low, even, high));
      _mm512_storeu_si512(to + out_stride, _mm512_permutex2var_epi16(low, odd, high));
    }
  }
}

/// Whether rows [0, rows) of `dim` elements (a multiple of 16) hold finite bf16 numbers only.
inline HWY_ATTR bool are_finite_bf16(const std::uint16_t* first, std::int64_t stride, std::int64_t rows,
                                     std::int64_t dim) {
  const __m256i exponent = _mm256_set1_epi16(0x7f80);
  __mmask16 special = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t d = 0; d < dim; d += 16) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + r * stride + d));
      special |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(x, exponent), exponent);
    }
  }
  return special == 0;
}

/// Rows [0, count) of `dim` elements (a multiple of 16) in pairs, zeros behind the last up to padded_inner: element d
/// of row r at out[r / 2 * out_stride + 2 * d + r % 2].
inline HWY_ATTR void pair_rows(const std::uint16_t* HWY_RESTRICT rows, std::int64_t stride, std::int64_t count,
                               std::int64_t dim, std::uint16_t* HWY_RESTRICT out, std::int64_t out_stride) {
  for (std::int64_t r = 0; r < padded_inner(count); r += 2) {
    for (std::int64_t d = 0; d < dim; d += 16) {
      const auto load = [&](std::int64_t row) HWY_ATTR {
        return row >= count ? _mm512_setzero_si512()
                            : _mm512_cvtepu16_epi32(
                                  _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + row * stride + d)));
      };
      _mm512_storeu_si512(out + r / 2 * out_stride + 2 * d,
                          _mm512_or_si512(load(r), _mm512_slli_epi32(load(r + 1), 16)));
    }
  }
}

/// c[rows, cols] = a * b for up to kMaxHeadDim rows of a, one stride apart; otherwise as Bf16Product.
inline HWY_ATTR void multiply_rows(Bf16Kernel multiply, std::int64_t rows, std::int64_t cols, std::int64_t inner,
                                   const std::uint16_t* a, std::int64_t a_stride, const std::uint16_t* b,
                                   std::int64_t b_stride, float* c, std::int64_t c_stride) {
  static_assert(kMaxHeadDim >= kMaxBlockSize);
  const std::uint16_t* a_rows[kMaxHeadDim];
  for (std::int64_t r = 0; r < rows; ++r) a_rows[r] = a + r * a_stride;
  Bf16Product product;
  product.rows = rows;
  product.cols = cols;
  product.inner = inner;
  product.a = a_rows;
  product.b = b;
  product.b_stride = b_stride;
  product.c = c;
  product.c_stride = c_stride;
  multiply(product);
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET == HWY_AVX3

#endif  // MSA_CPU_BF16_ROWS_INL_H_
