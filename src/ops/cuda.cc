// SPDX-License-Identifier: Apache-2.0
// Front door of what include/msa/cuda.h offers.
#include "msa/cuda.h"

#include <utility>

#include "msa/context.h"
#include "msa/error.h"
#include "src/cuda/operators.h"

namespace msa {

bool cuda_is_built() { return cuda::is_built(); }

CudaInfo cuda_info() {
  if (cuda::is_built()) return cuda::describe_device();
  CudaInfo info;
  info.why_not = "built without CUDA; configure with -DMSA_CUDA=ON (docs/cuda.md)";
  return info;
}

DeviceBuffer::DeviceBuffer(std::size_t bytes) : data_(bytes > 0 ? cuda::allocate(bytes) : nullptr), bytes_(bytes) {}

DeviceBuffer::~DeviceBuffer() {
  if (data_ != nullptr) cuda::release(data_);
}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void DeviceBuffer::upload(const void* host, std::size_t bytes) {
  if (bytes > bytes_) throw Error("DeviceBuffer: " + std::to_string(bytes) + " bytes do not fit");
  if (bytes > 0) cuda::copy_to_device(Context(), data_, host, bytes);
}

void DeviceBuffer::download(void* host, std::size_t bytes) const {
  if (bytes > bytes_) throw Error("DeviceBuffer: " + std::to_string(bytes) + " bytes are not there");
  if (bytes > 0) cuda::copy_to_host(Context(), host, data_, bytes);
}

}  // namespace msa
