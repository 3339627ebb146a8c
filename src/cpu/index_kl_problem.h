// SPDX-License-Identifier: Apache-2.0
// What the KL loss and its backward work on: the operator's arguments and the kernels chosen for them. See
// index_kl-inl.h.
#pragma once

#include "msa/index_kl.h"
#include "src/cpu/bf16_dot.h"

namespace msa::cpu {

struct IndexKlProblem {
  const IndexKlParams& params;
  IndexKlSaved saved;
  Bf16Kernel multiply_bf16 = nullptr;  ///< of q and k; set where they are bf16 and the machine has products for them
  bool needs_amx_tiles = false;        ///< of the thread that calls multiply_bf16
};

}  // namespace msa::cpu
