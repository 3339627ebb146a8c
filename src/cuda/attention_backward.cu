// SPDX-License-Identifier: Apache-2.0
// The sparse attention backward, instantiated for its geometries and started: see attention_backward.h.
#include "src/cuda/attention_backward.cuh"
#include "src/cuda/runtime.h"

namespace msa::cuda {

void run_attention_backward(const Context& context, const SparseAttentionParams& params,
                            const AttentionBackwardPlan& plan, const AttentionSaved& saved,
                            const AttentionGrads& grads) {
  const auto multiprocessors = static_cast<unsigned>(multiprocessor_count());
  with_attention_geometry(params, [&]<class T, int D, int kBlock>() {
    run_fast_backward<T, D, kBlock>(context, params, plan, saved, grads, multiprocessors);
  });
}

}  // namespace msa::cuda
