// SPDX-License-Identifier: Apache-2.0
// The best few blocks of a row, kept while scores stream by (SPEC section 2, rules 1 to 4): a sorted list in shared
// memory that one thread owns. Tested through select_blocks in tests/cuda/generic_select_test.cc.
#pragma once

#include "src/cuda/generic/rows.cuh"

namespace msa::cuda::generic {

/// Order of scores as that of unsigned numbers: NaN below every number, -inf included; -0 is +0.
__device__ inline std::uint32_t order_of(float score) {
  if (score != score) return 0;
  const std::uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
/// The score again; NaN for 0.
__device__ inline float score_of(std::uint32_t order) {
  if (order == 0) return quiet_nan();
  return __uint_as_float((order >> 31) != 0 ? order & 0x7fffffffu : ~order);
}

/// Score above, complement of the id below: the largest entry is the highest score and, among equals, the lowest id.
class TopList {
 public:
  /// `entries` holds `slots` words in memory that one thread writes.
  __device__ TopList(std::uint64_t* entries, int slots) : entries_(entries), slots_(slots) {}
  __device__ void offer(std::uint32_t order, int block) {
    const std::uint64_t entry = static_cast<std::uint64_t>(order) << 32 | ~static_cast<std::uint32_t>(block);
    if (size_ == slots_ && (slots_ == 0 || entry < entries_[size_ - 1])) return;
    int at = size_ < slots_ ? size_++ : slots_ - 1;
    for (; at > 0 && entries_[at - 1] < entry; --at) entries_[at] = entries_[at - 1];
    entries_[at] = entry;
  }
  __device__ int size() const { return size_; }
  __device__ int block(int i) const { return static_cast<int>(~static_cast<std::uint32_t>(entries_[i])); }
  __device__ float score(int i) const { return score_of(static_cast<std::uint32_t>(entries_[i] >> 32)); }

 private:
  std::uint64_t* entries_;
  int slots_;
  int size_ = 0;
};

/// Which blocks a row with `visible` blocks must take and how many slots are left to the scores: core::forced_blocks().
struct Choice {
  int init_end = 0;
  int local_begin = 0;
  int slots = 0;
  __device__ bool is_forced(int block) const { return block < init_end || block >= local_begin; }
};
/// With as many slots as visible blocks all are taken, scores or not.
__device__ inline Choice choose(int visible, int topk, int local_blocks, int init_blocks) {
  Choice choice;
  const int local = min_of(min_of(local_blocks, topk), visible);
  choice.local_begin = visible - local;
  choice.init_end = min_of(min_of(init_blocks, choice.local_begin), topk - local);
  choice.slots = topk - local - choice.init_end;
  if (visible <= topk) choice = {visible, visible, 0};
  return choice;
}

/// Writes a row of int32 [topk]: forced and listed blocks, ascending, -1 behind them. By one thread; `ids` is scratch
/// for topk ints.
__device__ inline void write_chosen(std::int32_t* to, int topk, int visible, const Choice& choice, const TopList& list,
                                    int* ids) {
  int count = 0;
  const auto insert = [&](int block) {
    int at = count++;
    for (; at > 0 && ids[at - 1] > block; --at) ids[at] = ids[at - 1];
    ids[at] = block;
  };
  for (int b = 0; b < choice.init_end; ++b) insert(b);
  for (int b = choice.local_begin; b < visible; ++b) insert(b);
  for (int i = 0; i < list.size(); ++i) insert(list.block(i));
  for (int i = 0; i < topk; ++i) to[i] = i < count ? ids[i] : -1;
}

}  // namespace msa::cuda::generic
