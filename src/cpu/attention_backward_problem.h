// SPDX-License-Identifier: Apache-2.0
// What the backward of attention works on: the arguments of the sparse or the dense operator as one. See
// attention_backward-inl.h.
#pragma once

#include <cstdint>

#include "msa/attention.h"

namespace msa::cpu {

struct BackwardProblem {
  ConstTensorView q, k, v;
  ConstTensorView blocks;  ///< empty: dense
  const Batch* batch = nullptr;
  float scale = 1;
  AttentionSaved saved;
  AttentionGrads grads;
};

/// What a row and head brings along: P = e^(scale S - shift), dS = P ((dP - mean) + lse_grad), in this order: a row that
/// sees one key has dP = mean, and its dS is lse_grad to the last bit.
struct RowTerms {
  float shift = 0;     ///< the forward's lse
  float mean = 0;      ///< rowsum(P dP) = <dout, out>
  float lse_grad = 0;  ///< dlse
};

}  // namespace msa::cpu
