// SPDX-License-Identifier: Apache-2.0
// The attention of one decoder layer, from projected q, k, v and index tensors to its output: which rule chooses
// blocks, then the operators, on packed tensors (differentiable) or straight on the pages of a cache. Tested in
// tests/unit/model_decoder.cc.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "msa/batch.h"
#include "msa/context.h"
#include "msa/index_kl.h"
#include "msa/tensor.h"
#include "src/model/decoder.h"

namespace msa::model {

/// How one layer attends in one forward.
struct AttentionPlan {
  AttentionMode mode = AttentionMode::kDense;  ///< kDense: everything below but block_size is unused
  std::int64_t topk = 0;
  std::int64_t block_size = 128;
  std::int64_t local_blocks = 1;
  std::int64_t init_blocks = 0;
};

/// Inputs of one layer. q, k, v, q_idx, k_idx, v_idx are the new tokens' [T, heads, dim] (k_idx, v_idx [T, dim]), index
/// tensors undefined where not needed. keys, values, index_keys and index_values are what the queries see: the same
/// tensors, or a cache's pages.
struct AttentionInputs {
  at::Tensor q, k, v, q_idx, k_idx, v_idx;
  ConstTensorView keys, values, index_keys, index_values;
  Batch batch;
  at::Tensor cu_seqlens;  ///< packed only: of queries and keys alike
};

/// Threads as torch has them; the environment variable MSA_BACKEND picks the implementation, for debugging.
Context make_context();
ConstTensorView const_view(const at::Tensor& tensor);

/// int32 [kv_heads, T, topk] by the plan's rule; undefined when it is kDense. Never differentiable.
at::Tensor choose_blocks(const AttentionPlan& plan, const AttentionInputs& inputs);
/// out [T, heads, value_dim], lse float32 [T, heads]. Differentiable when packed and an input asks for gradients.
struct Attended {
  at::Tensor out, lse;
};
/// The main branch. blocks undefined: dense.
Attended attend(const AttentionPlan& plan, const AttentionInputs& inputs, const at::Tensor& blocks);
/// The index branch's own attention over the same tokens, of q_idx to k_idx and v_idx; a head a group.
Attended attend_index(const AttentionPlan& plan, const AttentionInputs& inputs, const at::Tensor& blocks);
/// out with a logit a head ([heads]) in its softmax's denominator: a share 1 / (1 + exp(sink - lse)) of it remains.
at::Tensor with_sink(const Attended& attended, const at::Tensor& sinks);
/// Dimensions [begin, begin + width) of the last one of a view.
ConstTensorView narrow_last(ConstTensorView view, std::int64_t begin, std::int64_t width);
/// KL of the index branch, scalar float32; differentiable when packed and q_idx or k_idx ask for gradients.
at::Tensor align(const AttentionPlan& plan, const AttentionInputs& inputs, const at::Tensor& blocks, Teacher teacher);

}  // namespace msa::model
