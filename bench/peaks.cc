// SPDX-License-Identifier: Apache-2.0
// See peaks.h. The loops run on the widest instruction set that Highway finds.
#include "bench/peaks.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <vector>

#include "bench/dot_peaks.h"
#include "msa/context.h"
#include "src/core/threads.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/peaks.cc"
// clang-format off
#include "src/cpu/targets.h"
#include <hwy/highway.h>
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace msa::bench {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 12 chains: latency 4 x 2 ports needs 8; returns flops done.
double fma_loop(std::int64_t steps, float* sink) {
  const hn::ScalableTag<float> df;
  auto s0 = hn::Zero(df), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0;
  auto s6 = s0, s7 = s0, s8 = s0, s9 = s0, s10 = s0, s11 = s0;
  const auto a = hn::Set(df, 0.999f);
  const auto b = hn::Set(df, 0.001f);
  for (std::int64_t i = 0; i < steps; ++i) {
    s0 = hn::MulAdd(s0, a, b), s1 = hn::MulAdd(s1, a, b), s2 = hn::MulAdd(s2, a, b), s3 = hn::MulAdd(s3, a, b);
    s4 = hn::MulAdd(s4, a, b), s5 = hn::MulAdd(s5, a, b), s6 = hn::MulAdd(s6, a, b), s7 = hn::MulAdd(s7, a, b);
    s8 = hn::MulAdd(s8, a, b), s9 = hn::MulAdd(s9, a, b), s10 = hn::MulAdd(s10, a, b), s11 = hn::MulAdd(s11, a, b);
  }
  const auto sum =
      hn::Add(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)),
              hn::Add(hn::Add(hn::Add(s4, s5), hn::Add(s6, s7)), hn::Add(hn::Add(s8, s9), hn::Add(s10, s11))));
  *sink = hn::GetLane(sum);
  return static_cast<double>(steps) * 12 * 2 * static_cast<double>(hn::Lanes(df));
}

float sum_loop(const float* data, std::int64_t count) {
  const hn::ScalableTag<float> df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  auto s0 = hn::Zero(df), s1 = s0, s2 = s0, s3 = s0;
  for (std::int64_t i = 0; i + 4 * lanes <= count; i += 4 * lanes) {
    s0 = hn::Add(s0, hn::LoadU(df, data + i));
    s1 = hn::Add(s1, hn::LoadU(df, data + i + lanes));
    s2 = hn::Add(s2, hn::LoadU(df, data + i + 2 * lanes));
    s3 = hn::Add(s3, hn::LoadU(df, data + i + 3 * lanes));
  }
  return hn::GetLane(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace msa::bench {
namespace {

HWY_EXPORT(fma_loop);
HWY_EXPORT(sum_loop);

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

constexpr int kRuns = 5;
constexpr double kRunSeconds = 0.03;

/// Operations a second of `threads` cores, in units of 1e9.
double measure_loop(int threads, PeakLoop loop) {
  // Long enough for the clock to settle; the number of steps is found by doubling.
  std::int64_t steps = 1 << 12;
  float sink = 0;
  for (;; steps *= 2) {
    const auto start = std::chrono::steady_clock::now();
    loop(steps, &sink);
    if (seconds_since(start) > kRunSeconds / 2) break;
  }
  double best = 0;
  for (int run = 0; run < kRuns; ++run) {
    std::vector<double> operations(static_cast<std::size_t>(threads));
    std::vector<float> sinks(static_cast<std::size_t>(threads));
    const auto start = std::chrono::steady_clock::now();
    core::parallel_for(threads, threads, [&](std::int64_t task, int) {
      const auto i = static_cast<std::size_t>(task);
      operations[i] = loop(2 * steps, &sinks[i]);
    });
    const double seconds = seconds_since(start);
    best = std::max(best, std::accumulate(operations.begin(), operations.end(), 0.0) / seconds * 1e-9);
  }
  return best;
}

double measure_read(int threads) {
  constexpr std::int64_t kFloats = 128 << 20;  // 512 MiB
  constexpr std::int64_t kPiece = 1 << 20;
  const std::vector<float> data(static_cast<std::size_t>(kFloats), 1.0f);
  std::vector<float> sums(static_cast<std::size_t>(kFloats / kPiece));
  double best = 0;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    core::parallel_for(threads, kFloats / kPiece, [&](std::int64_t task, int) {
      sums[static_cast<std::size_t>(task)] = HWY_DYNAMIC_DISPATCH(sum_loop)(data.data() + task * kPiece, kPiece);
    });
    best = std::max(best, static_cast<double>(kFloats) * 4 / seconds_since(start) * 1e-9);
  }
  return best;
}

}  // namespace

const char* arithmetic_name(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::kFloat: return "float32";
    case Arithmetic::kBf16Dot: return "bf16 dot";
    case Arithmetic::kInt8Dot: return "int8 dot";
    case Arithmetic::kBf16Amx: return "bf16 AMX";
    case Arithmetic::kInt8Amx: return "int8 AMX";
  }
  return "unknown";
}

Peaks measure_peaks(int threads) {
  active_instruction_set();  // what the float loop is dispatched on
  Peaks peaks;
  for (const Arithmetic arithmetic : kArithmetics) {
    const PeakLoop loop = arithmetic == Arithmetic::kFloat ? HWY_DYNAMIC_DISPATCH(fma_loop) : find_dot_loop(arithmetic);
    if (loop != nullptr) peaks.gops[static_cast<std::size_t>(arithmetic)] = measure_loop(threads, loop);
  }
  peaks.read_gbytes = measure_read(threads);
  return peaks;
}

}  // namespace msa::bench
#endif  // HWY_ONCE
