// SPDX-License-Identifier: Apache-2.0
// What the front door does for a call on a GPU, once the shapes are checked: takes its own piece of the workspace,
// holds the rest against what the operator needs, and has a kernel check what lies in device memory. When that finds a
// broken rule, the arrays are copied to the host and go through the host's own checks, so that the message is the same.
// Tested in tests/unit/validate_test.cc and, where there is a device, in tests/cuda/test_gpu_errors.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/batch.h"
#include "msa/context.h"
#include "msa/tensor.h"
#include "src/ops/validate.h"

namespace msa::ops {

/// The device arrays of a call that hold bounds and ids.
struct DeviceContents {
  const Batch* batch = nullptr;  ///< null: there is none
  std::int64_t query_rows = 0;
  const char* keys_name = "";
  ConstTensorView keys;    ///< what the batch's key counts are held against
  ConstTensorView blocks;  ///< empty: no ids to check
  std::int64_t block_size = 0;
};

class DeviceCall {
 public:
  /// Throws msa::Error when context.workspace is smaller than device_bytes() says or not aligned, or when a rule is broken
  /// in device memory.
  DeviceCall(const Validator& check, const Context& context, std::size_t needed, const DeviceContents& contents);

  /// The caller's context, with the rest of the workspace; no more of it than the limit allows.
  const Context& context() const { return context_; }
  /// Device memory for the scalars of a call that returns them to the host; 64 bytes, aligned to them.
  void* scalars() const { return scalars_; }

 private:
  Context context_;
  void* scalars_;
};

/// What Context::workspace_limit leaves to an operator of a GPU: the front door's own piece is taken off. 0: no limit.
std::size_t operator_limit(const Context& context);

/// The workspace of a call whose operator needs `needed` bytes: with the front door's own piece. Throws msa::Error,
/// naming the bytes, when that is above Context::workspace_limit.
std::size_t device_bytes(const Validator& check, const Context& context, std::size_t needed);

}  // namespace msa::ops
