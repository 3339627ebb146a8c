// SPDX-License-Identifier: Apache-2.0
// One row of scores to probabilities. The row's numbers decide its result alone: full vectors first, then one masked
// vector, sums lane by lane in order, so that it does not matter where in a tile the row lies. Tested through the
// operators.
#if defined(MSA_CPU_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_SOFTMAX_INL_H_
#undef MSA_CPU_SOFTMAX_INL_H_
#else
#define MSA_CPU_SOFTMAX_INL_H_
#endif

#include <cstdint>
#include <limits>

#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

inline constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

/// The larger of the two, `best` where x is NaN (hn::Max may return either).
inline HWY_ATTR FloatVec max_number(FloatVec x, FloatVec best) { return hn::IfThenElse(hn::Gt(x, best), x, best); }

/// Multiplies row[0, count) by `scale` in place; returns the largest product, NaN left out, -inf when there is none.
inline HWY_ATTR float scale_and_max(float* HWY_RESTRICT row, std::int64_t count, float scale) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto factor = hn::Set(df, scale);
  // Two running maxima, because each waits for the one before; the largest number is the same in any order.
  auto best = hn::Set(df, kNegativeInfinity);
  auto second = best;
  std::int64_t j = 0;
  for (; j + 2 * lanes <= count; j += 2 * lanes) {
    const auto x = hn::Mul(hn::LoadU(df, row + j), factor);
    const auto y = hn::Mul(hn::LoadU(df, row + j + lanes), factor);
    hn::StoreU(x, df, row + j);
    hn::StoreU(y, df, row + j + lanes);
    best = max_number(x, best);
    second = max_number(y, second);
  }
  for (; j < count; j += lanes) {
    const auto mask = hn::FirstN(df, static_cast<std::size_t>(count - j));
    const auto x = hn::Mul(hn::LoadU(df, row + j), factor);
    hn::StoreU(x, df, row + j);
    best = max_number(hn::IfThenElse(mask, x, best), best);
  }
  best = max_number(second, best);
  return hn::GetLane(hn::MaxOfLanes(df, best));
}

/// row[0, count) = e^(row - shift); returns the sum. What is behind `count` in the last vector becomes 0.
inline HWY_ATTR float exp_and_sum(float* HWY_RESTRICT row, std::int64_t count, float shift) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto origin = hn::Set(df, shift);
  auto sum = hn::Zero(df);
  std::int64_t j = 0;
  for (; j + lanes <= count; j += lanes) {
    const auto p = exp_lanes(hn::Sub(hn::LoadU(df, row + j), origin));
    hn::StoreU(p, df, row + j);
    sum = hn::Add(sum, p);
  }
  if (j < count) {
    const auto mask = hn::FirstN(df, static_cast<std::size_t>(count - j));
    const auto p = hn::IfThenElseZero(mask, exp_lanes(hn::Sub(hn::LoadU(df, row + j), origin)));
    hn::StoreU(p, df, row + j);
    sum = hn::Add(sum, p);
  }
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

/// e^x of one number, as exp_lanes.
inline HWY_ATTR float exp_one(float x) { return hn::GetLane(exp_lanes(hn::Set(FloatTag(), x))); }

/// What to subtract before the exponential: the maximum, or 0 when every score so far is -inf, so that those give
/// e^-inf = 0 and not e^(inf - inf).
inline float softmax_shift(float largest) { return largest == kNegativeInfinity ? 0.0f : largest; }

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_SOFTMAX_INL_H_
