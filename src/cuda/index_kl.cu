// SPDX-License-Identifier: Apache-2.0
// The fast KL loss, instantiated for its geometries and started: see index_kl.h.
#include "src/cuda/index_kl_merge.cuh"
#include "src/cuda/runtime.h"

namespace msa::cuda {

void run_fast_index_kl(const Context& context, const IndexKlParams& params, const IndexKlPlan& plan,
                       const IndexKlSaved& saved, float* kl) {
  run_kl(context, params, plan, saved, static_cast<unsigned>(multiprocessor_count()), kl);
}

void run_fast_index_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlPlan& plan,
                                const IndexKlSaved& saved, const float* grad_output, const TensorView& dq_idx,
                                const TensorView& dk_idx) {
  run_kl_backward(context, params, plan, saved, static_cast<unsigned>(multiprocessor_count()), grad_output, dq_idx,
                  dk_idx);
}

}  // namespace msa::cuda
