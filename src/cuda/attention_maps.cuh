// SPDX-License-Identifier: Apache-2.0
// How the copy engine takes queries, keys and values of attention out of their tensors: columns of 128 bytes of a row,
// one below the other, in the 128-byte swizzle; float8 in whole rows, to be widened (float8_tile.cuh). Tested in
// tests/cuda/sparse_attention_test.cc and dense_attention_test.cc.
#pragma once

#include <cstdint>

#include "src/cuda/attention_maps.h"
#include "src/cuda/tensor_map.cuh"

namespace msa::cuda {

/// Bytes from one to the next along dimension d; where there is one only, something that a tensor map takes.
inline std::uint64_t map_stride(const ConstTensorView& view, int d) {
  const std::int64_t stride = view.size(d) > 1 ? view.stride(d) : view.size(view.rank - 1);
  return static_cast<std::uint64_t>(stride) * dtype_size(view.dtype);
}

/// Keys or values, `rows` tokens a copy: [dim, heads, token, page], packed as one long page.
inline TensorMap map_keys(const ConstTensorView& view, bool is_paged, std::int64_t rows) {
  const int token = is_paged ? 1 : 0;
  TensorMapSpec spec;
  spec.data = view.data;
  spec.element_bytes = static_cast<int>(dtype_size(view.dtype));
  spec.rank = 4;
  spec.extents[0] = static_cast<std::uint64_t>(view.size(token + 2));
  spec.extents[1] = static_cast<std::uint64_t>(view.size(token + 1));
  spec.extents[2] = static_cast<std::uint64_t>(view.size(token));
  spec.extents[3] = is_paged ? static_cast<std::uint64_t>(view.size(0)) : 1;
  spec.strides[1] = map_stride(view, token + 1);
  spec.strides[2] = map_stride(view, token);
  spec.strides[3] = is_paged ? map_stride(view, 0) : spec.strides[2];
  spec.box[0] = 64;
  spec.box[2] = static_cast<std::uint32_t>(rows);
  if (view.dtype == DType::kFloat8E4M3) {
    spec.box[0] = static_cast<std::uint32_t>(view.size(token + 2));
    spec.swizzle = Swizzle::kNone;
  }
  return make_tensor_map(spec);
}

/// Queries, the rows of one group at `positions` neighbouring ones a copy: [dim, heads, row].
inline TensorMap map_queries(const ConstTensorView& view, std::int64_t group_size, std::int64_t positions) {
  TensorMapSpec spec;
  spec.data = view.data;
  spec.rank = 3;
  spec.extents[0] = static_cast<std::uint64_t>(view.size(2));
  spec.extents[1] = static_cast<std::uint64_t>(view.size(1));
  spec.extents[2] = static_cast<std::uint64_t>(view.size(0));
  spec.strides[1] = map_stride(view, 1);
  spec.strides[2] = map_stride(view, 0);
  spec.box[0] = 64;
  spec.box[1] = static_cast<std::uint32_t>(group_size);
  spec.box[2] = static_cast<std::uint32_t>(positions);
  return make_tensor_map(spec);
}

}  // namespace msa::cuda
