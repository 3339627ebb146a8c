// SPDX-License-Identifier: Apache-2.0
// Launch of the screening. See screen_blocks.cuh.
#include "src/cuda/screen_blocks.cuh"

namespace msa::cuda {
namespace {

inline constexpr int kDecideThreads = 1024;

template <class Element, int kDim, int kBlock>
void copy_keys(const SelectArgs& args, const ScreenArgs& screen, const SelectBlocksParams& params, unsigned grid,
               void* stream) {
  launch(dim3(grid), dim3(128), 0, stream, quantise_keys_kernel<Element, kDim, kBlock>, args, screen,
         key_rows<const Element>(params.k_idx, params.batch));
}

template <class Element, int kDim, int kBlock>
void screen_chunk(const SelectArgs& args, const ScreenArgs& screen, const SelectBlocksParams& params,
                  const TensorMap& keys, const TopkPlan& ranking, unsigned multiprocessors, void* stream) {
  using Screen = ScreenKernel<kDim, kBlock>;
  using Rescore = RescoreKernel<kDim>;
  const Strided<const Element> q_idx = strided<Element>(params.q_idx);
  const auto rows = static_cast<unsigned>(args.queries * args.groups);
  launch_dependent(dim3(1), dim3(kDecideThreads), 0, stream, decide_screening_kernel<kDecideThreads>, args, screen);
  launch_dependent(dim3(min_of(ceil_div(rows, unsigned{kQuantiseWarps}), 16 * multiprocessors)),
                   dim3(kQuantiseWarps * kWarpSize), 0, stream, quantise_queries_kernel<Element, kDim>, args, screen,
                   q_idx);
  launch_dependent(dim3(min_of(multiprocessors, static_cast<unsigned>(args.most_items))), dim3(Screen::kThreads),
                   Screen::kSharedBytes, stream, screen_blocks_kernel<kDim, kBlock>, args, screen);
  const dim3 rank_grid(static_cast<unsigned>(ranking.thread_blocks));
  const dim3 rank_block(kTopkWarps * kWarpSize);
  const auto find_leaders = ranking.vectors == kTopkNarrowVectors ? find_leaders_kernel<kTopkNarrowVectors>
                                                                  : find_leaders_kernel<kTopkWideVectors>;
  const auto rescore = [&](const std::uint32_t* doubts, const std::uint32_t* known) {
    launch_dependent(dim3(Rescore::kPerProcessor * multiprocessors), dim3(Rescore::kThreads), Rescore::kSharedBytes,
                     stream, rescore_blocks_kernel<Element, kDim, kBlock>, args, screen, q_idx, keys, doubts, known);
  };
  launch_dependent(rank_grid, rank_block, 0, stream, find_leaders, args, screen);
  rescore(screen.doubts[0], nullptr);
  launch_dependent(rank_grid, rank_block, 0, stream, find_doubts_kernel, args, screen);
  launch_dependent(dim3(1), dim3(1), 0, stream, reconsider_screening_kernel, screen);
  rescore(screen.doubts[1], screen.doubts[0]);
}

/// Calls body with an Element, its dimension and its block size as template arguments.
template <class Element, class Body>
void with_geometry(const SelectBlocksParams& params, const Body& body) {
  const bool is_wide = params.q_idx.size(2) == 128;
  if (params.block_size == 128) {
    is_wide ? body.template operator()<Element, 128, 128>() : body.template operator()<Element, 64, 128>();
  } else {
    is_wide ? body.template operator()<Element, 128, 64>() : body.template operator()<Element, 64, 64>();
  }
}
template <class Body>
void with_kernel(const SelectBlocksParams& params, const Body& body) {
  params.q_idx.dtype == DType::kBFloat16 ? with_geometry<BFloat16>(params, body) : with_geometry<Float16>(params, body);
}

}  // namespace

void launch_key_copies(const SelectArgs& args, const ScreenArgs& screen, const SelectBlocksParams& params,
                       std::int64_t multiprocessors, void* stream) {
  clear_memory(stream, screen.state, sizeof(ScreenState));
  const auto grid = static_cast<unsigned>(min_of<std::int64_t>(screen.blocks, 4 * multiprocessors));
  with_kernel(params, [&]<class Element, int kDim, int kBlock>() {
    copy_keys<Element, kDim, kBlock>(args, screen, params, grid, stream);
  });
}

void launch_screening(const SelectArgs& args, const ScreenArgs& screen, const SelectBlocksParams& params,
                      const TensorMap& keys, const TopkPlan& ranking, std::int64_t multiprocessors, void* stream) {
  with_kernel(params, [&]<class Element, int kDim, int kBlock>() {
    screen_chunk<Element, kDim, kBlock>(args, screen, params, keys, ranking, static_cast<unsigned>(multiprocessors),
                                        stream);
  });
}

}  // namespace msa::cuda
