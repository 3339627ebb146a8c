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

at::Tensor attend(const AttentionPlan& plan, const AttentionInputs& inputs, const at::Tensor& blocks) {
  const at::Tensor &q = inputs.q, &k = inputs.k, &v = inputs.v, &cu = inputs.cu_seqlens;
  if (!inputs.batch.is_paged && wants_grad({&q, &k, &v})) {
    return std::get<0>(blocks.defined() ? torch_ops::sparse_attention(q, k, v, blocks, cu, cu, plan.block_size)
                                        : torch_ops::dense_attention(q, k, v, cu, cu));
  }
  at::Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  at::Tensor lse = at::empty({q.size(0), q.size(1)}, at::kFloat);
  if (!blocks.defined()) {
    DenseAttentionParams params;
    params.q = const_view(q);
    params.k = inputs.keys;
    params.v = inputs.values;
    params.batch = inputs.batch;
    dense_attention(make_context(), params, mutable_view(out), mutable_view(lse));
    return out;
  }
  SparseAttentionParams params;
  params.q = const_view(q);
  params.k = inputs.keys;
  params.v = inputs.values;
  params.blocks = const_view(blocks);
  params.batch = inputs.batch;
  params.block_size = plan.block_size;
  params.trusted_blocks = true;
  sparse_attention(make_context(), params, mutable_view(out), mutable_view(lse));
  return out;
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
