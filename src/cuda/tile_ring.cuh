// SPDX-License-Identifier: Apache-2.0
// A ring of tiles in shared memory between who fills and who uses them: tile number n lies in stage n % kStages, and
// each stage has a barrier for "it is full" and one for "it is free". Tested in tests/cuda/dense_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cuda/ptx.cuh"

namespace msa::cuda {

template <std::uint32_t kStages, std::uint32_t kBytes>
struct TileRing {
  static constexpr std::uint32_t kTileBytes = kStages * kBytes;
  static constexpr std::uint32_t kBarrierBytes = 2 * kStages * 8;

  std::byte* tiles;
  std::uint64_t* barriers;  ///< those that say full, then those that say free

  __device__ std::byte* tile(std::uint32_t number) const { return tiles + number % kStages * kBytes; }
  __device__ std::uint64_t* full(std::uint32_t number) const { return barriers + number % kStages; }
  __device__ std::uint64_t* free(std::uint32_t number) const { return barriers + kStages + number % kStages; }

  /// One thread calls it, before fence_barrier_init().
  __device__ void init(std::uint32_t full_arrivals, std::uint32_t free_arrivals) const {
    for (std::uint32_t stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(full(stage), full_arrivals);
      ptx::barrier_init(free(stage), free_arrivals);
    }
  }
  __device__ void wait_full(std::uint32_t number) const { ptx::wait(full(number), number / kStages & 1); }
  __device__ void wait_free(std::uint32_t number) const { ptx::wait(free(number), (number / kStages & 1) ^ 1); }
  /// This warp is done with the tile; every warp that uses it counts as one arrival.
  __device__ void release(std::uint32_t number) const {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::arrive(free(number));
  }
};

}  // namespace msa::cuda
