// SPDX-License-Identifier: Apache-2.0
// attention_backward-inl.h for bf16 tensors on machines with bf16 dot products: the same tasks and visits, with all
// five products in bf16 and everything between them in float; P and dS are rounded to bf16 before they meet values,
// queries and keys. Sums over rows are made transposed, [dim, keys]: so the gradients are the operand that is packed,
// row by row as they arise, and the queries the one that is turned round. Tested in tests/unit/sparse_attention_test.cc
// and dense_attention_test.cc.
#if defined(MSA_CPU_ATTENTION_BACKWARD_BF16_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_ATTENTION_BACKWARD_BF16_INL_H_
#undef MSA_CPU_ATTENTION_BACKWARD_BF16_INL_H_
#else
#define MSA_CPU_ATTENTION_BACKWARD_BF16_INL_H_
#endif

#include <hwy/highway.h>  // before any intrinsics: it silences what g++ says about them

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "src/core/layout.h"
#include "src/cpu/attention_backward_plan.h"
#include "src/cpu/attention_backward_problem.h"
#include "src/cpu/attention_backward_rows-inl.h"
#include "src/cpu/attention_bf16-inl.h"
#include "src/cpu/bf16_dot.h"
#include "src/cpu/bf16_rows-inl.h"
#include "src/cpu/block_lists.h"
#include "src/cpu/prefetch_queue.h"
#include "src/cpu/row_ops-inl.h"
#include "src/cpu/tile-inl.h"

#if HWY_TARGET == HWY_AVX3

#include <immintrin.h>

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// As ChunkBackward; the parts of dk and dv are transposed, [head_dim, block_size] and [value_dim, block_size].
class Bf16ChunkBackward {
 public:
  HWY_ATTR Bf16ChunkBackward(const BackwardProblem& problem, const AttentionShape& shape, const BackwardLayout& layout,
                             const QueryChunk& chunk, std::int64_t kv_head, float* scratch)
      : problem_(problem),
        shape_(shape),
        sequence_(core::get_sequence(*problem.batch, chunk.sequence)),
        kv_head_(kv_head),
        rows_{sequence_.query_begin + chunk.begin, kv_head * shape.group_size, shape.group_size,
              (chunk.end - chunk.begin) * shape.group_size},
        head_inner_(padded_inner(shape.head_dim)),
        value_inner_(padded_inner(shape.value_dim)),
        key_inner_(padded_inner(shape.block_size)),
        key_pair_stride_(padded_pair_stride(shape.block_size)),
        head_pair_stride_(padded_pair_stride(shape.head_dim)),
        row_stride_(backward_bf16_row_stride(shape.group_size)),
        gradient_stride_(key_inner_ + 32),
        score_stride_(padded_stride(key_inner_)),
        key_stride_(padded_stride(shape.block_size)),
        key_rows_(problem.k, *problem.batch),
        value_rows_(problem.v, *problem.batch),
        terms_(reinterpret_cast<RowTerms*>(scratch + layout.terms)),
        query_grads_(scratch + layout.query_grads),
        keys_(bf16(scratch + layout.keys)),
        keys_t_(bf16(scratch + layout.keys_t)),
        values_t_(bf16(scratch + layout.values_t)),
        queries_(bf16(scratch + layout.queries)),
        out_grads_(bf16(scratch + layout.out_grads)),
        queries_t_(bf16(scratch + layout.queries_t)),
        out_grads_t_(bf16(scratch + layout.out_grads_t)),
        scores_(scratch + layout.scores),
        grads_(scratch + layout.grads),
        gradient_rows_(bf16(scratch + layout.gradient_rows)),
        gradient_pairs_(bf16(scratch + layout.gradient_pairs)),
        probability_pairs_(bf16(scratch + layout.probability_pairs)),
        products_(scratch + layout.products),
        tile_rows_(reinterpret_cast<std::int32_t*>(scratch + layout.tile_rows)),
        lists_(*problem.batch, sequence_, problem.blocks, kv_head, shape.block_size, chunk.begin, chunk.end,
               reinterpret_cast<std::int32_t*>(scratch + layout.lists)) {
    std::fill(query_grads_, query_grads_ + rows_.count * shape.head_dim, 0.0f);
  }

  HWY_ATTR void find_terms() {
    for (std::int64_t r = 0; r < rows_.count; ++r) {
      const std::int64_t row = rows_.row(r);
      const std::int64_t head = rows_.head(r);
      const float mean = dot_bf16(head_row(problem_.saved.out, row, head), head_row(problem_.saved.dout, row, head));
      const float lse_grad = problem_.saved.dlse.empty() ? 0.0f : read_float(problem_.saved.dlse, row, head);
      terms_[r] = {
          .shift = read_float(problem_.saved.lse, row, head), .weight = 1.0f, .mean = mean, .lse_grad = lse_grad};
    }
  }

  bool has_members(std::int64_t block) const { return block < lists_.blocks() && lists_.count(block) > 0; }

  HWY_ATTR void add_block(std::int64_t block, float* part) {
    const std::int32_t* members = lists_.members(block);
    const std::int64_t count = lists_.count(block);
    const std::int64_t begin = block * shape_.block_size;
    // Nothing behind the last member's position is read: it need not even hold a key.
    const std::int64_t keys = lists_.visible_keys(members[count - 1], block);
    pack_keys(key_rows_, sequence_.index, kv_head_, begin, keys, shape_.head_dim, keys_t_, key_pair_stride_);
    pack_keys(value_rows_, sequence_.index, kv_head_, begin, keys, shape_.value_dim, values_t_, key_pair_stride_);
    bool has_finite_keys = load_keys(begin, keys);
    const std::int64_t tile_queries = backward_bf16_tile_queries(shape_.group_size);
    for (std::int64_t t0 = 0; t0 < count; t0 += tile_queries) {
      if (t0 + tile_queries < count) {
        queue_rows(members + t0 + tile_queries, std::min(tile_queries, count - t0 - tile_queries));
      } else {
        std::int64_t next = block + 1;
        while (next < lists_.blocks() && lists_.count(next) == 0) ++next;
        if (next < lists_.blocks()) queue_rows(lists_.members(next), std::min(tile_queries, lists_.count(next)));
      }
      add_tile(block, keys, members + t0, std::min(tile_queries, count - t0), has_finite_keys, part);
      // A tile that must not touch some of the keys has cleared them.
      if (!has_finite_keys) has_finite_keys = load_keys(begin, keys);
    }
  }

  HWY_ATTR void write_query_grads() { store_query_grads(problem_.scale, rows_, query_grads_, problem_.grads.dq); }

  /// Writes dk and dv of a block from its sum.
  HWY_ATTR void write_key_grads(std::int64_t block, float* sum) {
    const std::int64_t begin = block * shape_.block_size;
    const std::int64_t keys = std::min(shape_.block_size, sequence_.keys - begin);
    const std::int64_t first = problem_.batch->cu_seqlens_k[static_cast<std::size_t>(sequence_.index)] + begin;
    store_transposed(sum, shape_.head_dim, keys, problem_.scale, first, problem_.grads.dk);
    store_transposed(sum + shape_.block_size * shape_.head_dim, shape_.value_dim, keys, 1.0f, first, problem_.grads.dv);
  }

 private:
  static std::uint16_t* bf16(float* scratch) { return reinterpret_cast<std::uint16_t*>(scratch); }

  // <a, b> of two rows of value_dim elements.
  HWY_ATTR float dot_bf16(const std::byte* a, const std::byte* b) const {
    const auto widen = [](const std::byte* from) HWY_ATTR {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    };
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t d = 0; d < shape_.value_dim; d += 16) {
      sum = _mm512_fmadd_ps(widen(a + 2 * d), widen(b + 2 * d), sum);
    }
    return _mm512_reduce_add_ps(sum);
  }

  HWY_ATTR bool load_keys(std::int64_t begin, std::int64_t keys) {
    return pack_values(key_rows_, sequence_.index, kv_head_, begin, keys, shape_.head_dim, keys_, head_pair_stride_);
  }

  HWY_ATTR void store_transposed(const float* sum, std::int64_t dim, std::int64_t keys, float factor,
                                 std::int64_t first_key, const TensorView& to) {
    alignas(64) float rows[16 * kMaxHeadDim];
    for (std::int64_t j = 0; j < keys; j += 16) {
      const std::int64_t here = std::min<std::int64_t>(16, keys - j);
      transpose(sum + j, shape_.block_size, dim, here, rows, dim);
      for (std::int64_t i = 0; i < here; ++i) {
        scale_row(factor, dim, rows + i * dim);
        store_row(rows + i * dim, dim, to.dtype, head_row(to, first_key + j + i, kv_head_));
      }
    }
  }

  // `keys` of the block are loaded; has_finite_keys says whether all of them are finite.
  HWY_ATTR void add_tile(std::int64_t block, std::int64_t keys, const std::int32_t* members, std::int64_t count,
                         bool has_finite_keys, float* part) {
    const std::int64_t group_size = shape_.group_size;
    const std::int64_t rows = count * group_size;
    const std::int64_t least = lists_.visible_keys(members[0], block);
    const std::int64_t most = lists_.visible_keys(members[count - 1], block);
    load_tile(members, count);
    // Keys that a row does not see have P = dS = 0, which is as good as leaving them out, but for a 0 times infinity or
    // NaN of somebody else's.
    const bool may_touch_keys = has_finite_keys || least == keys;
    const bool may_touch_rows = least == most || (are_finite_bf16(queries_, head_inner_, rows, shape_.head_dim) &&
                                                  are_finite_bf16(out_grads_, value_inner_, rows, shape_.value_dim));
    for (std::int64_t first = 0; first < rows; first += kBf16Rows) {
      const std::int64_t here = std::min(kBf16Rows, rows - first);
      find_gradients(block, members, first, here, most);
      if (may_touch_keys) add_query_grads(first, here, most);
    }
    if (!may_touch_keys) {  // one query after the other, the last one first: what it does not see is cleared
      std::int64_t kept = keys;
      for (std::int64_t t = count - 1; t >= 0; --t) {
        for (; kept > lists_.visible_keys(members[t], block); --kept) clear_key(kept - 1);
        for (std::int64_t h = 0; h < group_size; h += kBf16Rows) {
          add_query_grads(t * group_size + h, std::min(kBf16Rows, group_size - h), most);
        }
      }
    }
    if (may_touch_rows) {
      add_key_grads(rows, 0, most, part);
      return;
    }
    std::int64_t begin =
        0;  // keys from here on are seen by queries t, t + 1, ... only; what the others hold is cleared
    for (std::int64_t t = 0; t < count; ++t) {
      const std::int64_t end = lists_.visible_keys(members[t], block);
      if (end > begin) add_key_grads(rows, begin, end, part);
      begin = end;
      for (std::int64_t r = t * group_size; r < (t + 1) * group_size; ++r) clear_row(r);
    }
  }

  // Rows as they are and turned round; zeros behind the last up to padded_inner.
  HWY_ATTR void load_tile(const std::int32_t* members, std::int64_t count) {
    const std::int64_t group_size = shape_.group_size;
    const std::int64_t rows = count * group_size;
    const auto load = [&](const ConstTensorView& tensor, std::int64_t inner, std::uint16_t* to) HWY_ATTR {
      for (std::int64_t t = 0; t < count; ++t) {
        copy_bf16_rows(tensor, rows_.first_row + members[t], rows_.first_head, group_size, to + t * group_size * inner);
      }
      std::fill(to + rows * inner, to + padded_inner(rows) * inner, std::uint16_t{0});
    };
    load(problem_.q, head_inner_, queries_);
    load(problem_.saved.dout, value_inner_, out_grads_);
    for (std::int64_t r = 0; r < padded_inner(rows); r += 32) {
      transpose_32_rows(queries_ + r * head_inner_, head_inner_, shape_.head_dim, queries_t_ + r, row_stride_);
      transpose_32_rows(out_grads_ + r * value_inner_, value_inner_, shape_.value_dim, out_grads_t_ + r, row_stride_);
    }
    for (std::int64_t t = 0; t < count; ++t) {
      for (std::int64_t h = 0; h < group_size; ++h) {
        tile_rows_[t * group_size + h] = static_cast<std::int32_t>(members[t] * group_size + h);
      }
    }
  }

  void clear_key(std::int64_t key) {
    std::uint16_t* pair = keys_ + key / 2 * head_pair_stride_ + key % 2;
    for (std::int64_t d = 0; d < shape_.head_dim; ++d) pair[2 * d] = 0;
  }
  void clear_row(std::int64_t r) {
    for (std::int64_t d = 0; d < shape_.head_dim; ++d) queries_t_[d * row_stride_ + r] = 0;
    for (std::int64_t d = 0; d < shape_.value_dim; ++d) out_grads_t_[d * row_stride_ + r] = 0;
  }

  // The rows of the next tile: those of a chunk of many queries come from far away.
  void queue_rows(const std::int32_t* members, std::int64_t count) {
    soon_.clear();
    const std::int64_t group_size = shape_.group_size;
    for (std::int64_t t = 0; t < count; ++t) {
      for (const ConstTensorView* tensor : {&problem_.q, &problem_.saved.dout}) {
        const auto bytes = tensor->size(2) * static_cast<std::int64_t>(sizeof(std::uint16_t));
        const std::byte* first = head_row(*tensor, rows_.first_row + members[t], rows_.first_head);
        if (tensor->stride(1) == tensor->size(2)) {
          soon_.push(first, group_size * bytes);
        } else {
          for (std::int64_t h = 0; h < group_size; ++h) soon_.push(first + h * tensor->stride(1) * 2, bytes);
        }
      }
      soon_.push(query_grads_ + members[t] * group_size * shape_.head_dim,
                 group_size * shape_.head_dim * static_cast<std::int64_t>(sizeof(float)));
    }
  }

  // P and dS of rows [first, first + rows) of the tile, rows <= kBf16Rows, and zeros behind them up to kBf16Rows.
  HWY_ATTR void find_gradients(std::int64_t block, const std::int32_t* members, std::int64_t first, std::int64_t rows,
                               std::int64_t most) {
    const std::int64_t columns = padded_columns(most);
    multiply_rows(problem_.multiply_bf16, rows, columns, head_inner_, queries_ + first * head_inner_, head_inner_,
                  keys_t_, key_pair_stride_, scores_, score_stride_);
    multiply_rows(problem_.multiply_bf16, rows, columns, value_inner_, out_grads_ + first * value_inner_, value_inner_,
                  values_t_, key_pair_stride_, grads_, score_stride_);
    for (std::int64_t r = 0; r < kBf16Rows; r += 2) {
      if (r % 8 == 0 && problem_.needs_amx_tiles) keep_tiles_awake();
      Row pair[2];
      for (std::int64_t i = 0; i < 2; ++i) {
        const bool is_row = r + i < rows;
        const RowTerms terms = is_row ? terms_[tile_rows_[first + r + i]] : RowTerms();
        pair[i].visible = is_row ? lists_.visible_keys(members[(first + r + i) / shape_.group_size], block) : 0;
        pair[i].shift = _mm512_set1_ps(terms.shift);
        pair[i].mean = _mm512_set1_ps(terms.mean - terms.lse_grad);
      }
      differentiate_pair(pair, r, first + r, most);
    }
  }

  static constexpr std::int64_t kLinesAtOnce = 4;

  struct Row {
    std::int64_t visible;
    __m512 shift;  // lse
    __m512 mean;   // <dout, out> - dlse
  };
  struct Gradient {
    __m512i p;   // float, rounded so that the high half is the bf16
    __m512i ds;  // as p
  };

  // Sixteen keys from j on of row r of scores_ and grads_.
  HWY_ATTR Gradient differentiate(const Row& row, std::int64_t r, std::int64_t j, __m512 scale) const {
    const __m512i half = _mm512_set1_epi32(0x8000);
    __m512 p = shifted_exp(_mm512_loadu_ps(scores_ + r * score_stride_ + j), scale, row.shift);
    __m512 ds = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_loadu_ps(grads_ + r * score_stride_ + j), row.mean));
    if (j + 16 > row.visible) {
      const std::int64_t left = std::max<std::int64_t>(row.visible - j, 0);
      const auto mask = static_cast<__mmask16>((1u << left) - 1);
      p = _mm512_maskz_mov_ps(mask, p);
      ds = _mm512_maskz_mov_ps(mask, ds);
    }
    return {_mm512_add_epi32(_mm512_castps_si512(p), half), _mm512_add_epi32(_mm512_castps_si512(ds), half)};
  }

  // Rows r and r + 1 of scores_ and grads_, which are rows tile_row and tile_row + 1 of the tile.
  HWY_ATTR void differentiate_pair(const Row* pair, std::int64_t r, std::int64_t tile_row, std::int64_t most) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512 scale = _mm512_set1_ps(problem_.scale);
    std::uint16_t* rows = gradient_rows_ + tile_row * gradient_stride_;
    std::uint16_t* gradient_pairs = gradient_pairs_ + tile_row / 2 * key_pair_stride_;
    std::uint16_t* probability_pairs = probability_pairs_ + tile_row / 2 * key_pair_stride_;
    const auto side_by_side = [](__m512i even, __m512i other) HWY_ATTR {
      return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), other);
    };
    for (std::int64_t j = 0; j < padded_inner(most); j += 32) {
      const Gradient a0 = differentiate(pair[0], r, j, scale);
      const Gradient b0 = differentiate(pair[1], r + 1, j, scale);
      const Gradient a1 = differentiate(pair[0], r, j + 16, scale);
      const Gradient b1 = differentiate(pair[1], r + 1, j + 16, scale);
      soon_.ask(kLinesAtOnce);
      _mm512_storeu_si512(rows + j, _mm512_permutex2var_epi16(a0.ds, odd, a1.ds));
      _mm512_storeu_si512(rows + gradient_stride_ + j, _mm512_permutex2var_epi16(b0.ds, odd, b1.ds));
      _mm512_storeu_si512(gradient_pairs + 2 * j, side_by_side(a0.ds, b0.ds));
      _mm512_storeu_si512(probability_pairs + 2 * j, side_by_side(a0.p, b0.p));
      if (j + 16 >= shape_.block_size) continue;
      _mm512_storeu_si512(gradient_pairs + 2 * j + 32, side_by_side(a1.ds, b1.ds));
      _mm512_storeu_si512(probability_pairs + 2 * j + 32, side_by_side(a1.p, b1.p));
    }
  }

  // dq of rows [first, first + rows) of the tile, rows <= kBf16Rows, from the keys [0, most) as they are.
  HWY_ATTR void add_query_grads(std::int64_t first, std::int64_t rows, std::int64_t most) {
    const std::int64_t stride = padded_stride(shape_.head_dim);
    multiply_rows(problem_.multiply_bf16, rows, shape_.head_dim, padded_inner(most),
                  gradient_rows_ + first * gradient_stride_, gradient_stride_, keys_, head_pair_stride_, products_,
                  stride);
    for (std::int64_t r = 0; r < rows; ++r) {
      add_row(products_ + r * stride, shape_.head_dim, query_grads_ + tile_rows_[first + r] * shape_.head_dim);
    }
  }

  // dk and dv of keys [begin, end) from the tile's rows as they are.
  HWY_ATTR void add_key_grads(std::int64_t rows, std::int64_t begin, std::int64_t end, float* part) {
    const auto add = [&](std::int64_t dim, const std::uint16_t* rows_t, const std::uint16_t* pairs,
                         float* sum) HWY_ATTR {
      multiply_rows(problem_.multiply_bf16, dim, padded_columns(end), padded_inner(rows), rows_t, row_stride_, pairs,
                    key_pair_stride_, products_, key_stride_);
      for (std::int64_t d = 0; d < dim; ++d) {
        const float* from = products_ + d * key_stride_;
        float* to = sum + d * shape_.block_size;
        for (std::int64_t j = begin / 16 * 16; j < end; j += 16) {
          const unsigned low = j >= begin ? 0 : static_cast<unsigned>(begin - j);
          const unsigned high = end - j >= 16 ? 16 : static_cast<unsigned>(end - j);
          const auto mask = static_cast<__mmask16>(((1u << high) - 1) & ~((1u << low) - 1));
          const __m512 before = _mm512_loadu_ps(to + j);
          _mm512_storeu_ps(to + j, _mm512_mask_add_ps(before, mask, before, _mm512_loadu_ps(from + j)));
        }
      }
    };
    add(shape_.head_dim, queries_t_, gradient_pairs_, part);
    add(shape_.value_dim, out_grads_t_, probability_pairs_, part + shape_.block_size * shape_.head_dim);
  }

  const BackwardProblem& problem_;
  const AttentionShape& shape_;
  core::Sequence sequence_;
  std::int64_t kv_head_;
  ChunkRows rows_;
  std::int64_t head_inner_;
  std::int64_t value_inner_;
  std::int64_t key_inner_;
  std::int64_t key_pair_stride_;
  std::int64_t head_pair_stride_;
  std::int64_t row_stride_;
  std::int64_t gradient_stride_;
  std::int64_t score_stride_;
  std::int64_t key_stride_;
  core::KeyRows key_rows_;
  core::KeyRows value_rows_;
  RowTerms* terms_;
  float* query_grads_;
  std::uint16_t* keys_;
  std::uint16_t* keys_t_;
  std::uint16_t* values_t_;
  std::uint16_t* queries_;
  std::uint16_t* out_grads_;
  std::uint16_t* queries_t_;
  std::uint16_t* out_grads_t_;
  float* scores_;
  float* grads_;
  std::uint16_t* gradient_rows_;
  std::uint16_t* gradient_pairs_;
  std::uint16_t* probability_pairs_;
  float* products_;
  std::int32_t* tile_rows_;
  BlockLists lists_;
  PrefetchQueue soon_;
};

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET == HWY_AVX3

#endif  // MSA_CPU_ATTENTION_BACKWARD_BF16_INL_H_
