// SPDX-License-Identifier: Apache-2.0
// Launches of the generic KL loss: see index_kl.h.
#include "src/cuda/generic/index_kl.cuh"

namespace msa::cuda::generic {

void index_kl(void* stream, void* workspace, const IndexKlParams& params, const IndexKlSaved& saved, float* kl) {
  run_index_kl(stream, plan_index_kl(params, saved, workspace, kl));
}

void index_kl_backward(void* stream, const IndexKlParams& params, const IndexKlSaved& saved, const float* grad_output,
                       const TensorView& dq_idx, const TensorView& dk_idx) {
  run_index_kl_backward(stream, plan_index_kl_backward(params, saved, grad_output, dq_idx, dk_idx));
}

}  // namespace msa::cuda::generic
