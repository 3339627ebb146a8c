// SPDX-License-Identifier: Apache-2.0
// Launches of the generic oracle and recall: see block_mass.h.
#include "src/cuda/generic/block_mass.cuh"

namespace msa::cuda::generic {

void select_blocks_oracle(void* stream, void* workspace, const OracleBlocksParams& params, const TensorView& blocks) {
  run_select_blocks_oracle(stream, plan_select_blocks_oracle(params, workspace, blocks));
}

void selection_recall(void* stream, void* workspace, const SelectionRecallParams& params, float* recalls,
                      std::int64_t* rows) {
  run_selection_recall(stream, plan_selection_recall(params, workspace, recalls, rows));
}

}  // namespace msa::cuda::generic
