// SPDX-License-Identifier: Apache-2.0
// index_kl-inl.h for bf16 queries and keys on machines with bf16 dot products: the forward as a class of its own, which
// computes its scores anew each time it goes through the blocks; of the backward the parts that differ. The index
// branch takes bf16 products, too, where its tensors are bf16. Tested in tests/unit/index_kl_test.cc.
#if defined(MSA_CPU_INDEX_KL_BF16_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_INDEX_KL_BF16_INL_H_
#undef MSA_CPU_INDEX_KL_BF16_INL_H_
#else
#define MSA_CPU_INDEX_KL_BF16_INL_H_
#endif

#include <hwy/highway.h>  // before any intrinsics: it silences what g++ says about them

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "msa/index_kl.h"
#include "msa/select_blocks.h"
#include "src/core/layout.h"
#include "src/cpu/attention_bf16-inl.h"
#include "src/cpu/bf16_dot.h"
#include "src/cpu/bf16_rows-inl.h"
#include "src/cpu/block_lists.h"
#include "src/cpu/index_kl_plan.h"
#include "src/cpu/index_kl_problem.h"
#include "src/cpu/index_kl_rows-inl.h"
#include "src/cpu/key_tile-inl.h"
#include "src/cpu/prefetch_queue.h"
#include "src/cpu/row_ops-inl.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"

#if HWY_TARGET == HWY_AVX3

#include <immintrin.h>

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// Lines of what comes next that are asked for between sixteen keys of a query.
inline constexpr std::int64_t kKlLinesAtOnce = 4;

/// scores[rows, columns] of rows at a[0, rows), rows <= kBf16Rows, and packed keys.
inline HWY_ATTR void score_bf16_rows(Bf16Kernel multiply, const std::uint16_t* const* a, std::int64_t rows,
                                     std::int64_t columns, std::int64_t dim, const std::uint16_t* keys,
                                     std::int64_t key_stride, float* scores, std::int64_t score_stride) {
  Bf16Product product;
  product.rows = rows;
  product.cols = columns;
  product.inner = padded_inner(dim);
  product.a = a;
  product.b = keys;
  product.b_stride = key_stride;
  product.c = scores;
  product.c_stride = score_stride;
  multiply(product);
}

/// The rows of some queries of a group as a product's left side: where they lie, or, where their last step needs zeros
/// behind it, in `copies`.
inline HWY_ATTR void find_bf16_rows(const ConstTensorView& q, std::int64_t first_row, const std::int32_t* members,
                                    std::int64_t count, std::int64_t first_head, std::int64_t heads,
                                    std::uint16_t* copies, const std::uint16_t** rows) {
  const std::int64_t inner = padded_inner(q.size(2));
  const bool lies_ready = inner == q.size(2);
  for (std::int64_t t = 0; t < count; ++t) {
    const std::int64_t row = first_row + members[t];
    if (!lies_ready) copy_bf16_rows(q, row, first_head, heads, copies + t * heads * inner);
    for (std::int64_t h = 0; h < heads; ++h) {
      rows[t * heads + h] = lies_ready ? reinterpret_cast<const std::uint16_t*>(head_row(q, row, first_head + h))
                                       : copies + (t * heads + h) * inner;
    }
  }
}

/// The first `count` of sixteen lanes.
inline __mmask16 first_of_16(std::int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
}

/// The maximum of scale * row[0, count), NaN left out, and the sum of e^(scale * row - maximum).
inline HWY_ATTR void find_max_and_sum(const float* HWY_RESTRICT row, std::int64_t count, float scale, float& largest,
                                      float& total) {
  const __m512 s = _mm512_set1_ps(scale);
  const std::int64_t pairs = count / 32 * 32;
  const auto load = [&](std::int64_t j) HWY_ATTR { return _mm512_mul_ps(_mm512_loadu_ps(row + j), s); };
  // max(x, best) gives `best` where x is NaN. Two of everything, because each waits for the one before.
  __m512 best = _mm512_set1_ps(kNegativeInfinity);
  __m512 second = best;
  for (std::int64_t j = 0; j < pairs; j += 32) {
    best = _mm512_max_ps(load(j), best);
    second = _mm512_max_ps(load(j + 16), second);
  }
  for (std::int64_t j = pairs; j < count; j += 16)
    best = _mm512_mask_max_ps(best, first_of_16(count - j), load(j), best);
  largest = _mm512_reduce_max_ps(_mm512_max_ps(second, best));
  const __m512 shift = _mm512_set1_ps(softmax_shift(largest));
  const auto exponential = [&](std::int64_t j) HWY_ATTR { return shifted_exp(_mm512_loadu_ps(row + j), s, shift); };
  __m512 sum = _mm512_setzero_ps();
  __m512 second_sum = sum;
  for (std::int64_t j = 0; j < pairs; j += 32) {
    sum = _mm512_add_ps(sum, exponential(j));
    second_sum = _mm512_add_ps(second_sum, exponential(j + 16));
  }
  for (std::int64_t j = pairs; j < count; j += 16) {
    sum = _mm512_mask_add_ps(sum, first_of_16(count - j), sum, exponential(j));
  }
  total = _mm512_reduce_add_ps(_mm512_add_ps(sum, second_sum));
}

/// The teacher's mass of sixteen keys: the sum, or the maximum, of weights[h] e^(scale * scores[h] - shifts[h]).
template <Teacher kTeacher>
HWY_INLINE HWY_ATTR __m512 find_mass(const float* scores, std::int64_t stride, const float* shifts,
                                     const float* weights, std::int64_t heads, __m512 scale) {
  __m512 mass = _mm512_setzero_ps();
  for (std::int64_t h = 0; h < heads; ++h) {
    const __m512 e = shifted_exp(_mm512_loadu_ps(scores + h * stride), scale, _mm512_set1_ps(shifts[h]));
    const __m512 weight = _mm512_set1_ps(weights[h]);
    // max(p, mass) gives `mass` where p is NaN, as add_mass does.
    mass =
        kTeacher == Teacher::kMean ? _mm512_fmadd_ps(e, weight, mass) : _mm512_max_ps(_mm512_mul_ps(e, weight), mass);
  }
  return mass;
}

/// As subtract_distributions; between the keys it asks for what comes next.
template <Teacher kTeacher>
HWY_ATTR void subtract_distributions_bf16(const float* scores, std::int64_t stride, const float* lse,
                                          std::int64_t heads, float scale, float norm, float index_scale,
                                          float index_lse, std::int64_t visible, std::int64_t columns,
                                          PrefetchQueue& soon, float* index_row) {
  const __m512 s = _mm512_set1_ps(scale);
  const auto probability = [&](std::int64_t h, std::int64_t j) HWY_ATTR {
    return shifted_exp(_mm512_loadu_ps(scores + h * stride + j), s, _mm512_set1_ps(lse[h]));
  };
  for (std::int64_t j = 0; j < columns; j += 16) {
    soon.ask(kKlLinesAtOnce);
    __m512 mass = probability(0, j);
    for (std::int64_t h = 1; h < heads; ++h) {
      // max(p, mass) gives `mass` where p is NaN, as add_mass does.
      mass =
          kTeacher == Teacher::kMean ? _mm512_add_ps(mass, probability(h, j)) : _mm512_max_ps(probability(h, j), mass);
    }
    const __m512 p = _mm512_div_ps(mass, _mm512_set1_ps(norm));
    const __m512 index_score = _mm512_mul_ps(_mm512_loadu_ps(index_row + j), _mm512_set1_ps(index_scale));
    const __m512 q = exp_lanes(hn::Vec<FloatTag>{_mm512_sub_ps(index_score, _mm512_set1_ps(index_lse))}).raw;
    const std::int64_t left = std::clamp<std::int64_t>(visible - j, 0, 16);
    _mm512_storeu_ps(index_row + j, _mm512_maskz_sub_ps(static_cast<__mmask16>((1u << left) - 1), q, p));
  }
}

/// The index branch of a tile of queries in the backward when its tensors are bf16, too: scores, and from Q - P the
/// gradients, in bf16 products.
class Bf16IndexTile {
 public:
  HWY_ATTR Bf16IndexTile(const IndexKlProblem& problem, const IndexKlShape& shape, const IndexKlBackwardLayout& layout,
                         std::int64_t sequence, std::int64_t group, std::int64_t first_row, float* scratch)
      : params_(problem.params),
        multiply_(problem.multiply_bf16),
        shape_(shape),
        sequence_(sequence),
        group_(group),
        first_row_(first_row),
        inner_(padded_inner(shape.index_dim)),
        key_inner_(padded_inner(shape.block_size)),
        pair_stride_(padded_pair_stride(shape.index_dim)),
        key_pair_stride_(padded_pair_stride(shape.block_size)),
        product_stride_(padded_stride(shape.index_dim)),
        key_rows_(params_.k_idx, params_.batch),
        keys_(bf16(scratch + layout.index_keys)),
        keys_t_(bf16(scratch + layout.index_keys_t)),
        queries_(bf16(scratch + layout.index_queries)),
        query_pairs_(bf16(scratch + layout.index_pairs)),
        gradients_(bf16(scratch + layout.gradient_rows)),
        gradients_t_(bf16(scratch + layout.gradients_t)),
        products_(scratch + layout.products) {}

  HWY_ATTR void load_keys(std::int64_t begin, std::int64_t keys) {
    begin_ = begin;
    loaded_ = keys;
    pack_keys(key_rows_, sequence_, 0, begin, keys, shape_.index_dim, keys_t_, key_pair_stride_);
    load_key_pairs();
  }

  /// Scores of the queries of the chunk in members[0, count), count <= kScoreRows; not scaled.
  HWY_ATTR void score(const std::int32_t* members, std::int64_t count, std::int64_t columns, float* scores,
                      std::int64_t stride) {
    for (std::int64_t t = 0; t < count; ++t) {
      copy_bf16_rows(params_.q_idx, first_row_ + members[t], group_, 1, queries_ + t * inner_);
    }
    multiply_rows(multiply_, count, columns, inner_, queries_, inner_, keys_t_, key_pair_stride_, scores, stride);
  }

  /// Adds to dq_idx of the members (rows of index_dim floats in query_grads) and to dk_idx of the block, `part`, what
  /// follows from `gradients`, Q - P of those queries. Member t sees visible(t) keys, the last one all that are loaded
  /// here; what it does not see has a gradient of 0.
  template <class Visible>
  HWY_ATTR void add_gradients(const float* gradients, std::int64_t stride, const std::int32_t* members,
                              std::int64_t count, const Visible& visible, float* query_grads, float* part) {
    const std::int64_t most = visible(count - 1);
    round_gradients(gradients, stride, count, most);
    pair_rows(queries_, inner_, count, shape_.index_dim, query_pairs_, pair_stride_);
    // As in attention_backward_bf16-inl.h: 0 times somebody else's infinity or NaN is the only harm of an unseen key.
    const bool all_see_all = visible(0) == most;
    if (has_finite_keys_ || all_see_all) {
      add_query_grads(members, 0, count, most, query_grads);
    } else {
      std::int64_t kept = loaded_;
      for (std::int64_t t = count - 1; t >= 0; --t) {
        for (; kept > visible(t); --kept) clear(keys_, kept - 1);
        add_query_grads(members, t, t + 1, most, query_grads);
      }
      load_key_pairs();
    }
    if (all_see_all || are_finite_bf16(queries_, inner_, count, shape_.index_dim)) {
      add_key_grads(count, 0, most, part);
      return;
    }
    for (std::int64_t t = 0, begin = 0; t < count; ++t) {  // keys from `begin` on are seen by t and those behind it
      const std::int64_t end = visible(t);
      if (end > begin) add_key_grads(count, begin, end, part);
      begin = end;
      clear(query_pairs_, t);
    }
  }

 private:
  static std::uint16_t* bf16(float* scratch) { return reinterpret_cast<std::uint16_t*>(scratch); }

  HWY_ATTR void load_key_pairs() {
    has_finite_keys_ = pack_values(key_rows_, sequence_, 0, begin_, loaded_, shape_.index_dim, keys_, pair_stride_);
  }

  void clear(std::uint16_t* pairs, std::int64_t row) const {
    std::uint16_t* pair = pairs + row / 2 * pair_stride_ + row % 2;
    for (std::int64_t d = 0; d < shape_.index_dim; ++d) pair[2 * d] = 0;
  }

  // In bf16, as rows with zeros up to padded_inner both ways, and turned round.
  HWY_ATTR void round_gradients(const float* from, std::int64_t stride, std::int64_t count, std::int64_t most) {
    const std::int64_t columns = padded_columns(most);
    for (std::int64_t t = 0; t < padded_inner(count); ++t) {
      std::uint16_t* to = gradients_ + t * key_inner_;
      for (std::int64_t j = 0; j < padded_inner(most); j += 32) {
        const auto load = [&](std::int64_t at) HWY_ATTR {
          return t < count && at < columns ? _mm512_loadu_ps(from + t * stride + at) : _mm512_setzero_ps();
        };
        _mm512_storeu_si512(to + j, round_to_bf16(load(j), load(j + 16)));
      }
    }
    for (std::int64_t t = 0; t < padded_inner(count); t += 32) {
      transpose_32_rows(gradients_ + t * key_inner_, key_inner_, columns, gradients_t_ + t, kRowStride);
    }
  }

  HWY_ATTR void add_query_grads(const std::int32_t* members, std::int64_t begin, std::int64_t end, std::int64_t most,
                                float* query_grads) {
    multiply_rows(multiply_, end - begin, shape_.index_dim, padded_inner(most), gradients_ + begin * key_inner_,
                  key_inner_, keys_, pair_stride_, products_, product_stride_);
    for (std::int64_t t = begin; t < end; ++t) {
      add_row(products_ + (t - begin) * product_stride_, shape_.index_dim, query_grads + members[t] * shape_.index_dim);
    }
  }

  HWY_ATTR void add_key_grads(std::int64_t count, std::int64_t begin, std::int64_t end, float* part) {
    multiply_rows(multiply_, end - begin, shape_.index_dim, padded_inner(count), gradients_t_ + begin * kRowStride,
                  kRowStride, query_pairs_, pair_stride_, products_, product_stride_);
    for (std::int64_t j = begin; j < end; ++j) {
      add_row(products_ + (j - begin) * product_stride_, shape_.index_dim, part + j * shape_.index_dim);
    }
  }

  static constexpr std::int64_t kRowStride = kScoreRows;
  static_assert(kScoreRows % kBf16Inner == 0);

  const IndexKlParams& params_;
  Bf16Kernel multiply_;
  const IndexKlShape& shape_;
  std::int64_t sequence_;
  std::int64_t group_;
  std::int64_t first_row_;
  std::int64_t inner_;
  std::int64_t key_inner_;
  std::int64_t pair_stride_;
  std::int64_t key_pair_stride_;
  std::int64_t product_stride_;
  core::KeyRows key_rows_;
  std::uint16_t* keys_;
  std::uint16_t* keys_t_;
  std::uint16_t* queries_;
  std::uint16_t* query_pairs_;
  std::uint16_t* gradients_;
  std::uint16_t* gradients_t_;
  float* products_;
  std::int64_t begin_ = 0;
  std::int64_t loaded_ = 0;
  bool has_finite_keys_ = true;
};

/// As KlChunk, for bf16 queries and keys; the index branch in bf16 products where its tensors are bf16, too, else in
/// float. Nothing is kept from one time through the blocks to the next: the products of a score tile cost less than its
/// way to memory and back.
class Bf16KlChunk {
 public:
  HWY_ATTR Bf16KlChunk(const IndexKlProblem& problem, const IndexKlShape& shape, const IndexKlLayout& layout,
                       const QueryChunk& chunk, std::int64_t group, float* scratch)
      : params_(problem.params),
        multiply_(problem.multiply_bf16),
        shape_(shape),
        sequence_(core::get_sequence(params_.batch, chunk.sequence)),
        group_(group),
        first_row_(sequence_.query_begin + chunk.begin),
        count_(chunk.end - chunk.begin),
        row_count_(kl_bf16_row_count(shape.group_size)),
        stride_(padded_stride(shape.block_size)),
        pair_stride_(padded_pair_stride(shape.block_size)),
        queries_(scratch + layout.queries),
        index_queries_(scratch + layout.index_queries),
        keys_(scratch + layout.keys),
        index_keys_(scratch + layout.index_keys),
        largest_(scratch + layout.largest),
        totals_(scratch + layout.totals),
        shifts_(scratch + layout.factors),
        weights_(shifts_ + count_ * row_count_),
        norms_(scratch + layout.norms),
        scores_(scratch + layout.scores),
        index_scores_(scratch + layout.tile),
        key_rows_(params_.k, params_.batch),
        index_key_rows_(params_.k_idx, params_.batch),
        lists_(params_.batch, sequence_, params_.blocks, group, shape.block_size, chunk.begin, chunk.end,
               reinterpret_cast<std::int32_t*>(scratch + layout.lists)) {
    for (std::int64_t i = 0; i < count_; ++i) {
      copy_bf16_rows(params_.q, first_row_ + i, group * shape.group_size, shape.group_size, query_row(i, 0));
      if (shape.has_bf16_index) copy_bf16_rows(params_.q_idx, first_row_ + i, group, 1, index_query_row(i));
    }
    if (!shape.has_bf16_index) load_query_rows(params_.q_idx, first_row_, count_, group, 1, index_queries_);
  }

  /// First time through the blocks: maximum and sum of exponentials of every row.
  HWY_ATTR void find_sums() {
    std::fill(largest_, largest_ + count_ * row_count_, kNegativeInfinity);
    std::fill(totals_, totals_ + count_ * row_count_, 0.0f);
    alignas(64) float here_largest[kMaxRowCount];
    alignas(64) float here_total[kMaxRowCount];
    const auto scale = static_cast<float>(*params_.scale);
    for (std::int64_t h0 = 0; h0 < row_count_; h0 += kMaxRowCount) {  // once, but for groups of hundreds
      const std::int64_t h1 = std::min(h0 + kMaxRowCount, row_count_);
      pass_queries([&](std::int64_t i, std::int64_t visible, const float* scores, const float* index_row) HWY_ATTR {
        std::fill(here_largest, here_largest + (h1 - h0), kNegativeInfinity);
        std::fill(here_total, here_total + (h1 - h0), 0.0f);
        for (std::int64_t h = h0; h < std::min(h1, shape_.group_size); ++h) {
          find_max_and_sum(scores + h * stride_, visible, scale, here_largest[h - h0], here_total[h - h0]);
        }
        if (shape_.group_size < h1) {  // the index's row, scaled already, with the exponential of float32
          const std::int64_t h = shape_.group_size - h0;
          here_largest[h] = largest_of(index_row, visible);
          here_total[h] = sum_of_exp(index_row, visible, softmax_shift(here_largest[h]));
        }
        merge_rows(here_largest, here_total, h1 - h0, largest_ + i * row_count_ + h0, totals_ + i * row_count_ + h0);
      });
    }
    for (std::int64_t r = 0; r < count_ * row_count_; ++r) {
      shifts_[r] = softmax_shift(largest_[r]);
      weights_[r] = 1.0f / totals_[r];
    }
  }

  /// What each query's teacher mass is divided by.
  HWY_ATTR void find_norms() {
    if (params_.teacher == Teacher::kMean) {
      std::fill(norms_, norms_ + count_, static_cast<float>(shape_.group_size));
      return;
    }
    std::fill(norms_, norms_ + count_, 0.0f);
    pass_queries([&](std::int64_t i, std::int64_t visible, const float* scores, const float*) HWY_ATTR {
      __m512 sum = _mm512_setzero_ps();
      for (std::int64_t j = 0; j < visible; j += 16) {
        sum = _mm512_mask_add_ps(sum, first_of_16(visible - j), sum, mass<Teacher::kMax>(i, scores + j));
      }
      norms_[i] += _mm512_reduce_add_ps(sum);
    });
  }

  /// The divergence of every query, in double over the blocks.
  template <Teacher kTeacher>
  HWY_ATTR void find_divergence(double* values) {
    std::fill(values, values + count_, 0.0);
    pass_queries([&](std::int64_t i, std::int64_t visible, const float* scores, const float* index_row) HWY_ATTR {
      const std::int64_t index = i * row_count_ + shape_.group_size;
      const __m512 norm = _mm512_set1_ps(norms_[i]);
      const __m512 index_largest = _mm512_set1_ps(shifts_[index]);
      const __m512 index_log_total = _mm512_set1_ps(std::log(totals_[index]));
      __m512 sum = _mm512_setzero_ps();
      for (std::int64_t j = 0; j < visible; j += 16) {
        const __m512 p = _mm512_div_ps(mass<kTeacher>(i, scores + j), norm);
        const __m512 log_q =
            _mm512_sub_ps(_mm512_sub_ps(_mm512_loadu_ps(index_row + j), index_largest), index_log_total);
        const __m512 divergence = _mm512_mul_ps(p, _mm512_sub_ps(log_lanes(hn::Vec<FloatTag>{p}).raw, log_q));
        // P ln P -> 0; subnormal P, which log_lanes does not take, weighs nothing either.
        const __mmask16 counts = _mm512_cmp_ps_mask(p, _mm512_set1_ps(std::numeric_limits<float>::min()), _CMP_NLT_UQ);
        sum = _mm512_mask_add_ps(sum, first_of_16(visible - j) & counts, sum, divergence);
      }
      values[i] += static_cast<double>(_mm512_reduce_add_ps(sum));
    });
  }

  void save(const IndexKlSaved& saved) const {
    for (std::int64_t i = 0; i < count_; ++i) {
      save_query(saved, first_row_ + i, group_, shape_.group_size, largest_ + i * row_count_, totals_ + i * row_count_,
                 norms_[i]);
    }
  }

  std::int64_t first_row() const { return first_row_; }
  std::int64_t count() const { return count_; }

 private:
  static constexpr std::int64_t kMaxRowCount = 256;

  std::uint16_t* query_row(std::int64_t i, std::int64_t h) {
    return reinterpret_cast<std::uint16_t*>(queries_) + (i * shape_.group_size + h) * padded_inner(shape_.head_dim);
  }
  std::uint16_t* index_query_row(std::int64_t i) {
    return reinterpret_cast<std::uint16_t*>(index_queries_) + i * padded_inner(shape_.index_dim);
  }

  template <Teacher kTeacher>
  HWY_ATTR __m512 mass(std::int64_t i, const float* scores) const {
    return find_mass<kTeacher>(scores, stride_, shifts_ + i * row_count_, weights_ + i * row_count_, shape_.group_size,
                               _mm512_set1_ps(static_cast<float>(*params_.scale)));
  }

  static HWY_ATTR float largest_of(const float* row, std::int64_t count) {
    __m512 best = _mm512_set1_ps(kNegativeInfinity);
    for (std::int64_t j = 0; j < count; j += 16) {
      best = _mm512_mask_max_ps(best, first_of_16(count - j), _mm512_loadu_ps(row + j), best);
    }
    return _mm512_reduce_max_ps(best);
  }

  // Maxima and sums of a block to those of the blocks before; rows a multiple of 16.
  static HWY_ATTR void merge_rows(const float* here_largest, const float* here_total, std::int64_t rows, float* largest,
                                  float* total) {
    const __m512 none = _mm512_set1_ps(kNegativeInfinity);
    for (std::int64_t r = 0; r < rows; r += 16) {
      const __m512 before = _mm512_loadu_ps(largest + r);
      const __m512 here = _mm512_load_ps(here_largest + r);
      const __m512 top = _mm512_max_ps(before, here);
      const __m512 shift = _mm512_mask_mov_ps(top, _mm512_cmp_ps_mask(top, none, _CMP_EQ_OQ), _mm512_setzero_ps());
      // e^(-inf) = 0 takes nothing along from where there is nothing.
      const auto factor = [&](__m512 of)
                              HWY_ATTR { return exp_lanes(hn::Vec<FloatTag>{_mm512_sub_ps(of, shift)}).raw; };
      _mm512_storeu_ps(total + r, _mm512_fmadd_ps(_mm512_loadu_ps(total + r), factor(before),
                                                  _mm512_mul_ps(_mm512_load_ps(here_total + r), factor(here))));
      _mm512_storeu_ps(largest + r, top);
    }
  }

  // Calls body(query, visible, scores, index_row) for every query of the chunk and block, blocks ascending: row h of
  // `scores`, stride_ apart, are head h's, not scaled, index_row the index's, scaled.
  template <class Body>
  HWY_ATTR void pass_queries(const Body& body) {
    const std::int64_t heads = shape_.group_size;
    const std::int64_t tile_queries = std::max<std::int64_t>(1, kBf16Rows / heads);
    for (std::int64_t block = 0; block < lists_.blocks(); ++block) {
      const std::int32_t* members = lists_.members(block);
      const std::int64_t count = lists_.count(block);
      if (count == 0) continue;
      // Nothing behind the last member's position is read: it need not even hold a key.
      const std::int64_t keys = lists_.visible_keys(members[count - 1], block);
      load_block(block * shape_.block_size, keys);
      for (std::int64_t i0 = 0; i0 < count; i0 += kBf16Rows) {
        const std::int64_t n = std::min(kBf16Rows, count - i0);
        score_index(members + i0, n, padded_columns(keys));
        for (std::int64_t t0 = 0; t0 < n; t0 += tile_queries) {
          const std::int64_t m = std::min(tile_queries, n - t0);
          score_heads(members + i0 + t0, m, padded_columns(keys));
          for (std::int64_t t = 0; t < m; ++t) {
            const std::int64_t i = members[i0 + t0 + t];
            body(i, lists_.visible_keys(i, block), scores_ + t * heads * stride_, index_scores_ + (t0 + t) * stride_);
          }
        }
      }
    }
  }

  HWY_ATTR void load_block(std::int64_t begin, std::int64_t keys) {
    pack_keys(key_rows_, sequence_.index, group_, begin, keys, shape_.head_dim, reinterpret_cast<std::uint16_t*>(keys_),
              pair_stride_);
    if (shape_.has_bf16_index) {
      pack_keys(index_key_rows_, sequence_.index, 0, begin, keys, shape_.index_dim,
                reinterpret_cast<std::uint16_t*>(index_keys_), pair_stride_);
    } else {
      load_keys_transposed(index_key_rows_, params_.k_idx.dtype, sequence_.index, 0, begin, keys, shape_.index_dim,
                           index_keys_, stride_);
    }
  }

  HWY_ATTR void score_heads(const std::int32_t* members, std::int64_t count, std::int64_t columns) {
    const std::int64_t heads = shape_.group_size;
    for (std::int64_t first = 0; first < count * heads; first += kBf16Rows) {
      const std::uint16_t* rows[kBf16Rows];
      const std::int64_t here = std::min(kBf16Rows, count * heads - first);
      for (std::int64_t r = 0; r < here; ++r) rows[r] = query_row(members[(first + r) / heads], (first + r) % heads);
      score_bf16_rows(multiply_, rows, here, columns, shape_.head_dim, reinterpret_cast<const std::uint16_t*>(keys_),
                      pair_stride_, scores_ + first * stride_, stride_);
    }
  }

  HWY_ATTR void score_index(const std::int32_t* members, std::int64_t count, std::int64_t columns) {
    if (shape_.has_bf16_index) {
      const std::uint16_t* rows[kBf16Rows];
      for (std::int64_t t = 0; t < count; ++t) rows[t] = index_query_row(members[t]);
      score_bf16_rows(multiply_, rows, count, columns, shape_.index_dim,
                      reinterpret_cast<const std::uint16_t*>(index_keys_), pair_stride_, index_scores_, stride_);
    } else {
      const TileRows<const float> queries{index_queries_, members, 1, shape_.index_dim, 0};
      const TileRows<float> scores{index_scores_, nullptr, 1, stride_, 0};
      product_of_tile(count, columns, shape_.index_dim, queries, index_keys_, stride_, scores);
    }
    const auto scale = static_cast<float>(*params_.index_scale);
    for (std::int64_t t = 0; t < count; ++t) scale_row(scale, columns, index_scores_ + t * stride_);
  }

  const IndexKlParams& params_;
  Bf16Kernel multiply_;
  const IndexKlShape& shape_;
  core::Sequence sequence_;
  std::int64_t group_;
  std::int64_t first_row_;
  std::int64_t count_;
  std::int64_t row_count_;  // of a query: the group's heads and the index, up to a multiple of 16
  std::int64_t stride_;
  std::int64_t pair_stride_;
  float* queries_;
  float* index_queries_;
  float* keys_;
  float* index_keys_;
  float* largest_;
  float* totals_;
  float* shifts_;
  float* weights_;
  float* norms_;
  float* scores_;
  float* index_scores_;
  core::KeyRows key_rows_;
  core::KeyRows index_key_rows_;
  BlockLists lists_;
};

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // HWY_TARGET == HWY_AVX3

#endif  // MSA_CPU_INDEX_KL_BF16_INL_H_
