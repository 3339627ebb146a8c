// SPDX-License-Identifier: Apache-2.0
// Block selection: which key blocks each query and group attends to (SPEC section 2; paper, index branch).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "msa/batch.h"
#include "msa/context.h"
#include "msa/tensor.h"

namespace msa {

// Limits of every operator, in one place.
inline constexpr std::int64_t kMinBlockSize = 16;  ///< block sizes are powers of two in [16, 256]
inline constexpr std::int64_t kMaxBlockSize = 256;
inline constexpr std::int64_t kMaxTopk = 64;      ///< topk in [1, 64]
inline constexpr std::int64_t kMaxHeadDim = 256;  ///< head dimensions are multiples of 16 up to 256
inline constexpr std::int64_t kHeadDimMultiple = 16;

struct SelectBlocksParams {
  ConstTensorView q_idx;  ///< [Tq, kv_heads, index_dim], float32 | bfloat16 | float16
  ConstTensorView k_idx;  ///< [Tk, index_dim], or pages [pages, page, index_dim] when the batch is paged; same dtype
  Batch batch;
  std::int64_t block_size = 128;
  std::int64_t topk = 16;
  std::int64_t local_blocks = 1;  ///< last visible blocks always taken; count against topk
  std::int64_t init_blocks = 0;   ///< first blocks always taken; count against topk
};

/// Writes `blocks`, int32 [kv_heads, Tq, topk]: the ids of each row's selected blocks, ascending, packed to the left,
/// -1 behind them. Scores are q_idx . k_idx in fp32, max-pooled over the visible tokens of a block; no exponential is
/// taken. O(visible tokens * index_dim) a row; scratch memory independent of the number of keys. Throws msa::Error on
/// bad input.
void select_blocks(const Context& context, const SelectBlocksParams& params, const TensorView& blocks);

/// Bytes of Context::workspace that a kCuda call with these params needs; see sparse_attention_workspace.
std::size_t select_blocks_workspace(const Context& context, const SelectBlocksParams& params);

struct OracleBlocksParams {
  ConstTensorView q;  ///< [Tq, query_heads, head_dim]
  ConstTensorView k;  ///< [Tk, kv_heads, head_dim] or pages [pages, page, kv_heads, head_dim]
  Batch batch;
  std::int64_t block_size = 128;
  std::int64_t topk = 16;
  std::int64_t local_blocks = 1;
  std::int64_t init_blocks = 0;
  std::optional<double> scale;  ///< default 1/sqrt(head_dim)
};

/// Like select_blocks, but blocks are ranked by the main branch's own probability mass (full causal softmax, averaged
/// over the group's heads): the best any index could do, used as an upper bound and by selection_recall (SPEC section
/// 4). Costs one pass of dense scores.
void select_blocks_oracle(const Context& context, const OracleBlocksParams& params, const TensorView& blocks);
std::size_t select_blocks_oracle_workspace(const Context& context, const OracleBlocksParams& params);

}  // namespace msa
