// SPDX-License-Identifier: Apache-2.0
// Where the parts of an operator's workspace lie: every plan places its own with this. Host arithmetic; the bytes are
// asked for in the tests of the plans, tests/cuda/*_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

namespace msa::cuda {

/// Hands out parts of a workspace, 256-byte aligned, one behind the other.
class WorkspaceLayout {
 public:
  std::size_t place(std::int64_t bytes) {
    const std::size_t start = bytes_;
    bytes_ += static_cast<std::size_t>((bytes + 255) / 256 * 256);
    return start;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

}  // namespace msa::cuda
