// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, so that a kernel's indices, barriers and asynchronous copies are tested without a GPU.
// A CUDA thread is a fiber; a block's fibers take turns, each running until it waits for another; blocks run one after
// the other. Holds the CUDA names that kernels use (threadIdx, __shfl_sync, atomicAdd, ...). The instructions of
// ptx.cuh are in ptx.h beside this. Tested in tests/cuda/emulator_test.cc.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// One block runs at a time and its fibers share one OS thread, so static storage is what a block shares. It is neither
// cleared nor poisoned between blocks and has no shared address: barriers and copies want dynamic_shared().
#define __shared__ static

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}  // NOLINT: as CUDA's
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct int3 {
  int x, y, z;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the running fiber: set at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace msa::cuda::emulator {

/// A kernel did something no device allows: a deadlock, a warp function called by half a mask, an address out of range.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class BlockOrder { kAscending, kDescending, kShuffled };

/// How launches run from now on. A right kernel gives the same bits under all of them.
struct Options {
  /// false: an asynchronous operation is done when it is issued. true: when a wait for it would otherwise hang, so that
  /// a missing wait reads stale data and an early overwrite spoils what is still being read.
  bool late_async = false;
  BlockOrder block_order = BlockOrder::kAscending;
  bool reverse_threads = false;  ///< the last thread of a block takes its turn first
  std::uint64_t seed = 1;        ///< of the shuffles
};
Options& options();

/// Sets options for as long as it lives.
class WithOptions {
 public:
  explicit WithOptions(const Options& wanted) : saved_(options()) { options() = wanted; }
  ~WithOptions() { options() = saved_; }
  WithOptions(const WithOptions&) = delete;
  WithOptions& operator=(const WithOptions&) = delete;

 private:
  Options saved_;
};

/// Runs `thread` once for every thread of the grid. Rethrows what a thread threw; throws Fault on a deadlock.
void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread);

// What the functions below are made of
// ---------------------------------------------------------------------------------

/// Suspends the running fiber until ready(context). The scheduler calls `ready` from outside any fiber.
void wait_until(bool (*ready)(void*), void* context, const char* what);
template <class Ready>
void wait_until(Ready ready, const char* what) {
  if (ready()) return;
  wait_until([](void* context) { return (*static_cast<Ready*>(context))(); }, &ready, what);
}
/// Thread number within the block; its warp is that / 32.
unsigned thread_rank();
unsigned block_threads();

/// The block's dynamic shared memory: 1024-byte aligned, filled with 0xff (NaN) before every block.
std::byte* dynamic_shared();
std::size_t dynamic_shared_bytes();
/// Throws Fault unless [pointer, pointer + bytes) is dynamic shared memory.
void check_shared(const void* pointer, std::size_t bytes, const char* what);

/// All lanes of `mask` meet; each gives `value` and reads the others' through `read`, which gets 32 values.
void meet(unsigned mask, const char* what, const std::uint64_t& value,
          const std::function<void(const std::uint64_t*)>& read);

void block_barrier();
/// Barrier `id` of the block over `threads` threads; arrive does not wait.
void named_barrier_sync(unsigned id, unsigned threads);
void named_barrier_arrive(unsigned id, unsigned threads);

template <class T>
std::uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
T from_word(std::uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

/// Reads the lane that `pick(lane)` names.
template <class T, class Pick>
T shuffle(unsigned mask, T value, const char* what, Pick pick) {
  const unsigned lane = thread_rank() % 32;
  T result = value;
  meet(mask, what, to_word(value), [&](const std::uint64_t* values) {
    const unsigned from = pick(lane);
    if (((mask >> from) & 1u) == 0) throw Fault(std::string(what) + " reads a lane outside its mask");
    result = from_word<T>(values[from]);
  });
  return result;
}

/// fold(accumulator, lane's value) over the lanes of the mask, ascending.
template <class T, class Fold>
T fold_lanes(unsigned mask, T value, T start, const char* what, Fold fold) {
  meet(mask, what, to_word(value), [&](const std::uint64_t* values) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((mask >> lane) & 1u) start = fold(start, from_word<T>(values[lane]), lane);
    }
  });
  return start;
}

}  // namespace msa::cuda::emulator

// Synchronisation and warp functions
// -----------------------------------------------------------------------------------

inline void __syncthreads() { msa::cuda::emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  msa::cuda::emulator::meet(mask, "__syncwarp", 0, [](const std::uint64_t*) {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const auto w = static_cast<unsigned>(width);
  return msa::cuda::emulator::shuffle(mask, value, "__shfl_sync",
                                      [&](unsigned lane) { return lane / w * w + static_cast<unsigned>(source) % w; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const auto w = static_cast<unsigned>(width);
  return msa::cuda::emulator::shuffle(mask, value, "__shfl_xor_sync", [&](unsigned lane) {
    const unsigned from = lane ^ static_cast<unsigned>(bits);
    return from / w <= lane / w ? from : lane;
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const auto w = static_cast<unsigned>(width);
  return msa::cuda::emulator::shuffle(mask, value, "__shfl_up_sync",
                                      [&](unsigned lane) { return lane % w >= delta ? lane - delta : lane; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const auto w = static_cast<unsigned>(width);
  return msa::cuda::emulator::shuffle(mask, value, "__shfl_down_sync",
                                      [&](unsigned lane) { return lane % w + delta < w ? lane + delta : lane; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return msa::cuda::emulator::fold_lanes<unsigned>(
      mask, predicate != 0, 0u, "__ballot_sync",
      [](unsigned sum, unsigned bit, unsigned lane) { return sum | bit << lane; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  return msa::cuda::emulator::fold_lanes<unsigned>(
      mask, value, 0u, "__match_any_sync",
      [value](unsigned sum, unsigned other, unsigned lane) { return sum | (other == value ? 1u << lane : 0u); });
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return msa::cuda::emulator::fold_lanes<T>(mask, value, T{0}, "__reduce_add_sync",
                                            [](T sum, T other, unsigned) { return static_cast<T>(sum + other); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return msa::cuda::emulator::fold_lanes<T>(mask, value, value, "__reduce_max_sync",
                                            [](T top, T other, unsigned) { return std::max(top, other); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return msa::cuda::emulator::fold_lanes<T>(mask, value, value, "__reduce_min_sync",
                                            [](T low, T other, unsigned) { return std::min(low, other); });
}
inline int __syncthreads_or(int predicate) {
  __shared__ int any;
  __syncthreads();
  if (msa::cuda::emulator::thread_rank() == 0) any = 0;
  __syncthreads();
  if (predicate != 0) any = 1;
  __syncthreads();
  const int result = any;
  __syncthreads();
  return result;
}

// Atomics: fibers switch only where they wait, so a plain read and write is atomic
// -------------------------------------

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = static_cast<T>(old + value);
  return old;
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old | value;
  return old;
}
template <class T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old & value;
  return old;
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = value;
  return old;
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

// Arithmetic
// -----------------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
  return result;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int bit = 0; bit < 32; ++bit) y = y << 1 | ((x >> bit) & 1u);
  return y;
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
/// NaN gives 0, as on the device.
inline int __float2int_rn(float x) { return x != x ? 0 : static_cast<int>(std::nearbyint(std::clamp(x, -2e9f, 2e9f))); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
