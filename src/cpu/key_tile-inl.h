// SPDX-License-Identifier: Apache-2.0
// Keys, values and queries of one block or chunk as float tiles, from packed or paged buffers of any storage type, in
// the layouts that `product` wants: keys transposed, so that a vector holds one dimension of neighbouring keys. Tested
// through the operators.
#if defined(MSA_CPU_KEY_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_KEY_TILE_INL_H_
#undef MSA_CPU_KEY_TILE_INL_H_
#else
#define MSA_CPU_KEY_TILE_INL_H_
#endif

#include <hwy/cache_control.h>

#include <algorithm>
#include <cstdint>

#include "msa/select_blocks.h"
#include "src/core/layout.h"
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

// Asks for row `position` of a block while the rows before it are copied: rows are short and lie a stride apart
// (kv_heads rows, or pages), which hardware prefetchers do not follow. 8 rows ahead keep about as many lines in flight
// as a core can.
inline constexpr std::int64_t kPrefetchRows = 8;
inline void prefetch_row(const core::KeyRows& rows, DType dtype, std::int64_t sequence, std::int64_t head,
                         std::int64_t position, std::int64_t dim) {
  const std::byte* row = rows.row(sequence, position, head);
  const std::int64_t bytes = dim * static_cast<std::int64_t>(dtype_size(dtype));
  constexpr std::int64_t kLine = 64;
  for (std::int64_t at = 0; at < bytes; at += kLine) hwy::Prefetch(row + at);
}

/// Asks for `bytes` bytes that lie `ahead` bytes behind a row; the address need not hold anything.
HWY_INLINE void prefetch_ahead(const std::byte* row, std::int64_t ahead, std::int64_t bytes) {
  constexpr std::int64_t kLine = 64;
  for (std::int64_t at = 0; at < bytes; at += kLine) hwy::Prefetch(row + ahead + at);
}

/// out[d * out_stride + j] = element d of key first + j, j < count; the columns up to padded_columns(count) become 0.
inline HWY_ATTR void load_keys_transposed(const core::KeyRows& keys, DType dtype, std::int64_t sequence,
                                          std::int64_t head, std::int64_t first, std::int64_t count,
                                          std::int64_t head_dim, float* HWY_RESTRICT out, std::int64_t out_stride) {
  constexpr std::int64_t kRowsAtOnce = 4;  // what `transpose` takes at a time
  alignas(64) float rows[kRowsAtOnce * kMaxHeadDim];
  for (std::int64_t j = 0; j < count; j += kRowsAtOnce) {
    const std::int64_t rows_here = std::min(kRowsAtOnce, count - j);
    for (std::int64_t i = 0; i < rows_here; ++i) {
      if (j + i + kPrefetchRows < count) {
        prefetch_row(keys, dtype, sequence, head, first + j + i + kPrefetchRows, head_dim);
      }
      load_row(keys.row(sequence, first + j + i, head), dtype, head_dim, rows + i * head_dim);
    }
    transpose(rows, head_dim, rows_here, head_dim, out + j, out_stride);
  }
  const std::int64_t padded = padded_columns(count);
  if (padded == count) return;
  for (std::int64_t d = 0; d < head_dim; ++d) {
    std::fill(out + d * out_stride + count, out + d * out_stride + padded, 0.0f);
  }
}

/// out[j * out_stride + d] = element d of row first + j, j < count.
inline HWY_ATTR void load_value_rows(const core::KeyRows& values, DType dtype, std::int64_t sequence, std::int64_t head,
                                     std::int64_t first, std::int64_t count, std::int64_t value_dim,
                                     float* HWY_RESTRICT out, std::int64_t out_stride) {
  for (std::int64_t j = 0; j < count; ++j) {
    if (j + kPrefetchRows < count) {
      prefetch_row(values, dtype, sequence, head, first + j + kPrefetchRows, value_dim);
    }
    load_row(values.row(sequence, first + j, head), dtype, value_dim, out + j * out_stride);
  }
}

/// Heads [first_head, first_head + heads) of query rows [first_row, first_row + count) of a tensor [rows, heads, dim],
/// one after the other: out[(i * heads + h) * dim + d].
inline HWY_ATTR void load_query_rows(const ConstTensorView& q, std::int64_t first_row, std::int64_t count,
                                     std::int64_t first_head, std::int64_t heads, float* HWY_RESTRICT out) {
  const std::int64_t dim = q.size(2);
  const auto bytes = static_cast<std::int64_t>(dtype_size(q.dtype));
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t offset = (first_row + i) * q.stride(0) + (first_head + h) * q.stride(1);
      load_row(q.data + offset * bytes, q.dtype, dim, out + (i * heads + h) * dim);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_KEY_TILE_INL_H_
