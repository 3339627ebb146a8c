// SPDX-License-Identifier: Apache-2.0
// Scores, block maxima and top-k of one query row, which never leave the block of threads: a warp takes a group, a lane
// a token. The index keys are shared by all groups, so a tile in shared memory serves kRowWarps of them. Tested in
// tests/cuda/generic_select_test.cc.
#pragma once

#include "src/cuda/generic/select_blocks.h"
#include "src/cuda/generic/top_list.cuh"

namespace msa::cuda::generic {

/// Grid (rows, ceil(groups / kRowWarps)), kRowWarps warps.
template <class = void>
__global__ void select_rows(SelectArgs args) {
  const int dim = args.q.dim;
  const int lane = lane_of_thread();
  const int warp = warp_of_thread();
  const std::int64_t row = blockIdx.x;
  const int group = static_cast<int>(blockIdx.y) * kRowWarps + warp;
  const bool active = group < args.q.heads;

  auto* entries = reinterpret_cast<std::uint64_t*>(shared_memory());             // [kRowWarps][kMaxTopk]
  int* ids = reinterpret_cast<int*>(entries + kRowWarps * kMaxTopk);             // [kRowWarps][kMaxTopk]
  float* q = reinterpret_cast<float*>(ids + kRowWarps * kMaxTopk) + warp * dim;  // [kRowWarps][dim]
  float* tile = reinterpret_cast<float*>(ids + kRowWarps * kMaxTopk) + kRowWarps * dim;

  const BatchView batch = view_of(args.batch);
  const QueryPlace query = batch.place(static_cast<std::int32_t>(row));
  const int visible = query.position < 0 ? 0 : query.position / args.block_size + 1;
  const Choice choice = choose(visible, args.topk, args.local_blocks, args.init_blocks);
  const int step = min_of(kWarp, args.block_size);
  TopList list(entries + warp * kMaxTopk, choice.slots);
  if (active && visible > 0) load_row(q, row_of(args.q, row, group), args.q.dtype, dim);
  const int candidates_end = choice.slots > 0 ? choice.local_begin : 0;
  for (int block = choice.init_end; block < candidates_end; ++block) {
    std::uint32_t best = 0;
    for (int begin = 0; begin < args.block_size; begin += step) {
      const int first = block * args.block_size + begin;
      const int left = query.position + 1 - first;
      const int count = left < step ? left : step;
      if (count <= 0) break;
      __syncthreads();  // the tile before has been used
      load_key_tile(tile, args.k, batch, query.sequence, 0, count, [&](int i) { return first + i; });
      __syncthreads();
      if (active && lane < count) best = max_of(best, order_of(dot(q, tile + lane * (dim + 1), dim)));
    }
    if (!active) continue;
    best = __reduce_max_sync(kFullMask, best);
    if (lane == 0) list.offer(best, block);
  }
  if (!active || lane != 0) return;
  write_chosen(args.blocks + group * args.blocks_head_stride + row * args.blocks_row_stride, args.topk, visible, choice,
               list, ids + warp * kMaxTopk);
}

inline void run_select_blocks(void* stream, const SelectPlan& plan) {
  start(stream, select_rows<>, plan.shape, plan.args);
}

}  // namespace msa::cuda::generic
