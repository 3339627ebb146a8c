// SPDX-License-Identifier: Apache-2.0
// Block selection for every geometry and dtype (SPEC section 2): plan and entry point of the CUDA backend's generic
// path. How it works: select_blocks.cuh, docs/cuda-generic.md. Tested in tests/cuda/generic_select_test.cc.
#pragma once

#include "msa/select_blocks.h"
#include "src/cuda/generic/tensors.h"

namespace msa::cuda::generic {

struct SelectArgs {
  Rows q;
  Keys k;
  BatchPointers batch;
  int block_size = 1;
  int topk = 1;
  int local_blocks = 1;
  int init_blocks = 0;
  std::int32_t* blocks = nullptr;  ///< [kv_heads, Tq, topk], strides of the first two below
  std::int64_t blocks_head_stride = 0;
  std::int64_t blocks_row_stride = 0;
};

struct SelectPlan {
  SelectArgs args;
  LaunchShape shape;
};

SelectPlan plan_select_blocks(const SelectBlocksParams& params, const TensorView& blocks);

/// Entry point: as in src/cuda/operators.h. No workspace.
void select_blocks(void* stream, const SelectBlocksParams& params, const TensorView& blocks);

}  // namespace msa::cuda::generic
