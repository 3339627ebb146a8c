// SPDX-License-Identifier: Apache-2.0
// Gradients of attention, without atomics. With p_j = exp(s_j - lse), dp_j = <dout, v_j> and delta = <dout, out>:
// ds_j = p_j (dp_j - delta + dlse). dq is summed by query rows, as the forward walks, and leaves the deltas behind; dk
// and dv by key tiles, over the rows that visit the tile, ascending, and their heads. Scores are computed twice; no sum
// depends on anything but the row's tokens or the token's visitors. Tested in tests/cuda/generic_attention_test.cc.
#pragma once

#include "src/cuda/generic/attention.cuh"

namespace msa::cuda::generic {

/// <dout, out> of one (row, head); `dout` lies in shared memory. In the order of dot(), so that it cancels against the
/// dp of a token that is certain.
__device__ inline float read_delta(const AttendBackwardArgs& args, std::int64_t row, int head, const float* dout) {
  const std::byte* out = row_of(args.forward.out, row, head);
  float sum = 0;
  for (int d = 0; d < args.forward.out.dim; ++d) sum = fmaf(dout[d], load_element(out, args.forward.out.dtype, d), sum);
  return sum;
}

__device__ inline float read_dlse(const AttendBackwardArgs& args, std::int64_t row, int head) {
  return args.dlse.data == nullptr ? 0.0f : element_of(args.dlse, row, head);
}

/// Grid and threads as attend_rows.
template <class = void>
__global__ void attend_rows_backward(AttendBackwardArgs args) {
  const AttendArgs& forward = args.forward;
  const int head_dim = forward.q.dim;
  const int value_dim = forward.v.dim;
  const int lane = lane_of_thread();
  const int warp = warp_of_thread();
  const std::int64_t row = blockIdx.x;
  const WarpHead at = find_head(forward.group_size);

  float* shared = shared_floats();
  float* q = shared + warp * (head_dim + value_dim);
  float* dout = q + head_dim;
  float* tile = shared + kRowWarps * (head_dim + value_dim);
  float* weights = tile + kWarp * (max_of(head_dim, value_dim) + 1);
  int* ids = reinterpret_cast<int*>(weights + kRowWarps * kWarp);
  weights += warp * kWarp;

  const BatchView batch = view_of(forward.batch);
  const QueryPlace query = batch.place(static_cast<std::int32_t>(row));
  const Support support(forward.blocks, at.group, row, query.position, ids);
  float lse = 0;
  float delta = 0;
  float dlse = 0;
  if (at.active && support.count() > 0) {
    load_row(q, row_of(forward.q, row, at.head), forward.q.dtype, head_dim);
    load_row(dout, row_of(args.dout, row, at.head), args.dout.dtype, value_dim);
    __syncwarp();
    lse = element_of(forward.lse, row, at.head);
    delta = read_delta(args, row, at.head, dout);
    dlse = read_dlse(args, row, at.head);
    if (lane == 0) element_of(args.delta, row, at.head) = delta;
  }
  float dq[kLaneDims] = {};
  for (int begin = 0; begin < support.count(); begin += kWarp) {
    const int count = support.count() - begin < kWarp ? support.count() - begin : kWarp;
    const auto token = [&](int i) { return support.token(begin + i); };
    __syncthreads();  // the tile before has been used
    load_key_tile(tile, forward.v, batch, query.sequence, at.group, count, token);
    __syncthreads();
    float dp = 0;
    if (at.active && lane < count) dp = dot(dout, tile + lane * (value_dim + 1), value_dim);
    __syncthreads();  // the values have been used
    load_key_tile(tile, forward.k, batch, query.sequence, at.group, count, token);
    __syncthreads();
    if (!at.active) continue;
    if (lane < count) {
      const float score = multiply(forward.scale, dot(q, tile + lane * (head_dim + 1), head_dim));
      weights[lane] = expf(score - lse) * ((dp - delta) + dlse) * forward.scale;
    }
    __syncwarp();
    for (int j = 0; j < count; ++j) {
      const float weight = weights[j];
      const float* key = tile + j * (head_dim + 1);
      for (int i = 0; i < kLaneDims; ++i) {
        const int d = lane + i * kWarp;
        if (d < head_dim) dq[i] = fmaf(weight, key[d], dq[i]);
      }
    }
  }
  if (!at.active) return;
  std::byte* to = row_of(args.dq, row, at.head);
  for (int i = 0; i < kLaneDims; ++i) {
    const int d = lane + i * kWarp;
    if (d < head_dim) store_element(to, args.dq.dtype, d, dq[i]);
  }
}

/// Grid (key tile slots, kv_heads), kKeyWarps warps. Visitors come kKeyWarps (row, head) pairs at a time: warp w scores
/// pair w, a lane a key; then each warp adds all pairs, in order, to the keys it owns.
template <class = void>
__global__ void attend_keys_backward(AttendBackwardArgs args) {
  constexpr int kWarpKeys = kWarp / kKeyWarps;
  const AttendArgs& forward = args.forward;
  const int head_dim = forward.q.dim;
  const int value_dim = forward.v.dim;
  const int lane = lane_of_thread();
  const int warp = warp_of_thread();
  const int group = static_cast<int>(blockIdx.y);
  const int group_size = forward.group_size;
  const BatchView batch = view_of(forward.batch);
  const KeyTile tile = find_key_tile(batch, blockIdx.x, forward.blocks.key_tile);
  if (tile.count == 0) return;

  float* shared = shared_floats();
  float* keys = shared;
  float* values = keys + kWarp * (head_dim + 1);
  float* q = values + kWarp * (value_dim + 1);  // [kKeyWarps][head_dim]
  float* dout = q + kKeyWarps * head_dim;       // [kKeyWarps][value_dim]
  float* p = dout + kKeyWarps * value_dim;      // [kKeyWarps][kWarp]
  float* ds = p + kKeyWarps * kWarp;            // [kKeyWarps][kWarp]
  VisitorList& list = *reinterpret_cast<VisitorList*>(ds + kKeyWarps * kWarp);

  const auto token = [&](int i) { return tile.begin + i; };
  load_key_tile(keys, forward.k, batch, tile.sequence, group, tile.count, token);
  load_key_tile(values, forward.v, batch, tile.sequence, group, tile.count, token);
  float dk[kWarpKeys][kLaneDims] = {};
  float dv[kWarpKeys][kLaneDims] = {};
  for_each_visitors(batch, forward.blocks, tile, group, list, [&](const int* rows, int count) {
    const int pairs = count * group_size;
    for (int begin = 0; begin < pairs; begin += kKeyWarps) {
      const int here = pairs - begin < kKeyWarps ? pairs - begin : kKeyWarps;
      if (warp < here) {
        const std::int64_t row = rows[(begin + warp) / group_size];
        const int head = group * group_size + (begin + warp) % group_size;
        float* own_q = q + warp * head_dim;
        float* own_dout = dout + warp * value_dim;
        load_row(own_q, row_of(forward.q, row, head), forward.q.dtype, head_dim);
        load_row(own_dout, row_of(args.dout, row, head), args.dout.dtype, value_dim);
        __syncwarp();
        const int position = query_position(batch, tile.sequence, row);
        const bool sees = lane < tile.count && tile.begin + lane <= position;
        float weight = 0;
        float slope = 0;
        if (sees) {
          const float score = multiply(forward.scale, dot(own_q, keys + lane * (head_dim + 1), head_dim));
          weight = expf(score - element_of(forward.lse, row, head));
          const float dp = dot(own_dout, values + lane * (value_dim + 1), value_dim);
          slope = weight * ((dp - element_of(args.delta, row, head)) + read_dlse(args, row, head)) * forward.scale;
        }
        p[warp * kWarp + lane] = weight;
        ds[warp * kWarp + lane] = slope;
      }
      __syncthreads();
      for (int pair = 0; pair < here; ++pair) {
        const std::int64_t row = rows[(begin + pair) / group_size];
        const int seen = query_position(batch, tile.sequence, row) + 1 - tile.begin;
        for (int k = 0; k < kWarpKeys; ++k) {
          const int key = warp * kWarpKeys + k;
          if (key >= seen) continue;  // not 0 * q: a row with a NaN must not reach keys that it does not see
          const float weight = p[pair * kWarp + key];
          const float slope = ds[pair * kWarp + key];
          for (int i = 0; i < kLaneDims; ++i) {
            const int d = lane + i * kWarp;
            if (d < head_dim) dk[k][i] = fmaf(slope, q[pair * head_dim + d], dk[k][i]);
            if (d < value_dim) dv[k][i] = fmaf(weight, dout[pair * value_dim + d], dv[k][i]);
          }
        }
      }
      __syncthreads();  // the pairs have been used
    }
  });
  const std::int64_t first = batch.cu_seqlens_k[tile.sequence] + tile.begin;
  for (int k = 0; k < kWarpKeys; ++k) {
    const int key = warp * kWarpKeys + k;
    if (key >= tile.count) continue;
    std::byte* to_dk = row_of(args.dk, first + key, group);
    std::byte* to_dv = row_of(args.dv, first + key, group);
    for (int i = 0; i < kLaneDims; ++i) {
      const int d = lane + i * kWarp;
      if (d < head_dim) store_element(to_dk, args.dk.dtype, d, dk[k][i]);
      if (d < value_dim) store_element(to_dv, args.dv.dtype, d, dv[k][i]);
    }
  }
}

inline void run_attention_backward(void* stream, const AttendBackwardPlan& plan) {
  start(stream, attend_rows_backward<>, plan.queries, plan.args);
  start(stream, attend_keys_backward<>, plan.keys, plan.args);
  start(stream, zero_tail<>, plan.dk_tail, ZeroTailArgs{plan.args.dk, plan.args.forward.batch});
  start(stream, zero_tail<>, plan.dv_tail, ZeroTailArgs{plan.args.dv, plan.args.forward.batch});
}

}  // namespace msa::cuda::generic
