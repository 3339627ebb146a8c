// SPDX-License-Identifier: Apache-2.0
// Probability mass of every visible block for a chunk of queries of one group: full causal softmax of the main branch,
// averaged over the group's heads (SPEC section 4). One pass over the keys leaves each block's own maximum and sum;
// they are put together at the end. Used by select_blocks_oracle and selection_recall, and tested through them.
#if defined(MSA_CPU_BLOCK_MASS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_BLOCK_MASS_INL_H_
#undef MSA_CPU_BLOCK_MASS_INL_H_
#else
#define MSA_CPU_BLOCK_MASS_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "msa/batch.h"
#include "msa/tensor.h"
#include "src/core/layout.h"
#include "src/cpu/key_tile-inl.h"
#include "src/cpu/plan.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// Fills the part `mass` of the scratch memory: mass[i * shape.blocks + b] = mass of block b in the row of query
/// chunk.begin + i and group kv_head, for every block visible to that query; what lies behind them is not written. A
/// row with a NaN score is NaN throughout. `scratch` is laid out by lay_out_block_mass(shape, plan.chunk); returns
/// `mass`.
inline HWY_ATTR const float* block_mass(const ConstTensorView& q, const ConstTensorView& k, const Batch& batch,
                                        float scale, const BlockMassShape& shape, const BlockMassLayout& layout,
                                        const QueryChunk& chunk, std::int64_t kv_head, float* scratch) {
  const core::Sequence sequence = core::get_sequence(batch, chunk.sequence);
  const std::int64_t head_dim = shape.head_dim;
  const std::int64_t group_size = shape.group_size;
  const std::int64_t count = chunk.end - chunk.begin;
  const std::int64_t rows = count * group_size;
  const std::int64_t tile_stride = padded_stride(shape.block_size);
  float* queries = scratch + layout.queries;
  float* keys = scratch + layout.keys;
  float* scores = scratch + layout.scores;
  float* largest = scratch + layout.largest;
  float* sums = scratch + layout.sums;
  float* mass = scratch + layout.mass;
  if (count == 0) return mass;
  const auto position_of = [&](std::int64_t i) { return core::query_position(batch, sequence, chunk.begin + i); };

  const core::KeyRows key_rows(k, batch);
  load_query_rows(q, sequence.query_begin + chunk.begin, count, kv_head * group_size, group_size, queries);
  const std::int64_t last_position = position_of(count - 1);
  std::int64_t first = 0;  // first query of the chunk that sees the block
  for (std::int64_t b = 0; b <= last_position / shape.block_size; ++b) {
    const std::int64_t block_begin = b * shape.block_size;
    const std::int64_t block_keys = std::min(shape.block_size, last_position + 1 - block_begin);
    while (position_of(first) < block_begin) ++first;
    load_keys_transposed(key_rows, k.dtype, sequence.index, kv_head, block_begin, block_keys, head_dim, keys,
                         tile_stride);
    for (std::int64_t r0 = first * group_size; r0 < rows; r0 += kScoreRows) {
      const std::int64_t rows_here = std::min(kScoreRows, rows - r0);
      product(rows_here, padded_columns(block_keys), head_dim, queries + r0 * head_dim, head_dim, 1, keys, tile_stride,
              scores, tile_stride, Sums::kReplace);
      for (std::int64_t r = r0; r < r0 + rows_here; ++r) {
        const std::int64_t visible = std::min(block_keys, position_of(r / group_size) + 1 - block_begin);
        float* row = scores + (r - r0) * tile_stride;
        const float top = scale_and_max(row, visible, scale);
        largest[r * shape.blocks + b] = top;
        sums[r * shape.blocks + b] = exp_and_sum(row, visible, softmax_shift(top));
      }
    }
  }

  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t visible = position_of(i) / shape.block_size + 1;
    float* out = mass + i * shape.blocks;
    std::fill(out, out + visible, 0.0f);
    for (std::int64_t h = 0; h < group_size; ++h) {
      const float* row_largest = largest + (i * group_size + h) * shape.blocks;
      float* row_sums = sums + (i * group_size + h) * shape.blocks;
      float top = kNegativeInfinity;
      for (std::int64_t b = 0; b < visible; ++b) top = std::max(top, row_largest[b]);
      float total = 0;
      for (std::int64_t b = 0; b < visible; ++b) {
        row_sums[b] *= exp_one(row_largest[b] - top);
        total += row_sums[b];
      }
      for (std::int64_t b = 0; b < visible; ++b) out[b] += row_sums[b] / total;
    }
    for (std::int64_t b = 0; b < visible; ++b) out[b] /= static_cast<float>(group_size);
  }
  return mass;
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_BLOCK_MASS_INL_H_
