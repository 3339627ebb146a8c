// SPDX-License-Identifier: Apache-2.0
// What every kernel stands on: the CUDA headers or, under MSA_CUDA_EMULATION, the emulator that runs kernels on a CPU;
// storage types with their conversions; warp sums; and launch(). Nothing else includes CUDA headers for device code, so
// that a kernel compiles with nvcc and, as plain C++20, with the host's compiler. Tested in
// tests/cuda/emulator_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#if defined(MSA_CUDA_EMULATION)
#include "src/core/float_convert.h"
#include "tests/cuda/emulator/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#endif

#include "msa/error.h"

namespace msa::cuda {

inline constexpr unsigned kFullMask = 0xffffffffu;
inline constexpr int kWarpSize = 32;

// Storage types: bit patterns with one way in and one way out
// ----------------------------------------------------------

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
struct Float8E4M3 {
  std::uint8_t bits;
};
struct Int8 {
  std::int8_t value;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 x) {
#if defined(MSA_CUDA_EMULATION)
  return core::f16_to_float(x.bits);
#else
  return __half2float(__ushort_as_half(x.bits));
#endif
}
__device__ __forceinline__ float to_float(Float8E4M3 x) {
#if defined(MSA_CUDA_EMULATION)
  return core::f8_to_float(x.bits);
#else
  return __half2float(static_cast<__half>(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3)));
#endif
}

__device__ __forceinline__ float to_float(Int8 x) { return x.value; }

/// Rounds to nearest even; NaN stays NaN. float8: what is above 448 becomes 448, as in src/core/float_convert.h.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(MSA_CUDA_EMULATION)
    return {core::float_to_bf16(x)};
#else
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#endif
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(MSA_CUDA_EMULATION)
    return {core::float_to_f16(x)};
#else
    return {__half_as_ushort(__float2half_rn(x))};
#endif
  } else {
    static_assert(std::is_same_v<T, Float8E4M3>);
#if defined(MSA_CUDA_EMULATION)
    return {core::float_to_f8(x)};
#else
    return {static_cast<std::uint8_t>(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3))};
#endif
  }
}

/// Two neighbours in one word, `low` at the lower address: what a matrix instruction's A operand and a 4-byte store
/// take.
template <class T>
__device__ __forceinline__ std::uint32_t pack_two(float low, float high) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
#if !defined(MSA_CUDA_EMULATION)
  if constexpr (std::is_same_v<T, BFloat16>) {  // one instruction for both
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return static_cast<std::uint32_t>(__bfloat16_as_ushort(pair.x)) |
           static_cast<std::uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return static_cast<std::uint32_t>(__half_as_ushort(pair.x)) | static_cast<std::uint32_t>(__half_as_ushort(pair.y))
                                                                      << 16;
  }
#else
  return static_cast<std::uint32_t>(from_float<T>(low).bits) | static_cast<std::uint32_t>(from_float<T>(high).bits)
                                                                   << 16;
#endif
}

/// Each of two neighbours times `factor`, by its bits.
template <class T>
__device__ __forceinline__ std::uint32_t multiply_two(std::uint32_t two, std::uint16_t factor) {
#if !defined(MSA_CUDA_EMULATION)
  using Pair = std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat162, __half2>;
  const std::uint32_t factors = factor * 0x10001u;
  Pair left, right;
  memcpy(&left, &two, 4);
  memcpy(&right, &factors, 4);
  left = __hmul2(left, right);
  memcpy(&two, &left, 4);
  return two;
#else
  const float by = to_float(T{factor});
  return pack_two<T>(to_float(T{static_cast<std::uint16_t>(two & 0xffffu)}) * by,
                     to_float(T{static_cast<std::uint16_t>(two >> 16)}) * by);
#endif
}

// float8 to 16 bits, eight neighbours at a time: what a byte holds goes to the upper half of 16 bits and down to where
// a 16-bit float has sign and magnitude: bfloat16 with four bits of its exponent, float16 with all of its own five but
// the highest. That is the number, subnormal or not, over a power of two, which a product puts back.
inline constexpr std::uint32_t kLowBytes = 0x1404u;  // selectors of __byte_perm: the lower two bytes, the upper two
inline constexpr std::uint32_t kHighBytes = 0x3424u;

/// Eight neighbours of float8, as T: exact. NaN becomes 480, which mend_nan mends. 24 instructions.
template <class T>
__device__ __forceinline__ uint4 widen_numbers(uint2 eight) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
  constexpr bool kIsBFloat16 = std::is_same_v<T, BFloat16>;
  constexpr int kShift = kIsBFloat16 ? 4 : 1;
  constexpr std::uint32_t kMagnitudes = (0x7f00u >> kShift) * 0x10001u;
  constexpr std::uint16_t kPower = kIsBFloat16 ? 0x7b80u : 0x5c00u;  // 2^120, 2^8
  const auto widen = [](std::uint32_t four, std::uint32_t bytes) {
    const std::uint32_t upper = __byte_perm(four, 0, bytes);
    return multiply_two<T>((upper & 0x80008000u) | (upper >> kShift & kMagnitudes), kPower);
  };
  return {widen(eight.x, kLowBytes), widen(eight.x, kHighBytes), widen(eight.y, kLowBytes), widen(eight.y, kHighBytes)};
}
/// Bits in kNanFlags where a number is NaN: a magnitude of all ones, and no other, carries into the sign.
inline constexpr std::uint32_t kNanFlags = 0x80808080u;
__device__ __forceinline__ std::uint32_t nan_flags(std::uint32_t four) { return (four & 0x7f7f7f7fu) + 0x01010101u; }

/// `wide` = widen_numbers(eight) with NaN where eight has it.
__device__ __forceinline__ void mend_nan(uint4& wide, uint2 eight) {
  const auto nan = [](std::uint32_t four, std::uint32_t bytes) {
    const std::uint32_t flags = __byte_perm(nan_flags(four), 0, bytes) & 0x80008000u;
    return flags - (flags >> 15);
  };
  wide.x |= nan(eight.x, kLowBytes);
  wide.y |= nan(eight.x, kHighBytes);
  wide.z |= nan(eight.y, kLowBytes);
  wide.w |= nan(eight.y, kHighBytes);
}

/// kCount times eight neighbours of float8, as T: exact, NaN stays NaN. One branch for all of them.
template <class T, int kCount>
__device__ __forceinline__ void widen_eights(uint4 (&wide)[kCount], const uint2 (&eights)[kCount]) {
  std::uint32_t flags = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    wide[i] = widen_numbers<T>(eights[i]);
    flags |= nan_flags(eights[i].x) | nan_flags(eights[i].y);
  }
  if ((flags & kNanFlags) == 0) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) mend_nan(wide[i], eights[i]);
}

// Small helpers
// --------------------------------------------------------------------------------------------------------

template <class T>
__host__ __device__ constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__host__ __device__ constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
__host__ __device__ constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float quiet_nan() { return __uint_as_float(0x7fc00000u); }

/// Sum of the warp's values in a fixed tree, on every lane; all 32 lanes call it.
__device__ __forceinline__ float warp_sum(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kFullMask, x, bits);
  return x;
}
/// Largest of the warp's values, on every lane. NaN is passed over, as by fmaxf.
__device__ __forceinline__ float warp_max(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, bits));
  return x;
}

/// The block's dynamic shared memory, aligned to the 1024 bytes that a 128-byte swizzle repeats after.
__device__ __forceinline__ std::byte* shared_memory() {
#if defined(MSA_CUDA_EMULATION)
  return emulator::dynamic_shared();
#else
  extern __shared__ __align__(1024) unsigned char msa_dynamic_shared_memory[];
  return reinterpret_cast<std::byte*>(msa_dynamic_shared_memory);
#endif
}

// Launch
// ---------------------------------------------------------------------------------------------------------------

#if defined(MSA_CUDA_EMULATION)

/// Runs the kernel at once. A grid without blocks is no launch.
template <class... Params, class... Args>
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, void* /*stream*/, void (*kernel)(Params...),
            Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulator::run_grid(grid, block, shared_bytes, [&] { kernel(args...); });
}
template <class... Params, class... Args>
void launch_dependent(dim3 grid, dim3 block, std::size_t shared_bytes, void* stream, void (*kernel)(Params...),
                      Args&&... args) {
  launch(grid, block, shared_bytes, stream, kernel, args...);
}
inline void clear_memory(void* /*stream*/, void* device, std::size_t bytes) { std::memset(device, 0, bytes); }

#else

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not to be found by a later call
  std::string text = what;
  text += ": CUDA says: ";
  text += cudaGetErrorString(status);
  throw Error(text);
}

/// Zeroes device memory, in stream order.
inline void clear_memory(void* stream, void* device, std::size_t bytes) {
  check_cuda(cudaMemsetAsync(device, 0, bytes, static_cast<cudaStream_t>(stream)), "clear_memory");
}

template <class... Params, class... Args>
void launch_with(bool dependent, dim3 grid, dim3 block, std::size_t shared_bytes, void* stream,
                 void (*kernel)(Params...), Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {  // more than a kernel gets without asking
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "launch: shared memory");
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), "launch");
}

/// Launches kernel<<<grid, block, shared_bytes, stream>>>(args...); stream is a cudaStream_t, null the default one.
/// Throws msa::Error when the launch fails. A grid without blocks is no launch.
template <class... Params, class... Args>
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, void* stream, void (*kernel)(Params...), Args&&... args) {
  launch_with(false, grid, block, shared_bytes, stream, kernel, args...);
}
/// The same as a programmatic dependent launch: the kernel may start while the one before it on the stream still runs,
/// and must call ptx::griddepcontrol_wait() before it reads what that one wrote or writes what that one reads.
template <class... Params, class... Args>
void launch_dependent(dim3 grid, dim3 block, std::size_t shared_bytes, void* stream, void (*kernel)(Params...),
                      Args&&... args) {
  launch_with(true, grid, block, shared_bytes, stream, kernel, args...);
}

#endif

}  // namespace msa::cuda
