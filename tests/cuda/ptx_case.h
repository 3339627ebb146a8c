// SPDX-License-Identifier: Apache-2.0
// What the cases of ptx_cases.cuh are made of: arrays in device memory, conversions for the host, outcomes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "msa/cuda.h"
#include "src/core/float_convert.h"
#include "src/cuda/device.cuh"

namespace msa::cuda::ptx_cases {

/// Values in device memory; the emulator's is the host's.
template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& host) : buffer_(host.size() * sizeof(T)), count_(host.size()) {
    buffer_.upload(host.data(), host.size() * sizeof(T));
  }
  /// Full of NaN.
  explicit Array(std::size_t count) : Array(poison(count)) {}
  T* data() const { return static_cast<T*>(buffer_.data()); }
  /// Waits for the kernels before.
  std::vector<T> values() const {
    std::vector<T> host(count_);
    buffer_.download(host.data(), count_ * sizeof(T));
    return host;
  }

 private:
  static std::vector<T> poison(std::size_t count) {
    std::vector<T> host(count);
    std::memset(static_cast<void*>(host.data()), 0xff, count * sizeof(T));
    return host;
  }

  DeviceBuffer buffer_;
  std::size_t count_;
};

/// The conversions of device.cuh, for the host.
template <class T>
T host_from_float(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {core::float_to_bf16(x)};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {core::float_to_f16(x)};
  } else if constexpr (std::is_same_v<T, Float8E4M3>) {
    return {core::float_to_f8(x)};
  } else {
    return x;
  }
}
template <class T>
float host_to_float(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return core::bf16_to_float(x.bits);
  } else if constexpr (std::is_same_v<T, Float16>) {
    return core::f16_to_float(x.bits);
  } else if constexpr (std::is_same_v<T, Float8E4M3>) {
    return core::f8_to_float(x.bits);
  } else if constexpr (std::is_same_v<T, Int8>) {
    return x.value;
  } else {
    return x;
  }
}

struct Outcome {
  std::vector<float> got, want;
  float ulps = 0;  ///< that may lie between them
};
/// Values that are not what they must be; NaN is never right.
inline std::size_t count_wrong(const Outcome& outcome) {
  if (outcome.got.size() != outcome.want.size()) return outcome.want.size() + 1;
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < outcome.got.size(); ++i) {
    const float allowed = outcome.ulps * std::fabs(outcome.want[i]) * std::numeric_limits<float>::epsilon();
    wrong += std::fabs(outcome.got[i] - outcome.want[i]) <= allowed ? 0 : 1;
  }
  return wrong;
}

using Case = std::function<Outcome()>;
using Visit = std::function<void(const std::string& name, const Case& run)>;

/// Small integers, so that every sum is exact.
template <class T>
std::vector<T> random_integers(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> values(count);
  for (T& value : values) {
    const int number = static_cast<int>(random() % 7) - 3;
    if constexpr (std::is_same_v<T, Int8>) {
      value = {static_cast<std::int8_t>(number * 40)};  // sums beyond 16 bits
    } else {
      value = host_from_float<T>(static_cast<float>(number));
    }
  }
  return values;
}
inline std::vector<float> counting(std::size_t count, float first = 1) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = first + static_cast<float>(i);
  return values;
}

}  // namespace msa::cuda::ptx_cases
