// SPDX-License-Identifier: Apache-2.0
// Top-k of block scores that lie in memory already: the last step of a selection, alone (SPEC section 2, rules 2 to 4).
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/context.h"
#include "msa/tensor.h"

namespace msa {

struct TopkBlocksParams {
  ConstTensorView scores;  ///< [rows, blocks] float32, one score a block
  std::int64_t topk = 16;  ///< 1 to kMaxTopk
};

/// Writes `ids`, int32 [rows, topk]: the ids of each row's topk highest scores, ascending, packed to the left, -1
/// behind them when the row has fewer blocks. Equal scores go to the lower id, -0 equals +0, subnormal values are
/// values, and NaN ranks below every number, -inf included. Nothing is forced: select_blocks adds that, and computes
/// the scores. Two passes over a row while it lies in the cache; no exponential, no sort. Throws msa::Error on bad
/// input.
void topk_blocks(const Context& context, const TopkBlocksParams& params, const TensorView& ids);
/// Bytes of Context::workspace that a kCuda call with these params needs; see sparse_attention_workspace.
std::size_t topk_blocks_workspace(const Context& context, const TopkBlocksParams& params);

}  // namespace msa
