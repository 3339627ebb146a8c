// SPDX-License-Identifier: Apache-2.0
// See kernels.h.
#include "bench/micro/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/micro/kernels.cc"
// clang-format off
#include "src/cpu/targets.h"
#include <hwy/highway.h>
// clang-format on

#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::bench {
namespace HWY_NAMESPACE {

using namespace msa::cpu::HWY_NAMESPACE;  // NOLINT: the building blocks of this instruction set

void bench_exp(const float* in, std::int64_t count, float* out) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  for (std::int64_t i = 0; i < count; i += lanes) hn::StoreU(exp_lanes(hn::LoadU(df, in + i)), df, out + i);
}

void bench_product(std::int64_t rows, std::int64_t cols, std::int64_t inner, const float* a, const float* b, float* c) {
  product(rows, cols, inner, a, inner, 1, b, cpu::padded_stride(cols), c, cpu::padded_stride(cols), Sums::kReplace);
}

void bench_transpose(const float* in, std::int64_t rows, std::int64_t cols, float* out, std::int64_t out_stride) {
  transpose(in, cols, rows, cols, out, out_stride);
}

float bench_softmax(float* row, std::int64_t count, float scale) {
  return exp_and_sum(row, count, scale_and_max(row, count, scale));
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <string>

#include "msa/context.h"

namespace msa::bench {
HWY_EXPORT(bench_exp);
HWY_EXPORT(bench_product);
HWY_EXPORT(bench_transpose);
HWY_EXPORT(bench_softmax);

namespace {

// The library chooses the set when it is first asked; nothing else here asks.
void choose_instruction_set() { static const std::string chosen = active_instruction_set(); }

}  // namespace

void run_exp(const float* in, std::int64_t count, float* out) {
  choose_instruction_set();
  HWY_DYNAMIC_DISPATCH(bench_exp)(in, count, out);
}
void run_product(std::int64_t rows, std::int64_t cols, std::int64_t inner, const float* a, const float* b, float* c) {
  choose_instruction_set();
  HWY_DYNAMIC_DISPATCH(bench_product)(rows, cols, inner, a, b, c);
}
void run_transpose(const float* in, std::int64_t rows, std::int64_t cols, float* out, std::int64_t out_stride) {
  choose_instruction_set();
  HWY_DYNAMIC_DISPATCH(bench_transpose)(in, rows, cols, out, out_stride);
}
float run_softmax(float* row, std::int64_t count, float scale) {
  choose_instruction_set();
  return HWY_DYNAMIC_DISPATCH(bench_softmax)(row, count, scale);
}

}  // namespace msa::bench

#endif  // HWY_ONCE
