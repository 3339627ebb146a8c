// SPDX-License-Identifier: Apache-2.0
// Compiles HWY_TARGET_INCLUDE once for each instruction set of targets_mask.h: what every operator's .cc includes in
// place of <hwy/foreach_target.h>, so that all are built for the same sets.
#pragma once

// clang-format off
#include "src/cpu/targets_mask.h"  // IWYU pragma: export
#include <hwy/foreach_target.h>    // IWYU pragma: export
// clang-format on
