// SPDX-License-Identifier: Apache-2.0
// How many queries, or heads, an operator takes at once when its workspace is limited: the search by which every plan
// keeps to Context::workspace_limit. Host arithmetic. Tested in tests/cuda/workspace_limit_test.cc.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace msa::cuda {

/// The largest chunk of `most` queries, all of them or a multiple of `step`, whose `bytes_of(chunk)` are at most
/// `limit` (0: no limit). When not even one step fits, one step: the front door then refuses the call and names its
/// bytes. bytes_of grows with the chunk.
template <class Bytes>
std::int64_t largest_chunk(std::int64_t most, std::int64_t step, std::size_t limit, const Bytes& bytes_of) {
  if (limit == 0 || bytes_of(most) <= limit) return most;
  std::int64_t low = 0, high = (most + step - 1) / step;  // steps: low fits (0 as a formality), high does not
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (bytes_of(middle * step) <= limit ? low : high) = middle;
  }
  return std::min(std::max<std::int64_t>(low, 1) * step, most);
}

}  // namespace msa::cuda
