// SPDX-License-Identifier: Apache-2.0
// Keys and values stored as float8, for kernels whose matrix products take 16-bit types: a tile comes from the copy
// engine as rows of bytes, and some threads write it once more, widened, in the layout that the products read. Every
// float8 number is one of the wider type, so results are those of widened tensors, bit for bit. Tested in
// tests/cuda/dense_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cuda/ptx.cuh"

namespace msa::cuda {

/// `stored`: kRows rows of D bytes. `tile`: columns of 64 elements in the 128-byte swizzle. `threads` threads share the
/// work, this one is `thread`. Before a matrix product may read the tile they need fence_proxy_async() and a barrier.
template <class T, int D, int kRows>
__device__ __forceinline__ void widen_tile(const std::byte* stored, std::byte* tile, std::uint32_t thread,
                                           std::uint32_t threads) {
  constexpr std::uint32_t kChunks = D / 16;  // of a row, 16 bytes each, which become two of the tile
  for (std::uint32_t i = thread; i < kRows * kChunks; i += threads) {
    const std::uint32_t row = i / kChunks, chunk = i % kChunks;
    const uint4 narrow = *reinterpret_cast<const uint4*>(stored + i * 16);
    const uint2 a = widen_four<T>(narrow.x), b = widen_four<T>(narrow.y);
    const uint2 c = widen_four<T>(narrow.z), d = widen_four<T>(narrow.w);
    std::byte* column = tile + chunk / 4 * (kRows * 128);
    const std::uint32_t at = row * 128 + chunk % 4 * 32;
    *reinterpret_cast<uint4*>(column + swizzled(at, Swizzle::k128)) = make_uint4(a.x, a.y, b.x, b.y);
    *reinterpret_cast<uint4*>(column + swizzled(at + 16, Swizzle::k128)) = make_uint4(c.x, c.y, d.x, d.y);
  }
}

}  // namespace msa::cuda
