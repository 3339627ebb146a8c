// SPDX-License-Identifier: Apache-2.0
// Front door of sparse and dense attention, forward and backward: validate, choose a backend, call it.
#include "msa/attention.h"

#include "src/cpu/operators.h"
#include "src/cuda/operators.h"
#include "src/ops/device_call.h"
#include "src/ops/validate.h"
#include "src/reference/operators.h"

namespace msa {
namespace {

// What sparse and dense attention share. Returns kv_heads. block_size 0: dense.
std::int64_t check_inputs(const ops::Validator& check, const ConstTensorView& q, const ConstTensorView& k,
                          const ConstTensorView& v, const Batch& batch, std::int64_t block_size,
                          const std::optional<double>& scale) {
  check.check_scale("scale", scale);
  check.check_layout("q", q, 3);
  check.check_float("q", q);
  check.check_keys("k", k, batch, true);
  check.check_keys("v", v, batch, true);
  check.check_key_dtype("k", k, "q", q);
  check.check_same_dtype("v", v, "k", k);
  const std::int64_t kv_heads = check.check_heads(q, k);
  check.check_same_tokens("v", v, "k", k, batch);
  check.check_size("v", v, v.rank - 2, kv_heads, "kv_heads of k");
  check.check_batch(batch, q.size(0), "k", k, block_size);
  return kv_heads;
}

void check_out(const ops::Validator& check, const char* name, const ConstTensorView& out, const ConstTensorView& q,
               std::int64_t value_dim) {
  check.check_layout(name, out, 3);
  check.check_same_dtype(name, out, "q", q);
  check.check_size(name, out, 0, q.size(0), "the query rows");
  check.check_size(name, out, 1, q.size(1), "query_heads");
  check.check_size(name, out, 2, value_dim, "value_dim");
}

void check_lse(const ops::Validator& check, const char* name, const ConstTensorView& lse, const ConstTensorView& q) {
  check.check_layout(name, lse, 2);
  check.check_dtype(name, lse, DType::kFloat32);
  check.check_size(name, lse, 0, q.size(0), "the query rows");
  check.check_size(name, lse, 1, q.size(1), "query_heads");
}

void check_backward(const ops::Validator& check, const ConstTensorView& q, const ConstTensorView& k,
                    const ConstTensorView& v, const AttentionSaved& saved, const AttentionGrads& grads) {
  check.check_same_dtype("k", k, "q", q);  // float8 is for inference
  check_out(check, "out", saved.out, q, v.size(2));
  check_out(check, "dout", saved.dout, q, v.size(2));
  check_lse(check, "lse", saved.lse, q);
  if (!saved.dlse.empty()) check_lse(check, "dlse", saved.dlse, q);
  check.check_like("dq", grads.dq, "q", q);
  check.check_like("dk", grads.dk, "k", k);
  check.check_like("dv", grads.dv, "v", v);
}

SparseAttentionParams check_sparse(const ops::Validator& check, const SparseAttentionParams& params) {
  check.check_block_size(params.block_size);
  const std::int64_t kv_heads =
      check_inputs(check, params.q, params.k, params.v, params.batch, params.block_size, params.scale);
  check.check_blocks(params.blocks, params.batch, kv_heads, params.q.size(0), params.block_size,
                     !params.trusted_blocks);
  SparseAttentionParams resolved = params;
  resolved.scale = ops::resolve_scale(params.scale, params.q.size(2));
  return resolved;
}

DenseAttentionParams check_dense(const ops::Validator& check, const DenseAttentionParams& params) {
  check_inputs(check, params.q, params.k, params.v, params.batch, 0, params.scale);
  DenseAttentionParams resolved = params;
  resolved.scale = ops::resolve_scale(params.scale, params.q.size(2));
  return resolved;
}

ops::DeviceContents device_contents(const SparseAttentionParams& params) {
  ops::DeviceContents contents{&params.batch, params.q.size(0), "k", params.k, {}, params.block_size};
  if (!params.trusted_blocks) contents.blocks = params.blocks;
  return contents;
}

ops::DeviceContents device_contents(const DenseAttentionParams& params) {
  return {&params.batch, params.q.size(0), "k", params.k, {}, 0};
}

}  // namespace

void sparse_attention(const Context& context, const SparseAttentionParams& params, const TensorView& out,
                      const TensorView& lse) {
  const ops::Validator check("sparse_attention", context);
  const SparseAttentionParams resolved = check_sparse(check, params);
  check_out(check, "out", out, params.q, params.v.size(params.v.rank - 1));
  check_lse(check, "lse", lse, params.q);
  ops::dispatch(
      context, [&] { reference::sparse_attention(context, resolved, out, lse); },
      [&] { cpu::sparse_attention(context, resolved, out, lse); },
      [&] {
        const ops::DeviceCall call(check, context,
                                   cuda::sparse_attention_workspace(resolved, ops::operator_limit(context)),
                                   device_contents(resolved));
        cuda::sparse_attention(call.context(), resolved, out, lse);
      });
}

void sparse_attention_backward(const Context& context, const SparseAttentionParams& params, const AttentionSaved& saved,
                               const AttentionGrads& grads) {
  const ops::Validator check("sparse_attention_backward", context);
  check.check_packed(params.batch);
  const SparseAttentionParams resolved = check_sparse(check, params);
  check_backward(check, params.q, params.k, params.v, saved, grads);
  ops::dispatch(
      context, [&] { reference::sparse_attention_backward(context, resolved, saved, grads); },
      [&] { cpu::sparse_attention_backward(context, resolved, saved, grads); },
      [&] {
        const ops::DeviceCall call(check, context,
                                   cuda::sparse_attention_backward_workspace(resolved, ops::operator_limit(context)),
                                   device_contents(resolved));
        cuda::sparse_attention_backward(call.context(), resolved, saved, grads);
      });
}

void dense_attention(const Context& context, const DenseAttentionParams& params, const TensorView& out,
                     const TensorView& lse) {
  const ops::Validator check("dense_attention", context);
  const DenseAttentionParams resolved = check_dense(check, params);
  check_out(check, "out", out, params.q, params.v.size(params.v.rank - 1));
  check_lse(check, "lse", lse, params.q);
  ops::dispatch(
      context, [&] { reference::dense_attention(context, resolved, out, lse); },
      [&] { cpu::dense_attention(context, resolved, out, lse); },
      [&] {
        const ops::DeviceCall call(check, context,
                                   cuda::dense_attention_workspace(resolved, ops::operator_limit(context)),
                                   device_contents(resolved));
        cuda::dense_attention(call.context(), resolved, out, lse);
      });
}

void dense_attention_backward(const Context& context, const DenseAttentionParams& params, const AttentionSaved& saved,
                              const AttentionGrads& grads) {
  const ops::Validator check("dense_attention_backward", context);
  check.check_packed(params.batch);
  const DenseAttentionParams resolved = check_dense(check, params);
  check_backward(check, params.q, params.k, params.v, saved, grads);
  ops::dispatch(
      context, [&] { reference::dense_attention_backward(context, resolved, saved, grads); },
      [&] { cpu::dense_attention_backward(context, resolved, saved, grads); },
      [&] {
        const ops::DeviceCall call(check, context,
                                   cuda::dense_attention_backward_workspace(resolved, ops::operator_limit(context)),
                                   device_contents(resolved));
        cuda::dense_attention_backward(call.context(), resolved, saved, grads);
      });
}

std::size_t sparse_attention_workspace(const Context& context, const SparseAttentionParams& params) {
  const ops::Validator check("sparse_attention", context, ops::Validator::Reads::kShapes);
  const SparseAttentionParams resolved = check_sparse(check, params);
  return context.backend == Backend::kCuda
             ? ops::device_bytes(check, context,
                                 cuda::sparse_attention_workspace(resolved, ops::operator_limit(context)))
             : 0;
}

std::size_t sparse_attention_backward_workspace(const Context& context, const SparseAttentionParams& params) {
  const ops::Validator check("sparse_attention_backward", context, ops::Validator::Reads::kShapes);
  check.check_packed(params.batch);
  const SparseAttentionParams resolved = check_sparse(check, params);
  return context.backend == Backend::kCuda
             ? ops::device_bytes(check, context,
                                 cuda::sparse_attention_backward_workspace(resolved, ops::operator_limit(context)))
             : 0;
}

std::size_t dense_attention_workspace(const Context& context, const DenseAttentionParams& params) {
  const ops::Validator check("dense_attention", context, ops::Validator::Reads::kShapes);
  const DenseAttentionParams resolved = check_dense(check, params);
  return context.backend == Backend::kCuda
             ? ops::device_bytes(check, context,
                                 cuda::dense_attention_workspace(resolved, ops::operator_limit(context)))
             : 0;
}

std::size_t dense_attention_backward_workspace(const Context& context, const DenseAttentionParams& params) {
  const ops::Validator check("dense_attention_backward", context, ops::Validator::Reads::kShapes);
  check.check_packed(params.batch);
  const DenseAttentionParams resolved = check_dense(check, params);
  return context.backend == Backend::kCuda
             ? ops::device_bytes(check, context,
                                 cuda::dense_attention_backward_workspace(resolved, ops::operator_limit(context)))
             : 0;
}

}  // namespace msa
