// SPDX-License-Identifier: Apache-2.0
// The KL loss of the index branch and its gradients for every geometry and dtype (SPEC section 4): plans and entry
// points of the CUDA backend's generic path. How it works: index_kl.cuh, docs/cuda-generic.md. Tested in
// tests/cuda/generic_index_kl_test.cc.
#pragma once

#include <cstddef>

#include "msa/index_kl.h"
#include "src/cuda/generic/attention.h"

namespace msa::cuda::generic {

/// Parameters of kl_rows, in both directions, and of kl_keys_backward.
struct KlArgs {
  Rows q_idx;
  Keys k_idx;
  Rows q;
  Keys k;
  BlockIds blocks;
  BatchPointers batch;
  int kv_heads = 1;
  int group_size = 1;
  float scale = 1;
  float index_scale = 1;
  bool takes_max = false;  ///< Teacher::kMax
  Rows lse_main, lse_index, teacher_norm;
  double* row_values = nullptr;        ///< forward: [Tq, kv_heads], each row's KL
  const float* grad_output = nullptr;  ///< backward: one float
  Rows dq_idx, dk_idx;                 ///< backward
};

struct KlSumArgs {
  const double* row_values = nullptr;
  BatchPointers batch;
  int kv_heads = 1;
  float* kl = nullptr;
};

/// kl_sum: 256 threads, a double each.
constexpr LaunchShape kl_sum_shape() { return {1, 1, 256, 256 * sizeof(double)}; }

struct KlPlan {
  AttendPlan lse_main, lse_index;
  KlArgs args;
  LaunchShape rows;
  KlSumArgs sum_args;
  LaunchShape sum;
};

struct KlBackwardPlan {
  KlArgs args;
  LaunchShape rows;  ///< dq_idx
  LaunchShape keys;  ///< dk_idx
  LaunchShape tail;  ///< dk_idx behind the last sequence
};

/// One double a row: 8 Tq kv_heads. The backward takes none.
std::size_t index_kl_workspace(const IndexKlParams& params);
KlPlan plan_index_kl(const IndexKlParams& params, const IndexKlSaved& saved, void* workspace, float* kl);
KlBackwardPlan plan_index_kl_backward(const IndexKlParams& params, const IndexKlSaved& saved, const float* grad_output,
                                      const TensorView& dq_idx, const TensorView& dk_idx);

// Entry points: as in src/cuda/operators.h; kl and grad_output are device memory.
void index_kl(void* stream, void* workspace, const IndexKlParams& params, const IndexKlSaved& saved, float* kl);
void index_kl_backward(void* stream, const IndexKlParams& params, const IndexKlSaved& saved, const float* grad_output,
                       const TensorView& dq_idx, const TensorView& dk_idx);

}  // namespace msa::cuda::generic
