// SPDX-License-Identifier: Apache-2.0
// Cases of arithmetic: conversions of storage types, powers of two, sums of a warp. Part of ptx_cases.cuh.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "src/cuda/ptx.cuh"
#include "tests/cuda/ptx_case.h"

namespace msa::cuda::ptx_cases {

inline constexpr float kIsNan = 12345;  ///< stands for NaN, of any bits

/// Infinities as the largest numbers: their difference would be NaN.
inline Outcome with_finite(Outcome outcome) {
  for (auto* values : {&outcome.got, &outcome.want}) {
    for (float& x : *values) {
      if (std::isinf(x)) x = std::copysign(std::numeric_limits<float>::max(), x);
    }
  }
  return outcome;
}

template <class T>
__global__ void widen(const T* from, float* to, std::uint32_t count) {
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float x = to_float(from[i]);
  to[i] = x == x ? x : kIsNan;
}
template <class T>
__global__ void round_trip(const float* from, float* to, std::uint32_t count) {
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float x = to_float(from_float<T>(from[i]));
  to[i] = x == x ? x : kIsNan;
}

template <class T>
Outcome every_bit_pattern() {
  const std::uint32_t count = 1u << (8 * sizeof(T));
  std::vector<T> all(count);
  Outcome outcome;
  for (std::uint32_t i = 0; i < count; ++i) {
    all[i] = T{static_cast<decltype(T::bits)>(i)};
    const float x = host_to_float(all[i]);
    outcome.want.push_back(x == x ? x : kIsNan);
  }
  const Array<T> device(all);
  const Array<float> to(count);
  launch(count / 256, 256, 0, nullptr, widen<T>, device.data(), to.data(), count);
  outcome.got = to.values();
  return with_finite(outcome);
}

/// Halfway cases, subnormals, the largest and what is beyond, for rounding to a storage type.
template <class T>
Outcome rounding() {
  std::vector<float> from = {0.0f, -0.0f, std::numeric_limits<float>::quiet_NaN()};
  for (int exponent = -30; exponent <= 20; ++exponent) {
    for (const float fraction : {1.0f, 1.0625f, 1.03125f, 1.09375f, 1.001953125f, 1.00390625f, 1.01171875f, 1.9999f}) {
      for (const float sign : {1.0f, -1.0f}) from.push_back(sign * std::ldexp(fraction, exponent));
    }
  }
  Outcome outcome;
  for (const float x : from) {
    const float y = host_to_float(host_from_float<T>(x));
    outcome.want.push_back(y == y ? y : kIsNan);
  }
  const auto count = static_cast<std::uint32_t>(from.size());
  const Array<float> device(from), to(count);
  launch(ceil_div(count, 256u), 256, 0, nullptr, round_trip<T>, device.data(), to.data(), count);
  outcome.got = to.values();
  return with_finite(outcome);
}

__global__ void exponentials(const float* from, float* to) { to[threadIdx.x] = ptx::exp2_fast(from[threadIdx.x]); }

inline Outcome powers_of_two() {
  Outcome outcome;
  std::vector<float> from = {-std::numeric_limits<float>::infinity(), -200, -127, 0, 1, 127};
  while (from.size() < 256) from.push_back(-126 + 0.9765625f * static_cast<float>(from.size()));
  for (float& x : from) x = std::min(x, 127.0f);
  for (const float x : from) {
    const float y = std::exp2(x);
    outcome.want.push_back(y < std::numeric_limits<float>::min() ? 0.0f : y);
  }
  const Array<float> device(from), to(256);
  launch(1, 256, 0, nullptr, exponentials, device.data(), to.data());
  outcome.got = to.values();
  outcome.ulps = 2;
  return outcome;
}

__global__ void reduce_warp(const float* from, float* to) {
  to[threadIdx.x] = warp_sum(from[threadIdx.x]);
  to[32 + threadIdx.x] = warp_max(from[threadIdx.x]);
}

/// Sums that round in different ways in different orders: the tree is the same everywhere.
inline Outcome warp_reductions() {
  std::vector<float> from(32);
  for (std::size_t i = 0; i < 32; ++i) from[i] = std::ldexp(1.0f + static_cast<float>(i) / 64, static_cast<int>(i) - 9);
  const Array<float> device(from), to(64);
  launch(1, 32, 0, nullptr, reduce_warp, device.data(), to.data());
  Outcome outcome{to.values(), std::vector<float>(64, from[31])};
  std::vector<float> sums = from;
  for (std::size_t bits = 16; bits > 0; bits /= 2) {
    const std::vector<float> before = sums;
    for (std::size_t i = 0; i < 32; ++i) sums[i] = before[i] + before[i ^ bits];
  }
  std::copy(sums.begin(), sums.end(), outcome.want.begin());
  return outcome;
}

}  // namespace msa::cuda::ptx_cases
