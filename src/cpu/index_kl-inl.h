// SPDX-License-Identifier: Apache-2.0
// The KL loss of the index branch and its gradient (SPEC section 4), streamed over key blocks: no [queries, keys] tensor.
// Forward: a task owns queries and one group and passes their blocks twice, for the softmax denominators and for the
// divergence; the first pass leaves its score tiles, as far as there is room, to the second. Backward: a task owns queries
// and one group; dq_idx is its own, and dk_idx is summed a task and then over the tasks in order. Tested in
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

#include "msa/index_kl.h"
#include "src/core/layout.h"
#include "src/cpu/block_walk.h"
#include "src/cpu/index_kl_plan.h"
#include "src/cpu/key_tile-inl.h"
#include "src/cpu/row_ops-inl.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// ln(x) of normal positive x, within 2 units in the last place; NaN of NaN. A lane's result depends on that lane alone.
inline HWY_ATTR FloatVec log_lanes(FloatVec x) {
  const FloatTag df;
  const hn::RebindToSigned<FloatTag> di;
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)): taking the bits of sqrt(1/2) away leaves n in the exponent's place.
  const auto bits = hn::BitCast(di, x);
  const auto n = hn::ShiftRight<23>(hn::Sub(bits, hn::Set(di, 0x3f3504f3)));
  const auto m = hn::BitCast(df, hn::Sub(bits, hn::ShiftLeft<23>(n)));
  // With f = m - 1 (exact) and s = f / (2 + f), ln m = 2 atanh(s) = 2 s + s^3 p(s^2), |s| <= 0.1716, and 2 s = f - s f:
  // ln m = f - s (f - s^2 p). p is a minimax polynomial that leaves a relative error of 5e-12.
  const auto f = hn::Sub(m, hn::Set(df, 1.0f));
  const auto s = hn::Div(f, hn::Add(m, hn::Set(df, 1.0f)));
  const auto z = hn::Mul(s, s);
  auto p = hn::MulAdd(z, hn::Set(df, 0.235823134f), hn::Set(df, 0.285373005f));
  p = hn::MulAdd(p, z, hn::Set(df, 0.400003353f));
  p = hn::MulAdd(p, z, hn::Set(df, 0.666666656f));
  const auto tail = hn::Mul(s, hn::NegMulAdd(z, p, f));
  const auto exponent = hn::ConvertTo(df, n);
  const auto low = hn::MulAdd(exponent, hn::Set(df, -2.12194440e-4f), hn::Sub(f, tail));
  const auto y = hn::MulAdd(exponent, hn::Set(df, 0.693359375f), low);
  return hn::IfThenElse(hn::IsNaN(x), x, y);
}

/// sum of e^(row - shift) over row[0, count), which stays as it is.
inline HWY_ATTR float sum_of_exp(const float* HWY_RESTRICT row, std::int64_t count, float shift) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto origin = hn::Set(df, shift);
  auto sum = hn::Zero(df);
  std::int64_t j = 0;
  for (; j + lanes <= count; j += lanes) sum = hn::Add(sum, exp_lanes(hn::Sub(hn::LoadU(df, row + j), origin)));
  if (j < count) {
    const auto mask = hn::FirstN(df, static_cast<std::size_t>(count - j));
    sum = hn::Add(sum, hn::IfThenElseZero(mask, exp_lanes(hn::Sub(hn::LoadU(df, row + j), origin))));
  }
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

/// The teacher's mass from one more head.
template <Teacher kTeacher>
HWY_INLINE HWY_ATTR FloatVec add_mass(FloatVec mass, FloatVec p) {
  if constexpr (kTeacher == Teacher::kMean) {
    return hn::Add(mass, p);
  } else {
    return hn::IfThenElse(hn::Gt(mass, p), mass, p);
  }
}

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

/// Sum of P (ln P - ln Q) over keys [0, count): P from `rows`, ln Q = index_row - lse_index.
template <Teacher kTeacher>
HWY_ATTR float sum_divergence(const float* rows, std::int64_t stride, const float* factors, std::int64_t heads,
                              float inverse_norm, const float* index_row, float lse_index, std::int64_t count) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto term = [&](std::int64_t j) HWY_ATTR {
    const auto p = hn::Mul(read_mass<kTeacher>(rows, stride, factors, heads, j), hn::Set(df, inverse_norm));
    const auto log_q = hn::Sub(hn::LoadU(df, index_row + j), hn::Set(df, lse_index));
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

inline void write_float(const TensorView& tensor, std::int64_t row, std::int64_t head, float value) {
  *reinterpret_cast<float*>(head_row(tensor, row, head)) = value;
}

/// The forward of a chunk of queries and one group.
class KlChunk {
 public:
  HWY_ATTR KlChunk(const IndexKlParams& params, const IndexKlShape& shape, const IndexKlLayout& layout,
                   const QueryChunk& chunk, std::int64_t group, float* scratch)
      : params_(params),
        shape_(shape),
        layout_(layout),
        sequence_(core::get_sequence(params.batch, chunk.sequence)),
        group_(group),
        first_row_(sequence_.query_begin + chunk.begin),
        count_(chunk.end - chunk.begin),
        row_count_(shape.group_size + 1),
        tile_stride_(kl_tile_stride(shape.block_size)),
        scratch_(scratch),
        largest_(scratch + layout.largest),
        totals_(scratch + layout.totals),
        norms_(scratch + layout.norms),
        key_rows_(params.k, params.batch),
        index_key_rows_(params.k_idx, params.batch),
        walk_(params.batch, sequence_, params.blocks, group, shape.block_size, chunk.begin, chunk.end,
              reinterpret_cast<std::int32_t*>(scratch + layout.walk)) {
    load_query_rows(params.q, first_row_, count_, group * shape.group_size, shape.group_size,
                    scratch + layout.queries);
    load_query_rows(params.q_idx, first_row_, count_, group, 1, scratch + layout.index_queries);
  }

  /// First pass: lse of every row, in place of its maximum.
  HWY_ATTR void find_lse() {
    std::fill(largest_, largest_ + count_ * row_count_, kNegativeInfinity);
    std::fill(totals_, totals_ + count_ * row_count_, 0.0f);
    pass_tiles(true, [&](std::int64_t i, std::int64_t visible, const float* rows) HWY_ATTR {
      for (std::int64_t h = 0; h < row_count_; ++h) {
        const float* row = rows + h * tile_stride_;
        const float block_largest = row[shape_.block_size];
        const bool is_index = h == shape_.group_size;
        const float block_total = is_index ? sum_of_exp(row, visible, softmax_shift(block_largest))
                                           : row[shape_.block_size + 1];
        add_block(block_largest, block_total, largest_[i * row_count_ + h], totals_[i * row_count_ + h]);
      }
    });
    for (std::int64_t r = 0; r < count_ * row_count_; ++r) {
      largest_[r] = static_cast<float>(static_cast<double>(largest_[r]) + std::log(static_cast<double>(totals_[r])));
    }
  }

  /// What each query's teacher mass is divided by, from its lse.
  HWY_ATTR void find_norms() {
    if (params_.teacher == Teacher::kMean) {
      std::fill(norms_, norms_ + count_, static_cast<float>(shape_.group_size));
      return;
    }
    std::fill(norms_, norms_ + count_, 0.0f);
    pass_tiles(false, [&](std::int64_t i, std::int64_t visible, const float* rows) HWY_ATTR {
      norms_[i] += sum_mass<Teacher::kMax>(rows, tile_stride_, find_factors(i, rows), shape_.group_size, visible);
    });
  }

  /// Last pass: the divergence of every query, in double over the blocks.
  template <Teacher kTeacher>
  HWY_ATTR void find_divergence(double* values) {
    std::fill(values, values + count_, 0.0);
    pass_tiles(false, [&](std::int64_t i, std::int64_t visible, const float* rows) HWY_ATTR {
      values[i] += static_cast<double>(sum_divergence<kTeacher>(
          rows, tile_stride_, find_factors(i, rows), shape_.group_size, 1.0f / norms_[i],
          rows + shape_.group_size * tile_stride_, largest_[i * row_count_ + shape_.group_size], visible));
    });
  }

  /// Saves lse and norms of the queries that have a block; the others keep what they were filled with.
  void save(const IndexKlSaved& saved) const {
    for (std::int64_t i = 0; i < count_; ++i) {
      const float* lse = largest_ + i * row_count_;
      if (totals_[i * row_count_ + shape_.group_size] == 0) continue;  // no block
      for (std::int64_t h = 0; h < shape_.group_size; ++h) {
        write_float(saved.lse_main, first_row_ + i, group_ * shape_.group_size + h, lse[h]);
      }
      write_float(saved.lse_index, first_row_ + i, group_, lse[shape_.group_size]);
      write_float(saved.teacher_norm, first_row_ + i, group_, norms_[i]);
    }
  }

  std::int64_t first_row() const { return first_row_; }
  std::int64_t count() const { return count_; }

 private:
  // Running maximum and sum of a row; at first -inf and 0.
  static HWY_ATTR void add_block(float block_largest, float block_total, float& largest, float& total) {
    const float top = block_largest > largest ? block_largest : largest;
    const float shift = softmax_shift(top);
    total = total * exp_one(largest - shift) + block_total * exp_one(softmax_shift(block_largest) - shift);
    largest = top;
  }

  // e^(block maximum - lse): what a head's stored exponentials are to be multiplied by.
  HWY_ATTR const float* find_factors(std::int64_t i, const float* rows) {
    float* factors = scratch_ + layout_.factors;
    for (std::int64_t h = 0; h < shape_.group_size; ++h) {
      factors[h] = exp_one(softmax_shift(rows[h * tile_stride_ + shape_.block_size]) - largest_[i * row_count_ + h]);
    }
    return factors;
  }

  // Calls body(query, visible, rows) for every query of the chunk and block, blocks ascending: row h < group_size of `rows`
  // holds e^(score - block maximum) of head h, row group_size the scaled scores of the index; column block_size the row's
  // maximum, the next one the sum of its exponentials.
  template <class Body>
  HWY_ATTR void pass_tiles(bool first_pass, const Body& body) {
    const std::int64_t tile_queries = kl_tile_queries(shape_.group_size);
    std::int64_t used = 0;
    walk_.rewind();
    while (walk_.next()) {
      bool is_loaded = false;
      for (std::int64_t t0 = 0; t0 < walk_.count(); t0 += tile_queries) {
        const std::int64_t members = std::min(tile_queries, walk_.count() - t0);
        const std::int64_t floats = members * row_count_ * tile_stride_;
        const bool is_kept = used + floats <= layout_.strip_floats;
        float* tile = scratch_ + (is_kept ? layout_.strip + used : layout_.tile);
        if (is_kept) used += floats;
        if (first_pass || !is_kept) {
          if (!is_loaded) load_block();
          is_loaded = true;
          compute_tile(walk_.members() + t0, members, tile);
        }
        for (std::int64_t t = 0; t < members; ++t) {
          const std::int64_t i = walk_.members()[t0 + t];
          body(i, walk_.visible_keys(i), tile + t * row_count_ * tile_stride_);
        }
      }
    }
  }

  HWY_ATTR void load_block() {
    const std::int64_t begin = walk_.block() * shape_.block_size;
    load_keys_transposed(key_rows_, params_.k.dtype, sequence_.index, group_, begin, walk_.block_keys(),
                         shape_.head_dim, scratch_ + layout_.keys, padded_stride(shape_.block_size));
    load_keys_transposed(index_key_rows_, params_.k_idx.dtype, sequence_.index, 0, begin, walk_.block_keys(),
                         shape_.index_dim, scratch_ + layout_.index_keys, padded_stride(shape_.block_size));
  }

  HWY_ATTR void compute_tile(const std::int32_t* members, std::int64_t count, float* tile) {
    const std::int64_t key_stride = padded_stride(shape_.block_size);
    const std::int64_t columns = padded_columns(walk_.block_keys());
    const std::int64_t group_size = shape_.group_size;
    const TileRows<const float> queries{scratch_ + layout_.queries, members, group_size, group_size * shape_.head_dim,
                                        shape_.head_dim};
    const TileRows<float> scores{tile, nullptr, group_size, row_count_ * tile_stride_, tile_stride_};
    product_of_tile(count * group_size, columns, shape_.head_dim, queries, scratch_ + layout_.keys, key_stride, scores);
    const TileRows<const float> index_queries{scratch_ + layout_.index_queries, members, 1, shape_.index_dim, 0};
    const TileRows<float> index_scores{tile + group_size * tile_stride_, nullptr, 1, row_count_ * tile_stride_, 0};
    product_of_tile(count, columns, shape_.index_dim, index_queries, scratch_ + layout_.index_keys, key_stride,
                    index_scores);
    const auto scale = static_cast<float>(*params_.scale);
    const auto index_scale = static_cast<float>(*params_.index_scale);
    for (std::int64_t t = 0; t < count; ++t) {
      const std::int64_t visible = walk_.visible_keys(members[t]);
      float* row = tile + t * row_count_ * tile_stride_;
      for (std::int64_t h = 0; h < group_size; ++h, row += tile_stride_) {
        const float largest = scale_and_max(row, visible, scale);
        row[shape_.block_size + 1] = exp_and_sum(row, visible, softmax_shift(largest));
        row[shape_.block_size] = largest;
      }
      row[shape_.block_size] = scale_and_max(row, visible, index_scale);
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
  float* totals_;
  float* norms_;
  core::KeyRows key_rows_;
  core::KeyRows index_key_rows_;
  BlockWalk walk_;
};

/// One task of the forward: saves lse and norms and writes values[row * kv_heads + group] = the row's KL.
inline HWY_ATTR void run_index_kl(const IndexKlParams& params, const IndexKlShape& shape, const IndexKlLayout& layout,
                                  const QueryChunk& chunk, std::int64_t group, float* scratch,
                                  const IndexKlSaved& saved, double* values) {
  KlChunk task(params, shape, layout, chunk, group, scratch);
  auto* row_values = reinterpret_cast<double*>(scratch + layout.values);
  task.find_lse();
  task.find_norms();
  if (params.teacher == Teacher::kMean) {
    task.find_divergence<Teacher::kMean>(row_values);
  } else {
    task.find_divergence<Teacher::kMax>(row_values);
  }
  task.save(saved);
  for (std::int64_t i = 0; i < task.count(); ++i) {
    values[(task.first_row() + i) * shape.kv_heads + group] = row_values[i];
  }
}

/// Q - P over the first `columns` keys, in place of the index row: rows 0..heads-1 hold raw main scores, row `heads` the raw
/// index scores; lse one a row. Columns that the query does not see get meaningless values: nobody reads them.
template <Teacher kTeacher>
HWY_ATTR void subtract_distributions(float* rows, std::int64_t stride, std::int64_t heads, std::int64_t columns,
                                     float scale, float index_scale, const float* lse, float inverse_norm) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto factor = hn::Set(df, scale);
  float* index_row = rows + heads * stride;
  for (std::int64_t j = 0; j < columns; j += lanes) {
    auto mass = exp_lanes(hn::MulSub(hn::LoadU(df, rows + j), factor, hn::Set(df, lse[0])));
    for (std::int64_t h = 1; h < heads; ++h) {
      const auto p = exp_lanes(hn::MulSub(hn::LoadU(df, rows + h * stride + j), factor, hn::Set(df, lse[h])));
      mass = add_mass<kTeacher>(mass, p);
    }
    const auto q =
        exp_lanes(hn::MulSub(hn::LoadU(df, index_row + j), hn::Set(df, index_scale), hn::Set(df, lse[heads])));
    hn::StoreU(hn::NegMulAdd(mass, hn::Set(df, inverse_norm), q), df, index_row + j);
  }
}

/// One task of the backward: dq_idx of its queries, and the sums of dk_idx over them, before `factor` =
/// grad_output * index_scale / rows. key_sums[block] are [block_size, index_dim]; touched[block] says which were written.
inline HWY_ATTR void run_index_kl_backward(const IndexKlParams& params, const IndexKlShape& shape,
                                           const IndexKlBackwardLayout& layout, const IndexKlTask& task,
                                           const IndexKlSaved& saved, float factor, float* scratch, float* key_sums,
                                           std::uint8_t* touched, const TensorView& dq_idx) {
  const core::Sequence sequence = core::get_sequence(params.batch, task.chunk.sequence);
  const std::int64_t group_size = shape.group_size;
  const std::int64_t head_dim = shape.head_dim;
  const std::int64_t index_dim = shape.index_dim;
  const std::int64_t count = task.chunk.end - task.chunk.begin;
  const std::int64_t group = task.group;
  const std::int64_t first_row = sequence.query_begin + task.chunk.begin;
  const std::int64_t key_stride = padded_stride(shape.block_size);  // also of the tiles
  const std::int64_t index_stride = padded_stride(index_dim);
  const std::int64_t row_count = group_size + 1;
  const std::int64_t tile_queries = kl_tile_queries(group_size);
  float* queries = scratch + layout.queries;
  float* index_queries = scratch + layout.index_queries;
  float* index_query_tile = scratch + layout.index_query_tile;
  float* index_query_grads = scratch + layout.index_query_grads;
  float* keys = scratch + layout.keys;
  float* index_keys_t = scratch + layout.index_keys_t;
  float* index_keys = scratch + layout.index_keys;
  float* lse = scratch + layout.lse;
  float* inverse_norms = scratch + layout.inverse_norms;
  float* tile = scratch + layout.tile;
  float* index_tile = tile + group_size * key_stride;
  float* sums = scratch + layout.sums;
  const core::KeyRows key_rows(params.k, params.batch);
  const core::KeyRows index_key_rows(params.k_idx, params.batch);
  const auto scale = static_cast<float>(*params.scale);
  const auto index_scale = static_cast<float>(*params.index_scale);

  std::fill(touched, touched + task.blocks, std::uint8_t{0});
  load_query_rows(params.q, first_row, count, group * group_size, group_size, queries);
  for (std::int64_t i = 0; i < count; ++i) {
    load_row(head_row(params.q_idx, first_row + i, group), params.q_idx.dtype, index_dim,
             index_queries + i * index_stride);
    for (std::int64_t h = 0; h < group_size; ++h) {
      lse[i * row_count + h] = read_float(saved.lse_main, first_row + i, group * group_size + h);
    }
    lse[i * row_count + group_size] = read_float(saved.lse_index, first_row + i, group);
    inverse_norms[i] = 1.0f / read_float(saved.teacher_norm, first_row + i, group);
  }
  std::fill(index_query_grads, index_query_grads + count * index_dim, 0.0f);

  BlockWalk walk(params.batch, sequence, params.blocks, group, shape.block_size, task.chunk.begin, task.chunk.end,
                 reinterpret_cast<std::int32_t*>(scratch + layout.walk));
  while (walk.next()) {
    const std::int64_t block_begin = walk.block() * shape.block_size;
    const std::int64_t block_keys = walk.block_keys();
    const std::int64_t columns = padded_columns(block_keys);
    float* key_sum = key_sums + walk.block() * shape.block_size * index_dim;
    std::fill(key_sum, key_sum + shape.block_size * index_dim, 0.0f);
    touched[walk.block()] = 1;
    load_keys_transposed(key_rows, params.k.dtype, sequence.index, group, block_begin, block_keys, head_dim, keys,
                         key_stride);
    load_value_rows(index_key_rows, params.k_idx.dtype, sequence.index, 0, block_begin, block_keys, index_dim,
                    index_keys, index_stride);
    transpose_keys(index_keys, index_stride, block_keys, index_dim, index_keys_t, key_stride);
    for (std::int64_t t0 = 0; t0 < walk.count(); t0 += tile_queries) {
      const std::int32_t* members = walk.members() + t0;
      const std::int64_t members_here = std::min(tile_queries, walk.count() - t0);
      const TileRows<const float> query_of{queries, members, group_size, group_size * head_dim, head_dim};
      const TileRows<float> score_of{tile, nullptr, group_size, row_count * key_stride, key_stride};
      product_of_tile(members_here * group_size, columns, head_dim, query_of, keys, key_stride, score_of);
      for (std::int64_t t = 0; t < members_here; ++t) {
        const float* row = index_queries + members[t] * index_stride;
        std::copy(row, row + index_dim, index_query_tile + t * index_stride);
      }
      product(members_here, columns, index_dim, index_query_tile, index_stride, 1, index_keys_t, key_stride,
              index_tile, row_count * key_stride, false);
      for (std::int64_t t = 0; t < members_here; ++t) {
        const auto subtract = params.teacher == Teacher::kMean ? subtract_distributions<Teacher::kMean>
                                                               : subtract_distributions<Teacher::kMax>;
        subtract(tile + t * row_count * key_stride, key_stride, group_size, columns, scale, index_scale,
                 lse + members[t] * row_count, inverse_norms[members[t]]);
      }
      // Queries inside the block come first and see a part of it: exactly that part, for 0 times an unseen NaN is NaN.
      const auto add_rows = [&](std::int64_t first, std::int64_t rows, std::int64_t visible) HWY_ATTR {
        const float* gradients = index_tile + first * row_count * key_stride;
        product(rows, index_dim, visible, gradients, row_count * key_stride, 1, index_keys, index_stride,
                sums + first * index_dim, index_dim, false);
        product(visible, index_dim, rows, gradients, 1, row_count * key_stride,
                index_query_tile + first * index_stride, index_stride, key_sum, index_dim, true);
      };
      std::int64_t t = 0;
      for (; t < members_here && walk.visible_keys(members[t]) < block_keys; ++t) {
        add_rows(t, 1, walk.visible_keys(members[t]));
      }
      if (t < members_here) add_rows(t, members_here - t, block_keys);
      for (t = 0; t < members_here; ++t) {
        add_row(sums + t * index_dim, index_dim, index_query_grads + members[t] * index_dim);
      }
    }
  }
  for (std::int64_t i = 0; i < count; ++i) {
    float* row = index_query_grads + i * index_dim;
    scale_row(factor, index_dim, row);
    store_row(row, index_dim, dq_idx.dtype, head_row(dq_idx, first_row + i, group));
  }
}

/// sum[0, floats) += part, floats a multiple of 16.
inline HWY_ATTR void add_key_sums(const float* part, std::int64_t floats, float* sum) { add_row(part, floats, sum); }

/// Writes dk_idx of `rows` keys, the first being row `first` of the packed buffer.
inline HWY_ATTR void store_index_key_grads(float* sum, std::int64_t rows, std::int64_t index_dim, float factor,
                                           std::int64_t first, const TensorView& dk_idx) {
  for (std::int64_t j = 0; j < rows; ++j) {
    scale_row(factor, index_dim, sum + j * index_dim);
    store_row(sum + j * index_dim, index_dim, dk_idx.dtype,
              dk_idx.data + (first + j) * dk_idx.stride(0) * static_cast<std::int64_t>(dtype_size(dk_idx.dtype)));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_INDEX_KL_INL_H_
