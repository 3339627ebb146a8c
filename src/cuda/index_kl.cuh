// SPDX-License-Identifier: Apache-2.0
// The products of the KL loss: a persistent kernel over pairs of a tile of 128 queries of a group and a block of keys.
// One warpgroup feeds: index and main keys by the copy engine, queries gathered row by row, a head at a time. Two
// warpgroups of 64 queries each compute the scores of one head after the other, S = Q_h K^T; since a head is a product
// of its own, the teacher's mass of a (query, key) is summed over the heads in one register. What is made of it is the
// kernel's mode: maxima and sums, the divergence, or (Q - P) times index keys and index queries. No atomics but the
// item counter. docs/cuda-index-kl.md has the picture. Tested in tests/cuda/index_kl_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cuda/index_kl.h"
#include "src/cuda/ptx.cuh"
#include "src/cuda/reverse_index.cuh"
#include "src/cuda/sorted_visits.cuh"

namespace msa::cuda {

enum class KlMode {
  kSums,             ///< maxima and sums of exponentials of every head and of the index branch
  kValue,            ///< the divergence, given all log-sums
  kKeysGradient,     ///< dk_idx of an item's block, summed over its tiles; dq_idx of every pair where asked for
  kQueriesGradient,  ///< dq_idx of a tile, summed over its blocks
};

/// What an item is: queries that visit one block (selected stage), one tile of queries and all blocks that they see,
/// or one block and queries that see it (warmup stage).
enum class KlSchedule : std::int32_t { kVisits, kRows, kKeys };

/// Largest score and sum of exponentials below it, natural.
struct KlSums {
  float top, sum;
};
/// sum m (log m - log q), sum m, sum q: of a query over some blocks, m the teacher's mass, q the student's probability.
struct KlValue {
  double value, mass, student;
};

/// (Q - P) is rounded to the storage type times this: a power of two, so that float16 keeps its full precision down to
/// probabilities of 2^-26.
inline constexpr float kKlGradientScale = 4096;

template <class T>
struct KlArguments {
  ReverseIndex index;  ///< of this group alone: kv_heads 1, `blocks` at its ids; visits in the order to be summed
  KlSchedule schedule;
  std::int32_t group, group_size;
  std::int32_t columns, index_columns;     ///< head_dim and index_dim in columns of 64
  std::int32_t slots;                      ///< partial results a query
  std::int32_t item_count;                 ///< warmup stage; the selected stage's is in totals
  std::int32_t item_queries, block_items;  ///< warmup stage: of a block's queries an item's share, and items a block
  std::int32_t first_query, queries;       ///< whose partial results are kept
  float scale, index_scale;
  bool takes_max;
  Strided<const T> q, q_idx;
  Strided<float> lse_main, lse_index, teacher_norm;
  KlSums* sums;     ///< [queries, slots, group_size + 1] of this chunk, the index branch last
  KlValue* values;  ///< [queries, slots]
  float* dq_parts;  ///< [queries, slots, index_dim]; null: not wanted
  float* dk_parts;  ///< [items, 128 / block_size, block_size, index_dim]
};

/// What the feeder tells of a pair.
struct alignas(16) KlPair {
  std::int32_t rows;    ///< of the tile; -1: there are no more pairs
  std::int32_t offset;  ///< of the block from the first that the tile's `seen` counts from, in tokens
  std::int32_t flags;
  std::int32_t item;
};
/// Flags. A tile that another chunk of queries has a part in adds to the keys' gradient in the later one; an item that
/// an earlier chunk added to resumes.
inline constexpr std::int32_t kTileBegins = 1, kTileEnds = 2, kKeysBegin = 4, kKeysEnd = 8, kItemEnds = 16,
                              kAddsKeys = 32, kResumes = 64;

struct KlRow {
  std::int32_t query;  ///< -1: none
  std::int32_t seen;   ///< tokens it sees from the item's first block on
};

inline constexpr unsigned kKlThreads = 384;
inline constexpr std::uint32_t kKlFeeders = 128, kKlConsumers = 256, kKlConsumerWarps = 8;
inline constexpr std::uint32_t kConsumerBarrier = 1, kFeederBarrier = 2;
inline constexpr std::uint32_t kKlStages = 3;  ///< heads of queries under way
inline constexpr std::uint32_t kKlPairs = 4;   ///< a pair takes a stage at least, so three may be ahead of one in use

/// Where things lie in shared memory, in bytes, whatever the dimensions: constants take no registers, and a thread
/// block has the multiprocessor to itself. Tiles are columns of 128 bytes (64 elements), swizzled: [column][row].
template <int kBlock>
struct KlMemory {
  static constexpr std::uint32_t kKeyColumn = kBlock * 128, kKeyTile = 2 * kKeyColumn;
  static constexpr std::uint32_t kRowColumn = static_cast<std::uint32_t>(kKlTileRows) * 128, kRowTile = 2 * kRowColumn;

  static constexpr std::uint32_t kKeys = 0;
  static constexpr std::uint32_t kIndexKeys = kKeys + kKeyTile;
  static constexpr std::uint32_t kIndexQueries = kIndexKeys + kKeyTile;
  static constexpr std::uint32_t kHeads = kIndexQueries + kRowTile;              ///< kKlStages of them
  static constexpr std::uint32_t kGradients = kHeads + kKlStages * kRowTile;     ///< (Q - P), [key / 64][query]
  static constexpr std::uint32_t kRows = kGradients + kBlock / 64 * kRowColumn;  ///< of two tiles
  static constexpr std::uint32_t kPairs = kRows + 2 * kKlTileRows * sizeof(KlRow);
  static constexpr std::uint32_t kBarriers = kPairs + kKlPairs * sizeof(KlPair);
  static constexpr std::uint32_t kSlots = kBarriers + (5 + 2 * kKlStages) * 8;  ///< a byte a row of two tiles
  static constexpr std::uint32_t kBadRows = kSlots + 2 * kKlTileRows;           ///< a byte each: not finite
  static constexpr std::uint32_t kBadKeys = kBadRows + kKlTileRows;
  static constexpr std::uint32_t kNextItem = kBadKeys + kBlock;
  static constexpr std::uint32_t kBytes = kNextItem + 4;
};
static_assert(KlMemory<128>::kBytes <= 227 * 1024, "what a block may have on this chip");

struct KlBarriers {
  std::uint64_t* keys_full;        ///< an arrival by the feeder, and the bytes
  std::uint64_t* keys_empty;       ///< an arrival a consumer warp, as all that follow but heads_full
  std::uint64_t* index_keys_full;  ///< as keys_full
  std::uint64_t* index_keys_empty;
  std::uint64_t* index_queries_empty;  ///< index queries are full with their pair's last head
  std::uint64_t* heads_full;           ///< an arrival a feeder thread
  std::uint64_t* heads_empty;
  __device__ explicit KlBarriers(std::byte* at)
      : keys_full(reinterpret_cast<std::uint64_t*>(at)),
        keys_empty(keys_full + 1),
        index_keys_full(keys_full + 2),
        index_keys_empty(keys_full + 3),
        index_queries_empty(keys_full + 4),
        heads_full(keys_full + 5),
        heads_empty(heads_full + kKlStages) {}
};

// Items
// --------------------------------------------------------------------------------------------------------------

struct KlItem {
  std::int32_t first = 0, count = 0;   ///< visits, or query rows
  std::int32_t sequence = 0;           ///< warmup stage
  std::int32_t block = 0;              ///< the first, counted within the sequence; warmup stage
  std::int32_t page = 0, row = 0;      ///< of the first block's first key
  std::int32_t piece = 0, pieces = 1;  ///< number of this item among those of its block, and how many these are
};

/// First key of a block of a sequence.
__device__ inline void locate_key(const ReverseIndex& a, std::int32_t s, std::int32_t block, std::int32_t& page,
                                  std::int32_t& row) {
  const std::int32_t token = block * a.block_size;
  page = a.page > 0 ? a.batch.page_table[std::int64_t{s} * a.batch.max_pages + token / a.page] : 0;
  row = a.page > 0 ? token % a.page : a.batch.cu_seqlens_k[s] + token;
}

/// The first query row of sequence s that sees token `token`; positions ascend.
__device__ inline std::int32_t first_viewer(const BatchView& batch, std::int32_t s, std::int32_t token) {
  const std::int32_t end = batch.cu_seqlens_q[s + 1], keys = batch.keys(s);
  std::int32_t low = batch.cu_seqlens_q[s], high = end;
  while (low < high) {
    const std::int32_t middle = low + (high - low) / 2;
    const std::int32_t position =
        batch.query_positions != nullptr ? batch.query_positions[middle] : keys - (end - middle);
    if (position >= token) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

/// How many of an item's visits are some. sort_visits pads the list of a block that a row names twice, which ids that
/// were never checked may do; a list that is not sorted has no padding.
__device__ inline std::int32_t count_queries(const Visit* visits, std::int32_t count) {
  if (count == 0 || visits[count - 1].query != kNoQuery) return count;
  std::int32_t low = 0, high = count - 1;  // the first of the padding is in [low, high]
  while (low < high) {
    const std::int32_t middle = low + (high - low) / 2;
    if (visits[middle].query == kNoQuery) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

/// Item `number`; count 0 or less: nothing to do.
template <class T>
__device__ KlItem find_item(const KlArguments<T>& a, std::int32_t number) {
  const BatchView& batch = a.index.batch;
  constexpr std::int32_t kRows = static_cast<std::int32_t>(kKlTileRows);
  KlItem item;
  if (a.schedule == KlSchedule::kVisits) {
    const WorkItem work = a.index.items[number];
    item.first = work.first;
    item.count = count_queries(a.index.visits + work.first, work.count);
    item.page = work.page;
    item.row = work.row;
    item.piece = work.piece;
    item.pieces = work.pieces;
  } else if (a.schedule == KlSchedule::kRows) {  // the last first: they have the most blocks
    // Numbered like blocks of keys: floor(begin / kRows) + s leaves every sequence room for its tiles.
    const std::int32_t tile = a.item_count - 1 - number;
    const auto first_tile = [&](std::int32_t s) { return batch.cu_seqlens_q[s] / kRows + s; };
    item.sequence = batch.last_sequence(tile, first_tile);
    item.first = batch.cu_seqlens_q[item.sequence] + (tile - first_tile(item.sequence)) * kRows;
    item.count = min_of(kRows, batch.cu_seqlens_q[item.sequence + 1] - item.first);
    if (item.count > 0) locate_key(a.index, item.sequence, 0, item.page, item.row);
  } else {
    const std::int32_t block = number / a.block_items;
    const std::int32_t block_size = a.index.block_size, page = a.index.page;
    item.sequence = sequence_of_block(batch, block, block_size, page);
    item.block = block - first_block(batch, item.sequence, block_size, page);
    const std::int32_t token = item.block * a.index.block_size;
    if (token >= batch.keys(item.sequence)) return item;
    const std::int32_t first = first_viewer(batch, item.sequence, token);
    const std::int32_t viewers = batch.cu_seqlens_q[item.sequence + 1] - first;
    item.piece = number % a.block_items;
    item.pieces = ceil_div(viewers, a.item_queries);
    item.first = first + item.piece * a.item_queries;
    item.count = min_of(a.item_queries, viewers - item.piece * a.item_queries);
    if (item.count > 0) locate_key(a.index, item.sequence, item.block, item.page, item.row);
  }
  return item;
}

// The feeder
// ---------------------------------------------------------------------------------------------------------

template <class T, int kBlock>
struct KlFeeder {
  using Memory = KlMemory<kBlock>;
  const KlArguments<T>& a;
  const TensorMap& k_map;
  const TensorMap& k_idx_map;
  std::byte* memory;
  const KlBarriers& barriers;
  std::uint32_t thread;
  // How many of each were begun; parities follow from them.
  std::uint32_t heads = 0, pairs = 0, tiles = 0, blocks = 0;
  bool is_pending = false;  ///< the newest head's copies are issued and not yet announced

  /// Announces the newest head, and all that was written before it. A consumer's wait and product then see it: copies
  /// by threads are ordinary writes, so the fence is the writer's part.
  template <int kLater>
  __device__ void publish(std::uint32_t head) {
    ptx::copy_wait<kLater>();
    ptx::fence_proxy_async();
    ptx::arrive(barriers.heads_full + head % kKlStages);
  }
  /// Before a wait for consumers, who may need what is pending to get there.
  __device__ void flush() {
    if (is_pending) publish<0>(heads - 1);
    is_pending = false;
  }
  __device__ std::uint32_t take_stage() {
    const std::uint32_t stage = heads % kKlStages;
    ptx::wait(barriers.heads_empty + stage, (heads / kKlStages & 1) ^ 1);
    return stage;
  }

  /// The rows of a tile from a tensor's head, 16 bytes a copy, neighbouring threads at neighbouring chunks of a row.
  __device__ void copy_rows(std::byte* to, const Strided<const T>& from, std::int32_t head, std::int32_t columns,
                            const KlRow* rows) const {
    const std::uint32_t chunks = static_cast<std::uint32_t>(columns) * 8;
    const std::uint32_t chunk = thread % chunks, step = kKlFeeders / chunks;
    const T* source = from.at(0, head) + chunk * 8;
    std::byte* target = to + chunk / 8 * Memory::kRowColumn;
#pragma unroll 4
    for (std::uint32_t row = thread / chunks; row < kKlTileRows; row += step) {
      const std::int32_t query = rows[row].query;
      ptx::copy_16(target + swizzled(row * 128 + chunk % 8 * 16, Swizzle::k128),
                   source + max_of(query, 0) * from.strides[0], query < 0 ? 0 : 16);
    }
  }

  __device__ void load_keys(std::uint32_t to, const TensorMap& map, std::int32_t columns, std::int32_t head,
                            std::uint64_t* full, std::int32_t page, std::int32_t row) const {
    if (thread != 0) return;
    ptx::arrive_expect_bytes(full, static_cast<std::uint32_t>(columns) * kBlock * 128);
    for (std::int32_t column = 0; column < columns; ++column) {
      ptx::tensor_load(memory + to + column * Memory::kKeyColumn, map, full, column * 64, head, row, page);
    }
  }

  /// Who is in the tile: thread i notes row i.
  __device__ void list_rows(const KlItem& item, std::int32_t done, std::int32_t count, KlRow* rows) const {
    KlRow row{-1, 0};
    std::uint8_t slot = 0;
    const std::int32_t i = static_cast<std::int32_t>(thread);
    if (i < count && a.schedule == KlSchedule::kVisits) {
      const Visit visit = a.index.visits[item.first + done + i];
      row = {visit.query, visit.slot_and_visible >> 8};
      slot = static_cast<std::uint8_t>(visit.slot_and_visible & 0xff);
    } else if (i < count) {
      row.query = item.first + done + i;
      row.seen = a.index.batch.place(row.query).position + 1 - item.block * kBlock;
    }
    rows[i] = row;
    reinterpret_cast<std::uint8_t*>(memory + Memory::kSlots)[tiles % 2 * kKlTileRows + thread] = slot;
    ptx::named_sync(kFeederBarrier, kKlFeeders);
  }

  /// Query row of an item's i-th query.
  __device__ std::int32_t query_of(const KlItem& item, std::int32_t i) const {
    return a.schedule == KlSchedule::kVisits ? a.index.visits[item.first + i].query : item.first + i;
  }

  /// The item's tiles that have queries of this chunk. Where there are several chunks the visits are sorted.
  __device__ void feed_item(const KlItem& item, std::int32_t number) {
    constexpr std::int32_t kRows = static_cast<std::int32_t>(kKlTileRows);
    const std::int32_t end = a.first_query + a.queries;
    bool is_first = true;
    for (std::int32_t done = 0; done < item.count; done += kRows) {
      const std::int32_t next = min_of(done + kRows, item.count);
      const std::int32_t last_query = query_of(item, next - 1);
      if (last_query < a.first_query) continue;
      if (query_of(item, done) >= end) break;
      const bool is_last = next == item.count || query_of(item, next) >= end;
      std::int32_t flags = is_last ? kItemEnds : 0;
      if (is_first) flags |= kKeysBegin | (done > 0 ? kResumes : 0);
      if (last_query < end) flags |= kAddsKeys;
      feed_tile(item, number, done, next - done, flags);
      is_first = false;
    }
  }

  /// One tile of queries against its blocks: the item's, or all that its queries see.
  __device__ void feed_tile(const KlItem& item, std::int32_t number, std::int32_t done, std::int32_t count,
                            std::int32_t flags) {
    KlRow* rows = reinterpret_cast<KlRow*>(memory + Memory::kRows) + tiles % 2 * kKlTileRows;
    list_rows(item, done, count, rows);
    if (a.schedule == KlSchedule::kRows) {
      // Positions ascend, so the last row sees the most.
      const std::int32_t end = max_of(1, rows[count - 1].seen);
      for (std::int32_t offset = 0; offset < end; offset += kBlock) {
        feed_pair(item,
                  {count, offset,
                   kKeysBegin | kKeysEnd | (offset == 0 ? kTileBegins : 0) | (offset + kBlock >= end ? kTileEnds : 0),
                   number},
                  rows);
      }
    } else {
      if ((flags & kItemEnds) != 0) flags |= kKeysEnd;
      feed_pair(item, {count, 0, flags | kTileBegins | kTileEnds, number}, rows);
    }
    ++tiles;
  }

  __device__ void feed_pair(const KlItem& item, const KlPair& pair, const KlRow* rows) {
    std::int32_t page = item.page, row = item.row;
    const bool keys_begin = (pair.flags & kKeysBegin) != 0;
    if (pair.offset > 0) locate_key(a.index, item.sequence, item.block + pair.offset / kBlock, page, row);
    for (std::int32_t head = 0; head < a.group_size; ++head, ++heads) {
      const std::uint32_t stage = take_stage();
      if (head == 0) {
        if (thread == 0) reinterpret_cast<KlPair*>(memory + Memory::kPairs)[pairs % kKlPairs] = pair;
        if (keys_begin) {
          flush();
          ptx::wait(barriers.keys_empty, (blocks & 1) ^ 1);
          load_keys(Memory::kKeys, k_map, a.columns, a.group, barriers.keys_full, page, row);
        }
      }
      if (head == a.group_size - 1) {  // the index branch comes behind the heads: until now its memory was in use
        if ((pair.flags & kTileBegins) != 0) {
          flush();
          ptx::wait(barriers.index_queries_empty, (tiles & 1) ^ 1);
          copy_rows(memory + Memory::kIndexQueries, a.q_idx, a.group, a.index_columns, rows);
        }
        if (keys_begin) {
          flush();
          ptx::wait(barriers.index_keys_empty, (blocks & 1) ^ 1);
          load_keys(Memory::kIndexKeys, k_idx_map, a.index_columns, 0, barriers.index_keys_full, page, row);
        }
      }
      copy_rows(memory + Memory::kHeads + stage * Memory::kRowTile, a.q, a.group * a.group_size + head, a.columns,
                rows);
      ptx::copy_commit();
      if (is_pending) publish<1>(heads - 1);
      is_pending = true;
    }
    if (keys_begin) ++blocks;
    ++pairs;
  }

  __device__ __forceinline__ void run() {
    auto* next_item = reinterpret_cast<std::int32_t*>(memory + Memory::kNextItem);
    const std::int32_t total = a.schedule == KlSchedule::kVisits ? a.index.totals->items : a.item_count;
    for (;;) {
      if (thread == 0) *next_item = atomicAdd(&a.index.totals->next, 1);
      ptx::named_sync(kFeederBarrier, kKlFeeders);
      const std::int32_t number = *next_item;
      ptx::named_sync(kFeederBarrier, kKlFeeders);
      if (number >= total) break;
      feed_item(find_item(a, number), number);
    }
    flush();
    const std::uint32_t stage = take_stage();
    if (thread == 0) reinterpret_cast<KlPair*>(memory + Memory::kPairs)[pairs % kKlPairs] = KlPair{-1, 0, 0, 0};
    ptx::arrive(barriers.heads_full + stage);
  }
};

// The consumers. Element i of a thread's scores: row + 8 * (i / 2 % 2), key 8 * (i / 4) + 2 * (lane % 4) + i % 2
// -----------------------------------------------------------------------------------------------------------------

/// S[64, kKeys] = A B^T over `columns` columns of 64 elements; waits for it.
template <class T, int kBlock, int kKeys>
__device__ __forceinline__ void multiply_rows(float (&s)[kKeys / 2], const std::byte* a, const std::byte* b,
                                              std::int32_t columns) {
  using Memory = KlMemory<kBlock>;
  const std::uint64_t left = ptx::matrix_descriptor(a, 16, 1024, Swizzle::k128);
  const std::uint64_t right = ptx::matrix_descriptor(b, 16, 1024, Swizzle::k128);
  ptx::fence_registers(s);
  ptx::wgmma_fence();
#pragma unroll
  for (std::uint32_t step = 0; step < 4; ++step) {
    ptx::wgmma<kKeys, T>(s, ptx::advance(left, step * 32), ptx::advance(right, step * 32), step > 0);
  }
  if (columns == 2) {
#pragma unroll
    for (std::uint32_t step = 0; step < 4; ++step) {
      ptx::wgmma<kKeys, T>(s, ptx::advance(left, Memory::kRowColumn + step * 32),
                           ptx::advance(right, Memory::kKeyColumn + step * 32), true);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::fence_registers(s);
}

/// Sum over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullMask, x, 1);
  return x + __shfl_xor_sync(kFullMask, x, 2);
}

__device__ __forceinline__ float exp_fast(float x) { return ptx::exp2_fast(x * 1.4426950408889634f); }

/// What two parts of a row have together. An empty part, {-inf, 0}, changes no bit of the other.
__device__ __forceinline__ KlSums add_sums(const KlSums& a, const KlSums& b) {
  const float top = fmaxf(a.top, b.top);
  const float subtract = top == -infinity() ? 0.0f : top;
  return {top, a.sum * exp_fast(a.top - subtract) + b.sum * exp_fast(b.top - subtract)};
}

template <class T, int kBlock, int kIndexDim, KlMode kMode>
struct KlConsumer {
  using Memory = KlMemory<kBlock>;
  static constexpr bool kHasGradients = kMode == KlMode::kKeysGradient || kMode == KlMode::kQueriesGradient;
  /// Keys of a product of scores. Where dk takes 64 registers through all of this and the masses another 64, half a
  /// block's scores at a time are what is left room for.
  static constexpr int kKeys = kMode == KlMode::kKeysGradient && kIndexDim == 128 ? 64 : kBlock;
  const KlArguments<T>& a;
  std::byte* memory;
  const KlBarriers& barriers;
  std::uint32_t warpgroup, lane;
  std::int32_t first_row;  ///< of this thread's two, eight apart
  // This pair's:
  std::int32_t query[2] = {-1, -1}, visible[2] = {0, 0};
  std::uint32_t tiles = 0;

  __device__ std::int32_t key_of(int i) const { return 8 * (i / 4) + 2 * static_cast<std::int32_t>(lane % 4) + i % 2; }
  __device__ void release(std::uint64_t* barrier) const {
    __syncwarp();
    if (lane == 0) ptx::arrive(barrier);
  }

  __device__ void read_rows(const KlPair& pair) {
    const KlRow* rows = reinterpret_cast<const KlRow*>(memory + Memory::kRows) + tiles % 2 * kKlTileRows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const KlRow row = rows[first_row + 8 * h];
      query[h] = row.query;
      visible[h] = row.query < 0 ? 0 : max_of(0, min_of(kBlock, row.seen - pair.offset));
    }
  }
  /// Number of the row's partial results, -1: of another chunk, or no row.
  __device__ std::int64_t place(int h) const {
    const std::int32_t local = query[h] - a.first_query;
    if (query[h] < 0 || local < 0 || local >= a.queries) return -1;
    const auto* slots = reinterpret_cast<const std::uint8_t*>(memory + Memory::kSlots) + tiles % 2 * kKlTileRows;
    return std::int64_t{local} * a.slots + slots[first_row + 8 * h];
  }

  /// This row's number of the tensor's head; 0 for rows that are none, which see nothing.
  __device__ float row_value(const Strided<float>& tensor, int h, std::int32_t head) const {
    return query[h] < 0 ? 0.0f : *tensor.at(query[h], head);
  }

  /// kSums: the block's maxima and sums, added to those of the blocks before.
  __device__ __forceinline__ void add_block_sums(float (&s)[kKeys / 2], float scale, std::int32_t branch,
                                                 bool is_first) const {
    float top[2] = {-infinity(), -infinity()}, sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      s[i] = key_of(i) < visible[i / 2 % 2] ? __fmul_rn(s[i], scale) : -infinity();
      top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
    }
    float subtract[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(kFullMask, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(kFullMask, top[h], 2));
      subtract[h] = top[h] == -infinity() ? 0.0f : top[h];
    }
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) sum[i / 2 % 2] += exp_fast(s[i] - subtract[i / 2 % 2]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] = quad_sum(sum[h]);
      const std::int64_t at = place(h);
      if (lane % 4 != 0 || at < 0) continue;
      KlSums* to = a.sums + at * (a.group_size + 1) + branch;
      const KlSums here{top[h], sum[h]};
      *to = is_first ? here : add_sums(*to, here);
    }
  }

  /// kValue: the block's share of the divergence, added to that of the blocks before.
  __device__ __forceinline__ void add_block_value(const float (&mass)[kBlock / 2], const float (&s)[kKeys / 2],
                                                  bool is_first) const {
    float value[2] = {0, 0}, mass_sum[2] = {0, 0}, student_sum[2] = {0, 0};
    const float lse[2] = {row_value(a.lse_index, 0, a.group), row_value(a.lse_index, 1, a.group)};
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      const int h = i / 2 % 2;
      if (key_of(i) >= visible[h]) continue;
      const float log_student = __fmul_rn(s[i], a.index_scale) - lse[h];
      student_sum[h] += exp_fast(log_student);
      mass_sum[h] += mass[i];
      if (!(mass[i] == 0.0f)) value[h] += mass[i] * (logf(mass[i]) - log_student);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      value[h] = quad_sum(value[h]);
      mass_sum[h] = quad_sum(mass_sum[h]);
      student_sum[h] = quad_sum(student_sum[h]);
      const std::int64_t at = place(h);
      if (lane % 4 != 0 || at < 0) continue;
      KlValue& to = a.values[at];
      const KlValue before = is_first ? KlValue{0, 0, 0} : to;
      to = {before.value + value[h], before.mass + mass_sum[h], before.student + student_sum[h]};
    }
  }

  /// Gradients: rows of index queries, and of index keys when new, that are not finite become zeros and are noted. A
  /// product multiplies all keys with all queries, and 0 * NaN is NaN: without this they would reach those who do not
  /// see them. Those who do get NaN from (Q - P). A thread a row: the swizzle keeps eight of them off each other's
  /// banks.
  __device__ void remove_non_finite(bool has_new_keys) const {
    const bool is_query = warpgroup == 0;
    const std::uint32_t row = threadIdx.x % 128;
    if (is_query || (has_new_keys && row < kBlock)) {
      std::byte* tile = memory + (is_query ? Memory::kIndexQueries : Memory::kIndexKeys);
      const std::uint32_t column_bytes = is_query ? Memory::kRowColumn : Memory::kKeyColumn;
      constexpr std::uint32_t kExponents = std::is_same_v<T, BFloat16> ? 0x7f807f80u : 0x7c007c00u;
      constexpr std::uint32_t kCarry = std::is_same_v<T, BFloat16> ? 0x00800080u : 0x04000400u;
      const auto chunk_of = [&](std::uint32_t chunk) {
        return reinterpret_cast<uint4*>(tile + chunk / 8 * column_bytes +
                                        swizzled(row * 128 + chunk % 8 * 16, Swizzle::k128));
      };
      std::uint32_t found = 0;  // a half whose exponent is all ones carries into its sign bit
#pragma unroll 4
      for (std::uint32_t chunk = 0; chunk < kIndexDim / 8; ++chunk) {
        const uint4 words = *chunk_of(chunk);
        found |= ((words.x & kExponents) + kCarry) | ((words.y & kExponents) + kCarry) |
                 ((words.z & kExponents) + kCarry) | ((words.w & kExponents) + kCarry);
      }
      const bool is_bad = (found & 0x80008000u) != 0;
      if (is_bad) {
        for (std::uint32_t chunk = 0; chunk < kIndexDim / 8; ++chunk) *chunk_of(chunk) = make_uint4(0, 0, 0, 0);
      }
      reinterpret_cast<std::uint8_t*>(memory + (is_query ? Memory::kBadRows : Memory::kBadKeys))[row] = is_bad ? 1 : 0;
      ptx::fence_proxy_async();
    }
    ptx::named_sync(kConsumerBarrier, kKlConsumers);
  }

  /// Gradients: (Q - P) in the storage type, as the left operand of a product.
  __device__ __forceinline__ void make_differences(std::uint32_t (&p)[kBlock / 16][4], const float (&mass)[kBlock / 2],
                                                   float (&s)[kKeys / 2]) const {
    float lse[2], factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      lse[h] = row_value(a.lse_index, h, a.group);
      factor[h] = kKlGradientScale / row_value(a.teacher_norm, h, a.group);
    }
#pragma unroll
    for (int part = 0; part < kBlock / kKeys; ++part) {
      score_index(s, part);
#pragma unroll
      for (int j = 0; j < kKeys / 2; j += 2) {
        const int i = part * (kKeys / 2) + j, h = i / 2 % 2;
        const auto difference = [&](int offset) {
          const float student = exp_fast(__fmul_rn(s[j + offset], a.index_scale) - lse[h]);
          const float value = student * kKlGradientScale - mass[i + offset] * factor[h];
          return key_of(i + offset) < visible[h] ? value : 0.0f;
        };
        p[i / 8][i / 2 % 4] = pack_two<T>(difference(0), difference(1));
      }
    }
    mark_non_finite(p);
  }

  /// NaN where remove_non_finite took something away from those who see it: rarely.
  __device__ __forceinline__ void mark_non_finite(std::uint32_t (&p)[kBlock / 16][4]) const {
    const auto* bad_rows = reinterpret_cast<const std::uint8_t*>(memory + Memory::kBadRows);
    const auto* bad_keys = reinterpret_cast<const std::uint8_t*>(memory + Memory::kBadKeys);
    const bool has_bad_keys =
        lane < kBlock / 4 && reinterpret_cast<const std::uint32_t*>(memory + Memory::kBadKeys)[lane] != 0;
    const bool has_bad_rows = (bad_rows[first_row] | bad_rows[first_row + 8]) != 0;
    if (__any_sync(kFullMask, has_bad_keys || has_bad_rows) == 0) return;
    const std::uint32_t nan = pack_two<T>(quiet_nan(), 0.0f);
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      const int h = i / 2 % 2;
      const bool is_bad = key_of(i) < visible[h] && (bad_rows[first_row + 8 * h] | bad_keys[key_of(i)]) != 0;
      if (is_bad) p[i / 8][i / 2 % 4] |= nan << (16 * (i % 2));
    }
  }

  /// dq[64, kIndexDim] = or += (Q - P) K_idx.
  __device__ __forceinline__ void multiply_index_keys(float (&dq)[kIndexDim / 2],
                                                      const std::uint32_t (&p)[kBlock / 16][4], bool accumulate) const {
    const std::uint64_t keys =
        ptx::matrix_descriptor(memory + Memory::kIndexKeys, Memory::kKeyColumn, 1024, Swizzle::k128);
    ptx::fence_registers(dq);
    ptx::wgmma_fence();
#pragma unroll
    for (std::uint32_t step = 0; step < kBlock / 16; ++step) {
      ptx::wgmma<kIndexDim, T, ptx::Major::kOuter>(dq, p[step], ptx::advance(keys, step * 16 * 128),
                                                   step > 0 || accumulate);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::fence_registers(dq);
  }

  /// dk[64, kIndexDim] = or += (Q - P)^T Q_idx. With blocks of 128 a warpgroup takes 64 keys and all queries, with
  /// blocks of 64 all keys and its own 64 queries.
  __device__ __forceinline__ void multiply_index_queries(float (&dk)[kIndexDim / 2],
                                                         const std::uint32_t (&p)[kBlock / 16][4],
                                                         bool accumulate) const {
    std::byte* differences = memory + Memory::kGradients;
#pragma unroll
    for (std::uint32_t i = 0; i < kBlock / 4; ++i) {
      const std::uint32_t row = static_cast<std::uint32_t>(first_row) + 8 * (i % 2), chunk = i / 2;  // 8 keys
      *reinterpret_cast<std::uint32_t*>(differences + chunk / 8 * Memory::kRowColumn +
                                        swizzled(row * 128 + chunk % 8 * 16, Swizzle::k128) + lane % 4 * 4) =
          p[i / 4][i % 4];
    }
    ptx::fence_proxy_async();
    ptx::named_sync(kConsumerBarrier, kKlConsumers);
    constexpr std::uint32_t kSteps = kBlock == 128 ? 8 : 4;
    const std::uint32_t first = kBlock == 128 ? 0 : warpgroup * 64 * 128;
    const std::uint64_t left =
        ptx::matrix_descriptor(differences + (kBlock == 128 ? warpgroup * Memory::kRowColumn : first),
                               Memory::kRowColumn, 1024, Swizzle::k128);
    const std::uint64_t right =
        ptx::matrix_descriptor(memory + Memory::kIndexQueries + first, Memory::kRowColumn, 1024, Swizzle::k128);
    ptx::fence_registers(dk);
    ptx::wgmma_fence();
#pragma unroll
    for (std::uint32_t step = 0; step < kSteps; ++step) {
      ptx::wgmma<kIndexDim, T, ptx::Major::kOuter, ptx::Major::kOuter>(
          dk, ptx::advance(left, step * 16 * 128), ptx::advance(right, step * 16 * 128), step > 0 || accumulate);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::fence_registers(dk);
  }

  /// Rows of a 64 x kIndexDim accumulator, two neighbours a store; to[h] null: not this row.
  __device__ __forceinline__ void store_rows(const float (&d)[kIndexDim / 2], float* const (&to)[2]) const {
#pragma unroll
    for (int i = 0; i < kIndexDim / 2; i += 2) {
      float* row = to[i / 2 % 2];
      if (row != nullptr) *reinterpret_cast<float2*>(row + key_of(i)) = make_float2(d[i], d[i + 1]);
    }
  }
  __device__ __forceinline__ void store_dq(const float (&dq)[kIndexDim / 2]) const {
    const std::int64_t places[2] = {place(0), place(1)};
    float* const to[2] = {places[0] < 0 ? nullptr : a.dq_parts + places[0] * kIndexDim,
                          places[1] < 0 ? nullptr : a.dq_parts + places[1] * kIndexDim};
    store_rows(dq, to);
  }
  /// This thread's rows of an item's sums. Keys or queries shared out, the two warpgroups' 64 rows lie one behind the
  /// other.
  __device__ float* dk_row(std::int32_t item, int h) const {
    return a.dk_parts + (std::int64_t{item} * 128 + first_row + 8 * h) * kIndexDim;
  }
  __device__ __forceinline__ void load_dk(float (&dk)[kIndexDim / 2], std::int32_t item) const {
#pragma unroll
    for (int i = 0; i < kIndexDim / 2; i += 2) {
      const float2 two = *reinterpret_cast<const float2*>(dk_row(item, i / 2 % 2) + key_of(i));
      dk[i] = two.x;
      dk[i + 1] = two.y;
    }
  }
  __device__ __forceinline__ void store_dk(const float (&dk)[kIndexDim / 2], std::int32_t item) const {
    float* const to[2] = {dk_row(item, 0), dk_row(item, 1)};
    store_rows(dk, to);
  }

  /// Scores of the index branch against a part of the block.
  __device__ __forceinline__ void score_index(float (&s)[kKeys / 2], int part) const {
    multiply_rows<T, kBlock, kKeys>(s, memory + Memory::kIndexQueries + warpgroup * 64 * 128,
                                    memory + Memory::kIndexKeys + part * kKeys * 128, a.index_columns);
  }

  /// The heads of a pair, one product each; `mass` sums (or takes the largest of) their probabilities.
  __device__ __forceinline__ void go_through_heads(const KlPair& pair, bool is_active, float (&mass)[kBlock / 2],
                                                   float (&s)[kKeys / 2], std::uint32_t& heads) const {
    for (std::int32_t i = 0; i < a.group_size; ++i, ++heads) {
      const std::uint32_t stage = heads % kKlStages;
      const std::int32_t head = a.group * a.group_size + i;
      float lse[2] = {0, 0};
      if constexpr (kMode != KlMode::kSums) {  // on its way while the product is waited for
        lse[0] = row_value(a.lse_main, 0, head);
        lse[1] = row_value(a.lse_main, 1, head);
      }
      ptx::wait(barriers.heads_full + stage, heads / kKlStages & 1);
      if (!is_active) {
        release(barriers.heads_empty + stage);
        continue;
      }
#pragma unroll
      for (int part = 0; part < kBlock / kKeys; ++part) {
        multiply_rows<T, kBlock, kKeys>(s, memory + Memory::kHeads + stage * Memory::kRowTile + warpgroup * 64 * 128,
                                        memory + Memory::kKeys + part * kKeys * 128, a.columns);
        if (part + 1 == kBlock / kKeys) release(barriers.heads_empty + stage);
        if constexpr (kMode == KlMode::kSums) {
          add_block_sums(s, a.scale, i, (pair.flags & kTileBegins) != 0);
        } else {
          add_masses(mass, s, part, lse);
        }
      }
    }
  }

  /// The mass of keys that are not visible is anything; it is left out where it is used.
  __device__ __forceinline__ void add_masses(float (&mass)[kBlock / 2], const float (&s)[kKeys / 2], int part,
                                             const float (&lse)[2]) const {
    const auto probability = [&](int i) { return exp_fast(__fmul_rn(s[i], a.scale) - lse[i / 2 % 2]); };
    if (a.takes_max) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        float& largest = mass[part * (kKeys / 2) + i];
        const float more = probability(i);
        largest = more > largest || more != more ? more : largest;  // NaN stays
      }
    } else {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) mass[part * (kKeys / 2) + i] += probability(i);
    }
  }

  __device__ __forceinline__ void run() {
    float sums[kIndexDim / 2];  // dk of the item or dq of the tile, where the mode has one
    std::uint32_t heads = 0, pairs = 0, blocks = 0;
    bool has_sums = false;  // whether there is anything in `sums`: dk of the item so far
    for (;; ++pairs) {
      ptx::wait(barriers.heads_full + heads % kKlStages, heads / kKlStages & 1);
      const KlPair pair = reinterpret_cast<const KlPair*>(memory + Memory::kPairs)[pairs % kKlPairs];
      if (pair.rows < 0) return;
      const bool tile_begins = (pair.flags & kTileBegins) != 0, keys_begin = (pair.flags & kKeysBegin) != 0;
      const bool is_active = static_cast<std::int32_t>(warpgroup) * 64 < pair.rows;
      read_rows(pair);
      if (keys_begin) ptx::wait(barriers.keys_full, blocks & 1);
      float mass[kBlock / 2], s[kKeys / 2];
#pragma unroll
      for (int i = 0; i < kBlock / 2; ++i) mass[i] = 0;
      go_through_heads(pair, is_active, mass, s, heads);
      if ((pair.flags & kKeysEnd) != 0) release(barriers.keys_empty);

      if (keys_begin) ptx::wait(barriers.index_keys_full, blocks & 1);
      if constexpr (kHasGradients) {
        if (tile_begins || keys_begin) remove_non_finite(keys_begin);
      }
      if constexpr (!kHasGradients) {
        if (is_active) {
          score_index(s, 0);
          if constexpr (kMode == KlMode::kSums) {
            add_block_sums(s, a.index_scale, a.group_size, tile_begins);
          } else {
            add_block_value(mass, s, tile_begins);
          }
        }
      } else {
        std::uint32_t p[kBlock / 16][4] = {};
        if (is_active) make_differences(p, mass, s);
        if constexpr (kMode == KlMode::kKeysGradient) {
          if ((pair.flags & kResumes) != 0) {
            load_dk(sums, pair.item);
            has_sums = true;
          }
          if ((pair.flags & kAddsKeys) != 0) {
            multiply_index_queries(sums, p, has_sums);
            has_sums = true;
          }
          if (is_active && a.dq_parts != nullptr) {
            float dq[kIndexDim / 2];
            multiply_index_keys(dq, p, false);
            store_dq(dq);
          }
          if ((pair.flags & kItemEnds) != 0) {
            if (has_sums) store_dk(sums, pair.item);
            has_sums = false;
          }
        } else if (is_active) {
          multiply_index_keys(sums, p, !tile_begins);
          if ((pair.flags & kTileEnds) != 0) store_dq(sums);
        }
      }
      if ((pair.flags & kKeysEnd) != 0) {
        release(barriers.index_keys_empty);
        ++blocks;
      }
      if ((pair.flags & kTileEnds) != 0) {
        release(barriers.index_queries_empty);
        ++tiles;
      }
    }
  }
};

template <class T, int kBlock, int kIndexDim, KlMode kMode>
__global__ void __launch_bounds__(kKlThreads, 1)
    kl_pairs(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap k_idx_map, KlArguments<T> a) {
  std::byte* memory = shared_memory();
  const KlBarriers barriers(memory + KlMemory<kBlock>::kBarriers);
  if (threadIdx.x == 0) {
    ptx::barrier_init(barriers.keys_full, 1);
    ptx::barrier_init(barriers.keys_empty, kKlConsumerWarps);
    ptx::barrier_init(barriers.index_keys_full, 1);
    ptx::barrier_init(barriers.index_keys_empty, kKlConsumerWarps);
    ptx::barrier_init(barriers.index_queries_empty, kKlConsumerWarps);
    for (std::uint32_t stage = 0; stage < kKlStages; ++stage) {
      ptx::barrier_init(barriers.heads_full + stage, kKlFeeders);
      ptx::barrier_init(barriers.heads_empty + stage, kKlConsumerWarps);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  // 65536 registers: 128 * 40 + 256 * 232 = 64512.
  if (threadIdx.x < kKlFeeders) {
    ptx::lower_registers<40>();
    KlFeeder<T, kBlock>{a, k_map, k_idx_map, memory, barriers, threadIdx.x}.run();
  } else {
    ptx::raise_registers<232>();
    const std::uint32_t warpgroup = threadIdx.x / 128 - 1, lane = threadIdx.x % kWarpSize;
    const std::uint32_t row = warpgroup * 64 + threadIdx.x / kWarpSize % 4 * 16 + lane / 4;
    KlConsumer<T, kBlock, kIndexDim, kMode>{a, memory, barriers, warpgroup, lane, static_cast<std::int32_t>(row)}.run();
  }
}

}  // namespace msa::cuda
