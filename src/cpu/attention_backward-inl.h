// SPDX-License-Identifier: Apache-2.0
// Backward of sparse and dense attention in one pass over (block, query) visits. A task owns a chunk of queries of one
// kv head and goes through the key blocks in ascending order, each with the rows that attend to it, tile by tile:
// scores and dP once (in float32 scores twice), from them dq of the rows (the task's own) and dk, dv of the block,
// which are added to those of the other chunks in a fixed order (ordered_sums.h). docs/backward.md derives the cost.
// Tested in tests/unit/sparse_attention_test.cc and dense_attention_test.cc.
//
// With P = e^(scale S - lse), S = Q K^T, and dP = dO V^T:  dS = P (dP - <dO, O> + dlse),
// dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO.
#if defined(MSA_CPU_ATTENTION_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_ATTENTION_BACKWARD_INL_H_
#undef MSA_CPU_ATTENTION_BACKWARD_INL_H_
#else
#define MSA_CPU_ATTENTION_BACKWARD_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <optional>

#include "msa/attention.h"
#include "src/core/layout.h"
#include "src/cpu/attention_backward_plan.h"
#include "src/cpu/attention_backward_bf16-inl.h"
#include "src/cpu/attention_backward_problem.h"
#include "src/cpu/attention_backward_rows-inl.h"
#include "src/cpu/block_lists.h"
#include "src/cpu/key_tile-inl.h"
#include "src/cpu/ordered_sums.h"
#include "src/cpu/row_ops-inl.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// scores = P and grads = dS of the keys [0, visible) from scores = S and grads = dP; 0 from there up to `columns`, a
/// multiple of 16, whatever stood there.
inline HWY_ATTR void differentiate_row(std::int64_t visible, std::int64_t columns, float scale, const RowTerms& terms,
                                       float* HWY_RESTRICT scores, float* HWY_RESTRICT grads) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto s = hn::Set(df, scale);
  const auto shift = hn::Set(df, terms.shift);
  const auto weight = hn::Set(df, terms.weight);
  const auto mean = hn::Set(df, terms.mean);
  const auto lse_grad = hn::Set(df, terms.lse_grad);
  // Scaled and rounded before the subtraction, as in the forward: the probability of an only key is exactly 1.
  const auto find_p = [&](std::int64_t j) HWY_ATTR {
    return hn::Mul(exp_lanes(hn::Sub(hn::Mul(hn::LoadU(df, scores + j), s), shift)), weight);
  };
  const auto find_ds = [&](std::int64_t j, FloatVec p)
                           HWY_ATTR { return hn::Mul(p, hn::Add(hn::Sub(hn::LoadU(df, grads + j), mean), lse_grad)); };
  std::int64_t j = 0;
  for (; j + lanes <= visible; j += lanes) {
    const auto p = find_p(j);
    const auto ds = find_ds(j, p);
    hn::StoreU(p, df, scores + j);
    hn::StoreU(ds, df, grads + j);
  }
  for (; j < columns; j += lanes) {
    const auto mask = hn::FirstN(df, static_cast<std::size_t>(std::max<std::int64_t>(visible - j, 0)));
    const auto p = find_p(j);
    const auto ds = find_ds(j, p);
    hn::StoreU(hn::IfThenElseZero(mask, p), df, scores + j);
    hn::StoreU(hn::IfThenElseZero(mask, ds), df, grads + j);
  }
}

/// A chunk of queries and one kv head: find_terms, add_block for ascending blocks, write_query_grads.
class ChunkBackward {
 public:
  /// `scratch` is laid out by `layout`.
  HWY_ATTR ChunkBackward(const BackwardProblem& problem, const AttentionShape& shape, const BackwardLayout& layout,
                         const QueryChunk& chunk, std::int64_t kv_head, float* scratch)
      : problem_(problem),
        shape_(shape),
        sequence_(core::get_sequence(*problem.batch, chunk.sequence)),
        kv_head_(kv_head),
        rows_{sequence_.query_begin + chunk.begin, kv_head * shape.group_size, shape.group_size,
              (chunk.end - chunk.begin) * shape.group_size},
        key_stride_(padded_stride(shape.head_dim)),
        value_stride_(padded_stride(shape.value_dim)),
        block_stride_(padded_stride(shape.block_size)),
        key_rows_(problem.k, *problem.batch),
        value_rows_(problem.v, *problem.batch),
        terms_(reinterpret_cast<RowTerms*>(scratch + layout.terms)),
        totals_(reinterpret_cast<double*>(scratch + layout.totals)),
        query_grads_(scratch + layout.query_grads),
        keys_(scratch + layout.keys),
        keys_t_(scratch + layout.keys_t),
        values_t_(scratch + layout.values_t),
        queries_(scratch + layout.queries),
        out_grads_(scratch + layout.out_grads),
        scores_(scratch + layout.scores),
        grads_(scratch + layout.grads),
        lists_(*problem.batch, sequence_, problem.blocks, kv_head, shape.block_size, chunk.begin, chunk.end,
               reinterpret_cast<std::int32_t*>(scratch + layout.lists)) {
    std::fill(query_grads_, query_grads_ + rows_.count * shape.head_dim, 0.0f);
  }

  HWY_ATTR void find_terms() {
    find_row_terms(problem_.saved, rows_, terms_);
    if (problem_.q.dtype == DType::kFloat32) find_sums();
  }

  bool has_members(std::int64_t block) const { return block < lists_.blocks() && lists_.count(block) > 0; }

  /// Adds a block to the dq of its members, and what they give to its dk (unscaled) and dv to `part`, [block_size,
  /// head_dim] and [block_size, value_dim].
  HWY_ATTR void add_block(std::int64_t block, float* part) {
    const std::int32_t* members = lists_.members(block);
    const std::int64_t count = lists_.count(block);
    // Nothing behind the last member's position is read: it need not even hold a key.
    load_block(block * shape_.block_size, lists_.visible_keys(members[count - 1], block));
    const std::int64_t tile_queries = backward_tile_queries(shape_.group_size);
    for (std::int64_t t0 = 0; t0 < count; t0 += tile_queries) {
      add_tile(block, members + t0, std::min(tile_queries, count - t0), part);
    }
  }

  HWY_ATTR void write_query_grads() { store_query_grads(problem_.scale, rows_, query_grads_, problem_.grads.dq); }

  /// Writes dk and dv of a block from its sum, which is scaled.
  HWY_ATTR void write_key_grads(std::int64_t block, float* sum) {
    const std::int64_t begin = block * shape_.block_size;
    const std::int64_t keys = std::min(shape_.block_size, sequence_.keys - begin);
    const std::int64_t first = problem_.batch->cu_seqlens_k[static_cast<std::size_t>(sequence_.index)] + begin;
    float* value_sum = sum + shape_.block_size * shape_.head_dim;
    for (std::int64_t j = 0; j < keys; ++j) {
      scale_row(problem_.scale, shape_.head_dim, sum + j * shape_.head_dim);
      store_row(sum + j * shape_.head_dim, shape_.head_dim, problem_.grads.dk.dtype,
                head_row(problem_.grads.dk, first + j, kv_head_));
      store_row(value_sum + j * shape_.value_dim, shape_.value_dim, problem_.grads.dv.dtype,
                head_row(problem_.grads.dv, first + j, kv_head_));
    }
  }

 private:
  HWY_ATTR void load_block(std::int64_t begin, std::int64_t keys) {
    load_value_rows(key_rows_, problem_.k.dtype, sequence_.index, kv_head_, begin, keys, shape_.head_dim, keys_,
                    key_stride_);
    const std::int64_t columns = padded_columns(keys);
    transpose(keys_, key_stride_, keys, shape_.head_dim, keys_t_, block_stride_);
    if (columns != keys) {
      for (std::int64_t d = 0; d < shape_.head_dim; ++d) {
        std::fill(keys_t_ + d * block_stride_ + keys, keys_t_ + d * block_stride_ + columns, 0.0f);
      }
    }
    load_keys_transposed(value_rows_, problem_.v.dtype, sequence_.index, kv_head_, begin, keys, shape_.value_dim,
                         values_t_, block_stride_);
  }

  // The rounding of a float32 lse moves all probabilities of a row together by as much as the scores' rounding moves
  // each: too much for float32 tensors, whose sums would average the latter away, and nothing for narrower ones. So
  // there the maximum and the sum of the exponentials are found once more, for one product in six.
  HWY_ATTR void find_sums() {
    std::fill(totals_, totals_ + rows_.count, 0.0);
    for (std::int64_t r = 0; r < rows_.count; ++r) terms_[r].shift = kNegativeInfinity;
    const std::int64_t tile_queries = backward_tile_queries(shape_.group_size);
    for (std::int64_t block = 0; block < lists_.blocks(); ++block) {
      const std::int64_t count = lists_.count(block);
      if (count == 0) continue;
      const std::int32_t* members = lists_.members(block);
      const std::int64_t keys = lists_.visible_keys(members[count - 1], block);
      load_keys_transposed(key_rows_, problem_.k.dtype, sequence_.index, kv_head_, block * shape_.block_size, keys,
                           shape_.head_dim, keys_t_, block_stride_);
      for (std::int64_t t0 = 0; t0 < count; t0 += tile_queries) {
        add_sums(block, keys, members + t0, std::min(tile_queries, count - t0));
      }
    }
    for (std::int64_t r = 0; r < rows_.count; ++r) {
      terms_[r].shift = softmax_shift(terms_[r].shift);
      terms_[r].weight = static_cast<float>(1.0 / totals_[r]);
    }
  }

  HWY_ATTR void add_sums(std::int64_t block, std::int64_t keys, const std::int32_t* members, std::int64_t count) {
    const std::int64_t group_size = shape_.group_size;
    for (std::int64_t t = 0; t < count; ++t) {
      for (std::int64_t h = 0; h < group_size; ++h) {
        load_row(head_row(problem_.q, rows_.first_row + members[t], rows_.first_head + h), problem_.q.dtype,
                 shape_.head_dim, queries_ + (t * group_size + h) * key_stride_);
      }
    }
    product(count * group_size, padded_columns(keys), shape_.head_dim, queries_, key_stride_, 1, keys_t_, block_stride_,
            scores_, block_stride_, Sums::kReplace);
    for (std::int64_t r = 0; r < count * group_size; ++r) {
      const std::int64_t i = members[r / group_size];
      const std::int64_t visible = lists_.visible_keys(i, block);
      float* row = scores_ + r * block_stride_;
      float& largest = terms_[i * group_size + r % group_size].shift;
      double& total = totals_[i * group_size + r % group_size];
      const float here = scale_and_max(row, visible, problem_.scale);
      const float top = here > largest ? here : largest;
      const float sum = exp_and_sum(row, visible, softmax_shift(here));
      // e^(-inf) = 0 takes nothing along from before the first block.
      total = total * static_cast<double>(exp_one(largest - softmax_shift(top))) +
              static_cast<double>(sum) * static_cast<double>(exp_one(softmax_shift(here) - softmax_shift(top)));
      largest = top;
    }
  }

  HWY_ATTR void load_tile(const std::int32_t* members, std::int64_t count) {
    for (std::int64_t t = 0; t < count; ++t) {
      const std::int64_t row = rows_.first_row + members[t];
      for (std::int64_t h = 0; h < shape_.group_size; ++h) {
        const std::int64_t r = t * shape_.group_size + h;
        load_row(head_row(problem_.q, row, rows_.first_head + h), problem_.q.dtype, shape_.head_dim,
                 queries_ + r * key_stride_);
        load_row(head_row(problem_.saved.dout, row, rows_.first_head + h), problem_.saved.dout.dtype, shape_.value_dim,
                 out_grads_ + r * value_stride_);
      }
    }
  }

  HWY_ATTR void add_tile(std::int64_t block, const std::int32_t* members, std::int64_t count, float* part) {
    const std::int64_t rows = count * shape_.group_size;
    const std::int64_t least = lists_.visible_keys(members[0], block);
    const std::int64_t most = lists_.visible_keys(members[count - 1], block);
    const std::int64_t columns = padded_columns(most);
    load_tile(members, count);
    product(rows, columns, shape_.head_dim, queries_, key_stride_, 1, keys_t_, block_stride_, scores_, block_stride_,
            Sums::kReplace);
    product(rows, columns, shape_.value_dim, out_grads_, value_stride_, 1, values_t_, block_stride_, grads_,
            block_stride_, Sums::kReplace);
    for (std::int64_t t = 0; t < count; ++t) {
      const std::int64_t visible = lists_.visible_keys(members[t], block);
      for (std::int64_t h = 0; h < shape_.group_size; ++h) {
        const std::int64_t r = t * shape_.group_size + h;
        differentiate_row(visible, columns, problem_.scale, terms_[members[t] * shape_.group_size + h],
                          scores_ + r * block_stride_, grads_ + r * block_stride_);
      }
    }
    // Keys that a row does not see have P = dS = 0, which is as good as leaving them out, but for a 0 times infinity or
    // NaN of somebody else's.
    if (least == most || (are_finite(keys_, key_stride_, most, shape_.head_dim) &&
                          are_finite(queries_, key_stride_, rows, shape_.head_dim) &&
                          are_finite(out_grads_, value_stride_, rows, shape_.value_dim))) {
      add_query_grads(members, 0, count, most);
      add_key_grads(0, most, 0, rows, part);
      return;
    }
    for (std::int64_t t = 0; t < count; ++t) {
      add_query_grads(members, t, t + 1, lists_.visible_keys(members[t], block));
    }
    for (std::int64_t j = 0, t = 0; j < most; ++j) {
      while (lists_.visible_keys(members[t], block) <= j) ++t;
      add_key_grads(j, j + 1, t * shape_.group_size, rows, part);
    }
  }

  // The tile's queries [begin, end) and the block's first `visible` keys.
  HWY_ATTR void add_query_grads(const std::int32_t* members, std::int64_t begin, std::int64_t end,
                                std::int64_t visible) {
    float* grads[kScoreRows];
    const std::int64_t last = end * shape_.group_size;
    for (std::int64_t first = begin * shape_.group_size; first < last; first += kScoreRows) {
      const std::int64_t rows = std::min(kScoreRows, last - first);
      std::int64_t t = first / shape_.group_size;
      std::int64_t h = first % shape_.group_size;
      for (std::int64_t r = 0; r < rows; ++r) {
        grads[r] = query_grads_ + (members[t] * shape_.group_size + h) * shape_.head_dim;
        if (++h == shape_.group_size) {
          h = 0;
          ++t;
        }
      }
      product_of_rows(rows, shape_.head_dim, visible,
                      StridedRows<const float>{grads_ + first * block_stride_, block_stride_}, 1, keys_, key_stride_,
                      grads, Sums::kAdd);
    }
  }

  // The block's keys [begin, end) and the tile's rows [first, last). Chains of 32 rows: one over a whole tile would
  // lose more digits than a plain matrix product.
  HWY_ATTR void add_key_grads(std::int64_t begin, std::int64_t end, std::int64_t first, std::int64_t last,
                              float* part) {
    const std::int64_t chain = std::max<std::int64_t>(1, 32 / shape_.group_size) * shape_.group_size;
    const std::int64_t head_dim = shape_.head_dim;
    const std::int64_t value_dim = shape_.value_dim;
    float* value_part = part + shape_.block_size * head_dim;
    for (std::int64_t next = 0; first < last; first = next) {
      next = std::min(last, (first / chain + 1) * chain);
      const std::int64_t from = first * block_stride_ + begin;
      product_of_rows(end - begin, head_dim, next - first, StridedRows<const float>{grads_ + from, 1}, block_stride_,
                      queries_ + first * key_stride_, key_stride_,
                      StridedRows<float>{part + begin * head_dim, head_dim}, Sums::kAdd);
      product_of_rows(end - begin, value_dim, next - first, StridedRows<const float>{scores_ + from, 1}, block_stride_,
                      out_grads_ + first * value_stride_, value_stride_,
                      StridedRows<float>{value_part + begin * value_dim, value_dim}, Sums::kAdd);
    }
  }

  const BackwardProblem& problem_;
  const AttentionShape& shape_;
  core::Sequence sequence_;
  std::int64_t kv_head_;
  ChunkRows rows_;
  std::int64_t key_stride_;
  std::int64_t value_stride_;
  std::int64_t block_stride_;
  core::KeyRows key_rows_;
  core::KeyRows value_rows_;
  RowTerms* terms_;
  double* totals_;
  float* query_grads_;
  float* keys_;
  float* keys_t_;
  float* values_t_;
  float* queries_;
  float* out_grads_;
  float* scores_;
  float* grads_;
  BlockLists lists_;
};

template <class Chunk>
HWY_ATTR void run_backward_task_with(const BackwardProblem& problem, const AttentionShape& shape,
                                     const BackwardLayout& layout, const BackwardTask& task, std::int64_t index,
                                     std::int64_t kv_head, TaskOrder& order, float* sums, float* scratch) {
  Chunk chunk(problem, shape, layout, task.chunk, kv_head, scratch);
  chunk.find_terms();
  const std::int64_t floats = shape.block_size * (shape.head_dim + shape.value_dim);
  for (std::int64_t block = 0; block < task.blocks; ++block) {
    const bool is_first = task.previous < 0;
    const bool is_last = block >= task.last_begin;
    float* sum = is_first && is_last ? nullptr : sums + (task.sum_begin + block) * floats;
    float* part = is_first && !is_last ? sum : scratch + layout.part;
    std::fill(part, part + floats, 0.0f);
    if (chunk.has_members(block)) chunk.add_block(block, part);
    if (!is_first) {
      order.wait_for(task.previous, block);
      add_row(is_last ? sum : part, floats, is_last ? part : sum);
    }
    if (is_last) chunk.write_key_grads(block, part);
    order.finish(index, block + 1);
  }
  chunk.write_query_grads();
}

/// Task `index`: dq of its rows, and its share of dk and dv. `sums` are those of all tasks, block_size * (head_dim +
/// value_dim) floats a block.
inline HWY_ATTR void run_backward_task(const BackwardProblem& problem, const AttentionShape& shape,
                                       const BackwardLayout& layout, const BackwardTask& task, std::int64_t index,
                                       std::int64_t kv_head, TaskOrder& order, float* sums, float* scratch) {
#if HWY_TARGET == HWY_AVX3
  if (problem.multiply_bf16 != nullptr) {
    std::optional<AmxTiles> tiles;
    if (problem.needs_amx_tiles) tiles.emplace();
    run_backward_task_with<Bf16ChunkBackward>(problem, shape, layout, task, index, kv_head, order, sums, scratch);
    return;
  }
#endif
  run_backward_task_with<ChunkBackward>(problem, shape, layout, task, index, kv_head, order, sums, scratch);
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_ATTENTION_BACKWARD_INL_H_
