// SPDX-License-Identifier: Apache-2.0
// The main branch: exact softmax attention over the selected blocks, or over the whole prefix (SPEC section 3).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "msa/batch.h"
#include "msa/context.h"
#include "msa/tensor.h"

namespace msa {

struct SparseAttentionParams {
  ConstTensorView q;       ///< [Tq, query_heads, head_dim], float32 | bfloat16 | float16
  ConstTensorView k;       ///< [Tk, kv_heads, head_dim], or pages [pages, page, kv_heads, head_dim]; dtype of q
  ConstTensorView v;       ///< [Tk, kv_heads, value_dim], or pages; dtype of q
  ConstTensorView blocks;  ///< int32 [kv_heads, Tq, topk], as select_blocks writes it
  Batch batch;
  std::int64_t block_size = 128;
  std::optional<double> scale;  ///< default 1/sqrt(head_dim)
  /// Skip the check of block ids. Only for ids that select_blocks wrote for this batch; anything else is undefined.
  bool trusted_blocks = false;
};

struct DenseAttentionParams {
  ConstTensorView q, k, v;  ///< as in SparseAttentionParams
  Batch batch;
  std::optional<double> scale;
};

/// Gradients a backward writes; each has the shape and dtype of its input. Rows no query reaches get zeros.
struct AttentionGrads {
  TensorView dq, dk, dv;
};

/// What a backward needs of the forward, besides its params.
struct AttentionSaved {
  ConstTensorView out;   ///< as the forward wrote it
  ConstTensorView lse;   ///< as the forward wrote it
  ConstTensorView dout;  ///< gradient of out, same shape; dtype of q
  ConstTensorView dlse;  ///< gradient of lse, float32 [Tq, query_heads]; empty means zero
};

/// out [Tq, query_heads, value_dim] in the dtype of q; lse float32 [Tq, query_heads], natural log. A row without a
/// valid block gives out 0 and lse -inf. Touches the selected blocks only: O(topk * block_size * (head_dim +
/// value_dim)) a head and row. Duplicate, unsorted, out-of-range or invisible ids throw msa::Error.
void sparse_attention(const Context& context, const SparseAttentionParams& params, const TensorView& out,
                      const TensorView& lse);
/// Packed batches only.
void sparse_attention_backward(const Context& context, const SparseAttentionParams& params, const AttentionSaved& saved,
                               const AttentionGrads& grads);

/// Bytes of Context::workspace that a kCuda call with these params needs, from shapes alone: no data is read, null
/// pointers do. 0 on other backends. Throws as the operator does on shapes it would refuse. So do the other
/// `..._workspace`.
std::size_t sparse_attention_workspace(const Context& context, const SparseAttentionParams& params);
std::size_t sparse_attention_backward_workspace(const Context& context, const SparseAttentionParams& params);

/// The same over the whole visible prefix.
void dense_attention(const Context& context, const DenseAttentionParams& params, const TensorView& out,
                     const TensorView& lse);
/// Packed batches only.
void dense_attention_backward(const Context& context, const DenseAttentionParams& params, const AttentionSaved& saved,
                              const AttentionGrads& grads);
std::size_t dense_attention_workspace(const Context& context, const DenseAttentionParams& params);
std::size_t dense_attention_backward_workspace(const Context& context, const DenseAttentionParams& params);

}  // namespace msa
