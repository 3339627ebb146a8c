// SPDX-License-Identifier: Apache-2.0
// Top-k of rows of scores in two passes over a row that lies in the L1 or L2 cache. The first finds a bound that at
// least topk scores reach: cut the row into as many groups as vector lanes hold topk, take each group's maximum, then
// the least of those. The second compares with the bound, a vector at a time, and packs the ids of what reaches it; of
// random scores about topk * (1/1 + 1/2 + ... + 1/topk) do (collecting one score from each group), 54 for 16 and 303
// for 64, so what is left to rank is small. Ranking bisects on the scores' bits until exactly topk are above. No
// exponential, no sort, and no branch that depends on a score in either pass. Tested in tests/unit/topk_blocks_test.cc.
#if defined(MSA_CPU_TOPK_BLOCKS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_TOPK_BLOCKS_INL_H_
#undef MSA_CPU_TOPK_BLOCKS_INL_H_
#else
#define MSA_CPU_TOPK_BLOCKS_INL_H_
#endif

#include <hwy/cache_control.h>

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

#if HWY_TARGET != HWY_AVX3
/// kLaneLists.lanes[bits]: the positions of the bits that are set, ascending.
struct LaneLists {
  alignas(64) std::uint8_t lanes[256][8] = {};
  constexpr LaneLists() {
    for (int bits = 0; bits < 256; ++bits) {
      int count = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if ((bits >> lane & 1) != 0) lanes[bits][count++] = static_cast<std::uint8_t>(lane);
      }
    }
  }
};
inline constexpr LaneLists kLaneLists;
#endif

/// Writes first + lane for every lane of `keep`, ascending, and what comes up to a whole vector; returns how many there
/// are.
HWY_INLINE HWY_ATTR std::int64_t pack_ids(std::int32_t first, hn::Mask<FloatTag> keep, std::int32_t* to) {
  const FloatTag df;
  const IdTag di;
#if HWY_TARGET == HWY_AVX3
  const auto ids = hn::Add(hn::Set(di, first), hn::Iota(di, 0));
  hn::StoreU(hn::Compress(ids, hn::RebindMask(di, keep)), di, to);
  return static_cast<std::int64_t>(hn::CountTrue(df, keep));
#else
  // Highway's Compress looks a permutation up; consecutive ids need none, the list itself will do.
  static_assert(HWY_MAX_BYTES / sizeof(float) <= 8);
  const hn::Rebind<std::uint8_t, IdTag> d8;
  std::uint8_t bits[8] = {};
  hn::StoreMaskBits(df, keep, bits);
  const auto lanes = hn::PromoteTo(di, hn::LoadU(d8, kLaneLists.lanes[bits[0]]));
  hn::StoreU(hn::Add(hn::Set(di, first), lanes), di, to);
  return std::popcount(bits[0]);
#endif
}

/// Ids of scores that may be among a row's topk, ascending: written by the caller to the end of `ids`, cut back to the
/// best topk when more than kCapacity are there.
struct Survivors {
  static constexpr std::int64_t kCapacity = 512;  // twice what the first pass leaves of random scores at topk 64
  static constexpr int kVectors = 4;              // that the caller may add before it looks at the count
  static constexpr std::int64_t kSpace = kCapacity + (kVectors + 1) * 16;

  std::int32_t ids[kSpace];
  std::int32_t keys[kSpace];
};

HWY_INLINE HWY_ATTR std::int64_t count_reaching(const std::int32_t* keys, std::int64_t count, std::int32_t key) {
  const IdTag di;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(di));
  const auto below = hn::Set(di, key - 1);  // no score's key is the least integer: no overflow
  std::size_t reaching = 0;
  for (std::int64_t i = 0; i < count; i += lanes) reaching += hn::CountTrue(di, hn::Gt(hn::LoadU(di, keys + i), below));
  return static_cast<std::int64_t>(reaching);
}

/// Keeps the topk best of `count` > topk survivors, ties to the lower id. Returns the score that a later one must reach
/// to be among them: the next number above the worst kept; NaN, which nothing reaches, above +inf.
inline HWY_ATTR float keep_best(Survivors& survivors, std::int64_t count, const float* scores, std::int64_t topk) {
  constexpr std::int32_t kBelowAll = std::numeric_limits<std::int32_t>::min();
  const IdTag di;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(di));
  std::int32_t* ids = survivors.ids;
  std::int32_t* keys = survivors.keys;
  auto most = hn::Set(di, kBelowAll);
  auto least = hn::Set(di, std::numeric_limits<std::int32_t>::max());
  for (std::int64_t i = 0; i < count; i += lanes) {
    const auto valid = hn::FirstN(di, static_cast<std::size_t>(count - i));
    const auto here = hn::IfThenElseZero(valid, hn::LoadU(di, ids + i));
    const auto found = order_keys(hn::GatherIndex(FloatTag(), scores, here));
    const auto padded = hn::IfThenElse(valid, found, hn::Set(di, kBelowAll));  // behind the last: never counted
    hn::StoreU(padded, di, keys + i);
    most = hn::Max(most, padded);
    least = hn::Min(least, hn::IfThenElse(valid, found, least));
  }
  // At least topk keys reach `low`, fewer than topk reach high + 1. The bits of floats are spread like their
  // logarithms, so halving the range finds the gap below the topk-th key in a few steps; a tie there takes all of them.
  std::int64_t low = hn::GetLane(hn::MinOfLanes(di, least));
  std::int64_t high = hn::GetLane(hn::MaxOfLanes(di, most));
  std::int64_t reached = count;
  while (low < high && reached != topk) {
    const std::int64_t middle = low + (high - low + 1) / 2;
    const std::int64_t reaching = count_reaching(keys, count, static_cast<std::int32_t>(middle));
    if (reaching >= topk) {
      low = middle;
      reached = reaching;
    } else {
      high = middle - 1;
    }
  }
  const auto worst = static_cast<std::int32_t>(low);
  std::int64_t kept = 0;
  if (reached == topk) {
#if HWY_TARGET == HWY_AVX3
    const auto below = hn::Set(di, worst - 1);
    for (std::int64_t i = 0; i < count; i += lanes) {  // the packed vector goes over ones that were read already
      const auto keep = hn::Gt(hn::LoadU(di, keys + i), below);
      hn::StoreU(hn::Compress(hn::LoadU(di, ids + i), keep), di, ids + kept);
      kept += static_cast<std::int64_t>(hn::CountTrue(di, keep));
    }
#else
    for (std::int64_t i = 0; i < count; ++i) {
      ids[kept] = ids[i];
      kept += keys[i] >= worst ? 1 : 0;
    }
#endif
  } else {
    std::int64_t room = topk - count_reaching(keys, count, worst + 1);  // for keys equal to the worst
    for (std::int64_t i = 0; i < count; ++i) {
      const bool tie = keys[i] == worst && room > 0;
      ids[kept] = ids[i];
      kept += keys[i] > worst || tie ? 1 : 0;
      room -= tie ? 1 : 0;
    }
  }
  return score_of_key(worst + 1);
}

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

/// One row: more than topk scores, ids [topk]. `next` is the row that follows, fetched while this one is compared.
template <int kVecs>
HWY_ATTR void topk_row(const float* HWY_RESTRICT row, const float* next, std::int64_t blocks, std::int64_t topk,
                       std::int32_t* out) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const std::int64_t whole = blocks / lanes * lanes;
  float tail[16];
  std::fill(std::copy(row + whole, row + blocks, tail), tail + 16, std::numeric_limits<float>::quiet_NaN());

  Survivors survivors;
  std::int64_t count = 0;
  auto bound = hn::Set(df, bound_of_best<kVecs>(row, whole, tail));
  const auto pack = [&](const float* scores, std::int64_t first) {
    const auto keep = hn::Ge(hn::LoadU(df, scores), bound);
    count += pack_ids(static_cast<std::int32_t>(first), keep, survivors.ids + count);
  };
  std::int64_t i = 0;
  for (; i + Survivors::kVectors * lanes <= whole; i += Survivors::kVectors * lanes) {
    unroll<Survivors::kVectors>([&](auto v) {
      if (v * lanes % 16 == 0) hwy::Prefetch(next + i + v * lanes);
      pack(row + i + v * lanes, i + v * lanes);
    });
    if (count > Survivors::kCapacity) {
      bound = hn::Set(df, keep_best(survivors, count, row, topk));
      count = topk;
    }
  }
  for (; i < whole; i += lanes) pack(row + i, i);
  pack(tail, whole);

  if (count > topk) {
    keep_best(survivors, count, row, topk);
  } else if (count < topk) {  // fewer numbers than topk: NaN, lowest ids first
    for (std::int64_t b = 0; count < topk; ++b) {
      if (std::isnan(row[b])) survivors.ids[count++] = static_cast<std::int32_t>(b);
    }
    std::sort(survivors.ids, survivors.ids + topk);
  }
  std::copy(survivors.ids, survivors.ids + topk, out);
}

template <int kVecs>
HWY_ATTR void topk_rows_of(const float* scores, std::int64_t row_stride, std::int64_t rows, std::int64_t blocks,
                           std::int64_t topk, std::int32_t* ids, std::int64_t ids_stride) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = scores + r * row_stride;
    topk_row<kVecs>(row, r + 1 < rows ? row + row_stride : row, blocks, topk, ids + r * ids_stride);
  }
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
