// SPDX-License-Identifier: Apache-2.0
// Plans of the generic attention: see attention.h.
#include "src/cuda/generic/attention.h"

#include <algorithm>

namespace msa::cuda::generic {
namespace {

std::int64_t row_grid_y(std::int64_t kv_heads, std::int64_t group_size) {
  return kv_heads * ((group_size + kRowWarps - 1) / kRowWarps);
}

/// q rows, a key or value tile, one row of weights a warp, ids: as attend_rows and attend_rows_backward lay them out.
std::size_t row_shared_bytes(int head_dim, int value_dim, int query_rows_dim) {
  const std::size_t floats = static_cast<std::size_t>(kRowWarps) * static_cast<std::size_t>(query_rows_dim) +
                             tile_floats(kWarp, std::max(head_dim, value_dim)) + kRowWarps * kWarp;
  return floats * sizeof(float) + (kMaxTopk + 1) * sizeof(int);
}

}  // namespace

SparseAttentionParams over_whole_prefix(const DenseAttentionParams& params) {
  SparseAttentionParams whole;
  whole.q = params.q;
  whole.k = params.k;
  whole.v = params.v;
  whole.batch = params.batch;
  whole.scale = params.scale;
  return whole;
}

AttendPlan plan_lse(const ConstTensorView& q, const ConstTensorView& k, const ConstTensorView& blocks,
                    std::int64_t block_size, const Batch& batch, std::int64_t kv_heads, double scale, const Rows& lse) {
  AttendPlan plan;
  AttendArgs& args = plan.args;
  args.q = rows_of(q);
  args.k = keys_of(k, batch);
  args.blocks = block_ids_of(blocks, block_size);
  args.batch = pointers_of(batch);
  args.kv_heads = static_cast<int>(kv_heads);
  args.group_size = args.q.heads / args.kv_heads;
  args.scale = static_cast<float>(scale);
  args.lse = lse;
  plan.shape = {args.q.rows, row_grid_y(kv_heads, args.group_size), kRowWarps * kWarp,
                row_shared_bytes(args.q.dim, 0, args.q.dim)};
  return plan;
}

AttendPlan plan_attention(const SparseAttentionParams& params, const TensorView& out, const TensorView& lse) {
  AttendPlan plan = plan_lse(params.q, params.k, params.blocks, params.block_size, params.batch,
                             params.k.size(params.k.rank - 2), *params.scale, rows_of(lse));
  plan.args.v = keys_of(params.v, params.batch);
  plan.args.out = rows_of(out);
  plan.shape.shared_bytes = row_shared_bytes(plan.args.q.dim, plan.args.v.dim, plan.args.q.dim);
  return plan;
}

std::size_t attention_backward_workspace(const SparseAttentionParams& params) {
  return static_cast<std::size_t>(params.q.size(0) * params.q.size(1)) * sizeof(float);
}

AttendBackwardPlan plan_attention_backward(const SparseAttentionParams& params, const AttentionSaved& saved,
                                           void* workspace, const AttentionGrads& grads) {
  AttendBackwardPlan plan;
  AttendArgs& forward = plan.args.forward;
  // The forward's outputs are read only.
  forward = plan_attention(params, {}, {}).args;
  forward.out = rows_of(saved.out);
  forward.lse = rows_of(saved.lse);
  plan.args.dout = rows_of(saved.dout);
  plan.args.dlse = rows_of(saved.dlse);
  plan.args.delta = scratch_rows(workspace, forward.q.rows, forward.q.heads);
  plan.args.dq = rows_of(grads.dq);
  plan.args.dk = rows_of(grads.dk);
  plan.args.dv = rows_of(grads.dv);
  const int head_dim = forward.q.dim;
  const int value_dim = forward.v.dim;
  plan.queries = {forward.q.rows, row_grid_y(forward.kv_heads, forward.group_size), kRowWarps * kWarp,
                  row_shared_bytes(head_dim, value_dim, head_dim + value_dim)};
  const std::size_t key_floats = tile_floats(kWarp, head_dim) + tile_floats(kWarp, value_dim) +
                                 static_cast<std::size_t>(kKeyWarps) * static_cast<std::size_t>(head_dim + value_dim) +
                                 std::size_t{2} * kKeyWarps * kWarp;
  plan.keys = {key_tile_slots(forward.k.rows, forward.batch.sequences, forward.blocks.key_tile), forward.kv_heads,
               kKeyWarps * kWarp, key_floats * sizeof(float) + sizeof(int) * kKeyWarps * (kWarp + 1)};
  plan.dk_tail = {plan.args.dk.rows, forward.kv_heads, kWarp, 0};
  plan.dv_tail = {plan.args.dv.rows, forward.kv_heads, kWarp, 0};
  return plan;
}

}  // namespace msa::cuda::generic
