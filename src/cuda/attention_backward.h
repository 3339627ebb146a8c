// SPDX-License-Identifier: Apache-2.0
// The plan of the attention backward, sparse and dense, on a Hopper GPU: whether the fast kernels take a call, how many
// heads and queries go at once, and where in the workspace things lie. Pure functions of shapes; no device is asked.
// The kernels are in reverse_index.cuh, sorted_visits.cuh, attention_backward.cuh and dense_attention_backward.cuh;
// docs/cuda-attention-backward.md derives the numbers. Tested in tests/cuda/attention_backward_test.cc and
// dense_attention_backward_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/attention.h"
#include "msa/context.h"

namespace msa::cuda {

/// Tiles a piece of a list takes at most. A piece is a thread block's work: 1 to 2 ms at head dimension 128, so that a
/// sink that all queries visit is spread over the chip. It is also what dk and dv are summed by, hence the same for
/// every call of a geometry: a piece's bits depend on its visits alone.
inline constexpr std::int64_t kTilesPerPiece = 512;
/// Most bytes unless the caller sets a limit, or what one kv head and kMinQueries take, if that is more.
inline constexpr std::size_t kDefaultBackwardWorkspace = std::size_t{2} << 30;
inline constexpr std::int64_t kMinBackwardQueries = 8192;

/// How a geometry is cut into tiles.
struct BackwardTiles {
  /// Whether each of the two computing warpgroups has half of the block's keys, and both all rows of a tile; else each
  /// has half of the rows. Either way its dk and dv are 64 keys' and fit into registers.
  bool splits_keys;
  std::int64_t rows;         ///< query rows a tile
  std::int64_t slot_floats;  ///< of a piece's sums of dk and dv, both warpgroups
};
constexpr BackwardTiles backward_tiles(std::int64_t head_dim, std::int64_t block_size) {
  // 128 rows of two tensors in two stages are 128 KiB at head dimension 128: too much beside 64 KiB of K and V.
  return {block_size == 128, head_dim == 128 && block_size == 128 ? 64 : 128, 2 * head_dim * 128};
}

struct AttentionBackwardPlan {
  std::int64_t heads_at_once = 0;    ///< kv heads
  std::int64_t queries_at_once = 0;  ///< queries whose partial dq are kept
  std::int64_t positions_per_tile = 0;
  std::int64_t visits_per_piece = 0;
  std::int64_t blocks_bound = 0;  ///< block numbers of the batch lie below it
  std::int64_t max_items = 0;     ///< pieces of the heads in work; dense: blocks, which are not cut
  // Offsets into the workspace, bytes. [totals, zero_end) is zeroed for every set of heads.
  std::size_t totals = 0, counts = 0, partial_flags = 0, zero_end = 0;
  std::size_t visits = 0, sorted = 0, items = 0;
  std::size_t stats = 0;    ///< RowStats of every query and head
  std::size_t sums = 0;     ///< dk and dv of every piece, float
  std::size_t partial = 0;  ///< dq of every visit of the queries in work, storage type
  std::size_t bytes = 0;
};

// Dense attention comes as params without blocks: every block of 128 keys is visited by all queries from its first key
// on.

/// Whether geometry and dtype are those of the fast path, and the copy engine can read q, k and v.
bool takes_backward(const SparseAttentionParams& params);
/// Whether it can read dout, too; contiguous tensors of torch it can.
bool takes_gradient(const ConstTensorView& dout);

/// `limit`: most bytes of workspace, 0 for the default. More than that only when one head and query take more. Tests
/// cut lists into smaller pieces.
AttentionBackwardPlan plan_attention_backward(const SparseAttentionParams& params, std::size_t limit,
                                              std::int64_t tiles_per_piece = kTilesPerPiece);

/// Runs it on context.stream with context.workspace, which holds plan.bytes.
void run_attention_backward(const Context& context, const SparseAttentionParams& params,
                            const AttentionBackwardPlan& plan, const AttentionSaved& saved,
                            const AttentionGrads& grads);
void run_dense_attention_backward(const Context& context, const SparseAttentionParams& params,
                                  const AttentionBackwardPlan& plan, const AttentionSaved& saved,
                                  const AttentionGrads& grads);

}  // namespace msa::cuda
