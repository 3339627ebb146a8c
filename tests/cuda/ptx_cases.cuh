// SPDX-License-Identifier: Apache-2.0
// Kernels that each use a few functions of src/cuda/ptx.cuh and device.cuh, with their inputs and with what must come
// out. tests/cuda/ptx_emulation_test.cc runs them in the emulator, tests/cuda/ptx_test.cu on a device: what the one
// believes is what the other is asked.
#pragma once

#include <string>

#include "tests/cuda/ptx_arithmetic.cuh"
#include "tests/cuda/ptx_copies.cuh"
#include "tests/cuda/ptx_products.cuh"

namespace msa::cuda::ptx_cases {

/// Every case with its name.
inline void visit_cases(const Visit& visit) {
  visit_products<BFloat16, 8>(visit);
  visit_products<BFloat16, 64>(visit);
  visit_products<BFloat16, 128>(visit);
  visit_products<Float16, 16>(visit);
  visit_products<Float16, 256>(visit);
  visit_products<Float8E4M3, 32>(visit);
  visit_products<Float8E4M3, 128>(visit);
  visit_products<Int8, 128>(visit);
  visit("register quotas", quotas);
  visit("boxes through a pipeline", pipeline);
  for (const Swizzle swizzle : {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32}) {
    const std::string tail = ", swizzle " + std::to_string(static_cast<int>(swizzle));
    visit("boxes at odd rows, rank 2" + tail, [=] { return boxes_at_odd_rows<2>(swizzle); });
    visit("boxes at odd rows, rank 3" + tail, [=] { return boxes_at_odd_rows<3>(swizzle); });
    visit("boxes at odd rows, rank 4" + tail, [=] { return boxes_at_odd_rows<4>(swizzle); });
  }
  visit("copies of a thread", copies_of_a_thread);
  visit("bulk copies both ways, arrivals of copies", bulk_copies);
  visit("named barriers", named_barriers);
  visit("phases of a barrier", barrier_phases);
  visit("a dependent launch", dependent_launch);
  visit("every bf16", every_bit_pattern<BFloat16>);
  visit("every fp16", every_bit_pattern<Float16>);
  visit("every e4m3", every_bit_pattern<Float8E4M3>);
  visit("rounding to bf16", rounding<BFloat16>);
  visit("rounding to fp16", rounding<Float16>);
  visit("rounding to e4m3", rounding<Float8E4M3>);
  visit("powers of two", powers_of_two);
  visit("warp reductions", warp_reductions);
}

}  // namespace msa::cuda::ptx_cases
