// SPDX-License-Identifier: Apache-2.0
// Launch of the generic block selection: see select_blocks.h.
#include "src/cuda/generic/select_blocks.cuh"

namespace msa::cuda::generic {

void select_blocks(void* stream, const SelectBlocksParams& params, const TensorView& blocks) {
  run_select_blocks(stream, plan_select_blocks(params, blocks));
}

}  // namespace msa::cuda::generic
