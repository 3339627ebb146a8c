// SPDX-License-Identifier: Apache-2.0
// How select_blocks cuts its work. Sequences with many rows are cut into chunks of queries; a chunk sees all candidate
// blocks, screened or not. Sequences with few rows (decoding) are cut into spans of blocks, so that all threads
// work on one sequence. Pure functions of shapes, threads and the workspace limit. Tested in tests/unit/plan_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "src/cpu/plan.h"

namespace msa::cpu {

/// Rows (queries x groups) up to which a sequence is cut into spans of blocks: its scores, one a block, then stay
/// small, and one pass over the keys serves them all.
inline constexpr std::int64_t kFewRows = 64;
/// Keys of a span: 512 KiB of them at 128 dimensions of 16 bits, a few hundred microseconds of one core.
inline constexpr std::int64_t kSpanKeys = 2048;
/// Rows of a strip, side by side in lanes: two vectors of AVX-512.
inline constexpr std::int64_t kStripRows = 32;
/// Blocks whose products are looked at together: a vector of rows finds its bounds in the L1 cache for all of them.
inline constexpr std::int64_t kWindowBlocks = 64;

/// Blocks that may be screened in one go.
inline constexpr std::int64_t kScreenedTogether = 8;

struct SelectionShape {
  QueryCounts queries;
  std::int64_t kv_heads = 1;
  std::int64_t index_dim = 0;
  std::int64_t block_size = 0;
  std::int64_t topk = 0;
  std::int64_t screen_bytes = 0;      ///< of a row as it is screened; 0: no screening
  bool is_screened_in_place = false;  ///< keys are screened where they lie, without a copy
  bool screens_few = false;           ///< few rows are screened, too: lay_out_span
  std::int64_t screen_blocks = 0;     ///< blocks whose bounds and copies tasks could share
};

/// As AttentionLayout, for a chunk of select_blocks.
struct SelectionLayout {
  std::int64_t queries = 0;     ///< [rows, index_dim], rows = chunk * kv_heads
  std::int64_t packed = 0;      ///< [strips of kStripRows, index_dim, kStripRows]
  std::int64_t keys = 0;        ///< [block_size, index_dim]
  std::int64_t scores = 0;      ///< [block_size, kStripRows]
  std::int64_t best = 0;        ///< int32 [rows, 2, topk], order keys and ids of the blocks taken so far
  std::int64_t rows = 0;        ///< RowTopk [rows]
  std::int64_t limits = 0;      ///< int32 [rows], candidates are the blocks below
  std::int64_t least = 0;       ///< int32 [rows], order key that a block must have to be taken
  std::int64_t row_ids = 0;     ///< int32 [rows], the rows that are not (or no longer) screened
  std::int64_t row_keys = 0;    ///< [rows] of screen_bytes, in groups of 16; from here on only with screening
  std::int64_t row_bounds = 0;  ///< float or int32 [7 + kWindowBlocks, rows]: see ScreenedChunk
  std::int64_t lower = 0;       ///< [rows, bound_buckets(topk)], the highest lower bounds
  std::int64_t candidates = 0;  ///< Candidate [rows, candidate_capacity(topk)]
  std::int64_t visits = 0;      ///< uint64 [rows, candidate_capacity(topk)], (block, row, candidate) to be rescored
  std::int64_t block_keys = 0;  ///< [block_size] rows of screen_bytes, of a block that is not shared
  std::int64_t end = 0;
};
SelectionLayout lay_out_selection(const SelectionShape& shape, std::int64_t chunk);

/// Buckets of blocks whose highest lower bound is kept: so many that most of the topk best blocks have one of their
/// own.
constexpr std::int64_t bound_buckets(std::int64_t topk) { return (4 * topk + 63) / 64 * 64; }
/// Candidates a row may have left after a pruning; one with more is not screened further. On random keys int8 leaves
/// three times topk of a row at its end and up to nine times on the way: a limit that one row in a hundred passes costs
/// as much as those rows of sixteen do unscreened (docs/select-blocks.md).
constexpr std::int64_t candidate_limit(std::int64_t topk) { return 12 * topk + 64; }
/// Room of a row's list: what a pruning leaves, some more, so that it is not pruned for every one, and a partial block at
/// the end.
constexpr std::int64_t candidate_capacity(std::int64_t topk) { return candidate_limit(topk) + kWindowBlocks + 1; }

struct SelectionPlan : ChunkPlan {
  std::int64_t shared_blocks = 0;  ///< blocks that are quantised and bounded for all tasks; the others by each task
  std::size_t shared_bytes = 0;
  std::size_t total_bytes() const { return bytes() + shared_bytes; }
};

/// Plan of the sequences with many rows. Throws msa::Error when not even one query at a time on one thread fits.
SelectionPlan plan_selection(const std::string& op, const SelectionShape& shape, int threads,
                             std::size_t workspace_limit);

/// Plan of the sequences with few rows.
struct SpanPlan {
  int workers = 1;
  std::size_t worker_bytes = 0;
  std::int64_t score_floats = 0;  ///< block scores of the sequences that are in work at a time

  std::size_t bytes() const {
    return worker_bytes * static_cast<std::size_t>(workers) + static_cast<std::size_t>(score_floats) * sizeof(float);
  }
};

/// As AttentionLayout, for a span of blocks.
struct SpanLayout {
  std::int64_t queries = 0;     ///< [kFewRows, index_dim]
  std::int64_t keys = 0;        ///< [index_dim, kStripRows]
  std::int64_t scores = 0;      ///< [kFewRows, padded_stride(block_size)]
  std::int64_t best = 0;        ///< int32 [4, topk + 1]
  std::int64_t row_keys = 0;    ///< bf16 [kFewRows, padded_inner(index_dim)], the rows as they are screened
  std::int64_t block_keys = 0;  ///< bf16 [block_size, padded_inner(index_dim)], a block as it is screened
  std::int64_t end = 0;
};
SpanLayout lay_out_span(const SelectionShape& shape);

/// `largest_scores` and `all_scores`: block scores of the sequence with most of them, and of all. The plan's
/// score_floats is at least the first; 0 says that the limit does not allow that, and the sequences are to be cut into
/// chunks.
SpanPlan plan_spans(const SelectionShape& shape, std::int64_t largest_scores, std::int64_t all_scores, int threads,
                    std::size_t workspace_limit);

}  // namespace msa::cpu
