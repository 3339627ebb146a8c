// SPDX-License-Identifier: Apache-2.0
// Block selection with float8 index keys beside 16-bit queries. Widening is exact, and what is multiplied then is what
// select_blocks.cuh multiplies, by the same chain: the bits are those of keys that were widened before. Few rows:
// score_narrow_keys reads the float8 keys once, at the speed of memory, and widens a tile on the multiprocessor before
// it multiplies. Many rows: widen_keys makes a copy, which all of them share. docs/cuda-select-blocks.md counts cycles.
// Tested in tests/cuda/select_blocks_test.cc.
#pragma once

#include "src/cuda/float8_tile.cuh"
#include "src/cuda/select_blocks.cuh"

namespace msa::cuda {

/// Keys [pages, page, kDim] by strides, packed ones as one page, to a contiguous copy. A thread eight numbers at a
/// time.
inline constexpr int kWidenThreads = 256;
template <class Element, int kDim>
__global__ void __launch_bounds__(kWidenThreads)
    widen_keys_kernel(const Strided<const Float8E4M3> keys, std::int64_t pages, std::int64_t page, Element* wide) {
  constexpr int kChunks = kDim / 8;
  const std::int64_t chunks = pages * page * kChunks;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kWidenThreads + threadIdx.x; i < chunks;
       i += std::int64_t{gridDim.x} * kWidenThreads) {
    const std::int64_t row = i / kChunks;
    const uint2 narrow[1] = {*reinterpret_cast<const uint2*>(keys.at(row / page, row % page, i % kChunks * 8))};
    uint4 eight[1];
    widen_eights<Element>(eight, narrow);
    *reinterpret_cast<uint4*>(wide + i * 8) = eight[0];
  }
}

/// Two warpgroups with the same 64 rows take tiles of keys in turn: one widens while the other's products run.
template <class Element, int kDim, int kBlock>
struct NarrowScoreKernel {
  static constexpr int kWarpgroups = 2;
  static constexpr int kThreads = kWarpgroups * 128 + kWarpSize;
  static constexpr int kTileKeys = static_cast<int>(kSelectTileKeys);
  static constexpr int kTileBlocks = kTileKeys / kBlock;
  static constexpr std::uint32_t kQueryBytes = 64 * kDim * 2;
  static constexpr std::uint32_t kWideBytes = kTileKeys * kDim * 2;
  static constexpr std::uint32_t kOwnBytes = kQueryBytes + kWideBytes;  ///< of a warpgroup
  static constexpr std::uint32_t kStageBytes = kTileKeys * kDim;
  /// 112 KiB on their way: 3.4 microseconds of a multiprocessor's share of 4.3 TB/s.
  static constexpr int kStages = kDim == 128 ? 7 : 14;
  static constexpr std::size_t kSharedBytes = kWarpgroups * kOwnBytes + kStages * kStageBytes + 2 * kStages * 8;
  static_assert(kSharedBytes <= 227 * 1024);
};

/// As score_blocks_kernel with few rows.
template <class Element, int kDim, int kBlock>
__global__ void __launch_bounds__(NarrowScoreKernel<Element, kDim, kBlock>::kThreads, 1)
    score_narrow_keys_kernel(const SelectArgs args, const Strided<const Element> q_idx,
                             const __grid_constant__ TensorMap keys) {
  using Shape = NarrowScoreKernel<Element, kDim, kBlock>;
  std::byte* const stages = shared_memory() + Shape::kWarpgroups * Shape::kOwnBytes;
  auto* const full = reinterpret_cast<std::uint64_t*>(stages + Shape::kStages * Shape::kStageBytes);
  std::uint64_t* const empty = full + Shape::kStages;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  if (thread == 0) init_ring(full, empty, Shape::kStages, Shape::kWarpgroups * 4);
  __syncthreads();
  ptx::griddepcontrol_wait();  // for the lists
  const std::int32_t items = *args.item_count;
  const auto step = static_cast<std::int32_t>(gridDim.x);
  RingPlace<Shape::kStages> ring;

  if (thread >= Shape::kWarpgroups * 128) {
    if (lane == 0) produce_key_tiles<Float8E4M3, kDim>(args, keys, stages, full, empty, ring, items);
    return;
  }

  const int warpgroup = thread / 128;
  const int row_of_thread = thread % 128 / kWarpSize * 16 + lane / 4;  // the other is 8 further on
  std::byte* const queries = shared_memory() + static_cast<std::uint32_t>(warpgroup) * Shape::kOwnBytes;
  std::byte* const wide = queries + Shape::kQueryBytes;
  const std::uint64_t query_operand = ptx::matrix_descriptor(queries, 0, 1024, Swizzle::k128);
  const std::uint64_t key_operand = ptx::matrix_descriptor(wide, 0, 1024, Swizzle::k128);
  const auto barrier = static_cast<std::uint32_t>(1 + warpgroup);

  for (auto i = static_cast<std::int32_t>(blockIdx.x); i < items; i += step) {
    const SelectWork work = read_item(args, i);
    const SelectTile& tile = work.tile;
    ptx::named_sync(barrier, 128);  // all products of the last item are done
    load_slabs<64, kDim * 2>(queries, thread % 128, query_rows(args, q_idx, tile, 0));
    const Diagonal<1> diagonal(args, tile, row_of_thread);

    for (std::int32_t t = work.begin; t < work.end; ++t, ring.next()) {
      // Both wait for every tile and release it: who ran a whole ring ahead or behind would mistake one phase of a
      // stage for another.
      ptx::wait(full + ring.stage, ring.parity);
      if ((t - work.begin) % Shape::kWarpgroups != warpgroup) {
        if (lane == 0) ptx::arrive(empty + ring.stage);
        continue;
      }
      widen_tile<Element, kDim, Shape::kTileKeys, 128, 8>(
          stages + static_cast<std::uint32_t>(ring.stage) * Shape::kStageBytes, wide,
          static_cast<std::uint32_t>(thread) % 128);
      ptx::fence_proxy_async();
      ptx::named_sync(barrier, 128);
      if (lane == 0) ptx::arrive(empty + ring.stage);
      float scores[64];
      multiply_slab<Element, kDim>(scores, query_operand, key_operand);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(scores);
      ptx::named_sync(barrier, 128);  // the wide tile may be written again
      diagonal.hide(scores, 0, t, lane);
      // Few rows: four bytes at a time do.
      const auto put = [&](RowPair<float> most, int b) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const std::int32_t row = row_of_thread + 8 * h;
          if (lane % 4 == b && row < tile.rows) {
            args.maxima[(tile.first_row + row) * args.maxima_stride + t * Shape::kTileBlocks + b] =
                h == 0 ? most.x : most.y;
          }
        }
      };
      put(block_maxima<0, kBlock>(scores), 0);
      if constexpr (kBlock == 64) put(block_maxima<8, kBlock>(scores), 1);
    }
  }
}

}  // namespace msa::cuda
