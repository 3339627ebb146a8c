// SPDX-License-Identifier: Apache-2.0
// The tiles of the fast attention kernels, and which tensors the copy engine can read, for their plans; the maps it
// reads them by are in attention_maps.cuh. Tested in tests/cuda/sparse_attention_test.cc and dense_attention_test.cc.
#pragma once

#include <cstdint>

#include "msa/tensor.h"

namespace msa::cuda {

inline constexpr std::int64_t kTileRows = 128;     ///< query rows a tile: two warpgroups of 64
inline constexpr std::int64_t kMaxGroupSize = 64;  ///< of the fast paths

/// Whether rows begin at multiples of 16 bytes. Data is null while only the workspace is asked for.
inline bool is_copyable(const ConstTensorView& view) {
  const auto size = static_cast<std::int64_t>(dtype_size(view.dtype));
  if (reinterpret_cast<std::uintptr_t>(view.data) % 16 != 0) return false;
  for (int d = 0; d + 1 < view.rank; ++d) {
    // Strides of a single element say nothing; a stride of 0 (an expanded tensor) is not for the copy engine.
    if (view.size(d) > 1 && (view.stride(d) * size % 16 != 0 || view.stride(d) == 0)) return false;
  }
  return true;
}

}  // namespace msa::cuda
