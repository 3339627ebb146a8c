// SPDX-License-Identifier: Apache-2.0
// The fast sparse attention forward, instantiated for its geometries and started: see sparse_attention.h.
#include "src/cuda/runtime.h"
#include "src/cuda/sparse_attention_call.cuh"

namespace msa::cuda {

void run_sparse_attention(const Context& context, const SparseAttentionParams& params, const SparseAttentionPlan& plan,
                          const TensorView& out, const TensorView& lse) {
  const auto multiprocessors = static_cast<unsigned>(multiprocessor_count());
  with_attention_geometry(params, [&]<class T, int D, int kBlock>() {
    run_fast_attention<T, D, kBlock>(context, params, plan, multiprocessors, out, lse);
  });
}

}  // namespace msa::cuda
