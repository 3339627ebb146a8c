// SPDX-License-Identifier: Apache-2.0
// Plans and starts the KL loss and its backward on the instruction set in use; how they work: index_kl-inl.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/index_kl-inl.h"
// clang-format off: every set is compiled by this include, the last one by the next.
#include "src/cpu/targets.h"
#include "src/cpu/index_kl-inl.h"
// clang-format on

#if HWY_ONCE

#include <algorithm>

#include "src/core/buffer.h"
#include "src/core/threads.h"
#include "src/cpu/instruction_set.h"
#include "src/cpu/operators.h"
#include "src/cpu/run_plan.h"
#include "src/cpu/zero_rows.h"

namespace msa::cpu {

HWY_EXPORT(run_index_kl);
HWY_EXPORT(run_index_kl_backward);
HWY_EXPORT(add_key_sums);
HWY_EXPORT(store_index_key_grads);

namespace {

IndexKlShape find_shape(const IndexKlParams& params) {
  IndexKlShape shape;
  shape.queries = count_queries(params.batch);
  shape.kv_heads = params.q_idx.size(1);
  shape.group_size = params.q.size(1) / shape.kv_heads;
  shape.head_dim = params.q.size(2);
  shape.index_dim = params.q_idx.size(2);
  shape.block_size = params.block_size;
  shape.row_blocks = count_blocks(params.batch, params.block_size);
  if (!params.blocks.empty()) shape.row_blocks = std::min(shape.row_blocks, params.blocks.size(2));
  return shape;
}

void fill_rows(const TensorView& tensor, float value) {
  for (std::int64_t row = 0; row < tensor.size(0); ++row) {
    auto* first = reinterpret_cast<float*>(tensor.data) + row * tensor.stride(0);
    std::fill(first, first + tensor.size(1), value);
  }
}

// Adds the sums that the tasks [begin, end) of a round left for one block of a sequence, in order.
void add_round(const IndexKlBackwardPlan& plan, std::int64_t begin, std::int64_t end, const core::Sequence& sequence,
               std::int64_t block, std::int64_t block_floats, const float* sums, const std::uint8_t* touched,
               float* out) {
  for (std::int64_t t = begin; t < end; ++t) {
    const IndexKlTask& task = plan.tasks[static_cast<std::size_t>(t)];
    if (task.chunk.sequence != sequence.index || block >= task.blocks || touched[task.sum_begin + block] == 0) continue;
    HWY_DYNAMIC_DISPATCH(add_key_sums)(sums + (task.sum_begin + block) * block_floats, block_floats, out);
  }
}

}  // namespace

float index_kl(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved) {
  ensure_instruction_set();
  const IndexKlShape shape = find_shape(params);
  fill_rows(saved.lse_main, -std::numeric_limits<float>::infinity());
  fill_rows(saved.lse_index, -std::numeric_limits<float>::infinity());
  fill_rows(saved.teacher_norm, 0.0f);
  const std::int64_t rows = shape.queries.total * shape.kv_heads;
  if (rows == 0) return 0.0f;
  const IndexKlPlan plan =
      plan_index_kl("index_kl", shape, core::resolve_threads(context.threads), context.workspace_limit);
  const IndexKlLayout layout = lay_out_index_kl(shape, plan.chunks.chunk, plan.keep_tiles);
  core::Buffer<double> values(static_cast<std::size_t>(rows));
  const auto run = HWY_DYNAMIC_DISPATCH(run_index_kl);
  run_plan(plan.chunks, params.batch, shape.kv_heads,
           [&](const QueryChunk& chunk, std::int64_t group, float* scratch) {
             run(params, shape, layout, chunk, group, scratch, saved, values.data());
           });
  double sum = 0;
  for (std::size_t i = 0; i < values.size(); ++i) sum += values[i];
  return static_cast<float>(sum / static_cast<double>(rows));
}

void index_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlSaved&,
                       float grad_output, const TensorView& dq_idx, const TensorView& dk_idx) {
  ensure_instruction_set();
  const Batch& batch = params.batch;
  const IndexKlShape shape = find_shape(params);
  zero_rows(dq_idx, shape.queries.total);
  zero_rows(dk_idx, shape.queries.total == 0 ? 0 : batch.cu_seqlens_k.back());
  if (shape.queries.total == 0) return;
  const IndexKlBackwardPlan plan = plan_index_kl_backward(
      "index_kl_backward", shape, batch, core::resolve_threads(context.threads), context.workspace_limit);
  const IndexKlBackwardLayout layout = lay_out_index_kl_backward(shape, plan.keep_tiles);
  const auto factor = static_cast<float>(static_cast<double>(grad_output) * *params.index_scale /
                                         static_cast<double>(shape.queries.total * shape.kv_heads));
  const std::int64_t block_floats = shape.block_size * shape.index_dim;

  struct KeyBlock {
    core::Sequence sequence;
    std::int64_t block = 0;
  };
  std::vector<KeyBlock> blocks;
  for (std::int64_t s = 0; s < batch.sequences(); ++s) {
    const core::Sequence sequence = core::get_sequence(batch, s);
    for (std::int64_t b = 0; b * shape.block_size < sequence.keys; ++b) blocks.push_back({sequence, b});
  }
  const std::size_t worker_floats = plan.worker_bytes / sizeof(float);
  core::Buffer<float> scratch(worker_floats * static_cast<std::size_t>(plan.workers));
  core::Buffer<float> sums(static_cast<std::size_t>(plan.round_blocks * block_floats));
  core::Buffer<std::uint8_t> touched(static_cast<std::size_t>(plan.round_blocks));
  core::Buffer<float> totals(blocks.size() * static_cast<std::size_t>(block_floats));
  const auto run = HWY_DYNAMIC_DISPATCH(run_index_kl_backward);
  const auto store = HWY_DYNAMIC_DISPATCH(store_index_key_grads);
  std::int64_t begin = 0;
  for (std::size_t round = 0; round < plan.round_ends.size(); ++round) {
    const std::int64_t end = plan.round_ends[round];
    core::parallel_for(plan.workers, end - begin, [&](std::int64_t t, int worker) {
      const IndexKlTask& task = plan.tasks[static_cast<std::size_t>(begin + t)];
      run(params, shape, layout, task, factor,
          scratch.data() + worker_floats * static_cast<std::size_t>(worker),
          sums.data() + task.sum_begin * block_floats, touched.data() + task.sum_begin, dq_idx);
    });
    const bool is_first = round == 0;
    const bool is_last = round + 1 == plan.round_ends.size();
    core::parallel_for(plan.workers, static_cast<std::int64_t>(blocks.size()), [&](std::int64_t i, int) {
      const KeyBlock& key_block = blocks[static_cast<std::size_t>(i)];
      float* total = totals.data() + i * block_floats;
      if (is_first) std::fill(total, total + block_floats, 0.0f);
      add_round(plan, begin, end, key_block.sequence, key_block.block, block_floats, sums.data(), touched.data(),
                total);
      if (!is_last) return;
      const std::int64_t first = key_block.block * shape.block_size;
      store(total, std::min(shape.block_size, key_block.sequence.keys - first), shape.index_dim, factor,
            batch.cu_seqlens_k[static_cast<std::size_t>(key_block.sequence.index)] + first, dk_idx);
    });
    begin = end;
  }
}

}  // namespace msa::cpu

#endif  // HWY_ONCE
