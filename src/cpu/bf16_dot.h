// SPDX-License-Identifier: Apache-2.0
// Products of bf16 matrices with float sums, on machines that have instructions for them: one seam, an implementation a
// family of instructions (bf16_dot_avx512.cc, bf16_dot_amx.cc). Both read b in the same layout, pairs of rows side by
// side, because both multiply pairs. Tested in tests/unit/bf16_dot_test.cc and through the operators.
#pragma once

#include <cstdint>

#include "src/cpu/dot_products.h"

namespace msa::cpu {

/// c[rows, cols] = a[rows, inner] * b[inner, cols]. Element (i, j) depends on row i of a and column j of b alone,
/// summed over pairs of inner elements in order: where a row lies in a tile does not matter.
struct Bf16Product {
  std::int64_t rows = 0;
  std::int64_t cols = 0;                    ///< a multiple of 16
  std::int64_t inner = 0;                   ///< a multiple of kBf16Inner; what pads it is 0 in a and in b
  const std::uint16_t* const* a = nullptr;  ///< [rows], first element of each row
  const std::uint16_t* b = nullptr;         ///< (k, j) at [k / 2 * b_stride + 2 * j + k % 2]
  std::int64_t b_stride = 0;                ///< in elements, even
  float* c = nullptr;                       ///< [rows rounded up to 16, cols]; rows behind `rows` are overwritten
  std::int64_t c_stride = 0;
};

/// One step of an AMX tile: 16 pairs.
inline constexpr std::int64_t kBf16Inner = 32;

inline std::int64_t padded_inner(std::int64_t count) { return (count + kBf16Inner - 1) / kBf16Inner * kBf16Inner; }

/// Stride of b for `cols` columns: an odd number of cache lines, so that the rows of a tile spread over the cache's
/// sets.
inline std::int64_t padded_pair_stride(std::int64_t cols) { return ((cols + 15) / 16 | 1) * 32; }

using Bf16Kernel = void (*)(const Bf16Product&);

void multiply_bf16_avx512(const Bf16Product& product);
/// The calling thread must hold AmxTiles.
void multiply_bf16_amx(const Bf16Product& product);

/// The kernel of the instruction set in use, null when it has none.
inline Bf16Kernel active_bf16_kernel() {
#if defined(__x86_64__)
  switch (active_dot_products()) {
    case DotProducts::kAmx: return multiply_bf16_amx;
    case DotProducts::kAvx512: return multiply_bf16_avx512;
    case DotProducts::kVnni:
    case DotProducts::kNone: break;
  }
#endif
  return nullptr;
}

}  // namespace msa::cpu
