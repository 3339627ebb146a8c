// SPDX-License-Identifier: Apache-2.0
// Probability mass of a row's visible blocks, block by block as they stream by: full causal softmax of every head, its
// log-sum-exp from attend_rows, averaged over the group. The oracle lists the heaviest blocks; the recall compares them
// with a selection. Tested in tests/cuda/generic_select_test.cc.
#pragma once

#include "src/cuda/generic/attention.cuh"
#include "src/cuda/generic/block_mass.h"
#include "src/cuda/generic/top_list.cuh"

namespace msa::cuda::generic {

/// |I* and I| / |I*| and its share of mass, by one thread. I* is the list and the local block.
__device__ inline RecallRow judge(const BlockMassArgs& args, std::int64_t row, int group, int position,
                                  const TopList& list, int local, float local_mass) {
  int found = 0;
  double mass_found = 0;
  double mass_best = 0;
  const auto count = [&](int best, float mass) {
    mass_best += mass;
    for_each_block(args.selected, group, row, position, [&](int id) {
      if (id == best) {
        ++found;
        mass_found += mass;
      }
      return id < best;
    });
  };
  for (int i = 0; i < list.size(); ++i) count(list.block(i), list.score(i));
  count(local, local_mass);
  return {found / static_cast<double>(list.size() + 1), mass_found / mass_best, 1};
}

/// Grid (rows, kv_heads), kRowWarps warps, which share out the heads.
template <bool kRecall>
__global__ void rank_by_mass(BlockMassArgs args) {
  const SelectArgs& select = args.select;
  const int dim = select.q.dim;
  const int lane = lane_of_thread();
  const int warp = warp_of_thread();
  const int thread = thread_in_block();
  const std::int64_t row = blockIdx.x;
  const int group = static_cast<int>(blockIdx.y);

  auto* entries = reinterpret_cast<std::uint64_t*>(shared_memory());  // [kMaxTopk]
  int* ids = reinterpret_cast<int*>(entries + kMaxTopk);              // [kMaxTopk]
  float* queries = reinterpret_cast<float*>(ids + kMaxTopk);          // [kRowWarps][dim]
  float* tile = queries + kRowWarps * dim;
  float* masses = tile + kWarp * (dim + 1);  // [kRowWarps][kWarp]
  float* q = queries + warp * dim;

  const BatchView batch = view_of(select.batch);
  const QueryPlace query = batch.place(static_cast<std::int32_t>(row));
  const int visible = query.position < 0 ? 0 : query.position / select.block_size + 1;
  const Choice choice = choose(visible, select.topk, select.local_blocks, select.init_blocks);
  TopList list(entries, choice.slots);
  float local_mass = 0;
  const bool has_choice = visible > select.topk;  // otherwise every visible block is taken
  for (int block = 0; has_choice && block < visible; ++block) {
    float mass = 0;
    for (int begin = 0; begin < select.block_size; begin += kWarp) {
      const int first = block * select.block_size + begin;
      const int in_block = min_of(kWarp, select.block_size - begin);
      const int count = min_of(in_block, query.position + 1 - first);
      if (count <= 0) break;
      __syncthreads();  // the tile and the masses before have been used
      load_key_tile(tile, select.k, batch, query.sequence, group, count, [&](int i) { return first + i; });
      __syncthreads();
      for (int i = warp; i < args.group_size; i += kRowWarps) {
        const int head = group * args.group_size + i;
        __syncwarp();  // the head before has been used
        load_row(q, row_of(select.q, row, head), select.q.dtype, dim);
        __syncwarp();
        if (lane >= count) continue;
        const float score = multiply(args.scale, dot(q, tile + lane * (dim + 1), dim));
        mass += expf(score - element_of(args.lse, row, head));
      }
    }
    masses[warp * kWarp + lane] = mass;
    __syncthreads();
    if (warp != 0) continue;
    mass = 0;
    for (int w = 0; w < kRowWarps; ++w) mass += masses[w * kWarp + lane];
    mass = warp_sum(mass) / static_cast<float>(args.group_size);
    if (lane != 0) continue;
    if (!choice.is_forced(block)) list.offer(order_of(mass), block);
    if (block == visible - 1) local_mass = mass;
  }
  if (thread != 0) return;
  if constexpr (kRecall) {
    RecallRow recall{0, 0, 0};
    if (has_choice) recall = judge(args, row, group, query.position, list, visible - 1, local_mass);
    args.row_recalls[row * args.kv_heads + group] = recall;
  } else {
    write_chosen(select.blocks + group * select.blocks_head_stride + row * select.blocks_row_stride, select.topk,
                 visible, choice, list, ids);
  }
}

/// One block of threads. 0 / 0 over no rows is the NaN that the contract asks for.
template <class = void>
__global__ void sum_recalls(RecallSumArgs args) {
  auto* sums = reinterpret_cast<RecallRow*>(shared_memory());
  const std::int64_t queries = args.batch.sequences == 0 ? 0 : args.batch.cu_seqlens_q[args.batch.sequences];
  RecallRow sum{0, 0, 0};
  const auto add = [&](const RecallRow& row) {
    if (row.counts == 0) return;
    sum.block_recall += row.block_recall;
    sum.score_recall += row.score_recall;
    sum.counts += row.counts;
  };
  for (std::int64_t i = threadIdx.x; i < queries * args.kv_heads; i += blockDim.x) add(args.row_recalls[i]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = {0, 0, 0};
  for (unsigned i = 0; i < blockDim.x; ++i) add(sums[i]);
  const auto rows = static_cast<double>(sum.counts);
  args.recalls[0] = static_cast<float>(sum.block_recall / rows);
  args.recalls[1] = static_cast<float>(sum.score_recall / rows);
  *args.rows = sum.counts;
}

inline void run_select_blocks_oracle(void* stream, const BlockMassPlan& plan) {
  run_attention(stream, plan.lse);
  start(stream, rank_by_mass<false>, plan.shape, plan.args);
}

inline void run_selection_recall(void* stream, const BlockMassPlan& plan) {
  run_attention(stream, plan.lse);
  start(stream, rank_by_mass<true>, plan.shape, plan.args);
  start(stream, sum_recalls<>, plan.sum, plan.sum_args);
}

}  // namespace msa::cuda::generic
