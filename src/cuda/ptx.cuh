// SPDX-License-Identifier: Apache-2.0
// The Hopper instructions that C++ has no name for, and the only inline PTX of the library: barriers in shared memory,
// asynchronous copies, warpgroup matrix products, register quotas, dependent launches. Thin functions; each says what
// layout it expects. Under MSA_CUDA_EMULATION the same functions come from tests/cuda/emulator/ptx.h. Tested in
// tests/cuda/ptx_emulation_test.cc and, on a device, tests/cuda/ptx_test.cu.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "src/cuda/device.cuh"
#include "src/cuda/tensor_map.cuh"

// The contracts
// ---------------------------------------------------------------------------------------------------------
//
// Barriers. `barrier` is a std::uint64_t in shared memory, initialised by one thread with the number of arrivals that
// end a phase, followed by fence_barrier_init() and a __syncthreads. A phase ends when all arrivals came and all bytes
// announced by expect_bytes have landed. wait(barrier, parity) returns when the phase of that parity has ended: the
// first phase has parity 0, so wait(barrier, 1) on a fresh barrier returns at once.
//
// Matrix products (wgmma). A warpgroup, four warps from a warp number divisible by 4, computes D[64, N] += A[64, K]
// B[K, N], K = 16 for BFloat16 and Float16, 32 for Float8E4M3, D in float; K = 32 for Int8, D in int32, exact. Element (row, column) of D:
//   row = 16 * warp + lane / 4 + 8 * h,  column = 8 * j + 2 * (lane % 4) + i   lies in   d[4 * j + 2 * h + i].
// A in registers, 16-bit types: a[r] holds the columns 2 * (lane % 4) + 8 * (r / 2) and the next one, of row
// 16 * warp + lane / 4 + 8 * (r % 2). So the D of one product, packed in pairs, is the A of the next: k step s takes
// the d of columns 16 s ..: a = {d[8s], d[8s+1]}, {d[8s+2], d[8s+3]}, {d[8s+4], d[8s+5]}, {d[8s+6], d[8s+7]}.
// Operands in shared memory are named by a descriptor (matrix_descriptor below).
//   order: wgmma_fence; wgmma...; wgmma_commit; wgmma_wait<n>: all but the n newest groups are done. Registers of D and
//   A may not be touched, nor operands overwritten, between the issue and the wait.
// Shared memory that ordinary stores wrote needs fence_proxy_async() by the writer, then a barrier, before a matrix
// product or a bulk copy reads it.

namespace msa::cuda::ptx {

/// How an operand lies: kInner, K contiguous ([rows of A or columns of B][K]); kOuter, K rows of contiguous M or N.
enum class Major : int { kInner = 0, kOuter = 1 };

}  // namespace msa::cuda::ptx

#if defined(MSA_CUDA_EMULATION)
#include "tests/cuda/emulator/ptx.h"
#else

namespace msa::cuda::ptx {

/// Address of `pointer` within the shared memory window.
__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Barriers
// --------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
/// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/// Announces `bytes` that copies will bring, and arrives.
__device__ __forceinline__ void arrive_expect_bytes(std::uint64_t* barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
/// Announces `bytes` without arriving.
__device__ __forceinline__ void expect_bytes(std::uint64_t* barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void wait(std::uint64_t* barrier, std::uint32_t parity) {
  std::uint32_t done = 0;
  do {  // try_wait sleeps in hardware for a while before it says no
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (done == 0);
}

/// Barrier `id` (1 to 15; 0 is __syncthreads') over `threads` threads, a multiple of 32.
__device__ __forceinline__ void named_sync(std::uint32_t id, std::uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// Arrives at it without waiting.
__device__ __forceinline__ void named_arrive(std::uint32_t id, std::uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Orders this thread's ordinary accesses to shared memory before later ones of matrix products and bulk copies.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies
// ----------------------------------------------------------------------------------------------------------------

/// 16 bytes from global to shared memory by this thread: `valid` (0 to 16) of them, zeros behind. Both 16-byte aligned;
/// with valid 0 the source is not read.
__device__ __forceinline__ void copy_16(void* shared, const void* global, std::uint32_t valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// All but the kPending newest groups of this thread are done.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
/// One arrival at `barrier` when all copies that this thread issued so far are done; counts among the arrivals that
/// barrier_init announced.
__device__ __forceinline__ void copy_arrive(std::uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/// `bytes` (multiple of 16, both sides 16-byte aligned) from global to shared memory by the copy engine; they count at
/// `barrier`. One thread calls.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, std::uint32_t bytes,
                                          std::uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
/// The other way, in this thread's bulk groups. What ordinary stores wrote needs fence_proxy_async() first.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// The shared memory of all but the kPending newest bulk groups of this thread has been read.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<std::uint64_t>(&map)) : "memory");
}

/// One box of a tensor map, at coordinates (contiguous dimension first), to `shared` (128-byte aligned; the swizzle is
/// a function of the shared address). Elements outside the tensor come as zeros and count among the box's bytes.
__device__ __forceinline__ void tensor_load(void* shared, const TensorMap& map, std::uint64_t* barrier, std::int32_t c0,
                                            std::int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(reinterpret_cast<std::uint64_t>(&map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}
__device__ __forceinline__ void tensor_load(void* shared, const TensorMap& map, std::uint64_t* barrier, std::int32_t c0,
                                            std::int32_t c1, std::int32_t c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(reinterpret_cast<std::uint64_t>(&map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
__device__ __forceinline__ void tensor_load(void* shared, const TensorMap& map, std::uint64_t* barrier, std::int32_t c0,
                                            std::int32_t c1, std::int32_t c2, std::int32_t c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<std::uint64_t>(&map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Matrix products
// -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving accesses to an accumulator across this point: before wgmma_fence and after a wait.
template <int kCount>
__device__ __forceinline__ void fence_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void fence_registers(std::int32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Operand lists of the accumulators: N / 2 registers a thread, named in the text and bound to d[].
#define MSA_TEXT_8 "%0, %1, %2, %3"
#define MSA_TEXT_16 \
  MSA_TEXT_8        \
  ", %4, %5, %6, %7"
#define MSA_TEXT_32 \
  MSA_TEXT_16       \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MSA_TEXT_64 \
  MSA_TEXT_32       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MSA_TEXT_128                                                                 \
  MSA_TEXT_64                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MSA_TEXT_256                                                                             \
  MSA_TEXT_128                                                                                   \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MSA_BIND_4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define MSA_BIND_8(i) MSA_BIND_4(i), MSA_BIND_4((i) + 4)
#define MSA_BIND_16(i) MSA_BIND_8(i), MSA_BIND_8((i) + 8)
#define MSA_BIND_32(i) MSA_BIND_16(i), MSA_BIND_16((i) + 16)
#define MSA_BIND_64(i) MSA_BIND_32(i), MSA_BIND_32((i) + 32)
#define MSA_BIND_128(i) MSA_BIND_64(i), MSA_BIND_64((i) + 64)

template <int N>
struct Product;

// P0.. are the numbers of the operands behind the accumulator's. Only 16-bit types can have an outer-major operand.
#define MSA_PRODUCT(N, COUNT, P0, P1, P2, P3, P4, P5, P6)                                                             \
  template <>                                                                                                         \
  struct Product<N> {                                                                                                 \
    template <class T, int kOuterA, int kOuterB>                                                                      \
    __device__ __forceinline__ static void shared(float (&d)[COUNT], std::uint64_t a, std::uint64_t b,                \
                                                  int accumulate) {                                                   \
      if constexpr (std::is_same_v<T, BFloat16>) {                                                                    \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P2                                                          \
                     ", 0;\n"                                                                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" MSA_TEXT_##N                        \
                     "}, %" P0 ", %" P1 ", p, 1, 1, %" P3 ", %" P4 ";\n}\n"                                           \
                     : MSA_BIND_##COUNT(0)                                                                            \
                     : "l"(a), "l"(b), "r"(accumulate), "n"(kOuterA), "n"(kOuterB));                                  \
      } else if constexpr (std::is_same_v<T, Float16>) {                                                              \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P2                                                          \
                     ", 0;\n"                                                                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" MSA_TEXT_##N                          \
                     "}, %" P0 ", %" P1 ", p, 1, 1, %" P3 ", %" P4 ";\n}\n"                                           \
                     : MSA_BIND_##COUNT(0)                                                                            \
                     : "l"(a), "l"(b), "r"(accumulate), "n"(kOuterA), "n"(kOuterB));                                  \
      } else {                                                                                                        \
        static_assert(std::is_same_v<T, Float8E4M3> && kOuterA == 0 && kOuterB == 0);                                 \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P2                                                          \
                     ", 0;\n"                                                                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" MSA_TEXT_##N "}, %" P0 ", %" P1     \
                                                                                               ", p, 1, 1;\n}\n"      \
                     : MSA_BIND_##COUNT(0)                                                                            \
                     : "l"(a), "l"(b), "r"(accumulate));                                                              \
      }                                                                                                               \
    }                                                                                                                 \
    template <class T, int kOuterB>                                                                                   \
    __device__ __forceinline__ static void registers(float (&d)[COUNT], const std::uint32_t (&a)[4], std::uint64_t b, \
                                                     int accumulate) {                                                \
      if constexpr (std::is_same_v<T, BFloat16>) {                                                                    \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P5                                                          \
                     ", 0;\n"                                                                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" MSA_TEXT_##N                        \
                     "}, {%" P0 ", %" P1 ", %" P2 ", %" P3 "}, %" P4 ", p, 1, 1, %" P6 ";\n}\n"                       \
                     : MSA_BIND_##COUNT(0)                                                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kOuterB));            \
      } else {                                                                                                        \
        static_assert(std::is_same_v<T, Float16>);                                                                    \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P5                                                          \
                     ", 0;\n"                                                                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" MSA_TEXT_##N                          \
                     "}, {%" P0 ", %" P1 ", %" P2 ", %" P3 "}, %" P4 ", p, 1, 1, %" P6 ";\n}\n"                       \
                     : MSA_BIND_##COUNT(0)                                                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kOuterB));            \
      }                                                                                                               \
    }                                                                                                                 \
  };
MSA_PRODUCT(8, 4, "4", "5", "6", "7", "8", "9", "10")
MSA_PRODUCT(16, 8, "8", "9", "10", "11", "12", "13", "14")
MSA_PRODUCT(32, 16, "16", "17", "18", "19", "20", "21", "22")
MSA_PRODUCT(64, 32, "32", "33", "34", "35", "36", "37", "38")
MSA_PRODUCT(128, 64, "64", "65", "66", "67", "68", "69", "70")
MSA_PRODUCT(256, 128, "128", "129", "130", "131", "132", "133", "134")
#undef MSA_PRODUCT

#define MSA_INT_4(i) "+r"(d[i]), "+r"(d[(i) + 1]), "+r"(d[(i) + 2]), "+r"(d[(i) + 3])
#define MSA_INT_16(i) MSA_INT_4(i), MSA_INT_4((i) + 4), MSA_INT_4((i) + 8), MSA_INT_4((i) + 12)
#define MSA_INT_64(i) MSA_INT_16(i), MSA_INT_16((i) + 16), MSA_INT_16((i) + 32), MSA_INT_16((i) + 48)
/// D[64, 128] = A B of Int8, or += when `accumulate`; A and B by descriptors, both inner major.
__device__ __forceinline__ void wgmma_int8(std::int32_t (&d)[64], std::uint64_t a, std::uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" MSA_TEXT_128 "}, %64, %65, p;\n}\n"
      : MSA_INT_64(0)
      : "l"(a), "l"(b), "r"(accumulate ? 1 : 0));
}
#undef MSA_INT_4
#undef MSA_INT_16
#undef MSA_INT_64
#undef MSA_TEXT_8
#undef MSA_TEXT_16
#undef MSA_TEXT_32
#undef MSA_TEXT_64
#undef MSA_TEXT_128
#undef MSA_TEXT_256
#undef MSA_BIND_4
#undef MSA_BIND_8
#undef MSA_BIND_16
#undef MSA_BIND_32
#undef MSA_BIND_64
#undef MSA_BIND_128

/// D[64, N] = A B, or += when `accumulate`; A and B by descriptors. N in {8, 16, 32, 64, 128, 256}.
template <int N, class T, Major kMajorA = Major::kInner, Major kMajorB = Major::kInner>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool accumulate) {
  Product<N>::template shared<T, static_cast<int>(kMajorA), static_cast<int>(kMajorB)>(d, a, b, accumulate ? 1 : 0);
}
/// The same with A in registers, 16-bit types.
template <int N, class T, Major kMajorB = Major::kInner>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t b,
                                      bool accumulate) {
  Product<N>::template registers<T, static_cast<int>(kMajorB)>(d, a, b, accumulate ? 1 : 0);
}

// Control
// ---------------------------------------------------------------------------------------------------------------

/// Raises or lowers the registers a thread of this warpgroup may use (24 to 256, a multiple of 8). Every warp of the
/// warpgroup calls it, and the kernel has __launch_bounds__(threads, 1).
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Waits until the kernel before this one on the stream is done and its writes are visible (launch_dependent).
__device__ __forceinline__ void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
/// Lets the kernel behind this one start; it still waits for this one's end before it reads.
__device__ __forceinline__ void griddepcontrol_launch() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/// 2^x to 2 ulp, subnormal results flushed to zero; -inf gives 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace msa::cuda::ptx

#endif

namespace msa::cuda::ptx {

/// Names an operand in shared memory. Inner major, swizzled: rows of the swizzle's width (128, 64 or 32 bytes) in
/// groups of eight that lie `stride` bytes apart (`leading` is ignored); stepping K is adding bytes to the start. Outer
/// major, swizzled: rows of K, each 128 (64, 32) bytes of M or N, in groups of eight that lie `stride` apart; the next
/// 64 (32, 16) elements of M or N lie `leading` further on. Not swizzled: 8 x 16-byte bricks of 128 contiguous bytes;
/// inner major, neighbours in K are `leading` apart and in M or N `stride`; outer major, in K `leading`, in M or N
/// `stride`. The group of eight rows that `start` is in must begin at a multiple of eight rows' bytes.
__device__ __forceinline__ std::uint64_t matrix_descriptor(const void* start, std::uint32_t leading,
                                                           std::uint32_t stride, Swizzle swizzle) {
  return static_cast<std::uint64_t>((shared_address(start) & 0x3ffffu) >> 4) |
         static_cast<std::uint64_t>((leading & 0x3ffffu) >> 4) << 16 |
         static_cast<std::uint64_t>((stride & 0x3ffffu) >> 4) << 32 |
         static_cast<std::uint64_t>(static_cast<std::uint32_t>(swizzle)) << 62;
}
/// The same operand `bytes` (a multiple of 16) further on.
__device__ __forceinline__ std::uint64_t advance(std::uint64_t descriptor, std::uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace msa::cuda::ptx
