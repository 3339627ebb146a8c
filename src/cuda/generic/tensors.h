// SPDX-License-Identifier: Apache-2.0
// What the generic kernels are handed: tensors, batch and block ids as plain values, copied into the kernel's
// parameters. Made on the host from the operators' params, from shapes and strides alone: nothing here follows a device
// pointer. Tested in tests/cuda/generic_plan_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/batch.h"
#include "msa/select_blocks.h"
#include "msa/tensor.h"

namespace msa::cuda::generic {

/// Threads of a warp, tokens of a key tile: lane i of a warp owns token i of the tile.
inline constexpr int kWarp = 32;
/// Warps of a kernel that walks over query rows, and of one that walks over key rows.
inline constexpr int kRowWarps = 4;
inline constexpr int kKeyWarps = 8;
/// Dimensions a lane owns when a warp shares out a row: kMaxHeadDim / kWarp.
inline constexpr int kLaneDims = static_cast<int>(kMaxHeadDim) / kWarp;

/// A tensor [rows, heads, dim] or [rows, dim] (head_stride 0); strides in elements, dim contiguous. data null: absent.
struct Rows {
  std::byte* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t row_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t rows = 0;
  int heads = 1;
  int dim = 0;
};

/// Keys or values: [Tk, heads, dim] or [Tk, dim], or pages [pages, page, heads, dim] or [pages, page, dim].
struct Keys {
  const std::byte* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t page_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;  ///< 0 for tensors without heads: every head reads the same row
  std::int64_t rows = 0;         ///< packed: Tk; paged: pages
  int page = 0;                  ///< tokens a page; 0 when packed
  int dim = 0;
};

/// int32 [kv_heads, Tq, topk]; data null: the whole visible prefix.
struct BlockIds {
  const std::int32_t* data = nullptr;
  std::int64_t head_stride = 0;
  std::int64_t row_stride = 0;
  int topk = 0;
  int block_size = 1;
  int key_tile = kWarp;  ///< tokens of a tile of keys: one block's at most, so that all of them have the same visitors
};

/// The device pointers of a msa::Batch. Kernels make the BatchView of batch.cuh of it, which plain C++ cannot include.
struct BatchPointers {
  const std::int32_t* cu_seqlens_q = nullptr;
  const std::int32_t* cu_seqlens_k = nullptr;     ///< null when paged
  const std::int32_t* page_table = nullptr;       ///< null when packed
  const std::int32_t* seqlens_k = nullptr;        ///< null when packed
  const std::int32_t* query_positions = nullptr;  ///< null: the last Lq positions
  std::int32_t sequences = 0;
  std::int32_t max_pages = 0;
};

/// How a kernel is started.
struct LaunchShape {
  std::int64_t grid_x = 0;  ///< 0: nothing to do, not started
  std::int64_t grid_y = 1;
  int threads = 0;
  std::size_t shared_bytes = 0;
};

/// A view of rank 2 is [rows, dim].
inline Rows rows_of(const ConstTensorView& view) {
  Rows rows;
  if (view.empty()) return rows;
  rows.data = const_cast<std::byte*>(view.data);  // NOLINT: one type for what kernels read and what they write
  rows.dtype = view.dtype;
  rows.row_stride = view.stride(0);
  rows.head_stride = view.rank == 3 ? view.stride(1) : 0;
  rows.rows = view.size(0);
  rows.heads = view.rank == 3 ? static_cast<int>(view.size(1)) : 1;
  rows.dim = static_cast<int>(view.size(view.rank - 1));
  return rows;
}

/// float32 [rows, dim] in workspace.
inline Rows scratch_rows(void* workspace, std::int64_t rows, int dim) {
  Rows scratch;
  scratch.data = static_cast<std::byte*>(workspace);
  scratch.row_stride = dim;
  scratch.rows = rows;
  scratch.dim = dim;
  return scratch;
}

inline Keys keys_of(const ConstTensorView& view, const Batch& batch) {
  Keys keys;
  keys.data = view.data;
  keys.dtype = view.dtype;
  keys.rows = view.size(0);
  keys.dim = static_cast<int>(view.size(view.rank - 1));
  if (batch.is_paged) {
    keys.page = static_cast<int>(view.size(1));
    keys.page_stride = view.stride(0);
    keys.token_stride = view.stride(1);
    keys.head_stride = view.rank == 4 ? view.stride(2) : 0;
  } else {
    keys.token_stride = view.stride(0);
    keys.head_stride = view.rank == 3 ? view.stride(1) : 0;
  }
  return keys;
}

inline BlockIds block_ids_of(const ConstTensorView& blocks, std::int64_t block_size) {
  BlockIds ids;
  if (blocks.empty()) return ids;
  ids.data = reinterpret_cast<const std::int32_t*>(blocks.data);
  ids.head_stride = blocks.stride(0);
  ids.row_stride = blocks.stride(1);
  ids.topk = static_cast<int>(blocks.size(2));
  ids.block_size = static_cast<int>(block_size);
  if (ids.block_size < kWarp) ids.key_tile = ids.block_size;
  return ids;
}

inline BatchPointers pointers_of(const Batch& batch) {
  BatchPointers view;
  view.cu_seqlens_q = batch.cu_seqlens_q.data();
  view.sequences = static_cast<std::int32_t>(batch.sequences());
  if (batch.is_paged) {
    view.page_table = batch.page_table.data();
    view.seqlens_k = batch.seqlens_k.data();
    view.max_pages = static_cast<std::int32_t>(batch.max_pages);
  } else {
    view.cu_seqlens_k = batch.cu_seqlens_k.data();
  }
  if (!batch.query_positions.empty()) view.query_positions = batch.query_positions.data();
  return view;
}

/// Floats of `rows` rows of `dim` elements in shared memory. One float of padding a row: lane i reads element d of row
/// i, and rows dim + 1 apart (dim is a multiple of 16) put the 32 lanes into 32 different banks.
constexpr std::size_t tile_floats(int rows, int dim) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(dim + 1);
}

/// Blocks of threads that cover the key tiles of every sequence, whatever the lengths are: sequence s gets the slots
/// [cu[s] / tile + s, cu[s+1] / tile + s + 1), at least as many as it has tiles, because
/// floor((a + n) / t) - floor(a / t) + 1 >= ceil(n / t).
constexpr std::int64_t key_tile_slots(std::int64_t key_rows, std::int64_t sequences, std::int64_t tile) {
  return key_rows / tile + sequences;
}

}  // namespace msa::cuda::generic
