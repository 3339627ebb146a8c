// SPDX-License-Identifier: Apache-2.0
// One kernel that holds cu_seqlens, page table, positions and block ids against the rules of SPEC section 7 and raises
// a flag when one is broken. Every element is looked at on its own, and no index is taken from an element that was not
// looked at first, so that it touches nothing out of range whatever the arrays hold. It does not say which rule: the
// host finds that out on copies (src/ops/device_call.cc). Tested in tests/cuda/check_test.cc.
#pragma once

#include "src/cuda/batch.cuh"
#include "src/cuda/check.h"

namespace msa::cuda {

struct CheckArguments {
  BatchView batch;
  std::int64_t query_rows = 0;
  std::int64_t key_rows = 0;  ///< packed: rows; paged: pages
  std::int64_t page = 0;      ///< tokens a page; 0 when packed
  std::int64_t table_entries = 0;
  Strided<const std::int32_t> blocks;  ///< data null: none
  std::int64_t kv_heads = 0, block_rows = 0;
  std::int32_t topk = 0, block_size = 1;
  std::int32_t* broken = nullptr;  ///< set to 1
};

inline CheckArguments check_arguments(const Contents& contents, void* flag) {
  CheckArguments arguments;
  arguments.batch = view_of(*contents.batch);
  arguments.query_rows = contents.query_rows;
  arguments.key_rows = contents.key_rows;
  arguments.page = contents.page;
  arguments.table_entries = static_cast<std::int64_t>(contents.batch->page_table.size());
  if (!contents.blocks.empty()) {
    arguments.blocks = strided<std::int32_t>(contents.blocks);
    arguments.kv_heads = contents.blocks.size(0);
    arguments.block_rows = contents.blocks.size(1);
    arguments.topk = static_cast<std::int32_t>(contents.blocks.size(2));
    arguments.block_size = static_cast<std::int32_t>(contents.block_size);
  }
  arguments.broken = static_cast<std::int32_t*>(flag);
  return arguments;
}

/// Entry s of an array of bounds.
__device__ inline bool bound_holds(const std::int32_t* bounds, std::int64_t s, std::int64_t sequences,
                                   std::int64_t rows) {
  if (s == 0 && bounds[0] != 0) return false;
  if (s > 0 && bounds[s] < bounds[s - 1]) return false;
  return s < sequences || bounds[s] <= rows;
}

/// Sequence s: its lengths and its queries.
__device__ inline bool sequence_holds(const CheckArguments& a, std::int32_t s) {
  const std::int64_t keys = a.batch.keys(s);
  if (a.batch.is_paged()) {
    if (keys < 0) return false;
    if ((keys + a.page - 1) / a.page > a.batch.max_pages) return false;
  }
  const std::int64_t queries = std::int64_t{a.batch.cu_seqlens_q[s + 1]} - a.batch.cu_seqlens_q[s];
  return a.batch.query_positions != nullptr || queries <= keys;
}

/// Entry of the page table, counted over its rows.
__device__ inline bool page_holds(const CheckArguments& a, std::int64_t entry) {
  const std::int64_t s = entry / a.batch.max_pages;
  const std::int64_t first_token = entry % a.batch.max_pages * a.page;
  if (first_token >= a.batch.seqlens_k[s]) return true;  // not in use
  const std::int32_t id = a.batch.page_table[entry];
  return id >= 0 && id < a.key_rows;
}

/// The position of a query row, when it is given.
__device__ inline bool position_holds(const CheckArguments& a, std::int64_t row) {
  const std::int32_t s = a.batch.sequence_of(static_cast<std::int32_t>(row));
  if (s < 0) return true;
  const std::int32_t position = a.batch.query_positions[row];
  const std::int32_t before = row > a.batch.cu_seqlens_q[s] && row > 0 ? a.batch.query_positions[row - 1] : -1;
  return position > before && position < a.batch.keys(s);
}

/// The ids of one (head, row): ascending, visible, packed to the left.
__device__ inline bool ids_hold(const CheckArguments& a, std::int64_t head, std::int64_t row) {
  const QueryPlace place = a.batch.place(static_cast<std::int32_t>(row));
  if (place.sequence < 0) return true;  // inert, or a bound is broken, which another thread sees
  const std::int32_t visible = place.position / a.block_size + 1;
  const std::int32_t* slots = a.blocks.at(head, row);
  std::int32_t before = -1;
  bool ended = false;
  for (std::int32_t slot = 0; slot < a.topk; ++slot) {
    const std::int32_t id = slots[slot];
    if (id == -1) {
      ended = true;
    } else if (ended || id <= before || id >= visible) {
      return false;
    } else {
      before = id;
    }
  }
  return true;
}

/// Any grid of one dimension.
[[maybe_unused]] static __global__ void check_contents(CheckArguments a, std::int64_t items) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < items; i += stride) {
    const std::int64_t sequences = a.batch.sequences;
    bool holds = true;
    if (i <= sequences) {
      holds = bound_holds(a.batch.cu_seqlens_q, i, sequences, a.query_rows);
      if (!a.batch.is_paged()) holds = holds && bound_holds(a.batch.cu_seqlens_k, i, sequences, a.key_rows);
    }
    if (i < sequences) holds = holds && sequence_holds(a, static_cast<std::int32_t>(i));
    if (i < a.table_entries) holds = holds && page_holds(a, i);
    if (i < a.query_rows && a.batch.query_positions != nullptr) holds = holds && position_holds(a, i);
    if (i < a.kv_heads * a.block_rows) holds = holds && ids_hold(a, i / a.block_rows, i % a.block_rows);
    if (!holds) *a.broken = 1;  // all writers write the same
  }
}

}  // namespace msa::cuda
