// SPDX-License-Identifier: Apache-2.0
// Keeps values that are not finite from rows that do not see them. A matrix product multiplies every key's value by
// every row's probability, and 0 * NaN is NaN: so in a tile of which some row sees a part only, such values are
// replaced by zero before the product, and the rows that do see them get their NaN afterwards. Tested in
// tests/cuda/sparse_attention_test.cc and dense_attention_test.cc.
#pragma once

#include <cstdint>
#include <type_traits>

#include "src/cuda/ptx.cuh"

namespace msa::cuda {

/// Replaces what is not finite in a tile V [kKeys, D] by zero and calls found(column, key) for each: `threads` threads
/// share the tile, this one is `thread`. The tile lies in columns of 64 elements in the 128-byte swizzle. Before a
/// matrix product may read it the threads need fence_proxy_async() and a barrier.
template <class T, int D, int kKeys, class Found>
__device__ __forceinline__ void zero_non_finite(std::byte* values, std::uint32_t thread, std::uint32_t threads,
                                                const Found& found) {
  constexpr std::uint32_t kExponent = std::is_same_v<T, BFloat16> ? 0x7f80u : 0x7c00u;
  constexpr std::uint32_t kChunks = D / 8;  // 16 bytes of a row
  for (std::uint32_t i = thread; i < kKeys * kChunks; i += threads) {
    const std::uint32_t key = i / kChunks, chunk = i % kChunks;
    auto* at = reinterpret_cast<uint4*>(values + chunk / 8 * (kKeys * 128) +
                                        swizzled(key * 128 + chunk % 8 * 16, Swizzle::k128));
    const uint4 loaded = *at;
    std::uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    bool is_finite = true;
#pragma unroll
    for (std::uint32_t e = 0; e < 8; ++e) {
      if ((words[e / 2] >> (16 * (e % 2)) & kExponent) != kExponent) continue;
      words[e / 2] &= 0xffff0000u >> (16 * (e % 2));
      found(chunk * 8 + e, static_cast<std::int32_t>(key));
      is_finite = false;
    }
    if (!is_finite) *at = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace msa::cuda
