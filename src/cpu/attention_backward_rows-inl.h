// SPDX-License-Identifier: Apache-2.0
// What both kinds of attention's backward do a row at a time, before and after the blocks: the terms of a row from what
// the forward saved, and its dq as it leaves. Tested through the operators.
#if defined(MSA_CPU_ATTENTION_BACKWARD_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_ATTENTION_BACKWARD_ROWS_INL_H_
#undef MSA_CPU_ATTENTION_BACKWARD_ROWS_INL_H_
#else
#define MSA_CPU_ATTENTION_BACKWARD_ROWS_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "msa/attention.h"
#include "msa/select_blocks.h"
#include "src/cpu/attention_backward_problem.h"
#include "src/cpu/row_ops-inl.h"
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// Rows of a chunk and a group, query by query: row r is head first_head + r % group_size of tensor row first_row +
/// r / group_size.
struct ChunkRows {
  std::int64_t first_row;
  std::int64_t first_head;
  std::int64_t group_size;
  std::int64_t count;
  std::int64_t row(std::int64_t r) const { return first_row + r / group_size; }
  std::int64_t head(std::int64_t r) const { return first_head + r % group_size; }
};

inline HWY_ATTR void find_row_terms(const AttentionSaved& saved, const ChunkRows& rows, RowTerms* terms) {
  const hn::FixedTag<float, 4> d4;
  alignas(64) float four[4 * kMaxHeadDim] = {};
  alignas(64) float out[4 * kMaxHeadDim];
  alignas(64) float out_grads[4 * kMaxHeadDim];
  alignas(16) float means[4];
  const std::int64_t dim = saved.out.size(2);
  for (std::int64_t first = 0; first < rows.count; first += 4) {
    const std::int64_t n = std::min<std::int64_t>(4, rows.count - first);
    const auto load_transposed = [&](const ConstTensorView& tensor, float* to) HWY_ATTR {
      for (std::int64_t r = 0; r < n; ++r) {
        load_row(head_row(tensor, rows.row(first + r), rows.head(first + r)), tensor.dtype, dim, four + r * dim);
      }
      transpose(four, dim, 4, dim, to, 4);
    };
    load_transposed(saved.out, out);
    load_transposed(saved.dout, out_grads);
    // The chain of roundings of `product`: where out is a value, of an only key, this is dP to the last bit.
    auto sum = hn::Zero(d4);
    for (std::int64_t d = 0; d < dim; ++d) {
      sum = hn::MulAdd(hn::Load(d4, out_grads + 4 * d), hn::Load(d4, out + 4 * d), sum);
    }
    hn::Store(sum, d4, means);
    for (std::int64_t r = 0; r < n; ++r) {
      const std::int64_t row = rows.row(first + r);
      const std::int64_t head = rows.head(first + r);
      terms[first + r] = {.shift = read_float(saved.lse, row, head),
                          .weight = 1.0f,
                          .mean = means[r],
                          .lse_grad = saved.dlse.empty() ? 0.0f : read_float(saved.dlse, row, head)};
    }
  }
}

/// Writes dq of the rows from its sums, which are scaled.
inline HWY_ATTR void store_query_grads(float scale, const ChunkRows& rows, float* sums, const TensorView& dq) {
  const std::int64_t dim = dq.size(2);
  for (std::int64_t r = 0; r < rows.count; ++r) {
    scale_row(scale, dim, sums + r * dim);
    store_row(sums + r * dim, dim, dq.dtype, head_row(dq, rows.row(r), rows.head(r)));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_ATTENTION_BACKWARD_ROWS_INL_H_
