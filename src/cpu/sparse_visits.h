// SPDX-License-Identifier: Apache-2.0
// The selections of a chunk turned round: (block, query) pairs as single numbers, sorted, so that blocks ascend and
// within a block queries do. Tested through sparse_attention.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>

#include "src/core/layout.h"
#include "src/cpu/attention.h"
#include "src/cpu/topk.h"

namespace msa::cpu {

inline std::int64_t visit_block(std::uint64_t visit) { return static_cast<std::int64_t>(visit >> 32); }
/// Counted from the chunk's begin.
inline std::int32_t visit_query(std::uint64_t visit) { return static_cast<std::int32_t>(visit & 0xffffffffu); }

/// Visits of ascending queries to ascending blocks, a byte of the block ids at a time. `spare` has room for as many;
/// `largest` is the largest id.
inline void sort_by_block(std::uint64_t* visits, std::uint64_t* spare, std::int64_t count, std::int64_t largest) {
  if (count < 64) {  // less than what counting takes
    std::sort(visits, visits + count);
    return;
  }
  std::uint64_t* from = visits;
  std::uint64_t* to = spare;
  for (int shift = 32; largest > 0; shift += 8, largest >>= 8) {
    std::int64_t places[256] = {};
    for (std::int64_t v = 0; v < count; ++v) ++places[from[v] >> shift & 0xff];
    std::exclusive_scan(places, places + 256, places, std::int64_t{0});
    for (std::int64_t v = 0; v < count; ++v) to[places[from[v] >> shift & 0xff]++] = from[v];
    std::swap(from, to);
  }
  if (from != visits) std::copy(from, from + count, visits);
}

/// Room that sort_visits takes, in visits.
inline std::int64_t visit_room(std::int64_t queries, std::int64_t topk) { return 2 * queries * topk; }

/// Fills visits, which has visit_room; returns how many there are.
inline std::int64_t sort_visits(const AttentionInput& input, const QueryChunk& chunk, std::int64_t kv_head,
                                std::uint64_t* visits) {
  const std::int64_t first_row = core::get_sequence(input.batch, chunk.sequence).query_begin + chunk.begin;
  std::int64_t count = 0;
  std::int32_t largest = 0;
  for (std::int64_t i = 0; i < chunk.end - chunk.begin; ++i) {
    const std::int32_t* ids = block_row(input.blocks, kv_head, first_row + i);
    for (std::int64_t slot = 0; slot < input.shape.topk; ++slot) {
      if (ids[slot] < 0) continue;
      visits[count++] = static_cast<std::uint64_t>(ids[slot]) << 32 | static_cast<std::uint64_t>(i);
      largest = std::max(largest, ids[slot]);
    }
  }
  sort_by_block(visits, visits + count, count, largest);
  return count;
}

/// The visits from `first` on that are to the same block end here.
inline std::int64_t end_of_block(const std::uint64_t* visits, std::int64_t first, std::int64_t count) {
  std::int64_t last = first;
  while (last < count && visit_block(visits[last]) == visit_block(visits[first])) ++last;
  return last;
}

/// Calls body(block, first, last, next) for every block in turn: visits [first, last) are its.
template <class Body>
void for_each_block(const std::uint64_t* visits, std::int64_t count, const Body& body) {
  std::int64_t first = 0;
  for (std::int64_t last = end_of_block(visits, first, count); first < count;) {
    const std::int64_t end = end_of_block(visits, last, count);
    NextBlock next;
    if (last < end) next = {visit_block(visits[last]), visits + last, end - last};
    body(visit_block(visits[first]), first, last, next);
    first = last;
    last = end;
  }
}

}  // namespace msa::cpu
