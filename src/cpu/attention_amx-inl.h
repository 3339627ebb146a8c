// SPDX-License-Identifier: Apache-2.0
// attention_bf16-inl.h for machines with AMX: the same chunk and order of blocks, with all matrices laid tile by tile
// and one fused kernel a visit (attention_amx.h). While a block is computed, the next one's keys and values are asked
// for. Tested in tests/unit/sparse_attention_test.cc and
// dense_attention_test.cc.
#if defined(MSA_CPU_ATTENTION_AMX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_ATTENTION_AMX_INL_H_
#undef MSA_CPU_ATTENTION_AMX_INL_H_
#else
#define MSA_CPU_ATTENTION_AMX_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "src/core/layout.h"
#include "src/cpu/attention-inl.h"
#include "src/cpu/attention_amx.h"
#include "src/cpu/attention_bf16-inl.h"
#include "src/cpu/plan.h"
#include "src/cpu/sparse_visits.h"

#if HWY_TARGET == HWY_AVX3

#include <immintrin.h>

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// Keys as AmxVisit reads them; zeros behind the last key up to a whole tile and behind the last dimension.
/// A tile's rows are asked for before the tile in front of it is read.
template <bool kIsBf16>
HWY_ATTR void pack_key_tiles(const std::byte* const* rows, DType dtype, std::int64_t count, std::int64_t head_dim,
                             std::uint16_t* out, PrefetchQueue& ahead) {
  if constexpr (kIsBf16) dtype = DType::kBFloat16;
  const std::int64_t row_bytes = head_dim * static_cast<std::int64_t>(dtype_size(dtype));
  for (std::int64_t j = 0; j < count; j += 16) {
    if (j % kBf16Inner == 0) keep_tiles_awake();
    ahead.ask(row_bytes / 32);
    const std::int64_t here = std::min<std::int64_t>(16, count - j);
    for (std::int64_t i = j + 16; i < std::min(j + 32, count); ++i) prefetch_ahead(rows[i], 0, row_bytes);
    for (std::int64_t d = 0; d < head_dim; d += 32, out += kTileElements) {
      const __mmask32 mask = first_of_32(head_dim - d);
      __m512i r[16];
      if (here == 16) {
        for (std::int64_t i = 0; i < 16; ++i) r[i] = load_as_bf16(rows[j + i], dtype, d, mask);
      } else {
        for (std::int64_t i = 0; i < 16; ++i) {
          r[i] = i < here ? load_as_bf16(rows[j + i], dtype, d, mask) : _mm512_setzero_si512();
        }
      }
      transpose_words(r, reinterpret_cast<std::uint32_t*>(out), 16);
    }
  }
}

/// Values as AmxVisit reads them; zeros behind the last key up to padded_inner. Returns whether all are finite.
template <bool kIsBf16>
HWY_ATTR bool pack_value_tiles(const std::byte* const* rows, DType dtype, std::int64_t count, std::int64_t value_dim,
                               std::uint16_t* out, PrefetchQueue& ahead) {
  if constexpr (kIsBf16) dtype = DType::kBFloat16;
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  const std::int64_t steps = padded_inner(count) / kBf16Inner;
  const std::int64_t row_bytes = value_dim * static_cast<std::int64_t>(dtype_size(dtype));
  __m512i largest = _mm512_setzero_si512();  // as words: from 0x7f80 on, infinity or NaN
  for (std::int64_t s = 0; s < steps; ++s) {
    keep_tiles_awake();
    const std::int64_t first = s * kBf16Inner;
    for (std::int64_t i = first + kBf16Inner; i < std::min(first + 2 * kBf16Inner, count); ++i) {
      prefetch_ahead(rows[i], 0, row_bytes);
    }
    for (std::int64_t t = 0; t < 16; ++t) {
      const std::int64_t j = first + t;
      ahead.ask(row_bytes / 128);
      std::uint16_t* to = out + s * kTileElements + t * 32;
      for (std::int64_t e = 0; e < value_dim; e += 32, to += 2 * steps * kTileElements) {
        const __mmask32 mask = first_of_32(value_dim - e);
        const __m512i a = j < count ? load_as_bf16(rows[j], dtype, e, mask) : _mm512_setzero_si512();
        const __m512i b = j + 16 < count ? load_as_bf16(rows[j + 16], dtype, e, mask) : _mm512_setzero_si512();
        largest = _mm512_max_epu16(largest, _mm512_and_si512(a, magnitude));
        largest = _mm512_max_epu16(largest, _mm512_and_si512(b, magnitude));
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
        if (value_dim - e > 16) {
          _mm512_storeu_si512(to + steps * kTileElements, _mm512_permutex2var_epi16(a, high, b));
        }
      }
    }
  }
  return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;
}

/// Rows in tiles: a row's lines lie a tile apart.
inline constexpr std::int64_t kTileBytes = 1024;
template <class T>
HWY_INLINE T* row_in_tiles(T* tiles, std::int64_t r, std::int64_t tiles_a_row) {
  constexpr std::int64_t kSize = sizeof(T);
  return tiles + ((r >> 4) * tiles_a_row * kTileBytes + (r & 15) * 64) / kSize;
}
inline HWY_ATTR void copy_lines(const void* from, void* to, std::int64_t lines) {
  for (std::int64_t at = 0; at < lines * kTileBytes; at += kTileBytes) {
    _mm512_storeu_si512(static_cast<char*>(to) + at, _mm512_loadu_si512(static_cast<const char*>(from) + at));
  }
}
inline HWY_ATTR void clear_lines(void* to, std::int64_t lines) {
  for (std::int64_t at = 0; at < lines * kTileBytes; at += kTileBytes) {
    _mm512_storeu_si512(static_cast<char*>(to) + at, _mm512_setzero_si512());
  }
}
inline void ask_lines(const void* from, std::int64_t lines) {
  for (std::int64_t at = 0; at < lines * kTileBytes; at += kTileBytes)
    _mm_prefetch(static_cast<const char*>(from) + at, _MM_HINT_T0);
}

/// As ChunkAttention. Rows of the chunk form tiles of sixteen, row r of them in tile r / 16.
class AmxChunkAttention : public ChunkState {
 public:
  HWY_ATTR AmxChunkAttention(const AttentionInput& input, const QueryChunk& chunk, std::int64_t kv_head, float* scratch)
      : ChunkState(input, chunk, kv_head, scratch),
        head_steps_(padded_inner(input.shape.head_dim) / kBf16Inner),
        value_tiles_(input.shape.value_dim / 16),
        scale_(input.scale),
        queries_(reinterpret_cast<std::uint16_t*>(scratch + input.layout.queries)),
        keys_(reinterpret_cast<std::uint16_t*>(scratch + input.layout.keys)),
        values_(reinterpret_cast<std::uint16_t*>(scratch + input.layout.values)),
        scores_(scratch + input.layout.scores),
        probabilities_(reinterpret_cast<std::uint16_t*>(scratch + input.layout.probabilities)) {
    for (std::int64_t t = 0; t < 2; ++t) {
      staged_[t].queries = row_in_tiles(reinterpret_cast<std::uint16_t*>(scratch + input.layout.staged_queries),
                                        t * kStagedRows, head_steps_);
      staged_[t].sums = row_in_tiles(scratch + input.layout.staged_sums, t * kStagedRows, value_tiles_);
    }
    const std::int64_t group_size = input.shape.group_size;
    const std::int64_t rows = count_ * group_size;
    const std::int64_t padded_rows = padded_columns(rows);
    // ChunkState cleared the rows there are; their tiles may hold more.
    std::fill(sums_ + rows * input.shape.value_dim, sums_ + padded_rows * input.shape.value_dim, 0.0f);
    std::fill(largest_ + rows, largest_ + padded_rows, kNegativeInfinity);
    std::fill(totals_ + rows, totals_ + padded_rows, 0.0f);
    for (std::int64_t r = 0; r < padded_rows; ++r) {
      std::uint16_t* to = query_row(r);
      const std::byte* from =
          r < rows ? head_row(input.q, first_row() + r / group_size, kv_head * group_size + r % group_size) : nullptr;
      for (std::int64_t d = 0; d < input.shape.head_dim; d += 32, to += kTileElements) {
        const __mmask32 mask = from != nullptr ? first_of_32(input.shape.head_dim - d) : 0;
        _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(mask, from == nullptr ? from : from + 2 * d));
      }
    }
  }

  /// Adds block `block` to the rows of members()[0, n). What `next` names is asked for meanwhile.
  HWY_ATTR void add_block(std::int64_t block, std::int64_t n, const NextBlock& next) {
    if (n == 0) return;
    start_block(block, n);
    next_ = next;
    const std::int64_t rows = n * input_.shape.group_size;
    const bool has_whole_tiles = group_fills_tiles();
    const bool lies_together = has_whole_tiles || fill_few_tiles(n);
    // Before the block is prepared, so that what is stored has arrived by the time it is read.
    if (!lies_together) stage(0, rows, staged_[0]);
    list_ahead(next.block);
    load_keys();
    const bool finite = load_values(n);
    if (!finite && visible_keys(members_[0]) < block_keys_) {
      add_block_one_by_one(n);
    } else if (has_whole_tiles || (lies_together && finite)) {
      // A tile in place may hold rows of queries that take no part, whose 0 must not meet what is not finite.
      add_in_place(n);
    } else {
      if (lies_together) stage(0, rows, staged_[0]);
      add_staged(rows);
    }
  }

  HWY_ATTR void score_block(std::int64_t block, std::int64_t n, float* scores) {
    start_block(block, n);
    load_keys();
    const std::int64_t rows = n * input_.shape.group_size;
    for (std::int64_t r = 0; r < rows; r += kStagedRows) {
      staged_[0].start(r, rows);
      stage_queries(staged_[0]);
      describe(staged_[0].visit);
      score_amx(staged_[0].visit, scores + split_scores_of(r));
    }
  }
  HWY_ATTR void weigh_block(std::int64_t block, std::int64_t n, const float* scores) {
    start_block(block, n);
    const bool finite = load_values(n);
    const std::int64_t group_size = input_.shape.group_size;
    if (finite || visible_keys(members_[0]) == block_keys_) {
      weigh_rows(0, n * group_size, n * group_size, scores);
      return;
    }
    for_each_member_from_the_last(
        n, [&](std::int64_t m) HWY_ATTR { weigh_rows(m * group_size, (m + 1) * group_size, n * group_size, scores); });
  }

  /// Divides, rounds and writes out and lse.
  HWY_ATTR void write() {
    alignas(64) float row[kMaxHeadDim];
    for (std::int64_t r = 0; r < count_ * input_.shape.group_size; ++r) {
      const float* from = sum_row(r);
      // + 0: which of the two zeros a sum is may depend on the visits of other rows in its tile.
      for (std::int64_t t = 0; t < value_tiles_; ++t) {
        _mm512_store_ps(row + 16 * t, _mm512_add_ps(_mm512_loadu_ps(from + t * kTileSums), _mm512_setzero_ps()));
      }
      write_row(r, row, static_cast<double>(largest_[r]));
    }
  }

 private:
  std::uint16_t* query_row(std::int64_t r) const { return row_in_tiles(queries_, r, head_steps_); }
  float* sum_row(std::int64_t r) const { return row_in_tiles(sums_, r, value_tiles_); }
  HWY_ATTR void load_keys() {
    key_rows_.list(sequence_.index, block_begin_, kv_head_, block_keys_, rows_);
    const DType dtype = key_rows_.dtype();
    const auto pack = dtype == DType::kBFloat16 ? pack_key_tiles<true> : pack_key_tiles<false>;
    pack(rows_, dtype, block_keys_, input_.shape.head_dim, keys_, ahead_);
  }
  // Returns whether all values are finite.
  HWY_ATTR bool load_values(std::int64_t n) {
    for (std::int64_t m = 0; m < n; ++m) seen_[members_[m]] = 1;
    value_rows_.list(sequence_.index, block_begin_, kv_head_, block_keys_, rows_);
    const DType dtype = value_rows_.dtype();
    const auto pack = dtype == DType::kBFloat16 ? pack_value_tiles<true> : pack_value_tiles<false>;
    return pack(rows_, dtype, block_keys_, input_.shape.value_dim, values_, ahead_);
  }
  AmxRows tile_of_chunk(std::int64_t tile) const {
    return {queries_ + tile * head_steps_ * kTileElements, sums_ + tile * value_tiles_ * kTileSums,
            largest_ + tile * 16, totals_ + tile * 16, nullptr};
  }

  bool group_fills_tiles() const { return input_.shape.group_size % 16 == 0; }
  // Whether member m and those behind it, since positions ascend, see the whole block, in whole tiles of probabilities.
  bool all_see_block_from(std::int64_t m) const {
    return block_keys_ % kBf16Inner == 0 && visible_keys(members_[m]) == block_keys_;
  }

  // Tiles of the chunk that hold rows of the members.
  std::int64_t tiles_spanned(std::int64_t n) const {
    const std::int64_t group_size = input_.shape.group_size;
    return ((members_[n - 1] + 1) * group_size + 15) / 16 - members_[0] * group_size / 16;
  }
  // Whether the members are neighbours and their tiles hardly more than they would fill.
  bool fill_few_tiles(std::int64_t n) const {
    const std::int64_t needed = (n * input_.shape.group_size + 15) / 16;
    return members_[n - 1] - members_[0] == n - 1 && tiles_spanned(n) <= std::max(needed, std::int64_t{4});
  }

  // Tiles of the chunk's own memory: all rows of each belong to members, or see nothing of the block.
  HWY_ATTR void add_in_place(std::int64_t n) {
    const std::int64_t group_size = input_.shape.group_size;
    const bool whole_groups = group_fills_tiles();
    const std::int64_t tiles = whole_groups ? n * group_size / 16 : tiles_spanned(n);
    const std::int64_t tiles_a_group = whole_groups ? group_size / 16 : 1;
    const std::int64_t first_tile = members_[0] * group_size / 16;
    const auto tile_at = [&](std::int64_t t) {
      return whole_groups ? members_[t / tiles_a_group] * tiles_a_group + t % tiles_a_group : first_tile + t;
    };
    const std::int64_t first_row = members_[0] * group_size;
    const std::int64_t end_row = (members_[n - 1] + 1) * group_size;
    const bool sees_all = all_see_block_from(0);
    std::int32_t visible[kMaxRowTiles][16];
    for (std::int64_t t = 0; t < tiles; t += kMaxRowTiles) {
      AmxVisit visit;
      visit.row_tiles = static_cast<int>(std::min<std::int64_t>(kMaxRowTiles, tiles - t));
      for (int k = 0; k < visit.row_tiles; ++k) {
        const std::int64_t tile = tile_at(t + k);
        visit.rows[k] = tile_of_chunk(tile);
        bool all = sees_all && tile * 16 >= first_row && tile * 16 + 16 <= end_row;
        for (std::int64_t r = 0; !all && r < 16; ++r) {
          const std::int64_t i = (tile * 16 + r) / group_size;
          const bool takes_part = i >= members_[0] && i <= members_[n - 1];
          visible[k][r] = takes_part ? static_cast<std::int32_t>(visible_keys(i)) : 0;
        }
        if (!all) visit.rows[k].visible = visible[k];
      }
      run(visit, tiles - t);
    }
  }

  // Up to kStagedRows of the members' rows, from `first` on, copied into tiles.
  struct Staged {
    void start(std::int64_t first_row, std::int64_t rows_end) {
      first = first_row;
      end = std::min(first + kStagedRows, rows_end);
      visit.row_tiles = static_cast<int>((end - first + 15) / 16);
    }
    std::uint16_t* queries;
    float* sums;
    std::int64_t first;
    std::int64_t end;
    AmxVisit visit;
    std::int32_t visible[kStagedRows];
    alignas(64) float largest[kStagedRows];
    alignas(64) float totals[kStagedRows];
  };

  // Calls body(i, row of the chunk) for the members' rows first + i, begin <= first + i < end.
  template <class Body>
  HWY_ATTR void for_member_rows(std::int64_t first, std::int64_t begin, std::int64_t end, const Body& body) const {
    const std::int64_t group_size = input_.shape.group_size;
    std::int64_t m = begin / group_size;
    std::int64_t h = begin % group_size;
    for (std::int64_t i = begin - first; i < end - first; ++m, h = 0) {
      const std::int64_t row = members_[m] * group_size;
      for (; h < group_size && i < end - first; ++h, ++i) body(i, row + h);
    }
  }

  // Zeros behind the last row.
  HWY_ATTR void stage_queries(Staged& staged) {
    const std::int64_t lines = head_steps_;
    for_member_rows(staged.first, staged.first, staged.end, [&](std::int64_t i, std::int64_t row) HWY_ATTR {
      copy_lines(query_row(row), row_in_tiles(staged.queries, i, lines), lines);
    });
    for (std::int64_t i = staged.end - staged.first; i < 16 * staged.visit.row_tiles; ++i) {
      clear_lines(row_in_tiles(staged.queries, i, lines), lines);
    }
    for (int k = 0; k < staged.visit.row_tiles; ++k) {
      staged.visit.rows[k].queries = row_in_tiles(staged.queries, 16 * k, lines);
    }
  }

  // Sums, maxima and totals of the members' rows [begin, end). The other rows see what is quickest, since what they
  // hold goes nowhere.
  HWY_ATTR void stage_sums(std::int64_t begin, std::int64_t end, Staged& staged) {
    const std::int64_t lines = value_tiles_;
    const std::int64_t first = staged.first;
    const std::int64_t rows = 16 * staged.visit.row_tiles;
    for (std::int64_t i = 0; i < rows; ++i) {
      if (i >= begin - first && i < end - first) continue;
      staged.largest[i] = staged.totals[i] = 0;
      clear_lines(row_in_tiles(staged.sums, i, lines), lines);
    }
    for_member_rows(first, begin, end, [&](std::int64_t i, std::int64_t row) HWY_ATTR {
      staged.largest[i] = largest_[row];
      staged.totals[i] = totals_[row];
      copy_lines(sum_row(row), row_in_tiles(staged.sums, i, lines), lines);
    });
    const std::int64_t group_size = input_.shape.group_size;
    const bool all = all_see_block_from(begin / group_size);
    if (!all) {
      std::fill(staged.visible, staged.visible + rows, static_cast<std::int32_t>(block_keys_));
      for (std::int64_t r = begin; r < end; ++r) {
        staged.visible[r - first] = static_cast<std::int32_t>(visible_keys(members_[r / group_size]));
      }
    }
    for (int k = 0; k < staged.visit.row_tiles; ++k) {
      AmxRows& tile = staged.visit.rows[k];
      tile.sums = row_in_tiles(staged.sums, 16 * k, lines);
      tile.largest = staged.largest + 16 * k;
      tile.totals = staged.totals + 16 * k;
      tile.visible = all ? nullptr : staged.visible + 16 * k;
    }
  }
  HWY_ATTR void unstage_sums(std::int64_t begin, std::int64_t end, const Staged& staged) {
    const std::int64_t lines = value_tiles_;
    for_member_rows(staged.first, begin, end, [&](std::int64_t i, std::int64_t row) HWY_ATTR {
      largest_[row] = staged.largest[i];
      totals_[row] = staged.totals[i];
      copy_lines(row_in_tiles(staged.sums, i, lines), sum_row(row), lines);
    });
  }

  // The members' rows from `first` up to `end`, as many as fit.
  HWY_ATTR void stage(std::int64_t first, std::int64_t end, Staged& staged) {
    staged.start(first, end);
    stage_queries(staged);
    stage_sums(staged.first, staged.end, staged);
  }

  // All of the members' rows, of which the first are staged. Those that follow are staged, or asked for, before.
  HWY_ATTR void add_staged(std::int64_t rows) {
    for (std::int64_t first = 0, turn = 0; first < rows; first += kStagedRows, turn = 1 - turn) {
      Staged& staged = staged_[turn];
      if (staged.end < rows) {
        stage(staged.end, rows, staged_[1 - turn]);
      } else {
        ask_next_rows();
      }
      run(staged.visit, (rows - first + 15) / 16);
      unstage_sums(staged.first, staged.end, staged);
    }
  }

  // Asks for the queries and sums of the rows that are staged first in the next block. All at once: a chunk of few
  // heads lies in the L2 cache, from where they are soon there.
  HWY_ATTR void ask_next_rows() const {
    const std::int64_t group_size = input_.shape.group_size;
    std::int64_t left = kStagedRows;
    for (std::int64_t v = 0; v < next_.count && left > 0; ++v) {
      const std::int64_t row = visit_query(next_.visits[v]) * group_size;
      for (std::int64_t h = 0; h < group_size && left > 0; ++h, --left) {
        ask_lines(query_row(row + h), head_steps_);
        ask_lines(sum_row(row + h), value_tiles_);
      }
    }
  }

  // Where the scores of the members' rows from `first` on lie between the two halves.
  std::int64_t split_scores_of(std::int64_t first) const {
    return amx_score_floats(1, (input_.shape.block_size + 15) / 16) * (first / 16);
  }
  // The members' rows [begin, end) of all_rows from their scores on, in the tiles in which they were scored.
  HWY_ATTR void weigh_rows(std::int64_t begin, std::int64_t end, std::int64_t all_rows, const float* scores) {
    for (std::int64_t first = begin / kStagedRows * kStagedRows; first < end; first += kStagedRows) {
      Staged& staged = staged_[0];
      staged.start(first, all_rows);
      const std::int64_t from = std::max(begin, first);
      const std::int64_t to = std::min(end, staged.end);
      stage_sums(from, to, staged);
      describe(staged.visit);
      weigh_amx(staged.visit, scores + split_scores_of(first));
      unstage_sums(from, to, staged);
    }
  }

  // A row must not touch values it does not see, 0 * NaN being NaN: one query after the other, the last one first, and
  // what the next one does not see is cleared.
  template <class Body>
  HWY_ATTR void for_each_member_from_the_last(std::int64_t n, const Body& body) {
    std::int64_t kept = block_keys_;
    for (std::int64_t m = n - 1; m >= 0; --m) {
      const std::int64_t visible = visible_keys(members_[m]);
      for (; kept > visible; --kept) clear_value(kept - 1);
      body(m);
    }
  }
  HWY_ATTR void add_block_one_by_one(std::int64_t n) {
    const std::int64_t group_size = input_.shape.group_size;
    for_each_member_from_the_last(n, [&](std::int64_t m) HWY_ATTR {
      const std::int64_t end = (m + 1) * group_size;
      for (std::int64_t first = m * group_size; first < end; first += kStagedRows) {
        stage(first, end, staged_[0]);
        run(staged_[0].visit, (m * group_size + group_size - first + 15) / 16 + m * ((group_size + 15) / 16));
        unstage_sums(first, staged_[0].end, staged_[0]);
      }
    });
  }

  void clear_value(std::int64_t key) {
    const std::int64_t steps = padded_inner(block_keys_) / kBf16Inner;
    std::uint16_t* pair = values_ + key / kBf16Inner * kTileElements + key % 16 * 32 + key % kBf16Inner / 16;
    for (std::int64_t e = 0; e < input_.shape.value_dim; ++e) {
      pair[e / 16 * steps * kTileElements + e % 16 * 2] = 0;
    }
  }

  // Keys and values of the block that follows, as far as the chunk's queries see them.
  HWY_ATTR void list_ahead(std::int64_t block) {
    ahead_.clear();
    if (block < 0) return;
    const std::int64_t begin = block * input_.shape.block_size;
    const std::int64_t count = std::min(input_.shape.block_size, position_of(count_ - 1) + 1 - begin);
    list_ahead(key_rows_, input_.shape.head_dim, begin, count);
    list_ahead(value_rows_, input_.shape.value_dim, begin, count);
  }
  HWY_ATTR void list_ahead(const core::KeyRows& rows, std::int64_t dim, std::int64_t begin, std::int64_t count) {
    const std::int64_t row_bytes = dim * static_cast<std::int64_t>(dtype_size(rows.dtype()));
    const std::int64_t stride = rows.token_stride_bytes();
    for (std::int64_t j = 0; j < count;) {
      const std::int64_t run = std::min(count - j, rows.run_length(begin + j));
      const std::byte* first = rows.row(sequence_.index, begin + j, kv_head_);
      if (stride == row_bytes) {
        ahead_.push(first, run * row_bytes);
      } else {
        for (std::int64_t i = 0; i < run; ++i) ahead_.push(first + i * stride, row_bytes);
      }
      j += run;
    }
  }

  // The next visit.row_tiles of `tiles` that are left, and as large a share of the lines ahead.
  HWY_ATTR void run(AmxVisit& visit, std::int64_t tiles) {
    describe(visit);
    visit.ahead = &ahead_;
    visit.ahead_lines = ahead_.lines() * visit.row_tiles / tiles;
    attend_amx(visit);
  }

  void describe(AmxVisit& visit) const {
    visit.keys = keys_;
    visit.values = values_;
    visit.head_steps = head_steps_;
    visit.key_tiles = (block_keys_ + 15) / 16;
    visit.value_tiles = value_tiles_;
    visit.scale = scale_;
    visit.scores = scores_;
    visit.probabilities = probabilities_;
  }

  std::int64_t head_steps_;
  std::int64_t value_tiles_;
  float scale_;
  std::uint16_t* queries_;
  std::uint16_t* keys_;
  std::uint16_t* values_;
  float* scores_;
  std::uint16_t* probabilities_;
  Staged staged_[2];
  NextBlock next_;
  PrefetchQueue ahead_;
  const std::byte* rows_[kMaxBlockSize];
};

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET == HWY_AVX3

#endif  // MSA_CPU_ATTENTION_AMX_INL_H_
