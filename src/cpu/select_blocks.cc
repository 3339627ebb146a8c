// SPDX-License-Identifier: Apache-2.0
// Plans and starts select_blocks on the instruction set in use; how it works: select_blocks-inl.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/select_blocks-inl.h"
// clang-format off: every set is compiled by this include, the last one by the next.
#include "src/cpu/targets.h"
#include "src/cpu/select_blocks-inl.h"
// clang-format on

#if HWY_ONCE

#include "src/core/threads.h"
#include "src/cpu/instruction_set.h"
#include "src/cpu/operators.h"
#include "src/cpu/run_plan.h"

namespace msa::cpu {

HWY_EXPORT(select_chunk);

void select_blocks(const Context& context, const SelectBlocksParams& params, const TensorView& blocks) {
  ensure_instruction_set();
  clear_padding_rows(blocks, core::total_queries(params.batch));
  SelectionShape shape;
  shape.queries = count_queries(params.batch);
  shape.kv_heads = params.q_idx.size(1);
  shape.index_dim = params.q_idx.size(2);
  shape.block_size = params.block_size;
  shape.topk = params.topk;
  const ChunkPlan plan =
      plan_selection("select_blocks", shape, core::resolve_threads(context.threads), context.workspace_limit);
  const SelectionLayout layout = lay_out_selection(shape, plan.chunk);
  const auto run = HWY_DYNAMIC_DISPATCH(select_chunk);
  // One head: a chunk's tile holds the rows of all groups.
  run_plan(plan, params.batch, 1, [&](const QueryChunk& chunk, std::int64_t, float* scratch) {
    run(params, layout, chunk, scratch, blocks);
  });
}

}  // namespace msa::cpu

#endif  // HWY_ONCE
