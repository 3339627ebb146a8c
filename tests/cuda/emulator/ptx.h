// SPDX-License-Identifier: Apache-2.0
// The functions of src/cuda/ptx.cuh on the emulator; what they do is said there. Included by it alone.
#pragma once

#include <type_traits>

#include "src/cuda/device.cuh"
#include "src/cuda/tensor_map.cuh"
#include "tests/cuda/emulator/async.h"

namespace msa::cuda::ptx {

inline std::uint32_t shared_address(const void* pointer) {
  emulator::check_shared(pointer, 1, "shared_address");
  return static_cast<std::uint32_t>(static_cast<const std::byte*>(pointer) - emulator::dynamic_shared());
}

inline void barrier_init(std::uint64_t* barrier, std::uint32_t arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() {}
inline void arrive(std::uint64_t* barrier) { emulator::barrier_arrive(barrier, 0); }
inline void arrive_expect_bytes(std::uint64_t* barrier, std::uint32_t bytes) {
  emulator::barrier_arrive(barrier, bytes);
}
inline void expect_bytes(std::uint64_t* barrier, std::uint32_t bytes) { emulator::barrier_expect(barrier, bytes); }
inline void wait(std::uint64_t* barrier, std::uint32_t parity) { emulator::barrier_wait(barrier, parity); }

inline void named_sync(std::uint32_t id, std::uint32_t threads) { emulator::named_barrier_sync(id, threads); }
inline void named_arrive(std::uint32_t id, std::uint32_t threads) { emulator::named_barrier_arrive(id, threads); }
inline void fence_proxy_async() {}

inline void copy_16(void* shared, const void* global, std::uint32_t valid = 16) {
  emulator::thread_copy(shared, global, valid);
}
inline void copy_commit() { emulator::thread_copy_commit(); }
template <int kPending>
void copy_wait() {
  emulator::thread_copy_wait(kPending);
}
inline void copy_arrive(std::uint64_t* barrier) { emulator::thread_copy_arrive(barrier); }
inline void bulk_load(void* shared, const void* global, std::uint32_t bytes, std::uint64_t* barrier) {
  emulator::bulk_load(shared, global, bytes, barrier);
}
inline void bulk_store(void* global, const void* shared, std::uint32_t bytes) {
  emulator::bulk_store(global, shared, bytes);
}
inline void bulk_commit() { emulator::bulk_commit(); }
template <int kPending>
void bulk_wait_read() {
  emulator::bulk_wait_read(kPending);
}
inline void prefetch(const TensorMap&) {}
inline void tensor_load(void* shared, const TensorMap& map, std::uint64_t* barrier, std::int32_t c0, std::int32_t c1) {
  emulator::tensor_load(shared, map, barrier, {c0, c1});
}
inline void tensor_load(void* shared, const TensorMap& map, std::uint64_t* barrier, std::int32_t c0, std::int32_t c1,
                        std::int32_t c2) {
  emulator::tensor_load(shared, map, barrier, {c0, c1, c2});
}
inline void tensor_load(void* shared, const TensorMap& map, std::uint64_t* barrier, std::int32_t c0, std::int32_t c1,
                        std::int32_t c2, std::int32_t c3) {
  emulator::tensor_load(shared, map, barrier, {c0, c1, c2, c3});
}

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::product_commit(); }
template <int kPending>
void wgmma_wait() {
  emulator::product_wait(kPending);
}
template <class T, int kCount>
void fence_registers(T (&)[kCount]) {}

template <class T>
constexpr emulator::ProductType product_type() {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return emulator::ProductType::kBFloat16;
  } else if constexpr (std::is_same_v<T, Float16>) {
    return emulator::ProductType::kFloat16;
  } else {
    static_assert(std::is_same_v<T, Float8E4M3>);
    return emulator::ProductType::kFloat8;
  }
}

template <int N, class T, Major kMajorA = Major::kInner, Major kMajorB = Major::kInner>
void wgmma(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool accumulate) {
  static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
  static_assert(!std::is_same_v<T, Float8E4M3> || (kMajorA == Major::kInner && kMajorB == Major::kInner));
  emulator::Product product;
  product.type = product_type<T>();
  product.columns = N;
  product.a = a;
  product.b = b;
  product.outer_a = kMajorA == Major::kOuter;
  product.outer_b = kMajorB == Major::kOuter;
  product.accumulate = accumulate;
  emulator::product_issue(product, d, nullptr);
}
template <int N, class T, Major kMajorB = Major::kInner>
void wgmma(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
  static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
  static_assert(!std::is_same_v<T, Float8E4M3>);
  emulator::Product product;
  product.type = product_type<T>();
  product.columns = N;
  product.b = b;
  product.outer_b = kMajorB == Major::kOuter;
  product.accumulate = accumulate;
  emulator::product_issue(product, d, a);
}

inline void wgmma_int8(std::int32_t (&d)[64], std::uint64_t a, std::uint64_t b, bool accumulate) {
  emulator::Product product;
  product.type = emulator::ProductType::kInt8;
  product.columns = 128;
  product.a = a;
  product.b = b;
  product.accumulate = accumulate;
  emulator::product_issue(product, d, nullptr);
}

template <int kRegisters>
void raise_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void lower_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
inline void griddepcontrol_wait() {}
inline void griddepcontrol_launch() {}
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}

}  // namespace msa::cuda::ptx
