// SPDX-License-Identifier: Apache-2.0
// See select_blocks.h.
#include "src/cuda/select_blocks.h"

#include <algorithm>

#include "src/cuda/attention_maps.h"
#include "src/cuda/chunks.h"
#include "src/cuda/workspace_layout.h"

namespace msa::cuda {
namespace {

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up_to(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

}  // namespace

SelectShape shape_of(const SelectBlocksParams& params) {
  SelectShape shape;
  shape.query_rows = params.q_idx.size(0);
  shape.groups = params.q_idx.size(1);
  shape.sequences = params.batch.sequences();
  shape.max_keys = params.batch.is_paged ? params.batch.max_pages * params.k_idx.size(1) : params.k_idx.size(0);
  shape.block_size = params.block_size;
  shape.index_dim = params.q_idx.size(2);
  shape.topk = params.topk;
  shape.local_blocks = params.local_blocks;
  shape.is_paged = params.batch.is_paged;
  if (params.k_idx.dtype == DType::kFloat8E4M3) {
    shape.narrow_keys = shape.is_paged ? params.k_idx.size(0) * params.k_idx.size(1) : params.k_idx.size(0);
  }
  return shape;
}

bool takes_select(const SelectBlocksParams& params) {
  const DType dtype = params.q_idx.dtype;
  const std::int64_t index_dim = params.q_idx.size(2);
  return (dtype == DType::kBFloat16 || dtype == DType::kFloat16) &&
         (params.k_idx.dtype == dtype || params.k_idx.dtype == DType::kFloat8E4M3) &&
         (index_dim == 64 || index_dim == 128) && (params.block_size == 64 || params.block_size == 128) &&
         is_copyable(params.q_idx) && is_copyable(params.k_idx);
}

namespace {

/// Of 16-bit copies of float8 keys.
std::int64_t wide_bytes_of(const SelectShape& shape) { return shape.narrow_keys * shape.index_dim * 2; }

/// Cuts `shape` into chunks of `chunk` queries and places what they need.
void lay_out(SelectPlan& plan, const SelectShape& shape, core::ScreenSwitch screening, std::int64_t chunk) {
  plan.chunk_queries = chunk;
  const std::int64_t chunk_rows = chunk * shape.groups;
  const std::int64_t sequences = std::max<std::int64_t>(shape.sequences, 1);
  plan.most_tiles = chunk_rows == 0 ? 0 : divide_up(chunk_rows, plan.tile_rows) + std::min(sequences, chunk);
  plan.most_items = plan.most_tiles * divide_up(plan.most_key_tiles, plan.span_tiles);

  WorkspaceLayout layout;
  layout.place(256);  // counts
  plan.sequence_tiles = layout.place((shape.sequences + 1) * 4);
  plan.tiles = layout.place(plan.most_tiles * 16);
  plan.items = layout.place(plan.most_items * 8);
  plan.maxima = layout.place(chunk_rows * plan.maxima_stride * static_cast<std::int64_t>(sizeof(float)));
  if (plan.widens) plan.wide_keys = layout.place(wide_bytes_of(shape));
  const bool many = plan.schedule == SelectSchedule::kManyRows;
  plan.screen = plan_screening(shape, many, chunk, plan.most_key_tiles, screening, layout);
  plan.bytes = layout.bytes();
}

}  // namespace

SelectPlan plan_select(const SelectShape& shape, SelectSchedule schedule, core::ScreenSwitch screening,
                       std::size_t limit) {
  SelectPlan plan;
  const std::int64_t rows = shape.query_rows * shape.groups;
  const std::int64_t sequences = std::max<std::int64_t>(shape.sequences, 1);
  plan.schedule = schedule;
  if (schedule == SelectSchedule::kAuto) {
    // A tile of many rows is worth it when it is full; of tiles of few rows, two read the same keys then.
    plan.schedule = rows / sequences >= kSelectManyRows ? SelectSchedule::kManyRows : SelectSchedule::kFewRows;
  }
  const std::int64_t wide_bytes = wide_bytes_of(shape);
  if (wide_bytes > kSelectMostWideBytes) plan.schedule = SelectSchedule::kFewRows;
  const bool many = plan.schedule == SelectSchedule::kManyRows;
  plan.widens = many && wide_bytes > 0;
  plan.tile_rows = many ? kSelectManyRows : kSelectFewRows;
  plan.most_key_tiles = divide_up(shape.max_keys, kSelectTileKeys);
  if (many) {
    plan.span_tiles = kSelectManySpan;
  } else {  // four items a multiprocessor, if all sequences together have max_keys (packed), more if each has them
    plan.span_tiles =
        std::clamp(round_up_to(divide_up(plan.most_key_tiles, 4 * kSelectProcessors), kSelectSpanMultiple),
                   kSelectSpanMultiple, kSelectFewSpan);
  }
  plan.maxima_stride = round_up_to(plan.most_key_tiles * kSelectTileKeys / shape.block_size, 8);

  const std::int64_t row_bytes = plan.maxima_stride * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t query_bytes = std::max<std::int64_t>(row_bytes * shape.groups, 1);
  const std::int64_t most = std::max<std::int64_t>(kSelectMaximaBytes / query_bytes / kSelectChunkStep, 1);
  const auto fit = [&](core::ScreenSwitch wanted) {
    const auto bytes_of = [&](std::int64_t chunk) {
      lay_out(plan, shape, wanted, chunk);
      return plan.bytes;
    };
    bytes_of(largest_chunk(std::min(most * kSelectChunkStep, shape.query_rows), kSelectChunkStep, limit, bytes_of));
  };
  fit(screening);
  // The copies that screening makes may be more than all there is; the selection is the same without.
  if (limit != 0 && plan.bytes > limit) fit(core::ScreenSwitch::kNever);
  return plan;
}

}  // namespace msa::cuda
