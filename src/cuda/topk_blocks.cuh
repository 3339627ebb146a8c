// SPDX-License-Identifier: Apache-2.0
// Top-k of rows of float32 scores, a warp a row, every score read once. Each lane holds 32 scores of a piece of 1024 in
// registers. The maxima of groups of 8 give a bound that at least topk scores of the first piece reach; what reaches it
// goes, in the order of the ids, to a short list in shared memory; when the list is full it is cut back to the best
// topk, and the bound rises. Ranking bisects on the scores' bits until exactly topk are above. No exponential, no sort.
// Any input takes bounded time: a piece of which too much reaches the bound is cut to its best topk in registers first.
// docs/cuda-select-blocks.md counts the instructions. Tested in tests/cuda/topk_blocks_test.cc.
#pragma once

#include "src/cuda/device.cuh"
#include "src/cuda/topk_blocks.h"

namespace msa::cuda {

/// Scores that may be among the best of a warp's row, ascending by id.
struct TopkSurvivors {
  static constexpr int kCapacity = 256;  // random scores leave topk to 2 topk of a piece: a cut every few pieces

  std::uint32_t keys[kCapacity];
  std::int32_t ids[kCapacity];
};

/// Unsigned integers in the order of the scores, -0 as +0. Not for NaN. No score's key is 0 or the largest integer.
__device__ __forceinline__ std::uint32_t order_key(float score) {
  const std::uint32_t bits = __float_as_uint(score + 0.0f);  // -0 + 0 = +0
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
/// The score with this key; NaN, which nothing reaches, for the key above +inf's.
__device__ __forceinline__ float score_of_key(std::uint32_t key) {
  return __uint_as_float(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

/// A key that `reached` >= wanted keys of a set reach.
struct TopkCut {
  std::uint32_t key;
  int reached;
};

/// Raises the cut from `low`, which all `count` keys reach, until at most `enough` reach it or only keys equal to it
/// could be dropped. The bits of floats are spread like their logarithms, so halving finds a gap in a few steps.
template <class CountReaching>
__device__ __forceinline__ TopkCut find_cut(std::uint32_t low, std::uint32_t high, int count, int wanted, int enough,
                                            CountReaching count_reaching) {
  TopkCut cut{low, count};
  while (cut.key < high && cut.reached > enough) {
    const std::uint32_t middle = cut.key + (high - cut.key + 1) / 2;
    const int reached = count_reaching(middle);
    if (reached >= wanted) {
      cut = {middle, reached};
    } else {
      high = middle - 1;
    }
  }
  return cut;
}

/// Keeps the topk best of `count` >= topk survivors, equal ones by lower id; they stay in order. Returns the least key
/// kept. A lane holds kWindows keys.
template <int kWindows>
__device__ __forceinline__ std::uint32_t keep_best_of(TopkSurvivors& survivors, int count, int topk, int lane) {
  std::uint32_t keys[kWindows];
  std::uint32_t low = 0xffffffffu;
  std::uint32_t high = 0;
  __syncwarp();
#pragma unroll
  for (int w = 0; w < kWindows; ++w) {
    const int i = w * kWarpSize + lane;
    keys[w] = i < count ? survivors.keys[i] : 0;
    low = i < count ? min_of(low, keys[w]) : low;
    high = max_of(high, keys[w]);
  }
  const auto count_reaching = [&](std::uint32_t key) {
    int reaching = 0;
#pragma unroll
    for (int w = 0; w < kWindows; ++w) reaching += keys[w] >= key ? 1 : 0;
    return __reduce_add_sync(kFullMask, reaching);
  };
  const TopkCut cut = find_cut(__reduce_min_sync(kFullMask, low), __reduce_max_sync(kFullMask, high), count, topk, topk,
                               count_reaching);
  // More than topk at the cut: it is the key of the worst kept, and of those equal to it the first ones stay.
  const bool tied = cut.reached > topk;
  const int room = tied ? topk - count_reaching(cut.key + 1) : topk;
  const std::uint32_t lanes_below = (1u << lane) - 1;
  std::uint32_t worst = 0xffffffffu;
  int kept = 0;
  int equal = 0;
#pragma unroll
  for (int w = 0; w < kWindows; ++w) {
    if (w * kWarpSize >= count) break;
    const int i = w * kWarpSize + lane;
    const std::int32_t id = i < count ? survivors.ids[i] : 0;
    const bool at_cut = tied && keys[w] == cut.key;
    const std::uint32_t at_cuts = __ballot_sync(kFullMask, at_cut);
    const bool keep = keys[w] >= cut.key && (!at_cut || equal + __popc(at_cuts & lanes_below) < room);
    const std::uint32_t keeps = __ballot_sync(kFullMask, keep);
    __syncwarp();  // the places written now were read before
    if (keep) {
      const int place = kept + __popc(keeps & lanes_below);
      survivors.keys[place] = keys[w];
      survivors.ids[place] = id;
      worst = min_of(worst, keys[w]);
    }
    kept += __popc(keeps);
    equal += __popc(at_cuts);
  }
  __syncwarp();
  return __reduce_min_sync(kFullMask, worst);
}

__device__ inline std::uint32_t keep_best(TopkSurvivors& survivors, int count, int topk, int lane) {
  constexpr int kFew = 2;  // what one piece leaves at topk 32, random scores: half the instructions
  return count <= kFew * kWarpSize ? keep_best_of<kFew>(survivors, count, topk, lane)
                                   : keep_best_of<TopkSurvivors::kCapacity / kWarpSize>(survivors, count, topk, lane);
}

/// A piece of a row in registers: lane l holds the scores first + 128 v + 4 l + c, in values[4 v + c].
template <int kVectors>
struct TopkPiece {
  static constexpr int kScores = 4 * kVectors;  // a lane
  static constexpr int kWidth = kScores * kWarpSize;

  float values[kScores];

  static __device__ __forceinline__ std::uint32_t offset(int i, int lane) {
    return static_cast<std::uint32_t>(i / 4 * 128 + lane * 4 + i % 4);
  }

  /// Scores outside [begin, end) become NaN and are not read. row + first is aligned to 16 bytes.
  __device__ __forceinline__ void load(const float* row, std::uint32_t first, std::uint32_t begin, std::uint32_t end,
                                       int lane) {
    if (first >= begin && first + kWidth <= end) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float4 four = *reinterpret_cast<const float4*>(row + first + offset(4 * v, lane));
        values[4 * v] = four.x;
        values[4 * v + 1] = four.y;
        values[4 * v + 2] = four.z;
        values[4 * v + 3] = four.w;
      }
      return;
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const std::uint32_t at = first + offset(4 * v, lane);
      float4 four = make_float4(quiet_nan(), quiet_nan(), quiet_nan(), quiet_nan());
      if (at >= begin && at + 4 <= end) {
        four = *reinterpret_cast<const float4*>(row + at);
      } else {
        if (at >= begin && at < end) four.x = row[at];
        if (at + 1 >= begin && at + 1 < end) four.y = row[at + 1];
        if (at + 2 >= begin && at + 2 < end) four.z = row[at + 2];
        if (at + 3 >= begin && at + 3 < end) four.w = row[at + 3];
      }
      values[4 * v] = four.x;
      values[4 * v + 1] = four.y;
      values[4 * v + 2] = four.z;
      values[4 * v + 3] = four.w;
    }
  }

  /// Bit i: values[i] reaches the bound. NaN reaches nothing.
  __device__ __forceinline__ std::uint32_t reaching(float bound) const {
    std::uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kScores; ++i) mask |= values[i] >= bound ? 1u << i : 0u;
    return mask;
  }

  /// A score that at least topk scores of the piece reach, -inf when there may be fewer: the topk-th of 128 maxima of
  /// groups, or one up to a quarter further down, which saves half of the steps.
  __device__ __forceinline__ float bound_of_best(int topk) const {
    constexpr int kGroups = 4;  // a lane: 128 groups, twice the largest topk
    std::uint32_t keys[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float most = -infinity();
#pragma unroll
      for (int i = 0; i < kScores / kGroups; ++i) most = fmaxf(most, values[g * (kScores / kGroups) + i]);
      keys[g] = order_key(most);
    }
    const std::uint32_t low = min_of(min_of(keys[0], keys[1]), min_of(keys[2], keys[3]));
    const std::uint32_t high = max_of(max_of(keys[0], keys[1]), max_of(keys[2], keys[3]));
    const TopkCut cut = find_cut(__reduce_min_sync(kFullMask, low), __reduce_max_sync(kFullMask, high),
                                 kGroups * kWarpSize, topk, topk + topk / 4, [&](std::uint32_t key) {
                                   int reaching = 0;
#pragma unroll
                                   for (int g = 0; g < kGroups; ++g) reaching += keys[g] >= key ? 1 : 0;
                                   return __reduce_add_sync(kFullMask, reaching);
                                 });
    return score_of_key(cut.key);
  }

  /// Calls body(i, rank) for every bit i of the warp's masks, rank counting them in the order of the ids; returns how
  /// many there are. Counts of the vectors, at most 128 each, are summed over the lanes as bytes of two words.
  template <class Body>
  static __device__ __forceinline__ int for_each_in_order(std::uint32_t mask, int lane, Body body) {
    std::uint32_t pairs = mask - ((mask >> 1) & 0x55555555u);
    pairs = (pairs & 0x33333333u) + ((pairs >> 2) & 0x33333333u);
    const std::uint32_t own[2] = {pairs & 0x0f0f0f0fu, (pairs >> 4) & 0x0f0f0f0fu};  // even vectors, odd vectors
    std::uint32_t sums[2] = {own[0], own[1]};
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        const std::uint32_t other = __shfl_up_sync(kFullMask, sums[word], static_cast<unsigned>(distance));
        sums[word] += lane >= distance ? other : 0u;
      }
    }
    const std::uint32_t totals[2] = {__shfl_sync(kFullMask, sums[0], kWarpSize - 1),
                                     __shfl_sync(kFullMask, sums[1], kWarpSize - 1)};
    int base = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int shift = v / 2 * 8;
      int rank = base + static_cast<int>(((sums[v % 2] - own[v % 2]) >> shift) & 0xffu);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if ((mask >> (4 * v + c) & 1u) != 0) body(4 * v + c, rank++);
      }
      base += static_cast<int>((totals[v % 2] >> shift) & 0xffu);
    }
    return base;
  }

  /// Of the `count` > topk scores of the masks, those of the best topk, equal ones by lower id.
  __device__ inline std::uint32_t keep_best(std::uint32_t mask, int count, int topk, int lane) const {
    float least = infinity();
    float most = -infinity();
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      if ((mask >> i & 1u) != 0) {
        least = fminf(least, values[i]);
        most = fmaxf(most, values[i]);
      }
    }
    const auto count_reaching = [&](std::uint32_t key) {
      return __reduce_add_sync(kFullMask, __popc(mask & reaching(score_of_key(key))));
    };
    const TopkCut cut = find_cut(__reduce_min_sync(kFullMask, order_key(least)),
                                 __reduce_max_sync(kFullMask, order_key(most)), count, topk, topk, count_reaching);
    const std::uint32_t at_least = mask & reaching(score_of_key(cut.key));
    if (cut.reached == topk) return at_least;
    std::uint32_t keep = mask & reaching(score_of_key(cut.key + 1));
    const int room = topk - __reduce_add_sync(kFullMask, __popc(keep));
    for_each_in_order(at_least & ~keep, lane, [&](int i, int rank) { keep |= rank < room ? 1u << i : 0u; });
    return keep;
  }
};

/// Adds the lowest ids of NaN scores until there are topk ids, and sorts all.
__device__ inline void fill_with_nan(TopkSurvivors& survivors, const float* row, std::uint32_t begin, std::uint32_t end,
                                     int count, int topk, int lane) {
  for (std::uint32_t first = begin; count < topk && first < end; first += kWarpSize) {
    const std::uint32_t at = first + static_cast<std::uint32_t>(lane);
    const bool is_nan = at < end && row[at] != row[at];
    const std::uint32_t nans = __ballot_sync(kFullMask, is_nan);
    const int place = count + __popc(nans & ((1u << lane) - 1));
    if (is_nan && place < topk) survivors.ids[place] = static_cast<std::int32_t>(at);
    count = min_of(topk, count + __popc(nans));
  }
  __syncwarp();
  std::int32_t ids[2];
  int ranks[2];
  for (int half = 0; half < 2; ++half) {
    const int i = half * kWarpSize + lane;
    ids[half] = i < count ? survivors.ids[i] : 0;
    ranks[half] = 0;
    for (int other = 0; other < count; ++other) ranks[half] += survivors.ids[other] < ids[half] ? 1 : 0;
  }
  __syncwarp();
  for (int half = 0; half < 2; ++half) {
    if (half * kWarpSize + lane < count) survivors.ids[ranks[half]] = ids[half];
  }
}

/// Ids of the topk best of row[begin, end), ascending, to survivors.ids; returns how many there are, topk or fewer. All
/// lanes of a warp call it; row is aligned to 16 bytes; begin <= end < 2^31 + 4.
template <int kVectors>
__device__ inline int warp_topk(const float* row, std::uint32_t begin, std::uint32_t end, int topk,
                                TopkSurvivors& survivors, int lane) {
  using Piece = TopkPiece<kVectors>;
  const auto available = static_cast<int>(end - begin);
  if (available <= topk) {
    for (int i = lane; i < available; i += kWarpSize) survivors.ids[i] = static_cast<std::int32_t>(begin) + i;
    __syncwarp();
    return available;
  }
  int count = 0;
  float bound = quiet_nan();
  bool has_bound = false;
  for (std::uint32_t first = begin / 4 * 4; first < end; first += Piece::kWidth) {
    Piece piece;
    piece.load(row, first, begin, end, lane);
    if (!has_bound) {
      bound = piece.bound_of_best(topk);
      has_bound = true;
    }
    std::uint32_t mask = piece.reaching(bound);
    int added = __reduce_add_sync(kFullMask, __popc(mask));
    if (added == 0) continue;
    if (count + added > TopkSurvivors::kCapacity && count >= topk) {
      bound = score_of_key(keep_best(survivors, count, topk, lane) + 1);  // a later id must be above the worst
      count = topk;
      piece.load(row, first, begin, end, lane);  // from the cache: 32 registers free for the keys of the list
      mask = piece.reaching(bound);
      added = __reduce_add_sync(kFullMask, __popc(mask));
    }
    if (count + added > TopkSurvivors::kCapacity) {
      mask = piece.keep_best(mask, added, topk, lane);
      added = topk;
    }
    Piece::for_each_in_order(mask, lane, [&](int i, int rank) {
      survivors.keys[count + rank] = order_key(piece.values[i]);
      survivors.ids[count + rank] = static_cast<std::int32_t>(first + Piece::offset(i, lane));
    });
    count += added;
  }
  if (count > topk) {
    keep_best(survivors, count, topk, lane);
  } else if (count < topk) {  // fewer numbers than topk
    __syncwarp();
    fill_with_nan(survivors, row, begin, end, count, topk, lane);
  }
  __syncwarp();
  return topk;
}

/// A warp of the grid takes every gridDim.x * kTopkWarps-th row.
template <int kVectors>
__global__ void __launch_bounds__(kTopkWarps* kWarpSize, kTopkBlocksPerProcessor)
    topk_blocks_kernel(const float* scores, std::int64_t row_stride, std::int64_t rows, std::uint32_t blocks, int topk,
                       std::int32_t* ids, std::int64_t ids_stride) {
  __shared__ TopkSurvivors survivors[kTopkWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * kTopkWarps + warp; r < rows;
       r += static_cast<std::int64_t>(gridDim.x) * kTopkWarps) {
    // Loads of 16 bytes: a row that starts between two is one that starts at the first of them and has lower ids to
    // leave out.
    const float* row = scores + r * row_stride;
    const auto skip = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(row) % 16 / sizeof(float));
    const int count = warp_topk<kVectors>(row - skip, skip, skip + blocks, topk, survivors[warp], lane);
    std::int32_t* out = ids + r * ids_stride;
    for (int i = lane; i < topk; i += kWarpSize)
      out[i] = i < count ? survivors[warp].ids[i] - static_cast<std::int32_t>(skip) : -1;
    __syncwarp();
  }
}

}  // namespace msa::cuda
