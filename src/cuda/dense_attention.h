// SPDX-License-Identifier: Apache-2.0
// The plan of dense attention forward on a Hopper GPU: whether the fast kernels take a call, whether the spans of a
// query's keys are work of their own, and where in the workspace things lie. Pure functions of shapes; no device is
// asked. The kernels are in dense_attention.cuh; docs/cuda-dense-attention.md derives the numbers. Tested in
// tests/cuda/dense_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/attention.h"
#include "src/cuda/attention_maps.h"

namespace msa::cuda {

inline constexpr std::int64_t kDenseTileKeys = 128;  ///< keys a tile, counted from the sequence's first
/// Keys of a span: the softmax starts anew at every multiple of it, and spans are merged in order. A span is what one
/// multiprocessor does alone in a decode step, 2 MiB of K and V at head_dim 128; in a prefill a merge every 32 tiles
/// costs some 1.5% of their cycles.
inline constexpr std::int64_t kDenseSpanKeys = 4096;
/// With fewer (tile of queries, kv head) pairs than this the spans of each are items of their own. Some eight a
/// multiprocessor: then the last one to finish costs at most an eighth.
inline constexpr std::int64_t kDenseEnoughTiles = 1024;
/// Most bytes of partial results unless the caller brings more: at 64 heads and 1M keys, 64 queries at once.
inline constexpr std::size_t kDenseWorkspace = std::size_t{1} << 28;

struct DenseAttentionPlan {
  std::int64_t positions_per_tile = 0;
  std::int64_t span_keys = kDenseSpanKeys;
  std::int64_t max_spans = 0;  ///< of a sequence
  bool is_split = false;       ///< an item is a span; its result goes to the workspace, to be merged
  std::int64_t queries_at_once = 0;
  std::int64_t max_items = 0;                                ///< of queries_at_once queries, for one kv head
  std::size_t totals = 0, items = 0, lse2 = 0, partial = 0;  ///< offsets into the workspace, bytes
  std::size_t bytes = 0;
};

/// Whether geometry and dtype are those of the fast path: bfloat16 or float16, head_dim = value_dim in {64, 128}, at
/// most kMaxGroupSize query heads a kv head; keys and values of that type, or both float8.
bool is_fast_geometry(const DenseAttentionParams& params);
/// Whether the copy engine can read q, k and v: 16-byte aligned, strides multiples of 16 bytes.
bool has_fast_layout(const DenseAttentionParams& params);

/// `limit`: most bytes of workspace, 0 for kDenseWorkspace. More than that only when one query takes more.
DenseAttentionPlan plan_dense_attention(const DenseAttentionParams& params, std::size_t limit,
                                        std::int64_t span_keys = kDenseSpanKeys);

/// Runs it on context.stream with context.workspace, which holds plan.bytes. Fast geometry and layout only.
void run_dense_attention(const Context& context, const DenseAttentionParams& params, const DenseAttentionPlan& plan,
                         const TensorView& out, const TensorView& lse);

}  // namespace msa::cuda
