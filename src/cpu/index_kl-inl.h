// SPDX-License-Identifier: Apache-2.0
// The KL loss of the index branch and its gradient (SPEC section 4), streamed over key blocks: no [queries, keys] tensor.
// A task owns queries and one group and goes through their blocks twice, for the maxima and sums of the softmaxes and for
// what is made of them: the divergence, or Q - P and its products; score tiles of the first time are kept for the second as
// far as there is room. The backward does not start from the saved lse: its rounding would move whole rows of P and Q, whose
// difference the gradient is. dq_idx is a task's own; dk_idx is summed a task and then over the tasks in order. Tested in
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

/// Sum of P (ln P - ln Q) over keys [0, count): P from `rows`, ln Q = (index_row - index_largest) - index_log_total.
template <Teacher kTeacher>
HWY_ATTR float sum_divergence(const float* rows, std::int64_t stride, const float* factors, std::int64_t heads,
                              float norm, const float* index_row, float index_largest, float index_log_total,
                              std::int64_t count) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto term = [&](std::int64_t j) HWY_ATTR {
    const auto p = hn::Div(read_mass<kTeacher>(rows, stride, factors, heads, j), hn::Set(df, norm));
    const auto log_q = hn::Sub(hn::Sub(hn::LoadU(df, index_row + j), hn::Set(df, index_largest)),
                               hn::Set(df, index_log_total));
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

/// Q - P of the first `columns` keys, in place of the index row: Q = index_weight e^(index_row - index_largest). Columns that
/// the query does not see get meaningless values: nobody reads them.
template <Teacher kTeacher>
HWY_ATTR void subtract_distributions(const float* rows, std::int64_t stride, const float* factors, std::int64_t heads,
                                     float norm, float index_largest, float index_weight, std::int64_t columns,
                                     float* index_row) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  for (std::int64_t j = 0; j < columns; j += lanes) {
    const auto p = hn::Div(read_mass<kTeacher>(rows, stride, factors, heads, j), hn::Set(df, norm));
    const auto e = exp_lanes(hn::Sub(hn::LoadU(df, index_row + j), hn::Set(df, index_largest)));
    hn::StoreU(hn::Sub(hn::Mul(e, hn::Set(df, index_weight)), p), df, index_row + j);
  }
}

inline void write_float(const TensorView& tensor, std::int64_t row, std::int64_t head, float value) {
  *reinterpret_cast<float*>(head_row(tensor, row, head)) = value;
}

/// A chunk of queries and one group, forward or backward.
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
        totals_(reinterpret_cast<double*>(scratch + layout.totals)),
        norms_(scratch + layout.norms),
        key_rows_(params.k, params.batch),
        index_key_rows_(params.k_idx, params.batch),
        walk_(params.batch, sequence_, params.blocks, group, shape.block_size, chunk.begin, chunk.end,
              reinterpret_cast<std::int32_t*>(scratch + layout.walk)) {
    load_query_rows(params.q, first_row_, count_, group * shape.group_size, shape.group_size,
                    scratch + layout.queries);
    load_query_rows(params.q_idx, first_row_, count_, group, 1, scratch + layout.index_queries);
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
        const float block_total = is_index ? sum_of_exp(row, visible, softmax_shift(block_largest))
                                           : row[shape_.block_size + 1];
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
      values[i] += static_cast<double>(sum_divergence<kTeacher>(
          rows, tile_stride_, find_factors(i, rows), shape_.group_size, norms_[i],
          rows + shape_.group_size * tile_stride_, softmax_shift(largest_[index]),
          static_cast<float>(std::log(totals_[index])), visible));
    });
  }

  /// dq_idx, and the sums of dk_idx, before `factor` = grad_output * index_scale / rows. key_sums[block] are
  /// [block_size, index_dim]; touched[block] says which were written.
  template <Teacher kTeacher>
  HWY_ATTR void write_gradients(const IndexKlBackwardLayout& layout, float factor, float* key_sums,
                                std::uint8_t* touched, const TensorView& dq_idx) {
    const std::int64_t index_dim = shape_.index_dim;
    const std::int64_t index_stride = padded_stride(index_dim);
    const std::int64_t query_stride = row_count_ * tile_stride_;
    float* query_tile = scratch_ + layout.index_query_tile;
    float* query_grads = scratch_ + layout.index_query_grads;
    float* index_keys = scratch_ + layout.index_key_rows;
    float* sums = scratch_ + layout.sums;
    std::fill(query_grads, query_grads + count_ * index_dim, 0.0f);
    std::int64_t loaded = -1;
    pass_tiles(false, [&](const Tile& tile) HWY_ATTR {
      const std::int64_t block_keys = walk_.block_keys();
      float* key_sum = key_sums + walk_.block() * shape_.block_size * index_dim;
      if (loaded != walk_.block()) {
        loaded = walk_.block();
        touched[loaded] = 1;
        std::fill(key_sum, key_sum + shape_.block_size * index_dim, 0.0f);
        load_value_rows(index_key_rows_, params_.k_idx.dtype, sequence_.index, 0, loaded * shape_.block_size, block_keys,
                        index_dim, index_keys, index_stride);
      }
      float* gradients = tile.rows + shape_.group_size * tile_stride_;
      for (std::int64_t t = 0; t < tile.count; ++t) {
        const std::int64_t i = tile.members[t];
        const std::int64_t index = i * row_count_ + shape_.group_size;
        const float* rows = tile.rows + t * query_stride;
        subtract_distributions<kTeacher>(rows, tile_stride_, find_factors(i, rows), shape_.group_size, norms_[i],
                                         softmax_shift(largest_[index]), static_cast<float>(1.0 / totals_[index]),
                                         padded_columns(block_keys), gradients + t * query_stride);
        const float* query = scratch_ + layout_.index_queries + i * index_dim;
        std::copy(query, query + index_dim, query_tile + t * index_stride);
      }
      // Queries inside the block come first and see a part of it: exactly that part, for 0 times an unseen NaN is NaN.
      const auto add_rows = [&](std::int64_t first, std::int64_t rows, std::int64_t visible) HWY_ATTR {
        product(rows, index_dim, visible, gradients + first * query_stride, query_stride, 1, index_keys, index_stride,
                sums + first * index_dim, index_dim, false);
        product(visible, index_dim, rows, gradients + first * query_stride, 1, query_stride,
                query_tile + first * index_stride, index_stride, key_sum, index_dim, true);
      };
      std::int64_t t = 0;
      for (; t < tile.count && walk_.visible_keys(tile.members[t]) < block_keys; ++t) {
        add_rows(t, 1, walk_.visible_keys(tile.members[t]));
      }
      if (t < tile.count) add_rows(t, tile.count - t, block_keys);
      for (t = 0; t < tile.count; ++t) {
        add_row(sums + t * index_dim, index_dim, query_grads + tile.members[t] * index_dim);
      }
    });
    for (std::int64_t i = 0; i < count_; ++i) {
      float* row = query_grads + i * index_dim;
      scale_row(factor, index_dim, row);
      store_row(row, index_dim, dq_idx.dtype, head_row(dq_idx, first_row_ + i, group_));
    }
  }

  /// Saves lse and norms of the queries that have a block; the others keep what they were filled with.
  void save(const IndexKlSaved& saved) const {
    for (std::int64_t i = 0; i < count_; ++i) {
      const auto lse = [&](std::int64_t h) {
        const std::int64_t r = i * row_count_ + h;
        return static_cast<float>(static_cast<double>(largest_[r]) + std::log(totals_[r]));
      };
      if (totals_[i * row_count_ + shape_.group_size] == 0) continue;  // no block
      for (std::int64_t h = 0; h < shape_.group_size; ++h) {
        write_float(saved.lse_main, first_row_ + i, group_ * shape_.group_size + h, lse(h));
      }
      write_float(saved.lse_index, first_row_ + i, group_, lse(shape_.group_size));
      write_float(saved.teacher_norm, first_row_ + i, group_, norms_[i]);
    }
  }

  std::int64_t first_row() const { return first_row_; }
  std::int64_t count() const { return count_; }

 private:
  // Some queries that attend to a block: row h < group_size of query members[t], from rows + t * row_count * tile_stride on,
  // holds e^(score - block maximum) of head h, row group_size the scaled scores of the index; column block_size the row's
  // maximum, the next one the sum of its exponentials.
  struct Tile {
    const std::int32_t* members;
    std::int64_t count;
    float* rows;
  };

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

  // Calls body(tile) for all tiles, blocks ascending.
  template <class Body>
  HWY_ATTR void pass_tiles(bool is_first, const Body& body) {
    const std::int64_t tile_queries = kl_tile_queries(shape_.group_size);
    std::int64_t used = 0;
    walk_.rewind();
    while (walk_.next()) {
      bool is_loaded = false;
      for (std::int64_t t0 = 0; t0 < walk_.count(); t0 += tile_queries) {
        Tile tile{walk_.members() + t0, std::min(tile_queries, walk_.count() - t0), nullptr};
        const std::int64_t floats = tile.count * row_count_ * tile_stride_;
        const bool is_kept = used + floats <= layout_.strip_floats;
        tile.rows = scratch_ + (is_kept ? layout_.strip + used : layout_.tile);
        if (is_kept) used += floats;
        if (is_first || !is_kept) {
          if (!is_loaded) load_block();
          is_loaded = true;
          compute_tile(tile.members, tile.count, tile.rows);
        }
        body(tile);
      }
    }
  }

  // Calls body(query, visible, rows) for every query of the chunk and block, blocks ascending.
  template <class Body>
  HWY_ATTR void pass_queries(bool is_first, const Body& body) {
    pass_tiles(is_first, [&](const Tile& tile) HWY_ATTR {
      for (std::int64_t t = 0; t < tile.count; ++t) {
        const std::int64_t i = tile.members[t];
        body(i, walk_.visible_keys(i), tile.rows + t * row_count_ * tile_stride_);
      }
    });
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
  double* totals_;
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
  task.find_sums();
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

/// One task of the backward; see KlChunk::write_gradients.
inline HWY_ATTR void run_index_kl_backward(const IndexKlParams& params, const IndexKlShape& shape,
                                           const IndexKlBackwardLayout& layout, const IndexKlTask& task, float factor,
                                           float* scratch, float* key_sums, std::uint8_t* touched,
                                           const TensorView& dq_idx) {
  std::fill(touched, touched + task.blocks, std::uint8_t{0});
  KlChunk chunk(params, shape, layout.chunk, task.chunk, task.group, scratch);
  chunk.find_sums();
  chunk.find_norms();
  if (params.teacher == Teacher::kMean) {
    chunk.write_gradients<Teacher::kMean>(layout, factor, key_sums, touched, dq_idx);
  } else {
    chunk.write_gradients<Teacher::kMax>(layout, factor, key_sums, touched, dq_idx);
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
