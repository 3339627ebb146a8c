// SPDX-License-Identifier: Apache-2.0
// Screened selection (docs/select-blocks.md): a chunk's rows against the keys in int8 or bf16, an error bound a row and
// block, and exact scores only for the blocks that the bounds leave in doubt. The selection is that of select_chunk,
// bit for bit: the bounds hold for what its arithmetic rounds to, and the exact scores are its own. Tested in
// tests/unit/screen_test.cc.
#if defined(MSA_CPU_SCREEN_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_SCREEN_INL_H_
#undef MSA_CPU_SCREEN_INL_H_
#else
#define MSA_CPU_SCREEN_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>

#include "src/cpu/amx_tiles.h"
#include "src/cpu/screen.h"
#include "src/cpu/select_blocks-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

// Keys and queries are bounded when their largest element is 0 or in this range: products of two neither overflow nor
// lose bits to underflow that the slack below does not cover.
inline constexpr float kLeastScreened = 0x1p-40f;
inline constexpr float kMostScreened = 0x1p40f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Whether rows of this largest magnitude can be bounded; false for NaN.
inline bool can_screen(float largest) {
  return largest == 0 || (largest >= kLeastScreened && largest <= kMostScreened);
}

/// The largest |element|, NaN above infinity, as the bits of a float.
inline HWY_ATTR std::int32_t largest_magnitude(const float* HWY_RESTRICT values, std::int64_t count) {
  const FloatTag df;
  const IntTag di;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto magnitude = hn::Set(di, 0x7fffffff);
  auto a = hn::Zero(di);
  auto b = a;
  std::int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    a = hn::Max(a, hn::And(hn::BitCast(di, hn::LoadU(df, values + i)), magnitude));
    b = hn::Max(b, hn::And(hn::BitCast(di, hn::LoadU(df, values + i + lanes)), magnitude));
  }
  for (; i < count; i += lanes) a = hn::Max(a, hn::And(hn::BitCast(di, hn::LoadU(df, values + i)), magnitude));
  return hn::GetLane(hn::MaxOfLanes(di, hn::Max(a, b)));
}

/// largest[d] = max(largest[d], |element d| of the rows), what is not finite left out.
inline HWY_ATTR void raise_channels(const float* HWY_RESTRICT rows, std::int64_t count, std::int64_t dim,
                                    float* HWY_RESTRICT largest) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto most = hn::Set(df, std::numeric_limits<float>::max());
  for (std::int64_t d = 0; d < dim; d += lanes) {
    auto best = hn::LoadU(df, largest + d);
    for (std::int64_t j = 0; j < count; ++j) {
      const auto value = hn::Abs(hn::LoadU(df, rows + j * dim + d));
      best = hn::Max(best, hn::IfThenElseZero(hn::Le(value, most), value));  // false for NaN
    }
    hn::StoreU(best, df, largest + d);
  }
}

/// Raises by the keys of a block, or by the queries [block, block + 1) of a sequence, all groups. `rows` has room for
/// them.
inline HWY_ATTR void measure_keys(const SelectBlocksParams& params, std::int64_t sequence, std::int64_t block,
                                  float* rows, float* largest) {
  const std::int64_t dim = params.q_idx.size(2);
  load_value_rows(core::KeyRows(params.k_idx, params.batch), params.k_idx.dtype, sequence, 0, block * params.block_size,
                  params.block_size, dim, rows, dim);
  raise_channels(rows, params.block_size, dim, largest);
}
inline HWY_ATTR void measure_query(const SelectBlocksParams& params, std::int64_t row, float* largest) {
  alignas(64) float query[kMaxHeadDim];
  for (std::int64_t g = 0; g < params.q_idx.size(1); ++g) {
    load_query_rows(params.q_idx, row, 1, g, 1, query);
    raise_channels(query, 1, params.q_idx.size(2), largest);
  }
}

/// rows[j, d] *= factor[d], in place; nothing where factor is null.
inline HWY_ATTR void scale_channels(float* HWY_RESTRICT rows, std::int64_t count, std::int64_t dim,
                                    const float* HWY_RESTRICT factor) {
  if (factor == nullptr) return;
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  for (std::int64_t j = 0; j < count; ++j) {
    for (std::int64_t d = 0; d < dim; d += lanes) {
      float* at = rows + j * dim + d;
      hn::StoreU(hn::Mul(hn::LoadU(df, at), hn::LoadU(df, factor + d)), df, at);
    }
  }
}

/// Squared norms of a row x = scale * n + e, n integers that are handed to store(n, d), a vector from dimension d on.
struct SquaredNorms {
  float whole = 0;
  float integers = 0;
  float error = 0;
};
template <class Store>
HWY_INLINE HWY_ATTR SquaredNorms quantise(const float* HWY_RESTRICT x, std::int64_t dim, float scale, float inverse,
                                          const Store& store) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto s = hn::Set(df, scale);
  const auto inv = hn::Set(df, inverse);
  auto whole = hn::Zero(df);
  auto integers = whole;
  auto error = whole;
  for (std::int64_t d = 0; d < dim; d += lanes) {
    const auto v = hn::LoadU(df, x + d);
    const auto n = hn::NearestInt(hn::Mul(v, inv));
    const auto f = hn::ConvertTo(df, n);
    const auto e = hn::NegMulAdd(f, s, v);
    whole = hn::MulAdd(v, v, whole);
    integers = hn::MulAdd(f, f, integers);
    error = hn::MulAdd(e, e, error);
    store(n, d);
  }
  return {hn::GetLane(hn::SumOfLanes(df, whole)), hn::GetLane(hn::SumOfLanes(df, integers)),
          hn::GetLane(hn::SumOfLanes(df, error))};
}

// An upper bound of a norm from its computed square: 2^-16 covers the roundings of the sum (at most 256 + 2 of 2^-24)
// and of the root; 2^-19 of the largest element those of e, and squares that underflowed.
inline float norm_bound(float square, float largest) { return std::sqrt(square) * (1 + 0x1p-16f) + largest * 0x1p-19f; }

/// Quantises the `count` keys of a block, rows of `dim` floats, to out[count, screen_dim], k8 + 128; bytes behind dim
/// are 128, a 0.
inline HWY_ATTR BlockBounds quantise_block(const float* HWY_RESTRICT keys, std::int64_t count, std::int64_t dim,
                                           std::int64_t screen_dim, std::uint8_t* HWY_RESTRICT out) {
  const float largest = std::bit_cast<float>(largest_magnitude(keys, count * dim));
  BlockBounds bounds;
  if (!can_screen(largest)) {
    std::memset(out, 128, static_cast<std::size_t>(count * screen_dim));
    bounds.norm = kInfinity;
    return bounds;
  }
  const hn::Rebind<std::uint8_t, FloatTag> d8;
  const IntTag di;
  const auto bias = hn::Set(di, 128);
  bounds.scale = largest / 127;
  const float inverse = largest == 0 ? 0 : 127 / largest;
  float whole = 0;
  float error = 0;
  for (std::int64_t j = 0; j < count; ++j) {
    std::uint8_t* to = out + j * screen_dim;
    const SquaredNorms norms = quantise(keys + j * dim, dim, bounds.scale, inverse,
                                        [&](IntVec n, std::int64_t d)
                                            HWY_ATTR { hn::StoreU(hn::DemoteTo(d8, hn::Add(n, bias)), d8, to + d); });
    std::memset(to + dim, 128, static_cast<std::size_t>(screen_dim - dim));
    whole = std::max(whole, norms.whole);
    error = std::max(error, norms.error);
  }
  bounds.norm = norm_bound(whole, largest);
  bounds.error = norm_bound(error, largest);
  return bounds;
}

/// As quantise, of a row rounded to bf16, out[screen_dim]; zeros behind dim.
inline HWY_ATTR SquaredNorms round_row(const float* HWY_RESTRICT x, std::int64_t dim, std::int64_t screen_dim,
                                       std::uint16_t* HWY_RESTRICT out) {
  const FloatTag df;
  const hn::RebindToUnsigned<FloatTag> du;
  const hn::Rebind<std::uint16_t, FloatTag> d16;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  store_row(x, dim, DType::kBFloat16, reinterpret_cast<std::byte*>(out));
  std::fill(out + dim, out + screen_dim, std::uint16_t{0});
  auto whole = hn::Zero(df);
  auto rounded = whole;
  auto error = whole;
  for (std::int64_t d = 0; d < dim; d += lanes) {
    const auto v = hn::LoadU(df, x + d);
    const auto f = hn::BitCast(df, hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(d16, out + d))));
    const auto e = hn::Sub(v, f);
    whole = hn::MulAdd(v, v, whole);
    rounded = hn::MulAdd(f, f, rounded);
    error = hn::MulAdd(e, e, error);
  }
  return {hn::GetLane(hn::SumOfLanes(df, whole)), hn::GetLane(hn::SumOfLanes(df, rounded)),
          hn::GetLane(hn::SumOfLanes(df, error))};
}

/// As quantise_block, to bf16.
inline HWY_ATTR BlockBounds round_block(const float* HWY_RESTRICT keys, std::int64_t count, std::int64_t dim,
                                        std::int64_t screen_dim, std::uint16_t* HWY_RESTRICT out) {
  const float largest = std::bit_cast<float>(largest_magnitude(keys, count * dim));
  BlockBounds bounds;
  bounds.scale = 1;
  if (!can_screen(largest)) {
    bounds.norm = kInfinity;
    return bounds;
  }
  float whole = 0;
  float error = 0;
  for (std::int64_t j = 0; j < count; ++j) {
    const SquaredNorms norms = round_row(keys + j * dim, dim, screen_dim, out + j * screen_dim);
    whole = std::max(whole, norms.whole);
    error = std::max(error, norms.error);
  }
  bounds.norm = norm_bound(whole, largest);
  bounds.error = norm_bound(error, largest);
  return bounds;
}

/// Bounds of keys that are bf16 already, rows of `stride` elements; dim is a multiple of 32.
inline HWY_ATTR BlockBounds bound_block(const std::uint16_t* keys, std::int64_t stride, std::int64_t count,
                                        std::int64_t dim) {
  const FloatTag df;
  const hn::RebindToUnsigned<FloatTag> du;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto odd = hn::Set(du, 0xffff0000u);
  auto largest = hn::Zero(df);
  auto not_finite = hn::Zero(du);
  float square = 0;
  const auto exponent = hn::Set(du, 0x7f800000u);
  for (std::int64_t j = 0; j < count; ++j) {
    auto sum0 = hn::Zero(df);
    auto sum1 = sum0;
    for (std::int64_t d = 0; d < dim; d += 2 * lanes) {  // a word holds two
      const auto words = hn::LoadU(du, reinterpret_cast<const std::uint32_t*>(keys + j * stride + d));
      const auto a = hn::BitCast(df, hn::ShiftLeft<16>(words));
      const auto b = hn::BitCast(df, hn::And(words, odd));
      sum0 = hn::MulAdd(a, a, sum0);
      sum1 = hn::MulAdd(b, b, sum1);
      largest = hn::Max(largest, hn::Max(hn::Abs(a), hn::Abs(b)));
    }
    // A square that is not finite makes its sum so.
    const auto sum = hn::Add(sum0, sum1);
    not_finite = hn::Or(not_finite, hn::VecFromMask(du, hn::Eq(hn::And(hn::BitCast(du, sum), exponent), exponent)));
    square = std::max(square, hn::GetLane(hn::SumOfLanes(df, sum)));
  }
  BlockBounds bounds;
  bounds.scale = 1;
  const float most = hn::GetLane(hn::MaxOfLanes(df, largest));
  const bool is_finite = hn::AllFalse(du, hn::Ne(not_finite, hn::Zero(du)));
  bounds.norm = is_finite && can_screen(most) ? norm_bound(square, most) : kInfinity;
  return bounds;
}

/// Loads `count` keys of a block from position `begin` on as they are screened: `copy` has room for them, unless they
/// are read in place, and `keys` for a block of floats.
inline HWY_ATTR BlockBounds screen_keys(const SelectBlocksParams& params, const ScreenSetup& setup,
                                        std::int64_t sequence, std::int64_t begin, std::int64_t count, float* keys,
                                        std::byte* copy) {
  const std::int64_t dim = params.q_idx.size(2);
  const core::KeyRows key_rows(params.k_idx, params.batch);
  if (setup.is_in_place) {
    return bound_block(reinterpret_cast<const std::uint16_t*>(key_rows.row(sequence, begin)), dim, count, dim);
  }
  load_value_rows(key_rows, params.k_idx.dtype, sequence, 0, begin, count, dim, keys, dim);
  if (setup.dot.is_bf16()) return round_block(keys, count, dim, setup.dim, reinterpret_cast<std::uint16_t*>(copy));
  scale_channels(keys, count, dim, setup.balance.of_keys());
  return quantise_block(keys, count, dim, setup.dim, reinterpret_cast<std::uint8_t*>(copy));
}

/// One task of the pass before: blocks [first, last) of a sequence for all tasks. `keys` has room for a block of
/// floats.
inline HWY_ATTR void quantise_blocks(const SelectBlocksParams& params, std::int64_t sequence, std::int64_t first,
                                     std::int64_t last, const ScreenSetup& setup, float* keys, std::byte* out,
                                     BlockBounds* bounds) {
  const std::int64_t block_bytes = setup.is_in_place ? 0 : params.block_size * setup.row_bytes();
  for (std::int64_t b = first; b < last; ++b) {
    bounds[b - first] = screen_keys(params, setup, sequence, b * params.block_size, params.block_size, keys,
                                    out + (b - first) * block_bytes);
  }
}

/// A chunk whose rows are screened.
class ScreenedChunk {
 public:
  HWY_ATTR ScreenedChunk(SelectionChunk& selection, const SelectBlocksParams& params, const SelectionLayout& layout,
                         const ScreenSetup& setup, const SharedBlocks& shared, float* scratch)
      : selection_(selection),
        params_(params),
        setup_(setup),
        key_rows_(params.k_idx, params.batch),
        block_size_(params.block_size),
        topk_(params.topk),
        slots_(selection.choices().slots()),
        capacity_(candidate_capacity(params.topk)),
        shared_(shared),
        padded_rows_(padded_columns(selection.rows())),
        row_keys_(reinterpret_cast<std::byte*>(scratch + layout.row_keys)),
        lower_(scratch + layout.lower),
        lower_stride_(padded_columns(params.topk)),
        candidates_(reinterpret_cast<Candidate*>(scratch + layout.candidates)),
        visits_(reinterpret_cast<std::uint64_t*>(scratch + layout.visits)),
        block_keys_(reinterpret_cast<std::byte*>(scratch + layout.block_keys)) {
    float* bounds = scratch + layout.row_bounds;
    const auto next = [&] {
      float* array = bounds;
      bounds += padded_rows_;
      return array;
    };
    scale_ = next();
    spread_ = next();
    slack_ = next();
    floor_ = next();
    offset_ = reinterpret_cast<std::int32_t*>(next());
    end_ = reinterpret_cast<std::int32_t*>(next());
    counts_ = reinterpret_cast<std::int32_t*>(next());
    largest_ = next();  // and those of kScreenedTogether - 1 more
    for (std::int64_t r = 0; r < padded_rows_; ++r) start_row(r);
  }

  /// Selects for all rows of the chunk and writes them.
  HWY_ATTR void run() {
    scan();
    // Two rounds. The first rescores what lies around the threshold, which is most of what can decide; with those
    // scores known, few bounds still reach the threshold, and the second rescores them all.
    rescore(collect_near());
    rescore(collect_contested());
    std::int64_t exact_rows = 0;
    for (std::int64_t r = 0; r < selection_.rows(); ++r) {
      if (is_screened(r)) {
        write_row(r);
      } else if (selection_.limit(r) > 0) {
        selection_.row_ids()[exact_rows++] = static_cast<std::int32_t>(r);
      } else {
        selection_.write_top(r);
      }
    }
    selection_.select_rows(selection_.row_ids(), exact_rows);
    for (std::int64_t i = 0; i < exact_rows; ++i) selection_.write_top(selection_.row_ids()[i]);
  }

 private:
  bool is_screened(std::int64_t r) const { return end_[r] > 0; }
  void give_up(std::int64_t r) { end_[r] = 0; }
  Candidate* list(std::int64_t r) { return candidates_ + r * capacity_; }

  HWY_ATTR void start_row(std::int64_t r) {
    scale_[r] = spread_[r] = slack_[r] = 0;
    floor_[r] = -kInfinity;
    offset_[r] = end_[r] = counts_[r] = 0;
    const bool is_row = r < selection_.rows();
    const std::int64_t dim = selection_.dim();
    alignas(64) float query[kMaxHeadDim];
    float largest = kInfinity;
    if (is_row) {
      std::copy(selection_.query_row(r), selection_.query_row(r) + dim, query);
      scale_channels(query, 1, dim, setup_.balance.of_queries());
      largest = std::bit_cast<float>(largest_magnitude(query, dim));
    }
    const bool can = can_screen(largest) && selection_.limit(r) > 0;
    if (can) {
      // Blocks that the row sees whole.
      end_[r] = static_cast<std::int32_t>(std::min(selection_.limit(r), (selection_.position_of(r) + 1) / block_size_));
      std::fill(lower_ + r * lower_stride_, lower_ + r * lower_stride_ + slots_, -kInfinity);
      std::fill(lower_ + r * lower_stride_ + slots_, lower_ + (r + 1) * lower_stride_, kInfinity);
    }
    const SquaredNorms norms =
        setup_.dot.is_bf16() ? round_query(r, query, can) : quantise_query(r, query, largest, can);
    if (!can) return;
    // Never 0, so that a block without bounds stays without them: 0 * inf is NaN.
    constexpr float kTiny = 0x1p-60f;
    spread_[r] = scale_[r] * std::sqrt(norms.integers) * (1 + 0x1p-16f) + kTiny;
    // A chain in float and, where the products are bf16, twice as much for sums of theirs.
    const auto roundings = static_cast<float>(setup_.dot.is_bf16() ? 3 * dim + 192 : dim + 64);
    slack_[r] = norm_bound(norms.error, largest) + roundings * 0x1p-24f * norm_bound(norms.whole, largest) + kTiny;
  }

  /// Packs row r as int8, or zeros where it is not screened.
  HWY_ATTR SquaredNorms quantise_query(std::int64_t r, const float* query, float largest, bool can) {
    const IntTag di;
    alignas(64) std::int32_t integers[kMaxHeadDim + 64] = {};
    SquaredNorms norms;
    if (can) {
      scale_[r] = largest / 127;
      const float inverse = largest == 0 ? 0 : 127 / largest;
      norms = quantise(query, selection_.dim(), scale_[r], inverse,
                       [&](IntVec n, std::int64_t d) HWY_ATTR { hn::StoreU(n, di, integers + d); });
    }
    std::int8_t* to = reinterpret_cast<std::int8_t*>(row_keys_) + int8_row_offset(r, setup_.dim);
    std::int32_t sum = 0;
    for (std::int64_t d = 0; d < setup_.dim; ++d) {
      to[d / 4 * 64 + d % 4] = static_cast<std::int8_t>(integers[d]);
      sum += integers[d];
    }
    offset_[r] = 128 * sum;
    return norms;
  }

  /// The same as bf16.
  HWY_ATTR SquaredNorms round_query(std::int64_t r, const float* query, bool can) {
    alignas(64) std::uint16_t rounded[kMaxHeadDim] = {};
    SquaredNorms norms;
    if (can) {
      scale_[r] = 1;
      norms = round_row(query, selection_.dim(), setup_.dim, rounded);
    }
    std::uint16_t* to = reinterpret_cast<std::uint16_t*>(row_keys_) + bf16_row_offset(r, setup_.dim);
    for (std::int64_t d = 0; d < setup_.dim; d += 2) std::memcpy(to + d * kBf16GroupRows, rounded + d, 4);
    return norms;
  }

  HWY_ATTR void scan() {
    const std::int64_t begin = selection_.choices().begin();
    const std::int64_t groups = padded_rows_ / kInt8Rows;
    std::int64_t last = 0;
    for (std::int64_t r = 0; r < selection_.rows(); ++r) last = std::max<std::int64_t>(last, end_[r]);
    std::int64_t group = 0;  // first one with a row that may choose the block
    for (std::int64_t b = begin; b < last;) {
      const auto ends = [&](std::int64_t g) {
        return *std::max_element(end_ + g * kInt8Rows, end_ + (g + 1) * kInt8Rows) <= b;
      };
      while (group < groups && ends(group)) ++group;
      if (group == groups) return;  // rows were given up
      const std::int64_t until_pruned = kPruneBlocks - (b - begin) % kPruneBlocks;
      const std::int64_t count = count_together(b, std::min(last - b, until_pruned));
      BlockBounds bounds;
      const std::byte* keys = find_block(b, bounds);
      multiply(keys, count, bounds, group, groups, b + count < last ? shared_block(b + count) : nullptr);
      for (std::int64_t i = 0; i < count; ++i) {
        if (i > 0) bounds = shared_.bounds[b + i - shared_.first];
        if (setup_.dot.is_bf16()) {
          offer<true>(b + i, bounds, group * kInt8Rows, largest_ + i * padded_rows_);
        } else {
          offer<false>(b + i, bounds, group * kInt8Rows, largest_ + i * padded_rows_);
        }
      }
      b += count;
      if ((b - begin) % kPruneBlocks == 0 || b == last) prune(b - begin);
    }
  }

  /// How many of the blocks from `first` on, at most `most`, are multiplied in one go: those that lie one behind the
  /// other and can be bounded, as long as their keys leave room in an L1 cache.
  HWY_ATTR std::int64_t count_together(std::int64_t first, std::int64_t most) const {
    if (!setup_.dot.is_bf16()) return 1;
    constexpr std::int64_t kKeyBytes = std::int64_t{1} << 15;
    const std::int64_t block_bytes = block_size_ * setup_.row_bytes();
    most = std::min({most, kScreenedTogether, kKeyBytes / block_bytes, shared_.first + shared_.count - first});
    const auto is_bounded = [&](std::int64_t b) { return shared_.bounds[b - shared_.first].norm != kInfinity; };
    if (most < 2 || !is_bounded(first)) return 1;
    const std::byte* keys = shared_block(first);
    std::int64_t count = 1;
    while (count < most && shared_block(first + count) == keys + count * block_bytes && is_bounded(first + count)) {
      ++count;
    }
    return count;
  }

  /// largest_ of the rows in groups [first, last) of 16, and of `count` blocks.
  HWY_ATTR void multiply(const std::byte* keys, std::int64_t count, const BlockBounds& bounds, std::int64_t first,
                         std::int64_t last, const std::byte* next) {
    const std::byte* rows = row_keys_ + first * kInt8Rows * setup_.row_bytes();
    float* largest = largest_ + first * kInt8Rows;
    if (!setup_.dot.is_bf16()) {
      setup_.dot.int8(reinterpret_cast<const std::uint8_t*>(keys), block_size_, setup_.dim,
                      reinterpret_cast<const std::int8_t*>(rows), last - first,
                      reinterpret_cast<std::int32_t*>(largest));
    } else if (bounds.norm == kInfinity) {  // the sums could be NaN
      std::fill(largest, largest + (last - first) * kInt8Rows, 0.0f);
    } else {
      Bf16Blocks blocks;
      blocks.keys = reinterpret_cast<const std::uint16_t*>(keys);
      blocks.stride = blocks.dim = setup_.dim;
      blocks.key_count = block_size_;
      blocks.count = count;
      setup_.dot.bf16(blocks, reinterpret_cast<const std::uint16_t*>(rows), last - first, next, largest, padded_rows_);
    }
  }

  /// The keys of a block as they are screened; null when this task has to make them.
  HWY_ATTR const std::byte* shared_block(std::int64_t block) const {
    if (setup_.is_in_place) return key_rows_.row(selection_.choices().sequence().index, block * block_size_);
    const std::int64_t i = block - shared_.first;
    return i >= 0 && i < shared_.count ? shared_.keys + i * block_size_ * setup_.row_bytes() : nullptr;
  }

  HWY_ATTR const std::byte* find_block(std::int64_t block, BlockBounds& bounds) {
    const std::byte* keys = shared_block(block);
    const std::int64_t i = block - shared_.first;
    if (i >= 0 && i < shared_.count) {
      bounds = shared_.bounds[i];
    } else {
      bounds = screen_keys(params_, setup_, selection_.choices().sequence().index, block * block_size_, block_size_,
                           selection_.key_buffer(), block_keys_);
    }
    return keys != nullptr ? keys : block_keys_;
  }

  /// Takes block b, whose products are `largest`, into the lists of the rows from `first` on whose threshold its upper
  /// bound reaches.
  template <bool kIsBf16>
  HWY_ATTR void offer(std::int64_t b, const BlockBounds& bounds, std::int64_t first, const float* largest) {
    const FloatTag df;
    const IntTag di;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
    const auto block_scale = hn::Set(df, bounds.scale);
    const auto block_error = hn::Set(df, bounds.error);
    const auto block_norm = hn::Set(df, bounds.norm);
    const auto block = hn::Set(di, static_cast<std::int32_t>(b));
    for (std::int64_t r = first; r < padded_rows_; r += lanes) {
      auto score = hn::LoadU(df, largest + r);
      if constexpr (!kIsBf16) {
        const auto integer = hn::Sub(hn::BitCast(di, score), hn::LoadU(di, offset_ + r));
        score = hn::Mul(hn::Mul(hn::ConvertTo(df, integer), hn::LoadU(df, scale_ + r)), block_scale);
      }
      const auto error =
          hn::MulAdd(hn::LoadU(df, spread_ + r), block_error, hn::Mul(hn::LoadU(df, slack_ + r), block_norm));
      const auto reaches = hn::Ge(hn::Add(score, error), hn::LoadU(df, floor_ + r));
      const auto chooses = hn::RebindMask(df, hn::Gt(hn::LoadU(di, end_ + r), block));
      const auto pass = hn::And(reaches, chooses);
      if (hn::AllFalse(df, pass)) continue;
      alignas(64) float scores[hn::MaxLanes(FloatTag())];
      alignas(64) float errors[hn::MaxLanes(FloatTag())];
      hn::Store(score, df, scores);
      hn::Store(error, df, errors);
      for_each_lane(pass, [&](std::int64_t lane) HWY_ATTR {
        const std::int64_t row = r + lane;
        list(row)[counts_[row]++] = {static_cast<std::int32_t>(b), scores[lane], errors[lane]};
        const float lower = scores[lane] - errors[lane];
        if (lower > floor_[row]) raise_floor(row, lower);
      });
    }
  }

  /// Puts a lower bound in the place of the least of the row's highest ones.
  HWY_ATTR void raise_floor(std::int64_t r, float lower) {
    const FloatTag df;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
    float* bounds = lower_ + r * lower_stride_;
    const auto least = hn::Set(df, floor_[r]);
    auto smallest = hn::Set(df, kInfinity);
    bool is_placed = false;
    for (std::int64_t i = 0; i < slots_; i += lanes) {
      auto here = hn::LoadU(df, bounds + i);
      const std::intptr_t at = is_placed ? -1 : hn::FindFirstTrue(df, hn::Eq(here, least));
      if (at >= 0) {  // in a register: a vector cannot be loaded from behind the store of a lane without waiting for it
        here = hn::IfThenElse(hn::Eq(hn::Iota(df, 0), hn::Set(df, static_cast<float>(at))), hn::Set(df, lower), here);
        hn::StoreU(here, df, bounds + i);
        is_placed = true;
      }
      smallest = hn::Min(smallest, here);
    }
    floor_[r] = hn::GetLane(hn::MinOfLanes(df, smallest));
  }

  /// Drops the candidates whose upper bound the threshold has passed, and the rows that keep too many: their bounds
  /// tell too little. `seen` blocks have been screened.
  HWY_ATTR void prune(std::int64_t seen) {
    const std::int64_t most = std::min(candidate_limit(topk_), std::max(3 * seen / 4, 6 * slots_));
    std::int64_t screened = 0;
    std::int64_t lost = 0;
    for (std::int64_t r = 0; r < selection_.rows(); ++r) {
      if (!is_screened(r)) {
        lost += selection_.limit(r) > 0;
        continue;
      }
      if (counts_[r] > most) drop(r);
      if (counts_[r] > most) {
        give_up(r);
        ++lost;
      } else {
        ++screened;
      }
    }
    // Rows that are left run at the cost of all: not worth it for a quarter of them.
    if (screened * 4 >= screened + lost) return;
    for (std::int64_t r = 0; r < selection_.rows(); ++r) give_up(r);
  }

  void drop(std::int64_t r) {
    Candidate* from = list(r);
    std::int32_t kept = 0;
    for (std::int32_t i = 0; i < counts_[r]; ++i) {
      const Candidate candidate = from[i];
      from[kept] = candidate;
      kept += static_cast<std::int32_t>(candidate.upper() >= floor_[r]);
    }
    counts_[r] = kept;
  }

  /// The nth highest of f(candidate), n from 1; -infinity when there are fewer.
  template <class F>
  float nth_highest(std::int64_t r, std::int64_t n, const F& f) {
    float values[candidate_capacity(kMaxTopk)];
    const std::int32_t count = counts_[r];
    if (n > count) return -kInfinity;
    for (std::int32_t i = 0; i < count; ++i) values[i] = f(list(r)[i]);
    std::nth_element(values, values + n - 1, values + count, std::greater<float>());
    return values[n - 1];
  }

  void add_visit(std::int64_t& count, std::int64_t r, std::int64_t i) {
    // Room for rows and candidates: 512 / kv_heads queries at most, and fewer than 2^12 candidates.
    static_assert(candidate_capacity(kMaxTopk) < 1 << 12);
    visits_[count++] = static_cast<std::uint64_t>(list(r)[i].block) << 32 | static_cast<std::uint64_t>(r) << 12 |
                       static_cast<std::uint64_t>(i);
  }

  /// Visits of the candidates around each row's threshold.
  HWY_ATTR std::int64_t collect_near() {
    std::int64_t visits = 0;
    for (std::int64_t r = 0; r < selection_.rows(); ++r) {
      if (!is_screened(r)) continue;
      for (std::int64_t b = end_[r]; b < selection_.limit(r); ++b) {  // a block that the row sees in part
        list(r)[counts_[r]++] = {static_cast<std::int32_t>(b), 0.0f, kInfinity};
      }
      drop(r);
      if (counts_[r] <= slots_) continue;  // all of them are in
      const float threshold = nth_highest(r, slots_, [](const Candidate& c) { return c.score; });
      const float above = nth_highest(r, slots_ + 1, [](const Candidate& c) { return c.upper(); });
      for (std::int32_t i = 0; i < counts_[r]; ++i) {
        const Candidate& c = list(r)[i];
        if (c.lower() > above) continue;
        // The exact threshold is some block's exact score, a little off: an eighth more than the error catches nearly
        // all.
        if (std::abs(c.score - threshold) <= 1.125f * c.error) add_visit(visits, r, i);
      }
    }
    return visits;
  }

  /// Visits of all candidates that the bounds leave in doubt; floor_ and lower_[r][0] become the bounds of that
  /// decision.
  HWY_ATTR std::int64_t collect_contested() {
    std::int64_t visits = 0;
    for (std::int64_t r = 0; r < selection_.rows(); ++r) {
      if (!is_screened(r) || counts_[r] <= slots_) continue;
      floor_[r] = nth_highest(r, slots_, [](const Candidate& c) { return c.lower(); });
      drop(r);
      const float above = nth_highest(r, slots_ + 1, [](const Candidate& c) { return c.upper(); });
      lower_[r * lower_stride_] = above;
      for (std::int32_t i = 0; i < counts_[r]; ++i) {
        const Candidate& c = list(r)[i];
        if (!c.is_exact() && c.lower() <= above) add_visit(visits, r, i);
      }
    }
    return visits;
  }

  /// Scores the visits exactly, block by block.
  HWY_ATTR void rescore(std::int64_t count) {
    std::sort(visits_, visits_ + count);
    alignas(64) float strip[kMaxHeadDim * kStripRows];
    alignas(64) float scores[kStripRows];
    std::int32_t ids[kStripRows];
    for (std::int64_t visit = 0; visit < count;) {
      const std::uint64_t block = visits_[visit] >> 32;
      const std::int64_t key_count = selection_.load_block(static_cast<std::int64_t>(block));
      while (visit < count && visits_[visit] >> 32 == block) {
        std::int64_t n = 0;
        for (; n < kStripRows && visit + n < count && visits_[visit + n] >> 32 == block; ++n) {
          ids[n] = static_cast<std::int32_t>(visits_[visit + n] >> 12 & 0xfffff);
        }
        selection_.pack_rows(ids, n, strip);
        selection_.score_strip(ids, n, strip, static_cast<std::int64_t>(block), key_count, scores);
        for (std::int64_t i = 0; i < n; ++i) {
          Candidate& candidate = list(ids[i])[visits_[visit + i] & 0xfff];
          candidate.score = scores[i];
          candidate.error = Candidate::kExact;
        }
        visit += n;
      }
    }
  }

  /// What is not exact by now is in or out for certain; the exact ones compete for the slots that are left.
  void write_row(std::int64_t r) {
    std::int32_t chosen[kMaxTopk];
    std::int64_t count = 0;
    if (counts_[r] <= slots_) {
      for (std::int32_t i = 0; i < counts_[r]; ++i) chosen[count++] = list(r)[i].block;
      selection_.write_row(r, chosen, count);
      return;
    }
    const float above = lower_[r * lower_stride_];
    for (std::int32_t i = 0; i < counts_[r]; ++i) {
      const Candidate& c = list(r)[i];
      if (!c.is_exact() && c.lower() > above) chosen[count++] = c.block;
    }
    selection_.start_top(r, slots_ - count);
    RowTopk& top = selection_.top(r);
    for (std::int32_t i = 0; i < counts_[r]; ++i) {
      const Candidate& c = list(r)[i];
      if (c.is_exact()) top.offer(c.block, c.score);
    }
    std::copy(top.ids(), top.ids() + top.count(), chosen + count);
    selection_.write_row(r, chosen, count + top.count());
  }

  SelectionChunk& selection_;
  const SelectBlocksParams& params_;
  const ScreenSetup& setup_;
  core::KeyRows key_rows_;
  std::int64_t block_size_;
  std::int64_t topk_;
  std::int64_t slots_;
  std::int64_t capacity_;
  SharedBlocks shared_;
  std::int64_t padded_rows_;
  std::byte* row_keys_;
  // A row each. The score of a block is, in int8, (largest - offset) * scale * its scale, and in bf16 largest; its
  // error is spread * its error + slack * its norm.
  float* scale_ = nullptr;
  float* spread_ = nullptr;         // at least |scale * q8|, |q16|
  float* slack_ = nullptr;          // at least |q - scale * q8| + rounding * |q|, the same of q16
  float* floor_ = nullptr;          // slots_-th highest lower bound so far
  std::int32_t* offset_ = nullptr;  // 128 * sum of q8
  std::int32_t* end_ = nullptr;     // blocks below are screened; 0: the row is not
  float* largest_ = nullptr;        // int32 in int8; [kScreenedTogether] of all rows
  std::int32_t* counts_ = nullptr;  // candidates
  float* lower_;
  std::int64_t lower_stride_;
  Candidate* candidates_;
  std::uint64_t* visits_;
  std::byte* block_keys_;
};

/// One task: the rows of a chunk, screened.
inline HWY_ATTR void select_chunk_screened(const SelectBlocksParams& params, const SelectionLayout& layout,
                                           const ScreenSetup& setup, const SharedBlocks& shared,
                                           const QueryChunk& chunk, float* scratch, const TensorView& blocks) {
#if HWY_TARGET == HWY_AVX3
  std::optional<AmxTiles> tiles;
  if (setup.dot.needs_amx_tiles) tiles.emplace();
#endif
  SelectionChunk selection(params, layout, chunk, scratch, blocks);
  ScreenedChunk(selection, params, layout, setup, shared, scratch).run();
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_SCREEN_INL_H_
