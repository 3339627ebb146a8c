// SPDX-License-Identifier: Apache-2.0
// The lists of reverse_index.cuh in ascending order of their queries, for kernels whose sums run over a list. Tested in
// tests/cuda/reverse_index_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cuda/reverse_index.cuh"

namespace msa::cuda {

/// Sum of `mine` over the threads before this one, and over all of a block of kIndexThreads.
__device__ inline std::int32_t sum_before(std::int32_t mine, std::int32_t& total) {
  constexpr std::int32_t kWarps = kIndexThreads / kWarpSize;
  __shared__ std::int32_t sums[kWarps];
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::int32_t warp = static_cast<std::int32_t>(threadIdx.x / kWarpSize);
  std::int32_t sum = mine;  // of the warp's lanes up to this one
  for (int step = 1; step < kWarpSize; step *= 2) {
    const std::int32_t other = __shfl_up_sync(kFullMask, sum, static_cast<unsigned>(step));
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == kWarpSize - 1) sums[warp] = sum;
  __syncthreads();
  std::int32_t earlier = 0;
  total = 0;
  for (std::int32_t w = 0; w < kWarps; ++w) {
    if (w < warp) earlier += sums[w];
    total += sums[w];
  }
  return earlier + sum - mine;
}

/// Query of an entry of a sorted list that is no visit. Only ids that were never checked, with a block twice in a row
/// of them, make such entries, at the list's end.
inline constexpr std::int32_t kNoQuery = 0x7fffffff;
inline constexpr std::int32_t kSortSpan = 1 << 17;  ///< queries a look at a list: a bit each, and a count a word

/// Shared memory that sort_visits takes.
constexpr std::size_t sort_shared_bytes(std::int64_t queries, std::int32_t span) {
  const std::int64_t words = ceil_div(min_of(queries, std::int64_t{span}), std::int64_t{32});
  return static_cast<std::size_t>(round_up(words, std::int64_t{kIndexThreads})) * 8;
}

/// Writes the lists that place_visits made to `sorted`, at the same places, in ascending order of their queries. One
/// block of kIndexThreads a list: `span` queries at a time, a multiple of 32, those that are in it become bits, and a
/// visit's place is the number of bits before its own. A list names a query once.
[[maybe_unused]] static __global__ void sort_visits(ReverseIndex a, Visit* sorted, std::int32_t span) {
  const std::int32_t bin = static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t thread = static_cast<std::int32_t>(threadIdx.x);
  constexpr std::int32_t kThreads = kIndexThreads;
  const std::int32_t begin = bin == 0 ? 0 : a.counts[bin - 1], end = a.counts[bin];  // places are the lists' ends now
  if (begin == end) return;
  const std::int32_t words = round_up(ceil_div(min_of(a.queries, span), 32), kThreads);
  auto* bits = reinterpret_cast<std::uint32_t*>(shared_memory());
  auto* before = reinterpret_cast<std::int32_t*>(bits + words);  // set bits of the words before
  const std::int32_t each = words / kThreads;

  std::int32_t place = begin;
  for (std::int32_t low = 0; low < a.queries && place < end; low += span) {
    const std::int32_t first = a.first_query + low;
    __syncthreads();
    for (std::int32_t word = thread; word < words; word += kThreads) bits[word] = 0;
    __syncthreads();
    for (std::int32_t i = begin + thread; i < end; i += kThreads) {
      const std::int32_t at = a.visits[i].query - first;
      if (at >= 0 && at < span) atomicOr(bits + at / 32, 1u << (at % 32));
    }
    __syncthreads();
    std::int32_t mine = 0;
    for (std::int32_t word = thread * each; word < (thread + 1) * each; ++word) {
      before[word] = mine;
      mine += __popc(bits[word]);
    }
    std::int32_t total = 0;
    const std::int32_t earlier = sum_before(mine, total);
    for (std::int32_t word = thread * each; word < (thread + 1) * each; ++word) before[word] += earlier;
    __syncthreads();
    for (std::int32_t i = begin + thread; i < end; i += kThreads) {
      const Visit visit = a.visits[i];
      const std::int32_t at = visit.query - first;
      if (at < 0 || at >= span) continue;
      sorted[place + before[at / 32] + __popc(bits[at / 32] & ((1u << (at % 32)) - 1))] = visit;
    }
    place += total;
  }
  for (std::int32_t i = place + thread; i < end; i += kThreads) sorted[i] = Visit{kNoQuery, 0};
}

}  // namespace msa::cuda
