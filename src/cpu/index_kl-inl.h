// SPDX-License-Identifier: Apache-2.0
// The KL loss of the index branch and its gradient (SPEC section 4), streamed over key blocks: no [queries, keys]
// tensor. A task of the forward owns a few queries and one group and goes through their blocks twice, for the maxima
// and sums of the softmaxes and for the divergence; score tiles of the first time are kept for the second as far as
// there is room (bf16: computed again, index_kl_bf16-inl.h). A task of the backward owns many queries and goes through
// the blocks once, with the saved lse: Q - P of a tile and its products at once. dq_idx is the task's own; dk_idx is
// summed over tasks in a fixed order (ordered_sums.h). docs/index-kl.md derives the cost. Tested in
// tests/unit/index_kl_test.cc.
#if defined(MSA_CPU_INDEX_KL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_INDEX_KL_INL_H_
#undef MSA_CPU_INDEX_KL_INL_H_
#else
#define MSA_CPU_INDEX_KL_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "msa/index_kl.h"
#include "src/core/layout.h"
#include "src/cpu/block_lists.h"
#include "src/cpu/index_kl_bf16-inl.h"
#include "src/cpu/index_kl_plan.h"
#include "src/cpu/index_kl_problem.h"
#include "src/cpu/index_kl_rows-inl.h"
#include "src/cpu/key_tile-inl.h"
#include "src/cpu/ordered_sums.h"
#include "src/cpu/prefetch_queue.h"
#include "src/cpu/row_ops-inl.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// Teacher's mass of the keys in one vector: `heads` rows of exponentials, each times its factor.
template <Teacher kTeacher>
HWY_INLINE HWY_ATTR FloatVec read_mass(const float* rows, std::int64_t stride, const float* factors, std::int64_t heads,
                                       std::int64_t j) {
  const FloatTag df;
  auto mass = hn::Mul(hn::LoadU(df, rows + j), hn::Set(df, factors[0]));
  for (std::int64_t h = 1; h < heads; ++h) {
    mass = add_mass<kTeacher>(mass, hn::Mul(hn::LoadU(df, rows + h * stride + j), hn::Set(df, factors[h])));
  }
  return mass;
}

/// Sum of the teacher's mass over keys [0, count).
template <Teacher kTeacher>
HWY_ATTR float sum_mass(const float* rows, std::int64_t stride, const float* factors, std::int64_t heads,
                        std::int64_t count) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  auto sum = hn::Zero(df);
  std::int64_t j = 0;
  for (; j + lanes <= count; j += lanes) sum = hn::Add(sum, read_mass<kTeacher>(rows, stride, factors, heads, j));
  if (j < count) {
    const auto mask = hn::FirstN(df, static_cast<std::size_t>(count - j));
    sum = hn::Add(sum, hn::IfThenElseZero(mask, read_mass<kTeacher>(rows, stride, factors, heads, j)));
  }
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

/// Sum of P (ln P - ln Q) over keys [0, count): P from `rows`, ln Q = (index_row - index_largest) - index_log_total.
template <Teacher kTeacher>
HWY_ATTR float sum_divergence(const float* rows, std::int64_t stride, const float* factors, std::int64_t heads,
                              float norm, const float* index_row, float index_largest, float index_log_total,
                              std::int64_t count) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto term = [&](std::int64_t j) HWY_ATTR {
    const auto p = hn::Div(read_mass<kTeacher>(rows, stride, factors, heads, j), hn::Set(df, norm));
    const auto log_q =
        hn::Sub(hn::Sub(hn::LoadU(df, index_row + j), hn::Set(df, index_largest)), hn::Set(df, index_log_total));
    const auto divergence = hn::Mul(p, hn::Sub(log_lanes(p), log_q));
    // P ln P -> 0; subnormal P, which log_lanes does not take, weighs nothing either.
    return hn::IfThenZeroElse(hn::Lt(p, hn::Set(df, std::numeric_limits<float>::min())), divergence);
  };
  auto sum = hn::Zero(df);
  std::int64_t j = 0;
  for (; j + lanes <= count; j += lanes) sum = hn::Add(sum, term(j));
  if (j < count) sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(df, static_cast<std::size_t>(count - j)), term(j)));
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

/// Q - P of the keys [0, visible), in place of the index row; 0 from there up to `columns`, a multiple of 16. Both from
/// scores and lse: P = teacher of e^(scale S - lse[h]) over the heads' rows, divided by norm.
template <Teacher kTeacher>
HWY_ATTR void subtract_distributions(const float* scores, std::int64_t stride, const float* lse, std::int64_t heads,
                                     float scale, float norm, float index_scale, float index_lse, std::int64_t visible,
                                     std::int64_t columns, float* index_row) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto s = hn::Set(df, scale);
  // Scaled and rounded before the subtraction, as in the forward: the probability of an only key is exactly 1.
  const auto probability = [&](std::int64_t h, std::int64_t j) HWY_ATTR {
    return exp_lanes(hn::Sub(hn::Mul(hn::LoadU(df, scores + h * stride + j), s), hn::Set(df, lse[h])));
  };
  for (std::int64_t j = 0; j < columns; j += lanes) {
    auto mass = probability(0, j);
    for (std::int64_t h = 1; h < heads; ++h) mass = add_mass<kTeacher>(mass, probability(h, j));
    const auto p = hn::Div(mass, hn::Set(df, norm));
    const auto index_score = hn::Mul(hn::LoadU(df, index_row + j), hn::Set(df, index_scale));
    const auto q = exp_lanes(hn::Sub(index_score, hn::Set(df, index_lse)));
    const auto mask = hn::FirstN(df, static_cast<std::size_t>(std::max<std::int64_t>(visible - j, 0)));
    hn::StoreU(hn::IfThenElseZero(mask, hn::Sub(q, p)), df, index_row + j);
  }
}

/// A chunk of queries and one group in the forward.
class KlChunk {
 public:
  HWY_ATTR KlChunk(const IndexKlProblem& problem, const IndexKlShape& shape, const IndexKlLayout& layout,
                   const QueryChunk& chunk, std::int64_t group, float* scratch)
      : params_(problem.params),
        shape_(shape),
        layout_(layout),
        sequence_(core::get_sequence(params_.batch, chunk.sequence)),
        group_(group),
        first_row_(sequence_.query_begin + chunk.begin),
        count_(chunk.end - chunk.begin),
        row_count_(shape.group_size + 1),
        tile_stride_(kl_tile_stride(shape.block_size)),
        scratch_(scratch),
        largest_(scratch + layout.largest),
        totals_(reinterpret_cast<double*>(scratch + layout.totals)),
        norms_(scratch + layout.norms),
        key_rows_(params_.k, params_.batch),
        index_key_rows_(params_.k_idx, params_.batch),
        lists_(params_.batch, sequence_, params_.blocks, group, shape.block_size, chunk.begin, chunk.end,
               reinterpret_cast<std::int32_t*>(scratch + layout.lists)) {
    load_query_rows(params_.q, first_row_, count_, group * shape.group_size, shape.group_size,
                    scratch + layout.queries);
    load_query_rows(params_.q_idx, first_row_, count_, group, 1, scratch + layout.index_queries);
  }

  /// First time through the blocks: maximum and sum of exponentials of every row.
  HWY_ATTR void find_sums() {
    std::fill(largest_, largest_ + count_ * row_count_, kNegativeInfinity);
    std::fill(totals_, totals_ + count_ * row_count_, 0.0);
    pass_queries(true, [&](std::int64_t i, std::int64_t visible, const float* rows) HWY_ATTR {
      for (std::int64_t h = 0; h < row_count_; ++h) {
        const float* row = rows + h * tile_stride_;
        const float block_largest = row[shape_.block_size];
        const bool is_index = h == shape_.group_size;
        const float block_total =
            is_index ? sum_of_exp(row, visible, softmax_shift(block_largest)) : row[shape_.block_size + 1];
        float& largest = largest_[i * row_count_ + h];
        double& total = totals_[i * row_count_ + h];
        const float top = block_largest > largest ? block_largest : largest;
        // e^(-inf) = 0 takes nothing along from before the first block.
        total = total * static_cast<double>(exp_one(largest - softmax_shift(top))) +
                static_cast<double>(block_total) *
                    static_cast<double>(exp_one(softmax_shift(block_largest) - softmax_shift(top)));
        largest = top;
      }
    });
  }

  /// What each query's teacher mass is divided by.
  HWY_ATTR void find_norms() {
    if (params_.teacher == Teacher::kMean) {
      std::fill(norms_, norms_ + count_, static_cast<float>(shape_.group_size));
      return;
    }
    std::fill(norms_, norms_ + count_, 0.0f);
    pass_queries(false, [&](std::int64_t i, std::int64_t visible, const float* rows) HWY_ATTR {
      norms_[i] += sum_mass<Teacher::kMax>(rows, tile_stride_, find_factors(i, rows), shape_.group_size, visible);
    });
  }

  /// The divergence of every query, in double over the blocks.
  template <Teacher kTeacher>
  HWY_ATTR void find_divergence(double* values) {
    std::fill(values, values + count_, 0.0);
    pass_queries(false, [&](std::int64_t i, std::int64_t visible, const float* rows) HWY_ATTR {
      const std::int64_t index = i * row_count_ + shape_.group_size;
      values[i] += static_cast<double>(
          sum_divergence<kTeacher>(rows, tile_stride_, find_factors(i, rows), shape_.group_size, norms_[i],
                                   rows + shape_.group_size * tile_stride_, softmax_shift(largest_[index]),
                                   static_cast<float>(std::log(totals_[index])), visible));
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
  // Of a query and a block: row h < group_size of `rows` holds e^(score - block maximum) of head h, row group_size the
  // scaled scores of the index; column block_size the row's maximum, the next one the sum of its exponentials.

  // e^(block maximum - maximum) / sum: what a head's stored exponentials are to be multiplied by.
  HWY_ATTR const float* find_factors(std::int64_t i, const float* rows) {
    float* factors = scratch_ + layout_.factors;
    for (std::int64_t h = 0; h < shape_.group_size; ++h) {
      const std::int64_t r = i * row_count_ + h;
      factors[h] = exp_one(softmax_shift(rows[h * tile_stride_ + shape_.block_size]) - softmax_shift(largest_[r])) *
                   static_cast<float>(1.0 / totals_[r]);
    }
    return factors;
  }

  // Calls body(query, visible, rows) for every query of the chunk and block, blocks ascending.
  template <class Body>
  HWY_ATTR void pass_queries(bool is_first, const Body& body) {
    const std::int64_t tile_queries = kl_tile_queries(shape_.group_size);
    std::int64_t used = 0;
    for (std::int64_t block = 0; block < lists_.blocks(); ++block) {
      const std::int32_t* members = lists_.members(block);
      const std::int64_t count = lists_.count(block);
      bool is_loaded = false;
      for (std::int64_t t0 = 0; t0 < count; t0 += tile_queries) {
        const std::int64_t n = std::min(tile_queries, count - t0);
        const std::int64_t floats = n * row_count_ * tile_stride_;
        const bool is_kept = used + floats <= layout_.strip_floats;
        float* rows = scratch_ + (is_kept ? layout_.strip + used : layout_.tile);
        if (is_kept) used += floats;
        if (is_first || !is_kept) {
          // Nothing behind the last member's position is read: it need not even hold a key.
          const std::int64_t block_keys = lists_.visible_keys(members[count - 1], block);
          if (!is_loaded) load_block(block, block_keys);
          is_loaded = true;
          compute_tile(block, block_keys, members + t0, n, rows);
        }
        for (std::int64_t t = 0; t < n; ++t) {
          const std::int64_t i = members[t0 + t];
          body(i, lists_.visible_keys(i, block), rows + t * row_count_ * tile_stride_);
        }
      }
    }
  }

  HWY_ATTR void load_block(std::int64_t block, std::int64_t block_keys) {
    const std::int64_t begin = block * shape_.block_size;
    load_keys_transposed(key_rows_, params_.k.dtype, sequence_.index, group_, begin, block_keys, shape_.head_dim,
                         scratch_ + layout_.keys, padded_stride(shape_.block_size));
    load_keys_transposed(index_key_rows_, params_.k_idx.dtype, sequence_.index, 0, begin, block_keys, shape_.index_dim,
                         scratch_ + layout_.index_keys, padded_stride(shape_.block_size));
  }

  // Exponentials, maximum and sum of the heads' rows.
  HWY_ATTR void compute_main_rows(std::int64_t block, std::int64_t columns, const std::int32_t* members,
                                  std::int64_t count, float* tile) {
    const std::int64_t key_stride = padded_stride(shape_.block_size);
    const std::int64_t group_size = shape_.group_size;
    const auto scale = static_cast<float>(*params_.scale);
    const TileRows<const float> queries{scratch_ + layout_.queries, members, group_size, group_size * shape_.head_dim,
                                        shape_.head_dim};
    const TileRows<float> scores{tile, nullptr, group_size, row_count_ * tile_stride_, tile_stride_};
    product_of_tile(count * group_size, columns, shape_.head_dim, queries, scratch_ + layout_.keys, key_stride, scores);
    for (std::int64_t t = 0; t < count; ++t) {
      const std::int64_t visible = lists_.visible_keys(members[t], block);
      for (std::int64_t h = 0; h < group_size; ++h) {
        float* row = tile + (t * row_count_ + h) * tile_stride_;
        const float largest = scale_and_max(row, visible, scale);
        row[shape_.block_size + 1] = exp_and_sum(row, visible, softmax_shift(largest));
        row[shape_.block_size] = largest;
      }
    }
  }

  HWY_ATTR void compute_tile(std::int64_t block, std::int64_t block_keys, const std::int32_t* members,
                             std::int64_t count, float* tile) {
    const std::int64_t key_stride = padded_stride(shape_.block_size);
    const std::int64_t columns = padded_columns(block_keys);
    const std::int64_t group_size = shape_.group_size;
    compute_main_rows(block, columns, members, count, tile);
    const TileRows<const float> index_queries{scratch_ + layout_.index_queries, members, 1, shape_.index_dim, 0};
    const TileRows<float> index_scores{tile + group_size * tile_stride_, nullptr, 1, row_count_ * tile_stride_, 0};
    product_of_tile(count, columns, shape_.index_dim, index_queries, scratch_ + layout_.index_keys, key_stride,
                    index_scores);
    const auto index_scale = static_cast<float>(*params_.index_scale);
    for (std::int64_t t = 0; t < count; ++t) {
      float* row = tile + (t * row_count_ + group_size) * tile_stride_;
      row[shape_.block_size] = scale_and_max(row, lists_.visible_keys(members[t], block), index_scale);
    }
  }

  const IndexKlParams& params_;
  const IndexKlShape& shape_;
  const IndexKlLayout& layout_;
  core::Sequence sequence_;
  std::int64_t group_;
  std::int64_t first_row_;
  std::int64_t count_;
  std::int64_t row_count_;  // rows of a query in a tile: the group's heads and the index
  std::int64_t tile_stride_;
  float* scratch_;
  float* largest_;
  double* totals_;
  float* norms_;
  core::KeyRows key_rows_;
  core::KeyRows index_key_rows_;
  BlockLists lists_;
};

template <class Chunk>
HWY_ATTR void run_index_kl_with(const IndexKlProblem& problem, const IndexKlShape& shape, const IndexKlLayout& layout,
                                const QueryChunk& chunk, std::int64_t group, float* scratch, double* values) {
  Chunk task(problem, shape, layout, chunk, group, scratch);
  auto* row_values = reinterpret_cast<double*>(scratch + layout.values);
  task.find_sums();
  task.find_norms();
  if (problem.params.teacher == Teacher::kMean) {
    task.template find_divergence<Teacher::kMean>(row_values);
  } else {
    task.template find_divergence<Teacher::kMax>(row_values);
  }
  task.save(problem.saved);
  for (std::int64_t i = 0; i < task.count(); ++i) {
    values[(task.first_row() + i) * shape.kv_heads + group] = row_values[i];
  }
}

/// One task of the forward: saves lse and norms and writes values[row * kv_heads + group] = the row's KL.
inline HWY_ATTR void run_index_kl(const IndexKlProblem& problem, const IndexKlShape& shape, const IndexKlLayout& layout,
                                  const QueryChunk& chunk, std::int64_t group, float* scratch, double* values) {
#if HWY_TARGET == HWY_AVX3
  if (problem.multiply_bf16 != nullptr) {
    std::optional<AmxTiles> tiles;
    if (problem.needs_amx_tiles) tiles.emplace();
    run_index_kl_with<Bf16KlChunk>(problem, shape, layout, chunk, group, scratch, values);
    return;
  }
#endif
  run_index_kl_with<KlChunk>(problem, shape, layout, chunk, group, scratch, values);
}

/// A chunk of queries and one group in the backward: add_block for ascending blocks, write_query_grads.
class KlChunkBackward {
 public:
  /// `scratch` is laid out by `layout`.
  HWY_ATTR KlChunkBackward(const IndexKlProblem& problem, const IndexKlShape& shape,
                           const IndexKlBackwardLayout& layout, const QueryChunk& chunk, std::int64_t group,
                           float* scratch)
      : params_(problem.params),
        multiply_bf16_(problem.multiply_bf16),
        shape_(shape),
        sequence_(core::get_sequence(params_.batch, chunk.sequence)),
        group_(group),
        first_row_(sequence_.query_begin + chunk.begin),
        count_(chunk.end - chunk.begin),
        query_stride_(padded_stride(shape.head_dim)),
        index_stride_(padded_stride(shape.index_dim)),
        block_stride_(padded_stride(shape.block_size)),
        key_rows_(params_.k, params_.batch),
        index_key_rows_(params_.k_idx, params_.batch),
        lse_(scratch + layout.lse),
        norms_(scratch + layout.norms),
        query_grads_(scratch + layout.query_grads),
        keys_t_(scratch + layout.keys_t),
        index_keys_(scratch + layout.index_keys),
        index_keys_t_(scratch + layout.index_keys_t),
        queries_(scratch + layout.queries),
        index_queries_(scratch + layout.index_queries),
        scores_(scratch + layout.scores),
        index_scores_(scratch + layout.index_scores),
        lists_(params_.batch, sequence_, params_.blocks, group, shape.block_size, chunk.begin, chunk.end,
               reinterpret_cast<std::int32_t*>(scratch + layout.lists)) {
#if HWY_TARGET == HWY_AVX3
    if (shape.has_bf16_index) index_tile_.emplace(problem, shape, layout, sequence_.index, group, first_row_, scratch);
#endif
    std::fill(query_grads_, query_grads_ + count_ * shape.index_dim, 0.0f);
    for (std::int64_t i = 0; i < count_; ++i) {
      const std::int64_t row = first_row_ + i;
      float* lse = lse_ + i * (shape.group_size + 1);
      for (std::int64_t h = 0; h < shape.group_size; ++h) {
        lse[h] = read_float(problem.saved.lse_main, row, group * shape.group_size + h);
      }
      lse[shape.group_size] = read_float(problem.saved.lse_index, row, group);
      norms_[i] = read_float(problem.saved.teacher_norm, row, group);
    }
  }

  bool has_members(std::int64_t block) const { return block < lists_.blocks() && lists_.count(block) > 0; }

  /// Adds a block to dq_idx of its members, and what they give to its dk_idx to `part`, [block_size, index_dim];
  /// neither is scaled.
  template <Teacher kTeacher>
  HWY_ATTR void add_block(std::int64_t block, float* part) {
    const std::int32_t* members = lists_.members(block);
    const std::int64_t count = lists_.count(block);
    // Nothing behind the last member's position is read: it need not even hold a key.
    load_block(block * shape_.block_size, lists_.visible_keys(members[count - 1], block));
    for (std::int64_t t0 = 0; t0 < count; t0 += kScoreRows) {
      const std::int64_t n = std::min(kScoreRows, count - t0);
#if HWY_TARGET == HWY_AVX3
      if (index_tile_) {
        add_bf16_tile<kTeacher>(block, members + t0, n, part);
        continue;
      }
#endif
      add_tile<kTeacher>(block, members + t0, n, part);
    }
  }

  HWY_ATTR void write_query_grads(float factor, const TensorView& dq_idx) {
    for (std::int64_t i = 0; i < count_; ++i) {
      float* row = query_grads_ + i * shape_.index_dim;
      scale_row(factor, shape_.index_dim, row);
      store_row(row, shape_.index_dim, dq_idx.dtype, head_row(dq_idx, first_row_ + i, group_));
    }
  }

 private:
  HWY_ATTR void load_block(std::int64_t begin, std::int64_t keys) {
    load_keys(begin, keys);
#if HWY_TARGET == HWY_AVX3
    if (index_tile_) {
      index_tile_->load_keys(begin, keys);
      return;
    }
#endif
    load_value_rows(index_key_rows_, params_.k_idx.dtype, sequence_.index, 0, begin, keys, shape_.index_dim,
                    index_keys_, index_stride_);
    load_keys_transposed(index_key_rows_, params_.k_idx.dtype, sequence_.index, 0, begin, keys, shape_.index_dim,
                         index_keys_t_, block_stride_);
  }

  HWY_ATTR void load_keys(std::int64_t begin, std::int64_t keys) {
#if HWY_TARGET == HWY_AVX3
    if (multiply_bf16_ != nullptr) {
      pack_keys(key_rows_, sequence_.index, group_, begin, keys, shape_.head_dim,
                reinterpret_cast<std::uint16_t*>(keys_t_), padded_pair_stride(shape_.block_size));
      return;
    }
#endif
    load_keys_transposed(key_rows_, params_.k.dtype, sequence_.index, group_, begin, keys, shape_.head_dim, keys_t_,
                         block_stride_);
  }

  // At most kScoreRows queries that attend to the block: their index scores at once, those of the heads a few queries
  // at a time.
  template <Teacher kTeacher>
  HWY_ATTR void add_tile(std::int64_t block, const std::int32_t* members, std::int64_t count, float* part) {
    const std::int64_t least = lists_.visible_keys(members[0], block);
    const std::int64_t most = lists_.visible_keys(members[count - 1], block);
    const std::int64_t columns = padded_columns(most);
    for (std::int64_t t = 0; t < count; ++t) {
      load_row(head_row(params_.q_idx, first_row_ + members[t], group_), params_.q_idx.dtype, shape_.index_dim,
               index_queries_ + t * index_stride_);
    }
    product(count, columns, shape_.index_dim, index_queries_, index_stride_, 1, index_keys_t_, block_stride_,
            index_scores_, block_stride_, Sums::kReplace);
    find_tile_gradients<kTeacher>(block, members, count, columns);
    const auto add_query_grads = [&](std::int64_t begin, std::int64_t end, std::int64_t visible) HWY_ATTR {
      float* grads[kScoreRows];
      for (std::int64_t t = begin; t < end; ++t) grads[t - begin] = query_grads_ + members[t] * shape_.index_dim;
      product_of_rows(end - begin, shape_.index_dim, visible,
                      StridedRows<const float>{index_scores_ + begin * block_stride_, block_stride_}, 1, index_keys_,
                      index_stride_, grads, Sums::kAdd);
    };
    const auto add_key_grads = [&](std::int64_t begin, std::int64_t end, std::int64_t first) HWY_ATTR {
      product_of_rows(end - begin, shape_.index_dim, count - first,
                      StridedRows<const float>{index_scores_ + first * block_stride_ + begin, 1}, block_stride_,
                      index_queries_ + first * index_stride_, index_stride_,
                      StridedRows<float>{part + begin * shape_.index_dim, shape_.index_dim}, Sums::kAdd);
    };
    // Keys that a query does not see have Q - P = 0, which is as good as leaving them out, but for a 0 times infinity
    // or NaN of somebody else's.
    if (least == most || (are_finite(index_keys_, index_stride_, most, shape_.index_dim) &&
                          are_finite(index_queries_, index_stride_, count, shape_.index_dim))) {
      add_query_grads(0, count, most);
      add_key_grads(0, most, 0);
      return;
    }
    for (std::int64_t t = 0; t < count; ++t) add_query_grads(t, t + 1, lists_.visible_keys(members[t], block));
    for (std::int64_t j = 0, t = 0; j < most; ++j) {
      while (lists_.visible_keys(members[t], block) <= j) ++t;
      add_key_grads(j, j + 1, t);
    }
  }

#if HWY_TARGET == HWY_AVX3
  template <Teacher kTeacher>
  HWY_ATTR void add_bf16_tile(std::int64_t block, const std::int32_t* members, std::int64_t count, float* part) {
    const std::int64_t columns = padded_columns(lists_.visible_keys(members[count - 1], block));
    index_tile_->score(members, count, columns, index_scores_, block_stride_);
    find_tile_gradients<kTeacher>(block, members, count, columns);
    index_tile_->add_gradients(
        index_scores_, block_stride_, members, count,
        [&](std::int64_t t) { return lists_.visible_keys(members[t], block); }, query_grads_, part);
  }
#endif

  template <Teacher kTeacher>
  HWY_ATTR void find_tile_gradients(std::int64_t block, const std::int32_t* members, std::int64_t count,
                                    std::int64_t columns) {
    std::int64_t tile_queries = kl_tile_queries(shape_.group_size);
    if (multiply_bf16_ != nullptr) tile_queries = std::max<std::int64_t>(1, kBf16Rows / shape_.group_size);
    for (std::int64_t t0 = 0; t0 < count; t0 += tile_queries) {
      if (multiply_bf16_ != nullptr)
        queue_queries(members + t0 + tile_queries, std::min(tile_queries, count - t0 - tile_queries));
      find_gradients<kTeacher>(block, members + t0, std::min(tile_queries, count - t0), columns,
                               index_scores_ + t0 * block_stride_);
    }
  }

  // What the next product reads: the queries of a long chunk come from far away.
  void queue_queries(const std::int32_t* members, std::int64_t count) {
    soon_.clear();
    const std::int64_t bytes = shape_.head_dim * static_cast<std::int64_t>(dtype_size(params_.q.dtype));
    for (std::int64_t t = 0; t < count; ++t) {
      for (std::int64_t h = 0; h < shape_.group_size; ++h) {
        soon_.push(head_row(params_.q, first_row_ + members[t], group_ * shape_.group_size + h), bytes);
      }
    }
  }

  // Turns the index scores of a few queries into Q - P.
  template <Teacher kTeacher>
  HWY_ATTR void find_gradients(std::int64_t block, const std::int32_t* members, std::int64_t count,
                               std::int64_t columns, float* index_scores) {
    const std::int64_t group_size = shape_.group_size;
    const auto scale = static_cast<float>(*params_.scale);
    const auto index_scale = static_cast<float>(*params_.index_scale);
#if HWY_TARGET == HWY_AVX3
    if (multiply_bf16_ != nullptr) {
      const std::uint16_t* rows[kBf16Rows];
      for (std::int64_t h0 = 0; h0 < group_size; h0 += kBf16Rows) {
        const std::int64_t heads = std::min(kBf16Rows, group_size - h0);
        find_bf16_rows(params_.q, first_row_, members, count, group_ * group_size + h0, heads,
                       reinterpret_cast<std::uint16_t*>(queries_), rows);
        score_bf16_rows(multiply_bf16_, rows, count * heads, columns, shape_.head_dim,
                        reinterpret_cast<const std::uint16_t*>(keys_t_), padded_pair_stride(shape_.block_size),
                        scores_ + h0 * block_stride_, block_stride_);
      }
      for (std::int64_t t = 0; t < count; ++t) {
        const float* lse = lse_ + members[t] * (group_size + 1);
        subtract_distributions_bf16<kTeacher>(scores_ + t * group_size * block_stride_, block_stride_, lse, group_size,
                                              scale, norms_[members[t]], index_scale, lse[group_size],
                                              lists_.visible_keys(members[t], block), columns, soon_,
                                              index_scores + t * block_stride_);
      }
      return;
    }
#endif
    for (std::int64_t t = 0; t < count; ++t) {
      for (std::int64_t h = 0; h < group_size; ++h) {
        load_row(head_row(params_.q, first_row_ + members[t], group_ * group_size + h), params_.q.dtype,
                 shape_.head_dim, queries_ + (t * group_size + h) * query_stride_);
      }
    }
    product(count * group_size, columns, shape_.head_dim, queries_, query_stride_, 1, keys_t_, block_stride_, scores_,
            block_stride_, Sums::kReplace);
    for (std::int64_t t = 0; t < count; ++t) {
      const float* lse = lse_ + members[t] * (group_size + 1);
      subtract_distributions<kTeacher>(scores_ + t * group_size * block_stride_, block_stride_, lse, group_size, scale,
                                       norms_[members[t]], index_scale, lse[group_size],
                                       lists_.visible_keys(members[t], block), columns,
                                       index_scores + t * block_stride_);
    }
  }

  const IndexKlParams& params_;
  [[maybe_unused]] Bf16Kernel multiply_bf16_;  // used on AVX-512 only
  const IndexKlShape& shape_;
  core::Sequence sequence_;
  std::int64_t group_;
  std::int64_t first_row_;
  std::int64_t count_;
  std::int64_t query_stride_;
  std::int64_t index_stride_;
  std::int64_t block_stride_;
  core::KeyRows key_rows_;
  core::KeyRows index_key_rows_;
  float* lse_;
  float* norms_;
  float* query_grads_;
  float* keys_t_;
  float* index_keys_;
  float* index_keys_t_;
  float* queries_;
  float* index_queries_;
  float* scores_;
  float* index_scores_;
  BlockLists lists_;
  PrefetchQueue soon_;
#if HWY_TARGET == HWY_AVX3
  std::optional<Bf16IndexTile> index_tile_;
#endif
};

/// Writes dk_idx of `rows` keys, the first being row `first` of the packed buffer.
inline HWY_ATTR void store_index_key_grads(float* sum, std::int64_t rows, std::int64_t index_dim, float factor,
                                           std::int64_t first, const TensorView& dk_idx) {
  for (std::int64_t j = 0; j < rows; ++j) {
    scale_row(factor, index_dim, sum + j * index_dim);
    store_row(sum + j * index_dim, index_dim, dk_idx.dtype,
              dk_idx.data + (first + j) * dk_idx.stride(0) * static_cast<std::int64_t>(dtype_size(dk_idx.dtype)));
  }
}

/// Task `index` of the backward: dq_idx of its rows, and its share of dk_idx. `factor` = grad_output * index_scale /
/// rows; `sums` are those of all tasks, [block_size, index_dim] a block.
inline HWY_ATTR void run_index_kl_backward(const IndexKlProblem& problem, const IndexKlShape& shape,
                                           const IndexKlBackwardLayout& layout, const BackwardTask& task,
                                           std::int64_t index, float factor, TaskOrder& order, float* sums,
                                           float* scratch, const TensorView& dq_idx, const TensorView& dk_idx) {
  const IndexKlParams& params = problem.params;
#if HWY_TARGET == HWY_AVX3
  std::optional<AmxTiles> tiles;
  if (problem.needs_amx_tiles) tiles.emplace();
#endif
  KlChunkBackward chunk(problem, shape, layout, task.chunk, task.head, scratch);
  const std::int64_t floats = shape.block_size * shape.index_dim;
  const core::Sequence sequence = core::get_sequence(params.batch, task.chunk.sequence);
  const std::int64_t first_key = params.batch.cu_seqlens_k[static_cast<std::size_t>(sequence.index)];
  for (std::int64_t block = 0; block < task.blocks; ++block) {
    const bool is_first = task.previous < 0;
    const bool is_last = block >= task.last_begin;
    float* sum = is_first && is_last ? nullptr : sums + (task.sum_begin + block) * floats;
    float* part = is_first && !is_last ? sum : scratch + layout.part;
    std::fill(part, part + floats, 0.0f);
    if (chunk.has_members(block)) {
      if (params.teacher == Teacher::kMean) {
        chunk.add_block<Teacher::kMean>(block, part);
      } else {
        chunk.add_block<Teacher::kMax>(block, part);
      }
    }
    if (!is_first) {
      order.wait_for(task.previous, block);
      add_row(is_last ? sum : part, floats, is_last ? part : sum);
    }
    if (is_last) {
      const std::int64_t begin = block * shape.block_size;
      store_index_key_grads(part, std::min(shape.block_size, sequence.keys - begin), shape.index_dim, factor,
                            first_key + begin, dk_idx);
    }
    order.finish(index, block + 1);
  }
  chunk.write_query_grads(factor, dq_idx);
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_INDEX_KL_INL_H_
