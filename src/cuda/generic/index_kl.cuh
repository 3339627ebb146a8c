// SPDX-License-Identifier: Apache-2.0
// The KL loss in two walks over a row's support: the log-sum-exps of both branches (attend_rows without values), then
// teacher against student. The teacher's mass of a token is the sum, or the maximum, of the heads' probabilities; the
// warps of a block share out the heads. The backward walks once more by rows for dq_idx and by key tiles for dk_idx.
// Tested in tests/cuda/generic_index_kl_test.cc.
#pragma once

#include "src/cuda/generic/attention.cuh"
#include "src/cuda/generic/index_kl.h"

namespace msa::cuda::generic {

__device__ inline float add_mass(bool takes_max, float mass, float more) {
  if (!takes_max) return mass + more;
  return more > mass || more != more ? more : mass;  // NaN stays
}

/// Mass of this lane's token over the heads first, first + step, ... of the group, by one warp. `q` is the warp's own
/// shared memory, `key` the lane's row of a tile; lanes at or behind `count` get 0.
__device__ inline float read_mass(const KlArgs& args, std::int64_t row, int group, int first, int step, float* q,
                                  const float* key, bool sees) {
  float mass = 0;
  for (int i = first; i < args.group_size; i += step) {
    const int head = group * args.group_size + i;
    __syncwarp();  // the head before has been used
    load_row(q, row_of(args.q, row, head), args.q.dtype, args.q.dim);
    __syncwarp();
    if (!sees) continue;
    const float score = multiply(args.scale, dot(q, key, args.q.dim));
    mass = add_mass(args.takes_max, mass, expf(score - element_of(args.lse_main, row, head)));
  }
  return mass;
}

/// What dL/dlogit is multiplied with to give the gradient of <q_idx, k_idx>.
__device__ inline float gradient_factor(const KlArgs& args) {
  const float rows =
      static_cast<float>(args.batch.cu_seqlens_q[args.batch.sequences]) * static_cast<float>(args.kv_heads);
  return *args.grad_output * args.index_scale / rows;
}

/// Grid (rows, kv_heads), kRowWarps warps. Forward: the row's KL and teacher_norm. Backward: dq_idx.
template <bool kBackward>
__global__ void kl_rows(KlArgs args) {
  const int lane = lane_of_thread();
  const int warp = warp_of_thread();
  const int thread = thread_in_block();
  const std::int64_t row = blockIdx.x;
  const int group = static_cast<int>(blockIdx.y);
  const int index_dim = args.q_idx.dim;
  const int widest = max_of(args.q.dim, index_dim);

  double* lane_sums = reinterpret_cast<double*>(shared_memory());  // [3][kWarp]
  float* q = reinterpret_cast<float*>(lane_sums + 3 * kWarp);      // [kRowWarps][head_dim]
  float* q_idx = q + kRowWarps * args.q.dim;
  float* tile = q_idx + index_dim;
  float* masses = tile + kWarp * (widest + 1);  // [kRowWarps][kWarp]
  float* weights = masses + kRowWarps * kWarp;  // [kWarp]
  int* ids = reinterpret_cast<int*>(weights + kWarp);

  const BatchView batch = view_of(args.batch);
  const QueryPlace query = batch.place(static_cast<std::int32_t>(row));
  const Support support(args.blocks, group, row, query.position, ids);
  float lse_index = 0;
  float norm = static_cast<float>(args.group_size);
  float factor = 0;
  if (support.count() > 0) {
    if (warp == 0) load_row(q_idx, row_of(args.q_idx, row, group), args.q_idx.dtype, index_dim);
    lse_index = element_of(args.lse_index, row, group);
    if constexpr (kBackward) {
      norm = element_of(args.teacher_norm, row, group);
      factor = gradient_factor(args);
    }
  }
  // KL of m / sum m and q / sum q: sum m (log m - log q) / sum m - log sum m + log sum q. The sums are the teacher's
  // norm and 1 but for what rounding the log-sum-exps did to every token of the row alike, which they so cancel.
  double mass_sum = 0;
  double student_sum = 0;
  double value = 0;
  constexpr int kThreadDims = static_cast<int>(kMaxHeadDim) / (kRowWarps * kWarp);
  float dq[kThreadDims] = {};
  for (int begin = 0; begin < support.count(); begin += kWarp) {
    const int count = support.count() - begin < kWarp ? support.count() - begin : kWarp;
    const auto token = [&](int i) { return support.token(begin + i); };
    __syncthreads();  // the tile before has been used
    load_key_tile(tile, args.k, batch, query.sequence, group, count, token);
    __syncthreads();
    masses[warp * kWarp + lane] = read_mass(args, row, group, warp, kRowWarps, q + warp * args.q.dim,
                                            tile + lane * (args.q.dim + 1), lane < count);
    __syncthreads();  // the keys have been used, the masses are there
    load_key_tile(tile, args.k_idx, batch, query.sequence, group, count, token);
    __syncthreads();
    if (warp == 0 && lane < count) {
      float mass = 0;
      for (int w = 0; w < kRowWarps; ++w) mass = add_mass(args.takes_max, mass, masses[w * kWarp + lane]);
      const float log_student =
          multiply(args.index_scale, dot(q_idx, tile + lane * (index_dim + 1), index_dim)) - lse_index;
      if constexpr (kBackward) {
        weights[lane] = (expf(log_student) - mass / norm) * factor;
      } else {
        mass_sum += mass;
        student_sum += expf(log_student);
        const auto m = static_cast<double>(mass);
        if (!(m == 0.0)) value += m * (log(m) - log_student);
      }
    }
    if constexpr (kBackward) {
      __syncthreads();
      for (int i = 0; i < kThreadDims; ++i) {
        const int d = thread + i * kRowWarps * kWarp;
        if (d >= index_dim) continue;
        for (int j = 0; j < count; ++j) dq[i] = fmaf(weights[j], tile[j * (index_dim + 1) + d], dq[i]);
      }
    }
  }
  if constexpr (kBackward) {
    std::byte* to = row_of(args.dq_idx, row, group);
    for (int i = 0; i < kThreadDims; ++i) {
      const int d = thread + i * kRowWarps * kWarp;
      if (d < index_dim) store_element(to, args.dq_idx.dtype, d, dq[i]);
    }
    return;
  }
  if (warp == 0) {
    lane_sums[lane] = value;
    lane_sums[kWarp + lane] = mass_sum;
    lane_sums[2 * kWarp + lane] = student_sum;
  }
  __syncthreads();
  if (thread != 0) return;
  value = 0;
  mass_sum = 0;
  student_sum = 0;
  for (int i = 0; i < kWarp; ++i) {
    value += lane_sums[i];
    mass_sum += lane_sums[kWarp + i];
    student_sum += lane_sums[2 * kWarp + i];
  }
  if (support.count() == 0) {
    norm = 0;
  } else {
    value = value / mass_sum - log(mass_sum) + log(student_sum);
    if (args.takes_max) norm = static_cast<float>(mass_sum);
  }
  element_of(args.teacher_norm, row, group) = norm;
  args.row_values[row * args.kv_heads + group] = value;
}

/// One block of threads. Padding rows hold 0, so how many there are does not matter.
template <class = void>
__global__ void kl_sum(KlSumArgs args) {
  double* sums = reinterpret_cast<double*>(shared_memory());
  const std::int64_t queries = args.batch.sequences == 0 ? 0 : args.batch.cu_seqlens_q[args.batch.sequences];
  const std::int64_t rows = queries * args.kv_heads;
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < rows; i += blockDim.x) sum += args.row_values[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) sum += sums[i];
  *args.kl = rows == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(rows));
}

/// Grid (key tile slots), kKeyWarps warps. All groups add to the same index keys: groups one after the other, the rows
/// of each ascending, kKeyWarps at a time. Warp w scores visitor w, a lane a key, all heads; then each warp adds the
/// visitors, in order, to the keys it owns.
template <class = void>
__global__ void kl_keys_backward(KlArgs args) {
  constexpr int kWarpKeys = kWarp / kKeyWarps;
  const int head_dim = args.q.dim;
  const int index_dim = args.q_idx.dim;
  const int lane = lane_of_thread();
  const int warp = warp_of_thread();
  const BatchView batch = view_of(args.batch);
  const KeyTile tile = find_key_tile(batch, blockIdx.x, args.blocks.key_tile);
  if (tile.count == 0) return;

  float* keys = shared_floats();
  float* index_keys = keys + kWarp * (head_dim + 1);
  float* q = index_keys + kWarp * (index_dim + 1);  // [kKeyWarps][head_dim]
  float* q_idx = q + kKeyWarps * head_dim;          // [kKeyWarps][index_dim]
  float* weights = q_idx + kKeyWarps * index_dim;   // [kKeyWarps][kWarp]
  VisitorList& list = *reinterpret_cast<VisitorList*>(weights + kKeyWarps * kWarp);

  const auto token = [&](int i) { return tile.begin + i; };
  const float factor = gradient_factor(args);
  load_key_tile(index_keys, args.k_idx, batch, tile.sequence, 0, tile.count, token);
  float dk[kWarpKeys][kLaneDims] = {};
  for (int group = 0; group < args.kv_heads; ++group) {
    __syncthreads();  // the group before has been used
    load_key_tile(keys, args.k, batch, tile.sequence, group, tile.count, token);
    for_each_visitors(batch, args.blocks, tile, group, list, [&](const int* rows, int visitors) {
      for (int begin = 0; begin < visitors; begin += kKeyWarps) {
        const int here = visitors - begin < kKeyWarps ? visitors - begin : kKeyWarps;
        if (warp < here) {
          const std::int64_t row = rows[begin + warp];
          const int position = query_position(batch, tile.sequence, row);
          const bool sees = lane < tile.count && tile.begin + lane <= position;
          float* own_q_idx = q_idx + warp * index_dim;
          load_row(own_q_idx, row_of(args.q_idx, row, group), args.q_idx.dtype, index_dim);
          const float mass = read_mass(args, row, group, 0, 1, q + warp * head_dim, keys + lane * (head_dim + 1), sees);
          float weight = 0;
          if (sees) {
            const float log_student =
                multiply(args.index_scale, dot(own_q_idx, index_keys + lane * (index_dim + 1), index_dim)) -
                element_of(args.lse_index, row, group);
            weight = (expf(log_student) - mass / element_of(args.teacher_norm, row, group)) * factor;
          }
          weights[warp * kWarp + lane] = weight;
        }
        __syncthreads();
        for (int i = 0; i < here; ++i) {
          const int seen = query_position(batch, tile.sequence, rows[begin + i]) + 1 - tile.begin;
          for (int k = 0; k < kWarpKeys; ++k) {
            const int key = warp * kWarpKeys + k;
            if (key >= seen) continue;  // not 0 * q_idx: NaN must not reach keys that its row does not see
            const float weight = weights[i * kWarp + key];
            for (int j = 0; j < kLaneDims; ++j) {
              const int d = lane + j * kWarp;
              if (d < index_dim) dk[k][j] = fmaf(weight, q_idx[i * index_dim + d], dk[k][j]);
            }
          }
        }
        __syncthreads();  // the visitors have been used
      }
    });
  }
  const std::int64_t first = batch.cu_seqlens_k[tile.sequence] + tile.begin;
  for (int k = 0; k < kWarpKeys; ++k) {
    const int key = warp * kWarpKeys + k;
    if (key >= tile.count) continue;
    std::byte* to = row_of(args.dk_idx, first + key, 0);
    for (int i = 0; i < kLaneDims; ++i) {
      const int d = lane + i * kWarp;
      if (d < index_dim) store_element(to, args.dk_idx.dtype, d, dk[k][i]);
    }
  }
}

inline void run_index_kl(void* stream, const KlPlan& plan) {
  run_attention(stream, plan.lse_main);
  run_attention(stream, plan.lse_index);
  start(stream, kl_rows<false>, plan.rows, plan.args);
  start(stream, kl_sum<>, plan.sum, plan.sum_args);
}

inline void run_index_kl_backward(void* stream, const KlBackwardPlan& plan) {
  start(stream, kl_rows<true>, plan.rows, plan.args);
  start(stream, kl_keys_backward<>, plan.keys, plan.args);
  start(stream, zero_tail<>, plan.tail, ZeroTailArgs{plan.args.dk_idx, plan.args.batch});
}

}  // namespace msa::cuda::generic
