// SPDX-License-Identifier: Apache-2.0
// The device, its memory and copies, through the CUDA runtime: what the backend needs besides launches. Host code.
#include <cuda_runtime_api.h>

#include "msa/error.h"
#include "src/cuda/operators.h"
#include "src/cuda/runtime.h"

namespace msa::cuda {
namespace {

constexpr int kNeeded = 90;  // the device code is sm_90a's, which runs on 9.0 only

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not to be found by a later call
  std::string text = what;
  text += ": CUDA says: ";
  text += cudaGetErrorString(status);
  throw Error(text);
}

cudaStream_t stream_of(const Context& context) { return static_cast<cudaStream_t>(context.stream); }

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, name, device) != cudaSuccess) cudaGetLastError();
  return value;
}

/// Device number, or -1 with the reason.
int current_device(std::string& why_not) {
  int devices = 0;
  cudaError_t status = cudaGetDeviceCount(&devices);
  int device = -1;
  if (status == cudaSuccess && devices > 0) status = cudaGetDevice(&device);
  if (status != cudaSuccess) {
    cudaGetLastError();
    why_not = "no GPU: ";
    why_not += cudaGetErrorString(status);
    return -1;
  }
  if (devices == 0) why_not = "no GPU";
  return device;
}

int capability_of(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

std::string refusal(int capability) {
  if (capability == kNeeded) return {};
  std::string text = "the device has compute capability ";
  text += std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  text += "; the backend is built for 9.0 (H100, H200, H800)";
  return text;
}

}  // namespace

bool is_built() { return true; }

CudaInfo describe_device() {
  CudaInfo info;
  info.built = true;
  cudaRuntimeGetVersion(&info.runtime_version);
  cudaDriverGetVersion(&info.driver_version);
  const int device = current_device(info.why_not);
  if (device < 0) return info;
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
    info.device = properties.name;
    info.memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem);
    info.multiprocessors = properties.multiProcessorCount;
  }
  info.compute_capability = capability_of(device);
  info.why_not = refusal(info.compute_capability);
  info.usable = info.why_not.empty();
  return info;
}

void require_device() {
  std::string why_not;
  const int device = current_device(why_not);
  if (device >= 0) why_not = refusal(capability_of(device));
  if (!why_not.empty()) throw Error("backend: cuda: " + why_not);
}

void* allocate(std::size_t bytes) {
  void* device = nullptr;
  check(cudaMalloc(&device, bytes), "device memory");
  return device;
}

void release(void* device) noexcept { cudaFree(device); }

std::int64_t multiprocessor_count() {
  int device = 0;
  check(cudaGetDevice(&device), "device");
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
  return count;
}

bool is_capturing(const Context& context) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_of(context), &status), "stream");
  return status != cudaStreamCaptureStatusNone;
}

void copy_to_host(const Context& context, void* host, const void* device, std::size_t bytes) {
  if (is_capturing(context)) {
    throw Error("stream: is capturing a graph; a call that returns a number to the host cannot be part of one");
  }
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_of(context)), "copy to the host");
  check(cudaStreamSynchronize(stream_of(context)), "copy to the host");
}

void copy_to_device(const Context& context, void* device, const void* host, std::size_t bytes) {
  if (is_capturing(context)) {
    throw Error("stream: is capturing a graph; a call that takes a number from the host cannot be part of one");
  }
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_of(context)), "copy to the device");
  check(cudaStreamSynchronize(stream_of(context)), "copy to the device");
}

}  // namespace msa::cuda
