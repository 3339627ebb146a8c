// SPDX-License-Identifier: Apache-2.0
// Keys and values stored as float8, for kernels whose matrix products take 16-bit types: a tile comes from the copy
// engine as rows of bytes, and some threads write it once more, widened, in the layout that the products read. Every
// float8 number is one of the wider type, so results are those of widened tensors, bit for bit. Tested in
// tests/cuda/dense_attention_test.cc and select_blocks_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cuda/ptx.cuh"

namespace msa::cuda {

/// `stored`: kRows rows of D bytes. `tile`: columns of 64 elements in the 128-byte swizzle. kThreads threads share the
/// work, this one is `thread`. Before a matrix product may read the tile they need fence_proxy_async() and a barrier.
/// Eight numbers at a time, so that eight lanes write 128 bytes of one row, in all banks; kLoads times eight under way,
/// as the registers allow, since reading, widening and writing take 100 cycles, and 32 to issue.
template <class T, int D, int kRows, int kThreads, int kLoads>
__device__ __forceinline__ void widen_tile(const std::byte* stored, std::byte* tile, std::uint32_t thread) {
  constexpr std::uint32_t kChunks = D / 8;  // of a row
  constexpr std::uint32_t kAll = kRows * kChunks;
#pragma unroll 1
  for (std::uint32_t first = thread; first < kAll; first += static_cast<std::uint32_t>(kLoads * kThreads)) {
    uint2 narrow[kLoads];
    uint4 wide[kLoads];
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const std::uint32_t i = first + static_cast<std::uint32_t>(load * kThreads);
      narrow[load] = {0, 0};
      if (kAll % (kLoads * kThreads) == 0 || i < kAll) narrow[load] = *reinterpret_cast<const uint2*>(stored + i * 8);
    }
    widen_eights<T>(wide, narrow);
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const std::uint32_t i = first + static_cast<std::uint32_t>(load * kThreads);
      const std::uint32_t chunk = i % kChunks;
      const std::uint32_t at = i / kChunks * 128 + chunk % 8 * 16;
      if (kAll % (kLoads * kThreads) == 0 || i < kAll) {
        *reinterpret_cast<uint4*>(tile + chunk / 8 * (kRows * 128) + swizzled(at, Swizzle::k128)) = wide[load];
      }
    }
  }
}

}  // namespace msa::cuda
