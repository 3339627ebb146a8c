// SPDX-License-Identifier: Apache-2.0
// What the plans are made of: the layout of a worker's scratch memory and the choice of a chunk. Tested in
// tests/unit/plan_test.cc.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "msa/error.h"
#include "src/cpu/plan.h"
#include "src/cpu/tile.h"

namespace msa::cpu {

// Hands out parts of a worker's scratch memory, in floats, each starting on a cache line.
class LayoutCursor {
 public:
  std::int64_t take(std::int64_t floats) {
    const std::int64_t begin = next_;
    next_ += padded_columns(floats);  // 16 floats are a cache line
    return begin;
  }
  std::int64_t end() const { return next_; }

 private:
  std::int64_t next_ = 0;
};

// Starts at `chunk` and halves it until there are tasks enough for the threads to finish together (but not below
// `least`, where loading a block would cost more than using it), and until the memory fits beside `shared_bytes`. With
// four tasks a thread, the last one to end costs at most a quarter of a thread's share.
template <class Bytes>
ChunkPlan plan_chunks(const std::string& op, const QueryCounts& queries, std::int64_t heads, std::int64_t chunk,
                      std::int64_t least, int threads, std::size_t workspace_limit, const Bytes& bytes_of_chunk,
                      std::size_t shared_bytes = 0, std::int64_t tasks_per_thread = 4) {
  ChunkPlan plan;
  plan.chunk = std::clamp<std::int64_t>(chunk, 1, std::max<std::int64_t>(queries.longest, 1));
  const auto tasks = [&] { return (queries.total + plan.chunk - 1) / plan.chunk * heads; };
  const auto halve = [&] { plan.chunk = (plan.chunk + 1) / 2; };
  while (threads > 1 && plan.chunk > least && tasks() < tasks_per_thread * threads) halve();
  plan.workers = static_cast<int>(std::clamp<std::int64_t>(tasks(), 1, threads));
  plan.worker_bytes = bytes_of_chunk(plan.chunk);
  while (workspace_limit != 0 && shared_bytes + plan.bytes() > workspace_limit) {
    if (plan.chunk > 1) {
      halve();
    } else if (plan.workers > 1) {
      --plan.workers;
    } else {
      throw Error(op + ": needs at least " + std::to_string(shared_bytes + plan.bytes()) +
                  " bytes of workspace, but Context::workspace_limit is " + std::to_string(workspace_limit));
    }
    plan.worker_bytes = bytes_of_chunk(plan.chunk);
  }
  return plan;
}

inline std::size_t bytes_of(std::int64_t floats) { return static_cast<std::size_t>(floats) * sizeof(float); }

// 32-bit elements behind a count of 64-bit ones, and so on.
inline std::int64_t floats_for(std::int64_t count, std::size_t element) {
  return (count * static_cast<std::int64_t>(element) + 3) / 4;
}

}  // namespace msa::cpu
