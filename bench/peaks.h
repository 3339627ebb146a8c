// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most, measured: the denominators of every figure that `msa bench` prints. Each is the
// rate of one instruction on registers, so no program that feeds it from memory gets all of it.
#pragma once

#include <array>
#include <cstddef>
#include <string>

namespace msa::bench {

/// The products a kernel can be made of.
enum class Arithmetic {
  kFloat,    ///< fused multiply-add of float32, on the instruction set in use
  kBf16Dot,  ///< dot products of bfloat16 pairs (vdpbf16ps)
  kInt8Dot,  ///< dot products of int8 quadruples (vpdpbusd)
  kBf16Amx,  ///< tiles of bfloat16 (tdpbf16ps)
  kInt8Amx,  ///< tiles of int8 (tdpbusd)
};
inline constexpr std::array<Arithmetic, 5> kArithmetics = {
    Arithmetic::kFloat, Arithmetic::kBf16Dot, Arithmetic::kInt8Dot, Arithmetic::kBf16Amx, Arithmetic::kInt8Amx};

/// "float32", "bf16 dot", "int8 dot", "bf16 AMX", "int8 AMX".
const char* arithmetic_name(Arithmetic arithmetic);

/// Rates of `threads` cores; a multiplication and an addition are two operations.
struct Peaks {
  std::array<double, kArithmetics.size()> gops{};  ///< 0 where the machine lacks the instruction
  double read_gbytes = 0;

  double of(Arithmetic arithmetic) const { return gops[static_cast<std::size_t>(arithmetic)]; }
  bool has(Arithmetic arithmetic) const { return of(arithmetic) > 0; }
};

/// Best of several runs of some 30 ms each: independent chains in registers, and sums over a buffer far larger than the
/// caches.
Peaks measure_peaks(int threads);

}  // namespace msa::bench
