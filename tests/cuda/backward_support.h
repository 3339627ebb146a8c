// SPDX-License-Identifier: Apache-2.0
// Runs the fast attention backward, sparse or dense, in the emulator: on aligned copies, as many heads and queries at
// once as a test wants, with poison in the workspace and in the outputs; and what it is held against.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "src/cuda/attention_backward.h"
#include "src/cuda/device.cuh"
#include "tests/cuda/fast_support.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::testing {

/// What a test asks of a plan: 0 leaves it to the plan.
struct AtOnce {
  std::int64_t heads = 0, queries = 0;
  std::int64_t tiles_per_piece = cuda::kTilesPerPiece;
};

inline cuda::AttentionBackwardPlan plan_for(const SparseAttentionParams& params, const AtOnce& at_once) {
  cuda::AttentionBackwardPlan plan = cuda::plan_attention_backward(params, 0, at_once.tiles_per_piece);
  const std::int64_t heads = at_once.heads > 0 ? at_once.heads : plan.heads_at_once;
  const std::int64_t queries = at_once.queries > 0 ? at_once.queries : plan.queries_at_once;
  // The largest limit that gives no more at once.
  for (std::size_t limit = plan.bytes; plan.heads_at_once > heads || plan.queries_at_once > queries;) {
    plan = cuda::plan_attention_backward(params, limit -= 256, at_once.tiles_per_piece);
  }
  return plan;
}

/// `params` without blocks: dense.
inline AttentionGradients run_fast_backward(SparseAttentionParams params, const AttentionResult& forward,
                                            const Tensor& dout, const Tensor* dlse, const AtOnce& at_once = {}) {
  if (!params.scale) params.scale = 1 / std::sqrt(static_cast<double>(params.q.size(2)));
  // The copy engine wants aligned rows.
  const Tensor q = copy_of(params.q, Layout::kContiguous), k = copy_of(params.k, Layout::kContiguous),
               v = copy_of(params.v, Layout::kContiguous), g = copy_of(dout.view(), Layout::kContiguous);
  params.q = q.view();
  params.k = k.view();
  params.v = v.view();
  EXPECT_TRUE(cuda::takes_backward(params) && cuda::takes_gradient(g.view()));
  const cuda::AttentionBackwardPlan plan = plan_for(params, at_once);
  const auto like = [](const ConstTensorView& view) {
    return Tensor(view.dtype, {view.size(0), view.size(1), view.size(2)});
  };
  AttentionGradients grads{like(params.q), like(params.k), like(params.v)};
  AttentionSaved saved{forward.out.view(), forward.lse.view(), g.view(), {}};
  if (dlse != nullptr) saved.dlse = dlse->view();
  const auto release = [](void* pointer) { std::free(pointer); };
  const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(256, plan.bytes), release);
  std::memset(workspace.get(), 0xff, plan.bytes);
  Context context;
  context.workspace = workspace.get();
  context.workspace_bytes = plan.bytes;
  const AttentionGrads views{grads.dq.view(), grads.dk.view(), grads.dv.view()};
  const auto run = params.blocks.empty() ? cuda::run_dense_attention_backward : cuda::run_attention_backward;
  run(context, params, plan, saved, views);
  EXPECT_TRUE(grads.dq.gaps_intact());
  EXPECT_TRUE(grads.dk.gaps_intact());
  EXPECT_TRUE(grads.dv.gaps_intact());
  return grads;
}

inline SparseAttentionParams params_of(const Problem& problem, bool dense) {
  SparseAttentionParams params = problem.sparse_params();
  if (dense) {
    params.blocks = {};
    params.block_size = SparseAttentionParams{}.block_size;
  }
  return params;
}

/// What a right forward leaves for the backward.
inline AttentionResult exact_forward(const Problem& problem, bool dense) {
  Problem wide = problem.as_float32();
  wide.scale = problem.scale;
  AttentionResult result = dense ? run_dense(reference_context(), wide.dense_params())
                                 : run_sparse(reference_context(), wide.sparse_params());
  result.out = result.out.as(problem.q.dtype());
  return result;
}

inline AttentionGradients expect_right_backward(const Problem& problem, bool dense, const AttentionResult& forward,
                                                const Tensor& dout, const Tensor* dlse, const AtOnce& at_once = {}) {
  Problem wide = problem.as_float32();
  wide.scale = problem.scale;
  const Tensor wide_dout = dout.as(DType::kFloat32);
  AttentionGradients exact, naive;
  if (dense) {
    const AttentionResult wide_forward = run_dense(reference_context(), wide.dense_params());
    exact = run_dense_backward(reference_context(), wide.dense_params(), wide_forward, wide_dout, dlse);
    naive = naive_attention_backward(over_whole_prefix(problem.dense_params()), dout, dlse);
  } else {
    const AttentionResult wide_forward = run_sparse(reference_context(), wide.sparse_params());
    exact = run_sparse_backward(reference_context(), wide.sparse_params(), wide_forward, wide_dout, dlse);
    naive = naive_attention_backward(problem.sparse_params(), dout, dlse);
  }
  AttentionGradients got = run_fast_backward(params_of(problem, dense), forward, dout, dlse, at_once);
  expect_within_rule("dq", got.dq, exact.dq, naive.dq);
  expect_within_rule("dk", got.dk, exact.dk, naive.dk);
  expect_within_rule("dv", got.dv, exact.dv, naive.dv);
  return got;
}

inline void expect_same(const AttentionGradients& a, const AttentionGradients& b) {
  expect_same_bytes("dq", a.dq, b.dq);
  expect_same_bytes("dk", a.dk, b.dk);
  expect_same_bytes("dv", a.dv, b.dv);
}

/// Every sequence alone gives the bits that it has in the batch.
inline void expect_same_alone(const Problem& problem, bool dense, const AttentionResult& forward, const Tensor& dout,
                              const Tensor& dlse, const AttentionGradients& got) {
  for (std::int64_t s = 0; s < problem.sequences(); ++s) {
    const auto i = static_cast<std::size_t>(s);
    const std::int64_t begin = problem.cu_seqlens_q[i], end = problem.cu_seqlens_q[i + 1];
    const std::int64_t first_key = problem.cu_seqlens_k[i], last_key = problem.cu_seqlens_k[i + 1];
    if (begin == end) continue;
    const auto rows = [&](const Tensor& tensor) { return copy_of(slice(tensor.view(), begin, end)); };
    const Problem only = problem.only(s);
    const Tensor only_dlse = rows(dlse);
    const AttentionGradients alone =
        run_fast_backward(params_of(only, dense), {rows(forward.out), rows(forward.lse)}, rows(dout), &only_dlse);
    expect_same_bytes("dq alone", alone.dq.bytes(0, 0, end - begin), got.dq.bytes(0, begin, end));
    expect_same_bytes("dk alone", alone.dk.bytes(0, 0, last_key - first_key), got.dk.bytes(0, first_key, last_key));
    expect_same_bytes("dv alone", alone.dv.bytes(0, 0, last_key - first_key), got.dv.bytes(0, first_key, last_key));
  }
}

}  // namespace msa::testing
