// SPDX-License-Identifier: Apache-2.0
// The plan of the KL loss of the index branch on a Hopper GPU: whether the fast kernels take a call, and where in the
// workspace things lie. Pure functions of shapes; no device is asked. The kernels are in index_kl.cuh (products),
// index_kl_merge.cuh (sums over a row's or a block's parts) and sorted_visits.cuh; docs/cuda-index-kl.md derives the
// numbers. Tested in tests/cuda/index_kl_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/index_kl.h"

namespace msa::cuda {

inline constexpr std::int64_t kKlTileRows = 128;  ///< queries a tile: two warpgroups of 64
/// Queries that one item takes of a block's: 16 tiles in the selected stage, as for attention enough for a block's keys
/// (2 Bk (D + Di) bytes) to be little beside them and few enough for a sink to be shared out; in the warmup stage,
/// where every block has many, only so many that the longest sequences are shared out. Constants, because the sum over
/// a block's queries starts anew with every item: no bit of the index keys' gradient may depend on the batch.
inline constexpr std::int64_t kKlVisitsPerItem = 2048, kKlRowsPerItem = 65536;

/// One group's work at a time, of so many queries that the workspace does not grow past its limit; all but `row_values`
/// and `dk` is used again by every group.
struct IndexKlPlan {
  bool is_dense = false;
  std::int64_t queries_at_once = 0;  ///< partial results are kept of
  std::int64_t slots = 0;            ///< partial results a query: topk, or 1 where a tile goes through all its blocks
  std::int64_t blocks_bound = 0;     ///< block numbers of the batch lie below it
  std::int64_t item_queries = 0;     ///< queries that one item takes of a block's, at most
  std::int64_t visit_items = 0;      ///< selected stage: most items
  std::int64_t row_items = 0;        ///< warmup stage: tiles of rows
  std::int64_t block_items = 0;      ///< warmup stage: items a block
  // Offsets into the workspace, bytes. [totals, zero_end) is zeroed before every list of visits.
  std::size_t totals = 0, counts = 0, partial_flags = 0, zero_end = 0, visit_list = 0, sorted_list = 0, items = 0;
  std::size_t sums = 0, values = 0, row_values = 0;            ///< forward
  std::size_t dq_parts = 0, dk_parts = 0, dk = 0, dk_end = 0;  ///< backward
  std::size_t bytes = 0;

  /// Items whose sums of index keys' gradients are kept.
  std::int64_t key_items() const { return is_dense ? blocks_bound * block_items : visit_items; }
};

/// Whether geometry, dtype and alignment are those of the fast path: bfloat16 or float16, the same in both branches,
/// head_dim and index_dim in {64, 128}, block_size in {64, 128}, at most 64 query heads a kv head. Lengths and batch do
/// not matter.
bool takes_index_kl(const IndexKlParams& params);

/// `limit`: most bytes of workspace, 0 for kDefaultWorkspace; more where 1024 queries at once and what is kept of all
/// queries or keys take more. No result depends on it. `item_queries`: 0 for the constants above.
IndexKlPlan plan_fast_index_kl(const IndexKlParams& params, std::size_t limit);
IndexKlPlan plan_fast_index_kl_backward(const IndexKlParams& params, std::size_t limit, std::int64_t item_queries = 0);

// On context.stream with context.workspace, which holds the plan's bytes; `kl`, `grad_output`: a float on the device.
void run_fast_index_kl(const Context& context, const IndexKlParams& params, const IndexKlPlan& plan,
                       const IndexKlSaved& saved, float* kl);
void run_fast_index_kl_backward(const Context& context, const IndexKlParams& params, const IndexKlPlan& plan,
                                const IndexKlSaved& saved, const float* grad_output, const TensorView& dq_idx,
                                const TensorView& dk_idx);

}  // namespace msa::cuda
