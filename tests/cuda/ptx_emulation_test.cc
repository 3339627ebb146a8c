// SPDX-License-Identifier: Apache-2.0
// What the emulator believes of barriers, copies and matrix products; tests/cuda/ptx_test.cu asks a device the same.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "src/cuda/ptx.cuh"

namespace msa::cuda {
namespace {

emulator::Options late(bool reverse = false) {
  return {true, emulator::BlockOrder::kAscending, reverse, reverse ? 5u : 4u};
}

// Operands small integers, so that every sum is exact.
template <class T>
std::vector<T> random_integers(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> values(count);
  for (T& value : values) {
    const int number = static_cast<int>(random() % 7) - 3;
    if constexpr (std::is_same_v<T, Int8>) {
      value = {static_cast<std::int8_t>(number * 40)};  // sums beyond 16 bits
    } else {
      value = from_float<T>(static_cast<float>(number));
    }
  }
  return values;
}

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
template <class T, int N, bool kOuterA, bool kOuterB>
__global__ void multiply(const T* a, const T* b, float* d, Swizzle swizzle, bool a_in_registers) {
  constexpr std::uint32_t kStep = 32 / sizeof(T), kDepth = 128 / sizeof(T);
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
  std::conditional_t<std::is_same_v<T, Int8>, std::int32_t, float> sums[N / 2];
  std::uint32_t fragments[kDepth / kStep][4];
  ptx::wgmma_fence();
  for (std::uint32_t step = 0; step < kDepth / kStep; ++step) {
    // Byte (row 0, k = step * kStep): within an atom a plain offset, so place() gives it unswizzled for row 0.
    const std::uint32_t k = step * kStep;
    const auto offset = [&](bool outer, std::uint32_t rows) { return place<T>(0, k, rows, kDepth, outer, swizzle); };
    const std::uint64_t of_b = describe<T>(shared_b + offset(kOuterB, N), N, kDepth, kOuterB, swizzle);
    if constexpr (sizeof(T) == 2) {
      if (a_in_registers) {
        for (int r = 0; r < 4; ++r) {
          const std::uint32_t row = warp * 16 + lane / 4 + 8 * (r % 2), column = k + 2 * (lane % 4) + 8 * (r / 2);
          fragments[step][r] = pack_two<T>(to_float(a[row * kDepth + column]), to_float(a[row * kDepth + column + 1]));
        }
        ptx::wgmma<N, T, kMajorB>(sums, fragments[step], of_b, step > 0);
        continue;
      }
    }
    const std::uint64_t of_a = describe<T>(shared_a + offset(kOuterA, 64), 64, kDepth, kOuterA, swizzle);
    if constexpr (std::is_same_v<T, Int8>) {
      ptx::wgmma_int8(sums, of_a, of_b, step > 0);
    } else {
      ptx::wgmma<N, T, kMajorA, kMajorB>(sums, of_a, of_b, step > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::fence_registers(sums);
  for (int i = 0; i < N / 2; ++i) {
    const std::uint32_t row = warp * 16 + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    d[row * N + column] = static_cast<float>(sums[i]);
  }
}

template <class T, int N, bool kOuterA, bool kOuterB>
void expect_product(Swizzle swizzle, bool a_in_registers) {
  SCOPED_TRACE(std::to_string(N) + " swizzle " + std::to_string(static_cast<int>(swizzle)) + " outer " +
               std::to_string(kOuterA) + std::to_string(kOuterB) + " registers " + std::to_string(a_in_registers));
  constexpr int kDepth = 128 / sizeof(T);
  const auto a = random_integers<T>(64 * kDepth, 1);
  const auto b = random_integers<T>(N * kDepth, 2);
  std::vector<float> want(64 * N), got(64 * N);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < N; ++column) {
      for (int k = 0; k < kDepth; ++k) {
        want[row * N + column] += to_float(a[row * kDepth + k]) * to_float(b[column * kDepth + k]);
      }
    }
  }
  for (const bool is_late : {false, true}) {
    const emulator::WithOptions with(is_late ? late() : emulator::Options{});
    launch(1, 128, (64 + N) * kDepth * sizeof(T) + 1024, nullptr, multiply<T, N, kOuterA, kOuterB>, a.data(), b.data(),
           got.data(), swizzle, a_in_registers);
    EXPECT_EQ(got, want);
  }
}

template <class T, int N>
void expect_products() {
  for (const Swizzle swizzle : {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32}) {
    expect_product<T, N, false, false>(swizzle, false);
    if constexpr (sizeof(T) == 2) {
      expect_product<T, N, false, false>(swizzle, true);
      if constexpr (N >= 64) {  // narrower operands do not fill the 128-byte row of an outer-major tile
        expect_product<T, N, true, true>(swizzle, false);
        expect_product<T, N, false, true>(swizzle, true);
        expect_product<T, N, true, false>(swizzle, false);
      }
    }
  }
}

TEST(Ptx, MatrixProductsOfEveryLayout) {
  expect_products<BFloat16, 8>();
  expect_products<BFloat16, 64>();
  expect_products<BFloat16, 128>();
  expect_products<Float16, 16>();
  expect_products<Float16, 256>();
  expect_products<Float8E4M3, 32>();
  expect_products<Float8E4M3, 128>();
  expect_products<Int8, 128>();
}

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

TEST(Ptx, BoxesThroughAPipeline) {
  constexpr std::uint32_t kRows = 16 * 5 - 3;  // the last box runs over the end: zeros
  std::vector<float> tensor(kRows * 48);
  for (std::size_t i = 0; i < tensor.size(); ++i) tensor[i] = static_cast<float>(i % 97);
  TensorMapSpec spec;
  spec.data = tensor.data();
  spec.element_bytes = 4;
  spec.extents[0] = 32;
  spec.extents[1] = kRows;
  spec.strides[1] = 48 * 4;
  spec.box[0] = 32;
  spec.box[1] = 16;
  const TensorMap map = make_tensor_map(spec);
  std::vector<float> want(32), got(32);
  for (std::size_t column = 0; column < 32; ++column) {
    for (std::size_t row = 0; row < kRows; ++row) {
      want[column] += tensor[row * 48 + column] * static_cast<float>(row / 16 + 1);
    }
  }
  const std::size_t bytes = 2 * 16 * 128 + 32;
  for (const bool is_late : {false, true}) {
    for (const bool reverse : {false, true}) {
      const emulator::WithOptions with(
          is_late ? late(reverse) : emulator::Options{false, emulator::BlockOrder::kAscending, reverse, 1});
      launch(1, 64, bytes, nullptr, stream_boxes, map, 5u, got.data(), false, false);
      EXPECT_EQ(got, want);
    }
  }
  const emulator::WithOptions with(late());
  launch(1, 64, bytes, nullptr, stream_boxes, map, 2u, got.data(), true, true);
  EXPECT_TRUE(std::isnan(got[0])) << "without a wait the copy has not landed";
}

TEST(Ptx, AnEarlyOverwriteShows) {
  std::vector<float> tensor(16 * 4 * 32);
  for (std::size_t i = 0; i < tensor.size(); ++i) tensor[i] = static_cast<float>(i);
  TensorMapSpec spec;
  spec.data = tensor.data();
  spec.element_bytes = 4;
  spec.extents[0] = spec.box[0] = 32;
  spec.extents[1] = 64;
  spec.strides[1] = 128;
  spec.box[1] = 16;
  std::vector<float> right(32), wrong(32);
  const std::size_t bytes = 2 * 16 * 128 + 32;
  launch(1, 64, bytes, nullptr, stream_boxes, make_tensor_map(spec), 4u, right.data(), false, false);
  // The producer runs ahead of the consumers: their second stage holds the fourth box when they come to it.
  const emulator::WithOptions with({false, emulator::BlockOrder::kAscending, true, 1});
  EXPECT_NO_THROW(launch(1, 64, bytes, nullptr, stream_boxes, make_tensor_map(spec), 4u, right.data(), false, false));
  try {
    launch(1, 64, bytes, nullptr, stream_boxes, make_tensor_map(spec), 4u, wrong.data(), false, true);
    EXPECT_NE(right, wrong);
  } catch (const emulator::Fault&) {  // or its barriers end in a deadlock
  }
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

TEST(Ptx, CopiesOfAThread) {
  alignas(16) float from[256];
  float to[256];
  for (int i = 0; i < 256; ++i) from[i] = static_cast<float>(i + 1);
  for (const bool is_late : {false, true}) {
    const emulator::WithOptions with(is_late ? late() : emulator::Options{});
    launch(1, 32, 1024, nullptr, copy_rows, from, to, 8u, true);
    for (int i = 0; i < 256; ++i) EXPECT_EQ(to[i], i < 128 && i % 4 >= 2 ? 0.0f : from[i]);
  }
  const emulator::WithOptions with(late());
  launch(1, 32, 1024, nullptr, copy_rows, from, to, 8u, false);
  EXPECT_TRUE(std::isnan(to[0]));
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

TEST(Ptx, BulkCopiesBothWaysAndArrivalsOfCopies) {
  alignas(16) float from[256], to[256];
  for (int i = 0; i < 256; ++i) from[i] = static_cast<float>(i + 1);
  for (const bool is_late : {false, true}) {
    const emulator::WithOptions with(is_late ? late() : emulator::Options{});
    launch(1, 256, 1024 + 16, nullptr, gather_and_store, from, to);
    for (int i = 0; i < 128; ++i) EXPECT_EQ(to[i], from[(31 - i / 4) * 4 + i % 4] * 2);
    for (int i = 128; i < 256; ++i) EXPECT_EQ(to[i], from[i] * 2);
  }
}

__global__ void wait_forever() {
  auto* barrier = reinterpret_cast<std::uint64_t*>(shared_memory());
  ptx::barrier_init(barrier, 2);
  ptx::arrive(barrier);
  ptx::wait(barrier, 1);  // the phase before the first has ended
  ptx::wait(barrier, 0);
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
__global__ void leave_with_a_copy_in_flight(const float* from) {
  auto* tile = reinterpret_cast<float*>(shared_memory());
  auto* barrier = reinterpret_cast<std::uint64_t*>(tile + 32);
  ptx::barrier_init(barrier, 1);
  ptx::arrive_expect_bytes(barrier, 128);
  ptx::bulk_load(tile, from, 128, barrier);
}

TEST(Ptx, BarriersAndFaults) {
  EXPECT_THROW(launch(1, 1, 64, nullptr, wait_forever), emulator::Fault);
  for (const bool reverse : {false, true}) {
    const emulator::WithOptions with({false, emulator::BlockOrder::kAscending, reverse, 1});
    int order[2] = {0, 0};
    launch(1, 64, 0, nullptr, named, order);
    EXPECT_EQ(order[1], 2);
  }
  alignas(16) float from[32] = {};
  EXPECT_NO_THROW(launch(1, 1, 256, nullptr, leave_with_a_copy_in_flight, from));
  const emulator::WithOptions with(late());
  EXPECT_THROW(launch(1, 1, 256, nullptr, leave_with_a_copy_in_flight, from), emulator::Fault);
  EXPECT_THROW(launch(1, 1, 128, nullptr, leave_with_a_copy_in_flight, from), emulator::Fault) << "out of range";
}

TEST(Ptx, MapsThatNoDeviceTakesAreRefused) {
  alignas(16) float data[64] = {};
  TensorMapSpec spec;
  spec.data = data;
  spec.element_bytes = 4;
  spec.extents[0] = spec.box[0] = 16;
  spec.extents[1] = spec.box[1] = 2;
  spec.strides[1] = 64;
  EXPECT_NO_THROW(make_tensor_map(spec));
  TensorMapSpec bad = spec;
  bad.data = data + 1;
  EXPECT_THROW(make_tensor_map(bad), Error);
  bad = spec;
  bad.strides[1] = 72;
  EXPECT_THROW(make_tensor_map(bad), Error);
  bad = spec;
  bad.box[0] = 64;
  EXPECT_THROW(make_tensor_map(bad), Error);
}

}  // namespace
}  // namespace msa::cuda
