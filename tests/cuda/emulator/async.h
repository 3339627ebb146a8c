// SPDX-License-Identifier: Apache-2.0
// The emulator's asynchronous operations: barriers in shared memory, copies, matrix products. ptx.h puts the names of
// src/cuda/ptx.cuh on them; the scheduler drives them. With Options::late_async they happen as late as a wait allows.
// Tested in tests/cuda/ptx_emulation_test.cc.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "src/cuda/tensor_map.cuh"

namespace msa::cuda::emulator {

// For the scheduler.
/// Forgets everything in flight; a block of `threads` threads starts.
void reset_async(unsigned threads);
/// Does one copy that is in flight. False: there is none.
bool complete_one_copy();
/// Throws Fault when the block ended with something in flight that could still write to its memory.
void check_async_done();

void barrier_init(std::uint64_t* barrier, std::uint32_t arrivals);
void barrier_arrive(std::uint64_t* barrier, std::uint32_t expected_bytes);
void barrier_expect(std::uint64_t* barrier, std::uint32_t bytes);
void barrier_wait(std::uint64_t* barrier, std::uint32_t parity);

void thread_copy(void* shared, const void* global, std::uint32_t valid);
void thread_copy_commit();
void thread_copy_wait(unsigned pending);
void thread_copy_arrive(std::uint64_t* barrier);

void bulk_load(void* shared, const void* global, std::uint32_t bytes, std::uint64_t* barrier);
void bulk_store(void* global, const void* shared, std::uint32_t bytes);
void bulk_commit();
void bulk_wait_read(unsigned pending);
void tensor_load(void* shared, const TensorMap& map, std::uint64_t* barrier, std::initializer_list<std::int32_t> at);

enum class ProductType { kBFloat16, kFloat16, kFloat8, kInt8 };
/// One wgmma. The lanes of a warp must agree on it; the four warps of a warpgroup do their 16 rows each on their own.
struct Product {
  ProductType type = ProductType::kBFloat16;
  int columns = 8;
  std::uint64_t a = 0, b = 0;  ///< descriptors; a unused with A in registers
  bool outer_a = false, outer_b = false;
  bool accumulate = false;
  bool operator==(const Product&) const = default;
};
/// `d`, float or for kInt8 int32, and `a` are the caller's registers, which must live until the wait. a null: A in
/// shared memory.
void product_issue(const Product& product, void* d, const std::uint32_t* a);
void product_commit();
void product_wait(unsigned pending);

}  // namespace msa::cuda::emulator
