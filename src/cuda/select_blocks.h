// SPDX-License-Identifier: Apache-2.0
// How select_blocks cuts its work on a GPU: which kernels, how many rows a tile, how many keys a work item, what lies
// where in the workspace. Plain host arithmetic on shapes, no CUDA type, nothing read from the device. The kernels are
// in select_blocks.cuh; docs/cuda-select-blocks.md derives the numbers. Tested in tests/cuda/select_blocks_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/select_blocks.h"
#include "src/core/screen_switch.h"
#include "src/cuda/screen_blocks.h"

namespace msa::cuda {

/// Keys a tile of scores is wide: one matrix instruction's columns.
inline constexpr std::int64_t kSelectTileKeys = 128;
/// Rows (queries x groups, groups fastest) a tile is high. Few: one warpgroup, bound by reading the keys. Many: two
/// warpgroups of 128 rows, so that a key tile is read once for 256 rows: 16 bytes a cycle and multiprocessor.
inline constexpr std::int64_t kSelectFewRows = 64;
inline constexpr std::int64_t kSelectManyRows = 256;
/// Key tiles a work item, at most. Many: 4096 keys, 65,000 cycles, beside which the queries' loading is 1.5% and the
/// last item's end 1% of a chunk. Few: 1024 keys, so that 132 multiprocessors share 128 K keys.
inline constexpr std::int64_t kSelectManySpan = 32;
inline constexpr std::int64_t kSelectFewSpan = 8;
inline constexpr std::int64_t kSelectSpanMultiple = 4;  ///< maxima are written four blocks at a time
/// Queries a chunk are a multiple of this, so that tiles are whole whatever the groups.
inline constexpr std::int64_t kSelectChunkStep = 256;
/// Bytes of block maxima that one chunk of queries may leave in the workspace, as long as it has a step of them.
inline constexpr std::int64_t kSelectMaximaBytes = std::int64_t{256} << 20;
/// Bytes of 16-bit copies of float8 keys beyond which there are none: such keys are read by tiles of few rows.
inline constexpr std::int64_t kSelectMostWideBytes = std::int64_t{2} << 30;
/// Multiprocessors that a plan counts on; any number gives the same results.
inline constexpr std::int64_t kSelectProcessors = 132;

enum class SelectSchedule {
  kAuto,      ///< by the rows a sequence has
  kFewRows,   ///< decoding, verification
  kManyRows,  ///< prefill, training
};

struct SelectShape {
  std::int64_t query_rows = 0;  ///< rows of q_idx
  std::int64_t groups = 1;
  std::int64_t sequences = 0;
  std::int64_t max_keys = 0;  ///< that a sequence can have: rows of k_idx, or max_pages * page
  std::int64_t block_size = 128;
  std::int64_t index_dim = 128;
  std::int64_t topk = 16;
  std::int64_t local_blocks = 1;
  bool is_paged = false;
  std::int64_t narrow_keys = 0;  ///< rows of k_idx when it is float8, which 16-bit copies would have
};

/// The workspace, in this order, every part 256-byte aligned: counts, first tile of each sequence, tiles, items,
/// maxima, 16-bit copies of float8 keys, and what screening needs.
struct SelectPlan {
  SelectSchedule schedule = SelectSchedule::kFewRows;
  std::int64_t tile_rows = kSelectFewRows;
  std::int64_t span_tiles = 1;      ///< key tiles a work item, at most; a multiple of kSelectSpanMultiple
  std::int64_t chunk_queries = 0;   ///< query rows whose maxima are in the workspace at a time
  std::int64_t maxima_stride = 0;   ///< floats a row of maxima, a multiple of 8, at least the blocks of max_keys
  std::int64_t most_tiles = 0;      ///< row tiles that a chunk can have
  std::int64_t most_key_tiles = 0;  ///< of a sequence
  std::int64_t most_items = 0;      ///< work items that a chunk can have

  std::size_t sequence_tiles = 0;  ///< int32 [sequences + 1]
  std::size_t tiles = 0;           ///< SelectTile [most_tiles]
  std::size_t items = 0;           ///< SelectItem [most_items]
  std::size_t maxima = 0;          ///< float [chunk_queries * groups, maxima_stride]
  bool widens = false;             ///< float8 keys are copied to 16 bits before they are scored
  std::size_t wide_keys = 0;       ///< [rows of k_idx, index_dim] in the type of the queries
  ScreenPlan screen;
  std::size_t bytes = 0;

  bool operator==(const SelectPlan&) const = default;

  /// Query rows of the chunk that begins with row `first` of `rows`.
  std::int64_t queries_of_chunk(std::int64_t first, std::int64_t rows) const {
    const std::int64_t most = screen.use && first == 0 ? screen.first_queries : chunk_queries;
    return rows - first < most ? rows - first : most;
  }
};

/// `limit`: most bytes of workspace, 0 for no limit but kSelectMaximaBytes; it takes screening away before the call.
/// More than that only when one step of queries takes more.
SelectPlan plan_select(const SelectShape& shape, SelectSchedule schedule = SelectSchedule::kAuto,
                       core::ScreenSwitch screening = core::ScreenSwitch::kAuto, std::size_t limit = 0);
SelectShape shape_of(const SelectBlocksParams& params);

/// Whether the kernels take these tensors: queries of bfloat16 or float16, keys of the same or of float8, index_dim 64
/// or 128, block_size 64 or 128, q_idx and k_idx as the copy engine reads them: see is_copyable.
bool takes_select(const SelectBlocksParams& params);

/// Enqueues the whole selection on `stream` (a cudaStream_t): plan.bytes of `workspace`, 256-byte aligned. Needs
/// takes_select(params). Never waits for the device, so that a graph can capture it.
void launch_select(const SelectPlan& plan, const SelectBlocksParams& params, const TensorView& blocks, void* workspace,
                   std::int64_t multiprocessors, void* stream);

}  // namespace msa::cuda
