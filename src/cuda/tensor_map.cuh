// SPDX-License-Identifier: Apache-2.0
// Descriptions of global tensors for the bulk copy engine: what box a copy takes out of a tensor and how it is swizzled
// in shared memory. Made on the host, passed to a kernel by value as `const __grid_constant__ TensorMap`. Tested in
// tests/cuda/ptx_emulation_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cuda/device.cuh"

#if !defined(MSA_CUDA_EMULATION)
#include <cuda.h>
#endif

namespace msa::cuda {

/// Where a 16-byte chunk of a tile lies in shared memory: within `kNbytes`-byte rows the chunk's number is xored with
/// bits of the address above, so that a column of chunks touches all banks. k128: address bits 4-6 with bits 7-9; k64:
/// bits 4-5 with 7-8; k32: bit 4 with bit 7. The values are those of a matrix descriptor's layout field.
enum class Swizzle : std::uint32_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

/// The swizzled place of byte `offset` of a tile that starts 1024-byte aligned.
__host__ __device__ constexpr std::uint32_t swizzled(std::uint32_t offset, Swizzle swizzle) {
  const std::uint32_t bits = swizzle == Swizzle::k128  ? 7u
                             : swizzle == Swizzle::k64 ? 3u
                             : swizzle == Swizzle::k32 ? 1u
                                                       : 0u;
  return offset ^ ((offset >> 7 & bits) << 4);
}

inline constexpr int kMaxTensorMapRank = 5;

struct TensorMapSpec {
  const void* data = nullptr;  ///< 16-byte aligned
  int element_bytes = 2;       ///< 1, 2 or 4
  int rank = 2;
  std::uint64_t extents[kMaxTensorMapRank] = {1, 1, 1, 1, 1};  ///< elements, the contiguous dimension first
  std::uint64_t strides[kMaxTensorMapRank] = {0, 0, 0, 0, 0};  ///< bytes, multiples of 16; [0] is not read
  std::uint32_t box[kMaxTensorMapRank] = {1, 1, 1, 1, 1};      ///< elements a copy takes, at most 256 each
  Swizzle swizzle = Swizzle::k128;                             ///< box[0] * element_bytes is at most its width
};

#if defined(MSA_CUDA_EMULATION)

struct TensorMap {
  TensorMapSpec spec;
};
inline TensorMap make_tensor_map(const TensorMapSpec& spec) {
  const auto fail = [](const char* what) { throw Error(std::string("make_tensor_map: ") + what); };
  if (reinterpret_cast<std::uintptr_t>(spec.data) % 16 != 0) fail("the tensor is not 16-byte aligned");
  if (spec.rank < 1 || spec.rank > kMaxTensorMapRank) fail("rank");
  for (int d = 0; d < spec.rank; ++d) {
    if (spec.extents[d] == 0 || spec.box[d] == 0 || spec.box[d] > 256) fail("an extent or a box");
    if (d > 0 && spec.strides[d] % 16 != 0) fail("a stride is no multiple of 16 bytes");
  }
  const std::uint32_t width = spec.box[0] * static_cast<std::uint32_t>(spec.element_bytes);
  const std::uint32_t limit = spec.swizzle == Swizzle::k128  ? 128
                              : spec.swizzle == Swizzle::k64 ? 64
                              : spec.swizzle == Swizzle::k32 ? 32
                                                             : 1u << 30;
  if (width % 16 != 0 || width > limit) fail("the box's row");
  return {spec};
}

#else

using TensorMap = CUtensorMap;

/// Throws msa::Error when the driver refuses the description.
inline TensorMap make_tensor_map(const TensorMapSpec& spec) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  // Asked of the runtime, so that the library does not link against the driver. The same answer for every call.
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "make_tensor_map");
    if (found != cudaDriverEntryPointSuccess) throw Error("make_tensor_map: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  cuuint64_t extents[kMaxTensorMapRank], strides[kMaxTensorMapRank];
  cuuint32_t box[kMaxTensorMapRank], steps[kMaxTensorMapRank];
  for (int d = 0; d < spec.rank; ++d) {
    extents[d] = spec.extents[d];
    box[d] = spec.box[d];
    steps[d] = 1;
    if (d > 0) strides[d - 1] = spec.strides[d];
  }
  const CUtensorMapDataType type = spec.element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : spec.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const CUtensorMapSwizzle swizzle = spec.swizzle == Swizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : spec.swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : spec.swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                    : CU_TENSOR_MAP_SWIZZLE_NONE;
  TensorMap map;
  const CUresult status = encode(&map, type, static_cast<cuuint32_t>(spec.rank), const_cast<void*>(spec.data), extents,
                                 strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    std::string text = "make_tensor_map: the driver refuses the tensor, code ";
    text += std::to_string(static_cast<int>(status));
    throw Error(text);
  }
  return map;
}

#endif

}  // namespace msa::cuda
