// SPDX-License-Identifier: Apache-2.0
// The environment variable MSA_SCREEN, by which anyone can compare screened with unscreened selection on every backend.
// Tested in tests/unit/screen_test.cc (CPU) and tests/cuda/screen_blocks_test.cc (CUDA).
#pragma once

namespace msa::core {

enum class ScreenSwitch {
  kAuto,  ///< where it is expected to pay
  kNever,
  kAlways,  ///< also where it does not pay
};

/// What MSA_SCREEN says now: "0" never, "1" always, unset or empty auto. Throws msa::Error on another value.
ScreenSwitch screen_switch();

}  // namespace msa::core
