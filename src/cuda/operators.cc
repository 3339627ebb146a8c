// SPDX-License-Identifier: Apache-2.0
// Which path a call takes: the fast kernels where geometry and dtype allow, else the generic ones. The choice looks at
// geometry and dtype only, never at lengths or batch, so that prefill, decode and training of one model agree.
#include "src/cuda/operators.h"

#include "msa/error.h"

namespace msa::cuda {
namespace {

[[noreturn]] void not_written(const char* op) {
  std::string text = op;
  text += ": backend: cuda does not offer it yet";
  throw Error(text);
}

}  // namespace

void select_blocks(const Context&, const SelectBlocksParams&, const TensorView&) { not_written("select_blocks"); }
void select_blocks_oracle(const Context&, const OracleBlocksParams&, const TensorView&) {
  not_written("select_blocks_oracle");
}
void topk_blocks(const Context&, const TopkBlocksParams&, const TensorView&) { not_written("topk_blocks"); }
void sparse_attention(const Context&, const SparseAttentionParams&, const TensorView&, const TensorView&) {
  not_written("sparse_attention");
}
void sparse_attention_backward(const Context&, const SparseAttentionParams&, const AttentionSaved&,
                               const AttentionGrads&) {
  not_written("sparse_attention_backward");
}
void dense_attention(const Context&, const DenseAttentionParams&, const TensorView&, const TensorView&) {
  not_written("dense_attention");
}
void dense_attention_backward(const Context&, const DenseAttentionParams&, const AttentionSaved&,
                              const AttentionGrads&) {
  not_written("dense_attention_backward");
}
void index_kl(const Context&, const IndexKlParams&, const IndexKlSaved&, float*) { not_written("index_kl"); }
void index_kl_backward(const Context&, const IndexKlParams&, const IndexKlSaved&, const float*, const TensorView&,
                       const TensorView&) {
  not_written("index_kl_backward");
}
void selection_recall(const Context&, const SelectionRecallParams&, float*, std::int64_t*) {
  not_written("selection_recall");
}

std::size_t select_blocks_workspace(const SelectBlocksParams&) { return 0; }
std::size_t select_blocks_oracle_workspace(const OracleBlocksParams&) { return 0; }
std::size_t topk_blocks_workspace(const TopkBlocksParams&) { return 0; }
std::size_t sparse_attention_workspace(const SparseAttentionParams&) { return 0; }
std::size_t sparse_attention_backward_workspace(const SparseAttentionParams&) { return 0; }
std::size_t dense_attention_workspace(const DenseAttentionParams&) { return 0; }
std::size_t dense_attention_backward_workspace(const DenseAttentionParams&) { return 0; }
std::size_t index_kl_workspace(const IndexKlParams&) { return 0; }
std::size_t index_kl_backward_workspace(const IndexKlParams&) { return 0; }
std::size_t selection_recall_workspace(const SelectionRecallParams&) { return 0; }

}  // namespace msa::cuda
