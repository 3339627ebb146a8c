// SPDX-License-Identifier: Apache-2.0
// Attention over the whole visible prefix: the sparse operator with no blocks given. Tested in
// tests/unit/dense_attention_test.cc.
#include "src/reference/attention_rows.h"
#include "src/reference/operators.h"

namespace msa::reference {
namespace {

SparseAttentionParams over_whole_prefix(const DenseAttentionParams& params) {
  SparseAttentionParams whole;
  whole.q = params.q;
  whole.k = params.k;
  whole.v = params.v;
  whole.batch = params.batch;
  whole.scale = params.scale;
  return whole;
}

}  // namespace

void dense_attention(const Context&, const DenseAttentionParams& params, const TensorView& out, const TensorView& lse) {
  attend(over_whole_prefix(params), out, lse);
}

void dense_attention_backward(const Context&, const DenseAttentionParams& params, const AttentionSaved& saved,
                              const AttentionGrads& grads) {
  attend_backward(over_whole_prefix(params), saved, grads);
}

}  // namespace msa::reference
