// SPDX-License-Identifier: Apache-2.0
// The cuda backend's symbols in a build without CUDA: is_built() says so, the front door refuses Backend::kCuda by it,
// and the rest throws. Tested in tests/unit/validate_test.cc.
#include "src/cuda/operators.h"

#include "msa/error.h"

namespace msa::cuda {
namespace {

[[noreturn]] void refuse() { throw Error("backend: cuda: built without CUDA"); }

}  // namespace

bool is_built() { return false; }

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
void index_kl(const Context&, const IndexKlParams&, const IndexKlSaved&, float*) { refuse(); }
void index_kl_backward(const Context&, const IndexKlParams&, const IndexKlSaved&, const float*, const TensorView&,
                       const TensorView&) {
  refuse();
}
void selection_recall(const Context&, const SelectionRecallParams&, float*, std::int64_t*) { refuse(); }

std::size_t select_blocks_workspace(const SelectBlocksParams&, std::size_t) { refuse(); }
std::size_t select_blocks_oracle_workspace(const OracleBlocksParams&) { refuse(); }
std::size_t topk_blocks_workspace(const TopkBlocksParams&) { refuse(); }
std::size_t sparse_attention_workspace(const SparseAttentionParams&, std::size_t) { refuse(); }
std::size_t sparse_attention_backward_workspace(const SparseAttentionParams&, std::size_t) { refuse(); }
std::size_t dense_attention_workspace(const DenseAttentionParams&, std::size_t) { refuse(); }
std::size_t dense_attention_backward_workspace(const DenseAttentionParams&, std::size_t) { refuse(); }
std::size_t index_kl_workspace(const IndexKlParams&, std::size_t) { refuse(); }
std::size_t index_kl_backward_workspace(const IndexKlParams&, std::size_t) { refuse(); }
std::size_t selection_recall_workspace(const SelectionRecallParams&) { refuse(); }

CudaInfo describe_device() { return {}; }
void require_device() { refuse(); }
bool is_capturing(const Context&) { refuse(); }
void* allocate(std::size_t) { refuse(); }
void release(void*) noexcept {}
bool contents_hold(const Context&, const Contents&, void*) { refuse(); }
void copy_to_host(const Context&, void*, const void*, std::size_t) { refuse(); }
void copy_to_device(const Context&, void*, const void*, std::size_t) { refuse(); }

}  // namespace msa::cuda
