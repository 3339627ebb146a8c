// SPDX-License-Identifier: Apache-2.0
// How topk_blocks and the last step of select_blocks cut rows over warps: plain host arithmetic, no CUDA type. The
// kernels are in topk_blocks.cuh. Tested in tests/cuda/topk_blocks_test.cc.
#pragma once

#include <cstdint>

namespace msa::cuda {

inline constexpr int kTopkWarps = 8;               ///< a thread block; a warp takes a row at a time
inline constexpr int kTopkBlocksPerProcessor = 3;  ///< 24 warps of 80 registers
/// Float4 loads that a lane has in flight: 4 KiB a warp in long rows. Rows that end within 256 scores take the narrow
/// form, whose comparisons are a quarter.
inline constexpr int kTopkWideVectors = 8;
inline constexpr int kTopkNarrowVectors = 2;

struct TopkPlan {
  int vectors = kTopkWideVectors;
  std::int64_t thread_blocks = 0;  ///< 0: no rows

  bool operator==(const TopkPlan&) const = default;
};

TopkPlan plan_topk(std::int64_t rows, std::int64_t blocks, std::int64_t multiprocessors);

/// Launches the kernel on device memory: scores [rows, blocks] with `row_stride` floats between rows, ids [rows, topk]
/// with `ids_stride`. 1 <= topk <= 64; blocks below 2^31. stream: a cudaStream_t.
void launch_topk(const TopkPlan& plan, const float* scores, std::int64_t row_stride, std::int64_t rows,
                 std::int64_t blocks, std::int64_t topk, std::int32_t* ids, std::int64_t ids_stride, void* stream);

}  // namespace msa::cuda
