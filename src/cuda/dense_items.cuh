// SPDX-License-Identifier: Apache-2.0
// The work of dense attention in items, and their order: tiles of neighbouring query rows of a sequence, with all the
// keys they see or a span of them, those with most keys first. Tested in tests/cuda/dense_attention_test.cc.
#pragma once

#include <cstdint>

#include "src/cuda/batch.cuh"
#include "src/cuda/dense_attention.h"

namespace msa::cuda {

/// Neighbouring query rows of one sequence and a stretch of its keys; for every kv head.
struct alignas(16) DenseItem {
  std::int32_t first_query, count;  ///< count -1: there is no more
  std::int32_t sequence;            ///< -1: rows behind the last one
  std::int32_t first_key, end;      ///< end: behind the last key that a row of it sees
  std::int32_t whole;               ///< keys below it are seen by every row
  std::int32_t offset;              ///< of a row's position from its number, where positions are not given
  std::int32_t kv_head;             ///< filled in by who takes the item
};
struct DenseTotals {
  std::int32_t items;
  std::int32_t next;  ///< first pair (item, kv head) nobody took yet
};

inline constexpr int kOrderThreads = 1024;

struct DenseOrder {
  BatchView batch;
  DenseItem* items;
  DenseTotals* totals;
  std::int32_t first_query, queries;  ///< of this chunk
  std::int32_t positions;             ///< a tile
  std::int32_t span_keys;             ///< an item; beyond every length: items take all keys
  std::int32_t most_items;            ///< the room of the list, which unchecked sequence bounds cannot overrun
  std::int32_t bucket_shift;          ///< key tiles >> bucket_shift is less than kOrderThreads
  bool is_split;                      ///< items are spans; a tile without keys needs none
};

/// body(item) for the tiles that begin at this thread's query rows.
template <class Body>
__device__ void for_each_item(const DenseOrder& a, const Body& body) {
  const std::int32_t chunk_end = a.first_query + a.queries;
  for (std::int32_t row = a.first_query + static_cast<std::int32_t>(threadIdx.x); row < chunk_end;
       row += kOrderThreads) {
    const std::int32_t s = a.batch.sequence_of(row);
    const std::int32_t begin = max_of(a.first_query, s < 0 ? a.batch.queries() : a.batch.cu_seqlens_q[s]);
    if ((row - begin) % a.positions != 0) continue;
    const std::int32_t end = s < 0 ? chunk_end : min_of(chunk_end, a.batch.cu_seqlens_q[s + 1]);
    DenseItem item{};
    item.first_query = row;
    item.count = min_of(a.positions, end - row);
    item.sequence = s;
    item.whole = a.batch.place(row).position + 1;
    if (s >= 0) item.offset = a.batch.keys(s) - a.batch.cu_seqlens_q[s + 1];
    const std::int32_t keys = a.batch.place(row + item.count - 1).position + 1;
    if (keys == 0 && !a.is_split) body(item);  // its rows are written all the same
    for (std::int32_t key = 0; key < keys; key += a.span_keys) {
      item.first_key = key;
      item.end = keys - key < a.span_keys ? keys : key + a.span_keys;
      body(item);
    }
  }
}

/// One block of threads: lists the items, those with most keys first, so that the last to finish are short ones.
/// Among about equals the order is whatever the threads make it; no result depends on it.
[[maybe_unused]] static __global__ void __launch_bounds__(kOrderThreads) order_items(DenseOrder a) {
  __shared__ std::int32_t places[kOrderThreads];
  const std::int32_t thread = static_cast<std::int32_t>(threadIdx.x);
  const auto bucket_of = [&](const DenseItem& item) {
    const std::int32_t tiles = ceil_div(item.end - item.first_key, static_cast<std::int32_t>(kDenseTileKeys));
    return max_of(0, kOrderThreads - 1 - (tiles >> a.bucket_shift));
  };
  places[thread] = 0;
  __syncthreads();
  for_each_item(a, [&](const DenseItem& item) { atomicAdd(places + bucket_of(item), 1); });
  __syncthreads();
  const std::int32_t own = places[thread];
  for (std::int32_t step = 1; step < kOrderThreads; step *= 2) {
    const std::int32_t more = thread >= step ? places[thread - step] : 0;
    __syncthreads();
    places[thread] += more;
    __syncthreads();
  }
  if (thread == kOrderThreads - 1) *a.totals = {min_of(places[thread], a.most_items), 0};
  const std::int32_t before = places[thread] - own;
  __syncthreads();
  places[thread] = before;
  __syncthreads();
  for_each_item(a, [&](const DenseItem& item) {
    const std::int32_t place = atomicAdd(places + bucket_of(item), 1);
    if (place < a.most_items) a.items[place] = item;
  });
}

}  // namespace msa::cuda
