// SPDX-License-Identifier: Apache-2.0
// Runs a plan: one scratch buffer a worker, the tasks handed to whichever worker is free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "src/core/buffer.h"
#include "src/core/threads.h"
#include "src/cpu/plan.h"

namespace msa::cpu {

/// Calls body(chunk, head, scratch) for every chunk of the batch and every head in [0, heads).
template <class Body>
void run_plan(const ChunkPlan& plan, const Batch& batch, std::int64_t heads, const Body& body) {
  const std::vector<QueryChunk> chunks = cut_queries(batch, plan.chunk);
  const auto tasks = static_cast<std::int64_t>(chunks.size()) * heads;
  if (tasks == 0) return;
  const std::size_t floats = plan.worker_bytes / sizeof(float);
  core::Buffer<float> scratch(floats * static_cast<std::size_t>(plan.workers));
  core::parallel_for(plan.workers, tasks, [&](std::int64_t task, int worker) {
    body(chunks[static_cast<std::size_t>(task / heads)], task % heads,
         scratch.data() + floats * static_cast<std::size_t>(worker));
  });
}

}  // namespace msa::cpu
