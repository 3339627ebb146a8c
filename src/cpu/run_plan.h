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

/// Calls body(chunk, head, scratch) for every query of the batch and every head in [0, heads), in chunks of at most
/// plan.chunk queries.
template <class Body>
void run_plan(const ChunkPlan& plan, const Batch& batch, std::int64_t heads, const Body& body) {
  const std::vector<ChunkTask> tasks = list_tasks(cut_queries(batch, plan.chunk), heads, plan.workers);
  if (tasks.empty()) return;
  const std::size_t floats = plan.worker_bytes / sizeof(float);
  core::Buffer<float> scratch(floats * static_cast<std::size_t>(plan.workers));
  core::parallel_for(plan.workers, static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i, int worker) {
    const ChunkTask& task = tasks[static_cast<std::size_t>(i)];
    body(task.chunk, task.head, scratch.data() + floats * static_cast<std::size_t>(worker));
  });
}

}  // namespace msa::cpu
