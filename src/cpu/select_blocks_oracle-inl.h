// SPDX-License-Identifier: Apache-2.0
// select_blocks_oracle: blocks ranked by the main branch's own probability mass. The mass comes from block_mass-inl.h;
// here it is only ranked. Tested in tests/unit/select_blocks_test.cc.
#if defined(MSA_CPU_SELECT_BLOCKS_ORACLE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_SELECT_BLOCKS_ORACLE_INL_H_
#undef MSA_CPU_SELECT_BLOCKS_ORACLE_INL_H_
#else
#define MSA_CPU_SELECT_BLOCKS_ORACLE_INL_H_
#endif

#include <cstdint>

#include "msa/select_blocks.h"
#include "src/core/layout.h"
#include "src/cpu/block_mass-inl.h"
#include "src/cpu/plan.h"
#include "src/cpu/topk.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// One task: the rows of a chunk and a group. `scratch` is laid out by `layout`.
inline HWY_ATTR void select_oracle_chunk(const OracleBlocksParams& params, const BlockMassShape& shape,
                                         const BlockMassLayout& layout, const QueryChunk& chunk, std::int64_t kv_head,
                                         float* scratch, const TensorView& blocks) {
  const core::Sequence sequence = core::get_sequence(params.batch, chunk.sequence);
  const float* mass = block_mass(params.q, params.k, params.batch, static_cast<float>(*params.scale), shape, layout,
                                 chunk, kv_head, scratch);
  auto* best = reinterpret_cast<std::int32_t*>(scratch + layout.best);
  for (std::int64_t i = 0; i < chunk.end - chunk.begin; ++i) {
    const std::int64_t position = core::query_position(params.batch, sequence, chunk.begin + i);
    const std::int64_t visible = position / params.block_size + 1;
    const core::ForcedBlocks forced =
        core::forced_blocks(visible, params.topk, params.local_blocks, params.init_blocks);
    RowTopk top(best, best + params.topk, free_slots(forced, visible, params.topk));
    if (visible > params.topk) {
      for (std::int64_t b = forced.init_end; b < forced.local_begin; ++b) {
        top.offer(static_cast<std::int32_t>(b), mass[i * shape.blocks + b]);
      }
    }
    write_selection(block_row(blocks, kv_head, sequence.query_begin + chunk.begin + i), params.topk, visible, forced,
                    top.ids(), top.count());
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_SELECT_BLOCKS_ORACLE_INL_H_
