// SPDX-License-Identifier: Apache-2.0
// Starts the check of check.cuh and fetches its verdict.
#include <algorithm>

#include "src/cuda/check.cuh"

namespace msa::cuda {

bool contents_hold(const Context& context, const Contents& contents, void* scratch) {
  check_cuda(cudaMemsetAsync(scratch, 0, sizeof(std::int32_t), static_cast<cudaStream_t>(context.stream)),
             "check of device arrays");
  const std::int64_t items = check_items(contents);
  const std::int64_t blocks = std::min<std::int64_t>((items + kCheckThreads - 1) / kCheckThreads, 1024);
  launch(dim3(static_cast<unsigned>(blocks)), dim3(kCheckThreads), 0, context.stream, check_contents,
         check_arguments(contents, scratch), items);
  std::int32_t broken = 0;
  copy_to_host(context, &broken, scratch, sizeof(broken));
  return broken == 0;
}

}  // namespace msa::cuda
