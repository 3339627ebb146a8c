// SPDX-License-Identifier: Apache-2.0
// Kernels that each use a few functions of src/cuda/ptx.cuh and device.cuh, with their inputs and with what must come
// out. tests/cuda/ptx_emulation_test.cc runs them in the emulator, tests/cuda/ptx_test.cu on a device: what the one
// believes is what the other is asked.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "msa/cuda.h"
#include "src/core/float_convert.h"
#include "src/cuda/ptx.cuh"

namespace msa::cuda::ptx_cases {

// Host side
// -------------------------------------------------------------------------------------------------------------

/// Values in device memory; the emulator's is the host's.
template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& host) : buffer_(host.size() * sizeof(T)), count_(host.size()) {
    buffer_.upload(host.data(), host.size() * sizeof(T));
  }
  /// Full of NaN.
  explicit Array(std::size_t count) : Array(poison(count)) {}
  T* data() const { return static_cast<T*>(buffer_.data()); }
  /// Waits for the kernels before.
  std::vector<T> values() const {
    std::vector<T> host(count_);
    buffer_.download(host.data(), count_ * sizeof(T));
    return host;
  }

 private:
  static std::vector<T> poison(std::size_t count) {
    std::vector<T> host(count);
    std::memset(static_cast<void*>(host.data()), 0xff, count * sizeof(T));
    return host;
  }

  DeviceBuffer buffer_;
  std::size_t count_;
};

/// The conversions of device.cuh, for the host.
template <class T>
T host_from_float(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {core::float_to_bf16(x)};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {core::float_to_f16(x)};
  } else if constexpr (std::is_same_v<T, Float8E4M3>) {
    return {core::float_to_f8(x)};
  } else {
    return x;
  }
}
template <class T>
float host_to_float(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return core::bf16_to_float(x.bits);
  } else if constexpr (std::is_same_v<T, Float16>) {
    return core::f16_to_float(x.bits);
  } else if constexpr (std::is_same_v<T, Float8E4M3>) {
    return core::f8_to_float(x.bits);
  } else {
    return x;
  }
}

struct Outcome {
  std::vector<float> got, want;
  float ulps = 0;  ///< that may lie between them
};
/// Values that are not what they must be; NaN is never right.
inline std::size_t count_wrong(const Outcome& outcome) {
  if (outcome.got.size() != outcome.want.size()) return outcome.want.size() + 1;
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < outcome.got.size(); ++i) {
    const float allowed = outcome.ulps * std::fabs(outcome.want[i]) * std::numeric_limits<float>::epsilon();
    wrong += std::fabs(outcome.got[i] - outcome.want[i]) <= allowed ? 0 : 1;
  }
  return wrong;
}

using Case = std::function<Outcome()>;
using Visit = std::function<void(const std::string& name, const Case& run)>;

/// Small integers, so that every sum is exact.
template <class T>
std::vector<T> random_integers(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> values(count);
  for (T& value : values) value = host_from_float<T>(static_cast<float>(static_cast<int>(random() % 7) - 3));
  return values;
}
inline std::vector<float> counting(std::size_t count, float first = 1) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = first + static_cast<float>(i);
  return values;
}

// Matrix products
// -------------------------------------------------------------------------------------------------------

/// Puts element (row, k) where a descriptor of the kind expects it.
template <class T>
__device__ std::uint32_t place(std::uint32_t row, std::uint32_t k, std::uint32_t rows, std::uint32_t depth, bool outer,
                               Swizzle swizzle) {
  constexpr std::uint32_t kElement = sizeof(T);
  const std::uint32_t width = swizzle == Swizzle::k128 ? 128 : swizzle == Swizzle::k64 ? 64 : 32;
  if (swizzle == Swizzle::kNone) {
    // Bricks of 8 x 16 bytes: [K bricks][row bricks]; outer major, a brick's eight rows are those of K.
    if (outer)
      return (row / (16 / kElement) * (depth / 8) + k / 8) * 128 + k % 8 * 16 + row % (16 / kElement) * kElement;
    return (k / (16 / kElement) * (rows / 8) + row / 8) * 128 + row % 8 * 16 + k % (16 / kElement) * kElement;
  }
  if (outer) {
    const std::uint32_t per_row = width / kElement;
    return swizzled(row / per_row * depth * width + k * width + row % per_row * kElement, swizzle);
  }
  const std::uint32_t per_row = width / kElement;  // K columns of `width` bytes one after the other
  return swizzled(k / per_row * rows * width + row * width + k % per_row * kElement, swizzle);
}

template <class T>
__device__ std::uint64_t describe(const std::byte* start, std::uint32_t rows, std::uint32_t depth, bool outer,
                                  Swizzle swizzle) {
  const std::uint32_t width = swizzle == Swizzle::k128 ? 128 : swizzle == Swizzle::k64 ? 64 : 32;
  if (swizzle == Swizzle::kNone) {
    if (outer) return ptx::matrix_descriptor(start, 128, depth / 8 * 128, swizzle);
    return ptx::matrix_descriptor(start, rows / 8 * 128, 128, swizzle);
  }
  if (outer) return ptx::matrix_descriptor(start, depth * width, 8 * width, swizzle);
  return ptx::matrix_descriptor(start, 16, 8 * width, swizzle);
}

/// D[64, N] = A[64, depth] B[N, depth]^T by one warpgroup, depth four k steps.
template <class T, int N, bool kOuterA, bool kOuterB, bool kRegistersA>
__global__ void multiply(const T* a, const T* b, float* d, Swizzle swizzle) {
  constexpr std::uint32_t kStep = 32 / sizeof(T), kSteps = 4, kDepth = kSteps * kStep;
  std::byte* shared_a = shared_memory();
  std::byte* shared_b = shared_a + 64 * kDepth * sizeof(T);
  for (std::uint32_t i = threadIdx.x; i < 64 * kDepth; i += 128) {
    *reinterpret_cast<T*>(shared_a + place<T>(i / kDepth, i % kDepth, 64, kDepth, kOuterA, swizzle)) = a[i];
  }
  for (std::uint32_t i = threadIdx.x; i < N * kDepth; i += 128) {
    *reinterpret_cast<T*>(shared_b + place<T>(i / kDepth, i % kDepth, N, kDepth, kOuterB, swizzle)) = b[i];
  }
  ptx::fence_proxy_async();
  __syncthreads();
  constexpr ptx::Major kMajorA = kOuterA ? ptx::Major::kOuter : ptx::Major::kInner;
  constexpr ptx::Major kMajorB = kOuterB ? ptx::Major::kOuter : ptx::Major::kInner;
  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sums[N / 2];
  std::uint32_t fragments[kSteps][4];
  if constexpr (kRegistersA) {
#pragma unroll
    for (std::uint32_t i = 0; i < 4 * kSteps; ++i) {
      const std::uint32_t row = warp * 16 + lane / 4 + 8 * (i % 2);
      const std::uint32_t column = i / 4 * kStep + 2 * (lane % 4) + 8 * (i % 4 / 2);
      fragments[i / 4][i % 4] = pack_two<T>(to_float(a[row * kDepth + column]), to_float(a[row * kDepth + column + 1]));
    }
  }
  std::uint64_t of_a[kSteps], of_b[kSteps];
#pragma unroll
  for (std::uint32_t step = 0; step < kSteps; ++step) {
    // Byte (row 0, k = step * kStep): within an atom a plain offset, so place() gives it unswizzled for row 0.
    const auto offset = [&](bool outer, std::uint32_t rows) {
      return place<T>(0, step * kStep, rows, kDepth, outer, swizzle);
    };
    of_a[step] = describe<T>(shared_a + offset(kOuterA, 64), 64, kDepth, kOuterA, swizzle);
    of_b[step] = describe<T>(shared_b + offset(kOuterB, N), N, kDepth, kOuterB, swizzle);
  }
  ptx::fence_registers(sums);
  ptx::wgmma_fence();
#pragma unroll
  for (std::uint32_t step = 0; step < kSteps; ++step) {
    if constexpr (kRegistersA) {
      ptx::wgmma<N, T, kMajorB>(sums, fragments[step], of_b[step], step > 0);
    } else {
      ptx::wgmma<N, T, kMajorA, kMajorB>(sums, of_a[step], of_b[step], step > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::fence_registers(sums);
  for (int i = 0; i < N / 2; ++i) {
    const std::uint32_t row = warp * 16 + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    d[row * N + column] = sums[i];
  }
}

/// Two warpgroups with raised registers and one with lowered ones; the two multiply, in each its own rows.
template <int N>
__global__ void __launch_bounds__(384, 1) multiply_with_quotas(const BFloat16* a, const BFloat16* b, float* d) {
  constexpr std::uint32_t kDepth = 64;
  std::byte* shared_a = shared_memory();
  std::byte* shared_b = shared_a + 128 * kDepth * sizeof(BFloat16);
  const std::uint32_t group = threadIdx.x / 128;
  for (std::uint32_t i = threadIdx.x; i < 128 * kDepth; i += 384) {
    *reinterpret_cast<BFloat16*>(shared_a + swizzled(i * 2, Swizzle::k128)) = a[i];
  }
  for (std::uint32_t i = threadIdx.x; i < N * kDepth; i += 384) {
    *reinterpret_cast<BFloat16*>(shared_b + swizzled(i * 2, Swizzle::k128)) = b[i];
  }
  ptx::fence_proxy_async();
  __syncthreads();
  if (group == 0) {
    ptx::lower_registers<24>();
    return;
  }
  ptx::raise_registers<240>();
  float sums[N / 2];
  ptx::fence_registers(sums);
  ptx::wgmma_fence();
#pragma unroll
  for (std::uint32_t step = 0; step < kDepth / 16; ++step) {
    const std::byte* rows = shared_a + (group - 1) * 64 * 128 + step * 32;
    ptx::wgmma<N, BFloat16>(sums, ptx::matrix_descriptor(rows, 16, 1024, Swizzle::k128),
                            ptx::matrix_descriptor(shared_b + step * 32, 16, 1024, Swizzle::k128), step > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::fence_registers(sums);
  const std::uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
  for (int i = 0; i < N / 2; ++i) {
    const std::uint32_t row = warp * 16 + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    d[row * N + column] = sums[i];
  }
}

template <class T>
std::vector<float> product_of(const std::vector<T>& a, const std::vector<T>& b, std::size_t depth) {
  const std::size_t rows = a.size() / depth, columns = b.size() / depth;
  std::vector<float> d(rows * columns);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t column = 0; column < columns; ++column) {
      for (std::size_t k = 0; k < depth; ++k) {
        d[row * columns + column] += host_to_float(a[row * depth + k]) * host_to_float(b[column * depth + k]);
      }
    }
  }
  return d;
}

template <class T, int N, bool kOuterA, bool kOuterB, bool kRegistersA>
void visit_product(Swizzle swizzle, const Visit& visit) {
  constexpr std::size_t kDepth = 128 / sizeof(T);
  std::string name = "product of ";
  name += sizeof(T) == 1 ? "e4m3" : std::is_same_v<T, BFloat16> ? "bf16" : "fp16";
  name += ", N " + std::to_string(N) + ", swizzle " + std::to_string(static_cast<int>(swizzle));
  name += kRegistersA ? ", A in registers" : kOuterA ? ", A outer" : ", A inner";
  name += kOuterB ? ", B outer" : ", B inner";
  visit(name, [=] {
    const auto a = random_integers<T>(64 * kDepth, 1);
    const auto b = random_integers<T>(N * kDepth, 2);
    const Array<T> device_a(a), device_b(b);
    const Array<float> d(64 * N);
    launch(1, 128, (64 + N) * kDepth * sizeof(T) + 1024, nullptr, multiply<T, N, kOuterA, kOuterB, kRegistersA>,
           device_a.data(), device_b.data(), d.data(), swizzle);
    return Outcome{d.values(), product_of(a, b, kDepth)};
  });
}

template <class T, int N>
void visit_products(const Visit& visit) {
  for (const Swizzle swizzle : {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32}) {
    visit_product<T, N, false, false, false>(swizzle, visit);
    if constexpr (sizeof(T) == 2) {
      visit_product<T, N, false, false, true>(swizzle, visit);
      if constexpr (N >= 64) {  // narrower operands do not fill the 128-byte row of an outer-major tile
        visit_product<T, N, true, true, false>(swizzle, visit);
        visit_product<T, N, false, true, true>(swizzle, visit);
        visit_product<T, N, true, false, false>(swizzle, visit);
      }
    }
  }
}

inline Outcome quotas() {
  const auto a = random_integers<BFloat16>(128 * 64, 3);
  const auto b = random_integers<BFloat16>(256 * 64, 4);
  const Array<BFloat16> device_a(a), device_b(b);
  const Array<float> d(128 * 256);
  launch(1, 384, (128 + 256) * 64 * 2, nullptr, multiply_with_quotas<256>, device_a.data(), device_b.data(), d.data());
  return {d.values(), product_of(a, b, 64)};
}

// Copies and barriers
// ---------------------------------------------------------------------------------------------------

/// Pipeline of two stages: one producer thread loads boxes, the others add up what they hold.
__global__ void stream_boxes(const __grid_constant__ TensorMap map, std::uint32_t boxes, float* sums, bool skip_wait,
                             bool skip_release) {
  constexpr std::uint32_t kBoxBytes = 16 * 128;
  std::byte* tiles = shared_memory();
  auto* full = reinterpret_cast<std::uint64_t*>(tiles + 2 * kBoxBytes);
  std::uint64_t* empty = full + 2;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      ptx::barrier_init(full + stage, 1);
      ptx::barrier_init(empty + stage, 32);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= 32) {
    if (threadIdx.x != 32) return;
    for (std::uint32_t i = 0; i < boxes; ++i) {
      const std::uint32_t stage = i % 2, round = i / 2;
      if (!skip_release) ptx::wait(empty + stage, (round & 1) ^ 1);
      ptx::arrive_expect_bytes(full + stage, kBoxBytes);
      ptx::tensor_load(tiles + stage * kBoxBytes, map, full + stage, 0, static_cast<std::int32_t>(16 * i));
    }
    return;
  }
  float sum = 0;
  for (std::uint32_t i = 0; i < boxes; ++i) {
    const std::uint32_t stage = i % 2, round = i / 2;
    if (!skip_wait) ptx::wait(full + stage, round & 1);
    for (std::uint32_t row = 0; row < 16; ++row) {
      const std::uint32_t byte = stage * kBoxBytes + row * 128 + threadIdx.x * 4;
      sum += *reinterpret_cast<const float*>(tiles + swizzled(byte, Swizzle::k128)) * static_cast<float>(i + 1);
    }
    ptx::arrive(empty + stage);
  }
  if (skip_wait) {
    for (std::uint32_t stage = 0; stage < 2; ++stage) ptx::wait(full + stage, 0);
  }
  sums[threadIdx.x] = sum;
}

/// What the pipeline must add up: 77 rows of 32 columns in boxes of 16, the last of which runs over the end: zeros.
struct BoxTensor {
  static constexpr std::uint32_t kRows = 16 * 5 - 3, kBoxes = 5;
  static constexpr std::size_t kShared = 2 * 16 * 128 + 32;
  std::vector<float> host;
  Array<float> device;
  TensorMap map;

  BoxTensor() : host(make()), device(host), map(describe_it(device.data())) {}
  static std::vector<float> make() {
    std::vector<float> values(kRows * 48);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 97);
    return values;
  }
  static TensorMap describe_it(const float* data) {
    TensorMapSpec spec;
    spec.data = data;
    spec.element_bytes = 4;
    spec.extents[0] = 32;
    spec.extents[1] = kRows;
    spec.strides[1] = 48 * 4;
    spec.box[0] = 32;
    spec.box[1] = 16;
    return make_tensor_map(spec);
  }
  std::vector<float> sums() const {
    std::vector<float> want(32);
    for (std::size_t column = 0; column < 32; ++column) {
      for (std::size_t row = 0; row < kRows; ++row) {
        want[column] += host[row * 48 + column] * static_cast<float>(row / 16 + 1);
      }
    }
    return want;
  }
};

inline Outcome pipeline() {
  const BoxTensor tensor;
  const Array<float> sums(32);
  launch(1, 64, BoxTensor::kShared, nullptr, stream_boxes, tensor.map, BoxTensor::kBoxes, sums.data(), false, false);
  return {sums.values(), tensor.sums()};
}

/// How the boxes of gather_boxes lie: `rows` rows of `width` bytes, one box behind the other at multiples of 128 bytes
/// that are no multiples of 1024: the swizzle goes by the shared address.
struct BoxShape {
  std::uint32_t width, rows, boxes;
  Swizzle swizzle;
  __host__ __device__ std::uint32_t step() const { return round_up(width * rows, 128u); }
};
/// Where box i begins among the tensor's rows: before its first and behind its last one, too.
__host__ __device__ constexpr std::int32_t first_row(std::uint32_t box) {
  return 5 * static_cast<std::int32_t>(box) - 1;
}

/// Rank 2: [rows][columns]. Rank 3: [rows][2][columns], the second of the middle dimension. Rank 4: two pages of
/// [rows][2][columns], the second.
template <int kRank>
__global__ void gather_boxes(const __grid_constant__ TensorMap map, BoxShape shape, float* to) {
  std::byte* tiles = shared_memory();
  auto* barrier = reinterpret_cast<std::uint64_t*>(tiles + shape.step() * shape.boxes);
  if (threadIdx.x == 0) {
    ptx::prefetch(map);
    ptx::barrier_init(barrier, 1);
    ptx::fence_barrier_init();
    ptx::arrive_expect_bytes(barrier, shape.width * shape.rows * shape.boxes);
    for (std::uint32_t box = 0; box < shape.boxes; ++box) {
      std::byte* tile = tiles + shape.step() * box;
      if constexpr (kRank == 2) ptx::tensor_load(tile, map, barrier, 0, first_row(box));
      if constexpr (kRank == 3) ptx::tensor_load(tile, map, barrier, 0, 1, first_row(box));
      if constexpr (kRank == 4) ptx::tensor_load(tile, map, barrier, 0, 1, first_row(box), 1);
    }
  }
  __syncthreads();
  ptx::wait(barrier, 0);
  const std::uint32_t columns = shape.width / 2, count = columns * shape.rows;
  for (std::uint32_t i = threadIdx.x; i < count * shape.boxes; i += blockDim.x) {
    const std::uint32_t byte = shape.step() * (i / count) + i % count * 2;
    to[i] = to_float(*reinterpret_cast<const Float16*>(tiles + swizzled(byte, shape.swizzle)));
  }
}

template <int kRank>
Outcome boxes_at_odd_rows(Swizzle swizzle) {
  constexpr std::uint32_t kRows = 23;
  const std::uint32_t width = swizzle == Swizzle::k64 ? 64 : swizzle == Swizzle::k32 ? 32 : 128;
  const BoxShape shape{width, 3, 6, swizzle};
  const std::uint32_t columns = width / 2, heads = kRank == 2 ? 1 : 2, pages = kRank == 4 ? 2 : 1;
  std::vector<Float16> tensor(pages * kRows * heads * columns);
  for (std::size_t i = 0; i < tensor.size(); ++i) {
    tensor[i] = host_from_float<Float16>(static_cast<float>(i * 7 % 2039) + 1);
  }
  const Array<Float16> device(tensor);
  TensorMapSpec spec;
  spec.data = device.data();
  spec.element_bytes = 2;
  spec.rank = kRank;
  spec.swizzle = swizzle;
  const std::uint64_t row_bytes = std::uint64_t{heads} * width;
  spec.extents[0] = spec.box[0] = columns;
  const int of_rows = kRank == 2 ? 1 : 2;
  if (kRank > 2) spec.extents[1] = heads, spec.strides[1] = width;
  spec.extents[of_rows] = kRows, spec.strides[of_rows] = row_bytes, spec.box[of_rows] = shape.rows;
  if (kRank == 4) spec.extents[3] = pages, spec.strides[3] = row_bytes * kRows;
  Outcome outcome;
  const std::size_t start = (std::size_t{pages} - 1) * kRows;
  for (std::uint32_t box = 0; box < shape.boxes; ++box) {
    for (std::uint32_t row = 0; row < shape.rows; ++row) {
      const std::int32_t from = first_row(box) + static_cast<std::int32_t>(row);
      for (std::uint32_t column = 0; column < columns; ++column) {
        const bool inside = from >= 0 && from < static_cast<std::int32_t>(kRows);
        const std::size_t at = ((start + static_cast<std::size_t>(inside ? from : 0)) * heads + heads - 1) * columns;
        outcome.want.push_back(inside ? host_to_float(tensor[at + column]) : 0.0f);
      }
    }
  }
  const Array<float> to(outcome.want.size());
  launch(1, 64, shape.step() * shape.boxes + 16, nullptr, gather_boxes<kRank>, make_tensor_map(spec), shape, to.data());
  outcome.got = to.values();
  return outcome;
}

__global__ void copy_rows(const float* from, float* to, std::uint32_t valid, bool with_wait) {
  auto* tile = reinterpret_cast<float*>(shared_memory());
  ptx::copy_16(tile + threadIdx.x * 4, from + threadIdx.x * 4, valid);
  ptx::copy_commit();
  ptx::copy_16(tile + 128 + threadIdx.x * 4, from + 128 + threadIdx.x * 4, 16);
  ptx::copy_commit();
  if (with_wait) ptx::copy_wait<1>();
  for (int i = 0; i < 4; ++i) to[threadIdx.x * 4 + i] = tile[threadIdx.x * 4 + i];
  ptx::copy_wait<0>();
  for (int i = 0; i < 4; ++i) to[128 + threadIdx.x * 4 + i] = tile[128 + threadIdx.x * 4 + i];
}

__global__ void gather_and_store(const float* from, float* to) {
  auto* tile = reinterpret_cast<float*>(shared_memory());
  auto* barriers = reinterpret_cast<std::uint64_t*>(tile + 256);
  if (threadIdx.x == 0) {
    ptx::barrier_init(barriers, 32 + 1);  // an arrival a thread of the first warp, and the bulk load's
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    ptx::copy_16(tile + threadIdx.x * 4, from + (31 - threadIdx.x) * 4);
    ptx::copy_arrive(barriers);
  } else if (threadIdx.x == 32) {
    ptx::arrive_expect_bytes(barriers, 512);
    ptx::bulk_load(tile + 128, from + 128, 512, barriers);
  }
  ptx::wait(barriers, 0);
  tile[threadIdx.x] *= 2;
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_store(to, tile, 1024);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

__global__ void named(int* order) {
  if (threadIdx.x < 32) {
    order[0] = 1;
    ptx::named_arrive(3, 64);
  } else {
    ptx::named_sync(3, 64);
    order[1] = order[0] + 1;
  }
}
inline Outcome copies_of_a_thread() {
  const std::vector<float> from = counting(256);
  const Array<float> device(from), to(256);
  launch(1, 32, 1024, nullptr, copy_rows, device.data(), to.data(), 8u, true);
  Outcome outcome{to.values(), from};
  for (std::size_t i = 0; i < 128; ++i) outcome.want[i] = i % 4 >= 2 ? 0.0f : from[i];
  return outcome;
}

inline Outcome bulk_copies() {
  const std::vector<float> from = counting(256);
  const Array<float> device(from), to(256);
  launch(1, 256, 1024 + 16, nullptr, gather_and_store, device.data(), to.data());
  Outcome outcome{to.values(), from};
  for (std::size_t i = 0; i < 256; ++i) outcome.want[i] = (i < 128 ? from[(31 - i / 4) * 4 + i % 4] : from[i]) * 2;
  return outcome;
}

inline Outcome named_barriers() {
  const Array<int> order(2);
  launch(1, 64, 0, nullptr, named, order.data());
  const std::vector<int> got = order.values();
  return {{static_cast<float>(got[0]), static_cast<float>(got[1])}, {1, 2}};
}

/// Five phases of one barrier: every thread arrives, the first one announces bytes apart from its arrival, and each
/// reads what a thread of another warp wrote in that phase.
__global__ void phases(const float* from, float* to) {
  auto* values = reinterpret_cast<float*>(shared_memory());  // [96], then four floats of the bulk copy
  auto* barrier = reinterpret_cast<std::uint64_t*>(values + 100);
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 96);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::wait(barrier, 1);  // the phase before the first counts as ended
  float sum = 0;
  for (std::uint32_t phase = 0; phase < 5; ++phase) {
    values[threadIdx.x] = static_cast<float>(threadIdx.x * 10 + phase);
    if (threadIdx.x == 0) {
      ptx::expect_bytes(barrier, 16);
      ptx::bulk_load(values + 96, from + 4 * phase, 16, barrier);
    }
    ptx::arrive(barrier);
    ptx::wait(barrier, phase & 1);
    sum += values[(threadIdx.x + 37) % 96] + values[96 + threadIdx.x % 4];
    ptx::fence_proxy_async();
    __syncthreads();
  }
  to[threadIdx.x] = sum;
}

inline Outcome barrier_phases() {
  const std::vector<float> from = counting(20);
  const Array<float> device(from), to(96);
  launch(1, 96, 416, nullptr, phases, device.data(), to.data());
  Outcome outcome{to.values(), std::vector<float>(96)};
  for (std::size_t i = 0; i < 96; ++i) {
    for (std::size_t phase = 0; phase < 5; ++phase) {
      outcome.want[i] += static_cast<float>((i + 37) % 96 * 10 + phase) + from[4 * phase + i % 4];
    }
  }
  return outcome;
}

/// The first of two kernels keeps the second waiting; the second starts early and adds one to what the first wrote.
__global__ void write_late(float* to) {
  ptx::griddepcontrol_launch();
  for (int i = 0; i < 100; ++i) __nanosleep(1000);
  to[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>(blockIdx.x * blockDim.x + threadIdx.x);
}
__global__ void read_after(const float* from, float* to) {
  ptx::griddepcontrol_wait();
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  to[i] = from[i] + 1;
}

inline Outcome dependent_launch() {
  const Array<float> between(128), to(128);
  launch(2, 64, 0, nullptr, write_late, between.data());
  launch_dependent(2, 64, 0, nullptr, read_after, between.data(), to.data());
  return {to.values(), counting(128)};
}

// Arithmetic
// ------------------------------------------------------------------------------------------------------------

inline constexpr float kIsNan = 12345;  ///< stands for NaN, of any bits

template <class T>
__global__ void widen(const T* from, float* to, std::uint32_t count) {
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float x = to_float(from[i]);
  to[i] = x == x ? x : kIsNan;
}
template <class T>
__global__ void round_trip(const float* from, float* to, std::uint32_t count) {
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float x = to_float(from_float<T>(from[i]));
  to[i] = x == x ? x : kIsNan;
}

template <class T>
Outcome every_bit_pattern() {
  const std::uint32_t count = 1u << (8 * sizeof(T));
  std::vector<T> all(count);
  Outcome outcome;
  for (std::uint32_t i = 0; i < count; ++i) {
    all[i] = T{static_cast<decltype(T::bits)>(i)};
    const float x = host_to_float(all[i]);
    outcome.want.push_back(x == x ? x : kIsNan);
  }
  const Array<T> device(all);
  const Array<float> to(count);
  launch(count / 256, 256, 0, nullptr, widen<T>, device.data(), to.data(), count);
  outcome.got = to.values();
  for (auto* values : {&outcome.got, &outcome.want}) {  // a difference of infinities is NaN
    for (float& x : *values) {
      if (std::isinf(x)) x = std::copysign(std::numeric_limits<float>::max(), x);
    }
  }
  return outcome;
}

/// Halfway cases, subnormals, the largest and what is beyond, for rounding to a storage type.
template <class T>
Outcome rounding() {
  std::vector<float> from = {0.0f, -0.0f, std::numeric_limits<float>::quiet_NaN()};
  for (int exponent = -30; exponent <= 20; ++exponent) {
    for (const float fraction : {1.0f, 1.0625f, 1.03125f, 1.09375f, 1.001953125f, 1.00390625f, 1.01171875f, 1.9999f}) {
      for (const float sign : {1.0f, -1.0f}) from.push_back(sign * std::ldexp(fraction, exponent));
    }
  }
  Outcome outcome;
  for (const float x : from) {
    const float y = host_to_float(host_from_float<T>(x));
    outcome.want.push_back(y == y ? y : kIsNan);
  }
  const auto count = static_cast<std::uint32_t>(from.size());
  const Array<float> device(from), to(count);
  launch(ceil_div(count, 256u), 256, 0, nullptr, round_trip<T>, device.data(), to.data(), count);
  outcome.got = to.values();
  for (auto* values : {&outcome.got, &outcome.want}) {
    for (float& x : *values) {
      if (std::isinf(x)) x = std::copysign(std::numeric_limits<float>::max(), x);
    }
  }
  return outcome;
}

__global__ void exponentials(const float* from, float* to) { to[threadIdx.x] = ptx::exp2_fast(from[threadIdx.x]); }

inline Outcome powers_of_two() {
  Outcome outcome;
  std::vector<float> from = {-std::numeric_limits<float>::infinity(), -200, -127, 0, 1, 127};
  while (from.size() < 256) from.push_back(-126 + 0.9765625f * static_cast<float>(from.size()));
  for (float& x : from) x = std::min(x, 127.0f);
  for (const float x : from) {
    const float y = std::exp2(x);
    outcome.want.push_back(y < std::numeric_limits<float>::min() ? 0.0f : y);
  }
  const Array<float> device(from), to(256);
  launch(1, 256, 0, nullptr, exponentials, device.data(), to.data());
  outcome.got = to.values();
  outcome.ulps = 2;
  return outcome;
}

__global__ void reduce_warp(const float* from, float* to) {
  to[threadIdx.x] = warp_sum(from[threadIdx.x]);
  to[32 + threadIdx.x] = warp_max(from[threadIdx.x]);
}

/// Sums that round in different ways in different orders: the tree is the same everywhere.
inline Outcome warp_reductions() {
  std::vector<float> from(32);
  for (std::size_t i = 0; i < 32; ++i) from[i] = std::ldexp(1.0f + static_cast<float>(i) / 64, static_cast<int>(i) - 9);
  const Array<float> device(from), to(64);
  launch(1, 32, 0, nullptr, reduce_warp, device.data(), to.data());
  Outcome outcome{to.values(), std::vector<float>(64, from[31])};
  std::vector<float> sums = from;
  for (std::size_t bits = 16; bits > 0; bits /= 2) {
    const std::vector<float> before = sums;
    for (std::size_t i = 0; i < 32; ++i) sums[i] = before[i] + before[i ^ bits];
  }
  std::copy(sums.begin(), sums.end(), outcome.want.begin());
  return outcome;
}

/// Every case with its name.
inline void visit_cases(const Visit& visit) {
  visit_products<BFloat16, 8>(visit);
  visit_products<BFloat16, 64>(visit);
  visit_products<BFloat16, 128>(visit);
  visit_products<Float16, 16>(visit);
  visit_products<Float16, 256>(visit);
  visit_products<Float8E4M3, 32>(visit);
  visit_products<Float8E4M3, 128>(visit);
  visit("register quotas", quotas);
  visit("boxes through a pipeline", pipeline);
  for (const Swizzle swizzle : {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32}) {
    const std::string tail = ", swizzle " + std::to_string(static_cast<int>(swizzle));
    visit("boxes at odd rows, rank 2" + tail, [=] { return boxes_at_odd_rows<2>(swizzle); });
    visit("boxes at odd rows, rank 3" + tail, [=] { return boxes_at_odd_rows<3>(swizzle); });
    visit("boxes at odd rows, rank 4" + tail, [=] { return boxes_at_odd_rows<4>(swizzle); });
  }
  visit("copies of a thread", copies_of_a_thread);
  visit("bulk copies both ways, arrivals of copies", bulk_copies);
  visit("named barriers", named_barriers);
  visit("phases of a barrier", barrier_phases);
  visit("a dependent launch", dependent_launch);
  visit("every bf16", every_bit_pattern<BFloat16>);
  visit("every fp16", every_bit_pattern<Float16>);
  visit("every e4m3", every_bit_pattern<Float8E4M3>);
  visit("rounding to bf16", rounding<BFloat16>);
  visit("rounding to fp16", rounding<Float16>);
  visit("rounding to e4m3", rounding<Float8E4M3>);
  visit("powers of two", powers_of_two);
  visit("warp reductions", warp_reductions);
}

// Precision of accumulation
// ---------------------------------------------------------------------------------------------

/// D[0, 0] of one product with the first two elements of A and B, on top of `start`: start + a0 b0 + a1 b1.
template <class T>
__global__ void add_small(float start, T a0, T b0, T a1, T b1, float* d) {
  constexpr std::uint32_t kDepth = 32 / sizeof(T);
  std::byte* shared_a = shared_memory();
  std::byte* shared_b = shared_a + 64 * 32;
  const T zero{0};
  for (std::uint32_t i = threadIdx.x; i < 72 * kDepth; i += 128) {
    const std::uint32_t row = i / kDepth % 64, k = i % kDepth;
    const bool is_a = i < 64 * kDepth;
    const T value = row != 0 || k > 1 ? zero : is_a ? (k == 0 ? a0 : a1) : (k == 0 ? b0 : b1);
    std::byte* tile = is_a ? shared_a : shared_b;
    *reinterpret_cast<T*>(tile + place<T>(row, k, is_a ? 64 : 8, kDepth, false, Swizzle::kNone)) = value;
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float sums[4] = {start, start, start, start};
  ptx::fence_registers(sums);
  ptx::wgmma_fence();
  ptx::wgmma<8, T>(sums, describe<T>(shared_a, 64, kDepth, false, Swizzle::kNone),
                   describe<T>(shared_b, 8, kDepth, false, Swizzle::kNone), true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::fence_registers(sums);
  if (threadIdx.x == 0) d[0] = sums[0];
}

/// The largest n up to `most` for which 1 + 2^-n, and all smaller ones, are told from 1: by a product whose elements
/// give both, or by one that adds 2^-n to an accumulator of 1.
template <class T>
int bits_kept(bool in_accumulator, int most) {
  const T one = host_from_float<T>(1.0f), none = host_from_float<T>(0.0f);
  for (int n = 1; n <= most; ++n) {
    const T left = host_from_float<T>(std::ldexp(1.0f, -(n / 2))),
            right = host_from_float<T>(std::ldexp(1.0f, n / 2 - n));
    const Array<float> d(1);
    launch(1, 128, 72 * 32, nullptr, add_small<T>, in_accumulator ? 1.0f : 0.0f, in_accumulator ? none : one, one, left,
           right, d.data());
    if (d.values()[0] == 1.0f) return n - 1;
  }
  return most;
}

}  // namespace msa::cuda::ptx_cases
