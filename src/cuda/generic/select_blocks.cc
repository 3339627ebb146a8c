// SPDX-License-Identifier: Apache-2.0
// Plan of the generic block selection: see select_blocks.h.
#include "src/cuda/generic/select_blocks.h"

#include <algorithm>

namespace msa::cuda::generic {
namespace {

/// More forced blocks than topk mean topk; the device counts in int.
int at_most_topk(std::int64_t blocks) { return static_cast<int>(std::min(blocks, kMaxTopk)); }

}  // namespace

SelectPlan plan_select_blocks(const SelectBlocksParams& params, const TensorView& blocks) {
  SelectPlan plan;
  SelectArgs& args = plan.args;
  args.q = rows_of(params.q_idx);
  args.k = keys_of(params.k_idx, params.batch);
  args.batch = pointers_of(params.batch);
  args.block_size = static_cast<int>(params.block_size);
  args.topk = static_cast<int>(params.topk);
  args.local_blocks = at_most_topk(params.local_blocks);
  args.init_blocks = at_most_topk(params.init_blocks);
  args.blocks = reinterpret_cast<std::int32_t*>(blocks.data);
  args.blocks_head_stride = blocks.stride(0);
  args.blocks_row_stride = blocks.stride(1);
  const std::size_t floats =
      std::size_t{kRowWarps} * static_cast<std::size_t>(args.q.dim) + tile_floats(kWarp, args.q.dim);
  const std::size_t warp_bytes = static_cast<std::size_t>(kMaxTopk) * (sizeof(std::uint64_t) + sizeof(int));
  plan.shape = {args.q.rows, (args.q.heads + kRowWarps - 1) / kRowWarps, kRowWarps * kWarp,
                kRowWarps * warp_bytes + floats * sizeof(float)};
  return plan;
}

}  // namespace msa::cuda::generic
