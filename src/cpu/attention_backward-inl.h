// SPDX-License-Identifier: Apache-2.0
// Backward of sparse and dense attention in two passes over (query, block) pairs, both recomputing the scores:
// a query pass (a task owns queries and walks their blocks: dq) and a key pass (a task owns a key block and
// walks the queries that chose it: dk, dv). No task writes what another one reads, so there are no atomics, and every
// sum runs in an order that the row's or the block's own list fixes. Tested in tests/unit/sparse_attention_test.cc and
// dense_attention_test.cc.
//
// With P = softmax(scale S), S = Q K^T, and dP = dO V^T:  dS = P (dP - rowsum(P dP) + dlse),
// dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO. P comes from the row's own maximum and sum and rowsum(P dP) from
// the numbers that dS is made of, not from the saved lse and out: their rounding would move a whole row, and leave a
// gradient where the two terms cancel (a row of one key has none). So the query pass goes through its blocks twice;
// score tiles of the first time are kept for the second as far as there is room.
#if defined(MSA_CPU_ATTENTION_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_ATTENTION_BACKWARD_INL_H_
#undef MSA_CPU_ATTENTION_BACKWARD_INL_H_
#else
#define MSA_CPU_ATTENTION_BACKWARD_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "msa/attention.h"
#include "src/core/layout.h"
#include "src/cpu/attention_backward_plan.h"
#include "src/cpu/attention_backward_problem.h"
#include "src/cpu/block_walk.h"
#include "src/cpu/key_tile-inl.h"
#include "src/cpu/row_ops-inl.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// Sum of a[0, count) times b.
inline HWY_ATTR float dot_visible(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, std::int64_t count) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  auto sum = hn::Zero(df);
  std::int64_t j = 0;
  for (; j + lanes <= count; j += lanes) sum = hn::MulAdd(hn::LoadU(df, a + j), hn::LoadU(df, b + j), sum);
  if (j < count) {
    const auto mask = hn::FirstN(df, static_cast<std::size_t>(count - j));
    const auto product = hn::Mul(hn::LoadU(df, a + j), hn::LoadU(df, b + j));
    sum = hn::Add(sum, hn::IfThenElseZero(mask, product));
  }
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

// Columns of a row that it does not see hold meaningless values in the next two, before and after: nobody reads them.

/// grads = dS = P ((dP - mean) + lse_grad) from grads = dP and P = factor * exponentials.
inline HWY_ATTR void finish_row(std::int64_t columns, float factor, const RowTerms& terms,
                                const float* HWY_RESTRICT exponentials, float* HWY_RESTRICT grads) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto f = hn::Set(df, factor);
  const auto mean = hn::Set(df, terms.mean);
  const auto lse_grad = hn::Set(df, terms.lse_grad);
  for (std::int64_t j = 0; j < columns; j += lanes) {
    const auto p = hn::Mul(hn::LoadU(df, exponentials + j), f);
    const auto centred = hn::Sub(hn::LoadU(df, grads + j), mean);
    hn::StoreU(hn::Mul(p, hn::Add(centred, lse_grad)), df, grads + j);
  }
}

/// scores = P and grads = dS from scores = S and grads = dP.
inline HWY_ATTR void differentiate_row(std::int64_t columns, float scale, const RowTerms& terms,
                                       float* HWY_RESTRICT scores, float* HWY_RESTRICT grads) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto s = hn::Set(df, scale);
  const auto shift = hn::Set(df, terms.shift);
  const auto weight = hn::Set(df, terms.weight);
  const auto mean = hn::Set(df, terms.mean);
  const auto lse_grad = hn::Set(df, terms.lse_grad);
  for (std::int64_t j = 0; j < columns; j += lanes) {
    // Scaled and rounded before the subtraction, as the maximum was: its own exponential is exactly 1.
    const auto p = hn::Mul(exp_lanes(hn::Sub(hn::Mul(hn::LoadU(df, scores + j), s), shift)), weight);
    hn::StoreU(p, df, scores + j);
    const auto centred = hn::Sub(hn::LoadU(df, grads + j), mean);
    hn::StoreU(hn::Mul(p, hn::Add(centred, lse_grad)), df, grads + j);
  }
}

/// The query pass over a chunk of queries and one group.
class QueryPass {
 public:
  /// `scratch` is laid out by `layout`.
  HWY_ATTR QueryPass(const BackwardProblem& problem, const AttentionShape& shape, const QueryPassLayout& layout,
                     const QueryChunk& chunk, std::int64_t kv_head, float* scratch)
      : problem_(problem),
        shape_(shape),
        layout_(layout),
        sequence_(core::get_sequence(*problem.batch, chunk.sequence)),
        kv_head_(kv_head),
        first_row_(sequence_.query_begin + chunk.begin),
        first_head_(kv_head * shape.group_size),
        rows_((chunk.end - chunk.begin) * shape.group_size),
        tile_stride_(backward_tile_stride(shape.block_size)),
        scratch_(scratch),
        row_sums_(reinterpret_cast<RowSums*>(scratch + layout.row_sums)),
        key_rows_(problem.k, *problem.batch),
        value_rows_(problem.v, *problem.batch),
        walk_(*problem.batch, sequence_, problem.blocks, kv_head, shape.block_size, chunk.begin, chunk.end,
              reinterpret_cast<std::int32_t*>(scratch + layout.walk)) {
    const std::int64_t count = chunk.end - chunk.begin;
    load_query_rows(problem.q, first_row_, count, first_head_, shape.group_size, scratch + layout.queries);
    load_query_rows(problem.saved.dout, first_row_, count, first_head_, shape.group_size, scratch + layout.out_grads);
  }

  /// First time through the blocks: terms[row * query_heads + head] of all rows.
  HWY_ATTR void find_terms(RowTerms* terms) {
    std::fill(row_sums_, row_sums_ + rows_, RowSums{});
    pass_tiles(true, [&](const Tile& tile) HWY_ATTR {
      for (std::int64_t r = 0; r < tile.rows; ++r) {
        const float* scores = tile.scores + r * tile_stride_;
        const std::int64_t visible = walk_.visible_keys(tile.members[r / tile.heads]);
        RowSums& sums = row_sums_[row_of(tile, r)];
        const float largest = scores[shape_.block_size];
        const float top = largest > sums.largest ? largest : sums.largest;
        // e^(-inf) = 0 takes nothing along from before the first block.
        const auto before = static_cast<double>(exp_one(sums.largest - softmax_shift(top)));
        const auto here = static_cast<double>(exp_one(softmax_shift(largest) - softmax_shift(top)));
        sums.total = sums.total * before + static_cast<double>(scores[shape_.block_size + 1]) * here;
        sums.weighted = sums.weighted * before +
                        static_cast<double>(dot_visible(scores, tile.grads + r * tile_stride_, visible)) * here;
        sums.largest = top;
      }
    });
    for (std::int64_t r = 0; r < rows_; ++r) {
      const RowSums& sums = row_sums_[r];
      RowTerms& row = terms_of(terms, r);
      row = RowTerms{};
      if (sums.total == 0) continue;  // no block, or no score above -inf: no gradient
      const ConstTensorView& dlse = problem_.saved.dlse;
      row.shift = softmax_shift(sums.largest);
      row.weight = static_cast<float>(1.0 / sums.total);
      row.mean = static_cast<float>(sums.weighted / sums.total);
      row.lse_grad = dlse.empty() ? 0.0f : read_float(dlse, tensor_row(r), tensor_head(r));
    }
  }

  /// Second time: dq.
  HWY_ATTR void write_query_grads(RowTerms* terms) {
    const std::int64_t head_dim = shape_.head_dim;
    const std::int64_t key_stride = padded_stride(head_dim);
    float* query_grads = scratch_ + layout_.query_grads;
    float* sums = scratch_ + layout_.sums;
    const float* keys = scratch_ + layout_.keys;
    std::fill(query_grads, query_grads + rows_ * head_dim, 0.0f);
    pass_tiles(false, [&](const Tile& tile) HWY_ATTR {
      const std::int64_t block_keys = walk_.block_keys();
      for (std::int64_t r = 0; r < tile.rows; ++r) {
        const float* scores = tile.scores + r * tile_stride_;
        const RowTerms& row = terms_of(terms, row_of(tile, r));
        const float factor = exp_one(softmax_shift(scores[shape_.block_size]) - row.shift) * row.weight;
        finish_row(padded_columns(block_keys), factor, row, scores, tile.grads + r * tile_stride_);
      }
      // Queries inside the block come first and see a part of it: exactly that part, for 0 times an unseen NaN is NaN.
      const auto sum_keys = [&](std::int64_t first, std::int64_t count, std::int64_t visible) HWY_ATTR {
        product(count, head_dim, visible, tile.grads + first * tile_stride_, tile_stride_, 1, keys, key_stride,
                sums + first * head_dim, head_dim, false);
      };
      std::int64_t first = 0;
      for (; first < tile.rows; first += tile.heads) {
        const std::int64_t visible = walk_.visible_keys(tile.members[first / tile.heads]);
        if (visible == block_keys) break;
        sum_keys(first, tile.heads, visible);
      }
      sum_keys(first, tile.rows - first, block_keys);
      for (std::int64_t r = 0; r < tile.rows; ++r) {
        add_row(sums + r * head_dim, head_dim, query_grads + row_of(tile, r) * head_dim);
      }
    });
    for (std::int64_t r = 0; r < rows_; ++r) {
      float* grad = query_grads + r * head_dim;
      scale_row(problem_.scale, head_dim, grad);
      store_row(grad, head_dim, problem_.grads.dq.dtype, head_row(problem_.grads.dq, tensor_row(r), tensor_head(r)));
    }
  }

 private:
  // Some queries that attend to a block, and some heads of the group (all, but in giant groups): row r is head
  // first_head + r % heads of query members[r / heads] of the chunk. A row of `scores` holds e^(score - block maximum),
  // and the maximum and the sum in the two columns behind the keys; a row of `grads` dP.
  struct Tile {
    const std::int32_t* members;
    std::int64_t first_head;
    std::int64_t heads;
    std::int64_t rows;
    float* scores;
    float* grads;
  };

  // Rows are counted within the chunk, query by query.
  std::int64_t row_of(const Tile& tile, std::int64_t r) const {
    return tile.members[r / tile.heads] * shape_.group_size + tile.first_head + r % tile.heads;
  }
  std::int64_t tensor_row(std::int64_t row) const { return first_row_ + row / shape_.group_size; }
  std::int64_t tensor_head(std::int64_t row) const { return first_head_ + row % shape_.group_size; }
  RowTerms& terms_of(RowTerms* terms, std::int64_t row) const {
    return terms[tensor_row(row) * problem_.q.size(1) + tensor_head(row)];
  }

  // Calls body(tile) for all tiles, blocks ascending; the second time with the block's keys in layout_.keys.
  template <class Body>
  HWY_ATTR void pass_tiles(bool is_first, const Body& body) {
    const std::int64_t tile_queries = backward_tile_queries(shape_.group_size);
    const std::int64_t heads_at_once = std::min(shape_.group_size, kScoreRows);
    std::int64_t used = 0;
    walk_.rewind();
    while (walk_.next()) {
      bool is_loaded = false;
      const std::int64_t block_begin = walk_.block() * shape_.block_size;
      if (!is_first) {
        load_value_rows(key_rows_, problem_.k.dtype, sequence_.index, kv_head_, block_begin, walk_.block_keys(),
                        shape_.head_dim, scratch_ + layout_.keys, padded_stride(shape_.head_dim));
      }
      for (std::int64_t t0 = 0; t0 < walk_.count(); t0 += tile_queries) {
        for (std::int64_t h0 = 0; h0 < shape_.group_size; h0 += heads_at_once) {
          Tile tile;
          tile.members = walk_.members() + t0;
          tile.first_head = h0;
          tile.heads = std::min(heads_at_once, shape_.group_size - h0);
          tile.rows = std::min(tile_queries, walk_.count() - t0) * tile.heads;
          const std::int64_t floats = 2 * tile.rows * tile_stride_;
          const bool is_kept = used + floats <= layout_.strip_floats;
          tile.scores = scratch_ + (is_kept ? layout_.strip + used : layout_.tile);
          tile.grads = tile.scores + tile.rows * tile_stride_;
          if (is_kept) used += floats;
          if (is_first || !is_kept) {
            if (!is_loaded) load_block(block_begin);
            is_loaded = true;
            compute_tile(tile);
          }
          body(tile);
        }
      }
    }
  }

  HWY_ATTR void load_block(std::int64_t begin) {
    const std::int64_t stride = padded_stride(shape_.block_size);
    load_keys_transposed(key_rows_, problem_.k.dtype, sequence_.index, kv_head_, begin, walk_.block_keys(),
                         shape_.head_dim, scratch_ + layout_.keys_t, stride);
    load_keys_transposed(value_rows_, problem_.v.dtype, sequence_.index, kv_head_, begin, walk_.block_keys(),
                         shape_.value_dim, scratch_ + layout_.values_t, stride);
  }

  HWY_ATTR void compute_tile(const Tile& tile) {
    const float* query_of[kScoreRows];
    const float* out_grad_of[kScoreRows];
    for (std::int64_t r = 0; r < tile.rows; ++r) {
      query_of[r] = scratch_ + layout_.queries + row_of(tile, r) * shape_.head_dim;
      out_grad_of[r] = scratch_ + layout_.out_grads + row_of(tile, r) * shape_.value_dim;
    }
    const std::int64_t columns = padded_columns(walk_.block_keys());
    const std::int64_t stride = padded_stride(shape_.block_size);
    product_of_rows(tile.rows, columns, shape_.head_dim, query_of, 1, scratch_ + layout_.keys_t, stride,
                    StridedRows<float>{tile.scores, tile_stride_}, false);
    product_of_rows(tile.rows, columns, shape_.value_dim, out_grad_of, 1, scratch_ + layout_.values_t, stride,
                    StridedRows<float>{tile.grads, tile_stride_}, false);
    for (std::int64_t r = 0; r < tile.rows; ++r) {
      float* row = tile.scores + r * tile_stride_;
      const std::int64_t visible = walk_.visible_keys(tile.members[r / tile.heads]);
      const float largest = scale_and_max(row, visible, problem_.scale);
      row[shape_.block_size + 1] = exp_and_sum(row, visible, softmax_shift(largest));
      row[shape_.block_size] = largest;
    }
  }

  const BackwardProblem& problem_;
  const AttentionShape& shape_;
  const QueryPassLayout& layout_;
  core::Sequence sequence_;
  std::int64_t kv_head_;
  std::int64_t first_row_;
  std::int64_t first_head_;
  std::int64_t rows_;
  std::int64_t tile_stride_;
  float* scratch_;
  RowSums* row_sums_;
  core::KeyRows key_rows_;
  core::KeyRows value_rows_;
  BlockWalk walk_;
};

/// One task of the query pass: terms and dq of the rows of a chunk and group.
inline HWY_ATTR void run_query_pass(const BackwardProblem& problem, const AttentionShape& shape,
                                    const QueryPassLayout& layout, const QueryChunk& chunk, std::int64_t kv_head,
                                    float* scratch, RowTerms* terms) {
  QueryPass pass(problem, shape, layout, chunk, kv_head, scratch);
  pass.find_terms(terms);
  pass.write_query_grads(terms);
}

// Adds what queries [begin, end) of a block's list give to its dk (unscaled) and dv, in `split`.
inline HWY_ATTR void sum_split(const BackwardProblem& problem, const AttentionShape& shape, const KeyPassLayout& layout,
                               const core::Sequence& sequence, const KeyTask& task, const QueryList& list,
                               std::int64_t begin, std::int64_t end, const RowTerms* terms, float* scratch,
                               float* split) {
  const std::int64_t group_size = shape.group_size;
  const std::int64_t head_dim = shape.head_dim;
  const std::int64_t value_dim = shape.value_dim;
  const std::int64_t first_head = task.kv_head * group_size;
  const std::int64_t query_heads = problem.q.size(1);
  const std::int64_t query_stride = padded_stride(head_dim);
  const std::int64_t out_grad_stride = padded_stride(value_dim);
  const std::int64_t tile_stride = padded_stride(shape.block_size);
  const std::int64_t tile_queries = backward_tile_queries(group_size);
  const std::int64_t block_begin = task.block * shape.block_size;
  const std::int64_t block_keys = std::min(shape.block_size, sequence.keys - block_begin);
  const std::int64_t columns = padded_columns(block_keys);
  const std::int64_t part_floats = shape.block_size * (head_dim + value_dim);
  float* queries = scratch + layout.queries;
  float* out_grads = scratch + layout.out_grads;
  float* keys_t = scratch + layout.keys_t;
  float* values_t = scratch + layout.values_t;
  float* scores = scratch + layout.scores;
  float* grads = scratch + layout.grads;
  float* key_part = scratch + layout.part;
  float* value_part = key_part + shape.block_size * head_dim;

  std::fill(split, split + part_floats, 0.0f);
  for (std::int64_t t0 = begin; t0 < end; t0 += tile_queries) {
    const std::int64_t members = std::min(tile_queries, end - t0);
    for (std::int64_t r = 0; r < members * group_size; ++r) {
      const std::int64_t row = sequence.query_begin + list.query(t0 + r / group_size);
      const std::int64_t head = first_head + r % group_size;
      load_row(head_row(problem.q, row, head), problem.q.dtype, head_dim, queries + r * query_stride);
      load_row(head_row(problem.saved.dout, row, head), problem.saved.dout.dtype, value_dim,
               out_grads + r * out_grad_stride);
    }
    product(members * group_size, columns, head_dim, queries, query_stride, 1, keys_t, tile_stride, scores, tile_stride,
            false);
    product(members * group_size, columns, value_dim, out_grads, out_grad_stride, 1, values_t, tile_stride, grads,
            tile_stride, false);
    for (std::int64_t r = 0; r < members * group_size; ++r) {
      const std::int64_t row = sequence.query_begin + list.query(t0 + r / group_size);
      const std::int64_t head = first_head + r % group_size;
      differentiate_row(columns, problem.scale, terms[row * query_heads + head], scores + r * tile_stride,
                        grads + r * tile_stride);
    }
    // The sum of chains of about 32 rows: a single chain over a long list would lose more digits than a plain matrix
    // product.
    const std::int64_t chain_queries = std::max<std::int64_t>(1, 32 / group_size);
    for (std::int64_t c0 = 0; c0 < members; c0 += chain_queries) {
      const std::int64_t c1 = std::min(members, c0 + chain_queries);
      const auto add_rows = [&](std::int64_t first, std::int64_t last, std::int64_t visible, bool accumulate) HWY_ATTR {
        const std::int64_t row = first * group_size;
        const std::int64_t rows = (last - first) * group_size;
        product(visible, head_dim, rows, grads + row * tile_stride, 1, tile_stride, queries + row * query_stride,
                query_stride, key_part, head_dim, accumulate);
        product(visible, value_dim, rows, scores + row * tile_stride, 1, tile_stride, out_grads + row * out_grad_stride,
                out_grad_stride, value_part, value_dim, accumulate);
      };
      const auto visible_keys = [&](std::int64_t c) {
        return core::query_position(*problem.batch, sequence, list.query(t0 + c)) + 1 - block_begin;
      };
      if (visible_keys(c0) >= block_keys) {
        add_rows(c0, c1, block_keys, false);
      } else {  // as in the query pass: queries inside the block reach exactly the keys they see
        std::fill(key_part, key_part + part_floats, 0.0f);
        std::int64_t c = c0;
        for (; c < c1 && visible_keys(c) < block_keys; ++c) add_rows(c, c + 1, visible_keys(c), true);
        if (c < c1) add_rows(c, c1, block_keys, true);
      }
      add_row(key_part, block_keys * head_dim, split);
      add_row(value_part, block_keys * value_dim, split + shape.block_size * head_dim);
    }
  }
}

/// Writes dk and dv of a block from its sum.
inline HWY_ATTR void store_key_grads(const BackwardProblem& problem, const AttentionShape& shape, const KeyTask& task,
                                     float* sum) {
  const core::Sequence sequence = core::get_sequence(*problem.batch, task.sequence);
  const std::int64_t block_begin = task.block * shape.block_size;
  const std::int64_t block_keys = std::min(shape.block_size, sequence.keys - block_begin);
  const std::int64_t first_key = problem.batch->cu_seqlens_k[static_cast<std::size_t>(task.sequence)] + block_begin;
  float* value_sum = sum + shape.block_size * shape.head_dim;
  for (std::int64_t j = 0; j < block_keys; ++j) {
    scale_row(problem.scale, shape.head_dim, sum + j * shape.head_dim);
    store_row(sum + j * shape.head_dim, shape.head_dim, problem.grads.dk.dtype,
              head_row(problem.grads.dk, first_key + j, task.kv_head));
    store_row(value_sum + j * shape.value_dim, shape.value_dim, problem.grads.dv.dtype,
              head_row(problem.grads.dv, first_key + j, task.kv_head));
  }
}

/// One task of the key pass: queries [task.begin, task.end) of the block's list, split by split. A task that is only a
/// part of the block leaves its sum in task.sum; otherwise it writes dk and dv.
inline HWY_ATTR void run_key_pass(const BackwardProblem& problem, const AttentionShape& shape,
                                  const KeyPassLayout& layout, const KeyTask& task, const QueryList& list,
                                  const RowTerms* terms, float* scratch) {
  const core::Sequence sequence = core::get_sequence(*problem.batch, task.sequence);
  const std::int64_t split_queries = backward_split_queries(shape);
  const std::int64_t floats = shape.block_size * (shape.head_dim + shape.value_dim);
  float* split = task.sum != nullptr ? task.sum : scratch + layout.split;
  float* total = scratch + layout.total;
  if (task.begin == task.end) {
    std::fill(split, split + floats, 0.0f);
  } else {
    const std::int64_t block_begin = task.block * shape.block_size;
    const std::int64_t block_keys = std::min(shape.block_size, sequence.keys - block_begin);
    const std::int64_t tile_stride = padded_stride(shape.block_size);
    load_keys_transposed(core::KeyRows(problem.k, *problem.batch), problem.k.dtype, task.sequence, task.kv_head,
                         block_begin, block_keys, shape.head_dim, scratch + layout.keys_t, tile_stride);
    load_keys_transposed(core::KeyRows(problem.v, *problem.batch), problem.v.dtype, task.sequence, task.kv_head,
                         block_begin, block_keys, shape.value_dim, scratch + layout.values_t, tile_stride);
    const bool one_split = task.end - task.begin <= split_queries;
    for (std::int64_t begin = task.begin; begin < task.end;) {
      const std::int64_t end = task.end - begin > split_queries ? begin + split_queries : task.end;
      sum_split(problem, shape, layout, sequence, task, list, begin, end, terms, scratch, split);
      if (!one_split) {
        if (begin == task.begin) {
          std::copy(split, split + floats, total);
        } else {
          add_row(split, floats, total);
        }
      }
      begin = end;
    }
    if (!one_split) split = total;
  }
  if (task.sum == nullptr) store_key_grads(problem, shape, task, split);
}

/// Adds the sums of a block's tasks, tasks[0, count), in order and writes dk and dv. Overwrites the first sum.
inline HWY_ATTR void add_splits(const BackwardProblem& problem, const AttentionShape& shape, const KeyTask* tasks,
                                std::int64_t count) {
  const std::int64_t floats = shape.block_size * (shape.head_dim + shape.value_dim);
  for (std::int64_t i = 1; i < count; ++i) add_row(tasks[i].sum, floats, tasks[0].sum);
  store_key_grads(problem, shape, tasks[0], tasks[0].sum);
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_ATTENTION_BACKWARD_INL_H_
