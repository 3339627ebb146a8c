// SPDX-License-Identifier: Apache-2.0
// The emulator's threads, barriers and warp functions: that they do what the device does, and that what would hang or
// be undefined there is a Fault here.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <vector>

#include "src/cuda/device.cuh"

namespace msa::cuda {
namespace {

__global__ void write_ids(int* ids) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  ids[block * blockDim.x * blockDim.y * blockDim.z + thread] += static_cast<int>(block * 1000 + thread);
}

template <class T>
void expect_exact_widening() {
  for (unsigned bits = 0; bits < 256; ++bits) {
    const uint2 eights[2] = {
        {bits | (255 - bits) << 8 | (bits ^ 0x55u) << 16 | (bits ^ 0x80u) << 24, bits * 0x01010101u},
        {0x38383838u, bits}};
    uint4 wide[2];
    widen_eights<T>(wide, eights);
    std::uint8_t bytes[16];
    T got[16];
    std::memcpy(bytes, eights, sizeof(bytes));
    std::memcpy(got, wide, sizeof(got));
    for (int i = 0; i < 16; ++i) {
      const float want = to_float(Float8E4M3{bytes[i]});
      if (want != want) {
        EXPECT_NE(to_float(got[i]), to_float(got[i])) << bits;
      } else {
        EXPECT_EQ(__float_as_uint(to_float(got[i])), __float_as_uint(want)) << bits;
      }
    }
  }
}

TEST(Float8, WidensExactlyTo16Bits) {
  expect_exact_widening<BFloat16>();
  expect_exact_widening<Float16>();
}

TEST(Emulator, EveryThreadOfEveryBlockRunsOnceInAnyOrder) {
  for (const auto order :
       {emulator::BlockOrder::kAscending, emulator::BlockOrder::kDescending, emulator::BlockOrder::kShuffled}) {
    for (const bool reverse : {false, true}) {
      const emulator::WithOptions with({false, order, reverse, 3});
      std::vector<int> ids(24 * 24, 0);
      launch(dim3(2, 3, 4), dim3(4, 3, 2), 0, nullptr, write_ids, ids.data());
      for (int block = 0; block < 24; ++block) {
        for (int thread = 0; thread < 24; ++thread) EXPECT_EQ(ids[block * 24 + thread], block * 1000 + thread);
      }
    }
  }
}

__global__ void reverse_through_shared(int* data, bool with_barrier) {
  auto* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = data[threadIdx.x];
  if (with_barrier) __syncthreads();
  data[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

TEST(Emulator, SharedMemoryIsPoisonedAndBarriersOrderIt) {
  std::vector<int> data(256), want(256);
  std::iota(data.begin(), data.end(), 0);
  std::iota(want.rbegin(), want.rend(), 0);
  launch(1, 256, 1024, nullptr, reverse_through_shared, data.data(), true);
  EXPECT_EQ(data, want);
  launch(1, 256, 1024, nullptr, reverse_through_shared, data.data(), false);
  EXPECT_EQ(data[0], -1) << "a missing barrier shows as poison";
}

__global__ void warp_functions(int* out, float* sums) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int value = static_cast<int>(threadIdx.x) * 10;
  int* row = out + threadIdx.x * 8;
  row[0] = __shfl_sync(kFullMask, value, 5);
  row[1] = __shfl_xor_sync(kFullMask, value, 3);
  row[2] = __shfl_up_sync(kFullMask, value, 2);
  row[3] = __shfl_down_sync(kFullMask, value, 2);
  row[4] = static_cast<int>(__ballot_sync(kFullMask, lane % 3 == 0));
  // Two halves meet on their own, the second twice.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  row[5] = __shfl_xor_sync(half, value, 1);
  if (lane >= 16) row[5] += __shfl_xor_sync(half, value, 2);
  row[6] = __shfl_down_sync(kFullMask, value, 4, 8);
  row[7] = __reduce_max_sync(kFullMask, value) + __any_sync(kFullMask, lane == 7) + __all_sync(kFullMask, lane < 7);
  sums[threadIdx.x] = warp_sum(static_cast<float>(lane)) + 1000 * warp_max(static_cast<float>(lane));
}

TEST(Emulator, WarpFunctionsAsOnTheDevice) {
  for (const bool reverse : {false, true}) {
    const emulator::WithOptions with({false, emulator::BlockOrder::kAscending, reverse, 1});
    std::vector<int> out(64 * 8);
    std::vector<float> sums(64);
    launch(1, 64, 0, nullptr, warp_functions, out.data(), sums.data());
    unsigned thirds = 0;
    for (int lane = 0; lane < 32; lane += 3) thirds |= 1u << lane;
    for (int t = 0; t < 64; ++t) {
      const int lane = t % 32, base = t - lane;
      const int* row = out.data() + t * 8;
      EXPECT_EQ(row[0], (base + 5) * 10);
      EXPECT_EQ(row[1], (t ^ 3) * 10);
      EXPECT_EQ(row[2], (lane >= 2 ? t - 2 : t) * 10);
      EXPECT_EQ(row[3], (lane < 30 ? t + 2 : t) * 10);
      EXPECT_EQ(row[4], static_cast<int>(thirds));
      EXPECT_EQ(row[5], lane < 16 ? (t ^ 1) * 10 : (t ^ 1) * 10 + (t ^ 2) * 10);
      EXPECT_EQ(row[6], (lane % 8 < 4 ? t + 4 : t) * 10);
      EXPECT_EQ(row[7], (base + 31) * 10 + 1);
      EXPECT_EQ(sums[static_cast<std::size_t>(t)], 496 + 31000);
    }
  }
}

__global__ void half_a_mask() {
  if (threadIdx.x < 16) __syncwarp();
}
__global__ void two_masks() { __syncwarp(threadIdx.x % 32 < 16 ? 0x0001ffffu : 0xffff0000u); }
__global__ void two_functions() {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    (void)__ballot_sync(kFullMask, 1);
  }
}
__global__ void throws() {
  __syncthreads();
  if (threadIdx.x == 3) throw Error("thread 3");
}

TEST(Emulator, WhatIsUndefinedOnTheDeviceIsAFault) {
  EXPECT_THROW(launch(1, 32, 0, nullptr, half_a_mask), emulator::Fault);
  EXPECT_THROW(launch(1, 32, 0, nullptr, two_masks), emulator::Fault);
  EXPECT_THROW(launch(1, 32, 0, nullptr, two_functions), emulator::Fault);
  EXPECT_THROW(launch(1, 32, 0, nullptr, throws), Error);
  EXPECT_THROW(launch(1, 2048, 0, nullptr, half_a_mask), emulator::Fault);
}

__global__ void count_up(int* counter, int* old) { old[threadIdx.x] = atomicAdd(counter, 2); }
__global__ void leave_early(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = __syncthreads_or(threadIdx.x == 11) * 7;
}

TEST(Emulator, AtomicsAndThreadsThatHaveLeft) {
  int counter = 5;
  std::vector<int> old(64);
  launch(1, 64, 0, nullptr, count_up, &counter, old.data());
  EXPECT_EQ(counter, 5 + 128);
  std::vector<int> out(64, 1);
  launch(1, 64, 0, nullptr, leave_early, out.data());
  for (std::size_t t = 0; t < 64; ++t) EXPECT_EQ(out[t], t < 40 ? 7 : 1);
}

}  // namespace
}  // namespace msa::cuda
