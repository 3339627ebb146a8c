// SPDX-License-Identifier: Apache-2.0
// The forward of the main branch for a chunk of queries and one kv head, shared by sparse and dense attention: blocks
// are visited in ascending order, each loaded once for all rows of the chunk that take part, with a running softmax a
// row (maximum, sum of exponentials, weighted sum of values). A row sees its own blocks in the same order whatever the
// chunk, so its result does not depend on how the work was cut. Tested in tests/unit/sparse_attention_test.cc and
// dense_attention_test.cc.
#if defined(MSA_CPU_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_ATTENTION_INL_H_
#undef MSA_CPU_ATTENTION_INL_H_
#else
#define MSA_CPU_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "msa/tensor.h"
#include "src/core/layout.h"
#include "src/cpu/attention.h"
#include "src/cpu/key_tile-inl.h"
#include "src/cpu/plan.h"
#include "src/cpu/softmax-inl.h"
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// row[0, count) *= factor
inline HWY_ATTR void scale_row(float* HWY_RESTRICT row, std::int64_t count, float factor) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto f = hn::Set(df, factor);
  for (std::int64_t j = 0; j < count; j += lanes) hn::StoreU(hn::Mul(hn::LoadU(df, row + j), f), df, row + j);
}

/// The rows of a chunk and one kv head with their running softmax: what stays from block to block, whatever the
/// arithmetic.
class ChunkState {
 public:
  HWY_ATTR ChunkState(const AttentionInput& input, const QueryChunk& chunk, std::int64_t kv_head, float* scratch)
      : input_(input),
        sequence_(core::get_sequence(input.batch, chunk.sequence)),
        begin_(chunk.begin),
        count_(chunk.end - chunk.begin),
        kv_head_(kv_head),
        key_rows_(input.k, input.batch),
        value_rows_(input.v, input.batch),
        sums_(scratch + input.layout.sums),
        largest_(scratch + input.layout.largest),
        totals_(scratch + input.layout.totals),
        members_(reinterpret_cast<std::int32_t*>(scratch + input.layout.members)),
        seen_(reinterpret_cast<std::int32_t*>(scratch + input.layout.seen)) {
    const std::int64_t rows = count_ * input.shape.group_size;
    std::fill(sums_, sums_ + rows * input.shape.value_dim, 0.0f);
    std::fill(largest_, largest_ + rows, kNegativeInfinity);
    std::fill(totals_, totals_ + rows, 0.0f);
    std::fill(seen_, seen_ + count_, 0);
  }

  std::int64_t count() const { return count_; }
  std::int64_t first_row() const { return sequence_.query_begin + begin_; }
  std::int64_t position_of(std::int64_t i) const { return core::query_position(input_.batch, sequence_, begin_ + i); }
  /// The caller fills members()[0, n) with the queries of the chunk, ascending, that take part in a block.
  std::int32_t* members() { return members_; }

  /// Divides, rounds and writes out and lse.
  HWY_ATTR void write() {
    for (std::int64_t r = 0; r < count_ * input_.shape.group_size; ++r) {
      write_row(r, sums_ + r * input_.shape.value_dim, static_cast<double>(largest_[r]));
    }
  }

 protected:
  /// Row r of the chunk from its sums, which it overwrites, and what they are relative to.
  HWY_ATTR void write_row(std::int64_t r, float* sum, double largest) {
    const AttentionShape& shape = input_.shape;
    const auto out_bytes = static_cast<std::int64_t>(dtype_size(input_.out.dtype));
    auto* lse = reinterpret_cast<float*>(input_.lse.data);
    const std::int64_t row = first_row() + r / shape.group_size;
    const std::int64_t head = kv_head_ * shape.group_size + r % shape.group_size;
    float row_lse = kNegativeInfinity;
    if (seen_[r / shape.group_size] != 0) {  // else no block: out 0, lse -inf
      const float total = totals_[r];
      divide_row(sum, shape.value_dim, total);
      // Scores that are all -inf have no softmax: 0 / 0 above, and no lse.
      row_lse = total == 0 ? std::numeric_limits<float>::quiet_NaN()
                           : static_cast<float>(largest + std::log(static_cast<double>(total)));
    }
    store_row(sum, shape.value_dim, input_.out.dtype,
              input_.out.data + (row * input_.out.stride(0) + head * input_.out.stride(1)) * out_bytes);
    if (lse != nullptr) lse[row * input_.lse.stride(0) + head * input_.lse.stride(1)] = row_lse;
  }

  /// The keys of a block that members()[0, n) see.
  void start_block(std::int64_t block, std::int64_t n) {
    block_begin_ = block * input_.shape.block_size;
    // Nothing behind the last member's position is read: it need not even hold a key.
    block_keys_ = std::min(input_.shape.block_size, position_of(members_[n - 1]) + 1 - block_begin_);
  }
  /// Keys of the block that query i sees.
  std::int64_t visible_keys(std::int64_t i) const { return std::min(block_keys_, position_of(i) + 1 - block_begin_); }
  /// The query of row `row` of the members' rows, and which row of the chunk that is.
  std::int64_t query_of(std::int64_t row) const { return members_[row / input_.shape.group_size]; }
  std::int64_t index_of(std::int64_t row) const {
    return query_of(row) * input_.shape.group_size + row % input_.shape.group_size;
  }

  const AttentionInput& input_;
  core::Sequence sequence_;
  std::int64_t begin_;
  std::int64_t count_;
  std::int64_t kv_head_;
  core::KeyRows key_rows_;
  core::KeyRows value_rows_;
  float* sums_;
  float* largest_;
  float* totals_;
  std::int32_t* members_;
  std::int32_t* seen_;
  std::int64_t block_begin_ = 0;
  std::int64_t block_keys_ = 0;

 private:
  static HWY_ATTR void divide_row(float* HWY_RESTRICT row, std::int64_t count, float divisor) {
    const FloatTag df;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
    const auto d = hn::Set(df, divisor);
    for (std::int64_t j = 0; j < count; j += lanes) hn::StoreU(hn::Div(hn::LoadU(df, row + j), d), df, row + j);
  }
};

/// A chunk in progress: begin, add_block for ascending blocks, write.
class ChunkAttention : public ChunkState {
 public:
  /// `scratch` is laid out by input.layout.
  HWY_ATTR ChunkAttention(const AttentionInput& input, const QueryChunk& chunk, std::int64_t kv_head, float* scratch)
      : ChunkState(input, chunk, kv_head, scratch),
        queries_(scratch + input.layout.queries),
        keys_(scratch + input.layout.keys),
        values_(scratch + input.layout.values),
        scores_(scratch + input.layout.scores) {
    const std::int64_t group_size = input.shape.group_size;
    load_query_rows(input.q, first_row(), count_, kv_head * group_size, group_size, queries_);
  }

  /// Adds block `block` to the rows of members()[0, n). What block follows makes no difference here.
  HWY_ATTR void add_block(std::int64_t block, std::int64_t n, const NextBlock& /*next*/) {
    if (n == 0) return;
    load_keys(block, n);
    load_values(n);
    for_rows(n, [&](std::int64_t first, std::int64_t rows) HWY_ATTR {
      score_rows(first, rows, scores_);
      weigh_rows(first, rows);
    });
  }

  /// add_block in two halves, by two chunks of the same queries: the first writes split_score_floats of scores, the
  /// second reads them. The second's values may be a slice of the dimensions.
  HWY_ATTR void score_block(std::int64_t block, std::int64_t n, float* scores) {
    load_keys(block, n);
    for_rows(n, [&](std::int64_t first, std::int64_t rows)
                    HWY_ATTR { score_rows(first, rows, scores + first * padded_stride(input_.shape.block_size)); });
  }
  HWY_ATTR void weigh_block(std::int64_t block, std::int64_t n, const float* scores) {
    start_block(block, n);
    load_values(n);
    const std::int64_t stride = padded_stride(input_.shape.block_size);
    for_rows(n, [&](std::int64_t first, std::int64_t rows) HWY_ATTR {
      std::copy(scores + first * stride, scores + (first + rows) * stride, scores_);  // they become probabilities
      weigh_rows(first, rows);
    });
  }

 private:
  HWY_ATTR void load_keys(std::int64_t block, std::int64_t n) {
    start_block(block, n);
    load_keys_transposed(key_rows_, input_.k.dtype, sequence_.index, kv_head_, block_begin_, block_keys_,
                         input_.shape.head_dim, keys_, padded_stride(input_.shape.block_size));
  }
  HWY_ATTR void load_values(std::int64_t n) {
    load_value_rows(value_rows_, input_.v.dtype, sequence_.index, kv_head_, block_begin_, block_keys_,
                    input_.shape.value_dim, values_, padded_stride(input_.shape.value_dim));
    for (std::int64_t m = 0; m < n; ++m) seen_[members_[m]] = 1;
  }

  /// Calls body(first, rows) for the members' rows, kScoreRows at a time.
  template <class Body>
  HWY_ATTR void for_rows(std::int64_t n, const Body& body) {
    const std::int64_t rows = n * input_.shape.group_size;
    for (std::int64_t r = 0; r < rows; r += kScoreRows) body(r, std::min(kScoreRows, rows - r));
  }
  // Rows [first, first + rows) of the members' rows.
  HWY_ATTR void score_rows(std::int64_t first, std::int64_t rows, float* scores) {
    const AttentionShape& shape = input_.shape;
    const std::int64_t score_stride = padded_stride(shape.block_size);
    const float* row_queries[kScoreRows];
    for (std::int64_t r = 0; r < rows; ++r) row_queries[r] = queries_ + index_of(first + r) * shape.head_dim;
    product_of_rows(rows, padded_columns(block_keys_), shape.head_dim, row_queries, 1, keys_, score_stride,
                    StridedRows<float>{scores, score_stride}, Sums::kReplace);
  }

  // The same rows, whose scores are in scores_.
  HWY_ATTR void weigh_rows(std::int64_t first, std::int64_t rows) {
    const AttentionShape& shape = input_.shape;
    const std::int64_t score_stride = padded_stride(shape.block_size);
    float* row_sums[kScoreRows];
    std::int64_t row_visible[kScoreRows];
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t index = index_of(first + r);
      row_sums[r] = sums_ + index * shape.value_dim;
      row_visible[r] = visible_keys(query_of(first + r));
      float* row = scores_ + r * score_stride;
      float& largest = largest_[index];
      float& total = totals_[index];
      const float before = largest;
      largest = std::max(before, scale_and_max(row, row_visible[r], input_.scale));
      const float shift = softmax_shift(largest);
      if (largest != before) {  // what was summed so far was relative to the old maximum
        const float factor = exp_one(before - shift);
        total *= factor;
        scale_row(row_sums[r], shape.value_dim, factor);
      }
      total += exp_and_sum(row, row_visible[r], shift);
    }
    // A row must not touch values it does not see, 0 * NaN being NaN: rows go together that see equally many.
    for (std::int64_t r = 0; r < rows;) {
      std::int64_t end = r + 1;
      while (end < rows && row_visible[end] == row_visible[r]) ++end;
      product_of_rows(end - r, shape.value_dim, row_visible[r],
                      StridedRows<const float>{scores_ + r * score_stride, score_stride}, 1, values_,
                      padded_stride(shape.value_dim), row_sums + r, Sums::kContinue);
      r = end;
    }
  }

  float* queries_;
  float* keys_;
  float* values_;
  float* scores_;
};

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_ATTENTION_INL_H_
