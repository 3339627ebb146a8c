// SPDX-License-Identifier: Apache-2.0
// Plans and starts select_blocks_oracle on the instruction set in use; how it works: select_blocks_oracle-inl.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/select_blocks_oracle-inl.h"
// clang-format off: every set is compiled by this include, the last one by the next.
#include "src/cpu/targets.h"
#include "src/cpu/select_blocks_oracle-inl.h"
// clang-format on

#if HWY_ONCE

#include <algorithm>

#include "src/core/threads.h"
#include "src/cpu/instruction_set.h"
#include "src/cpu/operators.h"
#include "src/cpu/run_plan.h"

namespace msa::cpu {

HWY_EXPORT(select_oracle_chunk);

void select_blocks_oracle(const Context& context, const OracleBlocksParams& params, const TensorView& blocks) {
  ensure_instruction_set();
  clear_padding_rows(blocks, core::total_queries(params.batch));
  BlockMassShape shape;
  shape.queries = count_queries(params.batch);
  shape.kv_heads = params.k.size(params.k.rank - 2);
  shape.group_size = params.q.size(1) / shape.kv_heads;
  shape.head_dim = params.q.size(2);
  shape.block_size = params.block_size;
  shape.blocks = count_blocks(params.batch, params.block_size);
  shape.topk = params.topk;
  const ChunkPlan plan =
      plan_block_mass("select_blocks_oracle", shape, core::resolve_threads(context.threads), context.workspace_limit);
  const BlockMassLayout layout = lay_out_block_mass(shape, plan.chunk);
  const auto run = HWY_DYNAMIC_DISPATCH(select_oracle_chunk);
  run_plan(plan, params.batch, shape.kv_heads, [&](const QueryChunk& chunk, std::int64_t kv_head, float* scratch) {
    run(params, shape, layout, chunk, kv_head, scratch, blocks);
  });
}

}  // namespace msa::cpu

#endif  // HWY_ONCE
