// SPDX-License-Identifier: Apache-2.0
// What 64 query rows get from one block of keys: the softmax within the block, its log-sum and the sum of values, by
// one warpgroup. Both kernels of the sparse attention forward call it, so that a row gets the same bits from a block in
// whatever company it meets it. Tested in tests/cuda/sparse_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cuda/attention_tile.cuh"
#include "src/cuda/finite_values.cuh"
#include "src/cuda/ptx.cuh"

namespace msa::cuda {

/// A block in shared memory.
template <int D>
struct BlockTile {
  const std::byte* keys;
  const std::byte* values;         ///< finite, by zero_non_finite, when is_partial
  bool is_partial;                 ///< some row that counts sees less than the whole block
  const NonFinite<D>* non_finite;  ///< what was taken out of the values; read when is_partial
};

/// A thread's part of the result: of its two rows (fragment_half) the sum of values, to be multiplied by `inverse`, and
/// log2 of the sum of exponentials, -inf for a row that sees nothing.
template <int D>
struct BlockRows {
  float o[D / 2];
  float inverse[2], lse2[2];
};

/// `queries`: the warpgroup's 64 rows, a column of them takes `query_column` bytes. `look(visible)` is called while the
/// first product runs and says how many of the block's keys the thread's two rows see. `staging`: the warp's
/// kStagingBytes of shared memory. What comes out for a row that sees nothing is not specified, but for lse2.
template <class T, int D, int kBlock, class Look>
__device__ __forceinline__ void attend_block(const BlockTile<D>& block, const std::byte* queries,
                                             std::uint32_t query_column, float scale_log2, std::byte* staging,
                                             const Look& look, BlockRows<D>& rows) {
  static_assert(sizeof(NonFinite<D>) <= kStagingBytes);
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  float s[kBlock / 2];
  start_scores<T, D, kBlock>(s, queries, query_column, block.keys);
  std::int32_t visible[2] = {0, 0};
  look(visible);
  ptx::wgmma_wait<0>();
  ptx::fence_registers(s);

  // Softmax within the block, base 2.
  float top[2] = {-infinity(), -infinity()};
#pragma unroll
  for (int i = 0; i < kBlock / 2; ++i) {
    const int h = fragment_half(i);
    // Never fused: top is such a product.
    s[i] = fragment_column(i, lane) < visible[h] ? __fmul_rn(s[i], scale_log2) : -infinity();
    top[h] = fmaxf(top[h], s[i]);
  }
  float sum[2] = {0, 0};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = row_max(top[h]);
    if (top[h] == -infinity()) top[h] = 0;  // nothing but -inf, or NaN: keep the subtraction defined
  }
  std::uint32_t p[kBlock / 16][4];
#pragma unroll
  for (int i = 0; i < kBlock / 2; i += 2) {
    const int h = fragment_half(i);
    const float low = ptx::exp2_fast(s[i] - top[h]), high = ptx::exp2_fast(s[i + 1] - top[h]);
    sum[h] += low + high;
    p[i / 8][i / 2 % 4] = pack_two<T>(low, high);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) sum[h] = row_sum(sum[h]);

  start_outputs<T, D, kBlock>(rows.o, p, block.values, false);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    rows.lse2[h] = __fadd_rn(top[h], log2f(sum[h]));
    rows.inverse[h] = sum[h] == 0.0f ? 0.0f : 1.0f / sum[h];
  }
  ptx::wgmma_wait<0>();
  ptx::fence_registers(rows.o);

  const NonFinite<D>* found = nullptr;
  if (block.is_partial) {
    if (block.non_finite->any != 0) found = block.non_finite;
  } else {
    float probes[2] = {0, 0};  // 0 times what is finite
#pragma unroll
    for (int i = 0; i < D / 2; ++i) probes[fragment_half(i)] = fmaf(rows.o[i], 0.0f, probes[fragment_half(i)]);
    if (__any_sync(kFullMask, (visible[0] > 0 && probes[0] != 0.0f) || (visible[1] > 0 && probes[1] != 0.0f))) {
      auto* mine = reinterpret_cast<NonFinite<D>*>(staging);
      note_non_finite<T, D, kBlock>(block.values, *mine);
      found = mine;
    }
  }
  if (found == nullptr) return;
#pragma unroll
  for (int i = 0; i < D / 2; ++i) {
    rows.o[i] = found->correct(rows.o[i], fragment_column(i, lane), visible[fragment_half(i)]);
  }
}

}  // namespace msa::cuda
