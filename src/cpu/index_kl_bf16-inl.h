// SPDX-License-Identifier: Apache-2.0
// The parts of index_kl-inl.h that differ for bf16 queries and keys on machines with bf16 dot products: their scores,
// and the exponentials of these. The index branch, a row for every group, stays in float. Tested in
// tests/unit/index_kl_test.cc.
#if defined(MSA_CPU_INDEX_KL_BF16_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_INDEX_KL_BF16_INL_H_
#undef MSA_CPU_INDEX_KL_BF16_INL_H_
#else
#define MSA_CPU_INDEX_KL_BF16_INL_H_
#endif

#include <hwy/highway.h>  // before any intrinsics: it silences what g++ says about them

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "msa/index_kl.h"
#include "src/cpu/attention_bf16-inl.h"
#include "src/cpu/bf16_dot.h"
#include "src/cpu/row_ops-inl.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"

#if HWY_TARGET == HWY_AVX3

#include <immintrin.h>

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// scores[rows, columns] of rows at a[0, rows), rows <= kBf16Rows, and packed keys.
inline HWY_ATTR void score_bf16_rows(Bf16Kernel multiply, const std::uint16_t* const* a, std::int64_t rows,
                                     std::int64_t columns, std::int64_t dim, const std::uint16_t* keys,
                                     std::int64_t key_stride, float* scores, std::int64_t score_stride) {
  Bf16Product product;
  product.rows = rows;
  product.cols = columns;
  product.inner = padded_inner(dim);
  product.a = a;
  product.b = keys;
  product.b_stride = key_stride;
  product.c = scores;
  product.c_stride = score_stride;
  multiply(product);
}

/// out[0, count) = e^(scale * row - largest), the maximum and the sum of which become `largest` and `total`; as
/// scale_and_max and exp_and_sum.
inline HWY_ATTR void exponentiate_row(const float* HWY_RESTRICT row, std::int64_t count, float scale,
                                      float* HWY_RESTRICT out, float& largest, float& total) {
  const __m512 s = _mm512_set1_ps(scale);
  // max(x, best) gives `best` where x is NaN.
  __m512 best = _mm512_set1_ps(kNegativeInfinity);
  for (std::int64_t j = 0; j < count; j += 16) {
    const auto mask = static_cast<__mmask16>(count - j >= 16 ? 0xffff : (1 << (count - j)) - 1);
    best = _mm512_mask_max_ps(best, mask, _mm512_mul_ps(_mm512_loadu_ps(row + j), s), best);
  }
  largest = _mm512_reduce_max_ps(best);
  const __m512 shift = _mm512_set1_ps(softmax_shift(largest));
  __m512 sum = _mm512_setzero_ps();
  for (std::int64_t j = 0; j < count; j += 16) {
    const auto mask = static_cast<__mmask16>(count - j >= 16 ? 0xffff : (1 << (count - j)) - 1);
    const __m512 p = _mm512_maskz_mov_ps(mask, shifted_exp(_mm512_loadu_ps(row + j), s, shift));
    _mm512_storeu_ps(out + j, p);
    sum = _mm512_add_ps(sum, p);
  }
  total = _mm512_reduce_add_ps(sum);
}

/// As subtract_distributions.
template <Teacher kTeacher>
HWY_ATTR void subtract_distributions_bf16(const float* scores, std::int64_t stride, const float* lse,
                                          std::int64_t heads, float scale, float norm, float index_scale,
                                          float index_lse, std::int64_t visible, std::int64_t columns,
                                          float* index_row) {
  const __m512 s = _mm512_set1_ps(scale);
  const auto probability = [&](std::int64_t h, std::int64_t j) HWY_ATTR {
    return shifted_exp(_mm512_loadu_ps(scores + h * stride + j), s, _mm512_set1_ps(lse[h]));
  };
  for (std::int64_t j = 0; j < columns; j += 16) {
    __m512 mass = probability(0, j);
    for (std::int64_t h = 1; h < heads; ++h) {
      // max(p, mass) gives `mass` where p is NaN, as add_mass does.
      mass =
          kTeacher == Teacher::kMean ? _mm512_add_ps(mass, probability(h, j)) : _mm512_max_ps(probability(h, j), mass);
    }
    const __m512 p = _mm512_div_ps(mass, _mm512_set1_ps(norm));
    const __m512 index_score = _mm512_mul_ps(_mm512_loadu_ps(index_row + j), _mm512_set1_ps(index_scale));
    const __m512 q = exp_lanes(hn::Vec<FloatTag>{_mm512_sub_ps(index_score, _mm512_set1_ps(index_lse))}).raw;
    const std::int64_t left = std::clamp<std::int64_t>(visible - j, 0, 16);
    _mm512_storeu_ps(index_row + j, _mm512_maskz_sub_ps(static_cast<__mmask16>((1u << left) - 1), q, p));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET == HWY_AVX3

#endif  // MSA_CPU_INDEX_KL_BF16_INL_H_
