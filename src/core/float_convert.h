// SPDX-License-Identifier: Apache-2.0
// Scalar conversions between float and the 16-bit storage types, round to nearest even, subnormals and NaN kept. The
// vector kernels have their own; tests hold the two together. Tested in tests/unit/tensor_test.cc.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "msa/tensor.h"

namespace msa::core {

inline float bf16_to_float(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

inline std::uint16_t float_to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // keep NaN a NaN
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fu;
  const std::uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0x1fu) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

inline std::uint16_t float_to_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to 65536 or above
  if (magnitude < 0x38800000u) {  // below 2^-14: subnormal in f16; adding 0.5 aligns the last place to 2^-24
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(aligned) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

/// Element `index` (in elements) of a buffer of floating type.
inline float load_element(const std::byte* data, DType dtype, std::int64_t index) {
  if (dtype == DType::kFloat32) {
    float value = 0;
    std::memcpy(&value, data + index * 4, 4);
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, data + index * 2, 2);
  return dtype == DType::kBFloat16 ? bf16_to_float(bits) : f16_to_float(bits);
}

inline void store_element(std::byte* data, DType dtype, std::int64_t index, float value) {
  if (dtype == DType::kFloat32) {
    std::memcpy(data + index * 4, &value, 4);
    return;
  }
  const std::uint16_t bits = dtype == DType::kBFloat16 ? float_to_bf16(value) : float_to_f16(value);
  std::memcpy(data + index * 2, &bits, 2);
}

}  // namespace msa::core
