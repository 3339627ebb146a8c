// SPDX-License-Identifier: Apache-2.0
// What both kinds of the KL loss's kernels (index_kl-inl.h, index_kl_bf16-inl.h) do to a row or a number. Tested in
// tests/unit/index_kl_test.cc.
#if defined(MSA_CPU_INDEX_KL_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_INDEX_KL_ROWS_INL_H_
#undef MSA_CPU_INDEX_KL_ROWS_INL_H_
#else
#define MSA_CPU_INDEX_KL_ROWS_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "msa/index_kl.h"
#include "src/cpu/row_ops-inl.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// ln(x) of normal positive x, within 2 units in the last place; NaN of NaN. A lane's result depends on that lane
/// alone.
inline HWY_ATTR FloatVec log_lanes(FloatVec x) {
  const FloatTag df;
  const hn::RebindToSigned<FloatTag> di;
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)): taking the bits of sqrt(1/2) away leaves n in the exponent's place.
  const auto bits = hn::BitCast(di, x);
  const auto n = hn::ShiftRight<23>(hn::Sub(bits, hn::Set(di, 0x3f3504f3)));
  const auto m = hn::BitCast(df, hn::Sub(bits, hn::ShiftLeft<23>(n)));
  // With f = m - 1 (exact) and s = f / (2 + f), ln m = 2 atanh(s) = 2 s + s^3 p(s^2), |s| <= 0.1716, and 2 s = f - s f:
  // ln m = f - s (f - s^2 p). p is a minimax polynomial that leaves a relative error of 5e-12.
  const auto f = hn::Sub(m, hn::Set(df, 1.0f));
  const auto s = hn::Div(f, hn::Add(m, hn::Set(df, 1.0f)));
  const auto z = hn::Mul(s, s);
  auto p = hn::MulAdd(z, hn::Set(df, 0.235823134f), hn::Set(df, 0.285373005f));
  p = hn::MulAdd(p, z, hn::Set(df, 0.400003353f));
  p = hn::MulAdd(p, z, hn::Set(df, 0.666666656f));
  const auto tail = hn::Mul(s, hn::NegMulAdd(z, p, f));
  const auto exponent = hn::ConvertTo(df, n);
  const auto low = hn::MulAdd(exponent, hn::Set(df, -2.12194440e-4f), hn::Sub(f, tail));
  const auto y = hn::MulAdd(exponent, hn::Set(df, 0.693359375f), low);
  return hn::IfThenElse(hn::IsNaN(x), x, y);
}

/// sum of e^(row - shift) over row[0, count), which stays as it is.
inline HWY_ATTR float sum_of_exp(const float* HWY_RESTRICT row, std::int64_t count, float shift) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto origin = hn::Set(df, shift);
  auto sum = hn::Zero(df);
  std::int64_t j = 0;
  for (; j + lanes <= count; j += lanes) sum = hn::Add(sum, exp_lanes(hn::Sub(hn::LoadU(df, row + j), origin)));
  if (j < count) {
    const auto mask = hn::FirstN(df, static_cast<std::size_t>(count - j));
    sum = hn::Add(sum, hn::IfThenElseZero(mask, exp_lanes(hn::Sub(hn::LoadU(df, row + j), origin))));
  }
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

/// The teacher's mass from one more head.
template <Teacher kTeacher>
HWY_INLINE HWY_ATTR FloatVec add_mass(FloatVec mass, FloatVec p) {
  if constexpr (kTeacher == Teacher::kMean) {
    return hn::Add(mass, p);
  } else {
    return hn::IfThenElse(hn::Gt(mass, p), mass, p);
  }
}

inline void write_float(const TensorView& tensor, std::int64_t row, std::int64_t head, float value) {
  *reinterpret_cast<float*>(head_row(tensor, row, head)) = value;
}

/// Saves lse and norm of one query and group, largest and total of its heads and then of its index; a query without a
/// block (total 0) keeps what it was filled with.
template <class Total>
inline void save_query(const IndexKlSaved& saved, std::int64_t row, std::int64_t group, std::int64_t group_size,
                       const float* largest, const Total* totals, float norm) {
  if (totals[group_size] == 0) return;
  const auto lse = [&](std::int64_t h) {
    return static_cast<float>(static_cast<double>(largest[h]) + std::log(static_cast<double>(totals[h])));
  };
  for (std::int64_t h = 0; h < group_size; ++h) {
    write_float(saved.lse_main, row, group * group_size + h, lse(h));
  }
  write_float(saved.lse_index, row, group, lse(group_size));
  write_float(saved.teacher_norm, row, group, norm);
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_INDEX_KL_ROWS_INL_H_
