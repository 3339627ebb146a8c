// SPDX-License-Identifier: Apache-2.0
// How the backward of attention cuts its work (see attention_backward-inl.h for the two passes). Pure functions of shapes,
// threads and the workspace limit; what they choose changes speed and memory, never a result. Tested in
// tests/unit/plan_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "src/cpu/plan.h"
#include "src/cpu/tile.h"

namespace msa::cpu {

/// Keys a block of dense attention: no operator argument says it, and dk and dv must not depend on anything else.
inline constexpr std::int64_t kDenseBlock = 128;

struct BackwardShape {
  AttentionShape attention;
  std::int64_t sequences = 0;
  std::int64_t blocks = 0;      ///< key blocks of all sequences together
  std::int64_t row_blocks = 0;  ///< blocks of a row at most: topk, or all of the longest sequence
};

/// Queries whose rows make one score tile of the key pass.
inline std::int64_t backward_tile_queries(std::int64_t group_size) {
  return group_size > kScoreRows ? 1 : kScoreRows / group_size;
}

/// Row stride of the query pass's score tiles: two columns behind the block's keys hold the row's maximum and sum.
inline std::int64_t backward_tile_stride(std::int64_t block_size) { return padded_stride(block_size + 2); }

/// A block chosen by everybody would be one task as long as all the others together. Lists longer than this are cut into
/// splits, which are summed apart and then added in order; twice the average list, so that few blocks are cut.
inline std::int64_t backward_split_queries(const AttentionShape& shape) {
  return shape.topk == 0 ? INT64_MAX : 2 * shape.topk * shape.block_size;
}

/// Scratch memory of one worker in the query pass (dq), in floats from its begin.
struct QueryPassLayout {
  std::int64_t queries = 0;      ///< [chunk * group_size, head_dim]
  std::int64_t out_grads = 0;    ///< [chunk * group_size, value_dim]
  std::int64_t query_grads = 0;  ///< [chunk * group_size, head_dim]
  std::int64_t keys = 0;         ///< [block_size, padded_stride(head_dim)]
  std::int64_t keys_t = 0;       ///< [head_dim, padded_stride(block_size)]
  std::int64_t values_t = 0;     ///< [value_dim, padded_stride(block_size)]
  std::int64_t sums = 0;          ///< [kScoreRows or fewer, head_dim]: what one block adds to query_grads
  std::int64_t row_sums = 0;      ///< RowSums [chunk * group_size]
  std::int64_t walk = 0;          ///< int32, BlockWalk's
  std::int64_t tile = 0;          ///< [2, kScoreRows or fewer, backward_tile_stride]: scores and gradients
  std::int64_t strip = 0;         ///< tiles kept from the first time through the blocks for the second
  std::int64_t strip_floats = 0;  ///< room for them; tiles beyond are computed again
  std::int64_t end = 0;
};
QueryPassLayout lay_out_query_pass(const BackwardShape& shape, std::int64_t chunk, bool keep_tiles);

/// Scratch memory of one worker in the key pass (dk, dv).
struct KeyPassLayout {
  std::int64_t queries = 0;    ///< [tile rows, padded_stride(head_dim)]
  std::int64_t out_grads = 0;  ///< [tile rows, padded_stride(value_dim)]
  std::int64_t keys_t = 0;     ///< [head_dim, padded_stride(block_size)]
  std::int64_t values_t = 0;   ///< [value_dim, padded_stride(block_size)]
  std::int64_t scores = 0;     ///< [tile rows, padded_stride(block_size)]
  std::int64_t grads = 0;      ///< as scores
  std::int64_t part = 0;       ///< [block_size, head_dim + value_dim], a few rows' sum
  std::int64_t split = 0;      ///< as part, a split's sum
  std::int64_t total = 0;      ///< as part, the block's sum
  std::int64_t end = 0;
};
KeyPassLayout lay_out_key_pass(const AttentionShape& shape);

struct BackwardPlan {
  ChunkPlan query_pass;
  bool keep_tiles = true;  ///< see QueryPassLayout::strip
  int key_workers = 1;
  std::size_t key_worker_bytes = 0;
  std::int64_t heads_at_once = 1;  ///< kv heads whose reverse index is held at a time
  bool share_splits = true;        ///< splits of a block are tasks of their own, each with a buffer for its sum
  std::size_t shared_bytes = 0;    ///< the terms of rows and heads, reverse index, sums of splits at most

  std::size_t bytes() const;
};

std::string to_string(const BackwardPlan& plan);

/// Throws msa::Error when the least that works does not fit `workspace_limit` (0: no limit).
BackwardPlan plan_attention_backward(const std::string& op, const BackwardShape& shape, int threads,
                                     std::size_t workspace_limit);

}  // namespace msa::cpu
