// SPDX-License-Identifier: Apache-2.0
// Exact screening of block selection on Hopper. Keys and queries are copied to int8, a scale a block and a row;
// products of the copies, exact in int32 and at twice the rate of bf16, give each block's maximum within a known error.
// The best blocks of a row by that measure, its leaders, are then scored exactly, by the same chain of products as
// without screening; whatever could reach the worst of them is scored exactly, too, and the rest is certainly out. What
// is not scored keeps an approximation below every chosen score, so that the ranking needs not know. Chunks that
// screening does not help are scored exactly from the start; the choice is made on the device.
// docs/cuda-select-blocks.md has the bound and the counts. Tested in tests/cuda/screen_blocks_test.cc.
#pragma once

#include "src/cuda/screen_blocks.h"
#include "src/cuda/select_blocks.cuh"

namespace msa::cuda {

/// With A, C of a row and E, N of a block, |score of the block - approximation| <= A E + C N. Infinite: not known.
struct alignas(16) KeyBound {
  float scale;
  float error;  ///< E: at least the norm of what rounding took from any key
  float norm;   ///< N: at least the norm of any key
  float unused;
};
struct alignas(16) RowBound {
  float scale;
  float copied;  ///< A: at least the norm of the copy
  float rest;    ///< C: at least the norm of what rounding took, and what products in the storage type round
  float unused;
};

struct ScreenState {
  unsigned long long doubts;  ///< blocks left in doubt by the last chunk that was screened ...
  unsigned long long rows;    ///< ... its rows, 0 when none was yet,
  unsigned long long blocks;  ///< and the blocks that its rows chose among
  std::int32_t use;           ///< 1: this chunk is screened
  std::int32_t screened_items;
  std::int32_t exact_items;
};

struct ScreenArgs {
  Int8* keys = nullptr;  ///< [blocks, block_size, index_dim], each block as it lies in shared memory
  KeyBound* key_bounds = nullptr;
  Int8* queries = nullptr;  ///< [chunk rows, index_dim]
  RowBound* row_bounds = nullptr;
  std::int32_t* leaders = nullptr;                ///< [chunk rows, topk]
  std::uint32_t* doubts[2] = {nullptr, nullptr};  ///< [key tiles, row_words]: leaders, and what could reach them
  ScreenState* state = nullptr;
  std::int32_t row_words = 0;
  std::int32_t blocks = 0;
  std::int32_t key_rows = 0;  ///< of packed keys
  std::int32_t always = 0;
};

// Copies
// --------------------------------------------------------------------------------------------------------------

/// Norms are raised by this: sums of 128 squares and a root round by less.
inline constexpr float kNormSlack = 1.0f + 0x1p-10f;
/// What the exact score may differ from the product of the numbers themselves, relative to the norms, is at most half
/// of this (see the page); the other half covers the rounding of bound and approximation.
inline constexpr float kChainSlack = 0x1p-13f;
/// Largest magnitudes outside this range (0 aside) are not bounded: within it nothing overflows and nothing is lost to
/// underflow. NaN and infinity are outside.
__device__ __forceinline__ bool is_bounded(float largest) {
  return largest == 0.0f || (largest >= 0x1p-40f && largest <= 0x1p40f);
}

template <class Element>
__device__ __forceinline__ float low_element(std::uint32_t pair) {
  return to_float(Element{static_cast<std::uint16_t>(pair & 0xffffu)});
}
template <class Element>
__device__ __forceinline__ float high_element(std::uint32_t pair) {
  return to_float(Element{static_cast<std::uint16_t>(pair >> 16)});
}
/// Bits of the larger magnitude of a pair, and of `most`: magnitudes order as their bits, NaN above all.
__device__ __forceinline__ std::uint32_t largest_bits(std::uint32_t most, std::uint32_t pair) {
  return max_of(most, max_of(pair & 0x7fffu, pair >> 16 & 0x7fffu));
}

/// One number's copy; adds the squares of the number, of what rounding took and, in integers, of the copy.
struct Rounding {
  float scale, inverse;
  float norm = 0.0f, error = 0.0f;
  std::int32_t copied = 0;

  __device__ __forceinline__ explicit Rounding(float largest)
      : scale(is_bounded(largest) ? largest / 127.0f : 0.0f), inverse(scale > 0.0f ? 127.0f / largest : 0.0f) {}
  __device__ __forceinline__ std::uint32_t round(float x) {
    const std::int32_t whole = __float2int_rn(x * inverse);
    const float rest = __fmaf_rn(-scale, static_cast<float>(whole), x);
    norm += x * x;
    error += rest * rest;
    copied += whole * whole;
    return static_cast<std::uint32_t>(whole) & 0xffu;
  }
  template <class Element>
  __device__ __forceinline__ std::uint32_t round_four(std::uint32_t first, std::uint32_t second) {
    const std::uint32_t a = round(low_element<Element>(first));
    const std::uint32_t b = round(high_element<Element>(first));
    const std::uint32_t c = round(low_element<Element>(second));
    return a | b << 8 | c << 16 | round(high_element<Element>(second)) << 24;
  }
};

/// Number of block b of sequence s, within the arrays whatever the sequence bounds say.
__device__ __forceinline__ std::int32_t block_number(const SelectArgs& args, const ScreenArgs& screen, std::int32_t s,
                                                     std::int32_t b) {
  const std::int32_t number = first_block(args.batch, s, args.block_size, args.page) + b;
  return max_of(0, min_of(number, screen.blocks - 2));  // a tile may begin there
}

/// A thread block a block of keys; those that no sequence has all of, which are never scored, become zeros. Read once:
/// 32 KiB lie in the registers between the search for the largest and the rounding.
template <class Element, int kDim, int kBlock>
__global__ void __launch_bounds__(128)
    quantise_keys_kernel(const SelectArgs args, const ScreenArgs screen, const KeyRowsView<const Element> k_idx) {
  constexpr int kChunks = kDim / 8;
  constexpr int kRowStep = 128 / kChunks;
  constexpr int kLoads = kBlock / kRowStep;
  constexpr Swizzle kSwizzle = kDim == 128 ? Swizzle::k128 : Swizzle::k64;
  __shared__ std::uint32_t most_of_warp[4];
  __shared__ float norm_of_warp[4], error_of_warp[4];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int chunk = thread % kChunks;
  if (args.batch.sequences == 0) return;
  for (auto number = static_cast<std::int32_t>(blockIdx.x); number < screen.blocks;
       number += static_cast<std::int32_t>(gridDim.x)) {
    const std::int32_t s = sequence_of_block(args.batch, number, kBlock, args.page);
    const std::int32_t b = number - first_block(args.batch, s, kBlock, args.page);
    const bool is_whole = b >= 0 && b < args.batch.keys(s) / kBlock;
    const std::int64_t first_key = is_whole ? k_idx.token(args.batch, s, b * kBlock) : -1;
    const std::int64_t tokens = args.page > 0 ? std::int64_t{args.pages} * args.page : screen.key_rows;
    const bool is_there = first_key >= 0 && first_key + kBlock <= tokens;
    const Element* const keys = is_there ? k_idx.row(args.batch, s, b * kBlock) : nullptr;

    uint4 data[kLoads];
    std::uint32_t most = 0;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int row = load * kRowStep + thread / kChunks;
      data[load] = {0, 0, 0, 0};
      if (is_there) data[load] = *reinterpret_cast<const uint4*>(keys + row * k_idx.token_stride + chunk * 8);
    }
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      most = largest_bits(largest_bits(most, data[load].x), data[load].y);
      most = largest_bits(largest_bits(most, data[load].z), data[load].w);
    }
    most = __reduce_max_sync(kFullMask, most);
    if (thread % kWarpSize == 0) most_of_warp[warp] = most;
    __syncthreads();
    for (int w = 0; w < 4; ++w) most = max_of(most, most_of_warp[w]);
    const float largest = low_element<Element>(most);

    float norm = 0.0f;
    float error = 0.0f;
    Int8* const copy = screen.keys + std::int64_t{number} * kBlock * kDim;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int row = load * kRowStep + thread / kChunks;
      Rounding rounding(largest);
      uint2 eight;
      eight.x = rounding.template round_four<Element>(data[load].x, data[load].y);
      eight.y = rounding.template round_four<Element>(data[load].z, data[load].w);
      *reinterpret_cast<uint2*>(copy + swizzled(static_cast<std::uint32_t>(row * kDim + chunk * 8), kSwizzle)) = eight;
#pragma unroll
      for (int bits = 1; bits < kChunks; bits *= 2) {
        rounding.norm += __shfl_xor_sync(kFullMask, rounding.norm, bits);
        rounding.error += __shfl_xor_sync(kFullMask, rounding.error, bits);
      }
      norm = fmaxf(norm, rounding.norm);
      error = fmaxf(error, rounding.error);
    }
    norm = warp_max(norm);
    error = warp_max(error);
    if (thread % kWarpSize == 0) {
      norm_of_warp[warp] = norm;
      error_of_warp[warp] = error;
    }
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < 4; ++w) {
        norm = fmaxf(norm, norm_of_warp[w]);
        error = fmaxf(error, error_of_warp[w]);
      }
      KeyBound bound{Rounding(largest).scale, sqrtf(error) * kNormSlack, sqrtf(norm) * kNormSlack, 0.0f};
      if (!is_there || !is_bounded(largest)) bound = {0.0f, infinity(), infinity(), 0.0f};
      screen.key_bounds[number] = bound;
    }
  }
}

/// A warp a row of the chunk.
inline constexpr int kQuantiseWarps = 8;
template <class Element, int kDim>
__global__ void __launch_bounds__(kQuantiseWarps* kWarpSize)
    quantise_queries_kernel(const SelectArgs args, const ScreenArgs screen, const Strided<const Element> q_idx) {
  constexpr int kPairs = kDim / 64;  // of elements, a lane
  ptx::griddepcontrol_wait();
  if (screen.state->use == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int32_t rows = args.queries * args.groups;
  for (std::int32_t r = static_cast<std::int32_t>(blockIdx.x) * kQuantiseWarps + warp; r < rows;
       r += static_cast<std::int32_t>(gridDim.x) * kQuantiseWarps) {
    const auto* const from =
        reinterpret_cast<const std::uint32_t*>(q_idx.at(args.first_query + r / args.groups, r % args.groups));
    std::uint32_t pairs[kPairs];
    std::uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      pairs[i] = from[i * kWarpSize + lane];
      most = largest_bits(most, pairs[i]);
    }
    const float largest = low_element<Element>(__reduce_max_sync(kFullMask, most));
    Rounding rounding(largest);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const std::uint32_t low = rounding.round(low_element<Element>(pairs[i]));
      const auto both = static_cast<std::uint16_t>(low | rounding.round(high_element<Element>(pairs[i])) << 8);
      *reinterpret_cast<std::uint16_t*>(screen.queries + std::int64_t{r} * kDim + (i * kWarpSize + lane) * 2) = both;
    }
    const float norm = sqrtf(warp_sum(rounding.norm)) * kNormSlack;
    const float error = sqrtf(warp_sum(rounding.error)) * kNormSlack;
    const auto copied = static_cast<float>(__reduce_add_sync(kFullMask, rounding.copied));
    if (lane == 0) {
      RowBound bound{rounding.scale, rounding.scale * sqrtf(copied) * kNormSlack, error + kChainSlack * norm, 0.0f};
      if (!is_bounded(largest)) bound = {0.0f, infinity(), infinity(), 0.0f};
      screen.row_bounds[r] = bound;
    }
  }
}

// Whether
// -------------------------------------------------------------------------------------------------------------

/// One thread block, behind list_items: whether the chunk is screened. It is when no chunk was yet, or when the last
/// one that was left so few blocks in doubt, a row, that they are a small part of the blocks of this one.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) decide_screening_kernel(const SelectArgs args, const ScreenArgs screen) {
  __shared__ unsigned long long all_rows, all_blocks;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) all_rows = all_blocks = 0;
  __syncthreads();
  ptx::griddepcontrol_wait();
  const std::int32_t tiles = min_of(args.sequence_tiles[args.batch.sequences], args.most_tiles);
  unsigned long long rows = 0;
  unsigned long long blocks = 0;
  for (std::int32_t t = thread; t < tiles; t += kThreads) {
    const SelectTile tile = args.tiles[t];
    if (tile.key_tiles == 0) continue;
    rows += static_cast<unsigned long long>(tile.rows);
    blocks += static_cast<unsigned long long>(tile.rows) * static_cast<unsigned long long>(tile.key_tiles) *
              static_cast<unsigned long long>(kSelectTileKeys / args.block_size);
  }
  atomicAdd(&all_rows, rows);
  atomicAdd(&all_blocks, blocks);
  __syncthreads();
  if (thread > 0) return;
  ScreenState& state = *screen.state;
  const float doubts_before = static_cast<float>(state.doubts) / fmaxf(static_cast<float>(state.rows), 1.0f);
  const float blocks_now = static_cast<float>(all_blocks) / fmaxf(static_cast<float>(all_rows), 1.0f);
  const bool helps = state.rows == 0 || doubts_before * static_cast<float>(kScreenLeastGain) <= blocks_now;
  const std::int32_t items = *args.item_count;
  state.use = all_rows > 0 && (helps || screen.always != 0) ? 1 : 0;
  state.screened_items = state.use != 0 ? items : 0;
  state.exact_items = state.use != 0 ? 0 : items;
  if (state.use != 0) {
    state.doubts = 0;
    state.rows = all_rows;
    state.blocks = all_blocks;
  }
}

/// One thread, behind find_doubts: a chunk with half of its blocks in doubt is scored as if it had not been screened,
/// which costs less than gathering.
[[maybe_unused]] static __global__ void reconsider_screening_kernel(const ScreenArgs screen) {
  ptx::griddepcontrol_wait();
  ScreenState& state = *screen.state;
  if (state.use == 0 || screen.always != 0 || state.doubts * 2 <= state.blocks) return;
  state.use = 0;
  state.exact_items = state.screened_items;
}

// Approximations
// ------------------------------------------------------------------------------------------------------

template <int kDim, int kBlock>
struct ScreenKernel {
  static constexpr int kWarpgroups = 2;
  static constexpr int kSlabs = 2;
  static constexpr int kThreads = kWarpgroups * 128 + kWarpSize;
  static constexpr int kRows = kWarpgroups * kSlabs * 64;
  static constexpr int kTileKeys = static_cast<int>(kSelectTileKeys);
  static constexpr int kTileBlocks = kTileKeys / kBlock;
  static constexpr Swizzle kSwizzle = kDim == 128 ? Swizzle::k128 : Swizzle::k64;  // a row is as wide
  static constexpr std::uint32_t kSlabBytes = 64 * kDim;
  static constexpr std::uint32_t kQueryBytes = kRows * kDim;
  static constexpr std::uint32_t kStageBytes = kTileKeys * kDim;
  static constexpr int kStages = 8;
  static constexpr std::size_t kSharedBytes = kQueryBytes + kStages * kStageBytes + 2 * kStages * 8;
  static_assert(kRows == kSelectManyRows && kSharedBytes <= 227 * 1024);
};

/// As score_blocks_kernel with many rows, on the copies: approximations of the blocks' maxima go where those go.
template <int kDim, int kBlock>
__global__ void __launch_bounds__(ScreenKernel<kDim, kBlock>::kThreads, 1)
    screen_blocks_kernel(const SelectArgs args, const ScreenArgs screen) {
  using Shape = ScreenKernel<kDim, kBlock>;
  std::byte* const queries = shared_memory();
  std::byte* const stages = queries + Shape::kQueryBytes;
  auto* const full = reinterpret_cast<std::uint64_t*>(stages + Shape::kStages * Shape::kStageBytes);
  std::uint64_t* const empty = full + Shape::kStages;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  if (thread == 0) init_ring(full, empty, Shape::kStages, Shape::kWarpgroups * 4);  // each warp that multiplies
  __syncthreads();
  ptx::griddepcontrol_wait();
  const std::int32_t items = screen.state->screened_items;
  const auto step = static_cast<std::int32_t>(gridDim.x);
  RingPlace<Shape::kStages> ring;

  if (thread >= Shape::kWarpgroups * 128) {
    if (lane != 0) return;
    for (auto i = static_cast<std::int32_t>(blockIdx.x); i < items; i += step) {
      const SelectWork work = read_item(args, i);
      for (std::int32_t t = work.begin; t < work.end; ++t) {
        const std::int32_t number = block_number(args, screen, work.tile.sequence, t * Shape::kTileBlocks);
        ptx::wait(empty + ring.stage, ring.parity ^ 1u);
        ptx::arrive_expect_bytes(full + ring.stage, Shape::kStageBytes);
        ptx::bulk_load(stages + static_cast<std::uint32_t>(ring.stage) * Shape::kStageBytes,
                       screen.keys + std::int64_t{number} * kBlock * kDim, Shape::kStageBytes, full + ring.stage);
        ring.next();
      }
    }
    return;
  }

  const int warpgroup = thread / 128;
  const int row_of_thread = thread % 128 / kWarpSize * 16 + lane / 4;  // in a slab; the other is 8 further on
  std::byte* const own_queries = queries + static_cast<std::uint32_t>(warpgroup * Shape::kSlabs) * Shape::kSlabBytes;
  const std::uint64_t query_operand = ptx::matrix_descriptor(own_queries, 0, 8 * kDim, Shape::kSwizzle);
  const std::uint64_t key_operand = ptx::matrix_descriptor(stages, 0, 8 * kDim, Shape::kSwizzle);
  const auto barrier = static_cast<std::uint32_t>(1 + warpgroup);

  for (auto i = static_cast<std::int32_t>(blockIdx.x); i < items; i += step) {
    const SelectWork work = read_item(args, i);
    const SelectTile& tile = work.tile;
    const std::int32_t first_row = warpgroup * Shape::kSlabs * 64;  // of the warpgroup, in the tile

    ptx::named_sync(barrier, 128);  // all products of the last item are done
    load_slabs<Shape::kSlabs * 64, kDim>(own_queries, thread % 128, [&](int row) -> const std::byte* {
      if (first_row + row >= tile.rows) return nullptr;
      return reinterpret_cast<const std::byte*>(screen.queries + std::int64_t{tile.first_row + first_row + row} * kDim);
    });
    ptx::fence_proxy_async();
    ptx::named_sync(barrier, 128);
    float scales[Shape::kSlabs][2];
#pragma unroll
    for (int slab = 0; slab < Shape::kSlabs; ++slab) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::int32_t row = first_row + slab * 64 + row_of_thread + 8 * h;
        scales[slab][h] = row < tile.rows ? screen.row_bounds[tile.first_row + row].scale : 0.0f;
      }
    }
    const KeyBound* const bounds =
        screen.key_bounds + block_number(args, screen, tile.sequence, work.begin * Shape::kTileBlocks);

    HeldMaxima held[Shape::kSlabs];
    for (std::int32_t t = work.begin; t < work.end; ++t) {
      std::int32_t sums[Shape::kSlabs][64];
      float key_scales[Shape::kTileBlocks];
#pragma unroll
      for (int b = 0; b < Shape::kTileBlocks; ++b) {
        key_scales[b] = bounds[(t - work.begin) * Shape::kTileBlocks + b].scale;
      }
      ptx::wait(full + ring.stage, ring.parity);
      const std::uint64_t key_tile =
          ptx::advance(key_operand, static_cast<std::uint32_t>(ring.stage) * Shape::kStageBytes);
#pragma unroll
      for (int slab = 0; slab < Shape::kSlabs; ++slab) {
        const std::uint64_t rows = ptx::advance(query_operand, static_cast<std::uint32_t>(slab) * Shape::kSlabBytes);
        ptx::fence_registers(sums[slab]);
        ptx::wgmma_fence();
#pragma unroll
        for (std::uint32_t k = 0; k < kDim; k += 32) {
          ptx::wgmma_int8(sums[slab], ptx::advance(rows, k), ptx::advance(key_tile, k), k > 0);
        }
        ptx::wgmma_commit();
      }
      const auto reduce = [&](auto slab_constant) {
        constexpr int slab = decltype(slab_constant)::value;
        ptx::wgmma_wait<Shape::kSlabs - 1 - slab>();
        ptx::fence_registers(sums[slab]);
        if constexpr (slab == Shape::kSlabs - 1) {
          if (lane == 0) ptx::arrive(empty + ring.stage);
        }
        const std::int32_t row = first_row + slab * 64 + row_of_thread;
        const auto put = [&](RowPair<std::int32_t> most, int b) {
          const RowPair<float> scores{scales[slab][0] * (key_scales[b] * static_cast<float>(most.x)),
                                      scales[slab][1] * (key_scales[b] * static_cast<float>(most.y))};
          const bool is_last = t + 1 == work.end && b + 1 == Shape::kTileBlocks;
          held[slab].put(args, tile, row, t * Shape::kTileBlocks + b, scores, is_last, lane);
        };
        put(block_maxima<0, kBlock>(sums[slab]), 0);
        if constexpr (kBlock == 64) put(block_maxima<8, kBlock>(sums[slab]), 1);
      };
      reduce(std::integral_constant<int, 0>());
      reduce(std::integral_constant<int, 1>());
      ring.next();
    }
  }
}

// Doubts
// --------------------------------------------------------------------------------------------------------------

/// A row of the chunk that has blocks to choose among: calls body(row, sequence, choice). A warp takes
/// every gridDim.x * kTopkWarps-th row.
template <class Body>
__device__ __forceinline__ void for_each_choice(const SelectArgs& args, const Body& body) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int32_t rows = args.queries * args.groups;
  for (std::int32_t r = static_cast<std::int32_t>(blockIdx.x) * kTopkWarps + warp; r < rows;
       r += static_cast<std::int32_t>(gridDim.x) * kTopkWarps) {
    const QueryPlace place = args.batch.place(args.first_query + r / args.groups);
    const RowChoice choice = row_choice(args, visible_blocks(args, place.position));
    if (choice.slots > 0) body(r, place.sequence, choice);
  }
}

__device__ __forceinline__ void mark_doubt(const SelectArgs& args, const ScreenArgs& screen, std::uint32_t* doubts,
                                           std::int32_t block, std::int32_t row) {
  const std::int32_t tile = block / (static_cast<std::int32_t>(kSelectTileKeys) / args.block_size);
  atomicOr(doubts + std::int64_t{tile} * screen.row_words + row / 32, 1u << row % 32);
}

/// The leaders of each row: as many blocks as it has slots, the best by their approximations.
template <int kVectors>
__global__ void __launch_bounds__(kTopkWarps* kWarpSize, kTopkBlocksPerProcessor)
    find_leaders_kernel(const SelectArgs args, const ScreenArgs screen) {
  __shared__ TopkSurvivors survivors[kTopkWarps];
  ptx::griddepcontrol_wait();
  if (screen.state->use == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  TopkSurvivors& own = survivors[threadIdx.x / kWarpSize];
  for_each_choice(args, [&](std::int32_t r, std::int32_t, const RowChoice& choice) {
    const int found =
        warp_topk<kVectors>(args.maxima + r * args.maxima_stride, static_cast<std::uint32_t>(choice.begin),
                            static_cast<std::uint32_t>(choice.end), choice.slots, own, lane);
    for (int i = lane; i < found; i += kWarpSize) {
      screen.leaders[std::int64_t{r} * args.topk + i] = own.ids[i];
      mark_doubt(args, screen, screen.doubts[0], own.ids[i], r);
    }
    __syncwarp();
  });
}

/// Behind the rescoring of the leaders: as many blocks as a row has slots score at least what the worst leader does,
/// `least`. A block whose upper bound is below that is out; the others are in doubt, with whatever is not bounded.
[[maybe_unused]] static __global__ void __launch_bounds__(kTopkWarps* kWarpSize, kTopkBlocksPerProcessor)
    find_doubts_kernel(const SelectArgs args, const ScreenArgs screen) {
  ptx::griddepcontrol_wait();
  if (screen.state->use == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  std::int32_t found = 0;
  for_each_choice(args, [&](std::int32_t r, std::int32_t sequence, const RowChoice& choice) {
    const float* const scores = args.maxima + r * args.maxima_stride;
    float least = infinity();
    for (int i = lane; i < choice.slots; i += kWarpSize) {
      const float score = scores[screen.leaders[std::int64_t{r} * args.topk + i]];
      least = score != score ? -infinity() : fminf(least, score);  // NaN ranks last: nothing is certain then
      if (least == -infinity()) break;
    }
    least = -warp_max(-least);
    const RowBound row = screen.row_bounds[r];
    const KeyBound* const keys = screen.key_bounds + block_number(args, screen, sequence, 0);
#pragma unroll 4
    for (std::int32_t b = choice.begin + lane; b < choice.end; b += kWarpSize) {
      const KeyBound key = keys[b];
      const float upper = scores[b] + (row.copied * key.error + row.rest * key.norm);
      if (!(upper < least)) {
        mark_doubt(args, screen, screen.doubts[1], b, r);
        ++found;
      }
    }
  });
  found = __reduce_add_sync(kFullMask, found);
  if (lane == 0 && found > 0) atomicAdd(&screen.state->doubts, static_cast<unsigned long long>(found));
}

// Exact scores
// --------------------------------------------------------------------------------------------------------

template <int kDim>
struct RescoreKernel {
  static constexpr int kThreads = 128;
  static constexpr int kPerProcessor = 3;  // one gathers while others multiply
  static constexpr std::uint32_t kKeyBytes = static_cast<std::uint32_t>(kSelectTileKeys) * kDim * 2;
  static constexpr std::uint32_t kQueryBytes = 64 * kDim * 2;
  static constexpr std::uint32_t kListBytes = kRescoreTiles * kSelectManyRows * 2;
  static constexpr std::size_t kSharedBytes = kKeyBytes + kQueryBytes + kListBytes + 8;
  static_assert(kPerProcessor * (kSharedBytes + 1024) <= 228 * 1024);
  static_assert(kRescoreTiles * kSelectManyRows <= 65536);
};

/// Row tiles [begin, end) that belong to one sequence.
__device__ __forceinline__ std::int32_t end_of_run(const SelectArgs& args, std::int32_t begin, std::int32_t end) {
  const std::int32_t sequence = args.tiles[begin].sequence;
  if (args.tiles[end - 1].sequence == sequence) return end;
  std::int32_t run = begin + 1;
  while (args.tiles[run].sequence == sequence) ++run;
  return run;
}

/// Exact scores of the rows and key tiles marked in `doubts` and not in `known` (which may be null), in place of the
/// approximations. A work item is a key tile and up to kRescoreTiles row tiles: the marked rows are listed, gathered 64
/// at a time, and multiplied as in score_blocks_kernel.
template <class Element, int kDim, int kBlock>
__global__ void __launch_bounds__(128, RescoreKernel<kDim>::kPerProcessor)
    rescore_blocks_kernel(const SelectArgs args, const ScreenArgs screen, const Strided<const Element> q_idx,
                          const __grid_constant__ TensorMap keys, const std::uint32_t* doubts,
                          const std::uint32_t* known) {
  using Shape = RescoreKernel<kDim>;
  std::byte* const key_tile = shared_memory();
  std::byte* const queries = key_tile + Shape::kKeyBytes;
  auto* const list = reinterpret_cast<std::uint16_t*>(queries + Shape::kQueryBytes);
  auto* const arrived = reinterpret_cast<std::uint64_t*>(queries + Shape::kQueryBytes + Shape::kListBytes);
  __shared__ std::int32_t listed;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  if (thread == 0) {
    ptx::barrier_init(arrived, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();
  if (screen.state->use == 0) return;
  const std::uint64_t query_operand = ptx::matrix_descriptor(queries, 0, 1024, Swizzle::k128);
  const std::uint64_t key_operand = ptx::matrix_descriptor(key_tile, 0, 1024, Swizzle::k128);
  constexpr int kTileBlocks = static_cast<int>(kSelectTileKeys) / kBlock;
  constexpr auto kTiles = static_cast<std::int32_t>(kRescoreTiles);
  const std::int32_t tiles = min_of(args.sequence_tiles[args.batch.sequences], args.most_tiles);
  const std::int32_t stretches = ceil_div(tiles, kTiles);
  std::uint32_t parity = 0;

  for (auto item = static_cast<std::int32_t>(blockIdx.x); item < stretches * args.most_key_tiles;
       item += static_cast<std::int32_t>(gridDim.x)) {
    const std::int32_t tile = item / stretches;  // thread blocks side by side read the same keys
    const std::int32_t first_tile = item % stretches * kTiles;
    const std::int32_t last_tile = min_of(first_tile + kTiles, tiles);
    const std::int64_t first_word = std::int64_t{tile} * screen.row_words;
    for (std::int32_t run = first_tile; run < last_tile;) {
      const std::int32_t run_end = end_of_run(args, run, last_tile);
      const std::int32_t sequence = args.tiles[run].sequence;
      const std::int32_t begin = args.tiles[run].first_row;
      const std::int32_t end = args.tiles[run_end - 1].first_row + args.tiles[run_end - 1].rows;
      run = run_end;

      __syncthreads();  // the last list, and the tiles behind it, are done with
      if (thread == 0) listed = 0;
      __syncthreads();
      for (std::int32_t w = begin / 32 + thread; w * 32 < end; w += Shape::kThreads) {
        std::uint32_t bits = doubts[first_word + w];
        if (bits != 0 && known != nullptr) bits &= ~known[first_word + w];
        if (w * 32 < begin) bits &= ~0u << (begin - w * 32);
        if (w * 32 + 32 > end) bits &= ~0u >> (w * 32 + 32 - end);
        if (bits == 0) continue;
        std::int32_t place = atomicAdd(&listed, __popc(bits));  // no result depends on the order
        for (; bits != 0; bits &= bits - 1) {
          list[place++] = static_cast<std::uint16_t>(w * 32 + __ffs(static_cast<int>(bits)) - 1 - begin);
        }
      }
      __syncthreads();
      const std::int32_t rows = listed;
      if (rows == 0) continue;

      if (thread == 0) {
        ptx::arrive_expect_bytes(arrived, Shape::kKeyBytes);
        load_key_tile<Element, kDim>(key_tile, keys, args, sequence, tile, arrived);
      }
      for (std::int32_t first = 0; first < rows; first += 64) {
        if (first > 0) __syncthreads();  // the last 64 are multiplied
        load_slabs<64, kDim * 2>(queries, thread, [&](int row) -> const std::byte* {
          if (first + row >= rows) return nullptr;
          const std::int32_t r = begin + list[first + row];
          return reinterpret_cast<const std::byte*>(q_idx.at(args.first_query + r / args.groups, r % args.groups));
        });
        ptx::fence_proxy_async();
        __syncthreads();
        ptx::wait(arrived, parity);
        float scores[64];
        multiply_slab<Element, kDim>(scores, query_operand, key_operand);
        ptx::wgmma_wait<0>();
        ptx::fence_registers(scores);
        const auto put = [&](RowPair<float> most, int b) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const std::int32_t place = first + thread / kWarpSize * 16 + lane / 4 + 8 * h;
            if (lane % 4 == b && place < rows) {
              args.maxima[(begin + list[place]) * args.maxima_stride + tile * kTileBlocks + b] =
                  h == 0 ? most.x : most.y;
            }
          }
        };
        put(block_maxima<0, kBlock>(scores), 0);
        if constexpr (kBlock == 64) put(block_maxima<8, kBlock>(scores), 1);
      }
      parity ^= 1u;
    }
  }
}

// Launch
// --------------------------------------------------------------------------------------------------------------

/// Copies the keys of a call: before its first chunk.
void launch_key_copies(const SelectArgs& args, const ScreenArgs& screen, const SelectBlocksParams& params,
                       std::int64_t multiprocessors, void* stream);
/// Behind list_items of a chunk: decides whether to screen it, and if so leaves maxima that rank as the exact ones do.
/// The unscreened scores that follow take state->exact_items of the items: all or none.
void launch_screening(const SelectArgs& args, const ScreenArgs& screen, const SelectBlocksParams& params,
                      const TensorMap& keys, const TopkPlan& ranking, std::int64_t multiprocessors, void* stream);

}  // namespace msa::cuda
