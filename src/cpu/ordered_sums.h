// SPDX-License-Identifier: Apache-2.0
// Tasks of the backward kernels, and sums over tasks that run at the same time: a task goes through its key blocks in
// ascending order and adds its part of a block's sum after the task before it has added its own. Nothing is kept a
// task, no number is touched by two at once, and the result is that of one thread. Tested in tests/unit/plan_test.cc
// and through the operators.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "msa/batch.h"
#include "src/cpu/plan.h"

namespace msa::cpu {

/// Queries a task. Part of the result (gradients of keys are sums over tasks), so it depends on the sequence and the
/// geometry alone: 16 tasks a sequence for the balance of the threads; 256 or more queries, so that blocks chosen by
/// few are not loaded too often for them; at most 1024, because a task keeps the gradients of its rows.
inline std::int64_t backward_chunk(std::int64_t sequence_queries, std::int64_t kv_heads) {
  return std::clamp<std::int64_t>((sequence_queries * kv_heads + 15) / 16, 256, 1024);
}

/// Queries of a sequence and a kv head (or group). The gradients of its keys are added to those of the task before it,
/// block by block; the chunks of a sequence come last one first, because they take longest.
struct BackwardTask {
  QueryChunk chunk;
  std::int64_t head = 0;        ///< counted from the first of the heads in work
  std::int64_t previous = -1;   ///< task before it in the sums of its keys; -1: none
  std::int64_t blocks = 0;      ///< [0, blocks) are seen
  std::int64_t last_begin = 0;  ///< it is the last to add to [last_begin, blocks)
  std::int64_t sum_begin = 0;   ///< block of the sums' buffer where those of its keys begin
};

/// Tasks of all sequences and of `heads` of the kv heads.
struct BackwardTasks {
  std::vector<BackwardTask> tasks;
  std::int64_t sum_blocks = 0;  ///< of the sums' buffer; keys that belong to one task need no sum
};
/// `keys_shared`: the heads have the same keys, as in the index branch.
BackwardTasks list_backward_tasks(const Batch& batch, std::int64_t kv_heads, std::int64_t heads,
                                  std::int64_t block_size, bool keys_shared);

/// How far each task is. parallel_for hands tasks out in ascending order, so the one that is waited for has started and
/// waits for none behind it: somebody always gets on.
class TaskOrder {
 public:
  explicit TaskOrder(std::size_t tasks) : done_(tasks) {}

  /// Returns when task `task` has finished all blocks up to `block`.
  void wait_for(std::int64_t task, std::int64_t block) const {
    const std::atomic<std::int64_t>& done = done_[static_cast<std::size_t>(task)];
    for (std::int64_t blocks = done.load(std::memory_order_acquire); blocks <= block;
         blocks = done.load(std::memory_order_acquire)) {
      done.wait(blocks, std::memory_order_acquire);
    }
  }
  /// Task `task` has finished all blocks below `blocks`.
  void finish(std::int64_t task, std::int64_t blocks) {
    std::atomic<std::int64_t>& done = done_[static_cast<std::size_t>(task)];
    done.store(blocks, std::memory_order_release);
    done.notify_all();
  }

 private:
  std::vector<std::atomic<std::int64_t>> done_;
};

}  // namespace msa::cpu
