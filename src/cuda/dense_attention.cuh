// SPDX-License-Identifier: Apache-2.0
// Attention over the whole visible prefix: tiles of 128 query rows, some neighbouring positions times the heads of one
// kv head, against one tile of 128 keys after the other. One warp feeds, two warpgroups of 64 rows compute S = Q K^T,
// a running softmax and O += P V, with the next S under way while a tile's softmax is taken. The softmax starts anew
// at every span of keys and the spans are merged in ascending order, in shared memory, or, where there are too few
// tiles to go round, by merge_spans: the same arithmetic, so that a decode step and a prefill agree bit for bit. A
// row's bits depend on its query and its keys alone. docs/cuda-dense-attention.md has the bounds and a picture. Tested
// in tests/cuda/dense_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "msa/context.h"
#include "src/cuda/attention_maps.cuh"
#include "src/cuda/attention_tile.cuh"
#include "src/cuda/batch.cuh"
#include "src/cuda/dense_attention.h"
#include "src/cuda/finite_values.cuh"
#include "src/cuda/float8_tile.cuh"
#include "src/cuda/tile_ring.cuh"

namespace msa::cuda {

/// Neighbouring query rows of one sequence and a stretch of its keys; for every kv head.
struct alignas(16) DenseItem {
  std::int32_t first_query, count;  ///< count -1: there is no more
  std::int32_t sequence;            ///< -1: rows behind the last one
  std::int32_t first_key, end;      ///< end: behind the last key that a row of it sees
  std::int32_t whole;               ///< keys below it are seen by every row
  std::int32_t offset;              ///< of a row's position from its number, where positions are not given
  std::int32_t kv_head;             ///< filled in by who takes the item
};
struct DenseTotals {
  std::int32_t items;
  std::int32_t next;  ///< first pair (item, kv head) nobody took yet
};

// The order of work
// -----------------------------------------------------------------------------------------------------

inline constexpr int kOrderThreads = 1024;

struct DenseOrder {
  BatchView batch;
  DenseItem* items;
  DenseTotals* totals;
  std::int32_t first_query, queries;  ///< of this chunk
  std::int32_t positions;             ///< a tile
  std::int32_t span_keys;             ///< an item; beyond every length: items take all keys
  std::int32_t most_items;            ///< the room of the list, which unchecked sequence bounds cannot overrun
  std::int32_t bucket_shift;          ///< key tiles >> bucket_shift is less than kOrderThreads
  bool is_split;                      ///< items are spans; a tile without keys needs none
};

/// body(item) for the tiles that begin at this thread's query rows.
template <class Body>
__device__ void for_each_item(const DenseOrder& a, const Body& body) {
  const std::int32_t chunk_end = a.first_query + a.queries;
  for (std::int32_t row = a.first_query + static_cast<std::int32_t>(threadIdx.x); row < chunk_end;
       row += kOrderThreads) {
    const std::int32_t s = a.batch.sequence_of(row);
    const std::int32_t begin = max_of(a.first_query, s < 0 ? a.batch.queries() : a.batch.cu_seqlens_q[s]);
    if ((row - begin) % a.positions != 0) continue;
    const std::int32_t end = s < 0 ? chunk_end : min_of(chunk_end, a.batch.cu_seqlens_q[s + 1]);
    DenseItem item{};
    item.first_query = row;
    item.count = min_of(a.positions, end - row);
    item.sequence = s;
    item.whole = a.batch.place(row).position + 1;
    if (s >= 0) item.offset = a.batch.keys(s) - a.batch.cu_seqlens_q[s + 1];
    const std::int32_t keys = a.batch.place(row + item.count - 1).position + 1;
    if (keys == 0 && !a.is_split) body(item);  // its rows are written all the same
    for (std::int32_t key = 0; key < keys; key += a.span_keys) {
      item.first_key = key;
      item.end = keys - key < a.span_keys ? keys : key + a.span_keys;
      body(item);
    }
  }
}

/// One block of threads: lists the items, those with most keys first, so that the last to finish are short ones.
/// Among about equals the order is whatever the threads make it; no result depends on it.
[[maybe_unused]] static __global__ void __launch_bounds__(kOrderThreads) order_items(DenseOrder a) {
  __shared__ std::int32_t places[kOrderThreads];
  const std::int32_t thread = static_cast<std::int32_t>(threadIdx.x);
  const auto bucket_of = [&](const DenseItem& item) {
    const std::int32_t tiles = ceil_div(item.end - item.first_key, static_cast<std::int32_t>(kDenseTileKeys));
    return max_of(0, kOrderThreads - 1 - (tiles >> a.bucket_shift));
  };
  places[thread] = 0;
  __syncthreads();
  for_each_item(a, [&](const DenseItem& item) { atomicAdd(places + bucket_of(item), 1); });
  __syncthreads();
  const std::int32_t own = places[thread];
  for (std::int32_t step = 1; step < kOrderThreads; step *= 2) {
    const std::int32_t more = thread >= step ? places[thread - step] : 0;
    __syncthreads();
    places[thread] += more;
    __syncthreads();
  }
  if (thread == kOrderThreads - 1) *a.totals = {min_of(places[thread], a.most_items), 0};
  const std::int32_t before = places[thread] - own;
  __syncthreads();
  places[thread] = before;
  __syncthreads();
  for_each_item(a, [&](const DenseItem& item) {
    const std::int32_t place = atomicAdd(places + bucket_of(item), 1);
    if (place < a.most_items) a.items[place] = item;
  });
}

// Attention
// -------------------------------------------------------------------------------------------------------------

inline constexpr unsigned kDenseThreads = 384;  // a warpgroup that feeds, two that compute
inline constexpr std::uint32_t kDenseConsumers = 256, kDenseConsumerWarps = 8;
inline constexpr std::uint32_t kWidenWarps = 3;  // of the feeding warpgroup, for float8
inline constexpr float kDenseLn2 = 0.6931471805599453f;

template <class T>
struct DenseArguments {
  BatchView batch;
  const DenseItem* items;
  DenseTotals* totals;
  Strided<T> out;
  Strided<float> lse;
  float* partial;  ///< [queries, query_heads, max_spans, D] of this chunk, not normalised; null: whole rows are written
  float2* states;  ///< the same without D: largest exponent and sum of exponentials
  std::int32_t first_query;
  std::int32_t kv_heads, group_size;
  std::int32_t span_keys, max_spans;
  std::int32_t page;       ///< tokens a page; 0 when packed
  std::int32_t copy_keys;  ///< keys of one copy: a divisor of a tile and of a page
  float scale_log2;        ///< |scale| * log2(e), positive: a row's largest score has the largest exponent
  float sign;              ///< what scores are multiplied by before: 1, or -1 or 0 as the scale's sign
  bool out_is_aligned;     ///< to 16 bytes, every row
};

/// Where things lie in shared memory, in bytes. kWidens: keys and values come as float8, and are widened on the way.
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
  static constexpr std::uint32_t kFirstNonFinite = kItem + sizeof(DenseItem);  ///< two: [D] keys, then a flag
  static constexpr std::uint32_t kStoredEnd = kFirstNonFinite + 2 * (D + 1) * 4;
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

/// Starts the copies of the tile of keys or values that begins at `key`, when its stage is free. All lanes of a warp
/// call it. Float8 comes in whole rows, 16-bit types in columns of 64.
template <int D, bool kWidens, class T, class Ring>
__device__ __forceinline__ void load_tile(const DenseArguments<T>& a, const DenseItem& item, const TensorMap& map,
                                          std::int32_t key, const Ring& ring, std::uint32_t number) {
  constexpr std::uint32_t kColumns = kWidens ? 1 : D / 64, kRowBytes = kWidens ? D : 128;
  ring.wait_free(number);
  std::uint64_t* full = ring.full(number);
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  // Copies that would begin behind the last key are left out: the page table has no entry there.
  const std::int32_t keys = min_of(item.end - key, static_cast<std::int32_t>(kDenseTileKeys));
  const std::int32_t copies = ceil_div(keys, a.copy_keys);
  if (lane == 0)
    ptx::arrive_expect_bytes(full, static_cast<std::uint32_t>(copies * a.copy_keys) * kColumns * kRowBytes);
  __syncwarp();
#pragma unroll 1
  for (std::int32_t i = lane; i < copies; i += kWarpSize) {
    const std::int32_t at = key + i * a.copy_keys;
    std::int32_t page = 0, row = at;
    if (a.page > 0) {
      const std::int32_t slot = at / a.page;
      // What is no page of the tensor comes as zeros.
      page = slot < a.batch.max_pages ? a.batch.page_table[std::int64_t{item.sequence} * a.batch.max_pages + slot] : -1;
      row = at % a.page;
    } else {
      row += a.batch.cu_seqlens_k[item.sequence];
    }
#pragma unroll 1
    for (std::uint32_t column = 0; column < kColumns; ++column) {
      const std::uint32_t to =
          (column * static_cast<std::uint32_t>(kDenseTileKeys) + static_cast<std::uint32_t>(i * a.copy_keys)) *
          kRowBytes;
      ptx::tensor_load(ring.tile(number) + to, map, full, static_cast<std::int32_t>(column * 64), item.kv_head, row,
                       page);
    }
  }
}

/// Feeds items until there are none, then one of count -1.
template <class T, int D, bool kWidens>
__device__ void feed_dense(const DenseArguments<T>& a, const TensorMap& q_map, const TensorMap& k_map,
                           const TensorMap& v_map, const DenseRings<D, kWidens>& rings) {
  using Memory = DenseMemory<D, kWidens>;
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::int32_t total = a.totals->items * a.kv_heads;
  const std::int32_t positions = static_cast<std::int32_t>(kTileRows) / a.group_size;
  std::uint32_t number = 0;  // of the next tile of keys
  for (std::uint32_t taken = 0;; ++taken) {
    std::int32_t index = lane == 0 ? atomicAdd(&a.totals->next, 1) : 0;
    index = __shfl_sync(kFullMask, index, 0);
    DenseItem item{};
    item.count = -1;
    if (index < total) {  // the kv heads of a tile are neighbours: they begin together
      item = a.items[index / a.kv_heads];
      item.kv_head = index % a.kv_heads;
    }
    ptx::wait(rings.queries_free, (taken & 1) ^ 1);
    if (lane == 0) {
      *rings.item = item;
      if (item.end <= item.first_key) {  // no keys: nobody looks at the queries
        ptx::arrive(rings.queries_full);
      } else {
        ptx::arrive_expect_bytes(rings.queries_full, static_cast<std::uint32_t>(positions * a.group_size) * D * 2);
        for (std::uint32_t column = 0; column < D / 64; ++column) {
          ptx::tensor_load(rings.queries + column * Memory::kQueryColumn, q_map, rings.queries_full,
                           static_cast<std::int32_t>(column * 64), item.kv_head * a.group_size, item.first_query);
        }
      }
    }
    if (item.count < 0) break;
    for (std::int32_t key = item.first_key; key < item.end; key += static_cast<std::int32_t>(kDenseTileKeys)) {
      if constexpr (kWidens) {
        load_tile<D, kWidens>(a, item, k_map, key, rings.stored, 2 * number);
        load_tile<D, kWidens>(a, item, v_map, key, rings.stored, 2 * number + 1);
      } else {
        load_tile<D, kWidens>(a, item, k_map, key, rings.keys, number);
        load_tile<D, kWidens>(a, item, v_map, key, rings.values, number);
      }
      ++number;
    }
  }
  if constexpr (kWidens) {
    // Those who widen wait for one tile more: when all others are free, they find that it is none.
    for (std::uint32_t i = 0; i < Memory::kStages; ++i) rings.stored.wait_free(2 * number + i);
    if (lane == 0) {
      *rings.stored_end = 1;
      ptx::arrive(rings.stored.full(2 * number));
    }
  }
}

/// Writes the tiles of float8 once more, as T: the other warps of the feeding warpgroup.
template <class T, int D>
__device__ void widen_dense(const DenseRings<D, true>& rings) {
  constexpr int kKeys = static_cast<int>(kDenseTileKeys);
  const std::uint32_t thread = threadIdx.x - kWarpSize;
  const auto widen = [&](const std::byte* stored, const auto& ring, std::uint32_t number) {
    ring.wait_free(number);
    widen_tile<T, D, kKeys>(stored, ring.tile(number), thread, kWidenWarps * kWarpSize);
    ptx::fence_proxy_async();
    __syncwarp();
    if (thread % kWarpSize == 0) ptx::arrive(ring.full(number));
  };
  for (std::uint32_t number = 0;; ++number) {
    rings.stored.wait_full(number);
    if (*rings.stored_end != 0) return;
    if (number % 2 == 0) {
      widen(rings.stored.tile(number), rings.keys, number / 2);
    } else {
      widen(rings.stored.tile(number), rings.values, number / 2);
    }
    rings.stored.release(number);
  }
}

/// The softmax of a thread's two rows over the keys so far: exponents are base 2.
struct RowState {
  float top[2] = {-infinity(), -infinity()};
  float sum[2] = {0, 0};  ///< of 2^(exponent - top)
};

/// Raises `top` to `other`. Returns what sums relative to the old top, and to `other`, are to be multiplied by. As long
/// as there is nothing but -inf, nothing is subtracted: -inf - -inf is NaN.
__device__ __forceinline__ float2 raise_top(float& top, float other) {
  const float raised = fmaxf(top, other);
  const float base = raised == -infinity() ? 0.0f : raised;
  const float2 factors = make_float2(ptx::exp2_fast(top - base), ptx::exp2_fast(other - base));
  top = raised;
  return factors;
}

/// sums[i] = sums[i] * factors.x + next[i] * factors.y: how a span is added to those before it, here and in
/// merge_spans.
__device__ __forceinline__ float merge_sums(float sum, float next, const float2& factors) {
  return __fmaf_rn(next, factors.y, __fmul_rn(sum, factors.x));
}

/// The log-sum of a row, -inf where it sees no key.
__device__ __forceinline__ float natural_log_sum(float top, float sum) {
  return sum == 0.0f ? -infinity() : (top + log2f(sum)) * kDenseLn2;
}

/// A consumer's view of its item.
template <class T, int D, bool kWidens>
struct DenseConsumer {
  static constexpr int kKeys = static_cast<int>(kDenseTileKeys);
  using Memory = DenseMemory<D, kWidens>;

  const DenseArguments<T>& a;
  const DenseRings<D, kWidens>& rings;
  std::byte* memory;
  std::uint32_t thread, lane, warp;  ///< of the consumers; warp 0 to 7 has rows 16 * warp ..
  DenseItem item{};
  std::int32_t* first_non_finite = nullptr;  ///< this item's
  bool has_swept = false;                    ///< whether values were taken out, or could have been
  bool is_idle = false;                      ///< no row of the warpgroup is one
  std::int32_t visible[2] = {0, 0};          ///< keys that a row sees

  __device__ __forceinline__ std::int32_t row_of(int half) const {
    return static_cast<std::int32_t>(warp * 16 + lane / 4) + 8 * half;
  }
  __device__ __forceinline__ std::int32_t rows() const { return item.count * a.group_size; }

  __device__ __forceinline__ void begin(std::uint32_t taken) {
    item = *rings.item;
    has_swept = false;
    first_non_finite = reinterpret_cast<std::int32_t*>(memory + Memory::kFirstNonFinite) + taken % 2 * (D + 1);
    is_idle = static_cast<std::int32_t>(warp / 4 * 64) >= rows();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      visible[h] = 0;
      if (row_of(h) >= rows() || item.sequence < 0) continue;
      const std::int32_t query = item.first_query + row_of(h) / a.group_size;
      const std::int32_t position =
          a.batch.query_positions != nullptr ? a.batch.query_positions[query] : query + item.offset;
      visible[h] = max_of(0, min_of(position + 1, item.end));
    }
  }

  __device__ __forceinline__ bool is_partial(std::int32_t key) const { return key + kKeys > item.whole; }

  /// The queries are free once the last tile's scores are there.
  __device__ __forceinline__ void release_keys(std::int32_t key, std::uint32_t number) const {
    rings.keys.release(number);
    if (key + kKeys >= item.end && lane == 0) ptx::arrive(rings.queries_free);
  }

  /// Waits for a tile of values, and takes out what is not finite where some row sees only a part of it. All consumers
  /// call it for the same tiles.
  __device__ __forceinline__ const std::byte* wait_values(std::int32_t key, std::uint32_t number) {
    rings.values.wait_full(number);
    std::byte* values = rings.values.tile(number);
    if (!is_partial(key)) return values;
    if (!has_swept) {
      for (std::uint32_t column = thread; column <= D; column += kDenseConsumers) {
        first_non_finite[column] = column < D ? 0x7fffffff : 0;
      }
      ptx::named_sync(1, kDenseConsumers);
      has_swept = true;
    }
    zero_non_finite<T, D, kKeys>(values, thread, kDenseConsumers, [&](std::uint32_t column, std::int32_t in_tile) {
      atomicMin(first_non_finite + column, key + in_tile);
      first_non_finite[D] = 1;
    });
    ptx::fence_proxy_async();
    ptx::named_sync(1, kDenseConsumers);
    return values;
  }

  /// Takes a tile's scores into the softmax: s becomes 2^(exponent - top). Returns what earlier sums are to be
  /// multiplied by.
  __device__ __forceinline__ float2 take_scores(float (&s)[kKeys / 2], std::int32_t key, RowState& state) const {
    if (a.sign != 1.0f) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] *= a.sign;
    }
    if (is_partial(key)) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        if (key + fragment_column(i, lane) >= visible[fragment_half(i)]) s[i] = -infinity();
      }
    }
    float top[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) top[fragment_half(i)] = fmaxf(top[fragment_half(i)], s[i]);
    float factor[2], base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      factor[h] = raise_top(state.top[h], __fmul_rn(row_max(top[h]), a.scale_log2)).x;
      base[h] = state.top[h] == -infinity() ? 0.0f : state.top[h];
      state.sum[h] = __fmul_rn(state.sum[h], factor[h]);
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const int h = fragment_half(i);
      s[i] = ptx::exp2_fast(__fmaf_rn(s[i], a.scale_log2, -base[h]));
      state.sum[h] += s[i];
    }
    return make_float2(factor[0], factor[1]);
  }

  static __device__ __forceinline__ void pack(std::uint32_t (&p)[kKeys / 16][4], const float (&s)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) p[i / 8][i / 2 % 4] = pack_two<T>(s[i], s[i + 1]);
  }

  /// A multiplication by 1 changes nothing: it is left out where no row of the warp has a new maximum.
  static __device__ __forceinline__ void rescale(float (&o)[D / 2], const float2& factor) {
    if (__any_sync(kFullMask, factor.x != 1.0f || factor.y != 1.0f) == 0) return;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= fragment_half(i) == 0 ? factor.x : factor.y;
  }

  /// o and state of the keys [begin, end), begin < end; `number` is that of their first tile, and then of the next one.
  __device__ __forceinline__ void attend_span(float (&o)[D / 2], RowState& state, std::int32_t begin, std::int32_t end,
                                              std::uint32_t& number) {
    float s[kKeys / 2];
    std::uint32_t p[kKeys / 16][4];
    const std::byte* queries = rings.queries + warp / 4 * 64 * 128;
    rings.keys.wait_full(number);
    start_scores<T, D, kKeys>(s, queries, Memory::kQueryColumn, rings.keys.tile(number));
    ptx::wgmma_wait<0>();
    ptx::fence_registers(s);
    release_keys(begin, number);
    take_scores(s, begin, state);
    pack(p, s);
    for (std::int32_t key = begin + kKeys; key < end; key += kKeys, ++number) {
      rings.keys.wait_full(number + 1);
      start_scores<T, D, kKeys>(s, queries, Memory::kQueryColumn, rings.keys.tile(number + 1));
      const std::byte* values = wait_values(key - kKeys, number);
      start_outputs<T, D, kKeys>(o, p, values, key - kKeys > begin);
      ptx::wgmma_wait<1>();
      ptx::fence_registers(s);
      release_keys(key, number + 1);
      const float2 factor = take_scores(s, key, state);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(o);
      rings.values.release(number);
      rescale(o, factor);
      pack(p, s);
    }
    const std::int32_t last = begin + (end - 1 - begin) / kKeys * kKeys;
    const std::byte* values = wait_values(last, number);
    start_outputs<T, D, kKeys>(o, p, values, last > begin);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(o);
    rings.values.release(number++);
#pragma unroll
    for (int h = 0; h < 2; ++h) state.sum[h] = row_sum(state.sum[h]);
    mark_non_finite(o);
  }

  /// Waits and releases as attend_span does, and sweeps values for the other warpgroup.
  __device__ __forceinline__ void skip_span(std::int32_t begin, std::int32_t end, std::uint32_t& number) {
    for (std::int32_t key = begin; key < end; key += kKeys, ++number) {
      rings.keys.wait_full(number);
      release_keys(key, number);
      wait_values(key, number);
      rings.values.release(number);
    }
  }

  /// NaN where a row sees a value that was taken out. What is infinite becomes NaN, too: in every item, or a row's bits
  /// would depend on its company.
  __device__ __forceinline__ void mark_non_finite(float (&o)[D / 2]) const {
    const bool has_removed = has_swept && first_non_finite[D] != 0;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      if (fabsf(o[i]) == infinity()) o[i] = quiet_nan();
      if (has_removed && first_non_finite[fragment_column(i, lane)] < visible[fragment_half(i)]) o[i] = quiet_nan();
    }
  }

  /// This thread's part of the sums of the spans before, as vectors: 16 bytes a lane.
  __device__ __forceinline__ float4& total(int i) const {
    return reinterpret_cast<float4*>(memory + Memory::kTotals + warp * Memory::kWarpTotals)[i / 4 * 32 + lane];
  }

  /// o and state become those of all spans so far.
  __device__ __forceinline__ void merge(float (&o)[D / 2], RowState& state, RowState& before) const {
    float2 factors[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      factors[h] = raise_top(before.top[h], state.top[h]);
      state.top[h] = before.top[h];
      state.sum[h] = merge_sums(before.sum[h], state.sum[h], factors[h]);
    }
#pragma unroll
    for (int i = 0; i < D / 2; i += 4) {
      const float4 sums = total(i);
      o[i] = merge_sums(sums.x, o[i], factors[0]);
      o[i + 1] = merge_sums(sums.y, o[i + 1], factors[0]);
      o[i + 2] = merge_sums(sums.z, o[i + 2], factors[1]);
      o[i + 3] = merge_sums(sums.w, o[i + 3], factors[1]);
    }
  }
  __device__ __forceinline__ void keep(const float (&o)[D / 2]) const {
#pragma unroll
    for (int i = 0; i < D / 2; i += 4) total(i) = make_float4(o[i], o[i + 1], o[i + 2], o[i + 3]);
  }

  /// An item of one span: to the workspace, for merge_spans.
  __device__ __forceinline__ void store_partial(const float (&o)[D / 2], const RowState& state) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row_of(h) >= rows()) continue;
      const std::int64_t query = item.first_query - a.first_query + row_of(h) / a.group_size;
      const std::int64_t head = item.kv_head * a.group_size + row_of(h) % a.group_size;
      const std::int64_t at = (query * a.kv_heads * a.group_size + head) * a.max_spans + item.first_key / a.span_keys;
      if (lane % 4 == 0) a.states[at] = make_float2(state.top[h], state.sum[h]);
#pragma unroll
      for (int i = 2 * h; i < D / 2; i += 4) {
        *reinterpret_cast<float2*>(a.partial + at * D + fragment_column(i, lane)) = make_float2(o[i], o[i + 1]);
      }
    }
  }

  __device__ __forceinline__ T* out_row(std::int32_t row) const {
    return a.out.at(item.first_query + row / a.group_size, item.kv_head * a.group_size + row % a.group_size);
  }

  /// All keys of an item: rows of the result. A row that sees no key is 0, its log-sum -inf.
  __device__ __forceinline__ void store_out(float (&o)[D / 2], const RowState& state) const {
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inverse[h] = state.sum[h] == 0.0f ? 0.0f : 1.0f / state.sum[h];
      if (lane % 4 != 0 || row_of(h) >= rows()) continue;
      *a.lse.at(item.first_query + row_of(h) / a.group_size, item.kv_head * a.group_size + row_of(h) % a.group_size) =
          natural_log_sum(state.top[h], state.sum[h]);
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] += 0.0f;  // -0 becomes 0: whether tiles of zeros came behind would show
    if (a.out_is_aligned) {
      T* targets[4];
#pragma unroll
      for (std::int32_t i = 0; i < 4; ++i) {
        const std::int32_t row = static_cast<std::int32_t>(warp * 16) + copied_row(i, lane);
        targets[i] = row < rows() ? out_row(row) + 0 : nullptr;
      }
      store_rows<T, D>(o, inverse, memory + Memory::kTotals + warp * Memory::kWarpTotals, targets);
      __syncwarp();
      return;
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      const int h = fragment_half(i);
      if (row_of(h) < rows()) out_row(row_of(h))[fragment_column(i, lane)] = from_float<T>(o[i] * inverse[h]);
    }
  }

  /// All spans of the item.
  __device__ __forceinline__ void attend_item(std::uint32_t& number) {
    float o[D / 2] = {};
    RowState before;
    bool is_first = true;
    for (std::int32_t begin = item.first_key; begin < item.end; begin += a.span_keys) {
      const std::int32_t end = item.end - begin < a.span_keys ? item.end : begin + a.span_keys;
      RowState state;
      attend_span(o, state, begin, end, number);
      if (a.partial != nullptr) {
        store_partial(o, state);
        return;
      }
      if (!is_first) merge(o, state, before);
      if (end < item.end) keep(o);
      before = state;
      is_first = false;
    }
    store_out(o, before);
  }
};

template <class T, int D, bool kWidens>
__device__ __forceinline__ void consume_dense(const DenseArguments<T>& a, std::byte* memory,
                                              const DenseRings<D, kWidens>& rings) {
  const std::uint32_t thread = threadIdx.x - 128;
  DenseConsumer<T, D, kWidens> consumer{a, rings, memory, thread, thread % kWarpSize, thread / kWarpSize};
  std::uint32_t number = 0;
  for (std::uint32_t taken = 0;; ++taken) {
    ptx::wait(rings.queries_full, taken & 1);
    consumer.begin(taken);
    const DenseItem& item = consumer.item;
    if (item.count < 0) return;
    if (item.end <= item.first_key) {  // no tile of keys will free the queries
      __syncwarp();
      if (consumer.lane == 0) ptx::arrive(rings.queries_free);
    }
    if (consumer.is_idle) {
      consumer.skip_span(item.first_key, item.end, number);
    } else {
      consumer.attend_item(number);
    }
  }
}

template <class T, int D, bool kWidens>
__global__ void __launch_bounds__(kDenseThreads, 1)
    attend_prefix(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                  const __grid_constant__ TensorMap v_map, DenseArguments<T> a) {
  std::byte* memory = shared_memory();
  const DenseRings<D, kWidens> rings(memory);
  if (threadIdx.x == 0) {
    rings.keys.init(kWidens ? kWidenWarps : 1, kDenseConsumerWarps);
    rings.values.init(kWidens ? kWidenWarps : 1, kDenseConsumerWarps);
    if constexpr (kWidens) rings.stored.init(1, kWidenWarps);
    *rings.stored_end = 0;
    ptx::barrier_init(rings.queries_full, 1);
    ptx::barrier_init(rings.queries_free, kDenseConsumerWarps);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_launch();  // the merge may be set up behind this; it waits for this kernel's end
  // 65536 registers: 128 * 40 + 256 * 232 = 64512.
  if (threadIdx.x < 128) {
    ptx::lower_registers<40>();
    if (threadIdx.x < kWarpSize) {
      feed_dense<T, D, kWidens>(a, q_map, k_map, v_map, rings);
    } else if constexpr (kWidens) {
      widen_dense<T, D>(rings);
    }
  } else {
    ptx::raise_registers<232>();
    consume_dense<T, D, kWidens>(a, memory, rings);
  }
}

// The merge of spans
// ----------------------------------------------------------------------------------------------------

inline constexpr unsigned kMergeWarps = 4;

/// One warp a (query of the chunk, head): out and lse from the row's spans, in ascending order.
template <class T, int D>
__global__ void __launch_bounds__(kMergeWarps* kWarpSize) merge_spans(DenseArguments<T> a, std::int32_t queries) {
  constexpr int kColumns = D / kWarpSize;  // a lane
  const std::int32_t lane = static_cast<std::int32_t>(threadIdx.x % kWarpSize);
  const std::int64_t row = std::int64_t{blockIdx.x} * kMergeWarps + threadIdx.x / kWarpSize;
  const std::int64_t query_heads = std::int64_t{a.kv_heads} * a.group_size;
  if (row >= queries * query_heads) return;
  const std::int32_t query = a.first_query + static_cast<std::int32_t>(row / query_heads);
  const std::int32_t spans = ceil_div(a.batch.place(query).position + 1, a.span_keys);
  ptx::griddepcontrol_wait();

  const float* partial = a.partial + row * a.max_spans * D + lane * kColumns;
  float top = -infinity(), sum = 0;
  float o[kColumns] = {};
#pragma unroll 4
  for (std::int32_t span = 0; span < spans; ++span) {
    const float2 state = a.states[row * a.max_spans + span];
    float next[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) next[i] = partial[std::int64_t{span} * D + i];
    const float2 factors = raise_top(top, state.x);
    const bool is_first = span == 0;
    sum = is_first ? state.y : merge_sums(sum, state.y, factors);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) o[i] = is_first ? next[i] : merge_sums(o[i], next[i], factors);
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const std::int32_t head = static_cast<std::int32_t>(row % query_heads);
  T* out = a.out.at(query, head) + lane * kColumns;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) out[i] = from_float<T>((o[i] + 0.0f) * inverse);
  if (lane == 0) *a.lse.at(query, head) = natural_log_sum(top, sum);
}

// The call
// -------------------------------------------------------------------------------------------------------------

template <class T>
DenseArguments<T> dense_arguments(const DenseAttentionParams& params, const DenseAttentionPlan& plan,
                                  std::byte* workspace, const TensorView& out, const TensorView& lse) {
  DenseArguments<T> a{};
  a.batch = view_of(params.batch);
  a.items = reinterpret_cast<DenseItem*>(workspace + plan.items);
  a.totals = reinterpret_cast<DenseTotals*>(workspace + plan.totals);
  a.out = strided<T>(out);
  a.lse = strided<float>(lse);
  if (plan.is_split) {
    a.partial = reinterpret_cast<float*>(workspace + plan.partial);
    a.states = reinterpret_cast<float2*>(workspace + plan.states);
  }
  a.kv_heads = static_cast<std::int32_t>(params.k.size(params.k.rank - 2));
  a.group_size = static_cast<std::int32_t>(params.q.size(1)) / a.kv_heads;
  a.span_keys = static_cast<std::int32_t>(plan.span_keys);
  a.max_spans = static_cast<std::int32_t>(plan.max_spans);
  a.page = params.batch.is_paged ? static_cast<std::int32_t>(params.k.size(1)) : 0;
  a.copy_keys = std::gcd(a.page, static_cast<std::int32_t>(kDenseTileKeys));
  const float scale = static_cast<float>(*params.scale * 1.4426950408889634);
  a.scale_log2 = scale == 0.0f ? 1.0f : std::abs(scale);
  a.sign = scale == 0.0f ? 0.0f : scale < 0.0f ? -1.0f : 1.0f;
  a.out_is_aligned =
      reinterpret_cast<std::uintptr_t>(out.data) % 16 == 0 && out.stride(0) % 8 == 0 && out.stride(1) % 8 == 0;
  return a;
}

template <class T>
DenseOrder dense_order(const DenseArguments<T>& a, const DenseAttentionPlan& plan, std::byte* workspace) {
  DenseOrder order{};
  order.batch = a.batch;
  order.items = reinterpret_cast<DenseItem*>(workspace + plan.items);
  order.totals = a.totals;
  order.positions = static_cast<std::int32_t>(plan.positions_per_tile);
  order.span_keys = plan.is_split ? a.span_keys : 0x7fffffff;
  order.most_items = static_cast<std::int32_t>(plan.max_items);
  order.is_split = plan.is_split;
  std::int64_t most_tiles = (plan.is_split ? 1 : plan.max_spans) * (plan.span_keys / kDenseTileKeys);
  for (; most_tiles >= kOrderThreads; most_tiles /= 2) ++order.bucket_shift;
  return order;
}

/// run_dense_attention of one instantiation; `thread_blocks` of the persistent kernel, one a multiprocessor.
template <class T, int D, bool kWidens>
void run_fast_dense(const Context& context, const DenseAttentionParams& params, const DenseAttentionPlan& plan,
                    unsigned thread_blocks, const TensorView& out, const TensorView& lse) {
  const std::int64_t rows = params.q.size(0);
  if (rows == 0) return;
  auto* workspace = static_cast<std::byte*>(context.workspace);
  DenseArguments<T> a = dense_arguments<T>(params, plan, workspace, out, lse);
  DenseOrder order = dense_order(a, plan, workspace);
  TensorMap q_map = map_queries(params.q, a.group_size, plan.positions_per_tile), k_map{}, v_map{};
  if (params.k.elements() > 0) {  // without a key there is nothing a tensor map could describe, and nobody asks
    k_map = map_keys(params.k, params.batch.is_paged, a.copy_keys);
    v_map = map_keys(params.v, params.batch.is_paged, a.copy_keys);
  }
  for (std::int64_t first = 0; first < rows; first += plan.queries_at_once) {
    const std::int64_t queries = min_of(plan.queries_at_once, rows - first);
    order.first_query = a.first_query = static_cast<std::int32_t>(first);
    order.queries = static_cast<std::int32_t>(queries);
    launch(dim3(1), dim3(kOrderThreads), 0, context.stream, order_items, order);
    launch(dim3(thread_blocks), dim3(kDenseThreads), DenseMemory<D, kWidens>::kBytes, context.stream,
           attend_prefix<T, D, kWidens>, q_map, k_map, v_map, a);
    if (!plan.is_split) continue;
    const std::int64_t warps = queries * params.q.size(1);
    launch_dependent(dim3(static_cast<unsigned>(ceil_div(warps, std::int64_t{kMergeWarps}))),
                     dim3(kMergeWarps * kWarpSize), 0, context.stream, merge_spans<T, D>, a,
                     static_cast<std::int32_t>(queries));
  }
}

/// Calls body.template operator()<T, D, kWidens>() for the instantiation that the geometry asks for.
template <class Body>
void with_dense_geometry(const DenseAttentionParams& params, const Body& body) {
  const auto with_storage = [&]<class T, int D>() {
    if (params.k.dtype == DType::kFloat8E4M3) {
      body.template operator()<T, D, true>();
    } else {
      body.template operator()<T, D, false>();
    }
  };
  const auto with_dim = [&]<class T>() {
    if (params.q.size(2) == 64) {
      with_storage.template operator()<T, 64>();
    } else {
      with_storage.template operator()<T, 128>();
    }
  };
  if (params.q.dtype == DType::kBFloat16) {
    with_dim.template operator()<BFloat16>();
  } else {
    with_dim.template operator()<Float16>();
  }
}

}  // namespace msa::cuda
