// SPDX-License-Identifier: Apache-2.0
// Dot products of narrow types, which Debian's Highway does not offer: whether this machine has them. The kernels
// themselves are bf16_dot.h and int8_dot.h. Tested in tests/unit/instruction_set_test.cc.
#pragma once

namespace msa::cpu {

enum class DotProducts {
  kNone,
  kAvx512,  ///< AVX-512 with BF16 (vdpbf16ps) and VNNI (vpdpbusd)
  kAmx,     ///< those, and AMX tiles of bf16 and int8 (tdpbf16ps, tdpbusd)
};

/// The best this machine has. Asks the system once for the right to use AMX tiles, whose registers a process does not get
/// otherwise; where it refuses, there are none.
DotProducts detect_dot_products();

/// What the instruction set in use has (instruction_set.h): never more than detect_dot_products().
DotProducts active_dot_products();

}  // namespace msa::cpu
