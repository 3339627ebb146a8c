// SPDX-License-Identifier: Apache-2.0
// The instruction sets the cpu backend is built for, as Highway's target masks. x86-64: SSE4, AVX2, AVX-512; Arm: NEON.
// Each set costs a compilation of every kernel, so those that would bring little are left out: scalar code and SSSE3,
// because every x86-64 machine since 2008 has SSE4; vectors of variable length (SVE), because they cannot live in the
// arrays that hold a register tile. To be included before any other Highway header.
#pragma once

#if defined(HWY_HIGHWAY_INCLUDED)
#error "include src/cpu/targets.h or targets_mask.h before hwy/highway.h"
#endif
#if defined(__x86_64__) || defined(_M_X64)
#define HWY_BASELINE_TARGETS HWY_SSE4
#endif
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)

#include <hwy/targets.h>  // IWYU pragma: export
