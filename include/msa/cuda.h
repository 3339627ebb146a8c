// SPDX-License-Identifier: Apache-2.0
// The GPU of Backend::kCuda: whether this build and this machine have one, and device memory for programs that have no
// CUDA runtime of their own to allocate it with (`msa check`). Tested in tests/cuda/conformance_test.cc, emulated, and
// by tests/cuda/test_gpu_programs.py where there is a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace msa {

struct CudaInfo {
  bool built = false;          ///< this build has the backend
  bool usable = false;         ///< and the current device runs it
  std::string why_not;         ///< empty when usable
  std::string device;          ///< name of the current device; empty when there is none
  int compute_capability = 0;  ///< 90 for 9.0
  int multiprocessors = 0;
  std::int64_t memory_bytes = 0;
  int runtime_version = 0;  ///< 13000 for 13.0: what the backend is linked with
  int driver_version = 0;   ///< the newest runtime that the driver takes
};

/// CudaInfo::built alone, without asking anyone.
bool cuda_is_built();
/// Asks the runtime; never throws for want of a GPU.
CudaInfo cuda_info();

/// Memory of the current device, freed with the object. Throws msa::Error when there is none to be had. Copies wait
/// until they are done, and for the work that lies before them on the default stream.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(std::size_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const { return data_; }  ///< aligned to kWorkspaceAlignment
  std::size_t bytes() const { return bytes_; }
  /// The first `bytes` of the buffer.
  void upload(const void* host, std::size_t bytes);
  void download(void* host, std::size_t bytes) const;

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace msa
