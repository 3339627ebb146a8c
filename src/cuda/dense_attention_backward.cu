// SPDX-License-Identifier: Apache-2.0
// The dense attention backward, instantiated for its geometries and started: see attention_backward.h.
#include "src/cuda/dense_attention_backward.cuh"
#include "src/cuda/runtime.h"

namespace msa::cuda {

void run_dense_attention_backward(const Context& context, const SparseAttentionParams& params,
                                  const AttentionBackwardPlan& plan, const AttentionSaved& saved,
                                  const AttentionGrads& grads) {
  const auto multiprocessors = static_cast<unsigned>(multiprocessor_count());
  with_dense_geometry(params, [&]<class T, int D>() {
    run_fast_dense_backward<T, D>(context, params, plan, saved, grads, multiprocessors);
  });
}

}  // namespace msa::cuda
