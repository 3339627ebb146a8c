// SPDX-License-Identifier: Apache-2.0
// The CUDA backend on the emulator: the device side of src/cuda/operators.h with host memory for the device's. Linked
// with src/cuda's operators and kernels in place of the stubs, it lets the operators' unit tests run on the kernels,
// through the front door, checks of device arrays included.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "src/cuda/check.cuh"
#include "src/cuda/operators.h"
#include "src/cuda/runtime.h"
#include "tests/unit/support/targets.h"

namespace msa::cuda {

bool is_built() { return true; }
std::int64_t multiprocessor_count() { return 3; }
CudaInfo describe_device() { return {}; }
void require_device() {}
bool is_capturing(const Context&) { return false; }
void* allocate(std::size_t bytes) {
  return std::aligned_alloc(kWorkspaceAlignment, round_up(bytes, kWorkspaceAlignment));
}
void release(void* device) noexcept { std::free(device); }
void copy_to_host(const Context&, void* host, const void* device, std::size_t bytes) {
  std::memcpy(host, device, bytes);
}
void copy_to_device(const Context&, void* device, const void* host, std::size_t bytes) {
  std::memcpy(device, host, bytes);
}

bool contents_hold(const Context& context, const Contents& contents, void* scratch) {
  std::memset(scratch, 0, sizeof(std::int32_t));
  const std::int64_t items = check_items(contents);
  const std::int64_t blocks = std::min<std::int64_t>((items + kCheckThreads - 1) / kCheckThreads, 2);
  launch(dim3(static_cast<unsigned>(blocks)), dim3(kCheckThreads), 0, context.stream, check_contents,
         check_arguments(contents, scratch), items);
  std::int32_t broken = 0;
  std::memcpy(&broken, scratch, sizeof(broken));
  return broken == 0;
}

namespace {

// Every test of an operator that loops over targets gets this one.
const bool kRegistered = [] {
  testing::device_targets() = [] {
    static void* const workspace = [] {
      constexpr std::size_t kBytes = std::size_t{64} << 20;
      void* memory = allocate(kBytes);
      std::memset(memory, 0xff, kBytes);
      return memory;
    }();
    testing::Target target;
    target.name = "cuda, emulated";
    target.context.backend = Backend::kCuda;
    target.context.workspace = workspace;
    target.context.workspace_bytes = std::size_t{64} << 20;
    return std::vector<testing::Target>{target};
  };
  return true;
}();

}  // namespace
}  // namespace msa::cuda
