// SPDX-License-Identifier: Apache-2.0
// Front door of the KL loss and of the recalls: validate, choose a backend, call it.
#include "msa/index_kl.h"

#include "src/cpu/operators.h"
#include "src/ops/validate.h"
#include "src/reference/operators.h"

namespace msa {
namespace {

IndexKlParams check_params(const ops::Validator& check, const Context& context, const IndexKlParams& params) {
  check.check_block_size(params.block_size);
  check.check_scale("scale", params.scale);
  check.check_scale("index_scale", params.index_scale);
  const std::int64_t kv_heads = check.check_queries_and_keys(params.q, params.k, params.batch);
  check.check_layout("q_idx", params.q_idx, 3);
  check.check_float("q_idx", params.q_idx);
  check.check_size("q_idx", params.q_idx, 0, params.q.size(0), "the query rows of q");
  check.check_size("q_idx", params.q_idx, 1, kv_heads, "kv_heads of k");
  check.check_head_dim("q_idx", params.q_idx, 2);
  check.check_keys("k_idx", params.k_idx, params.batch, false);
  check.check_same_dtype("k_idx", params.k_idx, "q_idx", params.q_idx);
  check.check_size("k_idx", params.k_idx, params.k_idx.rank - 1, params.q_idx.size(2), "index_dim of q_idx");
  check.check_same_tokens("k_idx", params.k_idx, "k", params.k, params.batch);
  const bool dense = params.blocks.empty();
  check.check_batch(params.batch, params.q.size(0), "k", params.k, dense ? 0 : params.block_size);
  if (!dense) {
    check.check_blocks(context, params.blocks, params.batch, kv_heads, params.q.size(0), params.block_size, true);
  }
  IndexKlParams resolved = params;
  resolved.scale = ops::resolve_scale(params.scale, params.q.size(2));
  resolved.index_scale = ops::resolve_scale(params.index_scale, params.q_idx.size(2));
  return resolved;
}

void check_saved(const ops::Validator& check, const IndexKlParams& params, const IndexKlSaved& saved) {
  const auto check_one = [&](const char* name, const TensorView& view, std::int64_t heads) {
    check.check_layout(name, view, 2);
    check.check_dtype(name, view, DType::kFloat32);
    check.check_size(name, view, 0, params.q.size(0), "the query rows");
    check.check_size(name, view, 1, heads, "its heads");
  };
  check_one("lse_main", saved.lse_main, params.q.size(1));
  check_one("lse_index", saved.lse_index, params.q_idx.size(1));
  check_one("teacher_norm", saved.teacher_norm, params.q_idx.size(1));
}

}  // namespace

float index_kl(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved) {
  const ops::Validator check("index_kl");
  const IndexKlParams resolved = check_params(check, context, params);
  check_saved(check, params, saved);
  return ops::dispatch(
      context, [&] { return reference::index_kl(context, resolved, saved); },
      [&] { return cpu::index_kl(context, resolved, saved); });
}

void index_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved,
                       float grad_output, const TensorView& dq_idx, const TensorView& dk_idx) {
  const ops::Validator check("index_kl_backward");
  check.check_packed(params.batch);
  const IndexKlParams resolved = check_params(check, context, params);
  check_saved(check, params, saved);
  check.check_like("dq_idx", dq_idx, "q_idx", params.q_idx);
  check.check_like("dk_idx", dk_idx, "k_idx", params.k_idx);
  ops::dispatch(
      context, [&] { reference::index_kl_backward(context, resolved, saved, grad_output, dq_idx, dk_idx); },
      [&] { cpu::index_kl_backward(context, resolved, saved, grad_output, dq_idx, dk_idx); });
}

SelectionRecall selection_recall(const Context& context, const SelectionRecallParams& params) {
  const ops::Validator check("selection_recall");
  check.check_block_size(params.block_size);
  check.check_scale("scale", params.scale);
  const std::int64_t kv_heads = check.check_queries_and_keys(params.q, params.k, params.batch);
  check.check_batch(params.batch, params.q.size(0), "k", params.k, params.block_size);
  check.check_blocks(context, params.blocks, params.batch, kv_heads, params.q.size(0), params.block_size, true);
  SelectionRecallParams resolved = params;
  resolved.scale = ops::resolve_scale(params.scale, params.q.size(2));
  return ops::dispatch(
      context, [&] { return reference::selection_recall(context, resolved); },
      [&] { return cpu::selection_recall(context, resolved); });
}

}  // namespace msa
