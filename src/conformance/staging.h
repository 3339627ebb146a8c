// SPDX-License-Identifier: Apache-2.0
// Puts the tensors of a call where its backend wants them, so that a check is written once: the host's backends get the
// host's memory as it is, Backend::kCuda gets copies in device memory, outputs and workspace full of NaN. Tested in
// tests/cuda/conformance_test.cc (an emulated device) and, where there is a GPU, by `msa check --backend cuda`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "msa/batch.h"
#include "msa/context.h"
#include "msa/cuda.h"
#include "msa/tensor.h"

namespace msa::conformance {

/// Lives as long as the calls that use what it hands out.
class Staging {
 public:
  explicit Staging(const Context& context) : context_(context) {}

  /// Host memory, contiguous.
  ConstTensorView input(const ConstTensorView& host);
  std::span<const std::int32_t> input(std::span<const std::int32_t> host);
  Batch input(const Batch& host);
  /// What a call writes, and later calls may read; fetch() brings it to `host`.
  TensorView output(const TensorView& host);
  void fetch() const;

  /// The context of one call, with the workspace that its `..._workspace` function asked for and not a byte more.
  Context with_workspace(std::size_t bytes);

 private:
  bool is_device() const { return context_.backend == Backend::kCuda; }
  DeviceBuffer& poisoned(std::size_t bytes);

  Context context_;
  std::vector<DeviceBuffer> buffers_;
  std::vector<std::pair<std::size_t, TensorView>> outputs_;  ///< number of the buffer, host's view
};

}  // namespace msa::conformance
