// SPDX-License-Identifier: Apache-2.0
// Strips: up to 32 rows of keys or queries side by side in lanes, strip[d * kStripRows + i] = element d of row i, the b
// that `product` reads. Turning rows is most of the work where few rows meet many keys, so AVX-512 has its own: patches
// of 16 x 16 words in registers, of bf16 two dimensions a word, of float8 four. Tested through the operators.
#if defined(MSA_CPU_STRIP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_STRIP_INL_H_
#undef MSA_CPU_STRIP_INL_H_
#else
#define MSA_CPU_STRIP_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "src/cpu/select_blocks_plan.h"
#include "src/cpu/tile-inl.h"

#if HWY_TARGET == HWY_AVX3
#include <immintrin.h>
#endif

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_AVX3

using WordTag = hn::RebindToUnsigned<FloatTag>;
using WordVec = hn::Vec<WordTag>;

/// Transposes 16 vectors of 16 words in place: 64 shuffles, as few as there can be, and 16 blends.
HWY_INLINE HWY_ATTR void transpose16(WordVec* HWY_RESTRICT v) {
  const WordTag d;
  const hn::RepartitionToWide<WordTag> dw;
  WordVec t[16];
  unroll<8>([&](auto i) HWY_ATTR {
    t[2 * i] = hn::InterleaveLower(d, v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = hn::InterleaveUpper(d, v[2 * i], v[2 * i + 1]);
  });
  // v[4 g + c]: in its 128-bit block L column 4 L + c of the rows 4 g .. 4 g + 3.
  unroll<4>([&](auto g) HWY_ATTR {
    unroll<2>([&](auto h) HWY_ATTR {
      const auto a = hn::BitCast(dw, t[4 * g + h]);
      const auto b = hn::BitCast(dw, t[4 * g + h + 2]);
      v[4 * g + 2 * h] = hn::BitCast(d, hn::InterleaveLower(dw, a, b));
      v[4 * g + 2 * h + 1] = hn::BitCast(d, hn::InterleaveUpper(dw, a, b));
    });
  });
  // 4 x 4 blocks: pairs of rows of blocks first, then halves.
  unroll<4>([&](auto c) HWY_ATTR {
    const auto even01 = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(v[4 + c]), v[c]);
    const auto odd01 = hn::OddEvenBlocks(v[4 + c], hn::SwapAdjacentBlocks(v[c]));
    const auto even23 = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(v[12 + c]), v[8 + c]);
    const auto odd23 = hn::OddEvenBlocks(v[12 + c], hn::SwapAdjacentBlocks(v[8 + c]));
    t[c] = hn::ConcatLowerLower(d, even23, even01);
    t[4 + c] = hn::ConcatLowerLower(d, odd23, odd01);
    t[8 + c] = hn::ConcatUpperUpper(d, even23, even01);
    t[12 + c] = hn::ConcatUpperUpper(d, odd23, odd01);
  });
  unroll<16>([&](auto i) HWY_ATTR { v[i] = t[i]; });
}

/// float8 numbers in the low bytes of 16-bit lanes as bf16, which every one of them is; their signs are given as bit 15
/// of `signs`. The magnitude plus one makes NaN 0 and subnormals 1 to 8: one comparison and one table serve both; the
/// others get their exponent by an addition.
HWY_INLINE HWY_ATTR __m512i f8_to_bf16(__m512i bytes, __m512i signs) {
  const __m512i next = _mm512_and_si512(_mm512_add_epi16(bytes, _mm512_set1_epi16(1)), _mm512_set1_epi16(0x7f));
  const __m512i table = _mm512_castsi128_si512(  // NaN, then k * 2^-9
      _mm_setr_epi16(0x7fc0, 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40));
  const __m512i last = _mm512_inserti32x4(table, _mm_setr_epi16(0x3c60, 0, 0, 0, 0, 0, 0, 0), 1);
  const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(next, 4), _mm512_set1_epi16((120 << 7) - 16));
  const __mmask32 is_special = _mm512_cmple_epu16_mask(next, _mm512_set1_epi16(8));
  const __m512i magnitude = _mm512_mask_permutexvar_epi16(normal, is_special, next, last);
  constexpr int kOrAnd = 0xf8;  // a | (b & c)
  return _mm512_ternarylogic_epi32(magnitude, signs, _mm512_set1_epi16(INT16_MIN), kOrAnd);
}

/// Stores the two bf16 numbers of every word as columns of floats.
HWY_INLINE HWY_ATTR void store_pair(WordVec pairs, float* HWY_RESTRICT low, float* HWY_RESTRICT high) {
  const FloatTag df;
  const WordTag d;
  hn::Store(hn::BitCast(df, hn::ShiftLeft<16>(pairs)), df, low);
  hn::Store(hn::BitCast(df, hn::And(pairs, hn::Set(d, 0xffff0000u))), df, high);
}

/// Rows rows[0, 16) of float8 into columns [0, 16) of a strip: a word holds four dimensions, so that they are turned
/// before they are widened.
HWY_INLINE HWY_ATTR void pack16_f8(const std::byte* const* rows, std::int64_t dim, float* HWY_RESTRICT strip) {
  WordVec v[16];
  for (std::int64_t at = 0; at < dim; at += 64) {
    const std::int64_t words = std::min<std::int64_t>(64, dim - at) / 4;
    const auto mask = static_cast<__mmask16>((1u << words) - 1);
    unroll<16>([&](auto i) HWY_ATTR { v[i] = WordVec{_mm512_maskz_loadu_epi32(mask, rows[i] + at)}; });
    transpose16(v);
    float* to = strip + at * kStripRows;
    for (std::int64_t i = 0; i < words; ++i) {
      const __m512i even = f8_to_bf16(v[i].raw, _mm512_slli_epi16(v[i].raw, 8));
      const __m512i odd = f8_to_bf16(_mm512_srli_epi16(v[i].raw, 8), v[i].raw);
      store_pair(WordVec{even}, to, to + 2 * kStripRows);
      store_pair(WordVec{odd}, to + kStripRows, to + 3 * kStripRows);
      to += 4 * kStripRows;
    }
  }
}

/// Rows rows[0, 16) into columns [0, 16) of a strip.
HWY_INLINE HWY_ATTR void pack16(const std::byte* const* rows, DType dtype, std::int64_t dim,
                                float* HWY_RESTRICT strip) {
  if (dtype == DType::kFloat8E4M3) return pack16_f8(rows, dim, strip);
  const FloatTag df;
  const WordTag d;
  WordVec v[16];
  std::int64_t at = 0;
  if (dtype == DType::kBFloat16) {
    for (; at + 32 <= dim; at += 32) {  // a word holds two dimensions
      unroll<16>([&](auto i)
                     HWY_ATTR { v[i] = hn::LoadU(d, reinterpret_cast<const std::uint32_t*>(rows[i] + at * 2)); });
      transpose16(v);
      float* to = strip + at * kStripRows;
      unroll<16>([&](auto i)
                     HWY_ATTR { store_pair(v[i], to + 2 * i * kStripRows, to + (2 * i + 1) * kStripRows); });
    }
  }
  for (; at < dim; at += 16) {
    if (dtype == DType::kFloat32) {
      unroll<16>([&](auto i)
                     HWY_ATTR { v[i] = hn::LoadU(d, reinterpret_cast<const std::uint32_t*>(rows[i] + at * 4)); });
    } else {
      alignas(64) float wide[16 * 16];
      const auto begin = at * static_cast<std::int64_t>(dtype_size(dtype));
      for (std::int64_t i = 0; i < 16; ++i) load_row(rows[i] + begin, dtype, 16, wide + i * 16);
      unroll<16>([&](auto i) HWY_ATTR { v[i] = hn::BitCast(d, hn::Load(df, wide + 16 * i)); });
    }
    transpose16(v);
    float* to = strip + at * kStripRows;
    unroll<16>([&](auto i) HWY_ATTR { hn::Store(hn::BitCast(df, v[i]), df, to + i * kStripRows); });
  }
}

/// Rows rows[0, count), count in [1, kStripRows], into a strip aligned to cache lines. The columns up to
/// padded_columns(count) repeat the last row.
inline HWY_ATTR void pack_strip(const std::byte* const* rows, std::int64_t count, DType dtype, std::int64_t dim,
                                float* HWY_RESTRICT strip) {
  for (std::int64_t i = 0; i < count; i += 16) {
    const std::byte* sixteen[16];
    for (std::int64_t n = 0; n < 16; ++n) sixteen[n] = rows[std::min(i + n, count - 1)];
    pack16(sixteen, dtype, dim, strip + i);
  }
}

#else

/// As above.
inline HWY_ATTR void pack_strip(const std::byte* const* rows, std::int64_t count, DType dtype, std::int64_t dim,
                                float* HWY_RESTRICT strip) {
  constexpr std::int64_t kRowsAtOnce = 4;  // what `transpose` takes at a time
  alignas(64) float wide[kRowsAtOnce * kMaxHeadDim];
  for (std::int64_t i = 0; i < padded_columns(count); i += kRowsAtOnce) {
    for (std::int64_t n = 0; n < kRowsAtOnce; ++n) {
      load_row(rows[std::min(i + n, count - 1)], dtype, dim, wide + n * dim);
    }
    transpose(wide, dim, kRowsAtOnce, dim, strip + i, kStripRows);
  }
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_STRIP_INL_H_
