// SPDX-License-Identifier: Apache-2.0
// Hands rows to threads and starts top-k on the instruction set in use; how it works: topk_blocks-inl.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/topk_blocks-inl.h"
// clang-format off: every set is compiled by this include, the last one by the next.
#include "src/cpu/targets.h"
#include "src/cpu/topk_blocks-inl.h"
// clang-format on

#if HWY_ONCE

#include "src/core/threads.h"
#include "src/cpu/instruction_set.h"
#include "src/cpu/operators.h"

namespace msa::cpu {

HWY_EXPORT(topk_rows);

void topk_blocks(const Context& context, const TopkBlocksParams& params, const TensorView& ids) {
  ensure_instruction_set();
  const std::int64_t rows = params.scores.size(0);
  const std::int64_t blocks = params.scores.size(1);
  const std::int64_t row_stride = params.scores.stride(0);
  const std::int64_t ids_stride = ids.stride(0);
  const auto* scores = reinterpret_cast<const float*>(params.scores.data);
  auto* out = reinterpret_cast<std::int32_t*>(ids.data);
  // Some 10 microseconds of work a task, against which handing it out is nothing.
  const std::int64_t chunk = std::max<std::int64_t>(1, 32768 / std::max<std::int64_t>(1, blocks));
  const auto run = HWY_DYNAMIC_DISPATCH(topk_rows);
  core::parallel_for(core::resolve_threads(context.threads), (rows + chunk - 1) / chunk, [&](std::int64_t task, int) {
    const std::int64_t begin = task * chunk;
    run(scores + begin * row_stride, row_stride, std::min(chunk, rows - begin), blocks, params.topk,
        out + begin * ids_stride, ids_stride);
  });
}

}  // namespace msa::cpu

#endif  // HWY_ONCE
