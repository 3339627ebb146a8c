// SPDX-License-Identifier: Apache-2.0
// See attention_amx.h. Two tiles of rows go together, so that a tile of keys or values is loaded once for two products;
// scores become probabilities in place; sums are the products' accumulators, loaded and stored once a visit.
#if defined(__x86_64__)

// GCC 12 warns of the undefined vectors inside its own intrinsics (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <limits>

#include "src/cpu/attention_amx.h"

#include "src/cpu/amx_tiles.h"

#define MSA_AMX_INLINE MSA_AMX_TARGET inline __attribute__((always_inline))

namespace msa::cpu {
namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// Maxima up to here leave the fused exponents below right to 2e-5, so that the largest probability is 1 after its
// rounding to bf16. Larger ones need the product rounded as it was for the maximum, which then gives exactly 1.
constexpr float kFusedLargest = 128;
constexpr float kLog2E = 1.44269504f;

// Tiles of b pass by once a visit: streaming loads keep them from pushing scores and sums out of the L1 cache.
// kRowTiles x kColTiles tiles of sums += a * b over `steps` tiles of 32; the tiles of a column of b follow each other.
template <int kRowTiles, int kColTiles>
MSA_AMX_INLINE void multiply_tiles(const std::uint16_t* a0, const std::uint16_t* a1, std::int64_t a_step,
                                   const std::uint16_t* b, std::int64_t steps) {
  const std::uint16_t* b1 = b + steps * kTileElements;
  for (std::int64_t k = 0; k < steps; ++k) {
    _tile_stream_loadd(6, b + k * kTileElements, 64);
    _tile_loadd(4, a0 + k * a_step, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColTiles == 2) {
      _tile_stream_loadd(7, b1 + k * kTileElements, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, a1 + k * a_step, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColTiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

template <int kRowTiles, int kColTiles>
MSA_AMX_INLINE void store_tiles(float* c0, float* c1) {
  _tile_stored(0, c0, 64);
  if constexpr (kColTiles == 2) _tile_stored(1, c0 + kTileSums, 64);
  if constexpr (kRowTiles == 2) {
    _tile_stored(2, c1, 64);
    if constexpr (kColTiles == 2) _tile_stored(3, c1 + kTileSums, 64);
  }
}

template <int kRowTiles, int kColTiles>
MSA_AMX_INLINE void score_columns(const AmxVisit& v, std::int64_t tile, std::int64_t row_tile_floats) {
  _tile_zero(0);
  if constexpr (kColTiles == 2) _tile_zero(1);
  if constexpr (kRowTiles == 2) _tile_zero(2);
  if constexpr (kRowTiles == 2 && kColTiles == 2) _tile_zero(3);
  multiply_tiles<kRowTiles, kColTiles>(v.rows[0].queries, v.rows[kRowTiles - 1].queries, kTileElements,
                                       v.keys + tile * v.head_steps * kTileElements, v.head_steps);
  float* c = v.scores + tile * kTileSums;
  store_tiles<kRowTiles, kColTiles>(c, c + row_tile_floats);
}

template <int kRowTiles, int kColTiles>
MSA_AMX_INLINE void value_columns(const AmxVisit& v, std::int64_t tile, std::int64_t row_tile_floats,
                                  std::int64_t key_steps) {
  float* c0 = v.rows[0].sums + tile * kTileSums;
  float* c1 = v.rows[kRowTiles - 1].sums + tile * kTileSums;
  _tile_loadd(0, c0, 64);
  if constexpr (kColTiles == 2) _tile_loadd(1, c0 + kTileSums, 64);
  if constexpr (kRowTiles == 2) {
    _tile_loadd(2, c1, 64);
    if constexpr (kColTiles == 2) _tile_loadd(3, c1 + kTileSums, 64);
  }
  const auto* p = reinterpret_cast<const std::uint16_t*>(v.scores);
  multiply_tiles<kRowTiles, kColTiles>(p, p + 2 * row_tile_floats, 2 * kTileElements,
                                       v.values + tile * key_steps * kTileElements, key_steps);
  store_tiles<kRowTiles, kColTiles>(c0, c1);
}

struct Larger {
  static MSA_AMX_INLINE __m512 of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};
struct Sum {
  static MSA_AMX_INLINE __m512 of(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};

// Lane i: the sixteen lanes of in[i] taken together, in an order that is the same for every i.
template <class Op>
MSA_AMX_INLINE __m512 reduce_rows(const float* in) {
  __m512 a[8];
  for (int i = 0; i < 8; ++i) {
    const __m512 x = _mm512_loadu_ps(in + 16 * i);
    const __m512 y = _mm512_loadu_ps(in + 16 * (i + 8));
    a[i] = Op::of(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));  // quarters: i, i, i+8, i+8
  }
  __m512 b[4];
  for (int i = 0; i < 4; ++i) {  // quarters: i, i+8, i+4, i+12
    b[i] = Op::of(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
  }
  __m512 c[2];
  for (int i = 0; i < 2; ++i) {  // a quarter: i, i+2, i, i+2
    c[i] = Op::of(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
  }
  const __m512 d = Op::of(_mm512_shuffle_ps(c[0], c[1], 0x44), _mm512_shuffle_ps(c[0], c[1], 0xee));
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15), d);
}

MSA_AMX_INLINE __mmask16 first_of_16(std::int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// 2^x to within 3e-6 of it, far below a rounding to bf16; 0 of -inf, NaN of NaN.
MSA_AMX_INLINE __m512 exp2_lanes(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 1);  // x less its floor, which is what scalef takes of x
  // 2^r, 0 <= r < 1: degree 4, fitted to the least largest relative error, 1 at 0.
  __m512 p = _mm512_set1_ps(1.34267351e-2f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.22423926e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.41280243e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93044840e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

// What a row's scores are multiplied by and what is subtracted, on their way to exponents of 2.
struct Exponents {
  __m512 scale;
  __m512 shift;
};
template <bool kFused>
MSA_AMX_INLINE __m512 exponents(const float* scores, const Exponents& e) {
  const __m512 s = _mm512_loadu_ps(scores);
  if constexpr (kFused) return _mm512_fmsub_ps(s, e.scale, e.shift);
  return _mm512_mul_ps(_mm512_sub_ps(_mm512_mul_ps(s, e.scale), e.shift), _mm512_set1_ps(kLog2E));
}

// Words of 32 bits: the first's bf16 below, the second's above, ties away from zero. For probabilities, which are never
// so large that the rounding could overflow. NaN may lose its meaning: the row's total keeps it.
MSA_AMX_INLINE __m512i round_to_pairs(__m512 first, __m512 second) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(first), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(second), half);
  return _mm512_mask_mov_epi16(high, 0x55555555, low);
}

// The row's largest score, lane by lane; NaN left out: max(x, best) gives `best` where x is NaN.
MSA_AMX_INLINE __m512 largest_lanes(const float* row, std::int64_t key_tiles) {
  __m512 best = _mm512_set1_ps(kNegativeInfinity);
  __m512 second = best;
  for (std::int64_t t = 0; t < key_tiles; t += 2) {
    best = _mm512_max_ps(_mm512_loadu_ps(row + t * kTileSums), best);
    second = _mm512_max_ps(_mm512_loadu_ps(row + (t + 1) * kTileSums), second);
  }
  return _mm512_max_ps(best, second);
}
MSA_AMX_INLINE __m512 largest_visible_lanes(const float* row, std::int64_t visible) {
  __m512 best = _mm512_set1_ps(kNegativeInfinity);
  for (std::int64_t j = 0; j < visible; j += 16) {
    best = _mm512_mask_max_ps(best, first_of_16(visible - j), _mm512_loadu_ps(row + j * 16), best);
  }
  return best;
}

// The row's scores become probabilities, pairs in the even tiles; returns their sum before the rounding, lane by lane.
MSA_AMX_INLINE __m512 probabilities(float* row, std::int64_t key_tiles, const Exponents& e) {
  __m512 sum = _mm512_setzero_ps();
  __m512 second_sum = sum;
  for (std::int64_t t = 0; t < key_tiles; t += 2) {
    float* at = row + t * kTileSums;
    const __m512 first = exp2_lanes(exponents<true>(at, e));
    const __m512 second = exp2_lanes(exponents<true>(at + kTileSums, e));
    sum = _mm512_add_ps(sum, first);
    second_sum = _mm512_add_ps(second_sum, second);
    _mm512_storeu_si512(at, round_to_pairs(first, second));
  }
  return _mm512_add_ps(sum, second_sum);
}
// The same for a row that sees `visible` keys only; the same bits when it sees all.
template <bool kFused>
MSA_AMX_INLINE __m512 visible_probabilities(float* row, std::int64_t key_tiles, std::int64_t visible,
                                            const Exponents& e) {
  __m512 sum = _mm512_setzero_ps();
  __m512 second_sum = sum;
  for (std::int64_t t = 0; t < key_tiles; t += 2) {
    float* at = row + t * kTileSums;
    const __m512 first = _mm512_maskz_mov_ps(first_of_16(visible - t * 16), exp2_lanes(exponents<kFused>(at, e)));
    const __m512 second =
        _mm512_maskz_mov_ps(first_of_16(visible - t * 16 - 16), exp2_lanes(exponents<kFused>(at + kTileSums, e)));
    sum = _mm512_add_ps(sum, first);
    second_sum = _mm512_add_ps(second_sum, second);
    _mm512_storeu_si512(at, round_to_pairs(first, second));
  }
  return _mm512_add_ps(sum, second_sum);
}

MSA_AMX_TARGET void multiply_row(float* sums, std::int64_t value_tiles, float factor) {
  const __m512 f = _mm512_set1_ps(factor);
  for (std::int64_t t = 0; t < value_tiles; ++t) {
    _mm512_storeu_ps(sums + t * kTileSums, _mm512_mul_ps(_mm512_loadu_ps(sums + t * kTileSums), f));
  }
}

// A row's share of the lines to fetch ahead.
MSA_AMX_INLINE void ask_ahead(const AmxVisit& v, std::int64_t part, std::int64_t parts) {
  for (std::int64_t i = part * v.ahead_count / parts; i < (part + 1) * v.ahead_count / parts; ++i) {
    const auto* line = static_cast<const char*>(v.ahead[i].first);
    for (std::int32_t l = 0; l < v.ahead[i].count; ++l) _mm_prefetch(line + 64 * l, _MM_HINT_T1);
  }
}

// Scores of one tile of rows to probabilities; maxima, totals and, where a maximum rises, sums follow.
MSA_AMX_TARGET void softmax_tile(const AmxVisit& v, int tile, float* scores) {
  const AmxRows& rows = v.rows[tile];
  alignas(64) float lanes[16 * 16];
  alignas(64) float shifts[16];
  const __m512 scale = _mm512_set1_ps(v.scale);
  if (rows.visible == nullptr) {
#pragma GCC unroll 4
    for (int r = 0; r < 16; ++r) _mm512_store_ps(lanes + 16 * r, largest_lanes(scores + 16 * r, v.key_tiles));
  } else {
    for (int r = 0; r < 16; ++r) {
      _mm512_store_ps(lanes + 16 * r, largest_visible_lanes(scores + 16 * r, rows.visible[r]));
    }
  }
  const __m512 none = _mm512_set1_ps(kNegativeInfinity);
  const __m512 before = _mm512_loadu_ps(rows.largest);
  const __m512 after = _mm512_max_ps(_mm512_mul_ps(reduce_rows<Larger>(lanes), scale), before);
  const __mmask16 is_known = _mm512_cmp_ps_mask(after, none, _CMP_NEQ_UQ);
  const __mmask16 rises = _mm512_cmp_ps_mask(after, before, _CMP_NEQ_UQ) &
                          _mm512_cmp_ps_mask(before, none, _CMP_NEQ_UQ);  // before the first score all sums are 0
  __m512 totals = _mm512_loadu_ps(rows.totals);
  if (rises != 0) {  // what was summed so far was relative to the old maximum
    alignas(64) float factors[16];
    const __m512 factor = exp2_lanes(_mm512_mul_ps(_mm512_sub_ps(before, after), _mm512_set1_ps(kLog2E)));
    _mm512_store_ps(factors, factor);
    totals = _mm512_mask_mul_ps(totals, rises, totals, factor);
    for (unsigned left = rises; left != 0; left &= left - 1) {
      const int r = __builtin_ctz(left);
      multiply_row(rows.sums + 16 * r, v.value_tiles, factors[r]);
    }
  }
  _mm512_storeu_ps(rows.largest, after);
  // Nothing but -inf so far: 0, so that those give 2^-inf = 0 and not 2^(inf - inf).
  const __m512 shift = _mm512_maskz_mov_ps(is_known, after);
  const __mmask16 fused = _mm512_cmp_ps_mask(_mm512_abs_ps(shift), _mm512_set1_ps(kFusedLargest), _CMP_LE_OQ);
  _mm512_store_ps(shifts, _mm512_mask_mul_ps(shift, fused, shift, _mm512_set1_ps(kLog2E)));
  const __m512 fused_scale = _mm512_set1_ps(v.scale * kLog2E);
  if (rows.visible == nullptr && fused == 0xffff) {
    for (int r = 0; r < 16; ++r) {
      const Exponents e = {fused_scale, _mm512_set1_ps(shifts[r])};
      _mm512_store_ps(lanes + 16 * r, probabilities(scores + 16 * r, v.key_tiles, e));
      ask_ahead(v, tile * 16 + r, v.row_tiles * 16);
    }
  } else {
    for (int r = 0; r < 16; ++r) {
      const std::int64_t visible = rows.visible == nullptr ? v.key_tiles * 16 : rows.visible[r];
      const bool is_fused = (fused >> r & 1) != 0;
      const Exponents e = {is_fused ? fused_scale : scale, _mm512_set1_ps(shifts[r])};
      _mm512_store_ps(lanes + 16 * r, is_fused
                                          ? visible_probabilities<true>(scores + 16 * r, v.key_tiles, visible, e)
                                          : visible_probabilities<false>(scores + 16 * r, v.key_tiles, visible, e));
      ask_ahead(v, tile * 16 + r, v.row_tiles * 16);
    }
  }
  _mm512_storeu_ps(rows.totals, _mm512_add_ps(totals, reduce_rows<Sum>(lanes)));
}

template <int kRowTiles>
MSA_AMX_TARGET void attend_rows(const AmxVisit& v) {
  const std::int64_t key_steps = (v.key_tiles + 1) / 2;
  const std::int64_t row_tile_floats = 2 * key_steps * kTileSums;
  std::int64_t tile = 0;
  for (; tile + 2 <= v.key_tiles; tile += 2) score_columns<kRowTiles, 2>(v, tile, row_tile_floats);
  if (tile < v.key_tiles) score_columns<kRowTiles, 1>(v, tile, row_tile_floats);
  for (int t = 0; t < kRowTiles; ++t) softmax_tile(v, t, v.scores + t * row_tile_floats);
  for (tile = 0; tile + 2 <= v.value_tiles; tile += 2) value_columns<kRowTiles, 2>(v, tile, row_tile_floats, key_steps);
  if (tile < v.value_tiles) value_columns<kRowTiles, 1>(v, tile, row_tile_floats, key_steps);
}

}  // namespace

void attend_amx(const AmxVisit& visit) {
  if (visit.row_tiles == 2) {
    attend_rows<2>(visit);
  } else {
    attend_rows<1>(visit);
  }
}

}  // namespace msa::cpu

#endif  // defined(__x86_64__)
