// SPDX-License-Identifier: Apache-2.0
// Backward of sparse and dense attention in two passes over (query, block) pairs, both recomputing the probabilities from
// lse: a query pass (a task owns queries and walks their blocks: dq) and a key pass (a task owns a key block and walks the
// queries that chose it: dk, dv). No task writes what another one reads, so there are no atomics, and every sum runs in
// an order that the row's or the block's own list fixes. Tested in tests/unit/sparse_attention_test.cc and
// dense_attention_test.cc.
//
// With P = e^(scale S - lse), S = Q K^T, and dP = dO V^T:  dS = P (dP - rowsum(dO O) + dlse),
// dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO. A float's lse is off by up to 2^-24 |lse|, and with it a whole row of
// P: the query pass sums each row, and both passes divide by the sum.
#if defined(MSA_CPU_ATTENTION_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_ATTENTION_BACKWARD_INL_H_
#undef MSA_CPU_ATTENTION_BACKWARD_INL_H_
#else
#define MSA_CPU_ATTENTION_BACKWARD_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <limits>

#include "msa/attention.h"
#include "src/core/layout.h"
#include "src/cpu/attention_backward_plan.h"
#include "src/cpu/attention_backward_problem.h"
#include "src/cpu/block_walk.h"
#include "src/cpu/key_tile-inl.h"
#include "src/cpu/row_ops-inl.h"
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// scores = weight P and grads = weight dS, from S and dP; `term` is dlse - rowsum(dO O). Columns that the row does not see
/// get meaningless values: nobody reads them.
inline HWY_ATTR void differentiate_row(std::int64_t columns, float scale, float lse, float term, float weight,
                                       float* HWY_RESTRICT scores, float* HWY_RESTRICT grads) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto factor = hn::Set(df, scale);
  const auto shift = hn::Set(df, lse);
  const auto offset = hn::Set(df, term);
  const auto w = hn::Set(df, weight);
  for (std::int64_t j = 0; j < columns; j += lanes) {
    const auto p = hn::Mul(exp_lanes(hn::MulSub(hn::LoadU(df, scores + j), factor, shift)), w);
    hn::StoreU(p, df, scores + j);
    hn::StoreU(hn::Mul(p, hn::Add(hn::LoadU(df, grads + j), offset)), df, grads + j);
  }
}

/// Sum of row[0, count).
inline HWY_ATTR float sum_row(const float* HWY_RESTRICT row, std::int64_t count) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  auto sum = hn::Zero(df);
  std::int64_t j = 0;
  for (; j + lanes <= count; j += lanes) sum = hn::Add(sum, hn::LoadU(df, row + j));
  if (j < count) {
    const auto mask = hn::FirstN(df, static_cast<std::size_t>(count - j));
    sum = hn::Add(sum, hn::IfThenElseZero(mask, hn::LoadU(df, row + j)));
  }
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

/// dlse - rowsum(dO O) of the rows of a chunk and group, into terms[row * query_heads + head]; `out_grads` holds their dO.
inline HWY_ATTR void write_terms(const BackwardProblem& problem, std::int64_t first_row, std::int64_t count,
                                 std::int64_t first_head, std::int64_t group_size, const float* out_grads,
                                 RowTerms* terms) {
  const std::int64_t value_dim = problem.v.size(2);
  const std::int64_t query_heads = problem.q.size(1);
  alignas(64) float out[kMaxHeadDim];
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t h = 0; h < group_size; ++h) {
      const std::int64_t row = first_row + i;
      const std::int64_t head = first_head + h;
      load_row(head_row(problem.saved.out, row, head), problem.saved.out.dtype, value_dim, out);
      const float delta = dot_rows(out_grads + (i * group_size + h) * value_dim, out, value_dim);
      const float dlse = problem.saved.dlse.empty() ? 0.0f : read_float(problem.saved.dlse, row, head);
      terms[row * query_heads + head].offset = dlse - delta;
    }
  }
}

/// One task of the query pass: terms and dq of the rows of a chunk and group. `scratch` is laid out by `layout`.
inline HWY_ATTR void run_query_pass(const BackwardProblem& problem, const AttentionShape& shape,
                                    const QueryPassLayout& layout, const QueryChunk& chunk, std::int64_t kv_head,
                                    float* scratch, RowTerms* terms) {
  const core::Sequence sequence = core::get_sequence(*problem.batch, chunk.sequence);
  const std::int64_t group_size = shape.group_size;
  const std::int64_t head_dim = shape.head_dim;
  const std::int64_t value_dim = shape.value_dim;
  const std::int64_t count = chunk.end - chunk.begin;
  const std::int64_t first_row = sequence.query_begin + chunk.begin;
  const std::int64_t first_head = kv_head * group_size;
  const std::int64_t query_heads = problem.q.size(1);
  const std::int64_t key_stride = padded_stride(head_dim);
  const std::int64_t tile_stride = padded_stride(shape.block_size);
  const std::int64_t tile_queries = backward_tile_queries(group_size);
  float* queries = scratch + layout.queries;
  float* out_grads = scratch + layout.out_grads;
  float* query_grads = scratch + layout.query_grads;
  float* keys = scratch + layout.keys;
  float* keys_t = scratch + layout.keys_t;
  float* values_t = scratch + layout.values_t;
  float* scores = scratch + layout.scores;
  float* grads = scratch + layout.grads;
  float* sums = scratch + layout.sums;
  auto* totals = reinterpret_cast<double*>(scratch + layout.totals);

  load_query_rows(problem.q, first_row, count, first_head, group_size, queries);
  load_query_rows(problem.saved.dout, first_row, count, first_head, group_size, out_grads);
  write_terms(problem, first_row, count, first_head, group_size, out_grads, terms);
  std::fill(query_grads, query_grads + count * group_size * head_dim, 0.0f);
  std::fill(totals, totals + count * group_size, 0.0);

  const core::KeyRows key_rows(problem.k, *problem.batch);
  const core::KeyRows value_rows(problem.v, *problem.batch);
  BlockWalk walk(*problem.batch, sequence, problem.blocks, kv_head, shape.block_size, chunk.begin, chunk.end,
                 reinterpret_cast<std::int32_t*>(scratch + layout.walk));
  const float* query_of[kScoreRows];
  const float* out_grad_of[kScoreRows];
  while (walk.next()) {
    const std::int64_t block_begin = walk.block() * shape.block_size;
    const std::int64_t block_keys = walk.block_keys();
    const std::int64_t columns = padded_columns(block_keys);
    load_value_rows(key_rows, problem.k.dtype, chunk.sequence, kv_head, block_begin, block_keys, head_dim, keys,
                    key_stride);
    transpose_keys(keys, key_stride, block_keys, head_dim, keys_t, tile_stride);
    load_keys_transposed(value_rows, problem.v.dtype, chunk.sequence, kv_head, block_begin, block_keys, value_dim,
                         values_t, tile_stride);
    for (std::int64_t t0 = 0; t0 < walk.count(); t0 += tile_queries) {
      const std::int32_t* members = walk.members() + t0;
      const std::int64_t members_here = std::min(tile_queries, walk.count() - t0);
      const std::int64_t heads_at_once = std::min(group_size, kScoreRows);  // less than group_size only in giant groups
      for (std::int64_t h0 = 0; h0 < group_size; h0 += heads_at_once) {
        const std::int64_t heads = std::min(heads_at_once, group_size - h0);
        const std::int64_t rows = members_here * heads;
        for (std::int64_t r = 0; r < rows; ++r) {
          const std::int64_t row = members[r / heads] * group_size + h0 + r % heads;
          query_of[r] = queries + row * head_dim;
          out_grad_of[r] = out_grads + row * value_dim;
        }
        const StridedRows<float> score_of{scores, tile_stride};
        const StridedRows<float> grad_of{grads, tile_stride};
        product_of_rows(rows, columns, head_dim, query_of, 1, keys_t, tile_stride, score_of, false);
        product_of_rows(rows, columns, value_dim, out_grad_of, 1, values_t, tile_stride, grad_of, false);
        for (std::int64_t r = 0; r < rows; ++r) {
          const std::int64_t i = members[r / heads];
          const std::int64_t head = first_head + h0 + r % heads;
          differentiate_row(columns, problem.scale, read_float(problem.saved.lse, first_row + i, head),
                            terms[(first_row + i) * query_heads + head].offset, 1.0f, score_of[r], grad_of[r]);
          totals[i * group_size + h0 + r % heads] += static_cast<double>(sum_row(score_of[r], walk.visible_keys(i)));
        }
        // Queries inside the block come first and see a part of it: exactly that part, for 0 times an unseen NaN is NaN.
        std::int64_t t = 0;
        for (; t < members_here && walk.visible_keys(members[t]) < block_keys; ++t) {
          product(heads, head_dim, walk.visible_keys(members[t]), grad_of[t * heads], tile_stride, 1, keys, key_stride,
                  sums + t * heads * head_dim, head_dim, false);
        }
        product((members_here - t) * heads, head_dim, block_keys, grad_of[t * heads], tile_stride, 1, keys, key_stride,
                sums + t * heads * head_dim, head_dim, false);
        for (std::int64_t r = 0; r < rows; ++r) {
          add_row(sums + r * head_dim, head_dim,
                  query_grads + (members[r / heads] * group_size + h0 + r % heads) * head_dim);
        }
      }
    }
  }
  for (std::int64_t r = 0; r < count * group_size; ++r) {
    const std::int64_t row = first_row + r / group_size;
    const std::int64_t head = first_head + r % group_size;
    float* grad = query_grads + r * head_dim;
    const bool has_blocks = read_float(problem.saved.lse, row, head) != -std::numeric_limits<float>::infinity();
    const float weight = has_blocks ? static_cast<float>(1.0 / totals[r]) : 1.0f;
    terms[row * query_heads + head].weight = weight;
    scale_row(problem.scale * weight, head_dim, grad);
    store_row(grad, head_dim, problem.grads.dq.dtype, head_row(problem.grads.dq, row, head));
  }
}

// Adds what queries [begin, end) of a block's list give to its dk (unscaled) and dv, in `split`.
inline HWY_ATTR void sum_split(const BackwardProblem& problem, const AttentionShape& shape, const KeyPassLayout& layout,
                               const core::Sequence& sequence, const KeyTask& task, const QueryList& list,
                               std::int64_t begin, std::int64_t end, const RowTerms* terms, float* scratch, float* split) {
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
  // One chain of roundings for 8 tiles, then a sum of such chains: long lists lose fewer digits than in a single chain.
  constexpr std::int64_t kTilesPerPart = 8;
  for (std::int64_t p0 = begin; p0 < end; p0 += kTilesPerPart * tile_queries) {
    const std::int64_t p1 = std::min(end, p0 + kTilesPerPart * tile_queries);
    std::fill(key_part, key_part + part_floats, 0.0f);
    for (std::int64_t t0 = p0; t0 < p1; t0 += tile_queries) {
      const std::int64_t members = std::min(tile_queries, p1 - t0);
      const std::int64_t rows = members * group_size;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t row = sequence.query_begin + list.query(t0 + r / group_size);
        const std::int64_t head = first_head + r % group_size;
        load_row(head_row(problem.q, row, head), problem.q.dtype, head_dim, queries + r * query_stride);
        load_row(head_row(problem.saved.dout, row, head), problem.saved.dout.dtype, value_dim,
                 out_grads + r * out_grad_stride);
      }
      product(rows, columns, head_dim, queries, query_stride, 1, keys_t, tile_stride, scores, tile_stride, false);
      product(rows, columns, value_dim, out_grads, out_grad_stride, 1, values_t, tile_stride, grads, tile_stride,
              false);
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t row = sequence.query_begin + list.query(t0 + r / group_size);
        const std::int64_t head = first_head + r % group_size;
        const RowTerms& row_terms = terms[row * query_heads + head];
        differentiate_row(columns, problem.scale, read_float(problem.saved.lse, row, head), row_terms.offset,
                          row_terms.weight, scores + r * tile_stride, grads + r * tile_stride);
      }
      // As in the query pass: queries inside the block reach exactly the keys they see.
      const auto add_rows = [&](std::int64_t first, std::int64_t count, std::int64_t visible) HWY_ATTR {
        product(visible, head_dim, count, grads + first * tile_stride, 1, tile_stride, queries + first * query_stride,
                query_stride, key_part, head_dim, true);
        product(visible, value_dim, count, scores + first * tile_stride, 1, tile_stride,
                out_grads + first * out_grad_stride, out_grad_stride, value_part, value_dim, true);
      };
      std::int64_t t = 0;
      for (; t < members; ++t) {
        const std::int64_t visible =
            core::query_position(*problem.batch, sequence, list.query(t0 + t)) + 1 - block_begin;
        if (visible >= block_keys) break;
        add_rows(t * group_size, group_size, visible);
      }
      if (t < members) add_rows(t * group_size, (members - t) * group_size, block_keys);
    }
    add_row(key_part, part_floats, split);
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

/// One task of the key pass: queries [task.begin, task.end) of the block's list, split by split. A task that is only a part
/// of the block leaves its sum in task.sum; otherwise it writes dk and dv.
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
