// SPDX-License-Identifier: Apache-2.0
// select_blocks: scores of the index branch, block maximum and running top-k in one pass over the keys (SPEC section 2). The
// index key is shared by all groups, so one tile of scores serves every group of many positions. Nothing of size
// [queries, keys] or [queries, blocks] exists. Tested in tests/unit/select_blocks_test.cc.
#if defined(MSA_CPU_SELECT_BLOCKS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_SELECT_BLOCKS_INL_H_
#undef MSA_CPU_SELECT_BLOCKS_INL_H_
#else
#define MSA_CPU_SELECT_BLOCKS_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>

#include "msa/select_blocks.h"
#include "src/core/layout.h"
#include "src/cpu/key_tile-inl.h"
#include "src/cpu/plan.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"
#include "src/cpu/topk.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// The largest number among row[0, count); NaN only when nothing else is there.
inline HWY_ATTR float block_score(const float* HWY_RESTRICT row, std::int64_t count) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  auto best = hn::Set(df, kNegativeInfinity);
  std::int64_t j = 0;
  for (; j + lanes <= count; j += lanes) best = max_number(hn::LoadU(df, row + j), best);
  if (j < count) {
    const auto mask = hn::FirstN(df, static_cast<std::size_t>(count - j));
    best = max_number(hn::IfThenElse(mask, hn::LoadU(df, row + j), best), best);
  }
  const float largest = hn::GetLane(hn::MaxOfLanes(df, best));
  if (largest != kNegativeInfinity) return largest;
  // Either -inf was the largest number or there was none.
  const bool any_number = std::any_of(row, row + count, [](float score) { return !std::isnan(score); });
  return any_number ? largest : std::numeric_limits<float>::quiet_NaN();
}

/// One task: the rows of a chunk, all groups. `scratch` is laid out by `layout`.
inline HWY_ATTR void select_chunk(const SelectBlocksParams& params, const SelectionLayout& layout,
                                  const QueryChunk& chunk, float* scratch, const TensorView& blocks) {
  const core::Sequence sequence = core::get_sequence(params.batch, chunk.sequence);
  const std::int64_t groups = params.q_idx.size(1);
  const std::int64_t index_dim = params.q_idx.size(2);
  const std::int64_t block_size = params.block_size;
  const std::int64_t topk = params.topk;
  const std::int64_t count = chunk.end - chunk.begin;
  const std::int64_t rows = count * groups;
  const std::int64_t tile_stride = padded_stride(block_size);
  float* queries = scratch + layout.queries;
  float* keys = scratch + layout.keys;
  float* scores = scratch + layout.scores;
  auto* best = reinterpret_cast<std::int32_t*>(scratch + layout.best);
  auto* row_topk = reinterpret_cast<RowTopk*>(scratch + layout.rows);
  const auto position_of = [&](std::int64_t i) {
    return core::query_position(params.batch, sequence, chunk.begin + i);
  };
  const auto forced_of = [&](std::int64_t visible) {
    return core::forced_blocks(visible, topk, params.local_blocks, params.init_blocks);
  };

  load_query_rows(params.q_idx, sequence.query_begin + chunk.begin, count, 0, groups, queries);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t visible = position_of(r / groups) / block_size + 1;
    std::int32_t* row_best = best + r * 2 * topk;
    new (row_topk + r) RowTopk(row_best, row_best + topk, free_slots(forced_of(visible), visible, topk));
  }

  // Blocks that are candidates for some query of the chunk. The later a query, the more blocks it has to choose from, and
  // the forced init blocks are the same for all that choose: the last query has all the candidates of the others.
  const std::int64_t last_position = position_of(count - 1);
  const std::int64_t last_visible = last_position / block_size + 1;
  const core::ForcedBlocks last_forced = forced_of(last_visible);
  const bool any_choice = last_visible > topk && free_slots(last_forced, last_visible, topk) > 0;
  const core::KeyRows key_rows(params.k_idx, params.batch);
  std::int64_t first = 0;  // first query that may choose the block
  for (std::int64_t b = last_forced.init_end; any_choice && b < last_forced.local_begin; ++b) {
    const auto may_choose = [&](std::int64_t i) {
      const std::int64_t visible = position_of(i) / block_size + 1;
      return visible > topk && b < forced_of(visible).local_begin;
    };
    while (!may_choose(first)) ++first;
    const std::int64_t block_begin = b * block_size;
    const std::int64_t block_keys = std::min(block_size, last_position + 1 - block_begin);
    load_keys_transposed(key_rows, params.k_idx.dtype, sequence.index, 0, block_begin, block_keys, index_dim, keys,
                         tile_stride);
    for (std::int64_t r0 = first * groups; r0 < rows; r0 += kScoreRows) {
      const std::int64_t rows_here = std::min(kScoreRows, rows - r0);
      product(rows_here, padded_columns(block_keys), index_dim, queries + r0 * index_dim, index_dim, 1, keys,
              tile_stride, scores, tile_stride, false);
      for (std::int64_t r = r0; r < r0 + rows_here; ++r) {
        const std::int64_t visible_keys = std::min(block_keys, position_of(r / groups) + 1 - block_begin);
        row_topk[r].offer(static_cast<std::int32_t>(b), block_score(scores + (r - r0) * tile_stride, visible_keys));
      }
    }
  }

  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t i = r / groups;
    const std::int64_t visible = position_of(i) / block_size + 1;
    write_selection(block_row(blocks, r % groups, sequence.query_begin + chunk.begin + i), topk, visible,
                    forced_of(visible), row_topk[r].ids(), row_topk[r].count());
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_SELECT_BLOCKS_INL_H_
