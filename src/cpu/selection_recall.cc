// SPDX-License-Identifier: Apache-2.0
// Plans and starts selection_recall on the instruction set in use; how it works: selection_recall-inl.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/selection_recall-inl.h"
// clang-format off: every set is compiled by this include, the last one by the next.
#include "src/cpu/targets.h"
#include "src/cpu/selection_recall-inl.h"
// clang-format on

#if HWY_ONCE

#include <vector>

#include "src/core/threads.h"
#include "src/cpu/instruction_set.h"
#include "src/cpu/operators.h"
#include "src/cpu/run_plan.h"

namespace msa::cpu {

HWY_EXPORT(measure_recall_chunk);

SelectionRecall selection_recall(const Context& context, const SelectionRecallParams& params) {
  ensure_instruction_set();
  BlockMassShape shape;
  shape.queries = count_queries(params.batch);
  shape.kv_heads = params.blocks.size(0);
  shape.group_size = params.q.size(1) / shape.kv_heads;
  shape.head_dim = params.q.size(2);
  shape.block_size = params.block_size;
  shape.blocks = count_blocks(params.batch, params.block_size);
  shape.topk = params.blocks.size(2);
  const ChunkPlan plan =
      plan_block_mass("selection_recall", shape, core::resolve_threads(context.threads), context.workspace_limit);
  const BlockMassLayout layout = lay_out_block_mass(shape, plan.chunk);
  std::vector<RecallRow> rows(static_cast<std::size_t>(shape.queries.total * shape.kv_heads));
  const auto run = HWY_DYNAMIC_DISPATCH(measure_recall_chunk);
  run_plan(plan, params.batch, shape.kv_heads, [&](const QueryChunk& chunk, std::int64_t kv_head, float* scratch) {
    run(params, shape, layout, chunk, kv_head, scratch, rows.data());
  });
  SelectionRecall recall;
  for (const RecallRow& row : rows) {  // in one order, whatever the threads did
    if (!row.counts) continue;
    recall.block_recall += row.block_recall;
    recall.score_recall += row.score_recall;
    ++recall.rows;
  }
  // 0 / 0 over no rows is the NaN that the contract asks for.
  recall.block_recall /= static_cast<double>(recall.rows);
  recall.score_recall /= static_cast<double>(recall.rows);
  return recall;
}

}  // namespace msa::cpu

#endif  // HWY_ONCE
