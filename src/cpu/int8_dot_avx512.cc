// SPDX-License-Identifier: Apache-2.0
// See int8_dot.h: AVX-512 VNNI. vpdpbusd adds four products of bytes to each of 16 lanes; a lane is a row, and four
// consecutive dimensions of a key are broadcast to all of them, so the maximum over keys needs no shuffle. Tested in
// tests/unit/screen_test.cc.
#include "src/cpu/int8_dot.h"

#if defined(__x86_64__)

// g++ 12 would otherwise keep a copy of every sum from step to step, at a third of the speed.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-pre")
#endif

#include <immintrin.h>

#include <cstring>

#define MSA_VNNI_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

namespace msa::cpu {
namespace {

using IntVec = int __attribute__((vector_size(64)));  // for its comparison: g++ 12 warns of _mm512_max_epi32

// A register tile of kKeys keys x kGroups groups of rows. Its sums must cover the latency of vpdpbusd (5 cycles x 2 a
// cycle), and a step may load twice a cycle: 8 x 2 sums take 10 loads for 16 products, 16 x 1 take 17.
template <int kKeys, int kGroups>
MSA_VNNI_TARGET inline void tile_max(const std::uint8_t* keys, std::int64_t dim, const std::int8_t* rows,
                                     __m512i* best) {
  __m512i sums[kKeys * kGroups];
#pragma GCC unroll 16
  for (int t = 0; t < kKeys * kGroups; ++t) sums[t] = _mm512_setzero_si512();
  const std::int64_t group_bytes = kInt8Rows * dim;
  for (std::int64_t d = 0; d < dim; d += 4) {
    __m512i row[kGroups];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) row[g] = _mm512_load_si512(rows + g * group_bytes + d * kInt8Rows);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      std::int32_t four = 0;
      std::memcpy(&four, keys + j * dim + d, sizeof four);
      const __m512i key = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        sums[j * kGroups + g] = _mm512_dpbusd_epi32(sums[j * kGroups + g], key, row[g]);
      }
    }
  }
#pragma GCC unroll 2
  for (int g = 0; g < kGroups; ++g) {
    auto largest = reinterpret_cast<IntVec>(best[g]);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      const auto sum = reinterpret_cast<IntVec>(sums[j * kGroups + g]);
      largest = sum > largest ? sum : largest;
    }
    best[g] = reinterpret_cast<__m512i>(largest);
  }
}

template <int kKeys, int kGroups>
MSA_VNNI_TARGET void groups_max(const std::uint8_t* keys, std::int64_t key_count, std::int64_t dim,
                                const std::int8_t* rows, std::int32_t* largest) {
  __m512i best[kGroups];
#pragma GCC unroll 2
  for (int g = 0; g < kGroups; ++g) best[g] = _mm512_set1_epi32(INT32_MIN);
  for (std::int64_t j = 0; j < key_count; j += kKeys) tile_max<kKeys, kGroups>(keys + j * dim, dim, rows, best);
#pragma GCC unroll 2
  for (int g = 0; g < kGroups; ++g) _mm512_storeu_si512(largest + g * kInt8Rows, best[g]);
}

}  // namespace

MSA_VNNI_TARGET void int8_block_max_avx512(const std::uint8_t* keys, std::int64_t key_count, std::int64_t dim,
                                           const std::int8_t* rows, std::int64_t groups, std::int32_t* largest) {
  const std::int64_t group_bytes = kInt8Rows * dim;
  std::int64_t g = 0;
  for (; g + 2 <= groups; g += 2) {
    groups_max<8, 2>(keys, key_count, dim, rows + g * group_bytes, largest + g * kInt8Rows);
  }
  if (g < groups) groups_max<16, 1>(keys, key_count, dim, rows + g * group_bytes, largest + g * kInt8Rows);
}

}  // namespace msa::cpu

#endif  // defined(__x86_64__)
