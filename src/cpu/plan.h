// SPDX-License-Identifier: Apache-2.0
// How an operator cuts its work: pure functions of shapes, threads and the workspace limit, whose results can be
// printed. A task is a chunk of one sequence's queries (and, where keys differ a head, one kv head); its scratch memory
// comes from the plan and stays bounded however long the sequences are. Plans change speed and memory, never a result.
// Tested in tests/unit/plan_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "msa/batch.h"

namespace msa::cpu {

/// Queries [begin, end) of a sequence.
struct QueryChunk {
  std::int64_t sequence = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

/// The batch cut into chunks of at most `chunk` queries, the ones with the longest prefixes first within a sequence:
/// they take longest, and what starts last should be short.
std::vector<QueryChunk> cut_queries(const Batch& batch, std::int64_t chunk);

/// One task: a chunk and a head.
struct ChunkTask {
  QueryChunk chunk;
  std::int64_t head = 0;
};

/// Every chunk with each of the heads, in order. The tasks beyond a multiple of the workers are cut into pieces that
/// all workers get as many of (3 tasks for 2 workers: two whole, two halves), as long as a piece has kLeastPiece
/// queries: of equal tasks no worker is then left with more than another, and only the last few lose by being cut.
inline constexpr std::int64_t kLeastPiece = 16;
std::vector<ChunkTask> list_tasks(const std::vector<QueryChunk>& chunks, std::int64_t heads, int workers);

/// Queries of the whole batch and of its longest sequence.
struct QueryCounts {
  std::int64_t total = 0;
  std::int64_t longest = 0;
};
QueryCounts count_queries(const Batch& batch);

/// Blocks of the sequence with the most keys.
std::int64_t count_blocks(const Batch& batch, std::int64_t block_size);

struct ChunkPlan {
  std::int64_t chunk = 1;        ///< queries a task
  int workers = 1;               ///< threads that get scratch memory
  std::size_t worker_bytes = 0;  ///< scratch memory of each

  std::size_t bytes() const { return worker_bytes * static_cast<std::size_t>(workers); }
};

/// "chunk 128 queries, 2 workers x 1.50 MiB"
std::string to_string(const ChunkPlan& plan);

struct AttentionShape {
  QueryCounts queries;
  std::int64_t kv_heads = 1;
  std::int64_t group_size = 1;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  std::int64_t block_size = 0;
  std::int64_t topk = 0;       ///< 0: dense, every visible block
  bool has_bf16_dots = false;  ///< bf16 tensors on an instruction set with bf16 dot products
  bool has_tiles = false;      ///< and the forward in AMX tiles (attention_amx.h)
};

/// Where a worker's scratch memory holds what, in floats from its begin; every part starts on a cache line. With bf16
/// dot products the queries are bf16 [chunk * group_size, padded_inner(head_dim)], keys and values bf16 pairs
/// (bf16_dot.h); in AMX tiles all rows are rounded up to 16.
struct AttentionLayout {
  std::int64_t queries = 0;   ///< [chunk * group_size, head_dim]
  std::int64_t sums = 0;      ///< [chunk * group_size, value_dim], weighted sums of values
  std::int64_t largest = 0;   ///< [chunk * group_size], what exponents are relative to
  std::int64_t totals = 0;    ///< [chunk * group_size], running sum of the exponentials
  std::int64_t keys = 0;      ///< [head_dim, padded_stride(block_size)]
  std::int64_t values = 0;    ///< [block_size, padded_stride(value_dim)]
  std::int64_t scores = 0;    ///< [kScoreRows, padded_stride(block_size)]; with bf16 dot products [kBf16Rows, ...]
  std::int64_t products = 0;  ///< with bf16 dot products: [kBf16Rows, padded_stride(value_dim)]
  std::int64_t probabilities =
      0;  ///< with bf16 dot products: bf16 [kBf16Rows, ...], in AMX tiles [16 kMaxRowTiles, padded_inner(block_size)]
  std::int64_t staged_queries = 0;  ///< in AMX tiles: bf16 [2 kStagedRows, padded_inner(head_dim)]
  std::int64_t staged_sums = 0;     ///< in AMX tiles: [2 kStagedRows, value_dim]
  std::int64_t visits = 0;          ///< uint64 [visit_room(chunk, topk)], (block, query) pairs of a sparse chunk
  std::int64_t members = 0;         ///< int32 [chunk], the queries that take part in a block
  std::int64_t seen = 0;            ///< int32 [chunk], whether a query had any block
  std::int64_t end = 0;
};
AttentionLayout lay_out_attention(const AttentionShape& shape, std::int64_t chunk);

/// Throws msa::Error when not even one query at a time on one thread fits `workspace_limit` (0: no limit).
ChunkPlan plan_attention(const std::string& op, const AttentionShape& shape, int threads, std::size_t workspace_limit);

struct BlockMassShape {
  QueryCounts queries;
  std::int64_t kv_heads = 1;
  std::int64_t group_size = 1;
  std::int64_t head_dim = 0;
  std::int64_t block_size = 0;
  std::int64_t blocks = 0;  ///< of the longest sequence
  std::int64_t topk = 0;
};

/// As AttentionLayout, for the operators that rank blocks by their probability mass. The only plan whose memory grows
/// with the keys: a few floats a (query, head, block).
struct BlockMassLayout {
  std::int64_t queries = 0;  ///< [chunk * group_size, head_dim]
  std::int64_t keys = 0;     ///< [head_dim, padded_stride(block_size)]
  std::int64_t scores = 0;   ///< [kScoreRows, padded_stride(block_size)]
  std::int64_t largest = 0;  ///< [chunk * group_size, blocks], maximum score of each block
  std::int64_t sums = 0;     ///< [chunk * group_size, blocks], sum of exponentials of each block
  std::int64_t mass = 0;     ///< [chunk, blocks], the result
  std::int64_t best = 0;     ///< int32 [2, topk], for ranking a row
  std::int64_t end = 0;
};
BlockMassLayout lay_out_block_mass(const BlockMassShape& shape, std::int64_t chunk);

ChunkPlan plan_block_mass(const std::string& op, const BlockMassShape& shape, int threads, std::size_t workspace_limit);

}  // namespace msa::cpu
