// SPDX-License-Identifier: Apache-2.0
// The plan of the sparse attention forward on a Hopper GPU: whether the fast kernels take a call, how many queries go
// at once, and where in the workspace things lie. Pure functions of shapes; no device is asked. The kernels are in
// reverse_index.cuh, query_tiles.cuh, sparse_attention.cuh, shared_tiles.cuh and attention_combine.cuh;
// docs/cuda-sparse-attention.md derives the numbers.
// Tested in tests/cuda/sparse_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "msa/attention.h"
#include "src/cuda/attention_maps.h"

namespace msa::cuda {

/// Tiles a work item takes at most. An item reads K and V once, 4 Bk D bytes; a tile reads and writes 4 * 128 D, so
/// from 16 tiles on a block's keys are a thirtieth of the traffic, and a sink of 128K visits still makes a thousand
/// items.
inline constexpr std::int64_t kTilesPerItem = 16;
/// A tile of neighbouring queries goes query by query, without partial results, where each of its blocks serves at
/// least one in kMostWaste of them: then a block's keys cost it what the partial results would, 64 KiB from the L2
/// cache at some 24 bytes a cycle against 96 KiB at 18.6.
inline constexpr std::int64_t kMostWaste = 2;
/// Most bytes of partial results unless the caller sets a limit: some 8K queries at 64 heads and topk 16.
inline constexpr std::size_t kDefaultWorkspace = std::size_t{2} << 30;

/// Bytes of what reverse_index.cuh keeps in the workspace: Visit, WorkItem, TileBlock, WorkTotals.
inline constexpr std::int64_t kVisitBytes = 8, kItemBytes = 32, kTileBlockBytes = 24, kTotalsBytes = 16;

/// Which orders of the work a plan may take. They give the same bits.
struct AttentionOrders {
  std::optional<bool> is_direct;         ///< unset: by the number of visits
  std::int64_t most_waste = kMostWaste;  ///< 0: no tile goes query by query
};

struct SparseAttentionPlan {
  std::int64_t queries_at_once = 0;  ///< queries a chunk
  std::int64_t positions_per_tile = 0;
  std::int64_t blocks_bound = 0;  ///< block numbers of the batch lie below it
  std::int64_t bins = 0;          ///< kv_heads * blocks_bound
  std::int64_t max_items = 0;
  bool is_direct = false;  ///< no lists: the attention kernel works out its items from the selection
  std::int64_t most_waste = 0, most_blocks = 0;  ///< of a tile that goes query by query; 0: there are none
  // Offsets into the workspace, bytes. [totals, zero_end) is zeroed before a chunk.
  std::size_t totals = 0, counts = 0, partial_flags = 0, zero_end = 0, visits = 0, items = 0, lse = 0, partial = 0;
  std::size_t tile_counts = 0, shared_tiles = 0, tile_blocks = 0;
  std::size_t bytes = 0;
};

/// Whether geometry and dtype are those of the fast path: bfloat16 or float16, head_dim = value_dim in {64, 128},
/// block_size in {64, 128}, at most kMaxGroupSize query heads a kv head. Lengths and batch do not matter.
bool is_fast_geometry(const SparseAttentionParams& params);
/// Whether the copy engine can read q, k and v: 16-byte aligned, strides multiples of 16 bytes.
bool has_fast_layout(const SparseAttentionParams& params);

/// `limit`: most bytes of workspace, 0 for kDefaultWorkspace. More than that only when one query takes more.
SparseAttentionPlan plan_sparse_attention(const SparseAttentionParams& params, std::size_t limit,
                                          const AttentionOrders& orders = {});

/// Runs it on context.stream with context.workspace, which holds plan.bytes. Fast geometry and layout only.
void run_sparse_attention(const Context& context, const SparseAttentionParams& params, const SparseAttentionPlan& plan,
                          const TensorView& out, const TensorView& lse);

}  // namespace msa::cuda
