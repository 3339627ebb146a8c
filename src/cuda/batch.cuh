// SPDX-License-Identifier: Apache-2.0
// A Batch and the tensors of a call as a kernel sees them: which sequence a query row belongs to, where it stands, and
// where the row of a key lies, packed or paged. The device's src/core/layout.h. Values, passed to kernels by copy; the
// pointers are the device's. Tested in tests/cuda/batch_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/batch.h"
#include "msa/tensor.h"
#include "src/cuda/device.cuh"

namespace msa::cuda {

/// Where a query row stands. sequence -1: behind the last sequence, or its numbers are not usable; such a row is inert.
struct QueryPlace {
  std::int32_t sequence = -1;
  std::int32_t position = -1;  ///< sees the keys 0..position
  std::int32_t keys = 0;       ///< of its sequence
};

struct BatchView {
  const std::int32_t* cu_seqlens_q = nullptr;     ///< [sequences + 1]
  const std::int32_t* cu_seqlens_k = nullptr;     ///< [sequences + 1]; null when paged
  const std::int32_t* page_table = nullptr;       ///< [sequences, max_pages]; null when packed
  const std::int32_t* seqlens_k = nullptr;        ///< [sequences]; null when packed
  const std::int32_t* query_positions = nullptr;  ///< [queries]; null: the last positions
  std::int32_t sequences = 0;
  std::int32_t max_pages = 0;

  __device__ bool is_paged() const { return cu_seqlens_k == nullptr; }
  __device__ std::int32_t keys(std::int32_t s) const {
    return is_paged() ? seqlens_k[s] : cu_seqlens_k[s + 1] - cu_seqlens_k[s];
  }
  /// Total query rows that belong to a sequence.
  __device__ std::int32_t queries() const { return cu_seqlens_q[sequences]; }

  /// Sequence that owns query row `row`, -1 behind the last one. O(log sequences).
  __device__ std::int32_t sequence_of(std::int32_t row) const {
    std::int32_t low = 0, high = sequences;  // the first s in [low, high] with cu_seqlens_q[s + 1] > row
    while (low < high) {
      const std::int32_t middle = low + (high - low) / 2;
      if (cu_seqlens_q[middle + 1] > row) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low < sequences ? low : -1;
  }

  /// The last sequence s with first(s) <= number, where `first` does not descend. O(log sequences).
  template <class First>
  __device__ std::int32_t last_sequence(std::int32_t number, const First& first) const {
    std::int32_t low = 0, high = sequences - 1;
    while (low < high) {
      const std::int32_t middle = low + (high - low + 1) / 2;
      if (first(middle) <= number) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  __device__ QueryPlace place(std::int32_t row) const {
    QueryPlace place;
    place.sequence = sequence_of(row);
    if (place.sequence < 0) return place;
    const std::int32_t s = place.sequence;
    place.keys = keys(s);
    place.position = query_positions != nullptr ? query_positions[row] : place.keys - (cu_seqlens_q[s + 1] - row);
    if (place.position < 0 || place.position >= place.keys) return QueryPlace{};  // numbers that were never checked
    return place;
  }
};

/// Host: the spans of `batch` point to device memory.
inline BatchView view_of(const Batch& batch) {
  BatchView view;
  view.cu_seqlens_q = batch.cu_seqlens_q.data();
  if (batch.is_paged) {
    view.page_table = batch.page_table.data();
    view.seqlens_k = batch.seqlens_k.data();
  } else {
    view.cu_seqlens_k = batch.cu_seqlens_k.data();
  }
  view.query_positions = batch.query_positions.empty() ? nullptr : batch.query_positions.data();
  view.sequences = static_cast<std::int32_t>(batch.sequences());
  view.max_pages = static_cast<std::int32_t>(batch.max_pages);
  return view;
}

/// Number of a sequence's first block among all blocks of the batch. Packed: floor(begin / block_size) + s leaves every
/// sequence room for its blocks, because floor(a + b) - floor(a) + 1 >= ceil(b); no sum over the sequences is needed.
/// `page`: tokens a page, 0 when packed.
__device__ inline std::int32_t first_block(const BatchView& batch, std::int32_t s, std::int32_t block_size,
                                           std::int32_t page) {
  if (page > 0) return s * (batch.max_pages * (page / block_size));
  return batch.cu_seqlens_k[s] / block_size + s;
}

/// The sequence that block number `block` of the batch belongs to: the last one whose first block is not behind it.
__device__ inline std::int32_t sequence_of_block(const BatchView& batch, std::int32_t block, std::int32_t block_size,
                                                 std::int32_t page) {
  return batch.last_sequence(block, [&](std::int32_t s) { return first_block(batch, s, block_size, page); });
}

/// Rows of keys, values or index keys: [tokens, heads, dim] or [pages, page, heads, dim]; without a head dimension head
/// is 0. Strides in elements of T.
template <class T>
struct KeyRowsView {
  const T* data = nullptr;
  std::int64_t page_stride = 0, token_stride = 0, head_stride = 0;
  std::int32_t page = 0;  ///< tokens a page; 0 when packed

  /// Row of the tensor, counted in tokens, that holds `position`: packed row, or page id * page + offset. -1 when the
  /// page table has no page there.
  __device__ std::int64_t token(const BatchView& batch, std::int32_t s, std::int32_t position) const {
    if (page == 0) return std::int64_t{batch.cu_seqlens_k[s]} + position;
    const std::int32_t id = batch.page_table[std::int64_t{s} * batch.max_pages + position / page];
    return id < 0 ? -1 : std::int64_t{id} * page + position % page;
  }
  /// First element of that row.
  __device__ const T* row(const BatchView& batch, std::int32_t s, std::int32_t position, std::int32_t head = 0) const {
    if (page == 0) {
      return data + (std::int64_t{batch.cu_seqlens_k[s]} + position) * token_stride + head * head_stride;
    }
    const std::int64_t id = batch.page_table[std::int64_t{s} * batch.max_pages + position / page];
    return data + id * page_stride + position % page * token_stride + head * head_stride;
  }
};

template <class T>
KeyRowsView<T> key_rows(const ConstTensorView& tensor, const Batch& batch) {
  KeyRowsView<T> view;
  view.data = reinterpret_cast<const T*>(tensor.data);
  const int token_dim = batch.is_paged ? 1 : 0;
  if (batch.is_paged) {
    view.page = static_cast<std::int32_t>(tensor.size(1));
    view.page_stride = tensor.stride(0);
  }
  view.token_stride = tensor.stride(token_dim);
  view.head_stride = tensor.rank == token_dim + 3 ? tensor.stride(token_dim + 1) : 0;
  return view;
}

/// A tensor of up to four dimensions, by strides in elements; T is const where the kernel only reads.
template <class T>
struct Strided {
  T* data = nullptr;
  std::int64_t strides[4] = {0, 0, 0, 0};
  __device__ T* at(std::int64_t i, std::int64_t j = 0, std::int64_t k = 0, std::int64_t l = 0) const {
    return data + i * strides[0] + j * strides[1] + k * strides[2] + l * strides[3];
  }
};

template <class T>
Strided<const T> strided(const ConstTensorView& view) {
  Strided<const T> result;
  result.data = reinterpret_cast<const T*>(view.data);
  for (int d = 0; d < view.rank; ++d) result.strides[d] = view.stride(d);
  return result;
}
template <class T>
Strided<T> strided(const TensorView& view) {
  Strided<T> result;
  result.data = reinterpret_cast<T*>(view.data);
  for (int d = 0; d < view.rank; ++d) result.strides[d] = view.stride(d);
  return result;
}

}  // namespace msa::cuda
