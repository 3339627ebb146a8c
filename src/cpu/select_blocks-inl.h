// SPDX-License-Identifier: Apache-2.0
// select_blocks: scores of the index branch, block maximum and running top-k in one pass over the keys (SPEC section
// 2). The index key is shared by all groups, so rows are (query, group) pairs of neighbouring queries. Every score is
// one chain of multiply-adds over the dimensions in order, whichever of the loops below computes it: that is what makes
// chunks, spans and screening (screen-inl.h) give the same blocks. Tested in tests/unit/select_blocks_test.cc.
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
#include "src/cpu/select_blocks_plan.h"
#include "src/cpu/select_choices.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/strip-inl.h"
#include "src/cpu/tile-inl.h"
#include "src/cpu/topk.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

using IntTag = hn::RebindToSigned<FloatTag>;
using IntVec = hn::Vec<IntTag>;

/// order_key of every lane.
inline HWY_ATTR IntVec order_keys(FloatVec scores) {
  const FloatTag df;
  const IntTag di;
  const auto bits = hn::BitCast(di, hn::Add(scores, hn::Zero(df)));  // -0 becomes +0
  const auto key = hn::Xor(bits, hn::And(hn::ShiftRight<31>(bits), hn::Set(di, 0x7fffffff)));
  return hn::IfThenElse(hn::RebindMask(di, hn::IsNaN(scores)), hn::Set(di, INT32_MIN), key);
}

/// Calls body(lane) for the lanes of a mask that are set.
template <class Mask, class Body>
HWY_INLINE HWY_ATTR void for_each_lane(Mask mask, const Body& body) {
  std::uint8_t bytes[8] = {};  // Highway writes at least 1 and at most lanes / 8
  hn::StoreMaskBits(FloatTag(), mask, bytes);
  std::uint32_t bits = bytes[0] | static_cast<std::uint32_t>(bytes[1]) << 8;
  while (bits != 0) {
    body(static_cast<std::int64_t>(__builtin_ctz(bits)));
    bits &= bits - 1;
  }
}

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

/// As block_score for columns of scores[count, kStripRows], of which column r sees the first visible[r] keys (null:
/// all). width is 16 or 32.
inline HWY_ATTR void strip_scores(const float* HWY_RESTRICT scores, std::int64_t count, const std::int32_t* visible,
                                  std::int64_t width, float* HWY_RESTRICT out) {
  const FloatTag df;
  const IntTag di;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  for (std::int64_t r = 0; r < width; r += lanes) {
    auto best = hn::Set(df, kNegativeInfinity);
    if (visible == nullptr) {
      auto second = best;  // two chains: each maximum waits for the one before
      std::int64_t j = 0;
      for (; j + 2 <= count; j += 2) {
        best = max_number(hn::LoadU(df, scores + j * kStripRows + r), best);
        second = max_number(hn::LoadU(df, scores + (j + 1) * kStripRows + r), second);
      }
      if (j < count) best = max_number(hn::LoadU(df, scores + j * kStripRows + r), best);
      best = max_number(second, best);
    } else {
      const auto seen = hn::LoadU(di, visible + r);
      for (std::int64_t j = 0; j < count; ++j) {
        const auto mask = hn::RebindMask(df, hn::Gt(seen, hn::Set(di, static_cast<std::int32_t>(j))));
        best = max_number(hn::IfThenElse(mask, hn::LoadU(df, scores + j * kStripRows + r), best), best);
      }
    }
    hn::StoreU(best, df, out + r);
    for_each_lane(hn::Eq(best, hn::Set(df, kNegativeInfinity)), [&](std::int64_t lane) HWY_ATTR {
      // Either -inf was the largest number or there was none.
      const std::int64_t seen = visible == nullptr ? count : std::min<std::int64_t>(count, visible[r + lane]);
      for (std::int64_t j = 0; j < seen; ++j) {
        if (!std::isnan(scores[j * kStripRows + r + lane])) return;
      }
      out[r + lane] = std::numeric_limits<float>::quiet_NaN();
    });
  }
}

/// Offers the blocks first_block + i with scores[i], i < count, to a row.
inline HWY_ATTR void offer_row(RowTopk& top, std::int32_t first_block, const float* HWY_RESTRICT scores,
                               std::int64_t count) {
  const FloatTag df;
  const IntTag di;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto keys = order_keys(hn::LoadU(df, scores + i));
    const auto pass = hn::Not(hn::Lt(keys, hn::Set(di, top.least_key())));
    for_each_lane(hn::RebindMask(df, pass), [&](std::int64_t lane) HWY_ATTR {
      top.offer(first_block + static_cast<std::int32_t>(i + lane), scores[i + lane]);
    });
  }
  for (; i < count; ++i) top.offer(first_block + static_cast<std::int32_t>(i), scores[i]);
}

/// Turns `count` keys, at most kStripRows, from position `begin` on into a strip. The sequence is read up to position
/// `last`.
inline HWY_ATTR void pack_keys(const core::KeyRows& key_rows, DType dtype, std::int64_t sequence, std::int64_t begin,
                               std::int64_t count, std::int64_t last, std::int64_t dim, float* HWY_RESTRICT strip) {
  const std::int64_t token_bytes = key_rows.token_stride_bytes();
  const std::byte* from[kStripRows];
  for (std::int64_t i = 0; i < count; ++i) {  // 16 rows never straddle pages: a page is a multiple of 16 tokens
    from[i] = i % 16 == 0 ? key_rows.row(sequence, begin + i) : from[i - 1] + token_bytes;
  }
  // Hardware prefetchers stop at the end of every 4 KiB: a strip or two.
  const std::int64_t ahead = begin + 2 * kStripRows <= last ? kStripRows * token_bytes : 0;
  pack_strip(from, count, dtype, dim, strip, ahead);
}

/// A chunk of queries, all groups: loads rows and blocks, and scores ones against the others. `scratch` is laid out by
/// `layout`.
class SelectionChunk {
 public:
  HWY_ATTR SelectionChunk(const SelectBlocksParams& params, const SelectionLayout& layout, const QueryChunk& chunk,
                          float* scratch, const TensorView& blocks)
      : params_(params),
        choices_(params, core::get_sequence(params.batch, chunk.sequence)),
        chunk_(chunk),
        blocks_(blocks),
        key_rows_(params.k_idx, params.batch),
        groups_(params.q_idx.size(1)),
        dim_(params.q_idx.size(2)),
        rows_((chunk.end - chunk.begin) * groups_),
        queries_(scratch + layout.queries),
        packed_(scratch + layout.packed),
        keys_(scratch + layout.keys),
        scores_(scratch + layout.scores),
        best_(reinterpret_cast<std::int32_t*>(scratch + layout.best)),
        tops_(reinterpret_cast<RowTopk*>(scratch + layout.rows)),
        limits_(reinterpret_cast<std::int32_t*>(scratch + layout.limits)),
        least_(reinterpret_cast<std::int32_t*>(scratch + layout.least)),
        row_ids_(reinterpret_cast<std::int32_t*>(scratch + layout.row_ids)) {
    load_query_rows(params.q_idx, choices_.sequence().query_begin + chunk.begin, chunk.end - chunk.begin, 0, groups_,
                    queries_);
    for (std::int64_t r = 0; r < rows_; ++r) {
      limits_[r] = static_cast<std::int32_t>(r % groups_ == 0 ? choices_.end(query_of(r)) : limits_[r - 1]);
      start_top(r, choices_.slots());
    }
  }

  const Choices& choices() const { return choices_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t dim() const { return dim_; }
  const float* query_row(std::int64_t r) const { return queries_ + r * dim_; }
  std::int64_t query_of(std::int64_t r) const { return chunk_.begin + r / groups_; }
  std::int64_t position_of(std::int64_t r) const { return choices_.position(query_of(r)); }
  std::int64_t last_position() const { return choices_.position(chunk_.end - 1); }
  /// Row r chooses among the blocks [choices().begin(), limit(r)).
  std::int64_t limit(std::int64_t r) const { return limits_[r]; }
  RowTopk& top(std::int64_t r) { return tops_[r]; }
  void start_top(std::int64_t r, std::int64_t slots) {
    std::int32_t* best = best_ + r * 2 * params_.topk;
    new (tops_ + r) RowTopk(best, best + params_.topk, slots);
  }
  /// Room for rows() row numbers.
  std::int32_t* row_ids() { return row_ids_; }
  float* key_buffer() { return keys_; }

  /// Loads the keys of a block that the chunk's last query sees; returns how many.
  HWY_ATTR std::int64_t load_block(std::int64_t block) {
    const std::int64_t begin = block * params_.block_size;
    const std::int64_t count = std::min(params_.block_size, last_position() + 1 - begin);
    load_value_rows(key_rows_, params_.k_idx.dtype, choices_.sequence().index, 0, begin, count, dim_, keys_, dim_);
    return count;
  }

  /// Rows ids[0, count), count <= kStripRows, as a strip.
  HWY_ATTR void pack_rows(const std::int32_t* ids, std::int64_t count, float* HWY_RESTRICT strip) const {
    const std::byte* from[kStripRows];
    for (std::int64_t i = 0; i < count; ++i) from[i] = reinterpret_cast<const std::byte*>(query_row(ids[i]));
    pack_strip(from, count, DType::kFloat32, dim_, strip);
  }

  /// Scores of the rows of a packed strip and the loaded block of key_count keys.
  HWY_ATTR void score_strip(const std::int32_t* ids, std::int64_t count, const float* strip, std::int64_t block,
                            std::int64_t key_count, float* out) {
    const std::int64_t width = padded_columns(count);
    product(key_count, width, dim_, keys_, dim_, 1, strip, kStripRows, scores_, kStripRows, Sums::kReplace);
    const std::int64_t begin = block * params_.block_size;
    if (position_of(ids[0]) + 1 >= begin + key_count) {  // positions ascend
      strip_scores(scores_, key_count, nullptr, width, out);
      return;
    }
    std::int32_t visible[kStripRows] = {};
    for (std::int64_t i = 0; i < count; ++i) {
      visible[i] = static_cast<std::int32_t>(std::min(key_count, position_of(ids[i]) + 1 - begin));
    }
    strip_scores(scores_, key_count, visible, width, out);
  }

  /// The score of row r and a block that it sees some of. `strip` has room for kStripRows keys.
  HWY_ATTR float score_row(std::int64_t r, std::int64_t block, float* strip) {
    const std::int64_t begin = block * params_.block_size;
    const std::int64_t count = std::min(params_.block_size, position_of(r) + 1 - begin);
    for (std::int64_t j = 0; j < count; j += kStripRows) {
      const std::int64_t here = std::min(kStripRows, count - j);
      pack_keys(key_rows_, params_.k_idx.dtype, choices_.sequence().index, begin + j, here, begin + count - 1, dim_,
                strip);
      product(1, padded_columns(here), dim_, query_row(r), dim_, 1, strip, kStripRows, scores_ + j, kStripRows,
              Sums::kReplace);
    }
    return block_score(scores_, count);
  }

  /// Scores all candidates of the `count` rows ids, ascending, and leaves the best in their top().
  HWY_ATTR void select_rows(const std::int32_t* ids, std::int64_t count) {
    if (count == 0) return;
    const FloatTag df;
    const IntTag di;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
    for (std::int64_t i = 0; i < count; i += kStripRows) {
      pack_rows(ids + i, std::min(kStripRows, count - i), packed_ + i * dim_);
    }
    for (std::int64_t i = 0; i < count; ++i) start_top(ids[i], choices_.slots());
    std::fill(least_, least_ + (count + kStripRows - 1) / kStripRows * kStripRows, INT32_MIN);
    std::int64_t first = 0;  // first strip with a row that may choose the block
    for (std::int64_t b = choices_.begin(); b < limit(ids[count - 1]); ++b) {
      while (limit(ids[std::min(count, first + kStripRows) - 1]) <= b) first += kStripRows;
      const std::int64_t key_count = load_block(b);
      for (std::int64_t i0 = first; i0 < count; i0 += kStripRows) {
        const std::int64_t here = std::min(kStripRows, count - i0);
        alignas(64) float scores[kStripRows];
        score_strip(ids + i0, here, packed_ + i0 * dim_, b, key_count, scores);
        for (std::int64_t i = 0; i < here; i += lanes) {
          const auto keys = order_keys(hn::Load(df, scores + i));
          const auto pass = hn::Not(hn::Lt(keys, hn::LoadU(di, least_ + i0 + i)));
          for_each_lane(hn::RebindMask(df, pass), [&](std::int64_t lane) HWY_ATTR {
            const std::int64_t at = i0 + i + lane;
            if (at >= count || b >= limit(ids[at])) return;
            RowTopk& row = top(ids[at]);
            row.offer(static_cast<std::int32_t>(b), scores[i + lane]);
            least_[at] = row.least_key();
          });
        }
      }
    }
  }

  /// Writes row r: its forced blocks and `count` chosen ones.
  void write_row(std::int64_t r, const std::int32_t* chosen, std::int64_t count) const {
    const std::int64_t visible = choices_.visible(query_of(r));
    write_selection(block_row(blocks_, r % groups_, choices_.sequence().query_begin + query_of(r)), params_.topk,
                    visible, choices_.forced_of(visible), chosen, count);
  }
  void write_top(std::int64_t r) { write_row(r, top(r).ids(), top(r).count()); }

 private:
  const SelectBlocksParams& params_;
  Choices choices_;
  QueryChunk chunk_;
  const TensorView& blocks_;
  core::KeyRows key_rows_;
  std::int64_t groups_;
  std::int64_t dim_;
  std::int64_t rows_;
  float* queries_;
  float* packed_;
  float* keys_;
  float* scores_;
  std::int32_t* best_;
  RowTopk* tops_;
  std::int32_t* limits_;
  std::int32_t* least_;
  std::int32_t* row_ids_;
};

/// One task: the rows of a chunk, every score in float.
inline HWY_ATTR void select_chunk(const SelectBlocksParams& params, const SelectionLayout& layout,
                                  const QueryChunk& chunk, float* scratch, const TensorView& blocks) {
  SelectionChunk selection(params, layout, chunk, scratch, blocks);
  std::int64_t count = 0;
  for (std::int64_t r = 0; r < selection.rows(); ++r) {
    if (selection.limit(r) > 0) selection.row_ids()[count++] = static_cast<std::int32_t>(r);
  }
  selection.select_rows(selection.row_ids(), count);
  for (std::int64_t r = 0; r < selection.rows(); ++r) selection.write_top(r);
}

/// One task of a sequence with few rows: out[r * out_stride + b - begin] = score of row r and block b, for b in [first,
/// last). begin is choices.begin().
inline HWY_ATTR void score_span(const SelectBlocksParams& params, const SpanLayout& layout, std::int64_t sequence_index,
                                std::int64_t first, std::int64_t last, float* scratch, float* out,
                                std::int64_t out_stride) {
  const core::Sequence sequence = core::get_sequence(params.batch, sequence_index);
  const Choices choices(params, sequence);
  const std::int64_t groups = params.q_idx.size(1);
  const std::int64_t dim = params.q_idx.size(2);
  const std::int64_t rows = sequence.queries * groups;
  const std::int64_t stride = padded_stride(params.block_size);
  float* queries = scratch + layout.queries;
  float* keys = scratch + layout.keys;
  float* scores = scratch + layout.scores;
  const core::KeyRows key_rows(params.k_idx, params.batch);
  load_query_rows(params.q_idx, sequence.query_begin, sequence.queries, 0, groups, queries);
  const std::int64_t last_position = choices.position(sequence.queries - 1);
  for (std::int64_t b = first; b < last; ++b) {
    const std::int64_t begin = b * params.block_size;
    const std::int64_t count = std::min(params.block_size, last_position + 1 - begin);
    // A strip of keys stays in the L1 cache from its turning to its last row.
    for (std::int64_t j = 0; j < count; j += kStripRows) {
      const std::int64_t here = std::min(kStripRows, count - j);
      pack_keys(key_rows, params.k_idx.dtype, sequence.index, begin + j, here, last_position, dim, keys);
      product(rows, padded_columns(here), dim, queries, dim, 1, keys, kStripRows, scores + j, stride, Sums::kReplace);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t visible = std::min(count, choices.position(r / groups) + 1 - begin);
      out[r * out_stride + b - choices.begin()] = visible > 0 ? block_score(scores + r * stride, visible) : 0.0f;
    }
  }
}

/// Chooses for row r of a sequence with few rows, whose block scores are scores[b - choices.begin()], and writes it.
/// `best` is int32 [2, topk].
inline HWY_ATTR void select_scored_row(const SelectBlocksParams& params, std::int64_t sequence_index, std::int64_t r,
                                       const float* scores, std::int32_t* best, const TensorView& blocks) {
  const core::Sequence sequence = core::get_sequence(params.batch, sequence_index);
  const Choices choices(params, sequence);
  const std::int64_t groups = params.q_idx.size(1);
  const std::int64_t i = r / groups;
  RowTopk top(best, best + params.topk, choices.slots());
  if (choices.end(i) > choices.begin()) {
    offer_row(top, static_cast<std::int32_t>(choices.begin()), scores, choices.end(i) - choices.begin());
  }
  write_selection(block_row(blocks, r % groups, sequence.query_begin + i), params.topk, choices.visible(i),
                  choices.forced_of(choices.visible(i)), top.ids(), top.count());
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_SELECT_BLOCKS_INL_H_
