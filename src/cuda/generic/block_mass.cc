// SPDX-License-Identifier: Apache-2.0
// Plans of the generic oracle and recall: see block_mass.h.
#include "src/cuda/generic/block_mass.h"

#include <algorithm>

namespace msa::cuda::generic {
namespace {

/// Threads of the one block that sums the rows' recalls.
constexpr int kSumThreads = 128;

std::size_t lse_bytes(const ConstTensorView& q) {
  const auto bytes = static_cast<std::size_t>(q.size(0) * q.size(1)) * sizeof(float);
  return (bytes + 255) / 256 * 256;
}

BlockMassPlan plan_block_mass(const OracleBlocksParams& params, std::int64_t kv_heads, void* workspace) {
  BlockMassPlan plan;
  BlockMassArgs& args = plan.args;
  SelectArgs& select = args.select;
  select.q = rows_of(params.q);
  select.k = keys_of(params.k, params.batch);
  select.batch = pointers_of(params.batch);
  select.block_size = static_cast<int>(params.block_size);
  select.topk = static_cast<int>(params.topk);
  select.local_blocks = static_cast<int>(std::min(params.local_blocks, kMaxTopk));
  select.init_blocks = static_cast<int>(std::min(params.init_blocks, kMaxTopk));
  args.kv_heads = static_cast<int>(kv_heads);
  args.group_size = select.q.heads / args.kv_heads;
  args.scale = static_cast<float>(*params.scale);
  args.lse = scratch_rows(workspace, select.q.rows, select.q.heads);
  plan.lse = plan_lse(params.q, params.k, {}, params.block_size, params.batch, kv_heads, *params.scale, args.lse);
  const std::size_t floats = std::size_t{kRowWarps} * static_cast<std::size_t>(select.q.dim) +
                             tile_floats(kWarp, select.q.dim) + kRowWarps * kWarp;
  plan.shape = {select.q.rows, kv_heads, kRowWarps * kWarp,
                static_cast<std::size_t>(kMaxTopk) * (sizeof(std::uint64_t) + sizeof(int)) + floats * sizeof(float)};
  return plan;
}

}  // namespace

std::size_t select_blocks_oracle_workspace(const OracleBlocksParams& params) { return lse_bytes(params.q); }

std::size_t selection_recall_workspace(const SelectionRecallParams& params) {
  return lse_bytes(params.q) + static_cast<std::size_t>(params.q.size(0) * params.blocks.size(0)) * sizeof(RecallRow);
}

BlockMassPlan plan_select_blocks_oracle(const OracleBlocksParams& params, void* workspace, const TensorView& blocks) {
  BlockMassPlan plan = plan_block_mass(params, blocks.size(0), workspace);
  plan.args.select.blocks = reinterpret_cast<std::int32_t*>(blocks.data);
  plan.args.select.blocks_head_stride = blocks.stride(0);
  plan.args.select.blocks_row_stride = blocks.stride(1);
  return plan;
}

BlockMassPlan plan_selection_recall(const SelectionRecallParams& params, void* workspace, float* recalls,
                                    std::int64_t* rows) {
  OracleBlocksParams oracle;  // I*: the local block and the best
  oracle.q = params.q;
  oracle.k = params.k;
  oracle.batch = params.batch;
  oracle.block_size = params.block_size;
  oracle.topk = params.blocks.size(2);
  oracle.scale = params.scale;
  BlockMassPlan plan = plan_block_mass(oracle, params.blocks.size(0), workspace);
  plan.args.selected = block_ids_of(params.blocks, params.block_size);
  plan.args.row_recalls = reinterpret_cast<RecallRow*>(static_cast<std::byte*>(workspace) + lse_bytes(params.q));
  plan.sum_args = {plan.args.row_recalls, plan.args.select.batch, plan.args.kv_heads, recalls, rows};
  plan.sum = {1, 1, kSumThreads, kSumThreads * sizeof(RecallRow)};
  return plan;
}

}  // namespace msa::cuda::generic
