// SPDX-License-Identifier: Apache-2.0
// Keeps values that are not finite from rows that do not see them. A matrix product multiplies every key's value by
// every row's probability, and 0 * NaN is NaN: so in a tile of which some row sees a part only, such values are
// replaced by zero before the product, and the rows that do see them get what they give afterwards. Tested in
// tests/cuda/sparse_attention_test.cc and dense_attention_test.cc.
#pragma once

#include <cstdint>
#include <type_traits>

#include "src/cuda/ptx.cuh"

namespace msa::cuda {

/// Where a tile's values are not finite: for every column the first key with NaN, inf and -inf, or the number of keys.
template <int D>
struct NonFinite {
  std::int32_t first_nan[D], first_plus[D], first_minus[D];
  std::int32_t any;  ///< 1: there is one

  __device__ void clear(std::uint32_t column, std::int32_t keys) {
    first_nan[column] = first_plus[column] = first_minus[column] = keys;
  }
  /// Many threads may note at once.
  template <class T>
  __device__ void note(std::uint32_t column, std::int32_t key, T value) {
    const float x = to_float(value);
    atomicMin((x != x ? first_nan : x > 0 ? first_plus : first_minus) + column, key);
    any = 1;
  }
  /// What the sum `o` over the first `visible` keys is: NaN wins, and inf - inf is NaN. The product alone does not say
  /// so: a probability too small for its type, times inf, is NaN.
  __device__ float correct(float o, std::int32_t column, std::int32_t visible) const {
    const bool plus = first_plus[column] < visible, minus = first_minus[column] < visible;
    if (first_nan[column] < visible || (plus && minus)) return quiet_nan();
    return plus ? infinity() : minus ? -infinity() : o;
  }
};

/// Replaces what is not finite in a tile V [kKeys, D] by zero and calls found(column, key, value) for each: `threads`
/// threads share the tile, this one is `thread`. The tile lies in columns of 64 elements in the 128-byte swizzle.
/// Before a matrix product may read it the threads need fence_proxy_async() and a barrier.
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
      found(chunk * 8 + e, static_cast<std::int32_t>(key),
            T{static_cast<std::uint16_t>(words[e / 2] >> (16 * (e % 2)))});
      words[e / 2] &= 0xffff0000u >> (16 * (e % 2));
      is_finite = false;
    }
    if (!is_finite) *at = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

/// Notes it without replacing, by one warp: for tiles that every row sees to their end, once a sum has turned out not
/// to be finite.
template <class T, int D, int kKeys>
__device__ __forceinline__ void note_non_finite(const std::byte* values, NonFinite<D>& found) {
  __syncwarp();
  for (std::uint32_t column = threadIdx.x % kWarpSize; column < D; column += kWarpSize) {
    found.clear(column, kKeys);
    for (std::int32_t key = kKeys - 1; key >= 0; --key) {
      const float value = to_float(*reinterpret_cast<const T*>(
          values + column / 64 * (kKeys * 128) +
          swizzled(static_cast<std::uint32_t>(key) * 128 + column % 64 * 2, Swizzle::k128)));
      if (value != value) found.first_nan[column] = key;
      if (value == infinity()) found.first_plus[column] = key;
      if (value == -infinity()) found.first_minus[column] = key;
    }
  }
  __syncwarp();
}

}  // namespace msa::cuda
