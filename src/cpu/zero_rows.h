// SPDX-License-Identifier: Apache-2.0
// Rows that belong to no sequence (padding of a captured graph) are inert: what is written there is zero. Tested
// through the operators.
#pragma once

#include <cstdint>
#include <cstring>

#include "msa/tensor.h"

namespace msa::cpu {

/// Zeros rows [first, rows) of a tensor [rows, heads, dim] or [rows, dim] of any type (all of them have a zero of
/// all-zero bits).
inline void zero_rows(const TensorView& tensor, std::int64_t first) {
  const auto element = static_cast<std::int64_t>(dtype_size(tensor.dtype));
  const std::int64_t heads = tensor.rank == 3 ? tensor.size(1) : 1;
  const std::int64_t head_stride = tensor.rank == 3 ? tensor.stride(1) : 0;
  const auto bytes = static_cast<std::size_t>(tensor.size(tensor.rank - 1) * element);
  for (std::int64_t row = first; row < tensor.size(0); ++row) {
    for (std::int64_t head = 0; head < heads; ++head) {
      std::memset(tensor.data + (row * tensor.stride(0) + head * head_stride) * element, 0, bytes);
    }
  }
}

}  // namespace msa::cpu
