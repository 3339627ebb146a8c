// SPDX-License-Identifier: Apache-2.0
// See attention_amx.h. All row tiles of a visit take the first product and their probabilities, then all take the
// second: the keys, and after them the values, stay in the L1 cache while the rows pass. Sums are the second product's
// accumulators, loaded and stored once a visit. docs/attention.md derives the numbers.
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

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "src/cpu/attention_amx.h"

#include "src/cpu/amx_tiles.h"

#define MSA_AMX_INLINE MSA_AMX_TARGET inline __attribute__((always_inline))

namespace msa::cpu {
namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;

// References up to here leave the fused exponents below right to 2e-5, so that a score that equals the reference gives
// 1 after its rounding to bf16. Larger ones are subtracted from a score rounded as they were, which then gives
// exactly 1.
constexpr float kFusedLargest = 128;
// A row's reference is the largest of its first scores, so that a key alone has probability 1 to the last bit, until
// one exceeds it by this many powers of two: rare enough that what was summed is hardly ever scaled, and few enough for
// values: below 2^(118 - log2 n) the sums of n keys do not overflow.
constexpr float kOctaves = 10;
// Whether a row keeps its reference is a matter of its largest score. Below this, a visit's sum of up to 256
// probabilities says that none exceeded the reference by kOctaves: an octave is left for what the roundings of the two
// differ, and it is more than what equal scores give.
constexpr float kCertainlyBelow = 1 << 9;

// ---- products ----

// Registers: the rows' tiles in 4 to 7 (with more than four steps only 4, loaded again and again), tiles of the other
// matrix in 2 and 3, sums in 0 and 1 in turn. A tile of sums is stored amid the products of the next one, where the
// store does not wait, and with it everything behind.
struct TileProduct {
  const std::uint16_t* rows;
  const std::uint16_t* other;  // [columns][steps] tiles
  std::int64_t steps;
};

// Tile kStep of the rows. Registers are named by literals: g++ 12 takes nothing else.
template <int kStep>
MSA_AMX_INLINE void load_row_tile(const std::uint16_t* rows) {
  if constexpr (kStep == 0) _tile_loadd(4, rows, 64);
  if constexpr (kStep == 1) _tile_loadd(5, rows + kTileElements, 64);
  if constexpr (kStep == 2) _tile_loadd(6, rows + 2 * kTileElements, 64);
  if constexpr (kStep == 3) _tile_loadd(7, rows + 3 * kTileElements, 64);
}

template <int kSteps>
MSA_AMX_INLINE void load_rows(const std::uint16_t* rows) {
  if constexpr (kSteps >= 1) load_row_tile<0>(rows);
  if constexpr (kSteps >= 2) load_row_tile<1>(rows);
  if constexpr (kSteps >= 3) load_row_tile<2>(rows);
  if constexpr (kSteps >= 4) load_row_tile<3>(rows);
}

// sums of kSet += row tile kStep * tile kStep of a column of the other matrix.
template <int kStep, int kSet>
MSA_AMX_INLINE void multiply_step(const std::uint16_t* column) {
  const std::uint16_t* at = column + kStep * kTileElements;
#define MSA_MULTIPLY(rows_tile, other_tile)   \
  _tile_loadd(other_tile, at, 64);            \
  if constexpr (kSet == 0) {                  \
    _tile_dpbf16ps(0, rows_tile, other_tile); \
  } else {                                    \
    _tile_dpbf16ps(1, rows_tile, other_tile); \
  }
  if constexpr (kStep == 0) {
    MSA_MULTIPLY(4, 2)
  }
  if constexpr (kStep == 1) {
    MSA_MULTIPLY(5, 3)
  }
  if constexpr (kStep == 2) {
    MSA_MULTIPLY(6, 2)
  }
  if constexpr (kStep == 3) {
    MSA_MULTIPLY(7, 3)
  }
#undef MSA_MULTIPLY
}

// Products of one column of tiles, `between` after the first two. kSet: the register of the sums. kSteps 0: any.
template <int kSteps, int kSet, class Between>
MSA_AMX_INLINE void multiply_column(const TileProduct& p, std::int64_t column, const Between& between) {
  const std::uint16_t* at = p.other + column * (kSteps == 0 ? p.steps : kSteps) * kTileElements;
  if constexpr (kSteps == 0) {
    for (std::int64_t step = 0; step < p.steps; ++step, at += kTileElements) {
      load_row_tile<0>(p.rows + step * kTileElements);
      multiply_step<0, kSet>(at);
      if (step == 1) between();
    }
    if (p.steps == 1) between();
  } else {
    multiply_step<0, kSet>(at);
    if constexpr (kSteps >= 2) multiply_step<1, kSet>(at);
    between();
    if constexpr (kSteps >= 3) multiply_step<2, kSet>(at);
    if constexpr (kSteps >= 4) multiply_step<3, kSet>(at);
  }
}

template <int kSet>
MSA_AMX_INLINE void store_sums(float* to) {
  if constexpr (kSet == 0) {
    _tile_stored(0, to, 64);
  } else {
    _tile_stored(1, to, 64);
  }
}
template <int kSet>
MSA_AMX_INLINE void load_sums(const float* from) {
  if constexpr (kSet == 0) {
    _tile_loadd(0, from, 64);
  } else {
    _tile_loadd(1, from, 64);
  }
}
template <int kSet>
MSA_AMX_INLINE void zero_sums() {
  if constexpr (kSet == 0) {
    _tile_zero(0);
  } else {
    _tile_zero(1);
  }
}

// ---- sixteen rows of scores ----

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

// Words of 32 bits: the first's bf16 below, the second's above, ties away from zero. For probabilities, which are never
// so large that the rounding could overflow. NaN may lose its meaning: the row's total keeps it.
MSA_AMX_INLINE __m512i round_to_pairs(__m512 first, __m512 second) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(first), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(second), half);
  return _mm512_mask_mov_epi16(high, 0x55555555, low);
}

MSA_AMX_INLINE __mmask16 is_fused(__m512 largest) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(largest), _mm512_set1_ps(kFusedLargest), _CMP_LE_OQ);
}

// A pair of score tiles on their way to one tile of probabilities, by fused exponents.
struct ScorePair {
  const float* first;
  const float* second;
  const float* shifts;  // of the rows: reference * log2(e)
  float* totals;        // [16][16], a row's sums lane by lane
  std::uint16_t* out;   // null: no pair
};

template <int kRow, int kCount>
MSA_AMX_INLINE void fused_probabilities(ScorePair pair, __m512 scale) {
  if (pair.out == nullptr) return;
#pragma GCC unroll 16
  for (int r = kRow; r < kRow + kCount; ++r) {
    const __m512 shift = _mm512_set1_ps(pair.shifts[r]);
    const __m512 a = exp2_lanes(_mm512_fmsub_ps(_mm512_loadu_ps(pair.first + 16 * r), scale, shift));
    const __m512 b = exp2_lanes(_mm512_fmsub_ps(_mm512_loadu_ps(pair.second + 16 * r), scale, shift));
    _mm512_store_ps(pair.totals + 16 * r, _mm512_add_ps(_mm512_load_ps(pair.totals + 16 * r), _mm512_add_ps(a, b)));
    _mm512_storeu_si512(pair.out + 32 * r, round_to_pairs(a, b));
  }
}

MSA_AMX_INLINE void clear_rows(float* rows) {
  for (int r = 0; r < 16; ++r) _mm512_store_ps(rows + 16 * r, _mm512_setzero_ps());
}

// Adds a visit's sums to the totals, unless one is NaN or so large that its row may need a new reference.
MSA_AMX_INLINE bool add_totals(const float* visit_totals, float* totals) {
  const __m512 sums = reduce_rows<Sum>(visit_totals);
  if (_mm512_cmp_ps_mask(sums, _mm512_set1_ps(kCertainlyBelow), _CMP_LT_OQ) != 0xffff) return false;
  _mm512_storeu_ps(totals, _mm512_add_ps(_mm512_loadu_ps(totals), sums));
  return true;
}

// Units of a visit's work: as many to a tile of scores with its probabilities as to a tile of weighted sums, which has
// less to do, but waits for sums from far away.
constexpr std::int64_t kScoreUnits = 4;
constexpr std::int64_t kValueUnits = 4;

// The lines that a visit asks for ahead, spread over its units: what is asked for at once waits for the 16 requests
// that a core can have on their way, and all else with it.
class AheadPace {
 public:
  AheadPace() = default;  // none
  explicit AheadPace(const AmxVisit& v) : lines_(v.ahead) {
    const std::int64_t units = v.row_tiles * (kScoreUnits * v.key_tiles + kValueUnits * v.value_tiles);
    rate_ = ((v.ahead_lines << kShift) + units - 1) / units;
  }
  MSA_AMX_INLINE void pass(std::int64_t units) {
    credit_ += rate_ * units;
    if (credit_ >> kShift == 0) return;
    lines_->ask(credit_ >> kShift);
    credit_ &= (std::int64_t{1} << kShift) - 1;
  }

 private:
  static constexpr int kShift = 16;
  PrefetchQueue* lines_ = nullptr;
  std::int64_t rate_ = 0;  // lines a unit, in 2^-kShift
  std::int64_t credit_ = 0;
};

// First product and probabilities of tiles whose rows see all keys and have references, at most kFusedLargest. As long
// as no score exceeds its row's reference by too much and none is NaN, nothing but the scores at hand is looked at; so
// a pair of score tiles becomes probabilities amid the products of the next pair, be it of the same rows or of the next
// ones. `holds[i]`: whether that was so for tiles[i].
template <int kSteps>
MSA_AMX_TARGET void score_fused_rows(const AmxVisit& v, const int* tiles, int count, AheadPace& pace, bool* holds) {
  const __m512 scale = _mm512_set1_ps(v.scale * kLog2E);
  const std::int64_t pairs = v.key_tiles / 2;
  constexpr int kRows = 8 / kSteps;  // of probabilities, a step
  static_assert(kScoreUnits % kSteps == 0);
  alignas(64) float shifts[2][16];
  alignas(64) float totals[2][16 * 16];
  float* ring[2] = {v.scores, v.scores + 2 * kTileSums};
  const auto out_of = [&](int i, std::int64_t t) { return v.probabilities + (tiles[i] * pairs + t) * kTileElements; };
  ScorePair pair = {};  // the first turn finds none at hand
  const std::uint16_t* rows = v.rows[tiles[0]].queries;
  load_rows<kSteps>(rows);
  zero_sums<1>();
  for (int i = 0; i < count; ++i) {
    const int mine = (i + 1) % 2;
    _mm512_store_ps(shifts[mine], _mm512_mul_ps(_mm512_loadu_ps(v.rows[tiles[i]].largest), _mm512_set1_ps(kLog2E)));
    clear_rows(totals[mine]);
    const std::uint16_t* next = v.rows[tiles[std::min(i + 1, count - 1)]].queries;
    const std::uint16_t* keys = v.keys;
    for (std::int64_t t = 0; t < pairs; ++t, keys += 2 * kSteps * kTileElements) {
      float* now = ring[0];
      const bool is_last = t + 1 == pairs;
      zero_sums<0>();
      multiply_step<0, 0>(keys);
      store_sums<1>(ring[1] + kTileSums);
      fused_probabilities<0, kRows>(pair, scale);
      pace.pass(kScoreUnits / kSteps);
      multiply_step<1, 0>(keys);
      fused_probabilities<kRows, kRows>(pair, scale);
      pace.pass(kScoreUnits / kSteps);
      if constexpr (kSteps == 4) {
        multiply_step<2, 0>(keys);
        fused_probabilities<2 * kRows, kRows>(pair, scale);
        pace.pass(kScoreUnits / kSteps);
        multiply_step<3, 0>(keys);
        fused_probabilities<3 * kRows, kRows>(pair, scale);
        pace.pass(kScoreUnits / kSteps);
      }
      const std::uint16_t* second = keys + kSteps * kTileElements;
      zero_sums<1>();
      multiply_step<0, 1>(second);
      if (is_last) load_row_tile<0>(next);
      fused_probabilities<8, kRows>(pair, scale);
      pace.pass(kScoreUnits / kSteps);
      multiply_step<1, 1>(second);
      if (is_last) load_row_tile<1>(next);
      store_sums<0>(now);
      fused_probabilities<8 + kRows, kRows>(pair, scale);
      pace.pass(kScoreUnits / kSteps);
      if constexpr (kSteps == 4) {
        multiply_step<2, 1>(second);
        if (is_last) load_row_tile<2>(next);
        fused_probabilities<8 + 2 * kRows, kRows>(pair, scale);
        pace.pass(kScoreUnits / kSteps);
        multiply_step<3, 1>(second);
        if (is_last) load_row_tile<3>(next);
        fused_probabilities<8 + 3 * kRows, kRows>(pair, scale);
        pace.pass(kScoreUnits / kSteps);
      }
      const std::int64_t lines = kSteps * 16;
      for (std::int64_t l = t * lines / pairs; l < (t + 1) * lines / pairs; ++l)
        _mm_prefetch(next + 32 * l, _MM_HINT_T0);
      if (t == 0 && i > 0) holds[i - 1] = add_totals(totals[1 - mine], v.rows[tiles[i - 1]].totals);  // the rows before
      pair = {now, now + kTileSums, shifts[mine], totals[mine], out_of(i, t)};
      std::swap(ring[0], ring[1]);
    }
  }
  store_sums<1>(ring[1] + kTileSums);
  fused_probabilities<0, 16>(pair, scale);
  holds[count - 1] = add_totals(pair.totals, v.rows[tiles[count - 1]].totals);
}

// ---- any tile of rows ----

MSA_AMX_TARGET void multiply_row(float* sums, std::int64_t value_tiles, float factor) {
  const __m512 f = _mm512_set1_ps(factor);
  for (std::int64_t t = 0; t < value_tiles; ++t) {
    _mm512_storeu_ps(sums + t * kTileSums, _mm512_mul_ps(_mm512_loadu_ps(sums + t * kTileSums), f));
  }
}

// What a row's scores are multiplied by and what is subtracted, on their way to exponents of 2.
struct Exponents {
  float scale;    // of the scores
  float largest;  // the row's reference
  MSA_AMX_INLINE __m512 of(__m512 scores) const {
    if (std::abs(largest) <= kFusedLargest) {
      return _mm512_fmsub_ps(scores, _mm512_set1_ps(scale * kLog2E), _mm512_set1_ps(largest * kLog2E));
    }
    const __m512 apart = _mm512_sub_ps(_mm512_mul_ps(scores, _mm512_set1_ps(scale)), _mm512_set1_ps(largest));
    return _mm512_mul_ps(apart, _mm512_set1_ps(kLog2E));
  }
};

// The largest visible score of each row; NaN left out: max(x, best) gives `best` where x is NaN.
MSA_AMX_INLINE __m512 largest_scores(const float* scores, std::int64_t key_tiles, const std::int32_t* visible) {
  alignas(64) float lanes[16 * 16];
  for (int r = 0; r < 16; ++r) {
    const std::int64_t seen = visible == nullptr ? key_tiles * 16 : visible[r];
    __m512 best = _mm512_set1_ps(kNegativeInfinity);
    for (std::int64_t j = 0; j < seen; j += 16) {
      best = _mm512_mask_max_ps(best, first_of_16(seen - j), _mm512_loadu_ps(scores + j * 16 + 16 * r), best);
    }
    _mm512_store_ps(lanes + 16 * r, best);
  }
  return reduce_rows<Larger>(lanes);
}

// References of rows that have none yet, or a score that exceeds theirs by kOctaves: the largest score. What was summed
// relative to the old one is scaled.
MSA_AMX_INLINE __m512 raise_references(const AmxVisit& v, const AmxRows& rows, const float* scores) {
  const __m512 none = _mm512_set1_ps(kNegativeInfinity);
  const __m512 found = _mm512_mul_ps(largest_scores(scores, v.key_tiles, rows.visible), _mm512_set1_ps(v.scale));
  const __m512 before = _mm512_loadu_ps(rows.largest);
  const __mmask16 is_new = _mm512_cmp_ps_mask(before, none, _CMP_EQ_OQ);
  const __m512 limit = _mm512_add_ps(before, _mm512_set1_ps(kOctaves / kLog2E));
  const auto exceeds = static_cast<__mmask16>(_mm512_cmp_ps_mask(found, limit, _CMP_GT_OQ) & ~is_new);
  const __m512 after = _mm512_mask_mov_ps(before, static_cast<__mmask16>(is_new | exceeds), found);
  _mm512_storeu_ps(rows.largest, after);
  if (exceeds != 0) {
    alignas(64) float factors[16];
    _mm512_store_ps(factors, exp2_lanes(_mm512_mul_ps(_mm512_sub_ps(before, after), _mm512_set1_ps(kLog2E))));
    for (unsigned left = exceeds; left != 0; left &= left - 1) {
      const int r = __builtin_ctz(left);
      multiply_row(rows.sums + 16 * r, v.value_tiles, factors[r]);
      rows.totals[r] *= factors[r];
    }
  }
  // Nothing but -inf so far: 0, so that those give 2^-inf = 0 and not 2^(inf - inf).
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(after, none, _CMP_NEQ_UQ), after);
}

// First product of a tile of rows.
template <int kSteps>
MSA_AMX_TARGET void score_rows(const AmxVisit& v, const AmxRows& rows, float* scores) {
  const TileProduct p = {rows.queries, v.keys, v.head_steps};
  load_rows<kSteps>(p.rows);
  for (std::int64_t t = 0; t < v.key_tiles; ++t) {
    zero_sums<0>();
    multiply_column<kSteps, 0>(p, t, []() MSA_AMX_TARGET {});
    store_sums<0>(scores + t * kTileSums);
  }
}

// Probabilities of any tile of rows: 0 for what a row does not see.
MSA_AMX_TARGET void weigh_rows(const AmxVisit& v, const AmxRows& rows, const float* scores, std::uint16_t* out) {
  alignas(64) float references[16];
  _mm512_store_ps(references, raise_references(v, rows, scores));
  alignas(64) float totals[16 * 16];
  for (int r = 0; r < 16; ++r) {
    const std::int64_t seen = rows.visible == nullptr ? v.key_tiles * 16 : rows.visible[r];
    const Exponents exponents = {v.scale, references[r]};
    const float* row = scores + 16 * r;
    const auto probabilities = [&](std::int64_t tile) MSA_AMX_TARGET {
      if (tile * 16 >= seen) return _mm512_setzero_ps();
      const __m512 p = exp2_lanes(exponents.of(_mm512_loadu_ps(row + tile * kTileSums)));
      return _mm512_maskz_mov_ps(first_of_16(seen - tile * 16), p);
    };
    __m512 total = _mm512_setzero_ps();
    for (std::int64_t t = 0; t < v.key_tiles; t += 2) {
      const __m512 a = probabilities(t);
      const __m512 b = probabilities(t + 1);
      total = _mm512_add_ps(total, _mm512_add_ps(a, b));
      _mm512_storeu_si512(out + t / 2 * kTileElements + 32 * r, round_to_pairs(a, b));
    }
    _mm512_store_ps(totals + 16 * r, total);
  }
  _mm512_storeu_ps(rows.totals, _mm512_add_ps(_mm512_loadu_ps(rows.totals), reduce_rows<Sum>(totals)));
}

template <int kSteps>
MSA_AMX_TARGET void score_any_rows(const AmxVisit& v, const AmxRows& rows, std::uint16_t* out) {
  score_rows<kSteps>(v, rows, v.scores);
  weigh_rows(v, rows, v.scores, out);
}

// ---- the second product ----

template <int kSteps>
MSA_AMX_TARGET void add_values(const AmxVisit& v, const AmxRows& rows, const std::uint16_t* probabilities,
                               std::int64_t any_steps, AheadPace& pace) {
  const TileProduct p = {probabilities, v.values, kSteps == 0 ? any_steps : kSteps};
  const auto column_sums = [&](std::int64_t column) { return rows.sums + column * kTileSums; };
  load_rows<kSteps>(p.rows);
  load_sums<0>(column_sums(0));
  std::int64_t column = 0;
  for (; column + 2 <= v.value_tiles; column += 2) {
    multiply_column<kSteps, 0>(p, column, [&]() MSA_AMX_TARGET {
      if (column > 0) store_sums<1>(column_sums(column - 1));
      load_sums<1>(column_sums(column + 1));
      pace.pass(kValueUnits);
    });
    multiply_column<kSteps, 1>(p, column + 1, [&]() MSA_AMX_TARGET {
      store_sums<0>(column_sums(column));
      if (column + 2 < v.value_tiles) load_sums<0>(column_sums(column + 2));
      pace.pass(kValueUnits);
    });
  }
  if (column > 0) store_sums<1>(column_sums(column - 1));
  if (column < v.value_tiles) {
    multiply_column<kSteps, 0>(p, column, [&]() MSA_AMX_TARGET { pace.pass(kValueUnits); });
    store_sums<0>(column_sums(column));
  }
}

template <int kKeySteps>
MSA_AMX_TARGET void add_values(const AmxVisit& v, AheadPace& pace) {
  const std::int64_t key_steps = (v.key_tiles + 1) / 2;
  for (int t = 0; t < v.row_tiles; ++t) {
    add_values<kKeySteps>(v, v.rows[t], v.probabilities + t * key_steps * kTileElements, key_steps, pace);
  }
}

void add_values_of(const AmxVisit& v, AheadPace& pace) {
  switch (v.key_tiles) {
    case 4: return add_values<2>(v, pace);
    case 8: return add_values<4>(v, pace);
    default: return add_values<0>(v, pace);
  }
}

// First product and probabilities of all rows.
template <int kSteps>
MSA_AMX_TARGET void score_and_weigh(const AmxVisit& v, AheadPace& pace) {
  const auto probabilities_of = [&](int t) { return v.probabilities + t * ((v.key_tiles + 1) / 2) * kTileElements; };
  int fused[kMaxRowTiles];
  int fused_count = 0;
  for (int t = 0; t < v.row_tiles; ++t) {
    const AmxRows& rows = v.rows[t];
    const bool can_fuse = kSteps != 0 && rows.visible == nullptr && v.key_tiles % 2 == 0 &&
                          is_fused(_mm512_loadu_ps(rows.largest)) == 0xffff;
    if (can_fuse) {
      fused[fused_count++] = t;
    } else {
      pace.pass(kScoreUnits * v.key_tiles);
      score_any_rows<kSteps>(v, rows, probabilities_of(t));
    }
  }
  if constexpr (kSteps != 0) {
    bool holds[kMaxRowTiles];
    if (fused_count > 0) score_fused_rows<kSteps>(v, fused, fused_count, pace, holds);
    for (int i = 0; i < fused_count; ++i) {
      if (!holds[i]) score_any_rows<kSteps>(v, v.rows[fused[i]], probabilities_of(fused[i]));
    }
  }
}

}  // namespace

void attend_amx(const AmxVisit& visit) {
  AheadPace pace(visit);
  switch (visit.head_steps) {
    case 2: score_and_weigh<2>(visit, pace); break;
    case 4: score_and_weigh<4>(visit, pace); break;
    default: score_and_weigh<0>(visit, pace);
  }
  add_values_of(visit, pace);
}

void score_amx(const AmxVisit& visit, float* scores) {
  for (int t = 0; t < visit.row_tiles; ++t, scores += amx_score_floats(1, visit.key_tiles)) {
    switch (visit.head_steps) {
      case 2: score_rows<2>(visit, visit.rows[t], scores); break;
      case 4: score_rows<4>(visit, visit.rows[t], scores); break;
      default: score_rows<0>(visit, visit.rows[t], scores);
    }
  }
}

void weigh_amx(const AmxVisit& visit, const float* scores) {
  const std::int64_t floats = amx_score_floats(1, visit.key_tiles);
  const std::int64_t elements = (visit.key_tiles + 1) / 2 * kTileElements;
  for (int t = 0; t < visit.row_tiles; ++t) {
    weigh_rows(visit, visit.rows[t], scores + t * floats, visit.probabilities + t * elements);
  }
  AheadPace none;
  add_values_of(visit, none);
}

}  // namespace msa::cpu

#endif  // defined(__x86_64__)
