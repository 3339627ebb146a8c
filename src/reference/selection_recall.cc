// SPDX-License-Identifier: Apache-2.0
// How much of the blocks that the main branch would choose by its own probability mass a selection holds (SPEC
// section 4). Tested in tests/unit/selection_recall_test.cc.
#include "msa/index_kl.h"
#include "src/reference/choose_blocks.h"
#include "src/reference/operators.h"
#include "src/reference/rows.h"

namespace msa::reference {

SelectionRecall selection_recall(const Context&, const SelectionRecallParams& params) {
  const Keys keys(params.k, params.batch);
  const std::int64_t kv_heads = params.blocks.size(0);
  const std::int64_t topk = params.blocks.size(2);
  const std::int64_t group_size = params.q.size(1) / kv_heads;
  double block_sum = 0;
  double score_sum = 0;
  SelectionRecall recall;
  for_each_query(params.batch, [&](const Query& query) {
    if (query.position / params.block_size + 1 <= topk) return;  // every visible block is selected: nothing to measure
    for (std::int64_t group = 0; group < kv_heads; ++group) {
      const Row mass = read_block_mass(params.q, keys, query, group, group_size, params.block_size, *params.scale);
      const auto best = choose_blocks(mass, topk, /*local_blocks=*/1, /*init_blocks=*/0);  // I*
      const auto selected = read_blocks(params.blocks, group, query.row);                  // I
      double found = 0;
      double mass_found = 0;
      double mass_best = 0;
      for (const std::int64_t b : best) {
        mass_best += mass[static_cast<std::size_t>(b)];
        if (std::find(selected.begin(), selected.end(), b) == selected.end()) continue;
        found += 1;
        mass_found += mass[static_cast<std::size_t>(b)];
      }
      block_sum += found / static_cast<double>(best.size());
      score_sum += mass_found / mass_best;
      recall.rows += 1;
    }
  });
  // 0 / 0 over no rows is the NaN that the contract asks for.
  recall.block_recall = block_sum / static_cast<double>(recall.rows);
  recall.score_recall = score_sum / static_cast<double>(recall.rows);
  return recall;
}

}  // namespace msa::reference
