// SPDX-License-Identifier: Apache-2.0
// The operators of the cpu backend, as the front door (src/ops) calls them: parameters are those of include/msa,
// already validated, scale defaults filled in. What each one computes stands in the public headers.
#pragma once

#include "msa/attention.h"
#include "msa/index_kl.h"
#include "msa/select_blocks.h"
#include "msa/topk.h"

namespace msa::cpu {

void select_blocks(const Context& context, const SelectBlocksParams& params, const TensorView& blocks);
void select_blocks_oracle(const Context& context, const OracleBlocksParams& params, const TensorView& blocks);
void topk_blocks(const Context& context, const TopkBlocksParams& params, const TensorView& ids);
void sparse_attention(const Context& context, const SparseAttentionParams& params, const TensorView& out,
                      const TensorView& lse);
void sparse_attention_backward(const Context& context, const SparseAttentionParams& params, const AttentionSaved& saved,
                               const AttentionGrads& grads);
void dense_attention(const Context& context, const DenseAttentionParams& params, const TensorView& out,
                     const TensorView& lse);
void dense_attention_backward(const Context& context, const DenseAttentionParams& params, const AttentionSaved& saved,
                              const AttentionGrads& grads);
float index_kl(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved);
void index_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved,
                       float grad_output, const TensorView& dq_idx, const TensorView& dk_idx);
SelectionRecall selection_recall(const Context& context, const SelectionRecallParams& params);

}  // namespace msa::cpu
