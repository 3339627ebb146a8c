// SPDX-License-Identifier: Apache-2.0
// Top-k of rows of scores in two passes over a row that lies in the L1 or L2 cache. The first finds a bound that at least
// topk scores reach: cut the row into as many groups as vector lanes hold topk, take each group's maximum, then the least
// of those. The second compares with the bound, a vector at a time, and packs the ids of what reaches it; of random scores
// about topk * (1/1 + 1/2 + ... + 1/topk) do (collecting one score from each group), 54 for 16 and 303 for 64, so what is
// left to rank is small. Ranking bisects on the scores' bits until exactly topk are above. No exponential, no sort, and no
// branch that depends on a score in either pass. Tested in tests/unit/topk_blocks_test.cc.
#if defined(MSA_CPU_TOPK_BLOCKS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_TOPK_BLOCKS_INL_H_
#undef MSA_CPU_TOPK_BLOCKS_INL_H_
#else
#define MSA_CPU_TOPK_BLOCKS_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "msa/select_blocks.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

using IdTag = hn::RebindToSigned<FloatTag>;
using IdVec = hn::Vec<IdTag>;

/// cpu::order_key on a vector without NaN.
inline HWY_ATTR IdVec order_keys(FloatVec scores) {
  const IdTag di;
  const auto bits = hn::BitCast(di, scores);
  const auto flipped = hn::Xor(bits, hn::And(hn::ShiftRight<31>(bits), hn::Set(di, 0x7fffffff)));
  return hn::IfThenZeroElse(hn::Eq(bits, hn::Set(di, std::numeric_limits<std::int32_t>::min())), flipped);
}

/// The score whose order key this is.
inline float score_of_key(std::int32_t key) { return std::bit_cast<float>(key >= 0 ? key : key ^ 0x7fffffff); }

/// Ids of scores that may be among a row's topk, ascending, cut back to the best topk whenever the space is used up.
class Survivors {
 public:
  /// Whole vectors that may be packed between two calls of make_room().
  static constexpr int kVectors = 4;

  Survivors(const float* scores, std::int64_t topk) : scores_(scores), topk_(topk) {}

  HWY_INLINE HWY_ATTR void pack(IdVec ids, hn::Mask<FloatTag> keep) {
    const IdTag di;
    hn::StoreU(hn::Compress(ids, hn::RebindMask(di, keep)), di, ids_ + count_);
    count_ += static_cast<std::int64_t>(hn::CountTrue(FloatTag(), keep));
  }

  bool is_full() const { return count_ > kCapacity; }
  std::int64_t count() const { return count_; }
  const std::int32_t* ids() const { return ids_; }
  void append(std::int32_t id) { ids_[count_++] = id; }

  /// Keeps the topk best, ties to the lower id, where there are more. Returns the score that a later one must reach to be
  /// among them: the next number above the worst kept; NaN, which nothing reaches, above +inf.
  HWY_ATTR float reduce() {
    const IdTag di;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(di));
    auto most = hn::Set(di, std::numeric_limits<std::int32_t>::min());
    auto least = hn::Set(di, std::numeric_limits<std::int32_t>::max());
    for (std::int64_t i = 0; i < count_; i += lanes) {
      const auto valid = hn::FirstN(di, static_cast<std::size_t>(count_ - i));
      const auto ids = hn::IfThenElseZero(valid, hn::LoadU(di, ids_ + i));
      const auto keys = order_keys(hn::GatherIndex(FloatTag(), scores_, ids));
      // Behind the last survivor: below every key, so never counted.
      const auto padded = hn::IfThenElse(valid, keys, hn::Set(di, std::numeric_limits<std::int32_t>::min()));
      hn::StoreU(padded, di, keys_ + i);
      most = hn::Max(most, padded);
      least = hn::Min(least, hn::IfThenElse(valid, keys, least));
    }
    // At least topk keys reach `low`, fewer than topk reach high + 1. Bits of floats are distributed like their logarithms,
    // so halving the range in bits finds the gap below the topk-th key in a few steps; ties take all of them.
    std::int64_t low = hn::GetLane(hn::MinOfLanes(di, least));
    std::int64_t high = hn::GetLane(hn::MaxOfLanes(di, most));
    std::int64_t reached = count_;
    while (low < high && reached != topk_) {
      const std::int64_t middle = low + (high - low + 1) / 2;
      const std::int64_t count = count_reaching(static_cast<std::int32_t>(middle));
      if (count >= topk_) {
        low = middle;
        reached = count;
      } else {
        high = middle - 1;
      }
    }
    const auto worst = static_cast<std::int32_t>(low);
    if (reached == topk_) {
      keep_reaching(worst);
    } else {
      keep_with_ties(worst);
    }
    return score_of_key(worst + 1);
  }

 private:
  static constexpr std::int64_t kCapacity = 512;  // twice what the first pass leaves of random scores at topk 64
  static constexpr std::int64_t kSlack = kVectors * 16;

  HWY_ATTR std::int64_t count_reaching(std::int32_t key) const {
    const IdTag di;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(di));
    const auto below = hn::Set(di, key - 1);  // key is above the lowest one: no overflow
    std::size_t count = 0;
    for (std::int64_t i = 0; i < count_; i += lanes) count += hn::CountTrue(di, hn::Gt(hn::LoadU(di, keys_ + i), below));
    return static_cast<std::int64_t>(count);
  }

  // The packed vector is stored over ones that were read already.
  HWY_ATTR void keep_reaching(std::int32_t key) {
    const IdTag di;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(di));
    const auto below = hn::Set(di, key - 1);
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < count_; i += lanes) {
      const auto keep = hn::Gt(hn::LoadU(di, keys_ + i), below);
      hn::StoreU(hn::Compress(hn::LoadU(di, ids_ + i), keep), di, ids_ + kept);
      kept += static_cast<std::int64_t>(hn::CountTrue(di, keep));
    }
    count_ = kept;
  }

  void keep_with_ties(std::int32_t worst) {
    std::int64_t room = topk_;  // for keys equal to the worst
    for (std::int64_t i = 0; i < count_; ++i) room -= keys_[i] > worst ? 1 : 0;
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < count_; ++i) {
      if (keys_[i] > worst || (keys_[i] == worst && room-- > 0)) ids_[kept++] = ids_[i];
    }
    count_ = kept;
  }

  const float* scores_;
  std::int64_t topk_;
  std::int64_t count_ = 0;
  std::int32_t ids_[kCapacity + kSlack];
  std::int32_t keys_[kCapacity + kSlack];
};

/// A score that at least kVecs vectors of elements reach, as high as one pass finds it; -inf where there may be fewer.
/// `tail` is what lies behind the last whole vector, filled up with NaN.
template <int kVecs>
HWY_ATTR float bound_of_best(const float* HWY_RESTRICT row, std::int64_t whole, const float* HWY_RESTRICT tail) {
  // A comparison and a blend, 4 to 5 cycles, wait for the step before: 4 chains keep up with one vector a cycle.
  constexpr int kChains = kVecs < 4 ? 4 : kVecs;
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  FloatVec best[kChains];
  unroll<kChains>([&](auto c) { best[c] = hn::Set(df, kNegativeInfinity); });
  std::int64_t i = 0;
  for (; i + kChains * lanes <= whole; i += kChains * lanes) {
    unroll<kChains>([&](auto c) { best[c] = max_number(hn::LoadU(df, row + i + c * lanes), best[c]); });
  }
  for (; i < whole; i += lanes) best[0] = max_number(hn::LoadU(df, row + i), best[0]);
  best[0] = max_number(hn::LoadU(df, tail), best[0]);
  unroll<kChains - kVecs>([&](auto c) { best[c % kVecs] = max_number(best[kVecs + c], best[c % kVecs]); });
  auto least = best[0];
  unroll<kVecs - 1>([&](auto c) { least = hn::Min(best[c + 1], least); });
  return hn::GetLane(hn::MinOfLanes(df, least));
}

/// One row: more than topk scores, ids [topk].
template <int kVecs>
HWY_ATTR void topk_row(const float* HWY_RESTRICT row, std::int64_t blocks, std::int64_t topk, std::int32_t* out) {
  const FloatTag df;
  const IdTag di;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const std::int64_t whole = blocks / lanes * lanes;
  float tail[16];
  std::fill(std::copy(row + whole, row + blocks, tail), tail + 16, std::numeric_limits<float>::quiet_NaN());

  Survivors survivors(row, topk);
  auto bound = hn::Set(df, bound_of_best<kVecs>(row, whole, tail));
  auto ids = hn::Iota(di, 0);
  const auto step = hn::Set(di, static_cast<std::int32_t>(lanes));
  const auto pack = [&](const float* scores) HWY_ATTR {
    survivors.pack(ids, hn::Ge(hn::LoadU(df, scores), bound));
    ids = hn::Add(ids, step);
  };
  std::int64_t i = 0;
  for (; i + Survivors::kVectors * lanes <= whole; i += Survivors::kVectors * lanes) {
    unroll<Survivors::kVectors>([&](auto v) { pack(row + i + v * lanes); });
    if (survivors.is_full()) bound = hn::Set(df, survivors.reduce());
  }
  for (; i < whole; i += lanes) pack(row + i);
  pack(tail);

  if (survivors.count() > topk) {
    survivors.reduce();
  } else if (survivors.count() < topk) {  // fewer numbers than topk: NaN, lowest ids first
    for (std::int64_t b = 0; survivors.count() < topk; ++b) {
      if (std::isnan(row[b])) survivors.append(static_cast<std::int32_t>(b));
    }
    std::copy(survivors.ids(), survivors.ids() + topk, out);
    std::sort(out, out + topk);
    return;
  }
  std::copy(survivors.ids(), survivors.ids() + topk, out);
}

template <int kVecs>
HWY_ATTR void topk_rows_of(const float* scores, std::int64_t row_stride, std::int64_t rows, std::int64_t blocks,
                           std::int64_t topk, std::int32_t* ids, std::int64_t ids_stride) {
  for (std::int64_t r = 0; r < rows; ++r) topk_row<kVecs>(scores + r * row_stride, blocks, topk, ids + r * ids_stride);
}

/// ids[rows, topk] of scores[rows, blocks], rows `row_stride` and `ids_stride` elements apart.
inline HWY_ATTR void topk_rows(const float* scores, std::int64_t row_stride, std::int64_t rows, std::int64_t blocks,
                               std::int64_t topk, std::int32_t* ids, std::int64_t ids_stride) {
  if (blocks <= topk) {
    for (std::int64_t r = 0; r < rows; ++r) {
      std::int32_t* out = ids + r * ids_stride;
      for (std::int64_t slot = 0; slot < topk; ++slot) out[slot] = slot < blocks ? static_cast<std::int32_t>(slot) : -1;
    }
    return;
  }
  // Groups for the first pass: at least topk, a power of two of vectors. 16 vectors of 4 lanes hold the largest topk.
  static_assert(kMaxTopk <= 16 * 4);
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(FloatTag()));
  const auto run = topk <= lanes       ? topk_rows_of<1>
                   : topk <= 2 * lanes ? topk_rows_of<2>
                   : topk <= 4 * lanes ? topk_rows_of<4>
                   : topk <= 8 * lanes ? topk_rows_of<8>
                                       : topk_rows_of<16>;
  run(scores, row_stride, rows, blocks, topk, ids, ids_stride);
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_TOPK_BLOCKS_INL_H_
