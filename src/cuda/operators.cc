// SPDX-License-Identifier: Apache-2.0
// Which path a call takes: the fast kernels where geometry and dtype allow, else the generic ones. The choice looks at
// geometry, dtype and alignment only, never at lengths or batch, so that prefill, decode and training of one model
// agree. docs/cuda.md has the table.
#include "src/cuda/operators.h"

#include <algorithm>

#include "src/core/screen_switch.h"
#include "src/cuda/attention_backward.h"
#include "src/cuda/dense_attention.h"
#include "src/cuda/generic/attention.h"
#include "src/cuda/generic/block_mass.h"
#include "src/cuda/generic/index_kl.h"
#include "src/cuda/generic/select_blocks.h"
#include "src/cuda/index_kl.h"
#include "src/cuda/runtime.h"
#include "src/cuda/select_blocks.h"
#include "src/cuda/sparse_attention.h"
#include "src/cuda/topk_blocks.h"

namespace msa::cuda {

namespace {

SelectPlan plan_of(const SelectBlocksParams& params, std::size_t limit) {
  return plan_select(shape_of(params), SelectSchedule::kAuto, core::screen_switch(), limit);
}

}  // namespace

void select_blocks(const Context& context, const SelectBlocksParams& params, const TensorView& blocks) {
  if (takes_select(params)) {
    const SelectPlan plan = plan_of(params, context.workspace_bytes);
    launch_select(plan, params, blocks, context.workspace, multiprocessor_count(), context.stream);
  } else {
    generic::select_blocks(context.stream, params, blocks);
  }
}
std::size_t select_blocks_workspace(const SelectBlocksParams& params, std::size_t limit) {
  return takes_select(params) ? plan_of(params, limit).bytes : 0;
}

void select_blocks_oracle(const Context& context, const OracleBlocksParams& params, const TensorView& blocks) {
  generic::select_blocks_oracle(context.stream, context.workspace, params, blocks);
}
std::size_t select_blocks_oracle_workspace(const OracleBlocksParams& params) {
  return generic::select_blocks_oracle_workspace(params);
}

void topk_blocks(const Context& context, const TopkBlocksParams& params, const TensorView& ids) {
  const std::int64_t rows = params.scores.size(0);
  const std::int64_t blocks = params.scores.size(1);
  launch_topk(plan_topk(rows, blocks, multiprocessor_count()), reinterpret_cast<const float*>(params.scores.data),
              params.scores.stride(0), rows, blocks, params.topk, reinterpret_cast<std::int32_t*>(ids.data),
              ids.stride(0), context.stream);
}
std::size_t topk_blocks_workspace(const TopkBlocksParams&) { return 0; }

void sparse_attention(const Context& context, const SparseAttentionParams& params, const TensorView& out,
                      const TensorView& lse) {
  if (is_fast_geometry(params) && has_fast_layout(params)) {
    // As many queries at once as the workspace at hand lets; their number changes no bit.
    const SparseAttentionPlan plan = plan_sparse_attention(params, context.workspace_bytes);
    run_sparse_attention(context, params, plan, out, lse);
  } else {
    generic::attention(context.stream, params, out, lse);
  }
}
std::size_t sparse_attention_workspace(const SparseAttentionParams& params, std::size_t limit) {
  return is_fast_geometry(params) && has_fast_layout(params) ? plan_sparse_attention(params, limit).bytes : 0;
}

void sparse_attention_backward(const Context& context, const SparseAttentionParams& params, const AttentionSaved& saved,
                               const AttentionGrads& grads) {
  if (takes_backward(params) && takes_gradient(saved.dout)) {
    const AttentionBackwardPlan plan = plan_attention_backward(params, context.workspace_bytes);
    run_attention_backward(context, params, plan, saved, grads);
  } else {
    generic::attention_backward(context.stream, context.workspace, params, saved, grads);
  }
}
std::size_t sparse_attention_backward_workspace(const SparseAttentionParams& params, std::size_t limit) {
  const std::size_t plain = generic::attention_backward_workspace(params);  // for a dout that cannot be copied
  return takes_backward(params) ? std::max(plan_attention_backward(params, limit).bytes, plain) : plain;
}

void dense_attention(const Context& context, const DenseAttentionParams& params, const TensorView& out,
                     const TensorView& lse) {
  if (is_fast_geometry(params) && has_fast_layout(params)) {
    run_dense_attention(context, params, plan_dense_attention(params, context.workspace_bytes), out, lse);
  } else {
    generic::attention(context.stream, generic::over_whole_prefix(params), out, lse);
  }
}
std::size_t dense_attention_workspace(const DenseAttentionParams& params, std::size_t limit) {
  return is_fast_geometry(params) && has_fast_layout(params) ? plan_dense_attention(params, limit).bytes : 0;
}

void dense_attention_backward(const Context& context, const DenseAttentionParams& params, const AttentionSaved& saved,
                              const AttentionGrads& grads) {
  const SparseAttentionParams whole = generic::over_whole_prefix(params);
  if (takes_backward(whole) && takes_gradient(saved.dout)) {
    const AttentionBackwardPlan plan = plan_attention_backward(whole, context.workspace_bytes);
    run_dense_attention_backward(context, whole, plan, saved, grads);
  } else {
    generic::attention_backward(context.stream, context.workspace, whole, saved, grads);
  }
}
std::size_t dense_attention_backward_workspace(const DenseAttentionParams& params, std::size_t limit) {
  return sparse_attention_backward_workspace(generic::over_whole_prefix(params), limit);
}

void index_kl(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved, float* kl) {
  if (takes_index_kl(params)) {
    run_fast_index_kl(context, params, plan_fast_index_kl(params, context.workspace_bytes), saved, kl);
  } else {
    generic::index_kl(context.stream, context.workspace, params, saved, kl);
  }
}
std::size_t index_kl_workspace(const IndexKlParams& params, std::size_t limit) {
  return takes_index_kl(params) ? plan_fast_index_kl(params, limit).bytes : generic::index_kl_workspace(params);
}

void index_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved,
                       const float* grad_output, const TensorView& dq_idx, const TensorView& dk_idx) {
  if (takes_index_kl(params)) {
    run_fast_index_kl_backward(context, params, plan_fast_index_kl_backward(params, context.workspace_bytes), saved,
                               grad_output, dq_idx, dk_idx);
  } else {
    generic::index_kl_backward(context.stream, params, saved, grad_output, dq_idx, dk_idx);
  }
}
std::size_t index_kl_backward_workspace(const IndexKlParams& params, std::size_t limit) {
  return takes_index_kl(params) ? plan_fast_index_kl_backward(params, limit).bytes : 0;
}

void selection_recall(const Context& context, const SelectionRecallParams& params, float* recalls, std::int64_t* rows) {
  generic::selection_recall(context.stream, context.workspace, params, recalls, rows);
}
std::size_t selection_recall_workspace(const SelectionRecallParams& params) {
  return generic::selection_recall_workspace(params);
}

}  // namespace msa::cuda
