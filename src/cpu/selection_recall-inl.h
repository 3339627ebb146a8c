// SPDX-License-Identifier: Apache-2.0
// selection_recall: how much of the best blocks by the main branch's own probability mass (SPEC section 4) a selection
// holds. The mass comes from block_mass-inl.h, the best blocks from the selection's own top-k. Tested in
// tests/unit/selection_recall_test.cc.
#if defined(MSA_CPU_SELECTION_RECALL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_SELECTION_RECALL_INL_H_
#undef MSA_CPU_SELECTION_RECALL_INL_H_
#else
#define MSA_CPU_SELECTION_RECALL_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "msa/index_kl.h"
#include "src/core/layout.h"
#include "src/cpu/block_mass-inl.h"
#include "src/cpu/plan.h"
#include "src/cpu/recall_row.h"
#include "src/cpu/topk.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// One task: the rows of a chunk and a group, into rows[row * kv_heads + kv_head]. Rows with at most topk visible
/// blocks stay as they are. `scratch` is laid out by `layout`.
inline HWY_ATTR void measure_recall_chunk(const SelectionRecallParams& params, const BlockMassShape& shape,
                                          const BlockMassLayout& layout, const QueryChunk& chunk, std::int64_t kv_head,
                                          float* scratch, RecallRow* rows) {
  const core::Sequence sequence = core::get_sequence(params.batch, chunk.sequence);
  const auto visible_blocks = [&](std::int64_t i) {
    return core::query_position(params.batch, sequence, i) / params.block_size + 1;
  };
  QueryChunk measured = chunk;  // positions ascend, so the rows that do not count come first
  while (measured.begin < measured.end && visible_blocks(measured.begin) <= shape.topk) ++measured.begin;
  if (measured.begin == measured.end) return;
  const float* mass = block_mass(params.q, params.k, params.batch, static_cast<float>(*params.scale), shape, layout,
                                 measured, kv_head, scratch);
  auto* best = reinterpret_cast<std::int32_t*>(scratch + layout.best);
  for (std::int64_t i = measured.begin; i < measured.end; ++i, mass += shape.blocks) {
    const std::int64_t row = sequence.query_begin + i;
    const std::int64_t local = visible_blocks(i) - 1;  // always one of the best
    RowTopk top(best, best + shape.topk, shape.topk - 1);
    for (std::int64_t b = 0; b < local; ++b) top.offer(static_cast<std::int32_t>(b), mass[b]);
    std::sort(best + shape.topk, best + shape.topk + top.count());  // so that the sums below have one order

    const std::int32_t* selected = block_row(params.blocks, kv_head, row);
    const std::int32_t* selected_end = std::find(selected, selected + shape.topk, -1);
    RecallRow& out = rows[row * shape.kv_heads + kv_head];
    double mass_best = 0;
    double mass_found = 0;
    std::int64_t found = 0;
    for (std::int64_t t = 0; t <= top.count(); ++t) {
      const auto block = t < top.count() ? top.ids()[t] : static_cast<std::int32_t>(local);
      mass_best += static_cast<double>(mass[block]);
      if (!std::binary_search(selected, selected_end, block)) continue;
      ++found;
      mass_found += static_cast<double>(mass[block]);
    }
    out.block_recall = static_cast<double>(found) / static_cast<double>(shape.topk);
    out.score_recall = mass_found / mass_best;
    out.counts = true;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_SELECTION_RECALL_INL_H_
