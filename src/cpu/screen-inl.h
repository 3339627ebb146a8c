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

/// The sums of four vectors, 128 bits at a time: in each four lanes those of a, b, c and d.
inline HWY_ATTR FloatVec sum_quarters(FloatVec a, FloatVec b, FloatVec c, FloatVec d) {
  const FloatTag df;
  const hn::RepartitionToWide<hn::RebindToUnsigned<FloatTag>> d64;
  const auto ab = hn::BitCast(d64, hn::Add(hn::InterleaveLower(df, a, b), hn::InterleaveUpper(df, a, b)));
  const auto cd = hn::BitCast(d64, hn::Add(hn::InterleaveLower(df, c, d), hn::InterleaveUpper(df, c, d)));
  return hn::Add(hn::BitCast(df, hn::InterleaveLower(d64, ab, cd)), hn::BitCast(df, hn::InterleaveUpper(d64, ab, cd)));
}

/// Bounds of keys that are bf16 already, rows of `stride` elements; count is a multiple of 4, dim of 32. The largest
/// sum of squares is found for each 128 bits of a vector on its own, and those are added up: a little too much, where
/// summing up whole vectors of every key would take longer than reading the keys.
inline HWY_ATTR BlockBounds bound_block(const std::uint16_t* keys, std::int64_t stride, std::int64_t count,
                                        std::int64_t dim) {
  const FloatTag df;
  const IntTag di;
  const hn::RebindToUnsigned<FloatTag> du;
  const hn::Repartition<std::uint16_t, FloatTag> d16;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto odd = hn::Set(du, 0xffff0000u);
  const auto magnitude = hn::Set(d16, std::uint16_t{0x7fff});
  auto largest = hn::Zero(d16);
  const auto squares_of = [&](const std::uint16_t* key) HWY_ATTR {
    auto sum0 = hn::Zero(df);
    auto sum1 = sum0;
    for (std::int64_t d = 0; d < dim; d += 2 * lanes) {  // a word holds two
      const auto words = hn::LoadU(du, reinterpret_cast<const std::uint32_t*>(key + d));
      const auto a = hn::BitCast(df, hn::ShiftLeft<16>(words));
      const auto b = hn::BitCast(df, hn::And(words, odd));
      sum0 = hn::MulAdd(a, a, sum0);
      sum1 = hn::MulAdd(b, b, sum1);
      largest = hn::Max(largest, hn::And(hn::BitCast(d16, words), magnitude));
    }
    return hn::Add(sum0, sum1);
  };
  auto squares = hn::Zero(df);
  for (const std::uint16_t* key = keys; key < keys + count * stride; key += 4 * stride) {
    const auto a = squares_of(key);
    const auto b = squares_of(key + stride);
    const auto c = squares_of(key + 2 * stride);
    squares = hn::Max(squares, sum_quarters(a, b, c, squares_of(key + 3 * stride)));
  }
  alignas(64) float sums[hn::MaxLanes(FloatTag())];
  hn::Store(squares, df, sums);
  for (std::int64_t i = 4; i < lanes; ++i) sums[i % 4] += sums[i];
  const auto pairs = hn::BitCast(du, largest);
  const auto larger = hn::Max(hn::BitCast(di, hn::And(pairs, odd)), hn::BitCast(di, hn::ShiftLeft<16>(pairs)));
  const float most = std::bit_cast<float>(hn::GetLane(hn::MaxOfLanes(di, larger)));  // NaN above infinity
  BlockBounds bounds;
  bounds.scale = 1;
  bounds.norm = can_screen(most) ? norm_bound(*std::max_element(sums, sums + 4), most) : kInfinity;
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
        buckets_(bound_buckets(params.topk)),
        lower_(scratch + layout.lower),
        candidates_(reinterpret_cast<Candidate*>(scratch + layout.candidates)),
        visits_(reinterpret_cast<std::uint64_t*>(scratch + layout.visits)),
        block_keys_(reinterpret_cast<std::byte*>(scratch + layout.block_keys)) {
    float* bounds = scratch + layout.row_bounds;
    const auto next = [&] {
      float* array = bounds;
      bounds += padded_rows_;
      return array;
    };
    scale_ = above_ = next();
    spread_ = next();
    slack_ = next();
    floor_ = next();
    offset_ = reinterpret_cast<std::int32_t*>(next());
    end_ = reinterpret_cast<std::int32_t*>(next());
    counts_ = reinterpret_cast<std::int32_t*>(next());
    largest_ = next();  // and those of kWindowBlocks - 1 more
    place_notes();
    std::fill(lower_, lower_ + padded_rows_ * buckets_, -kInfinity);
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
  // Candidates are noted one behind the other, whatever row they are of, until there are this many a row on average.
  static constexpr std::int64_t kNotes = kWindowBlocks;
  static constexpr std::int64_t kManyNotes = 16;  // of a window and row, where new blocks are no better than the others
  // Neighbouring blocks that share a bucket. Seldom are two of the best neighbours.
  static constexpr std::int64_t kBucketBlocks = 2;
  static_assert(kWindowBlocks == 64 && bound_buckets(1) % (kWindowBlocks / kBucketBlocks) == 0);
  static constexpr std::int32_t kFewCandidates = 64;

  bool is_screened(std::int64_t r) const { return end_[r] > 0; }
  void give_up(std::int64_t r) {
    end_[r] = 0;
    floor_[r] = kInfinity;  // no block that can be bounded gets past the first comparison
  }
  Candidate* list(std::int64_t r) { return candidates_ + r * capacity_; }

  /// Notes lie where there will be visits.
  void place_notes() {
    constexpr std::int64_t kSpare = 16;  // a vector is stored behind the last one
    static_assert(candidate_capacity(1) * sizeof(std::uint64_t) >= (kNotes + 1) * sizeof(std::int32_t[4]));
    const std::int64_t places = padded_rows_ * kNotes + kSpare;
    notes_.rows = reinterpret_cast<std::int32_t*>(visits_);
    notes_.blocks = notes_.rows + places;
    notes_.scores = reinterpret_cast<float*>(notes_.blocks + places);
    notes_.errors = notes_.scores + places;
  }

  HWY_ATTR void start_row(std::int64_t r) {
    scale_[r] = spread_[r] = slack_[r] = 0;
    offset_[r] = counts_[r] = 0;
    give_up(r);
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
      if (end_[r] > 0) floor_[r] = -kInfinity;
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

  /// Screens all blocks, a window of them at a time: first their products with all rows, then what these say, a vector
  /// of rows after the other.
  HWY_ATTR void scan() {
    const std::int64_t begin = selection_.choices().begin();
    const std::int64_t groups = padded_rows_ / kInt8Rows;
    std::int64_t last = 0;
    for (std::int64_t r = 0; r < selection_.rows(); ++r) last = std::max<std::int64_t>(last, end_[r]);
    std::int64_t group = 0;   // first one with a row that may choose the block
    std::int64_t raised = 0;  // blocks that the thresholds know of
    std::int64_t noted = 0;   // candidates of the window before
    for (std::int64_t b = begin; b < last; b += kWindowBlocks) {
      const auto ends = [&](std::int64_t g) {
        return *std::max_element(end_ + g * kInt8Rows, end_ + (g + 1) * kInt8Rows) <= b;
      };
      while (group < groups && ends(group)) ++group;
      if (group == groups) break;  // rows were given up
      const std::int64_t count = std::min(kWindowBlocks, last - b);
      const std::int64_t seen = b + count - begin;
      multiply_window(b, count, last, group, groups);
      // Thresholds rise ever more slowly, unless later blocks are better.
      const bool raises = 2 * seen >= 3 * raised || noted > kManyNotes * padded_rows_ || b + count == last;
      if (raises) raised = seen;
      noted = 0;
      for (std::int64_t r = group * kInt8Rows; r < padded_rows_;
           r += static_cast<std::int64_t>(hn::Lanes(FloatTag()))) {
        finish_scores(b, count, r);
        keep_lower_bounds(b - begin, count, r);
        if (raises) raise_floors(r);
        noted += note_candidates(b, count, r);
      }
      if (2 * noted > count * padded_rows_) list_notes();  // for rows whose bounds tell too little to be found soon
      prune(seen, false);
    }
    list_notes();
    prune(last - begin, true);
  }

  /// largest_ and window_bounds_ of the blocks [first, first + count), the rows in groups [group, groups) of 16. The
  /// scan ends before block `last`.
  HWY_ATTR void multiply_window(std::int64_t first, std::int64_t count, std::int64_t last, std::int64_t group,
                                std::int64_t groups) {
    for (std::int64_t i = 0; i < count;) {
      const std::int64_t b = first + i;
      const std::int64_t together = count_together(b, count - i);
      const std::byte* keys = find_block(b, window_bounds_[i]);
      for (std::int64_t j = 1; j < together; ++j) window_bounds_[i + j] = shared_.bounds[b + j - shared_.first];
      multiply(keys, i, together, group, groups, b + together < last ? shared_block(b + together) : nullptr);
      i += together;
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

  /// The products of the rows from r on, of 16 as a group, and block i of the window; those of the next block are
  /// block_stride() behind.
  float* largest(std::int64_t i, std::int64_t r) {
    const std::int64_t group = setup_.dot.is_bf16() ? kWindowBlocks * kInt8Rows : kInt8Rows;
    return largest_ + r / kInt8Rows * group + r % kInt8Rows + i * block_stride();
  }
  std::int64_t block_stride() const { return setup_.dot.is_bf16() ? kInt8Rows : padded_rows_; }

  /// The products of the rows in groups [first, last) of 16 and of `count` blocks, from the window's block i on.
  HWY_ATTR void multiply(const std::byte* keys, std::int64_t i, std::int64_t count, std::int64_t first,
                         std::int64_t last, const std::byte* next) {
    const std::byte* rows = row_keys_ + first * kInt8Rows * setup_.row_bytes();
    if (!setup_.dot.is_bf16()) {
      setup_.dot.int8(reinterpret_cast<const std::uint8_t*>(keys), block_size_, setup_.dim,
                      reinterpret_cast<const std::int8_t*>(rows), last - first,
                      reinterpret_cast<std::int32_t*>(largest(i, first * kInt8Rows)));
    } else if (window_bounds_[i].norm == kInfinity) {  // the sums could be NaN
      for (std::int64_t g = first; g < last; ++g) std::fill_n(largest(i, g * kInt8Rows), kInt8Rows, 0.0f);
    } else {
      Bf16Blocks blocks;
      blocks.keys = reinterpret_cast<const std::uint16_t*>(keys);
      blocks.stride = blocks.dim = setup_.dim;
      blocks.key_count = block_size_;
      blocks.count = count;
      setup_.dot.bf16(blocks, reinterpret_cast<const std::uint16_t*>(rows), last - first, next,
                      {largest(i, first * kInt8Rows), block_stride(), kWindowBlocks * kInt8Rows});
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

  /// Makes the products of the rows from r on and `count` blocks from b on scores; -infinity where a row may not choose
  /// the block.
  HWY_ATTR void finish_scores(std::int64_t b, std::int64_t count, std::int64_t r) {
    const FloatTag df;
    const IntTag di;
    const auto end = hn::LoadU(di, end_ + r);
    const auto at_end = hn::Set(di, static_cast<std::int32_t>(b + count));
    if (setup_.dot.is_bf16() && hn::AllFalse(di, hn::Lt(end, at_end))) return;  // nothing to do
    for (std::int64_t i = 0; i < count; ++i) {
      float* at = largest(i, r);
      auto score = hn::LoadU(df, at);
      if (!setup_.dot.is_bf16()) {
        const auto integer = hn::Sub(hn::BitCast(di, score), hn::LoadU(di, offset_ + r));
        const auto scale = hn::Set(df, window_bounds_[i].scale);
        score = hn::Mul(hn::Mul(hn::ConvertTo(df, integer), hn::LoadU(df, scale_ + r)), scale);
      }
      const auto chooses = hn::Gt(end, hn::Set(di, static_cast<std::int32_t>(b + i)));
      hn::StoreU(hn::IfThenElse(hn::RebindMask(df, chooses), score, hn::Set(df, -kInfinity)), df, at);
    }
  }

  /// Takes the lower bounds of `count` blocks of the window, `seen` behind the first one, into the buckets of the rows
  /// from r on: the highest of each bucket stays.
  HWY_ATTR void keep_lower_bounds(std::int64_t seen, std::int64_t count, std::int64_t r) {
    const FloatTag df;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
    const auto spread = hn::LoadU(df, spread_ + r);
    const auto slack = hn::LoadU(df, slack_ + r);
    const float* scores = largest(0, r);
    const std::int64_t stride = block_stride();
    float* at = lower_ + r * buckets_ + seen / kBucketBlocks % buckets_ * lanes;
    for (std::int64_t i = 0; i < count; at += lanes) {
      auto highest = hn::LoadU(df, at);
      for (const std::int64_t end = std::min(count, i + kBucketBlocks); i < end; ++i) {
        const auto error = error_of(window_bounds_[i], spread, slack);
        highest = hn::Max(highest, hn::Sub(hn::LoadU(df, scores + i * stride), error));
      }
      hn::StoreU(highest, df, at);
    }
  }

  static HWY_INLINE HWY_ATTR FloatVec error_of(const BlockBounds& bounds, FloatVec spread, FloatVec slack) {
    const FloatTag df;
    return hn::MulAdd(spread, hn::Set(df, bounds.error), hn::Mul(slack, hn::Set(df, bounds.norm)));
  }

  /// Raises the thresholds of the rows from r on to where slots_ buckets still reach them, or a little less: that many
  /// blocks have a lower bound as high. Halves what lies between a threshold and the highest of all.
  HWY_ATTR void raise_floors(std::int64_t r) {
    const FloatTag df;
    const IntTag di;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
    constexpr int kHalvings = 6;
    const float* bounds = lower_ + r * buckets_;
    const auto none = hn::Set(df, -kInfinity);
    const auto slots = hn::Set(di, static_cast<std::int32_t>(slots_));
    auto lowest = hn::Set(df, kInfinity);
    auto high = none;
    auto missing = slots;  // until so many buckets have a bound
    for (std::int64_t i = 0; i < buckets_; ++i) {
      const auto bound = hn::LoadU(df, bounds + i * lanes);
      const auto is_one = hn::Gt(bound, none);
      lowest = hn::IfThenElse(is_one, hn::Min(lowest, bound), lowest);
      high = hn::Max(high, bound);
      missing = hn::Add(missing, hn::VecFromMask(di, hn::RebindMask(di, is_one)));
    }
    const auto are_enough = hn::RebindMask(df, hn::Lt(missing, hn::Set(di, 1)));
    auto low = hn::LoadU(df, floor_ + r);
    low = hn::IfThenElse(are_enough, hn::Max(low, lowest), low);
    for (int step = 0; step < kHalvings; ++step) {
      const auto middle = hn::Mul(hn::Set(df, 0.5f), hn::Add(low, high));
      auto even = slots;  // by how many the buckets that reach the middle are fewer: two chains
      auto odd = hn::Zero(di);
      for (std::int64_t i = 0; i < buckets_; i += 2) {
        const auto reaches = hn::Ge(hn::LoadU(df, bounds + i * lanes), middle);
        even = hn::Add(even, hn::VecFromMask(di, hn::RebindMask(di, reaches)));
        const auto next_reaches = hn::Ge(hn::LoadU(df, bounds + (i + 1) * lanes), middle);
        odd = hn::Add(odd, hn::VecFromMask(di, hn::RebindMask(di, next_reaches)));
      }
      const auto is_lower = hn::RebindMask(df, hn::Lt(hn::Add(even, odd), hn::Set(di, 1)));
      low = hn::IfThenElse(is_lower, hn::Max(low, middle), low);
      high = hn::IfThenElse(is_lower, high, middle);
    }
    hn::StoreU(low, df, floor_ + r);
  }

  /// Notes those of `count` blocks from b on that are candidates of the rows from r on; returns how many.
  HWY_ATTR std::int64_t note_candidates(std::int64_t b, std::int64_t count, std::int64_t r) {
    const FloatTag df;
    const IntTag di;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
    if (note_count_ + count * lanes > padded_rows_ * kNotes) list_notes();
    const auto spread = hn::LoadU(df, spread_ + r);
    const auto slack = hn::LoadU(df, slack_ + r);
    const auto floor = hn::LoadU(df, floor_ + r);
    const float* scores = largest(0, r);
    const std::int64_t stride = block_stride();
    std::uint64_t some = 0;  // blocks with a row
    for (std::int64_t i = 0; i < count; ++i) {
      const auto upper = hn::Add(hn::LoadU(df, scores + i * stride), error_of(window_bounds_[i], spread, slack));
      some |= static_cast<std::uint64_t>(!hn::AllFalse(df, hn::Ge(upper, floor))) << i;
    }
    // Not Iota(r): g++ 12 makes it of scalars, through memory.
    const auto rows = hn::Add(hn::Set(di, static_cast<std::int32_t>(r)), hn::Iota(di, 0));
    const Notes notes = notes_;
    std::int64_t at = note_count_;
    for (; some != 0; some &= some - 1) {
      const auto i = static_cast<std::int64_t>(__builtin_ctzll(some));
      const auto score = hn::LoadU(df, scores + i * stride);
      const auto error = error_of(window_bounds_[i], spread, slack);
      const auto reaches = hn::Ge(hn::Add(score, error), floor);
      const auto added = static_cast<std::int64_t>(hn::CountTrue(df, reaches));
      hn::StoreU(hn::Compress(rows, hn::RebindMask(di, reaches)), di, notes.rows + at);
      hn::StoreU(hn::Set(di, static_cast<std::int32_t>(b + i)), di, notes.blocks + at);
      hn::StoreU(hn::Compress(score, reaches), df, notes.scores + at);
      hn::StoreU(hn::Compress(error, reaches), df, notes.errors + at);
      at += added;
    }
    const std::int64_t noted = at - note_count_;
    note_count_ = at;
    return noted;
  }

  /// Takes what was noted into the lists of the rows, but for what the thresholds have passed since: most of it.
  HWY_ATTR void list_notes() {
    const FloatTag df;
    const IntTag di;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
    for (std::int64_t i = 0; i < note_count_; i += lanes) {
      const auto noted = hn::FirstN(df, static_cast<std::size_t>(std::min(lanes, note_count_ - i)));
      const auto rows = hn::IfThenElseZero(hn::RebindMask(di, noted), hn::LoadU(di, notes_.rows + i));
      const auto upper = hn::Add(hn::LoadU(df, notes_.scores + i), hn::LoadU(df, notes_.errors + i));
      const auto reaches = hn::Ge(upper, hn::GatherIndex(df, floor_, rows));
      for_each_lane(hn::And(reaches, noted), [&](std::int64_t lane) HWY_ATTR {
        append(notes_.rows[i + lane], {notes_.blocks[i + lane], notes_.scores[i + lane], notes_.errors[i + lane]});
      });
    }
    note_count_ = 0;
  }

  void append(std::int64_t r, const Candidate& candidate) {
    if (candidate.block >= end_[r]) return;  // its -infinity reaches a threshold of -infinity; or r was given up
    if (counts_[r] == capacity_ - 1) {       // the last place is for a block that the row sees in part
      raise_floor(r);
      if (counts_[r] > candidate_limit(topk_)) give_up(r);
    }
    if (is_screened(r)) list(r)[counts_[r]++] = candidate;
  }

  /// Drops the candidates whose upper bound the threshold has passed, and the rows that keep too many: their bounds
  /// tell too little. `seen` blocks have been screened, `is_last`: all. Exact scores of more than half of them, row by
  /// row, would then take longer than those of all, strip by strip.
  HWY_ATTR void prune(std::int64_t seen, bool is_last) {
    const std::int64_t share = is_last ? std::max(seen / 2, 4 * slots_) : std::max(3 * seen / 4, 6 * slots_);
    const std::int64_t most = std::min(candidate_limit(topk_), share);
    std::int64_t screened = 0;
    std::int64_t lost = 0;
    for (std::int64_t r = 0; r < selection_.rows(); ++r) {
      if (!is_screened(r)) {
        lost += selection_.limit(r) > 0;
        continue;
      }
      if (counts_[r] > most) raise_floor(r);
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
  HWY_ATTR float nth_highest(std::int64_t r, std::int64_t n, const F& f) {
    alignas(64) float values[candidate_capacity(kMaxTopk) + hn::MaxLanes(FloatTag())];
    const std::int32_t count = counts_[r];
    if (n > count) return -kInfinity;
    for (std::int32_t i = 0; i < count; ++i) values[i] = f(list(r)[i]);
    if (count <= kFewCandidates) return nth_of_few(values, count, n);
    std::nth_element(values, values + n - 1, values + count, std::greater<float>());
    return values[n - 1];
  }

  /// Of few values, without a branch: the least of those that fewer than n others exceed. Writes behind the last.
  static HWY_ATTR float nth_of_few(float* values, std::int32_t count, std::int64_t n) {
    const FloatTag df;
    const IntTag di;
    const auto lanes = static_cast<std::int32_t>(hn::Lanes(df));
    hn::StoreU(hn::Set(df, -kInfinity), df, values + count);
    auto least = hn::Set(df, kInfinity);
    for (std::int32_t i = 0; i < count; i += lanes) {
      const auto here = hn::LoadU(df, values + i);
      auto others = hn::Set(di, static_cast<std::int32_t>(n));  // to come until they are n
      for (std::int32_t j = 0; j < count; ++j) {
        const auto exceeds = hn::Gt(hn::Set(df, values[j]), here);
        others = hn::Add(others, hn::VecFromMask(di, hn::RebindMask(di, exceeds)));
      }
      const auto is_among = hn::RebindMask(df, hn::Gt(others, hn::Zero(di)));
      least = hn::IfThenElse(is_among, hn::Min(least, here), least);
    }
    return hn::GetLane(hn::MinOfLanes(df, least));
  }

  /// Raises the threshold to what the row's candidates say, and drops those that do not reach it.
  void raise_floor(std::int64_t r) {
    if (counts_[r] <= slots_) return;
    // What is noted, but not listed, may have raised it further.
    floor_[r] = std::max(floor_[r], nth_highest(r, slots_, [](const Candidate& c) { return c.lower(); }));
    drop(r);
  }

  void add_visit(std::int64_t& count, std::int64_t r, std::int64_t i) {
    // Room for rows and candidates: some 512 rows, and fewer than 2^12 candidates.
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
      raise_floor(r);
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

  /// Visits of all candidates that the bounds leave in doubt; floor_ and above_ become the bounds of that decision.
  HWY_ATTR std::int64_t collect_contested() {
    std::int64_t visits = 0;
    for (std::int64_t r = 0; r < selection_.rows(); ++r) {
      if (!is_screened(r) || counts_[r] <= slots_) continue;
      raise_floor(r);
      const float above = nth_highest(r, slots_ + 1, [](const Candidate& c) { return c.upper(); });
      above_[r] = above;
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
    const auto block_of = [&](std::int64_t visit) { return static_cast<std::int64_t>(visits_[visit] >> 32); };
    for (std::int64_t first = 0; first < count;) {
      std::int64_t last = first + 1;
      while (last < count && block_of(last) == block_of(first)) ++last;
      rescore_block(block_of(first), first, last);
      first = last;
    }
  }

  /// The visits [first, last) are those of one block. A few of them: its keys side by side in lanes, and a row after
  /// the other. More: the rows in lanes.
  HWY_ATTR void rescore_block(std::int64_t block, std::int64_t first, std::int64_t last) {
    constexpr std::int64_t kFewVisits = 4;  // turning the keys costs as much as eight rows then do
    alignas(64) float strip[kMaxHeadDim * kStripRows];
    alignas(64) float scores[kStripRows];
    std::int32_t ids[kStripRows];
    const auto row_of = [&](std::int64_t visit) { return static_cast<std::int32_t>(visits_[visit] >> 12 & 0xfffff); };
    const auto take = [&](std::int64_t visit, float score) {
      Candidate& candidate = list(row_of(visit))[visits_[visit] & 0xfff];
      candidate.score = score;
      candidate.error = Candidate::kExact;
    };
    if (last - first <= kFewVisits) {
      for (std::int64_t visit = first; visit < last; ++visit) {
        take(visit, selection_.score_row(row_of(visit), block, strip));
      }
      return;
    }
    const std::int64_t key_count = selection_.load_block(block);
    for (std::int64_t visit = first; visit < last; visit += kStripRows) {
      const std::int64_t n = std::min(kStripRows, last - visit);
      for (std::int64_t i = 0; i < n; ++i) ids[i] = row_of(visit + i);
      selection_.pack_rows(ids, n, strip);
      selection_.score_strip(ids, n, strip, block, key_count, scores);
      for (std::int64_t i = 0; i < n; ++i) take(visit + i, scores[i]);
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
    const float above = above_[r];
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
  float* above_ = nullptr;          // where scale_ was: a candidate whose lower bound is higher is in
  float* spread_ = nullptr;         // at least |scale * q8|, |q16|
  float* slack_ = nullptr;          // at least |q - scale * q8| + rounding * |q|, the same of q16
  float* floor_ = nullptr;          // at most the slots_-th highest lower bound so far
  std::int32_t* offset_ = nullptr;  // 128 * sum of q8
  std::int32_t* end_ = nullptr;     // blocks below are screened; 0: the row is not
  float* largest_ = nullptr;        // int32 in int8; see largest()
  BlockBounds window_bounds_[kWindowBlocks];
  std::int32_t* counts_ = nullptr;  // candidates
  std::int64_t buckets_;
  float* lower_;  // [rows / lanes, buckets_, lanes]: the highest lower bound in each bucket of blocks
  Candidate* candidates_;
  std::uint64_t* visits_;
  struct Notes {
    std::int32_t* rows = nullptr;
    std::int32_t* blocks = nullptr;
    float* scores = nullptr;
    float* errors = nullptr;
  } notes_;
  std::int64_t note_count_ = 0;
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
