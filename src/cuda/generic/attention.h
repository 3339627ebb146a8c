// SPDX-License-Identifier: Apache-2.0
// Softmax attention for every geometry and dtype, over selected blocks or the whole prefix (SPEC section 3): plans and
// entry points of the CUDA backend's generic path. How it works: attention.cuh, attention_backward.cuh,
// docs/cuda-generic.md. Tested in tests/cuda/generic_attention_test.cc.
#pragma once

#include <cstddef>

#include "msa/attention.h"
#include "src/cuda/generic/tensors.h"

namespace msa::cuda::generic {

/// Parameters of attend_rows. Also serves the log-sum-exps of the index branch, whose key tensor has no heads.
struct AttendArgs {
  Rows q;
  Keys k;
  Keys v;  ///< data null: log-sum-exps only
  BlockIds blocks;
  BatchPointers batch;
  int kv_heads = 1;
  int group_size = 1;
  float scale = 1;
  Rows out;  ///< as v
  Rows lse;  ///< [rows, query_heads]
};

struct AttendPlan {
  AttendArgs args;
  LaunchShape shape;
};

struct AttendBackwardArgs {
  AttendArgs forward;
  Rows dout;
  Rows dlse;   ///< data null: zero
  Rows delta;  ///< [rows, query_heads], workspace: <dout, out>
  Rows dq, dk, dv;
};

struct AttendBackwardPlan {
  AttendBackwardArgs args;
  LaunchShape queries;  ///< dq: a block of threads a query row and up to kRowWarps heads
  LaunchShape keys;     ///< dk and dv: a block of threads a key tile and kv head
  LaunchShape dk_tail;  ///< rows behind the last sequence
  LaunchShape dv_tail;
};

/// Only shapes, strides and pointer values are used; scales are filled in.
AttendPlan plan_attention(const SparseAttentionParams& params, const TensorView& out, const TensorView& lse);
/// Log-sum-exps of scale * <q, k> alone: q [Tq, heads, dim]; k [Tk, kv_heads, dim] or [Tk, dim], or pages.
AttendPlan plan_lse(const ConstTensorView& q, const ConstTensorView& k, const ConstTensorView& blocks,
                    std::int64_t block_size, const Batch& batch, std::int64_t kv_heads, double scale, const Rows& lse);
/// One float a row and query head: 4 Tq query_heads. The forward takes none.
std::size_t attention_backward_workspace(const SparseAttentionParams& params);
AttendBackwardPlan plan_attention_backward(const SparseAttentionParams& params, const AttentionSaved& saved,
                                           void* workspace, const AttentionGrads& grads);
/// A dense call's params as those of a sparse one without blocks.
SparseAttentionParams over_whole_prefix(const DenseAttentionParams& params);

// Entry points: as in src/cuda/operators.h. `blocks` of the params may be empty.
void attention(void* stream, const SparseAttentionParams& params, const TensorView& out, const TensorView& lse);
void attention_backward(void* stream, void* workspace, const SparseAttentionParams& params, const AttentionSaved& saved,
                        const AttentionGrads& grads);

}  // namespace msa::cuda::generic
