// SPDX-License-Identifier: Apache-2.0
// How queries and keys of several sequences lie in the buffers: packed one after the other, or keys in pages. The
// operators take either; equal tokens give bitwise equal results in both.
#pragma once

#include <cstdint>
#include <span>

namespace msa {

/// Sequence s owns the query rows [cu_seqlens_q[s], cu_seqlens_q[s+1]). Its keys are rows
/// [cu_seqlens_k[s], cu_seqlens_k[s+1]) of the packed buffers, or seqlens_k[s] tokens in the pages page_table[s][0..].
/// Query i of Lq stands at position Lk - Lq + i and sees the keys 0..position. Rows after the last sequence are inert.
/// On a GPU (Backend::kCuda) the spans are of device memory.
struct Batch {
  std::span<const std::int32_t> cu_seqlens_q;  ///< [B+1], starts at 0, non-decreasing
  std::span<const std::int32_t> cu_seqlens_k;  ///< [B+1], starts at 0, non-decreasing; empty when paged
  std::span<const std::int32_t> page_table;    ///< [B, max_pages] row-major, unused entries -1; empty when packed
  std::span<const std::int32_t> seqlens_k;     ///< [B], keys of each sequence; empty when packed
  std::int64_t max_pages = 0;                  ///< row length of page_table
  bool is_paged = false;
  /// Optional, [cu_seqlens_q[B]]: the position of every query in its sequence, strictly ascending within a sequence and
  /// below its key count. Empty means the last Lq positions. Lets a call take any sample of a sequence's rows. On a GPU
  /// [Tq], since cu_seqlens_q[B] is not known to the host; entries of inert rows are not read.
  std::span<const std::int32_t> query_positions;

  std::int64_t sequences() const { return static_cast<std::int64_t>(cu_seqlens_q.size()) - 1; }

  static Batch packed(std::span<const std::int32_t> cu_seqlens_q, std::span<const std::int32_t> cu_seqlens_k) {
    Batch batch;
    batch.cu_seqlens_q = cu_seqlens_q;
    batch.cu_seqlens_k = cu_seqlens_k;
    return batch;
  }
  static Batch paged(std::span<const std::int32_t> cu_seqlens_q, std::span<const std::int32_t> page_table,
                     std::int64_t max_pages, std::span<const std::int32_t> seqlens_k) {
    Batch batch;
    batch.cu_seqlens_q = cu_seqlens_q;
    batch.page_table = page_table;
    batch.seqlens_k = seqlens_k;
    batch.max_pages = max_pages;
    batch.is_paged = true;
    return batch;
  }
};

}  // namespace msa
