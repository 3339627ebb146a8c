// SPDX-License-Identifier: Apache-2.0
// float8_e4m3 widened to bf16 in registers, 32 numbers at a time: keys and values of attention, index keys of
// selection. AVX-512 only; elsewhere load_row widens to float. Tested in tests/unit/float8_test.cc.
#if defined(MSA_CPU_FLOAT8_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_FLOAT8_INL_H_
#undef MSA_CPU_FLOAT8_INL_H_
#else
#define MSA_CPU_FLOAT8_INL_H_
#endif

#include "src/cpu/tile-inl.h"

#if HWY_TARGET == HWY_AVX3

#include <immintrin.h>

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// float8 numbers other than NaN, in the high bytes of 16-bit lanes, as bf16: an arithmetic shift moves the number and
/// keeps its sign, one addition sets the exponent. Subnormals take what is added from a table, by the same numbers in
/// the low bytes.
HWY_INLINE HWY_ATTR __m512i f8_to_bf16(__m512i high, __m512i low) {
  const __m512i number = _mm512_and_si512(_mm512_srai_epi16(high, 4), _mm512_set1_epi16(static_cast<short>(0x87f0)));
  const __mmask32 is_subnormal = _mm512_testn_epi16_mask(number, _mm512_set1_epi16(0x780));
  constexpr auto from = [](int value, int k) {
    return static_cast<short>(value - (k << 4));
  };  // k * 2^-9, less the number
  const __m512i table =
      _mm512_castsi128_si512(_mm_setr_epi16(0, from(0x3b00, 1), from(0x3b80, 2), from(0x3bc0, 3), from(0x3c00, 4),
                                            from(0x3c20, 5), from(0x3c40, 6), from(0x3c60, 7)));
  return _mm512_add_epi16(number, _mm512_mask_permutexvar_epi16(_mm512_set1_epi16(120 << 7), is_subnormal, low, table));
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET == HWY_AVX3

#endif  // MSA_CPU_FLOAT8_INL_H_
