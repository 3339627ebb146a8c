// SPDX-License-Identifier: Apache-2.0
// What the kernel of dense attention is given, where things lie in its shared memory, and the rings of tiles between
// those of its warps that feed and those that multiply. Tested in tests/cuda/dense_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "src/cuda/attention_tile.cuh"
#include "src/cuda/batch.cuh"
#include "src/cuda/dense_items.cuh"
#include "src/cuda/tile_ring.cuh"

namespace msa::cuda {

inline constexpr unsigned kDenseThreads = 384;  // a warpgroup that feeds, two that compute
inline constexpr std::uint32_t kDenseConsumers = 256, kDenseConsumerWarps = 8;
inline constexpr std::uint32_t kWidenWarps = 3;  // of the feeding warpgroup, for float8

/// Where results go.
template <class T>
struct DenseResults {
  BatchView batch;
  Strided<T> out;
  Strided<float> lse;
  float* partial;  ///< [queries, query_heads, max_spans, D] of this chunk, rows normalised; null: `out` is written
  float* lse2;     ///< the same without D: log2 of a span's sum of exponentials
  std::int32_t first_query;
  std::int32_t kv_heads, group_size;
  std::int32_t span_keys, max_spans;
  bool out_is_aligned;  ///< to 16 bytes, every row
};

/// kWidens: keys and values are stored as float8, and widened to T on the way.
template <class T, bool kWidens>
struct DenseArguments : DenseResults<T> {
  using Stored = std::conditional_t<kWidens, Float8E4M3, T>;
  const DenseItem* items;
  DenseTotals* totals;
  KeyRowsView<Stored> v;   ///< for values that are not finite, which are read once more
  std::int64_t tokens;     ///< of v, in all pages
  std::int32_t page;       ///< tokens a page; 0 when packed
  std::int32_t copy_keys;  ///< keys of one copy: a divisor of a tile and of a page
  float scale_log2;        ///< |scale| * log2(e), positive: a row's largest score has the largest exponent
  float sign;              ///< what scores are multiplied by before: 1, or -1 or 0 as the scale's sign
};

/// Where things lie in shared memory, in bytes.
template <int D, bool kWidens>
struct DenseMemory {
  static constexpr std::uint32_t kKeys = static_cast<std::uint32_t>(kDenseTileKeys);
  static constexpr std::uint32_t kRows = static_cast<std::uint32_t>(kTileRows);
  static constexpr std::uint32_t kQueryColumn = kRows * 128;
  static constexpr std::uint32_t kStages = D == 128 ? 2 : 4;
  using KeyRing = TileRing<kStages, kKeys * D * 2>;
  using ValueRing = TileRing<kWidens ? kStages / 2 : kStages, kKeys * D * 2>;  // what is left beside those stored
  using StoredRing = TileRing<kWidens ? kStages : 0, kKeys * D>;               ///< of keys and values by turns
  /// One warp's rows of what the spans so far gave; later the way out of its rows.
  static constexpr std::uint32_t kWarpTotals = 16 * D * 4;
  static_assert(kWarpTotals >= kStagingBytes);

  static constexpr std::uint32_t kQueryTile = 0;
  static constexpr std::uint32_t kKeyTiles = kQueryTile + kRows * D * 2;
  static constexpr std::uint32_t kValueTiles = kKeyTiles + KeyRing::kTileBytes;
  static constexpr std::uint32_t kStoredTiles = kValueTiles + ValueRing::kTileBytes;
  static constexpr std::uint32_t kTotals = kStoredTiles + StoredRing::kTileBytes;
  static constexpr std::uint32_t kItem = kTotals + kDenseConsumerWarps * kWarpTotals;
  static constexpr std::uint32_t kHasRemoved = kItem + sizeof(DenseItem);  ///< two flags, of items by turns
  static constexpr std::uint32_t kStoredEnd = kHasRemoved + 2 * 4;
  static constexpr std::uint32_t kKeyBarriers = round_up<std::uint32_t>(kStoredEnd + 4, 8);
  static constexpr std::uint32_t kValueBarriers = kKeyBarriers + KeyRing::kBarrierBytes;
  static constexpr std::uint32_t kStoredBarriers = kValueBarriers + ValueRing::kBarrierBytes;
  static constexpr std::uint32_t kQueryBarriers = kStoredBarriers + StoredRing::kBarrierBytes;
  static constexpr std::uint32_t kBytes = kQueryBarriers + 2 * 8;
};
static_assert(DenseMemory<128, false>::kBytes <= 227 * 1024, "what a block may have on this chip");
static_assert(DenseMemory<128, true>::kBytes <= 227 * 1024);

/// What feeder and consumers share.
template <int D, bool kWidens>
struct DenseRings {
  using Memory = DenseMemory<D, kWidens>;
  typename Memory::KeyRing keys;
  typename Memory::ValueRing values;
  typename Memory::StoredRing stored;
  std::int32_t* stored_end;  ///< 1: what is full is no tile, there is no more
  std::uint64_t* queries_full;
  std::uint64_t* queries_free;
  std::byte* queries;
  DenseItem* item;  ///< full and free with the queries
  __device__ explicit DenseRings(std::byte* memory)
      : keys{memory + Memory::kKeyTiles, reinterpret_cast<std::uint64_t*>(memory + Memory::kKeyBarriers)},
        values{memory + Memory::kValueTiles, reinterpret_cast<std::uint64_t*>(memory + Memory::kValueBarriers)},
        stored{memory + Memory::kStoredTiles, reinterpret_cast<std::uint64_t*>(memory + Memory::kStoredBarriers)},
        stored_end(reinterpret_cast<std::int32_t*>(memory + Memory::kStoredEnd)),
        queries_full(reinterpret_cast<std::uint64_t*>(memory + Memory::kQueryBarriers)),
        queries_free(queries_full + 1),
        queries(memory + Memory::kQueryTile),
        item(reinterpret_cast<DenseItem*>(memory + Memory::kItem)) {}
};

}  // namespace msa::cuda
