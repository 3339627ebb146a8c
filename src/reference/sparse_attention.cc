// SPDX-License-Identifier: Apache-2.0
// Attention over the selected blocks (SPEC section 3). Tested in tests/unit/sparse_attention_test.cc.
#include "src/reference/attention_rows.h"
#include "src/reference/operators.h"

namespace msa::reference {

void sparse_attention(const Context&, const SparseAttentionParams& params, const TensorView& out,
                      const TensorView& lse) {
  attend(params, out, lse);
}

void sparse_attention_backward(const Context&, const SparseAttentionParams& params, const AttentionSaved& saved,
                               const AttentionGrads& grads) {
  attend_backward(params, saved, grads);
}

}  // namespace msa::reference
