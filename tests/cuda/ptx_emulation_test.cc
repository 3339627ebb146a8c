// SPDX-License-Identifier: Apache-2.0
// What the emulator believes of barriers, copies and matrix products: the cases of ptx_cases.cuh, of which a device is
// asked the same (ptx_test.cu), and that it notices what must not be done.
#include <gtest/gtest.h>

#include <vector>

#include "tests/cuda/ptx_cases.cuh"

namespace msa::cuda {
namespace {

using namespace ptx_cases;

emulator::Options late(bool reverse = false) {
  return {true, emulator::BlockOrder::kAscending, reverse, reverse ? 5u : 4u};
}
emulator::Options immediate(bool reverse = false) { return {false, emulator::BlockOrder::kAscending, reverse, 1}; }

TEST(Ptx, EveryCaseInEveryOrder) {
  for (const emulator::Options& options : {immediate(), immediate(true), late(), late(true)}) {
    const emulator::WithOptions with(options);
    visit_cases([](const std::string& name, const Case& run) {
      const Outcome outcome = run();
      EXPECT_GT(outcome.want.size(), 0U) << name;
      EXPECT_EQ(count_wrong(outcome), 0U) << name;
    });
  }
}

TEST(Ptx, WrongValuesAreCounted) {
  EXPECT_EQ(count_wrong({{1, 2, NAN}, {1, 3, 4}, 0}), 2U);
  EXPECT_EQ(count_wrong({{1}, {1, 2}, 0}), 3U) << "another number of values";
  EXPECT_EQ(count_wrong({{std::nextafter(1.0f, 2.0f), 1.1f}, {1, 1}, 2}), 1U);
}

TEST(Ptx, AccumulatorsAreFloats) {
  EXPECT_EQ(bits_kept<BFloat16>(false, 30), 23);
  EXPECT_EQ(bits_kept<BFloat16>(true, 30), 23);
  EXPECT_EQ(bits_kept<Float8E4M3>(false, 18), 18) << "a device keeps fewer; ptx_test.cu prints how many";
}

TEST(Ptx, WithoutAWaitTheCopyHasNotLanded) {
  const emulator::WithOptions with(late());
  const BoxTensor tensor;
  const Array<float> sums(32), to(256), from(counting(256));
  launch(1, 64, BoxTensor::kShared, nullptr, stream_boxes, tensor.map, 2u, sums.data(), true, true);
  EXPECT_TRUE(std::isnan(sums.values()[0]));
  launch(1, 32, 1024, nullptr, copy_rows, from.data(), to.data(), 8u, false);
  EXPECT_TRUE(std::isnan(to.values()[0]));
}

TEST(Ptx, AnEarlyOverwriteShows) {
  const BoxTensor tensor;
  const Array<float> right(32), wrong(32);
  launch(1, 64, BoxTensor::kShared, nullptr, stream_boxes, tensor.map, 4u, right.data(), false, false);
  // The producer runs ahead of the consumers: their second stage holds the fourth box when they come to it.
  const emulator::WithOptions with(immediate(true));
  EXPECT_NO_THROW(launch(1, 64, BoxTensor::kShared, nullptr, stream_boxes, tensor.map, 4u, right.data(), false, false));
  try {
    launch(1, 64, BoxTensor::kShared, nullptr, stream_boxes, tensor.map, 4u, wrong.data(), false, true);
    EXPECT_NE(right.values(), wrong.values());
  } catch (const emulator::Fault&) {  // or its barriers end in a deadlock
  }
}

__global__ void wait_forever() {
  auto* barrier = reinterpret_cast<std::uint64_t*>(shared_memory());
  ptx::barrier_init(barrier, 2);
  ptx::arrive(barrier);
  ptx::wait(barrier, 1);  // the phase before the first has ended
  ptx::wait(barrier, 0);
}
__global__ void leave_with_a_copy_in_flight(const float* from) {
  auto* tile = reinterpret_cast<float*>(shared_memory());
  auto* barrier = reinterpret_cast<std::uint64_t*>(tile + 32);
  ptx::barrier_init(barrier, 1);
  ptx::arrive_expect_bytes(barrier, 128);
  ptx::bulk_load(tile, from, 128, barrier);
}

TEST(Ptx, FaultsAreNoticed) {
  EXPECT_THROW(launch(1, 1, 64, nullptr, wait_forever), emulator::Fault);
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
