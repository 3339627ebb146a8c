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

#include <hwy/cache_control.h>

#include <algorithm>
#include <cstdint>

#include "src/cpu/float8-inl.h"
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

/// Stores the two bf16 numbers of every word as columns of floats.
HWY_INLINE HWY_ATTR void store_pair(WordVec pairs, float* HWY_RESTRICT low, float* HWY_RESTRICT high) {
  const FloatTag df;
  const WordTag d;
  hn::Store(hn::BitCast(df, hn::ShiftLeft<16>(pairs)), df, low);
  hn::Store(hn::BitCast(df, hn::And(pairs, hn::Set(d, 0xffff0000u))), df, high);
}

/// Bytes [at, at + dim) of rows rows[0, 16) of float8 into columns [0, 16) of a strip, any of them NaN.
inline HWY_NOINLINE HWY_ATTR void pack16_one_by_one(const std::byte* const* rows, std::int64_t at, std::int64_t dim,
                                                    float* HWY_RESTRICT strip) {
  alignas(64) float wide[64];
  for (std::int64_t i = 0; i < 16; ++i) {
    load_row(rows[i] + at, DType::kFloat8E4M3, dim, wide);
    for (std::int64_t d = 0; d < dim; ++d) strip[d * kStripRows + i] = wide[d];
  }
}

/// Rows rows[0, 16) of float8 into columns [0, 16) of a strip: a word holds four dimensions, so that they are turned
/// before they are widened.
inline HWY_NOINLINE HWY_ATTR void pack16_f8(const std::byte* const* rows, std::int64_t ahead, std::int64_t dim,
                                            float* HWY_RESTRICT strip) {
  WordVec v[16];
  for (std::int64_t at = 0; at < dim; at += 64) {
    const std::int64_t words = std::min<std::int64_t>(64, dim - at) / 4;
    const auto mask = static_cast<__mmask16>((1u << words) - 1);
    unroll<16>([&](auto i) HWY_ATTR {
      v[i] = WordVec{_mm512_maskz_loadu_epi32(mask, rows[i] + at)};
      hwy::Prefetch(rows[i] + at + ahead);
    });
    __m512i largest = _mm512_setzero_si512();  // of the bytes times two: without their signs
    unroll<16>([&](auto i) HWY_ATTR { largest = _mm512_max_epu8(largest, _mm512_add_epi8(v[i].raw, v[i].raw)); });
    float* to = strip + at * kStripRows;
    if (_mm512_cmpgt_epu8_mask(largest, _mm512_set1_epi8(static_cast<char>(2 * 0x7e))) != 0) {
      pack16_one_by_one(rows, at, 4 * words, to);
      continue;
    }
    transpose16(v);
    unroll<16>([&](auto i) HWY_ATTR {
      if (i >= words) return;
      const __m512i bytes = v[i].raw;
      float* HWY_RESTRICT four = to + 4 * i * kStripRows;
      store_pair(WordVec{f8_to_bf16(_mm512_slli_epi16(bytes, 8), bytes)}, four, four + 2 * kStripRows);
      store_pair(WordVec{f8_to_bf16(bytes, _mm512_srli_epi16(bytes, 8))}, four + kStripRows, four + 3 * kStripRows);
    });
  }
}

/// Rows rows[0, 16) into columns [0, 16) of a strip. Not inlined: 16 vectors and what turns them need every register.
inline HWY_NOINLINE HWY_ATTR void pack16(const std::byte* const* rows, std::int64_t ahead, DType dtype,
                                         std::int64_t dim, float* HWY_RESTRICT strip) {
  if (dtype == DType::kFloat8E4M3) return pack16_f8(rows, ahead, dim, strip);
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
      unroll<16>([&](auto i) HWY_ATTR { store_pair(v[i], to + 2 * i * kStripRows, to + (2 * i + 1) * kStripRows); });
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
/// padded_columns(count) repeat the last row. What will be packed next lies `ahead` bytes behind, 0 if unknown.
inline HWY_ATTR void pack_strip(const std::byte* const* rows, std::int64_t count, DType dtype, std::int64_t dim,
                                float* HWY_RESTRICT strip, std::int64_t ahead = 0) {
  for (std::int64_t i = 0; i < count; i += 16) {
    if (i + 16 <= count) {
      pack16(rows + i, ahead, dtype, dim, strip + i);
      continue;
    }
    const std::byte* sixteen[16];
    for (std::int64_t n = 0; n < 16; ++n) sixteen[n] = rows[std::min(i + n, count - 1)];
    pack16(sixteen, ahead, dtype, dim, strip + i);
  }
}

#else

/// As above.
inline HWY_ATTR void pack_strip(const std::byte* const* rows, std::int64_t count, DType dtype, std::int64_t dim,
                                float* HWY_RESTRICT strip, std::int64_t = 0) {
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
