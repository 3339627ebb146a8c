// SPDX-License-Identifier: Apache-2.0
// See dot_peaks.h. Values are small and positive, so that sums stay finite and no lane is subnormal.
#include "bench/dot_peaks.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "src/cpu/amx_tiles.h"
#include "src/cpu/dot_products.h"

#define MSA_BF16_TARGET __attribute__((target("avx512f,avx512bf16")))
#define MSA_INT8_TARGET __attribute__((target("avx512f,avx512vnni")))

namespace msa::bench {
namespace {

// Latency 4 to 6 cycles, one or two a cycle: 12 chains.
constexpr int kChains = 12;

MSA_BF16_TARGET double bf16_dot_loop(std::int64_t steps, float* sink) {
  const auto factor = (__m512bh)_mm512_set1_epi16(0x3c24);  // 0.01
  __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0;
  __m512 s6 = s0, s7 = s0, s8 = s0, s9 = s0, s10 = s0, s11 = s0;
  for (std::int64_t i = 0; i < steps; ++i) {
    s0 = _mm512_dpbf16_ps(s0, factor, factor), s1 = _mm512_dpbf16_ps(s1, factor, factor);
    s2 = _mm512_dpbf16_ps(s2, factor, factor), s3 = _mm512_dpbf16_ps(s3, factor, factor);
    s4 = _mm512_dpbf16_ps(s4, factor, factor), s5 = _mm512_dpbf16_ps(s5, factor, factor);
    s6 = _mm512_dpbf16_ps(s6, factor, factor), s7 = _mm512_dpbf16_ps(s7, factor, factor);
    s8 = _mm512_dpbf16_ps(s8, factor, factor), s9 = _mm512_dpbf16_ps(s9, factor, factor);
    s10 = _mm512_dpbf16_ps(s10, factor, factor), s11 = _mm512_dpbf16_ps(s11, factor, factor);
    // All chains hold the same values: without this a compiler may keep one of them.
    __asm__ volatile("" : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5));
    __asm__ volatile("" : "+v"(s6), "+v"(s7), "+v"(s8), "+v"(s9), "+v"(s10), "+v"(s11));
  }
  *sink = _mm512_cvtss_f32(s0);
  return static_cast<double>(steps) * kChains * 64;  // 16 lanes, 2 products and 2 additions each
}

MSA_INT8_TARGET double int8_dot_loop(std::int64_t steps, float* sink) {
  const __m512i factor = _mm512_set1_epi8(1);
  __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0;
  __m512i s6 = s0, s7 = s0, s8 = s0, s9 = s0, s10 = s0, s11 = s0;
  for (std::int64_t i = 0; i < steps; ++i) {
    s0 = _mm512_dpbusd_epi32(s0, factor, factor), s1 = _mm512_dpbusd_epi32(s1, factor, factor);
    s2 = _mm512_dpbusd_epi32(s2, factor, factor), s3 = _mm512_dpbusd_epi32(s3, factor, factor);
    s4 = _mm512_dpbusd_epi32(s4, factor, factor), s5 = _mm512_dpbusd_epi32(s5, factor, factor);
    s6 = _mm512_dpbusd_epi32(s6, factor, factor), s7 = _mm512_dpbusd_epi32(s7, factor, factor);
    s8 = _mm512_dpbusd_epi32(s8, factor, factor), s9 = _mm512_dpbusd_epi32(s9, factor, factor);
    s10 = _mm512_dpbusd_epi32(s10, factor, factor), s11 = _mm512_dpbusd_epi32(s11, factor, factor);
    __asm__ volatile("" : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5));
    __asm__ volatile("" : "+v"(s6), "+v"(s7), "+v"(s8), "+v"(s9), "+v"(s10), "+v"(s11));
  }
  *sink = static_cast<float>(_mm512_cvtsi512_si32(s0));
  return static_cast<double>(steps) * kChains * 128;
}

// A tile instruction takes 16 cycles and its result is there after 52: four chains keep the unit busy.
constexpr int kTileChains = 4;

MSA_AMX_TARGET void load_factors(std::uint8_t first, std::uint8_t second) {
  alignas(64) std::uint8_t bytes[1024];
  for (int i = 0; i < 1024; i += 2) bytes[i] = first, bytes[i + 1] = second;
  __asm__ volatile("" ::: "memory");  // g++ does not know that a tile load reads memory
  _tile_loadd(4, bytes, 64);
  _tile_loadd(5, bytes, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

MSA_AMX_TARGET float store_result() {
  alignas(64) float values[256];
  _tile_stored(0, values, 64);
  return values[0];
}

MSA_AMX_TARGET double bf16_amx_loop(std::int64_t steps, float* sink) {
  const cpu::AmxTiles tiles;
  load_factors(0x24, 0x3c);  // 0.01
  for (std::int64_t i = 0; i < steps; ++i) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  *sink = store_result();
  return static_cast<double>(steps) * kTileChains * 2 * 16 * 16 * 32;
}

MSA_AMX_TARGET double int8_amx_loop(std::int64_t steps, float* sink) {
  const cpu::AmxTiles tiles;
  load_factors(1, 1);
  for (std::int64_t i = 0; i < steps; ++i) {
    _tile_dpbusd(0, 4, 5);
    _tile_dpbusd(1, 4, 5);
    _tile_dpbusd(2, 4, 5);
    _tile_dpbusd(3, 4, 5);
  }
  *sink = store_result();
  return static_cast<double>(steps) * kTileChains * 2 * 16 * 16 * 64;
}

}  // namespace

PeakLoop find_dot_loop(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::kFloat: return nullptr;
    case Arithmetic::kBf16Dot: return __builtin_cpu_supports("avx512bf16") ? bf16_dot_loop : nullptr;
    case Arithmetic::kInt8Dot: return __builtin_cpu_supports("avx512vnni") ? int8_dot_loop : nullptr;
    case Arithmetic::kBf16Amx: return cpu::detect_dot_products() == cpu::DotProducts::kAmx ? bf16_amx_loop : nullptr;
    case Arithmetic::kInt8Amx: return cpu::detect_dot_products() == cpu::DotProducts::kAmx ? int8_amx_loop : nullptr;
  }
  return nullptr;
}

}  // namespace msa::bench

#else

namespace msa::bench {

PeakLoop find_dot_loop(Arithmetic) { return nullptr; }

}  // namespace msa::bench

#endif  // defined(__x86_64__)
