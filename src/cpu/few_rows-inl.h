// SPDX-License-Identifier: Apache-2.0
// Screened selection of sequences with few rows (decoding, verification of drafts): a pass of bf16 products that reads
// each key once at the speed of memory, an error bound a row and block, and exact scores of the blocks that the bounds
// leave in doubt, next to none. Keys and queries are numbers of bf16 (float8 keys are), so that only the order of the
// sums differs. The selection is that of score_span, bit for bit (docs/select-blocks.md). Tested in
// tests/unit/screen_test.cc.
#if defined(MSA_CPU_FEW_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_FEW_ROWS_INL_H_
#undef MSA_CPU_FEW_ROWS_INL_H_
#else
#define MSA_CPU_FEW_ROWS_INL_H_
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#include "src/core/float_convert.h"
#include "src/cpu/amx_tiles.h"
#include "src/cpu/few_rows.h"
#include "src/cpu/screen-inl.h"
#include "src/cpu/strip-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// What a row's bounds are in units of a block's largest |element|, infinite when the row cannot be bounded. Two sums
/// of n exact products differ by at most 2 gamma_n |q| |k|, and |k| <= sqrt(n) max|k|; 64 u more cover the roundings of
/// the bound itself and what underflows.
inline HWY_ATTR float row_weight(const float* HWY_RESTRICT query, std::int64_t dim) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const float largest = std::bit_cast<float>(largest_magnitude(query, dim));
  if (!can_screen(largest)) return kInfinity;
  auto square = hn::Zero(df);
  for (std::int64_t d = 0; d < dim; d += lanes) {
    const auto x = hn::LoadU(df, query + d);
    square = hn::MulAdd(x, x, square);
  }
  const float norm = norm_bound(hn::GetLane(hn::SumOfLanes(df, square)), largest);
  const auto n = static_cast<float>(dim);
  return norm * std::sqrt(n) * (2 * (n + 64) * 0x1p-24f) * (1 + 0x1p-8f);
}

/// The rows of a sequence as bf16_block_max reads them, zeros for those that cannot be bounded and behind the last.
inline HWY_ATTR void pack_few_rows(const float* HWY_RESTRICT queries, std::int64_t rows, std::int64_t dim,
                                   std::int64_t screen_dim, std::uint16_t* HWY_RESTRICT out) {
  const std::int64_t padded = (rows + kBf16GroupRows - 1) / kBf16GroupRows * kBf16GroupRows;
  std::fill(out, out + padded * screen_dim, std::uint16_t{0});
  for (std::int64_t r = 0; r < rows; ++r) {
    if (row_weight(queries + r * dim, dim) == kInfinity) continue;
    std::uint16_t* to = out + bf16_row_offset(r, screen_dim);
    for (std::int64_t d = 0; d < dim; ++d) to[d / 2 * 32 + d % 2] = core::float_to_bf16(queries[r * dim + d]);
  }
}

/// The largest of `count` bf16 numbers without their signs; count a multiple of 16.
inline HWY_ATTR std::uint16_t largest_bf16(const std::uint16_t* HWY_RESTRICT numbers, std::int64_t count) {
  const hn::ScalableTag<std::uint16_t> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto magnitude = hn::Set(d, 0x7fff);
  auto a = hn::Zero(d);
  auto b = a;
  std::int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    a = hn::Max(a, hn::And(hn::LoadU(d, numbers + i), magnitude));
    b = hn::Max(b, hn::And(hn::LoadU(d, numbers + i + lanes), magnitude));
  }
  const hn::CappedTag<std::uint16_t, 16> half;
  auto rest = hn::Zero(half);
  for (; i < count; i += static_cast<std::int64_t>(hn::Lanes(half))) {
    rest = hn::Max(rest, hn::And(hn::LoadU(half, numbers + i), hn::Set(half, 0x7fff)));
  }
  HWY_ALIGN std::uint16_t all[hn::MaxLanes(d)];
  HWY_ALIGN std::uint16_t few[hn::MaxLanes(half)];
  hn::Store(hn::Max(a, b), d, all);
  hn::Store(rest, half, few);
  return std::max(*std::max_element(all, all + lanes), *std::max_element(few, few + hn::Lanes(half)));
}

/// Widens `count` float8 numbers, a multiple of 16, to bf16, and returns the largest of them without their signs. What
/// it writes for NaN is no number it stands for: the caller sees that from the result.
inline HWY_ATTR std::uint8_t widen_f8(const std::byte* HWY_RESTRICT from, std::int64_t count,
                                      std::uint16_t* HWY_RESTRICT to) {
#if HWY_TARGET == HWY_AVX3
  constexpr std::int64_t kAhead = 2048;      // bytes; hardware prefetchers stop at the end of every 4 KiB
  __m512i largest = _mm512_setzero_si512();  // of the bytes times two: without their signs
  for (std::int64_t d = 0; d < count; d += 64) {
    const auto here = static_cast<std::uint64_t>(std::min<std::int64_t>(64, count - d));
    const __mmask64 mask = ~std::uint64_t{0} >> (64 - here);
    const __m512i bytes = _mm512_maskz_loadu_epi8(mask, from + d);
    hwy::Prefetch(from + d + kAhead);
    largest = _mm512_max_epu8(largest, _mm512_add_epi8(bytes, bytes));
    for (int half = 0; half < 2; ++half) {
      const auto some = static_cast<__mmask32>(mask >> 32 * half);
      const __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(some, from + d + 32 * half));
      _mm512_mask_storeu_epi16(to + d + 32 * half, some, f8_to_bf16(_mm512_slli_epi16(wide, 8), wide));
    }
  }
  alignas(64) std::uint8_t all[64];
  _mm512_store_si512(all, largest);
  return *std::max_element(all, all + 64) / 2;
#else
  std::uint8_t largest = 0;
  for (std::int64_t d = 0; d < count; ++d) {
    const auto bits = static_cast<std::uint8_t>(from[d]);
    largest = std::max<std::uint8_t>(largest, bits & 0x7f);
    to[d] = core::float_to_bf16(core::f8_to_float(bits));
  }
  return largest;
#endif
}

/// The keys of a whole block as bf16, and their largest magnitude: infinite when they cannot be bounded.
struct ScreenedKeys {
  const std::uint16_t* first = nullptr;
  std::int64_t stride = 0;
  float magnitude = kInfinity;
};
inline HWY_ATTR ScreenedKeys load_screened(const SelectBlocksParams& params, const FewRowsScreen& screen,
                                           const core::KeyRows& key_rows, std::int64_t sequence, std::int64_t begin,
                                           std::uint16_t* HWY_RESTRICT copy) {
  const std::int64_t dim = params.k_idx.size(params.k_idx.rank - 1);
  const std::byte* row = key_rows.row(sequence, begin);  // a block lies in one page
  const std::int64_t stride = key_rows.token_stride_bytes();
  ScreenedKeys keys{copy, screen.dim, 0};
  std::uint16_t largest = 0;
  if (key_rows.dtype() == DType::kFloat8E4M3) {
    std::uint8_t byte = 0;
    if (stride == dim && dim == screen.dim) {
      byte = widen_f8(row, params.block_size * dim, copy);
    } else {
      for (std::int64_t j = 0; j < params.block_size; ++j) {
        byte = std::max(byte, widen_f8(row + j * stride, dim, copy + j * screen.dim));
        std::fill(copy + j * screen.dim + dim, copy + (j + 1) * screen.dim, std::uint16_t{0});
      }
    }
    largest = core::float_to_bf16(core::f8_to_float(byte));
  } else if (dim == screen.dim) {
    keys = {reinterpret_cast<const std::uint16_t*>(row), stride / 2, 0};
    if (stride == 2 * dim) {
      largest = largest_bf16(keys.first, params.block_size * dim);
    } else {
      for (std::int64_t j = 0; j < params.block_size; ++j) {
        largest = std::max(largest, largest_bf16(keys.first + j * keys.stride, dim));
      }
    }
  } else {
    for (std::int64_t j = 0; j < params.block_size; ++j) {
      std::uint16_t* to = copy + j * screen.dim;
      std::memcpy(to, row + j * stride, static_cast<std::size_t>(dim) * sizeof *to);
      std::fill(to + dim, to + screen.dim, std::uint16_t{0});
      largest = std::max(largest, largest_bf16(to, dim));
    }
  }
  const float magnitude = core::bf16_to_float(largest);
  keys.magnitude = can_screen(magnitude) ? magnitude : kInfinity;
  return keys;
}

/// As score_span, of what is cheap: blocks below `whole_end`, which all rows see whole, get a score of bf16 products
/// and magnitudes[b - begin], their largest |element|, infinite when they cannot be bounded; the others their exact
/// score and kExactScore.
inline HWY_ATTR void screen_span(const SelectBlocksParams& params, const SpanLayout& layout,
                                 const FewRowsScreen& screen, std::int64_t sequence_index, std::int64_t first,
                                 std::int64_t last, std::int64_t whole_end, float* scratch, float* out,
                                 std::int64_t out_stride, float* magnitudes) {
  const core::Sequence sequence = core::get_sequence(params.batch, sequence_index);
  const Choices choices(params, sequence);
  const std::int64_t groups = params.q_idx.size(1);
  const std::int64_t dim = params.q_idx.size(2);
  const std::int64_t rows = sequence.queries * groups;
  const core::KeyRows key_rows(params.k_idx, params.batch);
  auto* packed = reinterpret_cast<std::uint16_t*>(scratch + layout.row_keys);
  auto* copy = reinterpret_cast<std::uint16_t*>(scratch + layout.block_keys);
  float* queries = scratch + layout.queries;
  alignas(64) float largest[kFewRows];
#if HWY_TARGET == HWY_AVX3
  std::optional<AmxTiles> tiles;
  if (screen.needs_amx_tiles) tiles.emplace();
#endif
  load_query_rows(params.q_idx, sequence.query_begin, sequence.queries, 0, groups, queries);
  pack_few_rows(queries, rows, dim, screen.dim, packed);
  for (std::int64_t b = first; b < last; ++b) {
    const std::int64_t at = b - choices.begin();
    if (b >= whole_end) {
      score_span(params, layout, sequence_index, b, b + 1, scratch, out, out_stride);
      magnitudes[at] = kExactScore;
      continue;
    }
    const std::int64_t begin = b * params.block_size;
    const ScreenedKeys keys = load_screened(params, screen, key_rows, sequence_index, begin, copy);
    magnitudes[at] = keys.magnitude;
    if (keys.magnitude == kInfinity) {
      for (std::int64_t r = 0; r < rows; ++r) out[r * out_stride + at] = 0;
      continue;
    }
    screen.block_max({.keys = keys.first, .stride = keys.stride, .key_count = params.block_size, .dim = screen.dim},
                     packed, (rows + kBf16GroupRows - 1) / kBf16GroupRows, nullptr, {.first = largest});
    for (std::int64_t r = 0; r < rows; ++r) out[r * out_stride + at] = largest[r];
  }
}

/// The first `limit` candidates of one row: their scores, screened or exact, and what bounds them.
class BoundedRow {
 public:
  HWY_ATTR BoundedRow(const SelectBlocksParams& params, const core::Sequence& sequence, const Choices& choices,
                      std::int64_t row, std::int64_t limit, const float* scores, const float* magnitudes,
                      std::int32_t* best)
      : scores_(scores),
        magnitudes_(magnitudes),
        begin_(choices.begin()),
        count_(std::clamp<std::int64_t>(choices.end(row / params.q_idx.size(1)) - choices.begin(), 0, limit)),
        slots_(choices.slots()),
        best_(best) {
    alignas(64) float query[kMaxHeadDim];
    const std::int64_t groups = params.q_idx.size(1);
    load_query_rows(params.q_idx, sequence.query_begin + row / groups, 1, row % groups, 1, query);
    weight_ = row_weight(query, params.q_idx.size(2));
    find_thresholds();
  }

  /// Calls body(block) for the blocks that bounds neither choose nor rule out and whose scores are not exact.
  template <class Body>
  HWY_ATTR void for_each_in_doubt(const Body& body) const {
    const FloatTag df;
    for_each_vector([&](std::int64_t i, FloatVec magnitude, IntVec lower, IntVec upper) HWY_ATTR {
      const auto open = hn::And(may_be_in(upper), hn::Not(hn::RebindMask(df, is_in(lower))));
      const auto inexact = hn::Not(hn::Lt(magnitude, hn::Zero(df)));
      for_each_lane(hn::And(open, inexact), [&](std::int64_t lane) HWY_ATTR {
        if (i + lane < count_) body(begin_ + i + lane);
      });
    });
  }

  /// Chooses, all blocks in doubt having exact scores by now, into chosen[slots]; returns how many.
  HWY_ATTR std::int64_t choose(std::int32_t* chosen) const {
    std::int64_t sure = 0;
    for_each_vector([&](std::int64_t i, FloatVec, IntVec lower, IntVec) HWY_ATTR {
      for_each_lane(is_in(lower), [&](std::int64_t lane) HWY_ATTR {
        if (i + lane < count_) chosen[sure++] = static_cast<std::int32_t>(begin_ + i + lane);
      });
    });
    RowTopk top(best_, best_ + slots_ + 1, slots_ - sure);
    for_each_vector([&](std::int64_t i, FloatVec, IntVec lower, IntVec upper) HWY_ATTR {
      for_each_lane(hn::And(may_be_in(upper), hn::Not(is_in(lower))), [&](std::int64_t lane) HWY_ATTR {
        if (i + lane < count_) top.offer(static_cast<std::int32_t>(begin_ + i + lane), scores_[i + lane]);
      });
    });
    std::copy(top.ids(), top.ids() + top.count(), chosen + sure);
    return sure + top.count();
  }

 private:
  using FloatMask = hn::Mask<FloatTag>;

  FloatMask is_in(IntVec lower) const { return hn::RebindMask(FloatTag(), hn::Gt(lower, hn::Set(IntTag(), in_))); }
  FloatMask may_be_in(IntVec upper) const {
    return hn::RebindMask(FloatTag(), hn::Not(hn::Lt(upper, hn::Set(IntTag(), out_))));
  }

  struct Bounds {
    FloatVec lower, upper;
  };
  HWY_ATTR Bounds bounds(FloatVec score, FloatVec magnitude) const {
    const FloatTag df;
    const auto error = hn::Mul(hn::Set(df, weight_), magnitude);
    const auto is_exact = hn::Lt(magnitude, hn::Zero(df));
    const auto is_bounded = hn::Lt(error, hn::Set(df, kInfinity));          // false for NaN: 0 times infinity
    const auto nan = hn::Set(df, std::numeric_limits<float>::quiet_NaN());  // the least score that there is
    const auto lower = hn::IfThenElse(is_bounded, hn::Sub(score, error), nan);
    const auto upper = hn::IfThenElse(is_bounded, hn::Add(score, error), hn::Set(df, kInfinity));
    return {hn::IfThenElse(is_exact, score, lower), hn::IfThenElse(is_exact, score, upper)};
  }

  // body(i, magnitudes, order keys of the lower bounds, of the upper bounds) for vectors of candidates from i on. The
  // arrays are padded to whole vectors.
  template <class Body>
  HWY_ATTR void for_each_vector(const Body& body) const {
    const FloatTag df;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
    for (std::int64_t i = 0; i < count_; i += lanes) {
      const auto magnitude = hn::LoadU(df, magnitudes_ + i);
      const Bounds b = bounds(hn::LoadU(df, scores_ + i), magnitude);
      body(i, magnitude, order_keys(b.lower), order_keys(b.upper));
    }
  }

  // With k slots: a block is out when its upper bound is below the k-th highest lower bound, and in when its lower
  // bound is above the (k+1)-th highest upper bound.
  HWY_ATTR void find_thresholds() {
    const FloatTag df;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
    RowTopk lowest(best_, best_ + slots_ + 1, slots_);
    RowTopk highest(best_ + 2 * (slots_ + 1), best_ + 3 * (slots_ + 1), slots_ + 1);
    constexpr std::int64_t kAtOnce = 64;
    alignas(64) float lower[kAtOnce];
    alignas(64) float upper[kAtOnce];
    for (std::int64_t i0 = 0; i0 < count_; i0 += kAtOnce) {
      const std::int64_t here = std::min(kAtOnce, count_ - i0);
      for (std::int64_t i = 0; i < here; i += lanes) {
        const Bounds b = bounds(hn::LoadU(df, scores_ + i0 + i), hn::LoadU(df, magnitudes_ + i0 + i));
        hn::Store(b.lower, df, lower + i);
        hn::Store(b.upper, df, upper + i);
      }
      offer_row(lowest, static_cast<std::int32_t>(i0), lower, here);
      offer_row(highest, static_cast<std::int32_t>(i0), upper, here);
    }
    if (count_ <= slots_) return;  // all in doubt: the slots take them all
    out_ = lowest.least_key() - 1;
    in_ = highest.least_key() - 1;
  }

  const float* scores_;
  const float* magnitudes_;
  std::int64_t begin_;
  std::int64_t count_;
  std::int64_t slots_;
  std::int32_t* best_;
  float weight_ = 0;
  std::int32_t in_ = INT32_MAX;
  std::int32_t out_ = INT32_MIN;
};

/// Marks those of the first `limit` candidates that row r of a sequence leaves in doubt: doubtful[b - begin] = 1. Other
/// rows may mark the same ones at the same time. `best` is int32 [4, topk + 1].
inline HWY_ATTR void mark_doubtful(const SelectBlocksParams& params, std::int64_t sequence_index, std::int64_t r,
                                   std::int64_t limit, const float* scores, const float* magnitudes, std::int32_t* best,
                                   std::uint8_t* doubtful) {
  const core::Sequence sequence = core::get_sequence(params.batch, sequence_index);
  const Choices choices(params, sequence);
  const BoundedRow row(params, sequence, choices, r, limit, scores, magnitudes, best);
  row.for_each_in_doubt([&](std::int64_t block) {
    std::atomic_ref<std::uint8_t>(doubtful[block - choices.begin()]).store(1, std::memory_order_relaxed);
  });
}

/// As select_scored_row, once the blocks in doubt have exact scores.
inline HWY_ATTR void select_screened_row(const SelectBlocksParams& params, std::int64_t sequence_index, std::int64_t r,
                                         const float* scores, const float* magnitudes, std::int32_t* best,
                                         const TensorView& blocks) {
  const core::Sequence sequence = core::get_sequence(params.batch, sequence_index);
  const Choices choices(params, sequence);
  const std::int64_t groups = params.q_idx.size(1);
  const std::int64_t i = r / groups;
  const BoundedRow row(params, sequence, choices, r, INT64_MAX, scores, magnitudes, best);
  std::int32_t chosen[kMaxTopk];
  const std::int64_t count = row.choose(chosen);
  write_selection(block_row(blocks, r % groups, sequence.query_begin + i), params.topk, choices.visible(i),
                  choices.forced_of(choices.visible(i)), chosen, count);
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_FEW_ROWS_INL_H_
