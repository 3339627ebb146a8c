// SPDX-License-Identifier: Apache-2.0
// The yardstick of the tolerance rule (SPEC section 6): attention and KL as a plain program in the storage type would
// compute them. Scores, probabilities and outputs are rounded to the storage type, sums run in float. A backend may be
// off the exact result by twice what this is, plus one rounding of the storage type at the largest value.
#pragma once

#include <cstdint>
#include <vector>

#include "msa/tensor.h"

namespace msa::conformance {

/// Packed inputs of one case, already rounded to the storage type but held as float. One or more sequences.
struct NaiveInputs {
  DType dtype = DType::kFloat32;
  std::int64_t query_heads = 1, kv_heads = 1, head_dim = 16, value_dim = 16, index_dim = 16;
  std::vector<std::int32_t> cu_seqlens_q, cu_seqlens_k;
  std::vector<float> q, k, v, q_idx, k_idx;  ///< [Tq, query_heads, head_dim], [Tk, kv_heads, head_dim], ...
  std::vector<float> dout, dlse;             ///< gradients that arrive at out and lse
  std::vector<std::int32_t> blocks;          ///< [kv_heads, Tq, topk]; empty: whole prefix
  std::int64_t block_size = 128, topk = 0;
  std::int64_t queries() const { return cu_seqlens_q.back(); }
  std::int64_t keys() const { return cu_seqlens_k.back(); }
};

struct NaiveOutputs {
  std::vector<float> out, lse, dq, dk, dv;
  float kl = 0;
  std::vector<float> dq_idx, dk_idx;
};

/// Rounds to the storage type and back.
float round_to(DType dtype, float value);

NaiveOutputs run_naive(const NaiveInputs& inputs);

}  // namespace msa::conformance
