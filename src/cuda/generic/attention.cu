// SPDX-License-Identifier: Apache-2.0
// Launches of the generic attention: see attention.h.
#include "src/cuda/generic/attention_backward.cuh"

namespace msa::cuda::generic {

void attention(void* stream, const SparseAttentionParams& params, const TensorView& out, const TensorView& lse) {
  run_attention(stream, plan_attention(params, out, lse));
}

void attention_backward(void* stream, void* workspace, const SparseAttentionParams& params, const AttentionSaved& saved,
                        const AttentionGrads& grads) {
  run_attention_backward(stream, plan_attention_backward(params, saved, workspace, grads));
}

}  // namespace msa::cuda::generic
