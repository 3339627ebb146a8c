// SPDX-License-Identifier: Apache-2.0
// Gradients of sparse attention, block by block: a persistent kernel over the work items of reverse_index.cuh, their
// visits in ascending order. One warpgroup feeds: it takes an item, has the copy engine bring the block's K and V, and
// gathers tiles of query rows and of their dout. Two compute S^T = K Q^T, P^T = 2^(S^T - lse), dP^T = V
// dout^T, dS^T = P^T (dP^T - delta), add P^T dout and dS^T Q to dv and dk in registers, and write dq = dS K to the slot
// that the selection assigned to (query, block). sum_query_gradients and write_key_gradients add up the slots and the
// pieces of a list, in ascending order. No atomics but the item counter. docs/cuda-attention-backward.md has the
// picture. Tested in tests/cuda/attention_backward_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cuda/attention_backward.h"
#include "src/cuda/attention_maps.cuh"
#include "src/cuda/finite_values.cuh"
#include "src/cuda/ptx.cuh"
#include "src/cuda/reverse_index.cuh"
#include "src/cuda/sorted_visits.cuh"
#include "src/cuda/sparse_attention_call.cuh"

namespace msa::cuda {

inline constexpr unsigned kBackwardThreads = 384;  // a warpgroup that feeds, two that compute
// Named barriers: of both computing warpgroups, of those who share dS^T (and the next one), of the feeding warpgroup.
inline constexpr std::uint32_t kComputeBarrier = 1, kSlopesBarrier = 2, kFeedersBarrier = 4;
inline constexpr float kLog2E = 1.4426950408889634f;

/// What the backward wants of a query row, besides its q and dout.
struct alignas(8) RowStats {
  float lse2;   ///< log2 of the sum of exponentials; infinity where the row is 0, NaN where q or dout is not finite
  float delta;  ///< <dout, out> - dlse
};

/// What a tile's rows are.
template <int kRows>
struct alignas(16) TileRows {
  RowStats stats[kRows];
  std::int32_t visible[kRows];                   ///< keys of the block that the row sees; 0: no row
  std::int32_t place[kRows];                     ///< of its dq among the partial ones; -1: another chunk's
  std::int32_t adds_keys;                        ///< whether dk and dv of this tile are added in this chunk
  std::int32_t flags[4];                         ///< a feeding warp: kMasks, kNotFinite
  static constexpr std::int32_t kMasks = 1;      ///< some row sees less than the whole block
  static constexpr std::int32_t kNotFinite = 2;  ///< and has a NaN to be kept from the other rows' keys
};

/// An item as the computing warpgroups see it; item.count -1: there are no more.
struct ItemHead {
  WorkItem item;
  std::int32_t number;   ///< of the item: where its sums are
  std::int32_t tiles;    ///< in this chunk
  std::int32_t resumes;  ///< 1: an earlier chunk left sums of this item
  std::int32_t stores;   ///< 1: this one adds to them
};

/// The visits of an item by a sorted list: sparse attention.
struct ListedVisits {
  static constexpr bool kWritesDq = true;  ///< one partial dq a visit
  const Visit* visits;
  __device__ Visit at(const WorkItem& item, std::int32_t index) const { return visits[item.first + index]; }
  /// How many of the item's visits are of queries before `query`; the warp looks at 32 places at once.
  __device__ std::int32_t before(const WorkItem& item, std::int32_t query) const {
    const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
    std::int32_t low = 0, high = item.count;  // the answer is in [low, high]
    while (low < high) {
      const std::int32_t step = ceil_div(high - low, kWarpSize);
      const std::int32_t place = low + (lane + 1) * step - 1;
      const bool is_before = place < high && at(item, place).query < query;
      const std::int32_t steps = __popc(__ballot_sync(kFullMask, is_before ? 1 : 0));
      high = min_of(high, low + (steps + 1) * step - 1);
      low += steps * step;
    }
    return low;
  }
};

template <class T, class Visits>
struct BackwardArguments {
  Visits visits;
  const WorkItem* items;
  WorkTotals* totals;
  const RowStats* stats;  ///< [queries, query_heads]
  float* sums;            ///< [items][slot floats]
  T* partial;  ///< [queries of this chunk, kv_heads in work, topk, group_size, D], columns as quad_column says
  std::int32_t first_query, queries;  ///< of this chunk
  std::int32_t first_head, kv_heads;  ///< in work
  std::int32_t query_heads, group_size, topk;
  std::int32_t positions;    ///< query positions a tile
  std::uint32_t reciprocal;  ///< 1 / group_size in 16 fractional bits, rounded up: exact for the rows of a tile
  float scale, scale_log2;
};

/// A partial dq is stored in the order in which the threads of a quad hold it: thread t has the columns 8 j + 2 t and
/// the next one, for all j. Column of entry `i` of a row.
template <int D>
__device__ __forceinline__ std::int32_t quad_column(std::int32_t i) {
  return i % (D / 4) / 2 * 8 + i / (D / 4) * 2 + i % 2;
}

/// Where things lie in shared memory, in bytes. Tiles are columns of 128 bytes (64 elements), swizzled: [column][row].
template <int D, int kBlock>
struct BackwardMemory {
  static constexpr BackwardTiles kTiles = backward_tiles(D, kBlock);
  static constexpr std::int32_t kRows = static_cast<std::int32_t>(kTiles.rows);
  static constexpr std::uint32_t kColumns = D / 64;
  static constexpr std::uint32_t kStages = kRows * D >= 128 * 128 ? 2 : 3;  ///< of query rows
  static constexpr std::uint32_t kKeyColumn = kBlock * 128;
  static constexpr std::uint32_t kKeyTile = kColumns * kKeyColumn;
  static constexpr std::uint32_t kRowColumn = kRows * 128;
  static constexpr std::uint32_t kRowTile = kColumns * kRowColumn;
  static constexpr std::uint32_t kSlopeTile = kBlock * 128;  ///< dS^T: a key a row, 64 query rows
  static constexpr std::uint32_t kSlopeTiles = kRows / 64;   ///< of a tile of rows

  static constexpr std::uint32_t kKeys = 0;                        ///< K, then V
  static constexpr std::uint32_t kQueries = kKeys + 2 * kKeyTile;  ///< a stage: q, then dout
  static constexpr std::uint32_t kSlopes = kQueries + kStages * 2 * kRowTile;
  using Rows = TileRows<kRows>;
  static constexpr std::uint32_t kTileRowsAt = kSlopes + 2 * kSlopeTiles * kSlopeTile;
  static constexpr std::uint32_t kItem = kTileRowsAt + kStages * sizeof(Rows);
  static constexpr std::uint32_t kNextItem = kItem + sizeof(ItemHead);  ///< number of the item that is fed
  static constexpr std::uint32_t kBadKeys = kNextItem + 4;              ///< a flag a key: K is not finite there
  static constexpr std::uint32_t kBarriers = round_up<std::uint32_t>(kBadKeys + kBlock * 4, 8);
  static constexpr std::uint32_t kBytes = kBarriers + (2 + 2 * kStages) * 8;
};
static_assert(BackwardMemory<128, 128>::kBytes <= 227 * 1024, "what a block may have on this chip");
static_assert(BackwardMemory<128, 64>::kBytes <= 227 * 1024, "what a block may have on this chip");
static_assert(BackwardMemory<64, 128>::kBytes <= 227 * 1024, "what a block may have on this chip");

template <std::uint32_t kStages>
struct BackwardBarriers {
  std::uint64_t* keys_full;   ///< an arrival by one feeding thread, and the bytes
  std::uint64_t* keys_empty;  ///< an arrival a computing warp
  std::uint64_t* rows_full;   ///< kStages: an arrival a feeding thread, and the bytes
  std::uint64_t* rows_empty;  ///< kStages: an arrival a computing warp
  __device__ explicit BackwardBarriers(std::byte* at)
      : keys_full(reinterpret_cast<std::uint64_t*>(at)),
        keys_empty(keys_full + 1),
        rows_full(keys_full + 2),
        rows_empty(keys_full + 2 + kStages) {}
};

/// Counts through the stages of a ring.
template <std::uint32_t kStages>
struct Ring {
  std::uint32_t stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Before: what a row needs
// ------------------------------------------------------------------------------------------------

template <class T>
struct RowStatsArguments {
  Strided<const T> q, out, dout;
  Strided<const float> lse, dlse;  ///< dlse.data null: zero
  RowStats* stats;
  std::int64_t rows;
  std::int32_t query_heads;
};

inline constexpr unsigned kRowWarps = 8;

template <class T>
__device__ __forceinline__ bool is_finite(T x) {
  constexpr std::uint32_t kExponent = std::is_same_v<T, BFloat16> ? 0x7f80u : 0x7c00u;
  return (x.bits & kExponent) != kExponent;
}

/// A warp a (query, head).
template <class T, int D>
__global__ void __launch_bounds__(kRowWarps* kWarpSize) row_stats(RowStatsArguments<T> a) {
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::int64_t at = std::int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarpSize;
  if (at >= a.rows * a.query_heads) return;
  const std::int64_t row = at / a.query_heads, head = at % a.query_heads;
  const T* q = a.q.at(row, head);
  const T* out = a.out.at(row, head);
  const T* dout = a.dout.at(row, head);
  float delta = 0;
  bool finite = true;
#pragma unroll
  for (std::int32_t i = 0; i < D; i += 2 * kWarpSize) {
#pragma unroll
    for (std::int32_t e = 0; e < 2; ++e) {
      const std::int32_t d = i + 2 * lane + e;
      finite = finite && is_finite(q[d]) && is_finite(dout[d]);
      delta = fmaf(to_float(dout[d]), to_float(out[d]), delta);
    }
  }
  delta = warp_sum(delta);
  finite = __all_sync(kFullMask, finite ? 1 : 0) != 0;
  if (lane != 0) return;
  const float lse = *a.lse.at(row, head);
  if (a.dlse.data != nullptr) delta -= *a.dlse.at(row, head);
  const float lse2 = lse == -infinity() ? infinity() : lse * kLog2E;
  a.stats[at] = RowStats{finite ? lse2 : quiet_nan(), delta};
}

// The feeder
// -------------------------------------------------------------------------------------------------------------

/// Feeds a tile: the visits [begin, end) of the item, of which those in [low, high) are of this chunk. A thread has a
/// query position and a row.
template <class T, int D, int kBlock, class Visits>
__device__ void feed_tile(const BackwardArguments<T, Visits>& a, const TensorMap& q_map, const TensorMap& dout_map,
                          std::byte* memory, std::uint32_t stage, std::uint64_t* full, const WorkItem& item,
                          std::int32_t begin, std::int32_t end, std::int32_t low, std::int32_t high) {
  using Memory = BackwardMemory<D, kBlock>;
  const std::int32_t thread = static_cast<std::int32_t>(threadIdx.x);
  const std::int32_t first_head = (a.first_head + item.kv_head) * a.group_size;

  // Every position gets its copy: what is not there comes as zeros from outside the tensor, so that a product over the
  // rows adds nothing for it.
  if (thread < a.positions) {
    const std::uint32_t box = static_cast<std::uint32_t>(a.group_size) * 128;
    ptx::expect_bytes(full, 2 * Memory::kColumns * box);
    const std::int32_t query = begin + thread < end ? a.visits.at(item, begin + thread).query : -1;
    std::byte* to = memory + Memory::kQueries + stage * 2 * Memory::kRowTile + static_cast<std::uint32_t>(thread) * box;
    for (std::uint32_t column = 0; column < Memory::kColumns; ++column, to += Memory::kRowColumn) {
      const std::int32_t c0 = static_cast<std::int32_t>(column * 64);
      ptx::tensor_load(to, q_map, full, c0, first_head, query);
      ptx::tensor_load(to + Memory::kRowTile, dout_map, full, c0, first_head, query);
    }
  }

  auto& rows = reinterpret_cast<typename Memory::Rows*>(memory + Memory::kTileRowsAt)[stage];
  std::int32_t flags = 0;
  if (thread < Memory::kRows) {
    const std::int32_t position = static_cast<std::int32_t>(static_cast<std::uint32_t>(thread) * a.reciprocal >> 16);
    const std::int32_t index = begin + position, member = thread - position * a.group_size;
    RowStats stats{infinity(), 0.0f};
    std::int32_t visible = 0, place = -1;
    if (position < a.positions && index < end) {
      const Visit visit = a.visits.at(item, index);
      stats = a.stats[std::int64_t{visit.query} * a.query_heads + first_head + member];
      visible = visit.slot_and_visible >> 8;
      const bool has_nan = stats.lse2 != stats.lse2;
      if (visible < kBlock) flags = Memory::Rows::kMasks | (has_nan ? Memory::Rows::kNotFinite : 0);
      if (index >= low && index < high) {
        place =
            (((visit.query - a.first_query) * a.kv_heads + item.kv_head) * a.topk + (visit.slot_and_visible & 0xff)) *
                a.group_size +
            member;
      }
    }
    rows.stats[thread] = stats;
    rows.visible[thread] = visible;
    rows.place[thread] = place;
  }
  const int masks = __any_sync(kFullMask, flags & Memory::Rows::kMasks);
  const int not_finite = __any_sync(kFullMask, flags & Memory::Rows::kNotFinite);
  if (thread % kWarpSize == 0) {
    rows.flags[thread / kWarpSize] =
        (masks != 0 ? Memory::Rows::kMasks : 0) | (not_finite != 0 ? Memory::Rows::kNotFinite : 0);
  }
  if (thread == 0) rows.adds_keys = end <= high ? 1 : 0;
  ptx::arrive(full);  // makes what was written above visible to those who wait for the tile
}

/// Has the copy engine bring an item's K and V. One thread.
template <class T, int D, int kBlock, class Visits>
__device__ void feed_keys(const BackwardArguments<T, Visits>& a, const TensorMap& k_map, const TensorMap& v_map,
                          std::byte* memory, std::uint64_t* full, const WorkItem& item) {
  using Memory = BackwardMemory<D, kBlock>;
  ptx::arrive_expect_bytes(full, 2 * Memory::kKeyTile);
  for (std::uint32_t column = 0; column < Memory::kColumns; ++column) {
    std::byte* to = memory + Memory::kKeys + column * Memory::kKeyColumn;
    const std::int32_t c0 = static_cast<std::int32_t>(column * 64), kv_head = a.first_head + item.kv_head;
    ptx::tensor_load(to, k_map, full, c0, kv_head, item.row, 0);
    ptx::tensor_load(to + Memory::kKeyTile, v_map, full, c0, kv_head, item.row, 0);
  }
}

/// Feeds items until there are none, then an item of count -1. A warpgroup calls it.
template <class T, int D, int kBlock, class Visits>
__device__ void feed_backward(const BackwardArguments<T, Visits>& a, const TensorMap& q_map, const TensorMap& k_map,
                              const TensorMap& v_map, const TensorMap& dout_map, std::byte* memory) {
  using Memory = BackwardMemory<D, kBlock>;
  const BackwardBarriers<Memory::kStages> barriers(memory + Memory::kBarriers);
  auto& next = *reinterpret_cast<std::int32_t*>(memory + Memory::kNextItem);
  Ring<1> keys;
  Ring<Memory::kStages> ring;
  for (;;) {
    ptx::named_sync(kFeedersBarrier, 128);  // all have read the last one
    if (threadIdx.x == 0) next = atomicAdd(&a.totals->next, 1);
    ptx::named_sync(kFeedersBarrier, 128);
    ItemHead head{};
    head.number = next;
    head.item.count = -1;
    std::int32_t low = 0, high = 0, tile = 0;
    if (head.number < a.totals->items) {
      head.item = a.items[head.number];
      head.item.count = a.visits.before(head.item, kNoQuery);
      low = a.visits.before(head.item, a.first_query);
      high = a.visits.before(head.item, a.first_query + a.queries);
      if (low == high) continue;
      tile = low / a.positions;
      head.tiles = ceil_div(high, a.positions) - tile;
      head.resumes = tile > 0 ? 1 : 0;
      head.stores = min_of((tile + 1) * a.positions, head.item.count) <= high ? 1 : 0;
    }
    if (threadIdx.x == 0) {
      ptx::wait(barriers.keys_empty, keys.parity ^ 1);
      *reinterpret_cast<ItemHead*>(memory + Memory::kItem) = head;
      if (head.item.count < 0) {
        ptx::arrive(barriers.keys_full);
      } else {
        feed_keys<T, D, kBlock>(a, k_map, v_map, memory, barriers.keys_full, head.item);
      }
    }
    keys.advance();
    if (head.item.count < 0) return;
    for (const std::int32_t last = tile + head.tiles; tile < last; ++tile, ring.advance()) {
      ptx::wait(barriers.rows_empty + ring.stage, ring.parity ^ 1);
      const std::int32_t begin = tile * a.positions;
      feed_tile<T, D, kBlock>(a, q_map, dout_map, memory, ring.stage, barriers.rows_full + ring.stage, head.item, begin,
                              min_of(begin + a.positions, head.item.count), low, high);
    }
  }
}

// The warpgroups that compute
// --------------------------------------------------------------------------------------------

/// Replaces what is not finite in K by zero and flags the keys: dq sums over all keys of the block, and 0 * NaN is NaN.
/// A row that sees such a key gets NaN by its probability. Both warpgroups call it.
template <class T, int D, int kBlock>
__device__ void remove_bad_keys(std::byte* keys, std::int32_t* bad, std::uint32_t thread) {
  for (std::uint32_t key = thread; key < kBlock; key += kConsumerThreads) bad[key] = 0;
  ptx::named_sync(kComputeBarrier, kConsumerThreads);
  zero_non_finite<T, D, kBlock>(keys, thread, kConsumerThreads,
                                [&](std::uint32_t, std::int32_t key, T) { bad[key] = 1; });
  ptx::fence_proxy_async();
  ptx::named_sync(kComputeBarrier, kConsumerThreads);
}

/// Zeroes q and dout of a tile's rows that have a NaN and do not see the whole block. Their
/// probabilities are NaN already, for the keys that they do see. Both warpgroups call it.
template <int D, int kBlock>
__device__ void remove_bad_rows(std::byte* queries, const typename BackwardMemory<D, kBlock>::Rows& rows,
                                std::uint32_t thread) {
  using Memory = BackwardMemory<D, kBlock>;
  for (std::uint32_t row = 0; row < Memory::kRows; ++row) {
    if (rows.stats[row].lse2 == rows.stats[row].lse2 || rows.visible[row] == kBlock) continue;
    for (std::uint32_t i = thread; i < 2 * Memory::kColumns * 8; i += kConsumerThreads) {
      *reinterpret_cast<uint4*>(queries + i / 8 * Memory::kRowColumn + row * 128 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
  }
  ptx::fence_proxy_async();
}

/// Makes P^T and dS^T of a tile of S^T and dP^T, packed as the next products take them. Element i: key 8 * (i / 2 % 2)
/// behind `key`, row 8 * (i / 4) + 2 * (lane % 4) + i % 2. key_scale is NaN for a key that is not finite.
template <class T, bool kMasks>
__device__ __forceinline__ void make_slopes(const float (&s)[32], const float (&dp)[32], const RowStats* stats,
                                            const std::int32_t* visible, std::int32_t key, const float (&key_scale)[2],
                                            std::uint32_t (&p)[4][4], std::uint32_t (&ds)[4][4]) {
  const std::uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (std::uint32_t j = 0; j < 8; ++j) {
    const std::uint32_t row = 8 * j + 2 * (lane % 4);
    const float4 two = *reinterpret_cast<const float4*>(stats + row);
    const float lse2[2] = {two.x, two.z}, delta[2] = {two.y, two.w};
    int2 seen = make_int2(0, 0);
    if (kMasks) seen = *reinterpret_cast<const int2*>(visible + row);
#pragma unroll
    for (std::uint32_t h = 0; h < 2; ++h) {
      float weight[2], slope[2];
#pragma unroll
      for (std::uint32_t i = 0; i < 2; ++i) {
        const std::uint32_t at = 4 * j + 2 * h + i;
        weight[i] = ptx::exp2_fast(fmaf(s[at], key_scale[h], -lse2[i]));
        slope[i] = weight[i] * (dp[at] - delta[i]);
        if (kMasks && key + static_cast<std::int32_t>(8 * h) >= (i == 0 ? seen.x : seen.y)) weight[i] = slope[i] = 0.0f;
      }
      p[j / 2][j % 2 * 2 + h] = pack_two<T>(weight[0], weight[1]);
      ds[j / 2][j % 2 * 2 + h] = pack_two<T>(slope[0], slope[1]);
    }
  }
}

/// The warpgroup's sums of dk and dv, and what it does with a tile.
template <class T, int D, int kBlock, class Visits>
struct BackwardWarpgroup {
  using Arguments = BackwardArguments<T, Visits>;
  using Memory = BackwardMemory<D, kBlock>;
  static constexpr bool kSplitsKeys = Memory::kTiles.splits_keys;
  static constexpr bool kSplitsColumns = kSplitsKeys && Memory::kRows == 64;  ///< of dq; else its rows

  float dk[D / 2], dv[D / 2];
  float key_scale[2];

  __device__ static std::uint32_t group() { return threadIdx.x / 128 - 1; }
  __device__ static std::uint32_t thread() { return threadIdx.x % 128; }
  __device__ static std::uint32_t first_key() { return kSplitsKeys ? group() * 64 : 0; }
  /// The first of the thread's two keys.
  __device__ static std::uint32_t own_key() {
    return first_key() + thread() / kWarpSize * 16 + threadIdx.x % kWarpSize / 4;
  }
  /// All who share dS^T.
  __device__ static void sync_slopes() {
    if constexpr (kSplitsKeys) {
      ptx::named_sync(kSlopesBarrier, kConsumerThreads);
    } else {
      if (group() == 0) {
        ptx::named_sync(kSlopesBarrier, 128);
      } else {
        ptx::named_sync(kSlopesBarrier + 1, 128);
      }
    }
  }

  /// Sums of an item from where an earlier chunk left them, or zero.
  __device__ __forceinline__ void start(const Arguments& a, const ItemHead& head, const std::int32_t* bad_keys) {
    const float2* from = slot(a, head);
    key_scale[0] = bad_keys[own_key()] != 0 ? quiet_nan() : a.scale_log2;
    key_scale[1] = bad_keys[own_key() + 8] != 0 ? quiet_nan() : a.scale_log2;
#pragma unroll
    for (int i = 0; i < D / 2; i += 2) {
      const float2 zero = make_float2(0, 0);
      const float2 k = head.resumes != 0 ? from[pair_at(0, i)] : zero;
      const float2 v = head.resumes != 0 ? from[pair_at(1, i)] : zero;
      dk[i] = k.x;
      dk[i + 1] = k.y;
      dv[i] = v.x;
      dv[i + 1] = v.y;
    }
  }
  __device__ __forceinline__ void finish(const Arguments& a, const ItemHead& head) const {
    if (head.stores == 0) return;
    float2* to = slot(a, head);
#pragma unroll
    for (int i = 0; i < D / 2; i += 2) {
      to[pair_at(0, i)] = make_float2(dk[i], dk[i + 1]);
      to[pair_at(1, i)] = make_float2(dv[i], dv[i + 1]);
    }
  }
  __device__ static float2* slot(const Arguments& a, const ItemHead& head) {
    return reinterpret_cast<float2*>(a.sums + head.number * Memory::kTiles.slot_floats) + threadIdx.x - 128;
  }
  /// Of dk (0) or dv (1): element i and the next one among the thread's; neighbouring threads lie together.
  __device__ static constexpr int pair_at(int which, int i) {
    return (which * (D / 4) + i / 2) * static_cast<int>(kConsumerThreads);
  }

  /// `slopes`: where dS^T goes, a tile of 64 query rows each.
  __device__ __forceinline__ void take_tile(const Arguments& a, bool masks, const std::byte* keys,
                                            const std::byte* queries, const typename Memory::Rows& rows,
                                            std::byte* slopes) {
    if constexpr (kSplitsKeys) {
#pragma unroll
      for (std::uint32_t part = 0; part < Memory::kRows / 64; ++part)
        take_rows(masks, keys, queries, rows, slopes, part);
    } else {
      take_rows(masks, keys, queries, rows, slopes, group());
    }
    if constexpr (!Visits::kWritesDq) return;
    ptx::fence_proxy_async();
    sync_slopes();
    if constexpr (kSplitsColumns) {
      write_dq(a, keys, slopes, rows, 0, group());
    } else {
      for (std::uint32_t column = 0; column < Memory::kColumns; ++column) {
        write_dq(a, keys, slopes, rows, group(), column);
      }
    }
  }

  /// Rows [64 part, 64 part + 64) against the warpgroup's 64 keys.
  __device__ __forceinline__ void take_rows(bool masks, const std::byte* keys, const std::byte* queries,
                                            const typename Memory::Rows& rows, std::byte* slopes, std::uint32_t part) {
    const std::byte* q = queries + part * 64 * 128;
    const std::byte* dout = q + Memory::kRowTile;
    // S^T and dP^T [64 keys, 64 rows], 16 of the head dimension a step.
    float s[32], dp[32];
    ptx::fence_registers(s);
    ptx::fence_registers(dp);
    ptx::wgmma_fence();
    multiply_keys(s, keys, q);
    multiply_keys(dp, keys + Memory::kKeyTile, dout);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(s);
    ptx::fence_registers(dp);
    std::uint32_t p[4][4], ds[4][4];
    const auto key = static_cast<std::int32_t>(own_key());
    const RowStats* stats = rows.stats + part * 64;
    if (masks) {
      make_slopes<T, true>(s, dp, stats, rows.visible + part * 64, key, key_scale, p, ds);
    } else {
      make_slopes<T, false>(s, dp, stats, nullptr, key, key_scale, p, ds);
    }
    if constexpr (Visits::kWritesDq) store_slopes(ds, slopes + part * Memory::kSlopeTile);
    if (rows.adds_keys == 0) return;
    ptx::fence_registers(dv);
    ptx::fence_registers(dk);
    ptx::wgmma_fence();
    add_rows(dv, p, dout);
    add_rows(dk, ds, q);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(dv);
    ptx::fence_registers(dk);
  }

  /// dS^T for dq, 16 bytes of a key by a quad of lanes; eight keys and four lanes touch 32 banks.
  __device__ __forceinline__ static void store_slopes(const std::uint32_t (&ds)[4][4], std::byte* tile) {
#pragma unroll
    for (std::uint32_t j = 0; j < 8; ++j) {
#pragma unroll
      for (std::uint32_t h = 0; h < 2; ++h) {
        const std::uint32_t offset = (own_key() + 8 * h) * 128 + 16 * j + threadIdx.x % 4 * 4;
        *reinterpret_cast<std::uint32_t*>(tile + swizzled(offset, Swizzle::k128)) = ds[j / 2][j % 2 * 2 + h];
      }
    }
  }
  /// Starts d = A B^T, 64 keys by 64 rows.
  __device__ __forceinline__ static void multiply_keys(float (&d)[32], const std::byte* keys, const std::byte* rows) {
    const std::uint64_t a = ptx::matrix_descriptor(keys + first_key() * 128, 16, 1024, Swizzle::k128);
    const std::uint64_t b = ptx::matrix_descriptor(rows, 16, 1024, Swizzle::k128);
#pragma unroll
    for (std::uint32_t step = 0; step < D / 16; ++step) {
      ptx::wgmma<64, T>(d, ptx::advance(a, step / 4 * Memory::kKeyColumn + step % 4 * 32),
                        ptx::advance(b, step / 4 * Memory::kRowColumn + step % 4 * 32), step > 0);
    }
    ptx::wgmma_commit();
  }
  /// Starts d += weights B, 16 rows a step; B's rows are query rows, so it is its outer dimension that is contiguous.
  __device__ __forceinline__ static void add_rows(float (&d)[D / 2], const std::uint32_t (&weights)[4][4],
                                                  const std::byte* rows) {
    const std::uint64_t b = ptx::matrix_descriptor(rows, Memory::kRowColumn, 1024, Swizzle::k128);
#pragma unroll
    for (std::uint32_t step = 0; step < 4; ++step) {
      ptx::wgmma<D, T, ptx::Major::kOuter>(d, weights[step], ptx::advance(b, step * 16 * 128), true);
    }
    ptx::wgmma_commit();
  }
  /// dq of rows [64 part, 64 part + 64), 64 columns: dS K, 16 keys a step, both by their outer dimension.
  __device__ __forceinline__ static void write_dq(const Arguments& a, const std::byte* keys, const std::byte* slopes,
                                                  const typename Memory::Rows& rows, std::uint32_t part,
                                                  std::uint32_t column) {
    float dq[32];
    const std::uint64_t ds =
        ptx::matrix_descriptor(slopes + part * Memory::kSlopeTile, Memory::kSlopeTile, 1024, Swizzle::k128);
    const std::uint64_t k =
        ptx::matrix_descriptor(keys + column * Memory::kKeyColumn, Memory::kKeyColumn, 1024, Swizzle::k128);
    ptx::fence_registers(dq);
    ptx::wgmma_fence();
#pragma unroll
    for (std::uint32_t step = 0; step < kBlock / 16; ++step) {
      ptx::wgmma<64, T, ptx::Major::kOuter, ptx::Major::kOuter>(dq, ptx::advance(ds, step * 16 * 128),
                                                                ptx::advance(k, step * 16 * 128), step > 0);
    }
    ptx::wgmma_commit();
    const std::uint32_t lane = threadIdx.x % kWarpSize;
    std::int32_t places[2];
#pragma unroll
    for (std::uint32_t h = 0; h < 2; ++h) {
      places[h] = rows.place[part * 64 + thread() / kWarpSize * 16 + lane / 4 + 8 * h];
    }
    ptx::wgmma_wait<0>();
    ptx::fence_registers(dq);
#pragma unroll
    for (std::uint32_t h = 0; h < 2; ++h) {
      if (places[h] < 0) continue;
      auto* to = reinterpret_cast<uint4*>(a.partial + std::int64_t{places[h]} * D + lane % 4 * (D / 4) + column * 16);
      std::uint32_t words[8];
#pragma unroll
      for (std::uint32_t j = 0; j < 8; ++j) {
        words[j] = pack_two<T>(dq[4 * j + 2 * h] * a.scale, dq[4 * j + 2 * h + 1] * a.scale);
      }
      to[0] = make_uint4(words[0], words[1], words[2], words[3]);
      to[1] = make_uint4(words[4], words[5], words[6], words[7]);
    }
  }
};

template <class T, int D, int kBlock, class Visits>
__device__ __forceinline__ void compute_backward(const BackwardArguments<T, Visits>& a, std::byte* memory) {
  using Memory = BackwardMemory<D, kBlock>;
  using Warpgroup = BackwardWarpgroup<T, D, kBlock, Visits>;
  const BackwardBarriers<Memory::kStages> barriers(memory + Memory::kBarriers);
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  std::byte* keys = memory + Memory::kKeys;
  auto* bad_keys = reinterpret_cast<std::int32_t*>(memory + Memory::kBadKeys);
  Warpgroup warpgroup;
  Ring<1> item_ring;
  Ring<Memory::kStages> ring;
  std::uint32_t slopes_at = 0;
  for (;; item_ring.advance()) {
    ptx::wait(barriers.keys_full, item_ring.parity);
    const ItemHead head = *reinterpret_cast<const ItemHead*>(memory + Memory::kItem);
    if (head.item.count < 0) return;
    remove_bad_keys<T, D, kBlock>(keys, bad_keys, threadIdx.x - 128);
    warpgroup.start(a, head, bad_keys);
    for (std::int32_t tile = 0; tile < head.tiles; ++tile, ring.advance()) {
      ptx::wait(barriers.rows_full + ring.stage, ring.parity);
      std::byte* queries = memory + Memory::kQueries + ring.stage * 2 * Memory::kRowTile;
      const auto& rows = reinterpret_cast<const typename Memory::Rows*>(memory + Memory::kTileRowsAt)[ring.stage];
      const std::int32_t flags = rows.flags[0] | rows.flags[1] | rows.flags[2] | rows.flags[3];
      if ((flags & Memory::Rows::kNotFinite) != 0) {
        remove_bad_rows<D, kBlock>(queries, rows, threadIdx.x - 128);
        ptx::named_sync(kComputeBarrier, kConsumerThreads);
      }
      // Two tiles of dS^T take turns, so that one meeting a tile is enough: who writes one has met those who read it.
      std::byte* slopes = memory + Memory::kSlopes + slopes_at * Memory::kSlopeTiles * Memory::kSlopeTile;
      slopes_at ^= 1;
      warpgroup.take_tile(a, (flags & Memory::Rows::kMasks) != 0, keys, queries, rows, slopes);
      __syncwarp();
      if (lane == 0) ptx::arrive(barriers.rows_empty + ring.stage);
    }
    if (lane == 0) ptx::arrive(barriers.keys_empty);
    warpgroup.finish(a, head);
  }
}

template <class T, int D, int kBlock, class Visits>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    attend_blocks_backward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                           const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dout_map,
                           BackwardArguments<T, Visits> a) {
  using Memory = BackwardMemory<D, kBlock>;
  std::byte* memory = shared_memory();
  const BackwardBarriers<Memory::kStages> barriers(memory + Memory::kBarriers);
  // Rows of a tile that no position fills (64 is no multiple of the group size) stay zero.
  for (std::uint32_t i = threadIdx.x; i < Memory::kStages * 2 * Memory::kRowTile / 16; i += kBackwardThreads) {
    reinterpret_cast<uint4*>(memory + Memory::kQueries)[i] = make_uint4(0, 0, 0, 0);
  }
  if (threadIdx.x == 0) {
    ptx::barrier_init(barriers.keys_full, 1);
    ptx::barrier_init(barriers.keys_empty, kConsumerWarps);
    for (std::uint32_t stage = 0; stage < Memory::kStages; ++stage) {
      ptx::barrier_init(barriers.rows_full + stage, 128);
      ptx::barrier_init(barriers.rows_empty + stage, kConsumerWarps);
    }
    ptx::fence_barrier_init();
  }
  ptx::fence_proxy_async();
  __syncthreads();
  // 65536 registers: 128 * 40 + 256 * 232 = 64512.
  if (threadIdx.x < 128) {
    ptx::lower_registers<40>();
    feed_backward<T, D, kBlock>(a, q_map, k_map, v_map, dout_map, memory);
  } else {
    ptx::raise_registers<232>();
    compute_backward<T, D, kBlock>(a, memory);
  }
}

// After: sums in ascending order
// ---------------------------------------------------------------------------------------------

template <class T>
struct QueryGradientArguments {
  BatchView batch;
  Strided<const std::int32_t> blocks;  ///< of the heads in work
  const T* partial;                    ///< as BackwardArguments::partial
  Strided<T> dq;
  std::int32_t first_query, queries;
  std::int32_t first_head, kv_heads;
  std::int32_t group_size, topk, block_size;
};

/// dq of the chunk's queries: the partial ones of a row's slots, ascending. One warp a (query, head).
template <class T, int D>
__global__ void __launch_bounds__(kRowWarps* kWarpSize) sum_query_gradients(QueryGradientArguments<T> a) {
  constexpr std::int32_t kEntries = D / kWarpSize;  // a lane: 2 or 4
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::int32_t heads = a.kv_heads * a.group_size;
  const std::int64_t row = std::int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarpSize;
  if (row >= std::int64_t{a.queries} * heads) return;
  const std::int32_t local = static_cast<std::int32_t>(row / heads), head = static_cast<std::int32_t>(row % heads);
  const std::int32_t kv_head = head / a.group_size, member = head % a.group_size;
  const std::int32_t query = a.first_query + local;
  const T* partial = a.partial + (((std::int64_t{local} * a.kv_heads + kv_head) * a.topk) * a.group_size + member) * D +
                     lane * kEntries;
  const std::uint64_t valid = visited_slots(a.batch, a.blocks, kv_head, query, a.topk, a.block_size);
  float sums[kEntries] = {};
  for (std::int32_t slot = 0; slot < a.topk; ++slot) {
    if ((valid >> slot & 1) == 0) continue;
    const auto* words = reinterpret_cast<const std::uint32_t*>(partial + std::int64_t{slot} * a.group_size * D);
    std::uint32_t loaded[kEntries / 2];
    if constexpr (kEntries == 4) {
      const uint2 both = *reinterpret_cast<const uint2*>(words);
      loaded[0] = both.x;
      loaded[1] = both.y;
    } else {
      loaded[0] = *words;
    }
#pragma unroll
    for (std::int32_t i = 0; i < kEntries; ++i) {
      sums[i] += to_float(T{static_cast<std::uint16_t>(loaded[i / 2] >> (16 * (i % 2)))});
    }
  }
  T* dq = a.dq.at(query, a.first_head * a.group_size + head);
#pragma unroll
  for (std::int32_t i = 0; i < kEntries; ++i) dq[quad_column<D>(lane * kEntries + i)] = from_float<T>(sums[i]);
}

template <class T>
struct KeyGradientArguments {
  BatchView batch;
  const WorkItem* items;
  const WorkTotals* totals;
  const Visit* visits;  ///< in order; only where a list has several pieces
  const float* sums;
  Strided<T> dk, dv;
  std::int32_t first_head;
  float scale;
};

/// dk and dv of a block: the sums of its pieces, ascending. One block of kConsumerThreads an item; the first of a list
/// does the work.
template <class T, int D, int kBlock>
__global__ void __launch_bounds__(kConsumerThreads) write_key_gradients(KeyGradientArguments<T> a) {
  using Memory = BackwardMemory<D, kBlock>;
  constexpr bool kSplitsKeys = Memory::kTiles.splits_keys;
  constexpr std::uint32_t kPairs = D / 4;  // of dk, and of dv
  if (static_cast<std::int32_t>(blockIdx.x) >= a.totals->items) return;
  const WorkItem item = a.items[blockIdx.x];
  if (item.piece != 0 || item.count == 0) return;
  std::int32_t pieces = item.pieces;  // but for those that are padding and nothing else: nobody wrote their sums
  while (pieces > 1 && a.visits[a.items[blockIdx.x + pieces - 1].first].query == kNoQuery) --pieces;
  std::int32_t low = 0, high = a.batch.sequences;  // the first sequence that ends behind the block's first key
  while (low < high) {
    const std::int32_t middle = low + (high - low) / 2;
    if (a.batch.cu_seqlens_k[middle + 1] > item.row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const std::int32_t keys = a.batch.cu_seqlens_k[low + 1] - item.row;
  // Where each warpgroup has rows of its own, both have sums of all keys, and share the work here.
  const std::uint32_t owner = kSplitsKeys ? threadIdx.x : threadIdx.x % 128;
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  for (std::uint32_t pair = kSplitsKeys ? 0 : threadIdx.x / 128; pair < 2 * kPairs; pair += kSplitsKeys ? 1 : 2) {
    float2 sum = make_float2(0, 0);
    const auto add = [&](std::int32_t piece, std::uint32_t thread) {
      const float2* from =
          reinterpret_cast<const float2*>(a.sums + (std::int64_t{blockIdx.x} + piece) * Memory::kTiles.slot_floats);
      const float2 part = from[pair * kConsumerThreads + thread];
      sum.x += part.x;
      sum.y += part.y;
    };
    for (std::int32_t piece = 0; piece < pieces; ++piece) {
      add(piece, owner);
      if (!kSplitsKeys) add(piece, owner + 128);
    }
    const std::uint32_t i = pair % kPairs;
    const std::uint32_t key = owner / kWarpSize * 16 + lane / 4 + i % 2 * 8;
    if (static_cast<std::int32_t>(key) >= keys) continue;
    const bool is_dv = pair >= kPairs;
    const float factor = is_dv ? 1.0f : a.scale;
    T* to = (is_dv ? a.dv : a.dk).at(item.row + static_cast<std::int32_t>(key), a.first_head + item.kv_head);
    to += i / 2 * 8 + lane % 4 * 2;
    to[0] = from_float<T>(sum.x * factor);
    to[1] = from_float<T>(sum.y * factor);
  }
}

/// Zeroes rows [*first, rows) of [rows, heads, D], all of them without `first`; a warp a row and head.
template <class T, int D>
__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    clear_rows(Strided<T> tensor, const std::int32_t* first, std::int64_t rows, std::int32_t heads) {
  const std::int64_t at = std::int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarpSize;
  if (at >= rows * heads || (first != nullptr && at / heads < *first)) return;
  T* row = tensor.at(at / heads, at % heads);
  for (unsigned d = threadIdx.x % kWarpSize; d < D; d += kWarpSize) row[d] = T{0};
}

// The call
// -------------------------------------------------------------------------------------------------------------

inline dim3 row_grid(std::int64_t rows) { return dim3(static_cast<unsigned>(ceil_div(rows, std::int64_t{kRowWarps}))); }

/// Zeroes dk and dv, and finds what the kernels want of the rows.
template <class T, int D>
RowStatsArguments<T> prepare_backward(const Context& context, const SparseAttentionParams& params,
                                      const AttentionBackwardPlan& plan, const AttentionSaved& saved,
                                      const AttentionGrads& grads) {
  const std::int64_t key_rows = params.k.size(0), kv_heads = params.k.size(1);
  const dim3 warps(kRowWarps * kWarpSize);
  const std::int32_t* all = nullptr;
  for (const TensorView* tensor : {&grads.dk, &grads.dv}) {
    launch(row_grid(key_rows * kv_heads), warps, 0, context.stream, clear_rows<T, D>, strided<T>(*tensor), all,
           key_rows, static_cast<std::int32_t>(kv_heads));
  }
  RowStatsArguments<T> stats{};
  stats.q = strided<T>(params.q);
  stats.out = strided<T>(saved.out);
  stats.dout = strided<T>(saved.dout);
  stats.lse = strided<float>(saved.lse);
  if (!saved.dlse.empty()) stats.dlse = strided<float>(saved.dlse);
  stats.stats = reinterpret_cast<RowStats*>(static_cast<std::byte*>(context.workspace) + plan.stats);
  stats.rows = params.q.size(0);
  stats.query_heads = static_cast<std::int32_t>(params.q.size(1));
  launch(row_grid(stats.rows * stats.query_heads), warps, 0, context.stream, row_stats<T, D>, stats);
  return stats;
}

/// What the index of a call's blocks is, but for the heads in work.
inline ReverseIndex backward_index(const Context& context, const SparseAttentionParams& params,
                                   const AttentionBackwardPlan& plan) {
  std::byte* workspace = static_cast<std::byte*>(context.workspace);
  ReverseIndex index{};
  index.batch = view_of(params.batch);
  index.block_size = static_cast<std::int32_t>(params.block_size);
  index.queries = static_cast<std::int32_t>(params.q.size(0));
  index.blocks_bound = static_cast<std::int32_t>(plan.blocks_bound);
  index.visits_per_item = static_cast<std::int32_t>(plan.visits_per_piece);
  index.counts = reinterpret_cast<std::int32_t*>(workspace + plan.counts);
  index.partial = reinterpret_cast<std::int32_t*>(workspace + plan.partial_flags);
  index.totals = reinterpret_cast<WorkTotals*>(workspace + plan.totals);
  index.visits = reinterpret_cast<Visit*>(workspace + plan.visits);
  index.items = reinterpret_cast<WorkItem*>(workspace + plan.items);
  return index;
}

template <class T, class Visits>
BackwardArguments<T, Visits> backward_arguments(const Context& context, const SparseAttentionParams& params,
                                                const AttentionBackwardPlan& plan, const ReverseIndex& index) {
  std::byte* workspace = static_cast<std::byte*>(context.workspace);
  BackwardArguments<T, Visits> a{};
  a.items = index.items;
  a.totals = index.totals;
  a.stats = reinterpret_cast<const RowStats*>(workspace + plan.stats);
  a.sums = reinterpret_cast<float*>(workspace + plan.sums);
  a.queries = index.queries;
  a.query_heads = static_cast<std::int32_t>(params.q.size(1));
  a.group_size = static_cast<std::int32_t>(params.q.size(1) / params.k.size(1));
  a.positions = static_cast<std::int32_t>(plan.positions_per_tile);
  a.reciprocal = ceil_div(65536u, static_cast<std::uint32_t>(a.group_size));
  a.scale = static_cast<float>(*params.scale);
  a.scale_log2 = static_cast<float>(*params.scale * 1.4426950408889634);
  return a;
}

/// The four tensors as the copy engine takes them. Without a key there is nothing a map could describe.
struct BackwardMaps {
  TensorMap q, k, v, dout;
};
template <int kBlock>
BackwardMaps map_backward(const SparseAttentionParams& params, const AttentionSaved& saved) {
  const std::int64_t group_size = params.q.size(1) / params.k.size(1);
  return {map_queries(params.q, group_size, 1), map_keys(params.k, false, kBlock), map_keys(params.v, false, kBlock),
          map_queries(saved.dout, group_size, 1)};
}

/// dk and dv of the heads in work.
template <class T, int D, int kBlock>
void finish_key_gradients(const Context& context, const AttentionBackwardPlan& plan, const ReverseIndex& index,
                          const AttentionGrads& grads, const float* sums, std::int32_t first_head, float scale) {
  KeyGradientArguments<T> keys{};
  keys.batch = index.batch;
  keys.items = index.items;
  keys.totals = index.totals;
  keys.visits = reinterpret_cast<const Visit*>(static_cast<std::byte*>(context.workspace) + plan.sorted);
  keys.sums = sums;
  keys.dk = strided<T>(grads.dk);
  keys.dv = strided<T>(grads.dv);
  keys.first_head = first_head;
  keys.scale = scale;
  launch(dim3(static_cast<unsigned>(plan.max_items)), dim3(kConsumerThreads), 0, context.stream,
         write_key_gradients<T, D, kBlock>, keys);
}

/// The lists of the heads in work, in order.
inline void list_visitors(const Context& context, const AttentionBackwardPlan& plan, const ReverseIndex& index,
                          Visit* sorted) {
  void* stream = context.stream;
  clear_memory(stream, static_cast<std::byte*>(context.workspace) + plan.totals, plan.zero_end - plan.totals);
  const dim3 grid(ceil_div(static_cast<unsigned>(index.queries), kIndexThreads), static_cast<unsigned>(index.kv_heads));
  launch(grid, dim3(kIndexThreads), 0, stream, count_visits, index);
  launch(dim3(1), dim3(kPlanThreads), kPlanThreads * 8, stream, plan_items, index);
  launch(grid, dim3(kIndexThreads), 0, stream, place_visits, index);
  launch(dim3(static_cast<unsigned>(index.kv_heads * index.blocks_bound)), dim3(kIndexThreads),
         sort_shared_bytes(index.queries, kSortSpan), stream, sort_visits, index, sorted, kSortSpan);
}

/// run_attention_backward of one instantiation; `thread_blocks` of the persistent kernel, one a multiprocessor.
template <class T, int D, int kBlock>
void run_fast_backward(const Context& context, const SparseAttentionParams& params, const AttentionBackwardPlan& plan,
                       const AttentionSaved& saved, const AttentionGrads& grads, unsigned thread_blocks) {
  const std::int64_t rows = params.q.size(0), kv_heads = params.k.size(1);
  const bool has_keys = params.k.size(0) > 0;
  std::byte* workspace = static_cast<std::byte*>(context.workspace);
  prepare_backward<T, D>(context, params, plan, saved, grads);
  if (rows == 0) return;

  ReverseIndex index = backward_index(context, params, plan);
  index.topk = static_cast<std::int32_t>(params.blocks.size(2));
  auto* sorted = reinterpret_cast<Visit*>(workspace + plan.sorted);

  auto backward = backward_arguments<T, ListedVisits>(context, params, plan, index);
  backward.visits = {sorted};
  backward.partial = reinterpret_cast<T*>(workspace + plan.partial);
  backward.topk = index.topk;

  QueryGradientArguments<T> queries{};
  queries.batch = index.batch;
  queries.partial = backward.partial;
  queries.dq = strided<T>(grads.dq);
  queries.group_size = backward.group_size;
  queries.topk = index.topk;
  queries.block_size = kBlock;

  const BackwardMaps maps = has_keys ? map_backward<kBlock>(params, saved) : BackwardMaps{};
  for (std::int64_t head = 0; head < kv_heads; head += plan.heads_at_once) {
    const std::int64_t heads = min_of(plan.heads_at_once, kv_heads - head);
    index.blocks = strided<std::int32_t>(params.blocks);
    index.blocks.data += head * index.blocks.strides[0];
    queries.blocks = index.blocks;
    index.kv_heads = backward.kv_heads = queries.kv_heads = static_cast<std::int32_t>(heads);
    backward.first_head = queries.first_head = static_cast<std::int32_t>(head);
    if (has_keys) list_visitors(context, plan, index, sorted);
    for (std::int64_t first = 0; first < rows; first += plan.queries_at_once) {
      const std::int64_t count = min_of(plan.queries_at_once, rows - first);
      backward.first_query = queries.first_query = static_cast<std::int32_t>(first);
      backward.queries = queries.queries = static_cast<std::int32_t>(count);
      if (has_keys) {
        clear_memory(context.stream, &index.totals->next, sizeof(index.totals->next));
        launch(dim3(thread_blocks), dim3(kBackwardThreads), BackwardMemory<D, kBlock>::kBytes, context.stream,
               attend_blocks_backward<T, D, kBlock, ListedVisits>, maps.q, maps.k, maps.v, maps.dout, backward);
      }
      launch(row_grid(count * heads * backward.group_size), dim3(kRowWarps * kWarpSize), 0, context.stream,
             sum_query_gradients<T, D>, queries);
    }
    if (has_keys) {
      finish_key_gradients<T, D, kBlock>(context, plan, index, grads, backward.sums, backward.first_head,
                                         backward.scale);
    }
  }
}

}  // namespace msa::cuda
