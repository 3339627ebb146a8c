// SPDX-License-Identifier: Apache-2.0
// Attention of one query row after the other: a block of threads takes a row and up to kRowWarps heads of one group, a
// warp a head. Keys come in tiles of kWarp tokens that all heads share; lane i scores token i. The softmax is online:
// the sum so far is rescaled when a tile raises the maximum. For the values the lanes share out the dimensions.
// Tested in tests/cuda/generic_attention_test.cc.
#pragma once

#include "src/cuda/generic/attention.h"
#include "src/cuda/generic/rows.cuh"

namespace msa::cuda::generic {

/// The heads of a group that blockIdx.y stands for: this warp's head, and whether there is one.
struct WarpHead {
  int group;
  int head;
  bool active;
};
__device__ inline WarpHead find_head(int group_size) {
  const int chunks = (group_size + kRowWarps - 1) / kRowWarps;
  const int group = static_cast<int>(blockIdx.y) / chunks;
  const int in_group = static_cast<int>(blockIdx.y) % chunks * kRowWarps + warp_of_thread();
  return {group, group * group_size + in_group, in_group < group_size};
}

/// Grid (rows, kv_heads * ceil(group_size / kRowWarps)), kRowWarps warps.
template <bool kWithValues>
__global__ void attend_rows(AttendArgs args) {
  const int head_dim = args.q.dim;
  const int value_dim = kWithValues ? args.v.dim : 0;
  const int lane = lane_of_thread();
  const int warp = warp_of_thread();
  const std::int64_t row = blockIdx.x;
  const WarpHead at = find_head(args.group_size);

  float* shared = shared_floats();
  float* q = shared + warp * head_dim;
  float* tile = shared + kRowWarps * head_dim;
  float* weights = tile + kWarp * (max_of(head_dim, value_dim) + 1);
  int* ids = reinterpret_cast<int*>(weights + kRowWarps * kWarp);
  weights += warp * kWarp;

  const BatchView batch = view_of(args.batch);
  const QueryPlace query = batch.place(static_cast<std::int32_t>(row));
  const Support support(args.blocks, at.group, row, query.position, ids);
  if (at.active) load_row(q, row_of(args.q, row, at.head), args.q.dtype, head_dim);

  float largest = -infinity();
  float sum = 0;
  float out[kLaneDims] = {};
  for (int begin = 0; begin < support.count(); begin += kWarp) {
    const int count = support.count() - begin < kWarp ? support.count() - begin : kWarp;
    const auto token = [&](int i) { return support.token(begin + i); };
    __syncthreads();  // the tile before has been used
    load_key_tile(tile, args.k, batch, query.sequence, at.group, count, token);
    __syncthreads();
    if (at.active) {
      const float score =
          lane < count ? multiply(args.scale, dot(q, tile + lane * (head_dim + 1), head_dim)) : -infinity();
      const float tile_largest = warp_max(score);
      const float raised = fmaxf(largest, tile_largest);
      // As long as every score is -inf nothing may be subtracted: -inf - -inf is NaN.
      const float subtract = raised == -infinity() ? 0.0f : raised;
      const float rescale = expf(largest - subtract);
      const float weight = lane < count ? expf(score - subtract) : 0.0f;
      sum = fmaf(sum, rescale, warp_sum(weight));
      largest = raised;
      weights[lane] = weight;
      for (int i = 0; i < kLaneDims; ++i) out[i] *= rescale;
    }
    if constexpr (!kWithValues) continue;
    __syncthreads();  // the keys have been used
    load_key_tile(tile, args.v, batch, query.sequence, at.group, count, token);
    __syncthreads();
    if (!at.active) continue;
    for (int j = 0; j < count; ++j) {
      const float weight = weights[j];
      const float* value = tile + j * (value_dim + 1);
      for (int i = 0; i < kLaneDims; ++i) {
        const int d = lane + i * kWarp;
        if (d < value_dim) out[i] = fmaf(weight, value[d], out[i]);
      }
    }
  }
  if (!at.active) return;
  const bool is_empty = support.count() == 0;
  if (lane == 0) element_of(args.lse, row, at.head) = is_empty ? -infinity() : largest + logf(sum);
  if constexpr (!kWithValues) return;
  std::byte* to = row_of(args.out, row, at.head);
  for (int i = 0; i < kLaneDims; ++i) {
    const int d = lane + i * kWarp;
    if (d < value_dim) store_element(to, args.out.dtype, d, is_empty ? 0.0f : out[i] / sum);
  }
}

inline void run_attention(void* stream, const AttendPlan& plan) {
  start(stream, plan.args.out.data == nullptr ? attend_rows<false> : attend_rows<true>, plan.shape, plan.args);
}

}  // namespace msa::cuda::generic
