// SPDX-License-Identifier: Apache-2.0
// How the KL loss and its backward cut their work (see index_kl-inl.h; ordered_sums.h for the tasks of the backward).
// Pure functions of shapes, threads and the workspace limit; what they choose changes speed and memory, never a result.
// Tested in tests/unit/plan_test.cc.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "src/cpu/ordered_sums.h"
#include "src/cpu/plan.h"
#include "src/cpu/tile.h"

namespace msa::cpu {

struct IndexKlShape {
  QueryCounts queries;
  std::int64_t kv_heads = 1;
  std::int64_t group_size = 1;
  std::int64_t head_dim = 0;
  std::int64_t index_dim = 0;
  std::int64_t block_size = 0;
  std::int64_t blocks = 0;      ///< of the longest sequence
  std::int64_t topk = 0;        ///< 0: the whole prefix
  bool has_bf16_dots = false;   ///< q and k are bf16, on an instruction set with bf16 dot products
  bool has_bf16_index = false;  ///< q_idx and k_idx as well
};

/// Queries whose rows (group_size of the main branch, one of the index branch) make one score tile.
inline std::int64_t kl_tile_queries(std::int64_t group_size) {
  return std::max<std::int64_t>(1, kScoreRows / group_size);
}

/// Row stride of score tiles: one column behind the block's keys holds the row's maximum.
inline std::int64_t kl_tile_stride(std::int64_t block_size) { return padded_stride(block_size + 1); }

/// Rows of a query in the forward with bf16 dot products: the group's heads and the index.
inline std::int64_t kl_bf16_row_count(std::int64_t group_size) { return (group_size + 16) / 16 * 16; }

/// Scratch memory of one worker, in floats from its begin. With bf16 dot products queries are bf16 [..,
/// padded_inner(head_dim)] and keys bf16 pairs (bf16_dot.h), those of a bf16 index, too; rows of a query are
/// kl_bf16_row_count, and nothing is kept in the strip.
struct IndexKlLayout {
  std::int64_t queries = 0;        ///< [chunk * group_size, head_dim]
  std::int64_t index_queries = 0;  ///< [chunk, index_dim]
  std::int64_t keys = 0;           ///< [head_dim, padded_stride(block_size)]
  std::int64_t index_keys = 0;     ///< [index_dim, padded_stride(block_size)]
  std::int64_t largest = 0;        ///< [chunk, group_size + 1], running maximum of the scores
  std::int64_t totals = 0;         ///< double [chunk, group_size + 1], running sum of the exponentials; bf16: float
  std::int64_t norms = 0;          ///< [chunk], what the teacher's mass is divided by
  std::int64_t factors = 0;       ///< [group_size]; bf16: [2, chunk, rows of a query], what to subtract and to multiply
  std::int64_t values = 0;        ///< double [chunk], each row's KL
  std::int64_t lists = 0;         ///< int32, BlockLists'
  std::int64_t tile = 0;          ///< [kl_tile_queries * (group_size + 1), kl_tile_stride]; bf16: the index's scores
  std::int64_t scores = 0;        ///< bf16: of some queries' heads, [.., padded_stride(block_size)]
  std::int64_t strip = 0;         ///< tiles kept from the first pass for the later ones
  std::int64_t strip_floats = 0;  ///< room for them; tiles beyond are computed again
  std::int64_t end = 0;
};
IndexKlLayout lay_out_index_kl(const IndexKlShape& shape, std::int64_t chunk, bool keep_tiles);

struct IndexKlPlan {
  ChunkPlan chunks;
  bool keep_tiles = true;
};
IndexKlPlan plan_index_kl(const std::string& op, const IndexKlShape& shape, int threads, std::size_t workspace_limit);

/// Scratch memory of one worker in the backward; bf16 as above.
struct IndexKlBackwardLayout {
  std::int64_t lse = 0;            ///< [chunk, group_size + 1], the index branch's last
  std::int64_t norms = 0;          ///< [chunk]
  std::int64_t query_grads = 0;    ///< [chunk, index_dim]
  std::int64_t lists = 0;          ///< int32, BlockLists'
  std::int64_t keys_t = 0;         ///< [head_dim, padded_stride(block_size)]
  std::int64_t index_keys = 0;     ///< [block_size, padded_stride(index_dim)]
  std::int64_t index_keys_t = 0;   ///< [index_dim, padded_stride(block_size)]
  std::int64_t queries = 0;        ///< [kl_tile_queries * group_size, padded_stride(head_dim)]
  std::int64_t index_queries = 0;  ///< [kScoreRows or fewer, padded_stride(index_dim)]
  std::int64_t scores = 0;         ///< [kl_tile_queries * group_size (bf16: 16 more), padded_stride(block_size)]
  std::int64_t index_scores = 0;   ///< [kScoreRows or fewer, padded_stride(block_size)]
  // With a bf16 index its keys and queries are bf16 as those of the main branch, and there are
  std::int64_t index_pairs = 0;    ///< bf16 pairs of kScoreRows queries
  std::int64_t gradient_rows = 0;  ///< bf16 [kScoreRows, padded_inner(block_size)]
  std::int64_t gradients_t = 0;    ///< bf16 [block_size, kScoreRows]
  std::int64_t products = 0;       ///< [block_size or kScoreRows, padded_stride(index_dim)]
  std::int64_t part = 0;           ///< [block_size, index_dim], dk_idx of a block from one task
  std::int64_t end = 0;
};
IndexKlBackwardLayout lay_out_index_kl_backward(const IndexKlShape& shape);

struct IndexKlBackwardPlan {
  int workers = 1;
  std::size_t worker_bytes = 0;
  std::size_t shared_bytes = 0;  ///< sums of dk_idx over tasks

  std::size_t bytes() const { return shared_bytes + worker_bytes * static_cast<std::size_t>(workers); }
};
IndexKlBackwardPlan plan_index_kl_backward(const std::string& op, const IndexKlShape& shape, const Batch& batch,
                                           int threads, std::size_t workspace_limit);

}  // namespace msa::cpu
