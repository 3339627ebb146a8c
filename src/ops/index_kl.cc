// SPDX-License-Identifier: Apache-2.0
// Front door of the KL loss and of the recalls: validate, choose a backend, call it.
#include "msa/index_kl.h"

#include "src/cpu/operators.h"
#include "src/cuda/operators.h"
#include "src/ops/device_call.h"
#include "src/ops/validate.h"
#include "src/reference/operators.h"

namespace msa {
namespace {

IndexKlParams check_params(const ops::Validator& check, const IndexKlParams& params) {
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
    check.check_blocks(params.blocks, params.batch, kv_heads, params.q.size(0), params.block_size, true);
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

SelectionRecallParams check_recall(const ops::Validator& check, const SelectionRecallParams& params) {
  check.check_block_size(params.block_size);
  check.check_scale("scale", params.scale);
  const std::int64_t kv_heads = check.check_queries_and_keys(params.q, params.k, params.batch);
  check.check_batch(params.batch, params.q.size(0), "k", params.k, params.block_size);
  check.check_blocks(params.blocks, params.batch, kv_heads, params.q.size(0), params.block_size, true);
  SelectionRecallParams resolved = params;
  resolved.scale = ops::resolve_scale(params.scale, params.q.size(2));
  return resolved;
}

/// A float32 tensor of `size` results or of a gradient.
void check_scalars(const ops::Validator& check, const char* name, const ConstTensorView& view, std::int64_t size) {
  check.check_layout(name, view, 1);
  check.check_dtype(name, view, DType::kFloat32);
  check.check_size(name, view, 0, size, "the number of results");
}

template <class Params>
ops::DeviceContents device_contents(const Params& params) {
  return {&params.batch, params.q.size(0), "k", params.k, params.blocks, params.block_size};
}

}  // namespace

float index_kl(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved) {
  const ops::Validator check("index_kl", context);
  const IndexKlParams resolved = check_params(check, params);
  check_saved(check, params, saved);
  return ops::dispatch(
      context, [&] { return reference::index_kl(context, resolved, saved); },
      [&] { return cpu::index_kl(context, resolved, saved); },
      [&] {
        const ops::DeviceCall call(check, context, cuda::index_kl_workspace(resolved, ops::operator_limit(context)),
                                   device_contents(resolved));
        cuda::index_kl(call.context(), resolved, saved, static_cast<float*>(call.scalars()));
        float kl = 0;
        cuda::copy_to_host(context, &kl, call.scalars(), sizeof(kl));
        return kl;
      });
}

void index_kl(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved, const TensorView& kl) {
  const ops::Validator check("index_kl", context);
  check_scalars(check, "kl", kl, 1);
  auto* const result = reinterpret_cast<float*>(kl.data);
  if (context.backend != Backend::kCuda) {
    *result = index_kl(context, params, saved);
    return;
  }
  const IndexKlParams resolved = check_params(check, params);
  check_saved(check, params, saved);
  const ops::DeviceCall call(check, context, cuda::index_kl_workspace(resolved, ops::operator_limit(context)),
                             device_contents(resolved));
  cuda::index_kl(call.context(), resolved, saved, result);
}

std::size_t index_kl_workspace(const Context& context, const IndexKlParams& params) {
  const ops::Validator check("index_kl", context, ops::Validator::Reads::kShapes);
  const IndexKlParams resolved = check_params(check, params);
  return context.backend == Backend::kCuda
             ? ops::device_bytes(check, context, cuda::index_kl_workspace(resolved, ops::operator_limit(context)))
             : 0;
}

void index_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved,
                       float grad_output, const TensorView& dq_idx, const TensorView& dk_idx) {
  const ops::Validator check("index_kl_backward", context);
  check.check_packed(params.batch);
  const IndexKlParams resolved = check_params(check, params);
  check_saved(check, params, saved);
  check.check_like("dq_idx", dq_idx, "q_idx", params.q_idx);
  check.check_like("dk_idx", dk_idx, "k_idx", params.k_idx);
  ops::dispatch(
      context, [&] { reference::index_kl_backward(context, resolved, saved, grad_output, dq_idx, dk_idx); },
      [&] { cpu::index_kl_backward(context, resolved, saved, grad_output, dq_idx, dk_idx); },
      [&] {
        const ops::DeviceCall call(check, context,
                                   cuda::index_kl_backward_workspace(resolved, ops::operator_limit(context)),
                                   device_contents(resolved));
        cuda::copy_to_device(context, call.scalars(), &grad_output, sizeof(grad_output));
        cuda::index_kl_backward(call.context(), resolved, saved, static_cast<const float*>(call.scalars()), dq_idx,
                                dk_idx);
      });
}

void index_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved,
                       const ConstTensorView& grad_output, const TensorView& dq_idx, const TensorView& dk_idx) {
  const ops::Validator check("index_kl_backward", context);
  check_scalars(check, "grad_output", grad_output, 1);
  const auto* const grad = reinterpret_cast<const float*>(grad_output.data);
  if (context.backend != Backend::kCuda) {
    index_kl_backward(context, params, saved, *grad, dq_idx, dk_idx);
    return;
  }
  check.check_packed(params.batch);
  const IndexKlParams resolved = check_params(check, params);
  check_saved(check, params, saved);
  check.check_like("dq_idx", dq_idx, "q_idx", params.q_idx);
  check.check_like("dk_idx", dk_idx, "k_idx", params.k_idx);
  const ops::DeviceCall call(check, context, cuda::index_kl_backward_workspace(resolved, ops::operator_limit(context)),
                             device_contents(resolved));
  cuda::index_kl_backward(call.context(), resolved, saved, grad, dq_idx, dk_idx);
}

std::size_t index_kl_backward_workspace(const Context& context, const IndexKlParams& params) {
  const ops::Validator check("index_kl_backward", context, ops::Validator::Reads::kShapes);
  check.check_packed(params.batch);
  const IndexKlParams resolved = check_params(check, params);
  return context.backend == Backend::kCuda
             ? ops::device_bytes(check, context,
                                 cuda::index_kl_backward_workspace(resolved, ops::operator_limit(context)))
             : 0;
}

SelectionRecall selection_recall(const Context& context, const SelectionRecallParams& params) {
  const ops::Validator check("selection_recall", context);
  const SelectionRecallParams resolved = check_recall(check, params);
  return ops::dispatch(
      context, [&] { return reference::selection_recall(context, resolved); },
      [&] { return cpu::selection_recall(context, resolved); },
      [&] {
        struct {
          std::int64_t rows = 0;
          float recalls[2] = {0, 0};
        } host;
        const ops::DeviceCall call(check, context, cuda::selection_recall_workspace(resolved),
                                   device_contents(resolved));
        auto* const rows = static_cast<std::int64_t*>(call.scalars());
        cuda::selection_recall(call.context(), resolved, reinterpret_cast<float*>(rows + 1), rows);
        cuda::copy_to_host(context, &host, rows, sizeof(host));
        return SelectionRecall{host.recalls[0], host.recalls[1], host.rows};
      });
}

void selection_recall(const Context& context, const SelectionRecallParams& params, const TensorView& recalls) {
  const ops::Validator check("selection_recall", context);
  check_scalars(check, "recalls", recalls, 2);
  auto* const result = reinterpret_cast<float*>(recalls.data);
  if (context.backend != Backend::kCuda) {
    const SelectionRecall recall = selection_recall(context, params);
    result[0] = static_cast<float>(recall.block_recall);
    result[1] = static_cast<float>(recall.score_recall);
    return;
  }
  const SelectionRecallParams resolved = check_recall(check, params);
  const ops::DeviceCall call(check, context, cuda::selection_recall_workspace(resolved), device_contents(resolved));
  cuda::selection_recall(call.context(), resolved, result, static_cast<std::int64_t*>(call.scalars()));
}

std::size_t selection_recall_workspace(const Context& context, const SelectionRecallParams& params) {
  const ops::Validator check("selection_recall", context, ops::Validator::Reads::kShapes);
  const SelectionRecallParams resolved = check_recall(check, params);
  return context.backend == Backend::kCuda
             ? ops::device_bytes(check, context, cuda::selection_recall_workspace(resolved))
             : 0;
}

}  // namespace msa
