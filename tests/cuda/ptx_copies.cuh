// SPDX-License-Identifier: Apache-2.0
// Cases of copies and barriers: boxes of tensors, swizzled, at odd rows, through a pipeline; copies of a thread; bulk
// copies; barriers of shared memory and named ones; dependent launches. Part of ptx_cases.cuh.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/cuda/ptx.cuh"
#include "tests/cuda/ptx_case.h"

namespace msa::cuda::ptx_cases {

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

}  // namespace msa::cuda::ptx_cases
