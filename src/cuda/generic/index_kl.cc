// SPDX-License-Identifier: Apache-2.0
// Plans of the generic KL loss: see index_kl.h.
#include "src/cuda/generic/index_kl.h"

#include <algorithm>

namespace msa::cuda::generic {
namespace {

KlArgs make_args(const IndexKlParams& params, const IndexKlSaved& saved) {
  KlArgs args;
  args.q_idx = rows_of(params.q_idx);
  args.k_idx = keys_of(params.k_idx, params.batch);
  args.q = rows_of(params.q);
  args.k = keys_of(params.k, params.batch);
  args.blocks = block_ids_of(params.blocks, params.block_size);
  args.batch = pointers_of(params.batch);
  args.kv_heads = args.q_idx.heads;
  args.group_size = args.q.heads / args.kv_heads;
  args.scale = static_cast<float>(*params.scale);
  args.index_scale = static_cast<float>(*params.index_scale);
  args.takes_max = params.teacher == Teacher::kMax;
  args.lse_main = rows_of(saved.lse_main);
  args.lse_index = rows_of(saved.lse_index);
  args.teacher_norm = rows_of(saved.teacher_norm);
  return args;
}

/// kl_rows: a query a warp, q_idx, a tile of keys or index keys, masses a warp, three doubles a lane, weights, ids.
LaunchShape row_shape(const KlArgs& args) {
  const int widest = std::max(args.q.dim, args.q_idx.dim);
  const std::size_t floats = std::size_t{kRowWarps} * static_cast<std::size_t>(args.q.dim) +
                             static_cast<std::size_t>(args.q_idx.dim) + tile_floats(kWarp, widest) + kRowWarps * kWarp +
                             kWarp;
  return {args.q.rows, args.kv_heads, kRowWarps * kWarp,
          std::size_t{3} * kWarp * sizeof(double) + floats * sizeof(float) + (kMaxTopk + 1) * sizeof(int)};
}

}  // namespace

std::size_t index_kl_workspace(const IndexKlParams& params) {
  return static_cast<std::size_t>(params.q_idx.size(0) * params.q_idx.size(1)) * sizeof(double);
}

KlPlan plan_index_kl(const IndexKlParams& params, const IndexKlSaved& saved, void* workspace, float* kl) {
  KlPlan plan;
  plan.args = make_args(params, saved);
  plan.args.row_values = static_cast<double*>(workspace);
  plan.lse_main = plan_lse(params.q, params.k, params.blocks, params.block_size, params.batch, plan.args.kv_heads,
                           *params.scale, plan.args.lse_main);
  plan.lse_index = plan_lse(params.q_idx, params.k_idx, params.blocks, params.block_size, params.batch,
                            plan.args.kv_heads, *params.index_scale, plan.args.lse_index);
  plan.rows = row_shape(plan.args);
  plan.sum_args = {plan.args.row_values, plan.args.batch, plan.args.kv_heads, kl};
  plan.sum = kl_sum_shape();
  return plan;
}

KlBackwardPlan plan_index_kl_backward(const IndexKlParams& params, const IndexKlSaved& saved, const float* grad_output,
                                      const TensorView& dq_idx, const TensorView& dk_idx) {
  KlBackwardPlan plan;
  plan.args = make_args(params, saved);
  const KlArgs& args = plan.args;
  plan.args.grad_output = grad_output;
  plan.args.dq_idx = rows_of(dq_idx);
  plan.args.dk_idx = rows_of(dk_idx);
  plan.rows = row_shape(args);
  const std::size_t key_floats = tile_floats(kWarp, args.q.dim) + tile_floats(kWarp, args.q_idx.dim) +
                                 std::size_t{kKeyWarps} * static_cast<std::size_t>(args.q.dim + args.q_idx.dim) +
                                 std::size_t{kKeyWarps} * kWarp;
  plan.keys = {key_tile_slots(args.k.rows, args.batch.sequences, args.blocks.key_tile), 1, kKeyWarps * kWarp,
               key_floats * sizeof(float) + sizeof(int) * kKeyWarps * (kWarp + 1)};
  plan.tail = {args.dk_idx.rows, 1, kWarp, 0};
  return plan;
}

}  // namespace msa::cuda::generic
