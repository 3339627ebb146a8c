// SPDX-License-Identifier: Apache-2.0
// bf16 products with vdpbf16ps: a lane holds one column's sum, a step adds the product of one pair. See bf16_dot.h.
#if defined(__x86_64__)

#include "src/cpu/bf16_dot.h"

#include <immintrin.h>

#define MSA_BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace msa::cpu {
namespace {

// 8 x 3 sums, 3 columns' pairs and one broadcast pair: 28 of 32 registers. The instruction takes 6 to 8 cycles and one
// starts a cycle, so 8 sums in flight are needed; 24 leave 11 loads to 24 products, below the two loads a cycle.
constexpr int kRows = 8;
constexpr int kVecs = 3;

template <int kR, int kV>
MSA_BF16_TARGET inline __attribute__((always_inline)) void tile(const Bf16Product& p, std::int64_t row,
                                                                std::int64_t column) {
  __m512 sum[kR][kV];
  const std::uint16_t* a[kR];
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i) {
    a[i] = p.a[row + i];
#pragma GCC unroll 3
    for (int j = 0; j < kV; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  const std::uint16_t* b = p.b + 2 * column;
  for (std::int64_t k = 0; k < p.inner; k += 2, b += p.b_stride) {
    __m512bh pairs[kV];
#pragma GCC unroll 3
    for (int j = 0; j < kV; ++j) pairs[j] = (__m512bh)_mm512_loadu_si512(b + j * 32);
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i) {
      int pair;
      __builtin_memcpy(&pair, a[i] + k, sizeof pair);
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
      for (int j = 0; j < kV; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], factor, pairs[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < kV; ++j) _mm512_storeu_ps(p.c + (row + i) * p.c_stride + column + j * 16, sum[i][j]);
  }
}

template <int kV>
MSA_BF16_TARGET void strip(const Bf16Product& p, std::int64_t column) {
  std::int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) tile<kRows, kV>(p, row, column);
  if (p.rows - row >= 4) {
    tile<4, kV>(p, row, column);
    row += 4;
  }
  for (; row < p.rows; ++row) tile<1, kV>(p, row, column);
}

}  // namespace

void multiply_bf16_avx512(const Bf16Product& p) {
  std::int64_t column = 0;
  for (; column + 16 * kVecs <= p.cols; column += 16 * kVecs) strip<kVecs>(p, column);
  if (p.cols - column == 32) {
    strip<2>(p, column);
  } else if (p.cols - column == 16) {
    strip<1>(p, column);
  }
}

}  // namespace msa::cpu

#endif  // defined(__x86_64__)
