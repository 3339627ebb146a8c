// SPDX-License-Identifier: Apache-2.0
// Cases of matrix products: every type, operand layout and swizzle, A from registers, register quotas; and how many
// bits a product keeps while it adds up. Part of ptx_cases.cuh.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "src/cuda/ptx.cuh"
#include "tests/cuda/ptx_case.h"

namespace msa::cuda::ptx_cases {

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
  std::conditional_t<std::is_same_v<T, Int8>, std::int32_t, float> sums[N / 2];
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
    } else if constexpr (std::is_same_v<T, Int8>) {
      ptx::wgmma_int8(sums, of_a[step], of_b[step], step > 0);
    } else {
      ptx::wgmma<N, T, kMajorA, kMajorB>(sums, of_a[step], of_b[step], step > 0);
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
  name += std::is_same_v<T, Int8> ? "int8" : sizeof(T) == 1 ? "e4m3" : std::is_same_v<T, BFloat16> ? "bf16" : "fp16";
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
