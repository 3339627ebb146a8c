// SPDX-License-Identifier: Apache-2.0
// See topk_blocks.h.
#include "src/cuda/topk_blocks.h"

#include <algorithm>

namespace msa::cuda {

TopkPlan plan_topk(std::int64_t rows, std::int64_t blocks, std::int64_t multiprocessors) {
  TopkPlan plan;
  plan.vectors = blocks <= kTopkNarrowVectors * 128 ? kTopkNarrowVectors : kTopkWideVectors;
  plan.thread_blocks = std::min((rows + kTopkWarps - 1) / kTopkWarps, multiprocessors * kTopkBlocksPerProcessor);
  return plan;
}

}  // namespace msa::cuda
