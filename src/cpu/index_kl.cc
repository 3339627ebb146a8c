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

namespace {

IndexKlShape find_shape(const IndexKlParams& params) {
  IndexKlShape shape;
  shape.queries = count_queries(params.batch);
  shape.kv_heads = params.q_idx.size(1);
  shape.group_size = params.q.size(1) / shape.kv_heads;
  shape.head_dim = params.q.size(2);
  shape.index_dim = params.q_idx.size(2);
  shape.block_size = params.block_size;
  shape.blocks = count_blocks(params.batch, params.block_size);
  shape.topk = params.blocks.empty() ? 0 : params.blocks.size(2);
  shape.has_bf16_dots =
      params.q.dtype == DType::kBFloat16 && params.k.dtype == DType::kBFloat16 && active_bf16_kernel() != nullptr;
  shape.has_bf16_index =
      shape.has_bf16_dots && params.q_idx.dtype == DType::kBFloat16 && params.k_idx.dtype == DType::kBFloat16;
  return shape;
}

IndexKlProblem choose_kernels(const IndexKlParams& params, const IndexKlShape& shape, const IndexKlSaved& saved) {
  IndexKlProblem problem{params, saved};
  if (shape.has_bf16_dots) {
    problem.multiply_bf16 = active_bf16_kernel();
    problem.needs_amx_tiles = active_dot_products() == DotProducts::kAmx;
  }
  return problem;
}

void fill_rows(const TensorView& tensor, float value) {
  for (std::int64_t row = 0; row < tensor.size(0); ++row) {
    auto* first = reinterpret_cast<float*>(tensor.data) + row * tensor.stride(0);
    std::fill(first, first + tensor.size(1), value);
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
  const IndexKlProblem problem = choose_kernels(params, shape, saved);
  core::Buffer<double> values(static_cast<std::size_t>(rows));
  const auto run = HWY_DYNAMIC_DISPATCH(run_index_kl);
  run_plan(plan.chunks, params.batch, shape.kv_heads, [&](const QueryChunk& chunk, std::int64_t group, float* scratch) {
    run(problem, shape, layout, chunk, group, scratch, values.data());
  });
  double sum = 0;
  for (std::size_t i = 0; i < values.size(); ++i) sum += values[i];
  return static_cast<float>(sum / static_cast<double>(rows));
}

void index_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlSaved& saved,
                       float grad_output, const TensorView& dq_idx, const TensorView& dk_idx) {
  ensure_instruction_set();
  const Batch& batch = params.batch;
  const IndexKlShape shape = find_shape(params);
  zero_rows(dq_idx, shape.queries.total);
  zero_rows(dk_idx, 0);  // blocks that no query sees belong to no task
  if (shape.queries.total == 0) return;
  const IndexKlBackwardPlan plan = plan_index_kl_backward(
      "index_kl_backward", shape, batch, core::resolve_threads(context.threads), context.workspace_limit);
  const IndexKlBackwardLayout layout = lay_out_index_kl_backward(shape);
  const auto factor = static_cast<float>(static_cast<double>(grad_output) * *params.index_scale /
                                         static_cast<double>(shape.queries.total * shape.kv_heads));
  const IndexKlProblem problem = choose_kernels(params, shape, saved);
  const BackwardTasks work = list_backward_tasks(batch, shape.kv_heads, shape.kv_heads, shape.block_size, true);
  const std::size_t worker_floats = plan.worker_bytes / sizeof(float);
  core::Buffer<float> scratch(worker_floats * static_cast<std::size_t>(plan.workers));
  core::Buffer<float> sums(plan.shared_bytes / sizeof(float));
  TaskOrder order(work.tasks.size());
  const auto run = HWY_DYNAMIC_DISPATCH(run_index_kl_backward);
  core::parallel_for(plan.workers, static_cast<std::int64_t>(work.tasks.size()), [&](std::int64_t i, int worker) {
    run(problem, shape, layout, work.tasks[static_cast<std::size_t>(i)], i, factor, order, sums.data(),
        scratch.data() + worker_floats * static_cast<std::size_t>(worker), dq_idx, dk_idx);
  });
}

}  // namespace msa::cpu

#endif  // HWY_ONCE
