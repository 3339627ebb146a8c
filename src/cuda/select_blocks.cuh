// SPDX-License-Identifier: Apache-2.0
// Block selection on Hopper. Three kernels a chunk of queries: list_items cuts the rows (queries x groups) of the chunk
// into tiles of one sequence and those into work items of at most span_tiles x 128 keys; score_blocks multiplies a tile
// of rows with one key tile after the other, in matrix instructions fed by the copy engine, and writes the maximum of
// each block, which is all that leaves the multiprocessor; select_rows ranks a row's maxima (topk_blocks.cuh) between
// its forced blocks. A score is the same chain of matrix instructions whatever the tile, item, chunk or layout, so
// prefill and decode agree bit for bit. docs/cuda-select-blocks.md has the bounds and a picture. Tested in
// tests/cuda/select_blocks_test.cc.
#pragma once

#include "src/cuda/batch.cuh"
#include "src/cuda/device.cuh"
#include "src/cuda/ptx.cuh"
#include "src/cuda/select_blocks.h"
#include "src/cuda/topk_blocks.cuh"

namespace msa::cuda {

/// Rows [first_row, first_row + rows) of the chunk, of one sequence; row r is query r / groups, group r % groups.
struct SelectTile {
  std::int32_t first_row;
  std::int32_t rows;
  std::int32_t sequence;
  std::int32_t key_tiles;  ///< those that hold blocks a row may choose
};
/// Key tiles [span * span_tiles, (span + 1) * span_tiles) of a row tile.
struct SelectItem {
  std::int32_t tile;
  std::int32_t span;
};

/// What the kernels of a chunk share.
struct SelectArgs {
  BatchView batch;
  std::int32_t first_query = 0;  ///< of the chunk
  std::int32_t queries = 0;      ///< of the chunk, padding included
  std::int32_t groups = 1;
  std::int32_t block_size = 128;
  std::int32_t topk = 16;
  std::int32_t local_blocks = 1;  ///< capped at topk
  std::int32_t init_blocks = 0;   ///< capped at topk
  std::int32_t tile_rows = 64;
  std::int32_t span_tiles = 1;
  std::int32_t most_tiles = 0;  ///< the room of the lists, which unchecked sequence bounds cannot overrun
  std::int32_t most_key_tiles = 0;
  std::int32_t most_items = 0;
  std::int32_t page = 0;  ///< tokens a page; 0 when packed
  std::int32_t pages = 0;
  std::int32_t* item_count = nullptr;
  std::int32_t* sequence_tiles = nullptr;  ///< [sequences + 1], the first tile of each
  SelectTile* tiles = nullptr;
  SelectItem* items = nullptr;
  float* maxima = nullptr;  ///< [queries * groups, maxima_stride]
  std::int64_t maxima_stride = 0;
};

/// The forced blocks of a row with `visible` blocks, as core::forced_blocks: [0, init_end) and [local_begin, visible).
struct ForcedRange {
  std::int32_t init_end;
  std::int32_t local_begin;
};
__device__ __forceinline__ ForcedRange forced_range(const SelectArgs& args, std::int32_t visible) {
  ForcedRange range;
  range.local_begin = visible - min_of(args.local_blocks, visible);
  range.init_end = min_of(min_of(args.init_blocks, range.local_begin), args.topk - (visible - range.local_begin));
  return range;
}

/// Blocks that a row sees; of bounds that were never checked, no more than can have maxima. -1 is the position of an
/// inert row, which sees nothing.
__device__ __forceinline__ std::int32_t visible_blocks(const SelectArgs& args, std::int32_t position) {
  if (position < 0) return 0;
  const std::int32_t most = args.most_key_tiles * (static_cast<std::int32_t>(kSelectTileKeys) / args.block_size);
  return min_of(position / args.block_size + 1, most);
}

/// A row with `visible` blocks takes [0, begin) and [end, visible), and the `slots` best of [begin, end), which are
/// more than slots when slots is not 0.
struct RowChoice {
  std::int32_t begin;
  std::int32_t end;
  std::int32_t slots;
};
__device__ __forceinline__ RowChoice row_choice(const SelectArgs& args, std::int32_t visible) {
  if (visible <= args.topk) return {visible, visible, 0};
  const ForcedRange forced = forced_range(args, visible);
  return {forced.init_end, forced.local_begin, args.topk - forced.init_end - (visible - forced.local_begin)};
}

// Lists
// ----------------------------------------------------------------------------------------------------------------

inline constexpr int kListThreads = 1024;

/// Query rows of sequence s that lie in the chunk.
struct ChunkRange {
  std::int32_t begin;
  std::int32_t end;
};
__device__ __forceinline__ ChunkRange chunk_range(const SelectArgs& args, std::int32_t s) {
  ChunkRange range;
  range.begin = max_of(args.batch.cu_seqlens_q[s], args.first_query);
  range.end = max_of(range.begin, min_of(args.batch.cu_seqlens_q[s + 1], args.first_query + args.queries));
  return range;
}

/// One thread block: the tiles of the chunk, then its items, span by span, so that multiprocessors that work at the
/// same time read the same keys. The order within a span is whatever the threads make it; no result depends on it.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) list_items_kernel(const SelectArgs args) {
  __shared__ std::int32_t warp_sums[kThreads / kWarpSize];
  __shared__ std::int32_t running, most_spans, items;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  constexpr std::int32_t threads = kThreads;
  if (thread == 0) running = most_spans = items = 0;
  __syncthreads();

  for (std::int32_t first = 0; first < args.batch.sequences; first += threads) {
    const std::int32_t s = first + thread;
    std::int32_t own = 0;
    if (s < args.batch.sequences) {
      const ChunkRange range = chunk_range(args, s);
      own = ceil_div((range.end - range.begin) * args.groups, args.tile_rows);
    }
    std::int32_t sum = own;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const std::int32_t other = __shfl_up_sync(kFullMask, sum, static_cast<unsigned>(distance));
      sum += lane >= distance ? other : 0;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();
    std::int32_t before = running;
    for (int w = 0; w < warp; ++w) before += warp_sums[w];
    if (s < args.batch.sequences) args.sequence_tiles[s] = before + sum - own;
    __syncthreads();
    if (thread == threads - 1) running = before + sum;
    __syncthreads();
  }
  const std::int32_t tiles = min_of(running, args.most_tiles);
  if (thread == 0) args.sequence_tiles[args.batch.sequences] = running;
  __syncthreads();

  for (std::int32_t t = thread; t < tiles; t += threads) {
    std::int32_t low = 0;  // the last sequence whose first tile is t or before: the one that has tile t
    std::int32_t high = args.batch.sequences - 1;
    while (low < high) {
      const std::int32_t middle = low + (high - low + 1) / 2;
      if (args.sequence_tiles[middle] <= t) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const ChunkRange range = chunk_range(args, low);
    SelectTile tile;
    tile.sequence = low;
    const std::int32_t row = (t - args.sequence_tiles[low]) * args.tile_rows;
    tile.first_row = (range.begin - args.first_query) * args.groups + row;
    tile.rows = min_of(args.tile_rows, (range.end - range.begin) * args.groups - row);
    tile.key_tiles = 0;
    const std::int32_t last_query = args.first_query + (tile.first_row + tile.rows - 1) / args.groups;
    const std::int32_t visible = args.batch.place(last_query).position / args.block_size + 1;
    // Rows with few blocks take them all; forced ones need no score either. The last row has most to choose from.
    if (visible > args.topk) {
      const std::int32_t choices = forced_range(args, visible).local_begin;
      tile.key_tiles =
          min_of(ceil_div(choices * args.block_size, static_cast<std::int32_t>(kSelectTileKeys)), args.most_key_tiles);
    }
    args.tiles[t] = tile;
    atomicMax(&most_spans, ceil_div(tile.key_tiles, args.span_tiles));
  }
  __syncthreads();

  const std::int32_t pairs = most_spans * tiles;  // most_items, which the plan keeps small, or fewer
  for (std::int32_t pair = thread; pair < pairs; pair += threads) {
    const std::int32_t span = pair / tiles;
    const std::int32_t t = pair % tiles;
    if (span * args.span_tiles >= args.tiles[t].key_tiles) continue;
    const std::int32_t place = atomicAdd(&items, 1);
    if (place < args.most_items) args.items[place] = {t, span};
  }
  __syncthreads();
  if (thread == 0) *args.item_count = min_of(items, args.most_items);
}

// Scores
// ---------------------------------------------------------------------------------------------------------------

/// kSlabs: tiles of 64 rows, one matrix instruction high, a warpgroup. The warp behind the warpgroups feeds them.
template <class Element, int kDim, int kBlock, int kWarpgroups, int kSlabs>
struct ScoreKernel {
  static constexpr int kThreads = kWarpgroups * 128 + kWarpSize;
  static constexpr int kRows = kWarpgroups * kSlabs * 64;
  static constexpr int kTileKeys = static_cast<int>(kSelectTileKeys);
  static constexpr int kTileBlocks = kTileKeys / kBlock;
  /// A row of 64 elements is as wide as the swizzle, 128 bytes; longer ones lie in halves, one behind the other.
  static constexpr int kHalves = kDim / 64;
  static constexpr std::uint32_t kSlabHalfBytes = 64 * 128;
  static constexpr std::uint32_t kKeyHalfBytes = kTileKeys * 128;
  static constexpr std::uint32_t kQueryBytes = kRows * kDim * 2;
  static constexpr std::uint32_t kStageBytes = kTileKeys * kDim * 2;
  /// 128 KiB of keys on their way: 4.3 TB/s for 132 multiprocessors are 33 bytes a nanosecond each, so this covers
  /// 4 microseconds.
  static constexpr int kStages = kDim == 128 ? 4 : 8;
  static constexpr std::size_t kSharedBytes = kQueryBytes + kStages * kStageBytes + 2 * kStages * 8;
  static_assert(kSharedBytes <= 227 * 1024);
};

struct SelectWork {
  SelectTile tile;
  std::int32_t begin, end;  ///< key tiles
};
__device__ __forceinline__ SelectWork read_item(const SelectArgs& args, std::int32_t i) {
  const SelectItem item = args.items[i];
  SelectWork work;
  work.tile = args.tiles[item.tile];
  work.begin = item.span * args.span_tiles;
  work.end = min_of(work.begin + args.span_tiles, work.tile.key_tiles);
  return work;
}

/// Where a thread stands in the ring of stages, each with a barrier for full and one for empty.
template <int kStages>
struct RingPlace {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    stage = stage + 1 == kStages ? 0 : stage + 1;
    parity ^= stage == 0 ? 1u : 0u;
  }
};

/// Initialises the barriers of a ring that one thread fills and `consumers` arrivals empty; a __syncthreads follows.
__device__ __forceinline__ void init_ring(std::uint64_t* full, std::uint64_t* empty, int stages,
                                          std::uint32_t consumers) {
  for (int stage = 0; stage < stages; ++stage) {
    ptx::barrier_init(full + stage, 1);
    ptx::barrier_init(empty + stage, consumers);
  }
  ptx::fence_barrier_init();
}

/// Asks for key tile `tile` of sequence s: kTileKeys rows of kDim elements of Key, in parts of up to 128 bytes a row.
/// Its bytes count at `full`, which expects them.
template <class Key, int kDim>
__device__ __forceinline__ void load_key_tile(std::byte* to, const TensorMap& keys, const SelectArgs& args,
                                              std::int32_t s, std::int32_t tile, std::uint64_t* full) {
  constexpr int kTileKeys = static_cast<int>(kSelectTileKeys);
  constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Key));
  constexpr int kPartBytes = min_of(kRowBytes, 128);
  // Page sizes are multiples of the block size, so that of 64 keys lies in one page.
  const int box_keys = args.page % kTileKeys != 0 ? 64 : kTileKeys;
  for (int first = 0; first < kTileKeys; first += box_keys) {
    const std::int32_t position = tile * kTileKeys + first;
    std::int32_t row;
    std::int32_t page = 0;
    if (args.page == 0) {
      row = args.batch.cu_seqlens_k[s] + position;
    } else {
      row = position % args.page;
      // A page that is not there lies outside the tensor: the copy engine brings zeros.
      page = args.pages;
      if (position / args.page < args.batch.max_pages) {
        const std::int32_t id = args.batch.page_table[std::int64_t{s} * args.batch.max_pages + position / args.page];
        if (id >= 0 && id < args.pages) page = id;
      }
    }
    for (int part = 0; part < kRowBytes / kPartBytes; ++part) {
      ptx::tensor_load(to + (part * kTileKeys + first) * kPartBytes, keys, full,
                       part * kPartBytes / static_cast<int>(sizeof(Key)), row, page);
    }
  }
}

/// The producer of a ring of key tiles: one thread keeps it full, across items.
template <class Key, int kDim, int kStages>
__device__ __forceinline__ void produce_key_tiles(const SelectArgs& args, const TensorMap& keys, std::byte* stages,
                                                  std::uint64_t* full, std::uint64_t* empty, RingPlace<kStages> ring,
                                                  std::int32_t items) {
  constexpr auto kStageBytes = static_cast<std::uint32_t>(kSelectTileKeys * kDim * sizeof(Key));
  const auto step = static_cast<std::int32_t>(gridDim.x);
  for (auto i = static_cast<std::int32_t>(blockIdx.x); i < items; i += step) {
    const SelectWork work = read_item(args, i);
    for (std::int32_t t = work.begin; t < work.end; ++t, ring.next()) {
      ptx::wait(empty + ring.stage, ring.parity ^ 1u);
      ptx::arrive_expect_bytes(full + ring.stage, kStageBytes);
      load_key_tile<Key, kDim>(stages + static_cast<std::uint32_t>(ring.stage) * kStageBytes, keys, args,
                               work.tile.sequence, t, full + ring.stage);
    }
  }
}

/// Rows of kRowBytes each to shared memory by the 128 threads of a warpgroup: slabs of 64 rows, in parts of up to 128
/// bytes a row, swizzled. `row_at(row)` is where a row lies, null for one of zeros. Matrix products need
/// fence_proxy_async and a barrier behind it.
template <int kRows, int kRowBytes, class RowAt>
__device__ __forceinline__ void load_slabs(std::byte* to, int thread, const RowAt& row_at) {
  constexpr int kWidth = min_of(kRowBytes, 128);
  constexpr Swizzle kSwizzle = kWidth == 128 ? Swizzle::k128 : Swizzle::k64;
  constexpr int kChunks = kRowBytes / 16;
  constexpr int kChunksPerPart = kWidth / 16;
  constexpr int kRowStep = 128 / kChunks;
  constexpr int kLoads = min_of(8, kRows / kRowStep);  // before the first store: one latency for all of them
  const int chunk = thread % kChunks;
#pragma unroll 1
  for (int row = thread / kChunks; row < kRows; row += kLoads * kRowStep) {
    uint4 data[kLoads];
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const std::byte* const from = row_at(row + load * kRowStep);
      data[load] = {0, 0, 0, 0};
      if (from != nullptr) data[load] = *reinterpret_cast<const uint4*>(from + chunk * 16);
    }
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int row_of_load = row + load * kRowStep;
      const int part = row_of_load / 64 * (kRowBytes / kWidth) + chunk / kChunksPerPart;
      const auto offset = static_cast<std::uint32_t>(row_of_load % 64 * kWidth + chunk % kChunksPerPart * 16);
      *reinterpret_cast<uint4*>(to + part * 64 * kWidth + swizzled(offset, kSwizzle)) = data[load];
    }
  }
}

/// For load_slabs: rows of a tile from its row `first` on.
template <class Element>
__device__ __forceinline__ auto query_rows(const SelectArgs& args, const Strided<const Element>& q_idx,
                                           const SelectTile& tile, std::int32_t first) {
  return [&args, &q_idx, &tile, first](int row) -> const std::byte* {
    if (first + row >= tile.rows) return nullptr;
    const std::int32_t r = tile.first_row + first + row;
    return reinterpret_cast<const std::byte*>(q_idx.at(args.first_query + r / args.groups, r % args.groups));
  };
}

/// Without forced local blocks a row chooses among blocks it sees only a part of: what it does not see becomes NaN,
/// which a maximum passes over. `row`: of the thread in the first of kSlabs slabs; the other is 8 further on.
template <int kSlabs>
struct Diagonal {
  bool is_there;
  std::int32_t first_position = 0x7fffffff;
  std::int32_t positions[kSlabs][2];

  __device__ __forceinline__ Diagonal(const SelectArgs& args, const SelectTile& tile, std::int32_t row)
      : is_there(args.local_blocks == 0) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        positions[slab][h] = 0x7fffffff;
        const std::int32_t own = row + slab * 64 + 8 * h;
        if (is_there && own < tile.rows) {
          positions[slab][h] = args.batch.place(args.first_query + (tile.first_row + own) / args.groups).position;
          first_position = min_of(first_position, positions[slab][h]);
        }
      }
    }
  }
  __device__ __forceinline__ void hide(float (&scores)[64], int slab, std::int32_t tile, int lane) const {
    constexpr auto kTileKeys = static_cast<std::int32_t>(kSelectTileKeys);
    if (!is_there || (tile + 1) * kTileKeys - 1 <= first_position) return;
#pragma unroll
    for (int e = 0; e < 64; ++e) {
      const std::int32_t key = tile * kTileKeys + e / 4 * 8 + lane % 4 * 2 + e % 2;
      scores[e] = key <= positions[slab][e / 2 % 2] ? scores[e] : quiet_nan();
    }
  }
};

/// scores = the chain of products of a slab of 64 rows with a tile of 128 keys. Its order is the rounding of every
/// score, so this is the one place that makes scores.
template <class Element, int kDim>
__device__ __forceinline__ void multiply_slab(float (&scores)[64], std::uint64_t slab, std::uint64_t key_tile) {
  ptx::fence_registers(scores);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    const auto step = static_cast<std::uint32_t>(k % 4 * 32);
    const auto half = static_cast<std::uint32_t>(k / 4);
    ptx::wgmma<static_cast<int>(kSelectTileKeys), Element>(scores, ptx::advance(slab, half * 64 * 128 + step),
                                                           ptx::advance(key_tile, half * kSelectTileKeys * 128 + step),
                                                           k > 0);
  }
  ptx::wgmma_commit();
}

/// The largest number; NaN counts below every number, so it is left only when all are NaN.
__device__ __forceinline__ float largest(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ std::int32_t largest(std::int32_t a, std::int32_t b) { return max_of(a, b); }

template <class T>
struct RowPair {
  T x, y;  ///< of the rows lane / 4 and lane / 4 + 8 of a warp's sixteen
};

/// Maximum over the columns [8 kFirst, 8 kFirst + kBlock) of the two rows that a thread's quad of lanes shares; the
/// quad's lanes all get it. Four chains hide the latency of a maximum.
template <int kFirst, int kBlock, class T>
__device__ __forceinline__ RowPair<T> block_maxima(const T (&scores)[64]) {
  T most[2][2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[h][i] = scores[4 * kFirst + 2 * h + i];
#pragma unroll
      for (int j = 1; j < kBlock / 8; ++j) most[h][i] = largest(most[h][i], scores[4 * (kFirst + j) + 2 * h + i]);
    }
  }
  RowPair<T> both{largest(most[0][0], most[0][1]), largest(most[1][0], most[1][1])};
#pragma unroll
  for (int bits = 1; bits <= 2; bits *= 2) {
    both.x = largest(both.x, __shfl_xor_sync(kFullMask, both.x, bits));
    both.y = largest(both.y, __shfl_xor_sync(kFullMask, both.y, bits));
  }
  return both;
}

/// A slab's maxima on their way to memory: a quad's lanes hold those of four blocks until they are written together.
/// Blocks come in order, from a multiple of four.
struct HeldMaxima {
  float held[2] = {};

  /// `row`: of the thread, in the tile; the other is 8 further on. is_last: no block follows.
  __device__ __forceinline__ void put(const SelectArgs& args, const SelectTile& tile, std::int32_t row,
                                      std::int32_t block, RowPair<float> most, bool is_last, int lane) {
    if (block % 4 == lane % 4) {
      held[0] = most.x;
      held[1] = most.y;
    }
    if (block % 4 != 3 && !is_last) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row + 8 * h < tile.rows && lane % 4 <= block % 4) {
        args.maxima[(tile.first_row + row + 8 * h) * args.maxima_stride + block / 4 * 4 + lane % 4] = held[h];
      }
    }
  }
};

template <class Element, int kDim, int kBlock, int kWarpgroups, int kSlabs>
__global__ void __launch_bounds__(kWarpgroups * 128 + kWarpSize, 1)
    score_blocks_kernel(const SelectArgs args, const Strided<const Element> q_idx,
                        const __grid_constant__ TensorMap keys) {
  using Shape = ScoreKernel<Element, kDim, kBlock, kWarpgroups, kSlabs>;
  std::byte* const queries = shared_memory();
  std::byte* const stages = queries + Shape::kQueryBytes;
  auto* const full = reinterpret_cast<std::uint64_t*>(stages + Shape::kStages * Shape::kStageBytes);
  std::uint64_t* const empty = full + Shape::kStages;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  if (thread == 0) init_ring(full, empty, Shape::kStages, kWarpgroups * 4);  // each warp that multiplies
  __syncthreads();
  ptx::griddepcontrol_wait();  // for the lists
  const std::int32_t items = *args.item_count;
  const auto step = static_cast<std::int32_t>(gridDim.x);
  RingPlace<Shape::kStages> ring;

  if (thread >= kWarpgroups * 128) {
    if (lane == 0) produce_key_tiles<Element, kDim>(args, keys, stages, full, empty, ring, items);
    return;
  }

  // The consumers: each warpgroup has rows of its own and only shares the keys.
  const int warpgroup = thread / 128;
  const int row_of_thread = thread % 128 / kWarpSize * 16 + lane / 4;  // in a slab; the other is 8 further on
  std::byte* const own_queries = queries + static_cast<std::uint32_t>(warpgroup) * (Shape::kQueryBytes / kWarpgroups);
  const std::uint64_t query_operand = ptx::matrix_descriptor(own_queries, 0, 1024, Swizzle::k128);
  const std::uint64_t key_operand = ptx::matrix_descriptor(stages, 0, 1024, Swizzle::k128);
  const auto barrier = static_cast<std::uint32_t>(1 + warpgroup);

  for (auto i = static_cast<std::int32_t>(blockIdx.x); i < items; i += step) {
    const SelectWork work = read_item(args, i);
    const SelectTile& tile = work.tile;
    const std::int32_t first_row = warpgroup * kSlabs * 64;  // of the warpgroup, in the tile

    ptx::named_sync(barrier, 128);  // all products of the last item are done
    load_slabs<kSlabs * 64, kDim * 2>(own_queries, thread % 128, query_rows(args, q_idx, tile, first_row));
    ptx::fence_proxy_async();
    ptx::named_sync(barrier, 128);
    const Diagonal<kSlabs> diagonal(args, tile, first_row + row_of_thread);

    HeldMaxima held[kSlabs];
    for (std::int32_t t = work.begin; t < work.end; ++t) {
      float scores[kSlabs][64];
      ptx::wait(full + ring.stage, ring.parity);
      const std::uint64_t key_tile =
          ptx::advance(key_operand, static_cast<std::uint32_t>(ring.stage) * Shape::kStageBytes);
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        multiply_slab<Element, kDim>(
            scores[slab],
            ptx::advance(query_operand, static_cast<std::uint32_t>(slab) * Shape::kHalves * Shape::kSlabHalfBytes),
            key_tile);
      }
      const auto reduce = [&](auto slab_constant) {
        constexpr int slab = decltype(slab_constant)::value;
        ptx::wgmma_wait<kSlabs - 1 - slab>();
        ptx::fence_registers(scores[slab]);
        if constexpr (slab == kSlabs - 1) {
          if (lane == 0) ptx::arrive(empty + ring.stage);
        }
        diagonal.hide(scores[slab], slab, t, lane);
        const std::int32_t row = first_row + slab * 64 + row_of_thread;
        const bool is_last = t + 1 == work.end;
        const std::int32_t block = t * Shape::kTileBlocks;
        held[slab].put(args, tile, row, block, block_maxima<0, kBlock>(scores[slab]), is_last && kBlock == 128, lane);
        if constexpr (kBlock == 64) {
          held[slab].put(args, tile, row, block + 1, block_maxima<8, kBlock>(scores[slab]), is_last, lane);
        }
      };
      reduce(std::integral_constant<int, 0>());
      if constexpr (kSlabs == 2) reduce(std::integral_constant<int, 1>());
      ring.next();
    }
  }
}

// Choice
// ---------------------------------------------------------------------------------------------------------------

/// A warp a row of the chunk, padding rows included.
template <int kVectors>
__global__ void __launch_bounds__(kTopkWarps* kWarpSize, kTopkBlocksPerProcessor)
    select_rows_kernel(const SelectArgs args, const Strided<std::int32_t> blocks) {
  __shared__ TopkSurvivors survivors[kTopkWarps];
  ptx::griddepcontrol_wait();  // for the maxima
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int32_t rows = args.queries * args.groups;
  for (std::int32_t r = static_cast<std::int32_t>(blockIdx.x) * kTopkWarps + warp; r < rows;
       r += static_cast<std::int32_t>(gridDim.x) * kTopkWarps) {
    const std::int32_t query = args.first_query + r / args.groups;
    std::int32_t* const out = blocks.at(r % args.groups, query);
    const std::int32_t visible = visible_blocks(args, args.batch.place(query).position);
    const RowChoice choice = row_choice(args, visible);
    int chosen = 0;
    if (choice.slots > 0) {
      chosen = warp_topk<kVectors>(args.maxima + r * args.maxima_stride, static_cast<std::uint32_t>(choice.begin),
                                   static_cast<std::uint32_t>(choice.end), choice.slots, survivors[warp], lane);
    }
    for (int i = lane; i < args.topk; i += kWarpSize) {
      std::int32_t id = -1;
      if (i < choice.begin) {
        id = i;
      } else if (i < choice.begin + chosen) {
        id = survivors[warp].ids[i - choice.begin];
      } else if (choice.end + (i - choice.begin - chosen) < visible) {
        id = choice.end + (i - choice.begin - chosen);
      }
      out[i] = id;
    }
    __syncwarp();
  }
}

}  // namespace msa::cuda
