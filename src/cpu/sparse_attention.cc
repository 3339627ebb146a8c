// SPDX-License-Identifier: Apache-2.0
// Plans and starts sparse_attention on the instruction set in use; how it works: sparse_attention-inl.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/sparse_attention-inl.h"
// clang-format off: every set is compiled by this include, the last one by the next.
#include "src/cpu/targets.h"
#include "src/cpu/sparse_attention-inl.h"
// clang-format on

#if HWY_ONCE

#include <optional>

#include "src/core/buffer.h"
#include "src/core/threads.h"
#include "src/cpu/attention.h"
#include "src/cpu/instruction_set.h"
#include "src/cpu/operators.h"
#include "src/cpu/run_plan.h"
#include "src/cpu/split_attention.h"

namespace msa::cpu {

HWY_EXPORT(attend_sparsely);
HWY_EXPORT(score_split_span);
HWY_EXPORT(weigh_split_item);

namespace {

void run_split(const SplitWork& work) {
  const std::size_t floats = work.worker_bytes / sizeof(float);
  core::Buffer<float> scratch(floats * static_cast<std::size_t>(work.workers));
  core::Buffer<float> scores(static_cast<std::size_t>(work.score_floats));
  const auto scratch_of = [&](int worker) { return scratch.data() + floats * static_cast<std::size_t>(worker); };
  const auto attend = HWY_DYNAMIC_DISPATCH(attend_sparsely);
  const auto score = HWY_DYNAMIC_DISPATCH(score_split_span);
  const std::size_t whole = work.whole_tasks.size();
  core::parallel_for(work.workers, static_cast<std::int64_t>(whole + work.spans.size()),
                     [&](std::int64_t task, int worker) {
                       const auto i = static_cast<std::size_t>(task);
                       if (i < whole) {
                         const ChunkTask& one = work.whole_tasks[i];
                         attend(work.whole, one.chunk, one.head, scratch_of(worker));
                       } else {
                         score(work, work.spans[i - whole], scratch_of(worker), scores.data());
                       }
                     });
  const auto weigh = HWY_DYNAMIC_DISPATCH(weigh_split_item);
  const std::size_t slices = work.slices.size();
  core::parallel_for(work.workers, static_cast<std::int64_t>(work.items.size() * slices),
                     [&](std::int64_t task, int worker) {
                       const auto i = static_cast<std::size_t>(task);
                       weigh(work, work.items[i / slices], work.slices[i % slices], scratch_of(worker), scores.data());
                     });
}

}  // namespace

void sparse_attention(const Context& context, const SparseAttentionParams& params, const TensorView& out,
                      const TensorView& lse) {
  ensure_instruction_set();
  AttentionInput input;
  input.q = params.q;
  input.k = params.k;
  input.v = params.v;
  input.blocks = params.blocks;
  input.batch = params.batch;
  input.scale = static_cast<float>(*params.scale);
  input.out = out;
  input.lse = lse;
  plan_input("sparse_attention", context, params.block_size, input);
  clear_padding_rows(input);
  const int threads = core::resolve_threads(context.threads);
  if (const std::optional<SplitWork> split = split_attention(input, threads, context.workspace_limit)) {
    run_split(*split);
    return;
  }
  const auto run = HWY_DYNAMIC_DISPATCH(attend_sparsely);
  run_plan(input.plan, params.batch, input.shape.kv_heads,
           [&](const QueryChunk& chunk, std::int64_t kv_head, float* scratch) { run(input, chunk, kv_head, scratch); });
}

}  // namespace msa::cpu

#endif  // HWY_ONCE
