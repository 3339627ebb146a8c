// SPDX-License-Identifier: Apache-2.0
// The KL loss that aligns the index branch with the main branch, and the recalls users watch (SPEC section 4).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "msa/batch.h"
#include "msa/context.h"
#include "msa/tensor.h"

namespace msa {

enum class Teacher {
  kMean,  ///< mean of the heads' probabilities (the paper's)
  kMax,   ///< max over the heads, renormalised: keeps a single retrieval head of a group visible
};

struct IndexKlParams {
  ConstTensorView q_idx;   ///< [Tq, kv_heads, index_dim]
  ConstTensorView k_idx;   ///< [Tk, index_dim]; dtype of q_idx, which may differ from that of q and k
  ConstTensorView q;       ///< [Tq, query_heads, head_dim]
  ConstTensorView k;       ///< [Tk, kv_heads, head_dim]
  ConstTensorView blocks;  ///< int32 [kv_heads, Tq, topk], or empty: the whole visible prefix (warmup)
  Batch batch;
  std::int64_t block_size = 128;
  std::optional<double> index_scale;  ///< default 1/sqrt(index_dim)
  std::optional<double> scale;        ///< default 1/sqrt(head_dim)
  Teacher teacher = Teacher::kMean;
};

/// What the forward leaves for the backward, so that it needs no second softmax pass. All float32, written by index_kl.
struct IndexKlSaved {
  TensorView lse_main;      ///< [Tq, query_heads]
  TensorView lse_index;     ///< [Tq, kv_heads]
  TensorView teacher_norm;  ///< [Tq, kv_heads]: what the teacher's mass is divided by (kMean: group_size)
};

/// KL(P || Q) of teacher P and student Q, averaged over all Tq * kv_heads rows (SPEC section 4). 0 for no queries.
/// Two passes over the support; no [queries, keys] tensor. Packed or paged batches.
float index_kl(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved);

/// Gradients of grad_output * index_kl in q_idx and k_idx (shape and dtype of the inputs). Packed batches only.
void index_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved,
                       float grad_output, const TensorView& dq_idx, const TensorView& dk_idx);

/// The same with the scalars in tensors, float32 [1], where the backend's other tensors lie: on a GPU nothing then
/// comes back to the host.
void index_kl(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved, const TensorView& kl);
void index_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved,
                       const ConstTensorView& grad_output, const TensorView& dq_idx, const TensorView& dk_idx);

/// See sparse_attention_workspace.
std::size_t index_kl_workspace(const Context& context, const IndexKlParams& params);
std::size_t index_kl_backward_workspace(const Context& context, const IndexKlParams& params);

struct SelectionRecallParams {
  ConstTensorView q;       ///< [Tq, query_heads, head_dim]
  ConstTensorView k;       ///< [Tk, kv_heads, head_dim]
  ConstTensorView blocks;  ///< int32 [kv_heads, Tq, topk]
  Batch batch;
  std::int64_t block_size = 128;
  std::optional<double> scale;
};

/// Means over the rows with more than topk visible blocks; NaN when there is none.
struct SelectionRecall {
  double block_recall = 0;  ///< |I* and I| / |I*|
  double score_recall = 0;  ///< mass(I* and I) / mass(I*)
  std::int64_t rows = 0;    ///< (query, group) rows in the mean
};

/// How well `blocks` matches the top-k by main-branch probability mass (local block included). One dense score pass.
SelectionRecall selection_recall(const Context& context, const SelectionRecallParams& params);
/// The same into a tensor, float32 [2]: block_recall, score_recall.
void selection_recall(const Context& context, const SelectionRecallParams& params, const TensorView& recalls);
/// See sparse_attention_workspace.
std::size_t selection_recall_workspace(const Context& context, const SelectionRecallParams& params);

}  // namespace msa
