// SPDX-License-Identifier: Apache-2.0
// Plans and starts sparse_attention on the instruction set in use; how it works: sparse_attention-inl.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/sparse_attention-inl.h"
// clang-format off: every set is compiled by this include, the last one by the next.
#include "src/cpu/targets.h"
#include "src/cpu/sparse_attention-inl.h"
// clang-format on

#if HWY_ONCE

#include "src/cpu/attention.h"
#include "src/cpu/instruction_set.h"
#include "src/cpu/operators.h"
#include "src/cpu/run_plan.h"

namespace msa::cpu {

HWY_EXPORT(attend_sparsely);

void sparse_attention(const Context& context, const SparseAttentionParams& params, const TensorView& out,
                      const TensorView& lse) {
  ensure_instruction_set();
  AttentionInput input;
  input.q = params.q;
  input.k = params.k;
  input.v = params.v;
  input.blocks = params.blocks;
  input.batch = params.batch;
  input.scale = static_cast<float>(*params.scale);
  input.out = out;
  input.lse = lse;
  plan_input("sparse_attention", context, params.block_size, input);
  clear_padding_rows(input);
  const auto run = HWY_DYNAMIC_DISPATCH(attend_sparsely);
  run_plan(input.plan, params.batch, input.shape.kv_heads,
           [&](const QueryChunk& chunk, std::int64_t kv_head, float* scratch) { run(input, chunk, kv_head, scratch); });
}

}  // namespace msa::cpu

#endif  // HWY_ONCE
