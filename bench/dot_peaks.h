// SPDX-License-Identifier: Apache-2.0
// The loops behind the peaks of narrow types: intrinsics of one instruction set each, to be called only where the
// machine has it.
#pragma once

#include <cstdint>

#include "bench/peaks.h"

namespace msa::bench {

/// A loop that runs `steps` times and returns the operations it did, or null where this machine (or build) has no such
/// instruction. `sink` keeps the result alive. kFloat is peaks.cc's own.
using PeakLoop = double (*)(std::int64_t steps, float* sink);
PeakLoop find_dot_loop(Arithmetic arithmetic);

}  // namespace msa::bench
