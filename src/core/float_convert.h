// SPDX-License-Identifier: Apache-2.0
// Scalar conversions between float and the narrow storage types, round to nearest even, subnormals and NaN kept. The
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

/// Exponents biased by 7, three bits of mantissa, no infinities; 0x7f is NaN.
inline float f8_to_float(std::uint8_t bits) {
  const unsigned magnitude = bits & 0x7fu;
  if (magnitude == 0x7fu) return std::bit_cast<float>(static_cast<std::uint32_t>(bits & 0x80u) << 24 | 0x7fc00000u);
  // As f16, whose exponents are biased by 15, it would be 2^8 times smaller.
  return f16_to_float(static_cast<std::uint16_t>((bits & 0x80u) << 8 | magnitude << 7)) * 256.0f;
}

/// What is larger than 448 becomes 448, infinities too: a cache must not turn a large key into NaN.
inline std::uint8_t float_to_f8(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint8_t>((bits >> 24) & 0x80u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint8_t>(sign | 0x7fu);
  if (magnitude >= 0x43e00000u) return static_cast<std::uint8_t>(sign | 0x7eu);  // 448 and above
  if (magnitude < 0x3c800000u) {  // below 2^-6: subnormal; adding 2^14 aligns the last place to 2^-9
    const float aligned = std::bit_cast<float>(magnitude) + 16384.0f;
    return static_cast<std::uint8_t>(sign | (std::bit_cast<std::uint32_t>(aligned) - 0x46800000u));
  }
  const std::uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  return static_cast<std::uint8_t>(sign | ((rounded - 0x3c000000u) >> 20));
}

/// Element `index` (in elements) of a buffer of floating type.
inline float load_element(const std::byte* data, DType dtype, std::int64_t index) {
  if (dtype == DType::kFloat8E4M3) return f8_to_float(static_cast<std::uint8_t>(data[index]));
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
  if (dtype == DType::kFloat8E4M3) {
    data[index] = static_cast<std::byte>(float_to_f8(value));
    return;
  }
  if (dtype == DType::kFloat32) {
    std::memcpy(data + index * 4, &value, 4);
    return;
  }
  const std::uint16_t bits = dtype == DType::kBFloat16 ? float_to_bf16(value) : float_to_f16(value);
  std::memcpy(data + index * 2, &bits, 2);
}

}  // namespace msa::core
