// SPDX-License-Identifier: Apache-2.0
// What the tests of block selection in the emulator share: a poisoned and guarded workspace, runs by a plan, problems
// whose tensors lie as the kernels want them.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "src/cuda/device.cuh"
#include "src/cuda/select_blocks.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/selection.h"
#include "tests/unit/support/tolerance.h"

namespace msa::cuda {

using namespace msa::testing;

/// Device scratch: poisoned, and with a guard behind it.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) : bytes_(bytes), memory_(bytes + 2 * 256, std::byte{0xff}) {}
  void* data() { return memory_.data() + (256 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 256) % 256; }
  bool guard_intact() {
    const auto* end = static_cast<std::byte*>(data()) + bytes_;
    for (; end != memory_.data() + memory_.size(); ++end) {
      if (*end != std::byte{0xff}) return false;
    }
    return true;
  }

 private:
  std::size_t bytes_;
  std::vector<std::byte> memory_;
};

inline Tensor run_in(Workspace& workspace, const SelectPlan& plan, const SelectBlocksParams& params,
                     std::int64_t multiprocessors) {
  EXPECT_TRUE(takes_select(params));
  Tensor blocks(DType::kInt32, {params.q_idx.size(1), params.q_idx.size(0), params.topk});
  launch_select(plan, params, blocks.view(), workspace.data(), multiprocessors, nullptr);
  EXPECT_TRUE(workspace.guard_intact()) << "wrote behind the workspace";
  EXPECT_TRUE(blocks.gaps_intact()) << "wrote beside the ids";
  return blocks;
}

inline Tensor run_planned(const SelectPlan& plan, const SelectBlocksParams& params, std::int64_t multiprocessors) {
  Workspace workspace(plan.bytes);
  return run_in(workspace, plan, params, multiprocessors);
}

inline Tensor run_cuda(const SelectBlocksParams& params, SelectSchedule schedule = SelectSchedule::kAuto,
                       std::int64_t multiprocessors = 3) {
  return run_planned(plan_select(shape_of(params), schedule), params, multiprocessors);
}

/// A problem whose index tensors lie as the kernels want them: 16-byte aligned.
inline Problem aligned(const Case& c) {
  Case with = c;
  with.layout = c.layout == Layout::kGaps ? Layout::kContiguous : c.layout;
  return Problem(with);
}

/// The keys in pages, aligned.
struct AlignedPages {
  AlignedPages(const Problem& problem, std::int64_t page)
      : pages(problem, page), keys(copy_of(pages.k_idx.view(), Layout::kContiguous)) {}
  SelectBlocksParams select_params() const {
    SelectBlocksParams params = pages.select_params();
    params.k_idx = keys.view();
    return params;
  }
  PagedProblem pages;
  Tensor keys;
};

inline const emulator::Options kOptions[] = {
    {false, emulator::BlockOrder::kAscending, false, 1},
    {true, emulator::BlockOrder::kDescending, false, 2},
    {true, emulator::BlockOrder::kShuffled, true, 3},
};

inline Case make_case(std::int64_t groups, std::int64_t dim, std::int64_t block, std::int64_t topk,
                      std::vector<Lengths> lengths, DType dtype, Layout layout = Layout::kContiguous,
                      std::int64_t padding = 0) {
  return {{groups, groups, 16, 16, dim, block, topk}, std::move(lengths), dtype, dtype, layout, padding};
}

/// One group, index_dim 64, q_idx = (1, 0, ...), k_idx[j] = (scores[j], 0, ...); the last tokens query.
inline Problem with_scores(const std::vector<double>& scores, std::int64_t block, std::int64_t topk,
                           std::int64_t queries = 1) {
  Problem problem(
      make_case(1, 64, block, topk, {{queries, static_cast<std::int64_t>(scores.size())}}, DType::kBFloat16));
  problem.q_idx.fill(0);
  problem.k_idx.fill(0);
  for (std::int64_t t = 0; t < queries; ++t) problem.q_idx.set(1, t, 0, 0);
  for (std::size_t j = 0; j < scores.size(); ++j) problem.k_idx.set(scores[j], static_cast<std::int64_t>(j), 0);
  return problem;
}

}  // namespace msa::cuda
