// SPDX-License-Identifier: Apache-2.0
// Plans and starts dense_attention on the instruction set in use; how it works: dense_attention-inl.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/dense_attention-inl.h"
// clang-format off: every set is compiled by this include, the last one by the next.
#include "src/cpu/targets.h"
#include "src/cpu/dense_attention-inl.h"
// clang-format on

#if HWY_ONCE

#include "src/cpu/attention.h"
#include "src/cpu/instruction_set.h"
#include "src/cpu/operators.h"
#include "src/cpu/run_plan.h"

namespace msa::cpu {

namespace {

// A constant, so that pages of any size and packed keys give the same bits. At 128 keys the work a block costs a row
// beside its products (rescaling, softmax ends) is a few percent, and a block's keys stay within the L1 cache where the
// products are that fast (docs/attention.md).
constexpr std::int64_t kDenseBlockSize = 128;

}  // namespace

HWY_EXPORT(attend_densely);

void dense_attention(const Context& context, const DenseAttentionParams& params, const TensorView& out,
                     const TensorView& lse) {
  ensure_instruction_set();
  AttentionInput input;
  input.q = params.q;
  input.k = params.k;
  input.v = params.v;
  input.batch = params.batch;
  input.scale = static_cast<float>(*params.scale);
  input.out = out;
  input.lse = lse;
  plan_input("dense_attention", context, kDenseBlockSize, input);
  clear_padding_rows(input);
  const auto run = HWY_DYNAMIC_DISPATCH(attend_densely);
  run_plan(input.plan, params.batch, input.shape.kv_heads,
           [&](const QueryChunk& chunk, std::int64_t kv_head, float* scratch) { run(input, chunk, kv_head, scratch); });
}

}  // namespace msa::cpu

#endif  // HWY_ONCE
