// SPDX-License-Identifier: Apache-2.0
// Dot products of narrow types, which Debian's Highway does not offer: whether this machine has them. The kernels
// themselves are bf16_dot.h, bf16_max.h, attention_amx.h and int8_dot.h. Tested in tests/unit/instruction_set_test.cc.
#pragma once

namespace msa::cpu {

enum class DotProducts {
  kNone,
  kVnni,    ///< int8 (AVX-512 VNNI: vpdpbusd)
  kAvx512,  ///< int8, and bf16 (AVX-512 BF16: vdpbf16ps)
  kAmx,     ///< those, and AMX tiles of both (tdpbusd, tdpbf16ps)
};

/// The best this machine has. Asks the system once for the right to use AMX tiles, whose registers a process does not
/// get otherwise; where it refuses, there are none.
DotProducts detect_dot_products();

/// Whether vdpbf16ps does more in a cycle than float multiply-adds. Zen 4 and 5 start as many of either, and it does
/// twice the work; Intel's cores start a quarter as many (measured: 115 against 234 GFLOP/s), and leave the work to
/// AMX.
bool bf16_dots_are_fast();

/// What the instruction set in use has (instruction_set.h): never more than detect_dot_products().
DotProducts active_dot_products();

}  // namespace msa::cpu
