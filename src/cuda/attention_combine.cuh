// SPDX-License-Identifier: Apache-2.0
// Merges what a query's blocks gave, each a normalised output and the log2 of its sum of exponentials, in ascending
// order of the slots: out = sum_i w_i O_i / sum_i w_i, w_i = 2^(lse_i - max), the maximum running along. One warp a
// (query, head). Slots that hold no block of the query are never read. Tested in tests/cuda/sparse_attention_test.cc.
#pragma once

#include <cstdint>

#include "src/cuda/ptx.cuh"
#include "src/cuda/reverse_index.cuh"

namespace msa::cuda {

template <class T>
struct CombineArguments {
  BatchView batch;
  Strided<const std::int32_t> blocks;
  const T* partial;   ///< [queries, kv_heads, topk, group_size, D] of this chunk
  const float* lse2;  ///< the same without D: log2 of the sum of exponentials
  Strided<T> out;
  Strided<float> lse;
  QueryTiles tiles;  ///< their rows are merged already
  std::int32_t first_query, queries;
  std::int32_t kv_heads, group_size, topk, block_size;
  bool out_is_aligned;  ///< to 8 bytes, every row
};

inline constexpr unsigned kCombineWarps = 8;
inline constexpr float kLn2 = 0.6931471805599453f;

/// The weights of a row's blocks, one after the other. Whoever merges a row does these operations, rounded as they are
/// here, in the order of its slots, so that all ways to merge give the same bits.
struct RunningWeights {
  float top = -infinity();  ///< largest log-sum so far
  float total = 0;          ///< of the weights, relative to it

  /// Takes the next block's log-sum: `weight` is its weight, `rescale` what the sum so far is multiplied by before.
  __device__ void add(float lse2, float& weight, float& rescale) {
    const float raised = fmaxf(top, lse2);  // passes NaN over; the weight does not
    // Blocks whose scores are all -inf weigh nothing, also when there are only such.
    rescale = raised == top ? 1.0f : ptx::exp2_fast(top - raised);
    weight = lse2 == -infinity() ? 0.0f : ptx::exp2_fast(lse2 - raised);
    total = __fmaf_rn(total, rescale, weight);
    top = raised;
  }
  /// What the merged sum is multiplied by: with no block at all, or nothing but scores of -inf, the row is 0.
  __device__ float inverse() const { return total == 0.0f ? 0.0f : 1.0f / total; }
  /// Natural log of the row's sum of exponentials.
  __device__ float lse() const { return total == 0.0f ? -infinity() : __fmul_rn(__fadd_rn(top, log2f(total)), kLn2); }
};

// What is not finite stays: a weight that underflows is small, not 0.
/// sum * rescale, rescale in [0, 1].
__device__ __forceinline__ float rescale_sum(float sum, float rescale) {
  return rescale == 0.0f && fabsf(sum) == infinity() ? sum : __fmul_rn(sum, rescale);
}
/// sum + weight * value. Values of weight 0 are not added.
__device__ __forceinline__ float add_weighted(float sum, float weight, float value) {
  if (weight != 0.0f) return __fmaf_rn(weight, value, sum);
  return fabsf(value) < infinity() ? sum : sum + value;
}
/// sum * rescale + weight * value: takes one more block.
__device__ __forceinline__ float merge(float sum, float rescale, float weight, float value) {
  if (rescale != 1.0f) sum = rescale_sum(sum, rescale);
  return add_weighted(sum, weight, value);
}

template <class T, int D>
__global__ void __launch_bounds__(kCombineWarps* kWarpSize) combine_partials(CombineArguments<T> a) {
  constexpr int kColumns = D / kWarpSize;  // a lane: 2 or 4
  const unsigned lane = threadIdx.x % kWarpSize;
  const std::int32_t query_heads = a.kv_heads * a.group_size;
  const std::int64_t row = std::int64_t{blockIdx.x} * kCombineWarps + threadIdx.x / kWarpSize;
  if (row >= std::int64_t{a.queries} * query_heads) return;
  const std::int32_t local = static_cast<std::int32_t>(row / query_heads);
  const std::int32_t head = static_cast<std::int32_t>(row % query_heads);
  const std::int32_t kv_head = head / a.group_size, member = head % a.group_size;
  if (a.tiles.has(kv_head, local)) return;
  const std::int32_t query = a.first_query + local;
  const std::int64_t first = (std::int64_t{local} * a.kv_heads + kv_head) * a.topk * a.group_size + member;
  // Batch and selection were there before the kernel this one may overlap with; its partial results were not.
  const std::uint64_t valid = visited_slots(a.batch, a.blocks, kv_head, query, a.topk, a.block_size);
  ptx::griddepcontrol_wait();

  RunningWeights weights;
  float sums[kColumns] = {};
  for (std::int32_t slot = 0; slot < a.topk; ++slot) {
    if ((valid >> slot & 1) == 0) continue;
    const std::int64_t at = first + std::int64_t{slot} * a.group_size;
    float weight = 0, rescale = 0;
    weights.add(a.lse2[at], weight, rescale);
    const T* values = a.partial + at * D + lane * kColumns;
    std::uint32_t words[kColumns / 2];
    if constexpr (kColumns == 4) {
      const uint2 both = *reinterpret_cast<const uint2*>(values);
      words[0] = both.x;
      words[1] = both.y;
    } else {
      words[0] = *reinterpret_cast<const std::uint32_t*>(values);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const T value{static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2)))};
      sums[i] = merge(sums[i], rescale, weight, to_float(value));
    }
  }
  const float inverse = weights.inverse();
  T* out = a.out.at(query, head) + lane * kColumns;
  if (a.out_is_aligned) {
    if constexpr (kColumns == 4) {
      *reinterpret_cast<uint2*>(out) = make_uint2(pack_two<T>(sums[0] * inverse, sums[1] * inverse),
                                                  pack_two<T>(sums[2] * inverse, sums[3] * inverse));
    } else {
      *reinterpret_cast<std::uint32_t*>(out) = pack_two<T>(sums[0] * inverse, sums[1] * inverse);
    }
  } else {
    for (int i = 0; i < kColumns; ++i) out[i] = from_float<T>(sums[i] * inverse);
  }
  if (lane == 0) *a.lse.at(query, head) = weights.lse();
}

}  // namespace msa::cuda
