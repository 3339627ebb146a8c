// SPDX-License-Identifier: Apache-2.0
// Runs the generic CUDA kernels in the emulator on the problems of the unit tests: outputs start as NaN between gaps,
// workspace is as large as its plan says, filled with poison, and its end is watched.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "src/cuda/generic/attention_backward.cuh"
#include "src/cuda/generic/block_mass.cuh"
#include "src/cuda/generic/index_kl.cuh"
#include "src/cuda/generic/select_blocks.cuh"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::testing {

/// `bytes` of scratch memory full of NaN, with a guard behind them.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) : bytes_(bytes), memory_(bytes / 8 + 9, ~std::uint64_t{0}) {}
  void* data() { return memory_.data(); }
  bool guard_intact() const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(memory_.data());
    for (std::size_t i = bytes_; i < memory_.size() * 8; ++i) {
      if (bytes[i] != 0xff) return false;
    }
    return true;
  }

 private:
  std::size_t bytes_;
  std::vector<std::uint64_t> memory_;
};

inline double default_scale(const std::optional<double>& scale, std::int64_t dim) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(dim));
}

inline SparseAttentionParams with_scale(SparseAttentionParams params) {
  params.scale = default_scale(params.scale, params.q.size(2));
  return params;
}
inline IndexKlParams with_scale(IndexKlParams params) {
  params.scale = default_scale(params.scale, params.q.size(2));
  params.index_scale = default_scale(params.index_scale, params.q_idx.size(2));
  return params;
}

inline Tensor generic_select(const SelectBlocksParams& params) {
  Tensor blocks(DType::kInt32, {params.q_idx.size(1), params.q_idx.size(0), params.topk});
  cuda::generic::run_select_blocks(nullptr, cuda::generic::plan_select_blocks(params, blocks.view()));
  EXPECT_TRUE(blocks.gaps_intact());
  return blocks;
}

inline Tensor generic_oracle(OracleBlocksParams params) {
  params.scale = default_scale(params.scale, params.q.size(2));
  Tensor blocks(DType::kInt32, {params.k.size(params.k.rank - 2), params.q.size(0), params.topk});
  Workspace workspace(cuda::generic::select_blocks_oracle_workspace(params));
  cuda::generic::run_select_blocks_oracle(
      nullptr, cuda::generic::plan_select_blocks_oracle(params, workspace.data(), blocks.view()));
  EXPECT_TRUE(blocks.gaps_intact());
  EXPECT_TRUE(workspace.guard_intact());
  return blocks;
}

inline SelectionRecall generic_recall(SelectionRecallParams params) {
  params.scale = default_scale(params.scale, params.q.size(2));
  Workspace workspace(cuda::generic::selection_recall_workspace(params));
  float recalls[2] = {-1, -1};
  std::int64_t rows = -1;
  cuda::generic::run_selection_recall(nullptr,
                                      cuda::generic::plan_selection_recall(params, workspace.data(), recalls, &rows));
  EXPECT_TRUE(workspace.guard_intact());
  return {recalls[0], recalls[1], rows};
}

inline AttentionResult generic_attention(const SparseAttentionParams& params) {
  AttentionResult result{Tensor(params.q.dtype, {params.q.size(0), params.q.size(1), params.v.size(params.v.rank - 1)}),
                         Tensor(DType::kFloat32, {params.q.size(0), params.q.size(1)})};
  cuda::generic::run_attention(nullptr,
                               cuda::generic::plan_attention(with_scale(params), result.out.view(), result.lse.view()));
  EXPECT_TRUE(result.out.gaps_intact());
  EXPECT_TRUE(result.lse.gaps_intact());
  return result;
}

inline AttentionGradients generic_attention_backward(const SparseAttentionParams& params,
                                                     const AttentionResult& forward, const Tensor& dout,
                                                     const Tensor* dlse) {
  const auto like = [](const ConstTensorView& view) {
    return Tensor(view.dtype, {view.size(0), view.size(1), view.size(2)});
  };
  AttentionGradients grads{like(params.q), like(params.k), like(params.v)};
  AttentionSaved saved{forward.out.view(), forward.lse.view(), dout.view(), {}};
  if (dlse != nullptr) saved.dlse = dlse->view();
  Workspace workspace(cuda::generic::attention_backward_workspace(params));
  cuda::generic::run_attention_backward(
      nullptr, cuda::generic::plan_attention_backward(with_scale(params), saved, workspace.data(),
                                                      {grads.dq.view(), grads.dk.view(), grads.dv.view()}));
  EXPECT_TRUE(workspace.guard_intact());
  EXPECT_TRUE(grads.dq.gaps_intact());
  EXPECT_TRUE(grads.dk.gaps_intact());
  EXPECT_TRUE(grads.dv.gaps_intact());
  return grads;
}

inline KlResult generic_kl(const IndexKlParams& params) {
  KlResult result;
  result.lse_main = Tensor(DType::kFloat32, {params.q.size(0), params.q.size(1)});
  result.lse_index = Tensor(DType::kFloat32, {params.q.size(0), params.q_idx.size(1)});
  result.teacher_norm = Tensor(DType::kFloat32, {params.q.size(0), params.q_idx.size(1)});
  Workspace workspace(cuda::generic::index_kl_workspace(params));
  cuda::generic::run_index_kl(
      nullptr, cuda::generic::plan_index_kl(with_scale(params), result.saved(), workspace.data(), &result.value));
  EXPECT_TRUE(result.lse_main.gaps_intact());
  EXPECT_TRUE(result.lse_index.gaps_intact());
  EXPECT_TRUE(result.teacher_norm.gaps_intact());
  EXPECT_TRUE(workspace.guard_intact());
  return result;
}

inline KlGradients generic_kl_backward(const IndexKlParams& params, KlResult& forward, float grad_output) {
  const ConstTensorView& q_idx = params.q_idx;
  const ConstTensorView& k_idx = params.k_idx;
  KlGradients grads{Tensor(q_idx.dtype, {q_idx.size(0), q_idx.size(1), q_idx.size(2)}),
                    Tensor(k_idx.dtype, {k_idx.size(0), k_idx.size(1)})};
  cuda::generic::run_index_kl_backward(
      nullptr, cuda::generic::plan_index_kl_backward(with_scale(params), forward.saved(), &grad_output,
                                                     grads.dq_idx.view(), grads.dk_idx.view()));
  EXPECT_TRUE(grads.dq_idx.gaps_intact());
  EXPECT_TRUE(grads.dk_idx.gaps_intact());
  return grads;
}

}  // namespace msa::testing
