// SPDX-License-Identifier: Apache-2.0
// Calls of the operators for one layer. Where autograd must see the call it goes through the torch operators, which
// check every block id; elsewhere it goes to the library directly, on ids that were chosen here and need no check.
#include "src/model/decoder_attention.h"

#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstdlib>

#include "bindings/torch/ops.h"
#include "msa/attention.h"
#include "msa/error.h"
#include "msa/select_blocks.h"
#include "src/model/linear.h"

namespace msa::model {
namespace {

DType view_dtype(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    case at::kInt: return DType::kInt32;
    default:
      throw Error(std::string("decoder: tensors of type ") + c10::toString(tensor.scalar_type()) +
                  " cannot be given to the operators");
  }
}

template <class View>
View shape_view(const at::Tensor& tensor) {
  View view;
  view.dtype = view_dtype(tensor);
  view.rank = static_cast<int>(tensor.dim());
  for (int d = 0; d < view.rank; ++d) {
    view.shape[static_cast<std::size_t>(d)] = tensor.size(d);
    view.strides[static_cast<std::size_t>(d)] = tensor.stride(d);
  }
  return view;
}

TensorView mutable_view(const at::Tensor& tensor) {
  TensorView view = shape_view<TensorView>(tensor);
  view.data = static_cast<std::byte*>(tensor.mutable_data_ptr());
  return view;
}

// The first block and the most recent ones: what a sink with a sliding window sees, at the same budget.
at::Tensor choose_window(const AttentionPlan& plan, const AttentionInputs& inputs) {
  const std::int64_t heads = inputs.k.size(1), tokens = inputs.q.size(0), topk = plan.topk;
  at::Tensor blocks = at::full({heads, tokens, topk}, -1, at::kInt);
  auto* const first = blocks.mutable_data_ptr<std::int32_t>();
  const Batch& batch = inputs.batch;
  for (std::size_t s = 0; s + 1 < batch.cu_seqlens_q.size(); ++s) {
    const std::int64_t begin = batch.cu_seqlens_q[s], end = batch.cu_seqlens_q[s + 1];
    const std::int64_t keys = batch.is_paged ? batch.seqlens_k[s] : batch.cu_seqlens_k[s + 1] - batch.cu_seqlens_k[s];
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t visible = (keys - end + row) / plan.block_size + 1;
      const std::int64_t taken = std::min(visible, topk);
      std::int32_t* const ids = first + row * topk;
      for (std::int64_t i = 0; i < taken; ++i) ids[i] = static_cast<std::int32_t>(visible - taken + i);
      if (topk > 1) ids[0] = 0;
    }
  }
  for (std::int64_t head = 1; head < heads; ++head) blocks.select(0, head).copy_(blocks.select(0, 0));
  return blocks;
}

// One head in place of none, shown `heads` times: [.., dim] becomes [.., heads, dim].
ConstTensorView repeat_head(ConstTensorView view, std::int64_t heads) {
  const auto last = static_cast<std::size_t>(view.rank - 1);
  view.shape[last + 1] = view.shape[last];
  view.strides[last + 1] = view.strides[last];
  view.shape[last] = heads;
  view.strides[last] = 0;
  ++view.rank;
  return view;
}

Attended attend_recorded(const AttentionPlan& plan, const at::Tensor& cu, const at::Tensor& q, const at::Tensor& k,
                         const at::Tensor& v, const at::Tensor& blocks) {
  auto [out, lse] = blocks.defined() ? torch_ops::sparse_attention(q, k, v, blocks, cu, cu, plan.block_size)
                                     : torch_ops::dense_attention(q, k, v, cu, cu);
  return {out, lse};
}

Attended attend_views(const AttentionPlan& plan, const Batch& batch, const at::Tensor& q, const ConstTensorView& keys,
                      const ConstTensorView& values, const at::Tensor& blocks) {
  Attended result = {at::empty({q.size(0), q.size(1), values.size(values.rank - 1)}, q.options()),
                     at::empty({q.size(0), q.size(1)}, at::kFloat)};
  const TensorView out = mutable_view(result.out), lse = mutable_view(result.lse);
  if (!blocks.defined()) {
    DenseAttentionParams params;
    params.q = const_view(q);
    params.k = keys;
    params.v = values;
    params.batch = batch;
    dense_attention(make_context(), params, out, lse);
    return result;
  }
  SparseAttentionParams params;
  params.q = const_view(q);
  params.k = keys;
  params.v = values;
  params.blocks = const_view(blocks);
  params.batch = batch;
  params.block_size = plan.block_size;
  params.trusted_blocks = true;
  sparse_attention(make_context(), params, out, lse);
  return result;
}

}  // namespace

Context make_context() {
  Context context;
  context.threads = at::get_num_threads();
  if (const char* const name = std::getenv("MSA_BACKEND"); name != nullptr) context.backend = parse_backend(name);
  return context;
}

ConstTensorView const_view(const at::Tensor& tensor) {
  ConstTensorView view = shape_view<ConstTensorView>(tensor);
  view.data = static_cast<const std::byte*>(tensor.const_data_ptr());
  return view;
}

at::Tensor choose_blocks(const AttentionPlan& plan, const AttentionInputs& inputs) {
  if (plan.mode == AttentionMode::kDense) return {};
  const c10::NoGradGuard no_grad;
  if (plan.mode == AttentionMode::kWindow) return choose_window(plan, inputs);
  at::Tensor blocks = at::empty({inputs.k.size(1), inputs.q.size(0), plan.topk}, at::kInt);
  if (plan.mode == AttentionMode::kOracle) {
    OracleBlocksParams params;
    params.q = const_view(inputs.q);
    params.k = inputs.keys;
    params.batch = inputs.batch;
    params.block_size = plan.block_size;
    params.topk = plan.topk;
    params.local_blocks = plan.local_blocks;
    params.init_blocks = plan.init_blocks;
    select_blocks_oracle(make_context(), params, mutable_view(blocks));
    return blocks;
  }
  SelectBlocksParams params;
  params.q_idx = const_view(inputs.q_idx);
  params.k_idx = inputs.index_keys;
  params.batch = inputs.batch;
  params.block_size = plan.block_size;
  params.topk = plan.topk;
  params.local_blocks = plan.local_blocks;
  params.init_blocks = plan.init_blocks;
  select_blocks(make_context(), params, mutable_view(blocks));
  return blocks;
}

Attended attend(const AttentionPlan& plan, const AttentionInputs& inputs, const at::Tensor& blocks) {
  const at::Tensor &q = inputs.q, &k = inputs.k, &v = inputs.v;
  if (!inputs.batch.is_paged && wants_grad({&q, &k, &v}))
    return attend_recorded(plan, inputs.cu_seqlens, q, k, v, blocks);
  return attend_views(plan, inputs.batch, q, inputs.keys, inputs.values, blocks);
}

Attended attend_index(const AttentionPlan& plan, const AttentionInputs& inputs, const at::Tensor& blocks) {
  const at::Tensor &q = inputs.q_idx, &k = inputs.k_idx, &v = inputs.v_idx;
  // Every group has blocks of its own, so the one key head is shown to each; all keys are seen by one group of all
  // heads.
  const std::int64_t shown = blocks.defined() ? q.size(1) : 1;
  if (!inputs.batch.is_paged && wants_grad({&q, &k, &v})) {
    return attend_recorded(plan, inputs.cu_seqlens, q, k.unsqueeze(1).expand({-1, shown, -1}),
                           v.unsqueeze(1).expand({-1, shown, -1}), blocks);
  }
  return attend_views(plan, inputs.batch, q, repeat_head(inputs.index_keys, shown),
                      repeat_head(inputs.index_values, shown), blocks);
}

at::Tensor with_sink(const Attended& attended, const at::Tensor& sinks) {
  const at::Tensor share = at::sigmoid(attended.lse - sinks.to(at::kFloat));
  return attended.out * share.unsqueeze(-1).to(attended.out.scalar_type());
}

ConstTensorView narrow_last(ConstTensorView view, std::int64_t begin, std::int64_t width) {
  view.data += static_cast<std::size_t>(begin) * dtype_size(view.dtype);
  view.shape[static_cast<std::size_t>(view.rank - 1)] = width;
  return view;
}

at::Tensor align(const AttentionPlan& plan, const AttentionInputs& inputs, const at::Tensor& blocks, Teacher teacher) {
  const at::Tensor q = inputs.q.detach(), k = inputs.k.detach();
  if (!inputs.batch.is_paged && wants_grad({&inputs.q_idx, &inputs.k_idx})) {
    const std::optional<at::Tensor> support = blocks.defined() ? std::optional(blocks) : std::nullopt;
    return torch_ops::index_kl(inputs.q_idx, inputs.k_idx, q, k, support, inputs.cu_seqlens, inputs.cu_seqlens,
                               plan.block_size, std::nullopt, std::nullopt, teacher == Teacher::kMax ? "max" : "mean");
  }
  IndexKlParams params;
  params.q_idx = const_view(inputs.q_idx);
  params.k_idx = inputs.index_keys;
  params.q = const_view(q);
  params.k = inputs.keys;
  if (blocks.defined()) params.blocks = const_view(blocks);
  params.batch = inputs.batch;
  params.block_size = plan.block_size;
  params.teacher = teacher;
  const std::int64_t tokens = q.size(0), heads = k.size(1);
  at::Tensor lse_main = at::empty({tokens, q.size(1)}, at::kFloat);
  at::Tensor lse_index = at::empty({tokens, heads}, at::kFloat);
  at::Tensor teacher_norm = at::empty({tokens, heads}, at::kFloat);
  const float kl =
      index_kl(make_context(), params, {mutable_view(lse_main), mutable_view(lse_index), mutable_view(teacher_norm)});
  return at::scalar_tensor(kl, at::kFloat);
}

}  // namespace msa::model
