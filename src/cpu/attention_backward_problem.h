// SPDX-License-Identifier: Apache-2.0
// What the backward of attention works on: the arguments of the sparse or the dense operator as one. See
// attention_backward-inl.h.
#pragma once

#include <cstdint>

#include "msa/attention.h"
#include "src/cpu/bf16_dot.h"

namespace msa::cpu {

struct BackwardProblem {
  ConstTensorView q, k, v;
  ConstTensorView blocks;  ///< empty: dense
  const Batch* batch = nullptr;
  float scale = 1;
  AttentionSaved saved;
  AttentionGrads grads;
  Bf16Kernel multiply_bf16 = nullptr;  ///< set where the tensors are bf16 and the machine has products for them
  bool needs_amx_tiles = false;        ///< of the thread that calls multiply_bf16
};

/// What a row and head brings along: P = weight e^(scale S - shift), dS = P ((dP - mean) + lse_grad), in this order: a
/// row that sees one key has dP = mean, and its dS is lse_grad to the last bit (in float products).
struct RowTerms {
  float shift = 0;     ///< the forward's lse; in float32 the row's largest scaled score
  float weight = 1;    ///< in float32 1 / sum of e^(scale S - shift)
  float mean = 0;      ///< rowsum(P dP) = <dout, out>
  float lse_grad = 0;  ///< dlse
};

}  // namespace msa::cpu
