// SPDX-License-Identifier: Apache-2.0
// Where rows of a batch live: turns (sequence, position) into addresses, for packed and paged buffers alike, so that no
// kernel knows which of the two it runs on. Built after validation; trusts its input. Tested in
// tests/unit/layout_test.cc.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "msa/batch.h"
#include "msa/tensor.h"

namespace msa::core {

/// One sequence of a batch.
struct Sequence {
  std::int64_t index = 0;
  std::int64_t query_begin = 0;  ///< first row in the query buffers
  std::int64_t queries = 0;      ///< Lq
  std::int64_t keys = 0;         ///< Lk
};

inline Sequence get_sequence(const Batch& batch, std::int64_t s) {
  const auto i = static_cast<std::size_t>(s);
  Sequence sequence;
  sequence.index = s;
  sequence.query_begin = batch.cu_seqlens_q[i];
  sequence.queries = batch.cu_seqlens_q[i + 1] - batch.cu_seqlens_q[i];
  sequence.keys = batch.is_paged ? batch.seqlens_k[i] : batch.cu_seqlens_k[i + 1] - batch.cu_seqlens_k[i];
  return sequence;
}

/// Position of query i of the sequence; it sees the keys 0..position.
inline std::int64_t query_position(const Batch& batch, const Sequence& sequence, std::int64_t i) {
  if (!batch.query_positions.empty()) {
    return batch.query_positions[static_cast<std::size_t>(sequence.query_begin + i)];
  }
  return sequence.keys - sequence.queries + i;
}

/// Total number of query rows that belong to a sequence (T of SPEC section 4).
inline std::int64_t total_queries(const Batch& batch) { return batch.cu_seqlens_q.back(); }

/// Addresses of key rows: `head` picks a kv head of [tokens, kv_heads, dim] / [pages, page, kv_heads, dim]; for tensors
/// without a head dimension ([tokens, dim] / [pages, page, dim]) it is 0.
class KeyRows {
 public:
  KeyRows(const ConstTensorView& tensor, const Batch& batch)
      : batch_(&batch), data_(tensor.data), dtype_(tensor.dtype) {
    element_bytes_ = static_cast<std::int64_t>(dtype_size(tensor.dtype));
    if (batch.is_paged) {
      page_ = tensor.size(1);
      page_stride_ = tensor.stride(0);
      token_stride_ = tensor.stride(1);
      head_stride_ = tensor.rank == 4 ? tensor.stride(2) : 0;
    } else {
      token_stride_ = tensor.stride(0);
      head_stride_ = tensor.rank == 3 ? tensor.stride(1) : 0;
    }
  }

  /// First element of the row at `position` of sequence `s`.
  const std::byte* row(std::int64_t s, std::int64_t position, std::int64_t head = 0) const {
    std::int64_t offset = head * head_stride_;
    if (batch_->is_paged) {
      const std::int64_t page_id =
          batch_->page_table[static_cast<std::size_t>(s * batch_->max_pages + position / page_)];
      offset += page_id * page_stride_ + (position % page_) * token_stride_;
    } else {
      offset += (batch_->cu_seqlens_k[static_cast<std::size_t>(s)] + position) * token_stride_;
    }
    return data_ + offset * element_bytes_;
  }

  DType dtype() const { return dtype_; }

  /// How many rows from `position` on lie token_stride_bytes() apart: up to the end of the page, else without bound.
  std::int64_t run_length(std::int64_t position) const {
    return batch_->is_paged ? page_ - position % page_ : INT64_MAX;
  }
  std::int64_t token_stride_bytes() const { return token_stride_ * element_bytes_; }

  /// out[j] = row(s, position + j, head) for j < count, without asking for every one where it lies.
  void list(std::int64_t s, std::int64_t position, std::int64_t head, std::int64_t count, const std::byte** out) const {
    for (std::int64_t j = 0; j < count;) {
      const std::byte* next = row(s, position + j, head);
      for (const std::int64_t end = j + std::min(count - j, run_length(position + j)); j < end; ++j) {
        out[j] = next;
        next += token_stride_bytes();
      }
    }
  }

 private:
  const Batch* batch_;
  const std::byte* data_;
  DType dtype_;
  std::int64_t element_bytes_ = 0;
  std::int64_t page_ = 0;
  std::int64_t page_stride_ = 0;
  std::int64_t token_stride_ = 0;
  std::int64_t head_stride_ = 0;
};

/// The forced blocks of a row with `visible` blocks (SPEC section 2, rule 1): init blocks [0, init) and local blocks
/// [local_begin, visible); when they exceed topk, the local ones go first, nearest first.
struct ForcedBlocks {
  std::int64_t init_end = 0;     ///< blocks [0, init_end) are forced
  std::int64_t local_begin = 0;  ///< blocks [local_begin, visible) are forced
  bool contains(std::int64_t block) const { return block < init_end || block >= local_begin; }
};

inline ForcedBlocks forced_blocks(std::int64_t visible, std::int64_t topk, std::int64_t local_blocks,
                                  std::int64_t init_blocks) {
  ForcedBlocks forced;
  forced.local_begin = visible - std::min({local_blocks, topk, visible});
  forced.init_end = std::min({init_blocks, forced.local_begin, topk - (visible - forced.local_begin)});
  return forced;
}

}  // namespace msa::core
