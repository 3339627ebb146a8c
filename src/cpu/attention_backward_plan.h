// SPDX-License-Identifier: Apache-2.0
// How the backward of attention cuts its work (attention_backward-inl.h says what a task does, ordered_sums.h which
// tasks there are). Pure functions of shapes, threads and the workspace limit, which change speed and memory, never a
// result. Tested in tests/unit/plan_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "src/cpu/bf16_dot.h"
#include "src/cpu/ordered_sums.h"
#include "src/cpu/plan.h"
#include "src/cpu/tile.h"

namespace msa::cpu {

/// Keys a block of dense attention: no operator argument says it, and dk and dv must not depend on anything else.
inline constexpr std::int64_t kDenseBlock = 128;

/// Queries whose rows make one score tile.
inline std::int64_t backward_tile_queries(std::int64_t group_size) {
  return group_size > kScoreRows ? 1 : kScoreRows / group_size;
}

/// The same for bf16 products, whose sums over rows are written out once a tile: 256 rows, what one product may sum
/// over.
inline std::int64_t backward_bf16_tile_queries(std::int64_t group_size) {
  return group_size > 256 ? 1 : 256 / group_size;
}
/// Row stride, in elements, of a tile's rows turned round: an odd number of cache lines.
inline std::int64_t backward_bf16_row_stride(std::int64_t group_size) {
  return (padded_inner(backward_bf16_tile_queries(group_size) * group_size) / 32 | 1) * 32;
}

/// Scratch memory of one worker, in floats from its begin.
struct BackwardLayout {
  std::int64_t terms = 0;        ///< RowTerms [chunk * group_size]
  std::int64_t totals = 0;       ///< double [chunk * group_size], sums of exponentials; without bf16 dot products
  std::int64_t query_grads = 0;  ///< [chunk * group_size, head_dim]
  std::int64_t lists = 0;        ///< int32, BlockLists'
  std::int64_t keys = 0;         ///< [block_size, padded_stride(head_dim)]
  std::int64_t keys_t = 0;       ///< [head_dim, padded_stride(block_size)]
  std::int64_t values_t = 0;     ///< [value_dim, padded_stride(block_size)]
  std::int64_t queries = 0;      ///< [tile rows, padded_stride(head_dim)]
  std::int64_t out_grads = 0;    ///< [tile rows, padded_stride(value_dim)]
  std::int64_t scores = 0;       ///< [tile rows, padded_stride(block_size)]
  std::int64_t grads = 0;        ///< as scores
  // With bf16 dot products keys, keys_t and values_t are bf16 pairs (bf16_dot.h), queries and out_grads bf16 [tile
  // rows, padded_inner(dim)], scores and grads have kBf16Rows rows, and there are, in bf16:
  std::int64_t queries_t = 0;          ///< [head_dim, backward_bf16_row_stride]
  std::int64_t out_grads_t = 0;        ///< [value_dim, backward_bf16_row_stride]
  std::int64_t gradient_rows = 0;      ///< [tile rows, padded_inner(block_size) + 32], dS
  std::int64_t gradient_pairs = 0;     ///< pairs of tile rows, dS
  std::int64_t probability_pairs = 0;  ///< pairs of tile rows, P
  std::int64_t products = 0;           ///< float [kBf16Rows or dim, padded_stride(dim or block_size)]
  std::int64_t tile_rows = 0;          ///< int32 [tile rows], their rows in the chunk
  std::int64_t part = 0;               ///< [block_size, head_dim + value_dim], dk and dv of a block from this task
  std::int64_t end = 0;
};
/// `blocks` of the longest sequence.
BackwardLayout lay_out_backward(const AttentionShape& shape, std::int64_t blocks);

struct BackwardPlan {
  int workers = 1;
  std::size_t worker_bytes = 0;
  std::int64_t heads_at_once = 1;  ///< kv heads whose sums over tasks are held at a time
  std::size_t shared_bytes = 0;    ///< these sums

  std::size_t bytes() const { return shared_bytes + worker_bytes * static_cast<std::size_t>(workers); }
};

std::string to_string(const BackwardPlan& plan);

/// Throws msa::Error when the least that works does not fit `workspace_limit` (0: no limit).
BackwardPlan plan_attention_backward(const std::string& op, const AttentionShape& shape, const Batch& batch,
                                     int threads, std::size_t workspace_limit);

}  // namespace msa::cpu
