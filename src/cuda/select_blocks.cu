// SPDX-License-Identifier: Apache-2.0
// Launch of select_blocks. See select_blocks.cuh.
#include "src/cuda/select_blocks.cuh"

#include "src/cuda/narrow_keys.cuh"
#include "src/cuda/screen_blocks.cuh"

namespace msa::cuda {
namespace {

/// Index keys as [pages, page, index_dim], packed ones as one page; a copy takes 128 bytes a row of 64 or 128 tokens,
/// or what a row has. float8 is not swizzled: threads read it, not matrix products.
TensorMap map_keys(const SelectBlocksParams& params) {
  const ConstTensorView& k = params.k_idx;
  const int token_dim = k.rank - 2;
  const bool is_paged = params.batch.is_paged;
  const bool is_narrow = k.dtype == DType::kFloat8E4M3;
  TensorMapSpec spec;
  spec.data = k.data;
  spec.element_bytes = is_narrow ? 1 : 2;
  const auto bytes = static_cast<std::uint64_t>(spec.element_bytes);
  spec.rank = 3;
  spec.extents[0] = static_cast<std::uint64_t>(k.size(token_dim + 1));
  spec.extents[1] = static_cast<std::uint64_t>(k.size(token_dim));
  spec.extents[2] = is_paged ? static_cast<std::uint64_t>(k.size(0)) : 1;
  // A dimension of one has no stride of its own; the driver wants one all the same.
  const auto row_bytes = static_cast<std::uint64_t>(k.size(token_dim + 1)) * bytes;
  spec.strides[1] = k.size(token_dim) > 1 ? static_cast<std::uint64_t>(k.stride(token_dim)) * bytes : row_bytes;
  spec.strides[2] =
      is_paged && k.size(0) > 1 ? static_cast<std::uint64_t>(k.stride(0)) * bytes : spec.strides[1] * spec.extents[1];
  spec.box[0] = static_cast<std::uint32_t>(min_of<std::uint64_t>(128, row_bytes) / bytes);
  spec.box[1] = is_paged && k.size(1) % kSelectTileKeys != 0 ? 64 : static_cast<std::uint32_t>(kSelectTileKeys);
  spec.box[2] = 1;
  spec.swizzle = is_narrow ? Swizzle::kNone : Swizzle::k128;
  return make_tensor_map(spec);
}

template <class Element, int kDim, int kBlock, int kWarpgroups, int kSlabs>
void launch_scores(const SelectArgs& args, const Strided<const Element>& q_idx, const TensorMap& keys, unsigned grid,
                   void* stream) {
  using Shape = ScoreKernel<Element, kDim, kBlock, kWarpgroups, kSlabs>;
  launch_dependent(dim3(grid), dim3(Shape::kThreads), Shape::kSharedBytes, stream,
                   score_blocks_kernel<Element, kDim, kBlock, kWarpgroups, kSlabs>, args, q_idx, keys);
}

template <class Element, int kDim, int kBlock>
void launch_schedule(const SelectPlan& plan, const SelectArgs& args, const SelectBlocksParams& params,
                     const TensorMap& keys, unsigned grid, void* stream) {
  const Strided<const Element> q_idx = strided<Element>(params.q_idx);
  if (plan.schedule == SelectSchedule::kManyRows) {
    launch_scores<Element, kDim, kBlock, 2, 2>(args, q_idx, keys, grid, stream);
  } else if (params.k_idx.dtype == DType::kFloat8E4M3) {
    using Shape = NarrowScoreKernel<Element, kDim, kBlock>;
    launch_dependent(dim3(grid), dim3(Shape::kThreads), Shape::kSharedBytes, stream,
                     score_narrow_keys_kernel<Element, kDim, kBlock>, args, q_idx, keys);
  } else {
    launch_scores<Element, kDim, kBlock, 1, 1>(args, q_idx, keys, grid, stream);
  }
}

template <class Element>
void launch_geometry(const SelectPlan& plan, const SelectArgs& args, const SelectBlocksParams& params,
                     const TensorMap& keys, unsigned grid, void* stream) {
  const auto run =
      params.q_idx.size(2) == 128
          ? (params.block_size == 128 ? launch_schedule<Element, 128, 128> : launch_schedule<Element, 128, 64>)
          : (params.block_size == 128 ? launch_schedule<Element, 64, 128> : launch_schedule<Element, 64, 64>);
  run(plan, args, params, keys, grid, stream);
}

/// The call with its float8 keys widened, in `wide`.
template <class Element>
SelectBlocksParams widen(const SelectBlocksParams& params, std::byte* wide, std::int64_t multiprocessors,
                         void* stream) {
  const ConstTensorView& k = params.k_idx;
  const bool is_paged = params.batch.is_paged;
  const std::int64_t pages = is_paged ? k.size(0) : 1;
  const std::int64_t page = k.size(k.rank - 2);
  Strided<const Float8E4M3> from;
  from.data = reinterpret_cast<const Float8E4M3*>(k.data);
  from.strides[0] = is_paged ? k.stride(0) : 0;
  from.strides[1] = k.stride(k.rank - 2);
  from.strides[2] = 1;
  const auto kernel = k.size(k.rank - 1) == 128 ? widen_keys_kernel<Element, 128> : widen_keys_kernel<Element, 64>;
  launch(dim3(static_cast<unsigned>(8 * multiprocessors)), dim3(kWidenThreads), 0, stream, kernel, from, pages, page,
         reinterpret_cast<Element*>(wide));
  SelectBlocksParams result = params;
  result.k_idx.data = wide;
  result.k_idx.dtype = params.q_idx.dtype;
  std::int64_t stride = 1;
  for (int d = k.rank - 1; d >= 0; --d) {
    result.k_idx.strides[static_cast<std::size_t>(d)] = stride;
    stride *= k.size(d);
  }
  return result;
}

ScreenArgs screen_args(const SelectPlan& plan, const SelectBlocksParams& params, std::byte* base) {
  const ScreenPlan& parts = plan.screen;
  ScreenArgs screen;
  screen.keys = reinterpret_cast<Int8*>(base + parts.keys);
  screen.key_bounds = reinterpret_cast<KeyBound*>(base + parts.key_bounds);
  screen.queries = reinterpret_cast<Int8*>(base + parts.queries);
  screen.row_bounds = reinterpret_cast<RowBound*>(base + parts.row_bounds);
  screen.leaders = reinterpret_cast<std::int32_t*>(base + parts.leaders);
  for (int i = 0; i < 2; ++i) screen.doubts[i] = reinterpret_cast<std::uint32_t*>(base + parts.doubts[i]);
  screen.state = reinterpret_cast<ScreenState*>(base + parts.state);
  screen.row_words = static_cast<std::int32_t>(parts.row_words);
  screen.blocks = static_cast<std::int32_t>(parts.blocks);
  screen.key_rows = params.batch.is_paged ? 0 : static_cast<std::int32_t>(params.k_idx.size(0));
  screen.always = parts.always ? 1 : 0;
  return screen;
}

}  // namespace

void launch_select(const SelectPlan& plan, const SelectBlocksParams& given, const TensorView& blocks, void* workspace,
                   std::int64_t multiprocessors, void* stream) {
  if (plan.chunk_queries == 0) return;
  auto* const base = static_cast<std::byte*>(workspace);
  SelectBlocksParams params = given;
  if (plan.widens) {
    params = given.q_idx.dtype == DType::kBFloat16
                 ? widen<BFloat16>(given, base + plan.wide_keys, multiprocessors, stream)
                 : widen<Float16>(given, base + plan.wide_keys, multiprocessors, stream);
  }
  SelectArgs args;
  args.batch = view_of(params.batch);
  args.groups = static_cast<std::int32_t>(params.q_idx.size(1));
  args.block_size = static_cast<std::int32_t>(params.block_size);
  args.topk = static_cast<std::int32_t>(params.topk);
  args.local_blocks = static_cast<std::int32_t>(min_of(params.local_blocks, params.topk));
  args.init_blocks = static_cast<std::int32_t>(min_of(params.init_blocks, params.topk));
  args.tile_rows = static_cast<std::int32_t>(plan.tile_rows);
  args.span_tiles = static_cast<std::int32_t>(plan.span_tiles);
  args.most_tiles = static_cast<std::int32_t>(plan.most_tiles);
  args.most_key_tiles = static_cast<std::int32_t>(plan.most_key_tiles);
  args.most_items = static_cast<std::int32_t>(plan.most_items);
  args.page = params.batch.is_paged ? static_cast<std::int32_t>(params.k_idx.size(1)) : 0;
  args.pages = params.batch.is_paged ? static_cast<std::int32_t>(params.k_idx.size(0)) : 0;
  args.item_count = reinterpret_cast<std::int32_t*>(base);
  args.sequence_tiles = reinterpret_cast<std::int32_t*>(base + plan.sequence_tiles);
  args.tiles = reinterpret_cast<SelectTile*>(base + plan.tiles);
  args.items = reinterpret_cast<SelectItem*>(base + plan.items);
  args.maxima = reinterpret_cast<float*>(base + plan.maxima);
  args.maxima_stride = plan.maxima_stride;

  // Keys that nobody can choose from need no scores: no keys at all, or no more blocks than are taken anyhow.
  const bool has_scores = params.k_idx.elements() > 0 && plan.most_items > 0;
  const TensorMap keys = has_scores ? map_keys(params) : TensorMap{};
  const Strided<std::int32_t> out = strided<std::int32_t>(blocks);
  const bool screens = has_scores && plan.screen.use;
  const ScreenArgs screen = screens ? screen_args(plan, params, base) : ScreenArgs{};
  if (screens) launch_key_copies(args, screen, params, multiprocessors, stream);
  std::int32_t* const listed_items = args.item_count;
  const std::int64_t rows = params.q_idx.size(0);
  for (std::int64_t first = 0; first < rows; first += args.queries) {
    args.first_query = static_cast<std::int32_t>(first);
    args.queries = static_cast<std::int32_t>(plan.queries_of_chunk(first, rows));
    const TopkPlan ranking = plan_topk(std::int64_t{args.queries} * args.groups, plan.maxima_stride, multiprocessors);
    if (has_scores) {
      if (screens) clear_memory(stream, screen.doubts[0], static_cast<std::size_t>(plan.screen.doubt_bytes));
      args.item_count = listed_items;
      launch(dim3(1), dim3(kListThreads), 0, stream, list_items_kernel<kListThreads>, args);
      if (screens) {
        launch_screening(args, screen, params, keys, ranking, multiprocessors, stream);
        args.item_count = &screen.state->exact_items;
      }
      const auto grid = static_cast<unsigned>(min_of(multiprocessors, plan.most_items));
      if (params.q_idx.dtype == DType::kBFloat16) {
        launch_geometry<BFloat16>(plan, args, params, keys, grid, stream);
      } else {
        launch_geometry<Float16>(plan, args, params, keys, grid, stream);
      }
    }
    const auto select = ranking.vectors == kTopkNarrowVectors ? select_rows_kernel<kTopkNarrowVectors>
                                                              : select_rows_kernel<kTopkWideVectors>;
    launch_dependent(dim3(static_cast<unsigned>(ranking.thread_blocks)), dim3(kTopkWarps * kWarpSize), 0, stream,
                     select, args, out);
  }
}

}  // namespace msa::cuda
