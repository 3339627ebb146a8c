// SPDX-License-Identifier: Apache-2.0
// Plans and starts the backward of sparse and dense attention on the instruction set in use; how it works:
// attention_backward-inl.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/attention_backward-inl.h"
// clang-format off: every set is compiled by this include, the last one by the next.
#include "src/cpu/targets.h"
#include "src/cpu/attention_backward-inl.h"
// clang-format on

#if HWY_ONCE

#include <algorithm>

#include "src/core/buffer.h"
#include "src/core/threads.h"
#include "src/cpu/instruction_set.h"
#include "src/cpu/operators.h"
#include "src/cpu/zero_rows.h"

namespace msa::cpu {

HWY_EXPORT(run_backward_task);

namespace {

void run_backward(const char* op, const Context& context, BackwardProblem problem, std::int64_t block_size) {
  ensure_instruction_set();
  const Batch& batch = *problem.batch;
  AttentionShape shape;
  shape.queries = count_queries(batch);
  shape.kv_heads = problem.k.size(1);
  shape.group_size = problem.q.size(1) / shape.kv_heads;
  shape.head_dim = problem.q.size(2);
  shape.value_dim = problem.v.size(2);
  shape.block_size = block_size;
  shape.topk = problem.blocks.empty() ? 0 : problem.blocks.size(2);
  const auto is_bf16 = [](DType dtype) { return dtype == DType::kBFloat16; };
  if (is_bf16(problem.q.dtype) && is_bf16(problem.k.dtype) && is_bf16(problem.v.dtype) &&
      is_bf16(problem.saved.dout.dtype)) {
    problem.multiply_bf16 = active_bf16_kernel();
    problem.needs_amx_tiles = active_dot_products() == DotProducts::kAmx;
    shape.has_bf16_dots = problem.multiply_bf16 != nullptr;
  }
  const BackwardPlan plan =
      plan_attention_backward(op, shape, batch, core::resolve_threads(context.threads), context.workspace_limit);

  zero_rows(problem.grads.dq, shape.queries.total);
  zero_rows(problem.grads.dk, 0);  // blocks that no query sees belong to no task
  zero_rows(problem.grads.dv, 0);
  const BackwardLayout layout = lay_out_backward(shape, count_blocks(batch, block_size));
  const std::size_t worker_floats = plan.worker_bytes / sizeof(float);
  core::Buffer<float> scratch(worker_floats * static_cast<std::size_t>(plan.workers));
  core::Buffer<float> sums(plan.shared_bytes / sizeof(float));
  const auto run = HWY_DYNAMIC_DISPATCH(run_backward_task);
  for (std::int64_t first = 0; first < shape.kv_heads; first += plan.heads_at_once) {
    const std::int64_t heads = std::min(plan.heads_at_once, shape.kv_heads - first);
    const BackwardTasks work = list_backward_tasks(batch, shape.kv_heads, heads, block_size, false);
    TaskOrder order(work.tasks.size());
    core::parallel_for(plan.workers, static_cast<std::int64_t>(work.tasks.size()), [&](std::int64_t i, int worker) {
      const BackwardTask& task = work.tasks[static_cast<std::size_t>(i)];
      run(problem, shape, layout, task, i, first + task.head, order, sums.data(),
          scratch.data() + worker_floats * static_cast<std::size_t>(worker));
    });
  }
}

}  // namespace

void sparse_attention_backward(const Context& context, const SparseAttentionParams& params, const AttentionSaved& saved,
                               const AttentionGrads& grads) {
  run_backward("sparse_attention_backward", context,
               {params.q, params.k, params.v, params.blocks, &params.batch, static_cast<float>(*params.scale), saved,
                grads, nullptr, false},
               params.block_size);
}

void dense_attention_backward(const Context& context, const DenseAttentionParams& params, const AttentionSaved& saved,
                              const AttentionGrads& grads) {
  run_backward("dense_attention_backward", context,
               {params.q, params.k, params.v, ConstTensorView(), &params.batch, static_cast<float>(*params.scale),
                saved, grads, nullptr, false},
               kDenseBlock);
}

}  // namespace msa::cpu

#endif  // HWY_ONCE
