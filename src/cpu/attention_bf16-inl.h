// SPDX-License-Identifier: Apache-2.0
// attention-inl.h for bf16 queries and bf16 or float8 keys and values on machines with bf16 dot products: the same
// chunk, the same visiting of blocks in ascending order, with both products in bf16 and everything between them in
// float. Probabilities are rounded to bf16 before they meet the values, after their sum was taken. Uses AVX-512
// directly: only that set has such products. Tested in tests/unit/sparse_attention_test.cc and dense_attention_test.cc.
#if defined(MSA_CPU_ATTENTION_BF16_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_ATTENTION_BF16_INL_H_
#undef MSA_CPU_ATTENTION_BF16_INL_H_
#else
#define MSA_CPU_ATTENTION_BF16_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "src/core/layout.h"
#include "src/cpu/amx_tiles.h"
#include "src/cpu/attention-inl.h"
#include "src/cpu/attention.h"
#include "src/cpu/bf16_dot.h"
#include "src/cpu/float8-inl.h"
#include "src/cpu/key_tile-inl.h"
#include "src/cpu/plan.h"
#include "src/cpu/row_ops-inl.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"

#if HWY_TARGET == HWY_AVX3

#include <immintrin.h>

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// Sixteen rows of up to sixteen 32-bit words become sixteen columns: out[c * out_stride + r] = rows[r][c].
inline HWY_ATTR void transpose_words(__m512i* HWY_RESTRICT r, std::uint32_t* HWY_RESTRICT out,
                                     std::int64_t out_stride) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {  // pairs of rows: words of both side by side
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // four rows
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8) {  // eight rows
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    // t[j]: column j % 4 of quarters 0 and 2 (j < 4) or 1 and 3 (j >= 4) of rows 0..7, t[j + 8] of rows 8..15.
    const int column = j % 4 + (j < 4 ? 0 : 4);
    _mm512_storeu_si512(out + column * out_stride, _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88));
    _mm512_storeu_si512(out + (column + 8) * out_stride, _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd));
  }
}

/// Elements [first, first + 32) of a row as bf16, those that `mask` leaves out as 0.
inline HWY_ATTR __m512i load_as_bf16(const std::byte* row, DType dtype, std::int64_t first, __mmask32 mask) {
  if (dtype == DType::kBFloat16) return _mm512_maskz_loadu_epi16(mask, row + 2 * first);
  const __m512i bits = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, row + first));
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi16(0x7f));
  const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(bits, _mm512_set1_epi16(0x80)), 8);
  const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
  return _mm512_mask_mov_epi16(f8_to_bf16(_mm512_slli_epi16(bits, 8), bits), is_nan,
                               _mm512_or_si512(sign, _mm512_set1_epi16(0x7fc0)));
}

inline HWY_ATTR __mmask32 first_of_32(std::int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

/// Keys as `multiply_bf16` reads b: pair d / 2 of key first + j at out[d / 2 * out_stride + 2 * j]; zeros behind the
/// last key up to a multiple of 16 and behind the last dimension up to padded_inner.
inline HWY_ATTR void pack_keys(const core::KeyRows& keys, std::int64_t sequence, std::int64_t head, std::int64_t first,
                               std::int64_t count, std::int64_t head_dim, std::uint16_t* out, std::int64_t out_stride) {
  auto* words = reinterpret_cast<std::uint32_t*>(out);
  const std::int64_t row_bytes = head_dim * static_cast<std::int64_t>(dtype_size(keys.dtype()));
  for (std::int64_t j = 0; j < count; j += 16) {
    const std::byte* row[16];
    const std::int64_t here = std::min<std::int64_t>(16, count - j);
    for (std::int64_t i = 0; i < here; ++i) row[i] = keys.row(sequence, first + j + i, head);
    if (j + 16 < count) {
      for (std::int64_t i = 0; i < 16; ++i) prefetch_ahead(row[i], 16 * keys.token_stride_bytes(), row_bytes);
    }
    for (std::int64_t d = 0; d < head_dim; d += 32) {
      const __mmask32 mask = first_of_32(head_dim - d);
      __m512i r[16];
      for (std::int64_t i = 0; i < 16; ++i) {
        r[i] = i < here ? load_as_bf16(row[i], keys.dtype(), d, mask) : _mm512_setzero_si512();
      }
      transpose_words(r, words + d / 2 * (out_stride / 2) + j, out_stride / 2);
    }
  }
}

/// Values as `multiply_bf16` reads b: element e of key first + j at out[j / 2 * out_stride + 2 * e + j % 2]; zeros
/// behind the last key up to padded_inner. Returns whether all of them are finite.
inline HWY_ATTR bool pack_values(const core::KeyRows& values, std::int64_t sequence, std::int64_t head,
                                 std::int64_t first, std::int64_t count, std::int64_t value_dim, std::uint16_t* out,
                                 std::int64_t out_stride) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  const std::int64_t row_bytes = value_dim * static_cast<std::int64_t>(dtype_size(values.dtype()));
  constexpr std::int64_t kAhead = 16;  // keys: the lines of 8 pairs, as many as a core can wait for
  __mmask32 special = 0;               // all exponent bits set: infinity or NaN
  for (std::int64_t j = 0; j < padded_inner(count); j += 2) {
    std::uint16_t* to = out + j / 2 * out_stride;
    const std::byte* even = j < count ? values.row(sequence, first + j, head) : nullptr;
    const std::byte* odd = j + 1 < count ? values.row(sequence, first + j + 1, head) : nullptr;
    if (j + kAhead + 1 < count) {
      prefetch_ahead(even, kAhead * values.token_stride_bytes(), row_bytes);
      prefetch_ahead(odd, kAhead * values.token_stride_bytes(), row_bytes);
    }
    for (std::int64_t e = 0; e < value_dim; e += 32) {
      const __mmask32 mask = first_of_32(value_dim - e);
      const __m512i a = even != nullptr ? load_as_bf16(even, values.dtype(), e, mask) : _mm512_setzero_si512();
      const __m512i b = odd != nullptr ? load_as_bf16(odd, values.dtype(), e, mask) : _mm512_setzero_si512();
      special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(a, exponent), exponent) |
                 _mm512_cmpeq_epi16_mask(_mm512_and_si512(b, exponent), exponent);
      _mm512_storeu_si512(to + 2 * e, _mm512_permutex2var_epi16(a, low, b));
      if (value_dim - e > 16) _mm512_storeu_si512(to + 2 * e + 32, _mm512_permutex2var_epi16(a, high, b));
    }
  }
  return special == 0;
}

/// 2^x to within 3e-6 of it, far below a rounding to bf16; 0 of -inf, NaN of NaN.
inline HWY_ATTR __m512 exp2_lanes(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 0);  // x less its nearest integer
  // 2^r, |r| <= 1/2: degree 4, fitted to the least largest relative error.
  __m512 p = _mm512_set1_ps(9.5828532e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5906406e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4024099e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9312419e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, _mm512_sub_ps(x, r));
}

/// e^(score * scale - shift). The product is rounded before the subtraction, as where maxima and lse were found: what
/// is largest gives exactly 1 however large the scores.
inline HWY_ATTR __m512 shifted_exp(__m512 score, __m512 scale, __m512 shift) {
  const __m512 x = _mm512_sub_ps(_mm512_mul_ps(score, scale), shift);
  return exp2_lanes(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
}

/// The high halves of two vectors after rounding, as bf16, ties away from zero: for probabilities, which are never so
/// large that the rounding could overflow. NaN may lose its meaning: the row's sum keeps it.
inline HWY_ATTR __m512i round_to_bf16(__m512 first, __m512 second) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(_mm512_add_epi32(_mm512_castps_si512(first), half), odd,
                                   _mm512_add_epi32(_mm512_castps_si512(second), half));
}

/// Copies `heads` rows of a query, zeros behind the last dimension up to padded_inner.
inline HWY_ATTR void copy_bf16_rows(const ConstTensorView& q, std::int64_t row, std::int64_t first_head,
                                    std::int64_t heads, std::uint16_t* out) {
  const std::int64_t dim = q.size(2);
  const std::int64_t inner = padded_inner(dim);
  for (std::int64_t h = 0; h < heads; ++h) {
    std::uint16_t* to = out + h * inner;
    std::memcpy(to, head_row(q, row, first_head + h), static_cast<std::size_t>(dim) * sizeof(std::uint16_t));
    std::fill(to + dim, to + inner, std::uint16_t{0});
  }
}

/// As ChunkAttention.
class Bf16ChunkAttention : public ChunkState {
 public:
  HWY_ATTR Bf16ChunkAttention(const AttentionInput& input, const QueryChunk& chunk, std::int64_t kv_head,
                              float* scratch)
      : ChunkState(input, chunk, kv_head, scratch),
        inner_(padded_inner(input.shape.head_dim)),
        key_stride_(padded_pair_stride(input.shape.block_size)),
        value_stride_(padded_pair_stride(input.shape.value_dim)),
        score_stride_(padded_stride(input.shape.block_size)),
        product_stride_(padded_stride(input.shape.value_dim)),
        probability_stride_(padded_inner(input.shape.block_size)),
        queries_(reinterpret_cast<std::uint16_t*>(scratch + input.layout.queries)),
        keys_(reinterpret_cast<std::uint16_t*>(scratch + input.layout.keys)),
        values_(reinterpret_cast<std::uint16_t*>(scratch + input.layout.values)),
        scores_(scratch + input.layout.scores),
        products_(scratch + input.layout.products),
        probabilities_(reinterpret_cast<std::uint16_t*>(scratch + input.layout.probabilities)) {
    const std::int64_t group_size = input.shape.group_size;
    for (std::int64_t i = 0; i < count_; ++i) {
      copy_bf16_rows(input.q, first_row() + i, kv_head * group_size, group_size, queries_ + i * group_size * inner_);
    }
  }

  HWY_ATTR void add_block(std::int64_t block, std::int64_t n, const NextBlock& /*next*/) {
    if (n == 0) return;
    load_keys(block, n);
    weigh_members(n, [&](std::int64_t first, std::int64_t rows) HWY_ATTR {
      score_rows(first, rows, scores_);
      weigh_rows(first, rows, scores_);
    });
  }

  HWY_ATTR void score_block(std::int64_t block, std::int64_t n, float* scores) {
    load_keys(block, n);
    const std::int64_t rows = n * input_.shape.group_size;
    for (std::int64_t r = 0; r < rows; r += kBf16Rows) {
      score_rows(r, std::min(kBf16Rows, rows - r), scores + r * score_stride_);
    }
  }
  HWY_ATTR void weigh_block(std::int64_t block, std::int64_t n, const float* scores) {
    start_block(block, n);
    weigh_members(n, [&](std::int64_t first, std::int64_t rows)
                         HWY_ATTR { weigh_rows(first, rows, scores + first * score_stride_); });
  }

 private:
  HWY_ATTR void load_keys(std::int64_t block, std::int64_t n) {
    start_block(block, n);
    pack_keys(key_rows_, sequence_.index, kv_head_, block_begin_, block_keys_, input_.shape.head_dim, keys_,
              key_stride_);
  }

  // Loads the values and calls weigh(first, rows) for the members' rows, at most kBf16Rows at a time.
  template <class Weigh>
  HWY_ATTR void weigh_members(std::int64_t n, const Weigh& weigh) {
    const AttentionShape& shape = input_.shape;
    const bool finite = pack_values(value_rows_, sequence_.index, kv_head_, block_begin_, block_keys_, shape.value_dim,
                                    values_, value_stride_);
    for (std::int64_t m = 0; m < n; ++m) seen_[members_[m]] = 1;
    const std::int64_t rows = n * shape.group_size;
    if (finite || visible_keys(members_[0]) == block_keys_) {
      for (std::int64_t r = 0; r < rows; r += kBf16Rows) weigh(r, std::min(kBf16Rows, rows - r));
      return;
    }
    // A row must not touch values it does not see, 0 * NaN being NaN: one query after the other, the last one first,
    // and what the next one does not see is cleared.
    std::int64_t kept = block_keys_;
    for (std::int64_t m = n - 1; m >= 0; --m) {
      const std::int64_t visible = visible_keys(members_[m]);
      for (; kept > visible; --kept) clear_value(kept - 1);
      for (std::int64_t h = 0; h < shape.group_size; h += kBf16Rows) {
        weigh(m * shape.group_size + h, std::min(kBf16Rows, shape.group_size - h));
      }
    }
  }

  void clear_value(std::int64_t key) {
    std::uint16_t* pair = values_ + key / 2 * value_stride_ + key % 2;
    for (std::int64_t e = 0; e < input_.shape.value_dim; ++e) pair[2 * e] = 0;
  }

  // Largest of row[0, count) * scale, NaN left out; the row is at least one vector long.
  static HWY_ATTR float largest_product(const float* HWY_RESTRICT row, std::int64_t count, float scale) {
    const __m512 f = _mm512_set1_ps(scale);
    // max(x, best) gives `best` where x is NaN.
    __m512 best = _mm512_set1_ps(kNegativeInfinity);
    __m512 second = best;
    std::int64_t j = 0;
    for (; j + 32 <= count; j += 32) {
      best = _mm512_max_ps(_mm512_mul_ps(_mm512_loadu_ps(row + j), f), best);
      second = _mm512_max_ps(_mm512_mul_ps(_mm512_loadu_ps(row + j + 16), f), second);
    }
    for (; j < count; j += 16) {
      const auto mask = static_cast<__mmask16>(count - j >= 16 ? 0xffff : (1 << (count - j)) - 1);
      best = _mm512_mask_max_ps(best, mask, _mm512_mul_ps(_mm512_loadu_ps(row + j), f), best);
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(second, best));
  }

  // out[0, count) = e^(row * scale - shift) as bf16, zeros behind up to `padded`; returns the sum before the rounding.
  static HWY_ATTR float probabilities_and_sum(const float* HWY_RESTRICT row, std::int64_t count, std::int64_t padded,
                                              float scale, float shift, std::uint16_t* HWY_RESTRICT out) {
    const __m512 f = _mm512_set1_ps(scale);
    const __m512 s = _mm512_set1_ps(shift);
    __m512 sum = _mm512_setzero_ps();
    __m512 second_sum = sum;
    std::int64_t j = 0;
    for (; j + 32 <= count; j += 32) {
      const __m512 first = shifted_exp(_mm512_loadu_ps(row + j), f, s);
      const __m512 second = shifted_exp(_mm512_loadu_ps(row + j + 16), f, s);
      sum = _mm512_add_ps(sum, first);
      second_sum = _mm512_add_ps(second_sum, second);
      _mm512_storeu_si512(out + j, round_to_bf16(first, second));
    }
    if (j < count) {
      const std::uint32_t left = (std::uint32_t{1} << (count - j)) - 1;  // fewer than 32
      const __m512 first =
          _mm512_maskz_mov_ps(static_cast<__mmask16>(left), shifted_exp(_mm512_loadu_ps(row + j), f, s));
      const auto high = static_cast<__mmask16>(left >> 16);
      const __m512 tail = high != 0 ? _mm512_loadu_ps(row + j + 16) : _mm512_setzero_ps();
      const __m512 second = _mm512_maskz_mov_ps(high, shifted_exp(tail, f, s));
      sum = _mm512_add_ps(sum, first);
      second_sum = _mm512_add_ps(second_sum, second);
      _mm512_storeu_si512(out + j, round_to_bf16(first, second));
      j += 32;
    }
    for (; j < padded; j += 32) _mm512_storeu_si512(out + j, _mm512_setzero_si512());
    return _mm512_reduce_add_ps(_mm512_add_ps(sum, second_sum));
  }

  // Rows [first, first + rows) of the members' rows.
  HWY_ATTR void score_rows(std::int64_t first, std::int64_t rows, float* scores) {
    const std::uint16_t* row_queries[kBf16Rows];
    for (std::int64_t r = 0; r < rows; ++r) row_queries[r] = queries_ + index_of(first + r) * inner_;
    Bf16Product product;
    product.rows = rows;
    product.cols = padded_columns(block_keys_);
    product.inner = inner_;
    product.a = row_queries;
    product.b = keys_;
    product.b_stride = key_stride_;
    product.c = scores;
    product.c_stride = score_stride_;
    input_.multiply_bf16(product);
  }

  // The same rows from their scores on.
  HWY_ATTR void weigh_rows(std::int64_t first, std::int64_t rows, const float* scores) {
    const AttentionShape& shape = input_.shape;
    const std::uint16_t* row_probabilities[kBf16Rows];
    float row_factor[kBf16Rows];
    const std::int64_t padded_keys = padded_inner(block_keys_);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t index = index_of(first + r);
      const std::int64_t visible = visible_keys(query_of(first + r));
      const float* row = scores + r * score_stride_;
      row_probabilities[r] = probabilities_ + r * probability_stride_;
      float& largest = largest_[index];
      float& total = totals_[index];
      const float before = largest;
      largest = std::max(before, largest_product(row, visible, input_.scale));
      const float shift = softmax_shift(largest);
      row_factor[r] = 1;
      if (largest != before) {  // what was summed so far was relative to the old maximum
        row_factor[r] =
            _mm512_cvtss_f32(shifted_exp(_mm512_set1_ps(before), _mm512_set1_ps(1.0f), _mm512_set1_ps(shift)));
        total *= row_factor[r];
      }
      total += probabilities_and_sum(row, visible, padded_keys, input_.scale, shift,
                                     probabilities_ + r * probability_stride_);
    }

    Bf16Product product;
    product.rows = rows;
    product.cols = shape.value_dim;
    product.inner = padded_keys;
    product.a = row_probabilities;
    product.b = values_;
    product.b_stride = value_stride_;
    product.c = products_;
    product.c_stride = product_stride_;
    input_.multiply_bf16(product);
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* HWY_RESTRICT from = products_ + r * product_stride_;
      float* HWY_RESTRICT sum = sums_ + index_of(first + r) * shape.value_dim;
      const __m512 f = _mm512_set1_ps(row_factor[r]);
      for (std::int64_t e = 0; e < shape.value_dim; e += 16) {
        _mm512_storeu_ps(sum + e, _mm512_fmadd_ps(_mm512_loadu_ps(sum + e), f, _mm512_loadu_ps(from + e)));
      }
    }
  }

  std::int64_t inner_;
  std::int64_t key_stride_;
  std::int64_t value_stride_;
  std::int64_t score_stride_;
  std::int64_t product_stride_;
  std::int64_t probability_stride_;
  std::uint16_t* queries_;
  std::uint16_t* keys_;
  std::uint16_t* values_;
  float* scores_;
  float* products_;
  std::uint16_t* probabilities_;
};

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET == HWY_AVX3

#endif  // MSA_CPU_ATTENTION_BF16_INL_H_
