// SPDX-License-Identifier: Apache-2.0
// The tolerance rule of SPEC section 6 as code: how wrong an operator may be is what a naive implementation in the same
// storage type gets wrong (scores, probabilities and outputs rounded to it, float32 accumulation), twice, plus one
// rounding of the storage type at the largest value. Never a loose constant.
#pragma once

#include <string>
#include <vector>

#include "tests/unit/support/problem.h"

namespace msa::testing {

/// Largest relative error of one rounding to nearest: 2^-24, 2^-8 or 2^-11.
double unit_roundoff(DType dtype);
/// `value` rounded to the storage type.
float round_to(DType dtype, float value);

/// Judges max and rms error of `got` against `exact`, given those of `naive`. `exact` went through float32, so its own
/// rounding is allowed for. Where `exact` is not finite, `got` must equal it.
void expect_within_rule(const std::string& what, const std::vector<double>& got, const std::vector<double>& exact,
                        const std::vector<double>& naive, DType storage);
inline void expect_within_rule(const std::string& what, const Tensor& got, const Tensor& exact, const Tensor& naive) {
  expect_within_rule(what, got.values(), exact.values(), naive.values(), got.dtype());
}

// The naive implementations. `blocks` of the params may be empty: the whole prefix.
AttentionResult naive_attention(const SparseAttentionParams& params);
AttentionGradients naive_attention_backward(const SparseAttentionParams& params, const Tensor& dout,
                                            const Tensor* dlse);
KlResult naive_kl(const IndexKlParams& params);
KlGradients naive_kl_backward(const IndexKlParams& params, float grad_output);

/// A dense call's params as those of a sparse one without blocks.
SparseAttentionParams over_whole_prefix(const DenseAttentionParams& params);

void expect_same_bytes(const std::string& what, const Tensor& a, const Tensor& b);
void expect_same_bytes(const std::string& what, const std::vector<std::byte>& a, const std::vector<std::byte>& b);

}  // namespace msa::testing
