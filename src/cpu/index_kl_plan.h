// SPDX-License-Identifier: Apache-2.0
// How the KL loss and its backward cut their work (see index_kl-inl.h). Pure functions of shapes, threads and the workspace
// limit; what they choose changes speed and memory, never a result. Tested in tests/unit/plan_test.cc.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

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
  std::int64_t row_blocks = 0;  ///< blocks of a row at most: topk, or all of the longest sequence
};

/// Queries whose rows (group_size of the main branch, one of the index branch) make one score tile.
inline std::int64_t kl_tile_queries(std::int64_t group_size) {
  return std::max<std::int64_t>(1, kScoreRows / group_size);
}

/// Row stride of score tiles: one column behind the block's keys holds the row's maximum.
inline std::int64_t kl_tile_stride(std::int64_t block_size) { return padded_stride(block_size + 1); }

/// Scratch memory of one worker, in floats from its begin.
struct IndexKlLayout {
  std::int64_t queries = 0;        ///< [chunk * group_size, head_dim]
  std::int64_t index_queries = 0;  ///< [chunk, index_dim]
  std::int64_t keys = 0;           ///< [head_dim, padded_stride(block_size)]
  std::int64_t index_keys = 0;     ///< [index_dim, padded_stride(block_size)]
  std::int64_t largest = 0;        ///< [chunk, group_size + 1], running maximum of the scores
  std::int64_t totals = 0;         ///< double [chunk, group_size + 1], running sum of the exponentials
  std::int64_t norms = 0;          ///< [chunk], what the teacher's mass is divided by
  std::int64_t factors = 0;        ///< [group_size]
  std::int64_t values = 0;         ///< double [chunk], each row's KL
  std::int64_t walk = 0;           ///< int32, BlockWalk's
  std::int64_t tile = 0;           ///< [kl_tile_queries * (group_size + 1), kl_tile_stride]
  std::int64_t strip = 0;          ///< tiles kept from the first pass for the later ones
  std::int64_t strip_floats = 0;   ///< room for them; tiles beyond are computed again
  std::int64_t end = 0;
};
IndexKlLayout lay_out_index_kl(const IndexKlShape& shape, std::int64_t chunk, bool keep_tiles);

struct IndexKlPlan {
  ChunkPlan chunks;
  bool keep_tiles = true;
};
IndexKlPlan plan_index_kl(const std::string& op, const IndexKlShape& shape, int threads, std::size_t workspace_limit);

/// Queries a task of the backward. Part of the result (a task's sum of dk_idx is one chain of roundings), so it depends on
/// the sequence alone: four tasks a sequence and group, within what keeps a block's loading cheap and its tiles in cache.
inline std::int64_t kl_backward_chunk(std::int64_t sequence_queries) {
  return std::clamp<std::int64_t>((sequence_queries + 31) / 32 * 8, 16, 64);
}

/// Scratch memory of one worker in the backward: that of a chunk, and more.
struct IndexKlBackwardLayout {
  IndexKlLayout chunk;
  std::int64_t index_query_tile = 0;   ///< [kl_tile_queries, padded_stride(index_dim)]
  std::int64_t index_query_grads = 0;  ///< [chunk, index_dim]
  std::int64_t index_key_rows = 0;     ///< [block_size, padded_stride(index_dim)]
  std::int64_t sums = 0;               ///< [kl_tile_queries, index_dim]: what one block adds to index_query_grads
  std::int64_t end = 0;
};
IndexKlBackwardLayout lay_out_index_kl_backward(const IndexKlShape& shape, bool keep_tiles);

/// A task of the backward: queries of a sequence in one group, with a sum of its own for dk_idx of the blocks they see.
struct IndexKlTask {
  QueryChunk chunk;
  std::int64_t group = 0;
  std::int64_t blocks = 0;     ///< [0, blocks) are seen
  std::int64_t sum_begin = 0;  ///< block of the round's buffer where the task's sums begin
};

struct IndexKlBackwardPlan {
  std::vector<IndexKlTask> tasks;
  std::vector<std::int64_t> round_ends;  ///< tasks [round_ends[i-1], round_ends[i]) run together, sums added after each
  std::int64_t round_blocks = 0;         ///< blocks of the largest round's buffer
  bool keep_tiles = true;                ///< see IndexKlLayout::strip
  int workers = 1;
  std::size_t worker_bytes = 0;
  std::size_t shared_bytes = 0;  ///< dk_idx in float and a round's sums
};
IndexKlBackwardPlan plan_index_kl_backward(const std::string& op, const IndexKlShape& shape, const Batch& batch,
                                           int threads, std::size_t workspace_limit);

}  // namespace msa::cpu
