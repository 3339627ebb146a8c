// SPDX-License-Identifier: Apache-2.0
// See ordered_sums.h.
#include "src/cpu/ordered_sums.h"

#include "src/core/layout.h"

namespace msa::cpu {

BackwardTasks list_backward_tasks(const Batch& batch, std::int64_t kv_heads, std::int64_t heads,
                                  std::int64_t block_size, bool keys_shared) {
  BackwardTasks result;
  for (std::int64_t s = 0; s < batch.sequences(); ++s) {
    const core::Sequence sequence = core::get_sequence(batch, s);
    if (sequence.queries == 0) continue;
    const std::int64_t size = backward_chunk(sequence.queries, kv_heads);
    const auto blocks_of_queries = [&](std::int64_t end) {
      return end <= 0 ? 0 : core::query_position(batch, sequence, end - 1) / block_size + 1;
    };
    const std::int64_t sequence_blocks = blocks_of_queries(sequence.queries);
    const std::int64_t last = (sequence.queries - 1) / size;
    const auto first_task = static_cast<std::int64_t>(result.tasks.size());
    const std::int64_t step = keys_shared ? 1 : heads;  // from a task to the one that adds to the same keys next
    for (std::int64_t c = last; c >= 0; --c) {
      BackwardTask task;
      task.chunk = {s, c * size, std::min((c + 1) * size, sequence.queries)};
      task.blocks = blocks_of_queries(task.chunk.end);
      for (task.head = 0; task.head < heads; ++task.head) {
        const auto index = static_cast<std::int64_t>(result.tasks.size());
        task.previous = index - step < first_task ? -1 : index - step;
        task.last_begin = keys_shared && task.head + 1 < heads ? task.blocks : blocks_of_queries(task.chunk.begin);
        task.sum_begin = result.sum_blocks + (keys_shared ? 0 : task.head * sequence_blocks);
        result.tasks.push_back(task);
      }
    }
    if (static_cast<std::int64_t>(result.tasks.size()) - first_task > step) {
      result.sum_blocks += keys_shared ? sequence_blocks : heads * sequence_blocks;
    }
  }
  return result;
}

}  // namespace msa::cpu
