// SPDX-License-Identifier: Apache-2.0
// The fast dense attention forward, instantiated for its geometries and started: see dense_attention.h.
#include "src/cuda/dense_attention.cuh"
#include "src/cuda/runtime.h"

namespace msa::cuda {

void run_dense_attention(const Context& context, const DenseAttentionParams& params, const DenseAttentionPlan& plan,
                         const TensorView& out, const TensorView& lse) {
  const auto multiprocessors = static_cast<unsigned>(multiprocessor_count());
  with_dense_geometry(params, [&]<class T, int D, bool kWidens>() {
    run_fast_dense<T, D, kWidens>(context, params, plan, multiprocessors, out, lse);
  });
}

}  // namespace msa::cuda
