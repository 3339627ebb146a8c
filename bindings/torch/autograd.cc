// SPDX-License-Identifier: Apache-2.0
// The way through torch's dispatcher: the C++ functions of ops.h, and the Autograd kernels. An Autograd kernel calls
// the operator again below autograd and, on the way back, an explicit backward operator, so that tracing
// (torch.compile) sees operators only. Tested in tests/python/test_ops*.py.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>

#include "bindings/torch/ops.h"

namespace msa::torch_ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// save_for_backward keeps an absent tensor as an undefined one; back again.
OptionalTensor to_optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }
Tensor to_tensor(const OptionalTensor& tensor) { return tensor ? *tensor : Tensor(); }

struct SparseAttention : torch::autograd::Function<SparseAttention> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& blocks, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                               std::int64_t block_size, std::optional<double> scale,
                               const OptionalTensor& query_positions) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse] = sparse_attention(q, k, v, blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, query_positions);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q, k, v, blocks, out, lse, cu_seqlens_q, cu_seqlens_k, to_tensor(query_positions)});
    ctx->saved_data["block_size"] = block_size;
    ctx->saved_data["scale"] = scale;
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto [dq, dk, dv] =
        sparse_attention_backward(to_optional(grads[0]), to_optional(grads[1]), saved[0], saved[1], saved[2], saved[3],
                                  saved[4], saved[5], saved[6], saved[7], ctx->saved_data["block_size"].toInt(),
                                  ctx->saved_data["scale"].toOptional<double>(), to_optional(saved[8]));
    return {dq, dk, dv, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct DenseAttention : torch::autograd::Function<DenseAttention> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, std::optional<double> scale,
                               const OptionalTensor& query_positions) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse] = dense_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, query_positions);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, to_tensor(query_positions)});
    ctx->saved_data["scale"] = scale;
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto [dq, dk, dv] = dense_attention_backward(to_optional(grads[0]), to_optional(grads[1]), saved[0], saved[1],
                                                 saved[2], saved[3], saved[4], saved[5], saved[6],
                                                 ctx->saved_data["scale"].toOptional<double>(), to_optional(saved[7]));
    return {dq, dk, dv, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct IndexKl : torch::autograd::Function<IndexKl> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& q_idx, const Tensor& k_idx, const Tensor& q,
                        const Tensor& k, const OptionalTensor& blocks, const Tensor& cu_seqlens_q,
                        const Tensor& cu_seqlens_k, std::int64_t block_size, std::optional<double> index_scale,
                        std::optional<double> scale, std::string_view teacher, const OptionalTensor& query_positions) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [kl, lse_main, lse_index, teacher_norm] =
        index_kl_forward(q_idx, k_idx, q, k, blocks, cu_seqlens_q, cu_seqlens_k, block_size, index_scale, scale,
                         teacher, query_positions);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q_idx, k_idx, q, k, to_tensor(blocks), lse_main, lse_index, teacher_norm, cu_seqlens_q,
                            cu_seqlens_k, to_tensor(query_positions)});
    ctx->saved_data["block_size"] = block_size;
    ctx->saved_data["index_scale"] = index_scale;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["teacher"] = std::string(teacher);
    return kl;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(12);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    std::tie(result[0], result[1]) = index_kl_backward(
        grads[0], saved[0], saved[1], saved[2], saved[3], to_optional(saved[4]), saved[5], saved[6], saved[7], saved[8],
        saved[9], ctx->saved_data["block_size"].toInt(), ctx->saved_data["index_scale"].toOptional<double>(),
        ctx->saved_data["scale"].toOptional<double>(), ctx->saved_data["teacher"].toStringRef(),
        to_optional(saved[10]));
    return result;
  }
};

std::tuple<Tensor, Tensor> sparse_attention_autograd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                     const Tensor& blocks, const Tensor& cu_seqlens_q,
                                                     const Tensor& cu_seqlens_k, std::int64_t block_size,
                                                     std::optional<double> scale,
                                                     const OptionalTensor& query_positions) {
  const variable_list result =
      SparseAttention::apply(q, k, v, blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, query_positions);
  return {result[0], result[1]};
}

std::tuple<Tensor, Tensor> dense_attention_autograd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                    std::optional<double> scale,
                                                    const OptionalTensor& query_positions) {
  const variable_list result = DenseAttention::apply(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, query_positions);
  return {result[0], result[1]};
}

Tensor index_kl_autograd(const Tensor& q_idx, const Tensor& k_idx, const Tensor& q, const Tensor& k,
                         const OptionalTensor& blocks, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                         std::int64_t block_size, std::optional<double> index_scale, std::optional<double> scale,
                         std::string_view teacher, const OptionalTensor& query_positions) {
  return IndexKl::apply(q_idx, k_idx, q, k, blocks, cu_seqlens_q, cu_seqlens_k, block_size, index_scale, scale, teacher,
                        query_positions);
}

/// Metrics and selections carry no gradient: their outputs are constants.
template <auto op>
struct NotDifferentiable;
template <class Result, class... Args, Result (*op)(Args...)>
struct NotDifferentiable<op> {
  static Result call(Args... args) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op(args...);
  }
};

}  // namespace

Tensor select_blocks(const Tensor& q_idx, const Tensor& k_idx, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                     std::int64_t block_size, std::int64_t topk, std::int64_t local_blocks, std::int64_t init_blocks,
                     const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(select_blocks)>("msa::select_blocks");
  return op.call(q_idx, k_idx, cu_seqlens_q, cu_seqlens_k, block_size, topk, local_blocks, init_blocks,
                 query_positions);
}

Tensor topk_blocks(const Tensor& scores, std::int64_t topk) {
  static const auto op = find_op<decltype(topk_blocks)>("msa::topk_blocks");
  return op.call(scores, topk);
}

Tensor select_blocks_oracle(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                            std::int64_t block_size, std::int64_t topk, std::int64_t local_blocks,
                            std::int64_t init_blocks, std::optional<double> scale,
                            const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(select_blocks_oracle)>("msa::select_blocks_oracle");
  return op.call(q, k, cu_seqlens_q, cu_seqlens_k, block_size, topk, local_blocks, init_blocks, scale, query_positions);
}

std::tuple<Tensor, Tensor> sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& blocks,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                            std::int64_t block_size, std::optional<double> scale,
                                            const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(sparse_attention)>("msa::sparse_attention");
  return op.call(q, k, v, blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, query_positions);
}

std::tuple<Tensor, Tensor> dense_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                           std::optional<double> scale, const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(dense_attention)>("msa::dense_attention");
  return op.call(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, query_positions);
}

Tensor index_kl(const Tensor& q_idx, const Tensor& k_idx, const Tensor& q, const Tensor& k,
                const OptionalTensor& blocks, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                std::int64_t block_size, std::optional<double> index_scale, std::optional<double> scale,
                std::string_view teacher, const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(index_kl)>("msa::index_kl");
  return op.call(q_idx, k_idx, q, k, blocks, cu_seqlens_q, cu_seqlens_k, block_size, index_scale, scale, teacher,
                 query_positions);
}

std::tuple<Tensor, Tensor> selection_recall(const Tensor& q, const Tensor& k, const Tensor& blocks,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                            std::int64_t block_size, std::optional<double> scale,
                                            const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(selection_recall)>("msa::selection_recall");
  return op.call(q, k, blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, query_positions);
}

Tensor select_blocks_paged(const Tensor& q_idx, const Tensor& k_idx_pages, const Tensor& cu_seqlens_q,
                           const Tensor& page_table, const Tensor& seqlens_k, std::int64_t block_size,
                           std::int64_t topk, std::int64_t local_blocks, std::int64_t init_blocks,
                           const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(select_blocks_paged)>("msa::select_blocks_paged");
  return op.call(q_idx, k_idx_pages, cu_seqlens_q, page_table, seqlens_k, block_size, topk, local_blocks, init_blocks,
                 query_positions);
}

Tensor select_blocks_oracle_paged(const Tensor& q, const Tensor& k_pages, const Tensor& cu_seqlens_q,
                                  const Tensor& page_table, const Tensor& seqlens_k, std::int64_t block_size,
                                  std::int64_t topk, std::int64_t local_blocks, std::int64_t init_blocks,
                                  std::optional<double> scale, const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(select_blocks_oracle_paged)>("msa::select_blocks_oracle_paged");
  return op.call(q, k_pages, cu_seqlens_q, page_table, seqlens_k, block_size, topk, local_blocks, init_blocks, scale,
                 query_positions);
}

std::tuple<Tensor, Tensor> sparse_attention_paged(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                                  const Tensor& blocks, const Tensor& cu_seqlens_q,
                                                  const Tensor& page_table, const Tensor& seqlens_k,
                                                  std::int64_t block_size, std::optional<double> scale,
                                                  const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(sparse_attention_paged)>("msa::sparse_attention_paged");
  return op.call(q, k_pages, v_pages, blocks, cu_seqlens_q, page_table, seqlens_k, block_size, scale, query_positions);
}

std::tuple<Tensor, Tensor> dense_attention_paged(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                                 const Tensor& cu_seqlens_q, const Tensor& page_table,
                                                 const Tensor& seqlens_k, std::optional<double> scale,
                                                 const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(dense_attention_paged)>("msa::dense_attention_paged");
  return op.call(q, k_pages, v_pages, cu_seqlens_q, page_table, seqlens_k, scale, query_positions);
}

std::tuple<Tensor, Tensor, Tensor> sparse_attention_backward(const OptionalTensor& dout, const OptionalTensor& dlse,
                                                             const Tensor& q, const Tensor& k, const Tensor& v,
                                                             const Tensor& blocks, const Tensor& out, const Tensor& lse,
                                                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                             std::int64_t block_size, std::optional<double> scale,
                                                             const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(sparse_attention_backward)>("msa::sparse_attention_backward");
  return op.call(dout, dlse, q, k, v, blocks, out, lse, cu_seqlens_q, cu_seqlens_k, block_size, scale, query_positions);
}

std::tuple<Tensor, Tensor, Tensor> dense_attention_backward(const OptionalTensor& dout, const OptionalTensor& dlse,
                                                            const Tensor& q, const Tensor& k, const Tensor& v,
                                                            const Tensor& out, const Tensor& lse,
                                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                            std::optional<double> scale,
                                                            const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(dense_attention_backward)>("msa::dense_attention_backward");
  return op.call(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, query_positions);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> index_kl_forward(const Tensor& q_idx, const Tensor& k_idx, const Tensor& q,
                                                            const Tensor& k, const OptionalTensor& blocks,
                                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                            std::int64_t block_size, std::optional<double> index_scale,
                                                            std::optional<double> scale, std::string_view teacher,
                                                            const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(index_kl_forward)>("msa::_index_kl_forward");
  return op.call(q_idx, k_idx, q, k, blocks, cu_seqlens_q, cu_seqlens_k, block_size, index_scale, scale, teacher,
                 query_positions);
}

std::tuple<Tensor, Tensor> index_kl_backward(const Tensor& grad_output, const Tensor& q_idx, const Tensor& k_idx,
                                             const Tensor& q, const Tensor& k, const OptionalTensor& blocks,
                                             const Tensor& lse_main, const Tensor& lse_index,
                                             const Tensor& teacher_norm, const Tensor& cu_seqlens_q,
                                             const Tensor& cu_seqlens_k, std::int64_t block_size,
                                             std::optional<double> index_scale, std::optional<double> scale,
                                             std::string_view teacher, const OptionalTensor& query_positions) {
  static const auto op = find_op<decltype(index_kl_backward)>("msa::_index_kl_backward");
  return op.call(grad_output, q_idx, k_idx, q, k, blocks, lse_main, lse_index, teacher_norm, cu_seqlens_q, cu_seqlens_k,
                 block_size, index_scale, scale, teacher, query_positions);
}

TORCH_LIBRARY_IMPL(msa, Autograd, m) {
  m.impl("sparse_attention", sparse_attention_autograd);
  m.impl("dense_attention", dense_attention_autograd);
  m.impl("index_kl", index_kl_autograd);
  m.impl("select_blocks", NotDifferentiable<select_blocks>::call);
  m.impl("topk_blocks", NotDifferentiable<topk_blocks>::call);
  m.impl("select_blocks_oracle", NotDifferentiable<select_blocks_oracle>::call);
  m.impl("selection_recall", NotDifferentiable<selection_recall>::call);
  m.impl("select_blocks_paged", NotDifferentiable<select_blocks_paged>::call);
  m.impl("select_blocks_oracle_paged", NotDifferentiable<select_blocks_oracle_paged>::call);
  // Gradients through pages, and gradients of gradients: asking for one throws "derivative for msa::... is not
  // implemented".
  for (const char* op : {"sparse_attention_paged", "dense_attention_paged", "sparse_attention_backward",
                         "dense_attention_backward", "_index_kl_forward", "_index_kl_backward"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace msa::torch_ops
