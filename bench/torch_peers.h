// SPDX-License-Identifier: Apache-2.0
// What `msa bench` compares with: torch's own operators on the same values, each asked in every way a torch user might
// ask and judged by the fastest.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "bench/timing.h"

namespace msa::bench {

/// Causal attention of the last `queries` tokens of one sequence.
struct AttentionTensors {
  at::Tensor q;  ///< [queries, query_heads, head_dim]
  at::Tensor k;  ///< [context, kv_heads, head_dim]
  at::Tensor v;  ///< [context, kv_heads, head_dim]
};

/// scaled_dot_product_attention, the fastest of: each query head by itself, its keys shared by a stride of 0; and the
/// query heads of a group as further queries of one head, so that keys are read once a group. With as many queries as
/// keys it gets is_causal. Fewer queries get a mask when the triangle they must not see is worth it (queries more than
/// an eighth of the context), else none: at most 1/16 more work on paper than the masked form, and always faster. Keys
/// and values are given in the layout [heads, context, head_dim] that it likes.
Timing time_torch_attention(const TimingLimits& limits, const AttentionTensors& tensors);

/// The same, forward and backward (autograd), gradients in q, k and v.
Timing time_torch_attention_backward(const TimingLimits& limits, const AttentionTensors& tensors);

/// torch.topk of each row, sorted or not, whichever is faster.
Timing time_torch_topk(const TimingLimits& limits, const at::Tensor& scores, std::int64_t topk);

}  // namespace msa::bench
