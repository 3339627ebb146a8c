// SPDX-License-Identifier: Apache-2.0
// The cpu backend's symbols in a build without it (MSA_CPU=OFF): every operator throws, and there is no instruction
// set. Such a build is for machines that have a GPU and its compiler but not Highway (tools/gpu_check).
#include "msa/error.h"
#include "src/cpu/instruction_set.h"
#include "src/cpu/operators.h"

namespace msa::cpu {
namespace {

[[noreturn]] void refuse() { throw Error("backend: cpu: built without it; configure with -DMSA_CPU=ON"); }

}  // namespace

std::vector<std::string> supported_instruction_sets() { return {}; }
std::string active_instruction_set() { return "none"; }
void ensure_instruction_set() {}
void force_instruction_set(const std::string& name) {
  if (!name.empty()) throw Error("instruction set \"" + name + "\": built without the cpu backend");
}

void select_blocks(const Context&, const SelectBlocksParams&, const TensorView&) { refuse(); }
void select_blocks_oracle(const Context&, const OracleBlocksParams&, const TensorView&) { refuse(); }
void topk_blocks(const Context&, const TopkBlocksParams&, const TensorView&) { refuse(); }
void sparse_attention(const Context&, const SparseAttentionParams&, const TensorView&, const TensorView&) { refuse(); }
void sparse_attention_backward(const Context&, const SparseAttentionParams&, const AttentionSaved&,
                               const AttentionGrads&) {
  refuse();
}
void dense_attention(const Context&, const DenseAttentionParams&, const TensorView&, const TensorView&) { refuse(); }
void dense_attention_backward(const Context&, const DenseAttentionParams&, const AttentionSaved&,
                              const AttentionGrads&) {
  refuse();
}
float index_kl(const Context&, const IndexKlParams&, const IndexKlSaved&) { refuse(); }
void index_kl_backward(const Context&, const IndexKlParams&, const IndexKlSaved&, float, const TensorView&,
                       const TensorView&) {
  refuse();
}
SelectionRecall selection_recall(const Context&, const SelectionRecallParams&) { refuse(); }

}  // namespace msa::cpu
