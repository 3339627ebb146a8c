// SPDX-License-Identifier: Apache-2.0
// The operators of the cuda backend, as the front door (src/ops) calls them: parameters are those of include/msa,
// shapes already validated, scale defaults filled in, every pointer a device pointer. context.workspace holds at least
// the bytes that the `..._workspace` function of the same name gives, 256-byte aligned; all work goes to
// context.stream. A build without CUDA has the same symbols (src/no_cuda).
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/attention.h"
#include "msa/cuda.h"
#include "msa/index_kl.h"
#include "msa/select_blocks.h"
#include "msa/topk.h"

namespace msa::cuda {

/// False in a build without CUDA: then every other function here throws.
bool is_built();

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
/// `kl`: one float in device memory.
void index_kl(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved, float* kl);
/// `grad_output`: one float in device memory.
void index_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved,
                       const float* grad_output, const TensorView& dq_idx, const TensorView& dk_idx);
/// `recalls`: block_recall and score_recall, NaN when no row counts; `rows`: the rows in the mean. Device memory.
void selection_recall(const Context& context, const SelectionRecallParams& params, float* recalls, std::int64_t* rows);

// Bytes of device scratch, from shapes alone: no tensor and no span is read. An operator that works in chunks takes the
// most bytes it may ask for (0: no limit) and gives no more than that, or else the least that it can do with. The front
// door holds what they give against Context::workspace_limit.
std::size_t select_blocks_workspace(const SelectBlocksParams& params, std::size_t limit);
std::size_t select_blocks_oracle_workspace(const OracleBlocksParams& params);
std::size_t topk_blocks_workspace(const TopkBlocksParams& params);
std::size_t sparse_attention_workspace(const SparseAttentionParams& params, std::size_t limit);
std::size_t sparse_attention_backward_workspace(const SparseAttentionParams& params, std::size_t limit);
std::size_t dense_attention_workspace(const DenseAttentionParams& params, std::size_t limit);
std::size_t dense_attention_backward_workspace(const DenseAttentionParams& params, std::size_t limit);
std::size_t index_kl_workspace(const IndexKlParams& params, std::size_t limit);
std::size_t index_kl_backward_workspace(const IndexKlParams& params, std::size_t limit);
std::size_t selection_recall_workspace(const SelectionRecallParams& params);

/// What a call's device memory must hold; the rules are those of ops::Validator.
struct Contents {
  const Batch* batch = nullptr;
  std::int64_t query_rows = 0;  ///< rows of the query buffers
  std::int64_t key_rows = 0;    ///< rows of the packed key buffers, or pages
  std::int64_t page = 0;        ///< tokens a page; 0 when packed
  ConstTensorView blocks;       ///< ids to check, int32 [kv_heads, Tq, topk]; empty: none
  std::int64_t block_size = 0;  ///< of blocks
};

/// Whether the contents obey the rules: one pass of a kernel each over batch and ids, and one wait of the host.
/// `scratch`: 4 bytes of device memory.
bool contents_hold(const Context& context, const Contents& contents, void* scratch);

/// The current device, and whether it runs this backend. Never throws.
CudaInfo describe_device();
/// Throws when the current device does not.
void require_device();

/// Whether context.stream is capturing a graph: then the host cannot wait.
bool is_capturing(const Context& context);

/// Memory of the current device, aligned to kWorkspaceAlignment. Throws when there is no device or too little memory.
void* allocate(std::size_t bytes);
void release(void* device) noexcept;

/// Copies between host and device in stream order, and waits.
void copy_to_host(const Context& context, void* host, const void* device, std::size_t bytes);
void copy_to_device(const Context& context, void* device, const void* host, std::size_t bytes);

}  // namespace msa::cuda
