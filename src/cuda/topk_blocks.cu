// SPDX-License-Identifier: Apache-2.0
// Launch of topk_blocks. See topk_blocks.cuh.
#include "src/cuda/topk_blocks.cuh"

namespace msa::cuda {

void launch_topk(const TopkPlan& plan, const float* scores, std::int64_t row_stride, std::int64_t rows,
                 std::int64_t blocks, std::int64_t topk, std::int32_t* ids, std::int64_t ids_stride, void* stream) {
  const auto kernel = plan.vectors == kTopkNarrowVectors ? topk_blocks_kernel<kTopkNarrowVectors>
                                                         : topk_blocks_kernel<kTopkWideVectors>;
  launch(dim3(static_cast<unsigned>(plan.thread_blocks)), dim3(kTopkWarps * kWarpSize), 0, stream, kernel, scores,
         row_stride, rows, static_cast<std::uint32_t>(blocks), static_cast<int>(topk), ids, ids_stride);
}

}  // namespace msa::cuda
