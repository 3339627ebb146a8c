// SPDX-License-Identifier: Apache-2.0
// The pieces of a decoder layer other than attention, as plain functions of tensors, differentiable: norms, rotary
// embedding, gated MLPs and the mixture of experts. Tested in tests/unit/model_decoder.cc and
// tests/python/test_decoder.py.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "src/model/files/config.h"

namespace msa::model {

/// x / rms(x) * weight over the last dimension, computed in float32. Llama rounds to the type of x before the weight;
/// `gemma` multiplies by 1 + weight and rounds after.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool gemma);

/// Cosines and sines of some positions: float32 [T, 1, rotary_dim / 2].
struct RopeTable {
  at::Tensor cos, sin;
};
RopeTable make_rope_table(const files::RopeConfig& rope, const at::Tensor& positions);

/// x [T, heads, dim]: each of `tiles` equal parts of a head has its first rotary_dim dimensions turned, dimension i
/// with i + rotary_dim / 2; the others pass. Computed in float32, rounded once.
at::Tensor apply_rope(const at::Tensor& x, const RopeTable& table, std::int64_t tiles = 1);

/// silu(gate) * up.
at::Tensor gated_silu(const at::Tensor& gate, const at::Tensor& up);
/// MiniMax-M3: gate_up [..., 2 n] is gate and up side by side; (up + 1) * gate * sigmoid(alpha * gate) with gate
/// clamped from above and up on both sides at `limit`.
at::Tensor clamped_swiglu(const at::Tensor& gate_up, double alpha, double limit);

struct ExpertWeights {
  at::Tensor router;       ///< [experts, hidden]
  at::Tensor choice_bias;  ///< float32 [experts]: takes part in the choice, not in the weights
  at::Tensor gate_up;      ///< [experts, 2 n, hidden]
  at::Tensor down;         ///< [experts, hidden, n]
};
/// MiniMax-M3's routed experts on x [T, hidden]: sigmoid scores, the best num_experts_per_tok by score + bias, weights
/// normalised over the chosen ones. Touches only the chosen experts' weights.
at::Tensor routed_experts(const at::Tensor& x, const ExpertWeights& weights, const files::ModelConfig& config);

}  // namespace msa::model
