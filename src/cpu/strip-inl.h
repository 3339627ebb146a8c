// SPDX-License-Identifier: Apache-2.0
// Strips: up to 32 rows of keys or queries side by side in lanes, strip[d * kStripRows + i] = element d of row i, the b
// that `product` reads. Turning rows is most of the work where few rows meet many keys, so AVX-512 has its own: patches
// of 16 x 16 words in registers, of bf16 two dimensions a word. Tested through the operators.
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

/// Rows rows[0, 16) into columns [0, 16) of a strip.
HWY_INLINE HWY_ATTR void pack16(const std::byte* const* rows, DType dtype, std::int64_t dim,
                                float* HWY_RESTRICT strip) {
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
      unroll<16>([&](auto i) HWY_ATTR {
        hn::Store(hn::BitCast(df, hn::ShiftLeft<16>(v[i])), df, to + 2 * i * kStripRows);
        hn::Store(hn::BitCast(df, hn::And(v[i], hn::Set(d, 0xffff0000u))), df, to + (2 * i + 1) * kStripRows);
      });
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
