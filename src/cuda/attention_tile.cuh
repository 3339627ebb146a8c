// SPDX-License-Identifier: Apache-2.0
// What the attention kernels share of a tile: 64 query rows of one warpgroup against a tile of keys. The two matrix
// products, what a thread holds of their results, reductions over a row, and the way of 16-bit rows to device memory.
// Tiles in shared memory are columns of 64 elements (128 bytes) in the 128-byte swizzle. Tested in
// tests/cuda/sparse_attention_test.cc and dense_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cuda/ptx.cuh"

namespace msa::cuda {

// Element i of a thread's part of a product is in row 16 * warp + lane / 4 + 8 * fragment_half(i) of the warpgroup's 64
// rows, column fragment_column(i, lane). So a thread holds two rows, and a row lies in four neighbouring lanes.
__device__ __forceinline__ constexpr int fragment_half(int i) { return i / 2 % 2; }
__device__ __forceinline__ constexpr std::int32_t fragment_column(int i, std::uint32_t lane) {
  return 8 * (i / 4) + 2 * static_cast<std::int32_t>(lane % 4) + i % 2;
}

/// Over the four lanes of a row, on each of them.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullMask, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kFullMask, x, 1);
  return x + __shfl_xor_sync(kFullMask, x, 2);
}

/// Keeps arithmetic that `sum`, never negative, depends on in front of this point. Between an issue and a wait it runs
/// beside a product; the compiler, which sees nothing wrong in it, would take it after the wait. It cannot move it past
/// a branch that hangs on its result.
__device__ __forceinline__ void finish_before_here(float sum) {
  if (sum < 0.0f) __nanosleep(1);
}

/// Issues S[64, kKeys] = Q K^T, 16 of the head dimension a step. `queries`: the warpgroup's first row; a column of them
/// takes `query_column` bytes.
template <class T, int D, int kKeys>
__device__ __forceinline__ void start_scores(float (&s)[kKeys / 2], const std::byte* queries,
                                             std::uint32_t query_column, const std::byte* keys) {
  const std::uint64_t q = ptx::matrix_descriptor(queries, 16, 1024, Swizzle::k128);
  const std::uint64_t k = ptx::matrix_descriptor(keys, 16, 1024, Swizzle::k128);
  ptx::fence_registers(s);
  ptx::wgmma_fence();
#pragma unroll
  for (std::uint32_t step = 0; step < D / 16; ++step) {
    ptx::wgmma<kKeys, T>(s, ptx::advance(q, step / 4 * query_column + step % 4 * 32),
                         ptx::advance(k, step / 4 * (kKeys * 128) + step % 4 * 32), step > 0);
  }
  ptx::wgmma_commit();
}

/// Issues O[64, D] = P V, or += when `accumulate`, 16 keys a step; V's rows are keys, so it is the operand's outer
/// dimension that is contiguous.
template <class T, int D, int kKeys>
__device__ __forceinline__ void start_outputs(float (&o)[D / 2], const std::uint32_t (&p)[kKeys / 16][4],
                                              const std::byte* values, bool accumulate) {
  const std::uint64_t v = ptx::matrix_descriptor(values, kKeys * 128, 1024, Swizzle::k128);
  ptx::fence_registers(o);
  ptx::wgmma_fence();
#pragma unroll
  for (std::uint32_t step = 0; step < kKeys / 16; ++step) {
    ptx::wgmma<D, T, ptx::Major::kOuter>(o, p[step], ptx::advance(v, step * 16 * 128), accumulate || step > 0);
  }
  ptx::wgmma_commit();
}

/// A warp's 16 rows of a column on their way out. A row of 128 + 16 bytes starts four banks further than the last, so
/// that eight rows by four lanes touch 32 banks.
inline constexpr std::uint32_t kStagingRow = 144;
inline constexpr std::uint32_t kStagingBytes = 16 * kStagingRow;

/// Of the warp's 16 rows the one that a lane of store_rows writes in turn i of four: eight lanes a row.
__device__ __forceinline__ std::int32_t copied_row(std::int32_t i, std::uint32_t lane) {
  return 4 * i + static_cast<std::int32_t>(lane / 8);
}

/// Stores o * factor (one a half), rounded to T, through the warp's kStagingBytes of shared memory, 16 bytes a lane:
/// row copied_row(i, lane) goes to targets[i], 16-byte aligned; null: nowhere.
template <class T, int D>
__device__ __forceinline__ void store_rows(const float (&o)[D / 2], const float (&factor)[2], std::byte* staging,
                                           T* const (&targets)[4]) {
  const std::uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (std::uint32_t column = 0; column < D / 64; ++column) {
    __syncwarp();
#pragma unroll
    for (std::uint32_t j = 0; j < 8; ++j) {
#pragma unroll
      for (std::uint32_t h = 0; h < 2; ++h) {
        const std::uint32_t i = (column * 8 + j) * 4 + h * 2;
        auto* word =
            reinterpret_cast<std::uint32_t*>(staging + (lane / 4 + 8 * h) * kStagingRow + j * 16 + lane % 4 * 4);
        *word = pack_two<T>(o[i] * factor[h], o[i + 1] * factor[h]);
      }
    }
    __syncwarp();
#pragma unroll
    for (std::int32_t i = 0; i < 4; ++i) {
      if (targets[i] == nullptr) continue;
      const uint4 data = *reinterpret_cast<const uint4*>(
          staging + static_cast<std::uint32_t>(copied_row(i, lane)) * kStagingRow + lane % 8 * 16);
      *reinterpret_cast<uint4*>(targets[i] + column * 64 + lane % 8 * 8) = data;
    }
  }
}

}  // namespace msa::cuda
