// SPDX-License-Identifier: Apache-2.0
// The check of what lies in device memory: arguments of its kernel (check.cuh) and how it is started.
#pragma once

#include <cstdint>

#include "src/cuda/operators.h"

namespace msa::cuda {

inline constexpr unsigned kCheckThreads = 256;

/// Elements that the kernel looks at: each is one thread's, in grid strides.
inline std::int64_t check_items(const Contents& contents) {
  std::int64_t items = static_cast<std::int64_t>(contents.batch->cu_seqlens_q.size());
  items = items < contents.query_rows ? contents.query_rows : items;
  const auto entries = static_cast<std::int64_t>(contents.batch->page_table.size());
  items = items < entries ? entries : items;
  if (contents.blocks.empty()) return items;
  const std::int64_t rows = contents.blocks.size(0) * contents.blocks.size(1);
  return items < rows ? rows : items;
}

}  // namespace msa::cuda
