// SPDX-License-Identifier: Apache-2.0
// One input for all operators: a geometry, the lengths of the sequences, and random tensors; and the same tokens once
// more in pages. Also the lists of geometries and lengths that the operator tests run over, rich in boundaries.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "msa/msa.h"
#include "tests/unit/support/tensor.h"

namespace msa::testing {

struct Geometry {
  std::int64_t query_heads = 1;
  std::int64_t kv_heads = 1;
  std::int64_t head_dim = 16;
  std::int64_t value_dim = 16;
  std::int64_t index_dim = 16;
  std::int64_t block_size = 16;
  std::int64_t topk = 2;
};

struct Lengths {
  std::int64_t queries = 0;
  std::int64_t keys = 0;
};

/// A geometry with lengths, a dtype and a layout: one case of an operator's test.
struct Case {
  Geometry geometry;
  std::vector<Lengths> lengths;
  DType dtype = DType::kFloat32;
  DType index_dtype = DType::kFloat32;
  Layout layout = Layout::kGaps;
  std::int64_t padding_rows = 0;  ///< rows behind the last sequence, queries and keys alike
};

/// Boundary-rich cases: group sizes 1, 2, 3, 4, 7 and 16, dimensions 16 to 256 that differ from each other, block sizes
/// 16 to 256, topk 1 to 64; lengths around multiples of the block size, empty sequences, prefixes, decode and
/// speculation.
std::vector<Case> all_cases();
/// What GoogleTest prints of a case that failed; its name says the rest.
inline void PrintTo(const Case& c, std::ostream* stream) { *stream << "layout " << static_cast<int>(c.layout); }
/// Name of a parametrised test.
std::string case_name(const ::testing::TestParamInfo<Case>& info);

/// The tokens of a case in tensors, filled with a normal distribution; padding rows hold NaN, positions are the last
/// ones.
struct Problem {
  explicit Problem(const Case& c, std::uint64_t seed = 1);

  Geometry geometry;
  std::vector<std::int32_t> cu_seqlens_q;
  std::vector<std::int32_t> cu_seqlens_k;
  std::vector<std::int32_t> query_positions;  ///< empty: the last Lq
  Tensor q, k, v, q_idx, k_idx;
  Tensor blocks;  ///< what the reference selects
  std::int64_t local_blocks = 1;
  std::int64_t init_blocks = 0;
  std::optional<double> scale, index_scale;
  Teacher teacher = Teacher::kMean;

  std::int64_t queries() const { return cu_seqlens_q.back(); }
  std::int64_t rows() const { return q.size(0); }
  std::int64_t sequences() const { return static_cast<std::int64_t>(cu_seqlens_q.size()) - 1; }
  /// Position of query row t, and its sequence.
  std::int64_t position(std::int64_t row) const;
  std::int64_t sequence_of(std::int64_t row) const;

  /// Selects `blocks` anew, after a change to the tensors.
  void select();

  Batch batch() const;
  SelectBlocksParams select_params() const;
  OracleBlocksParams oracle_params() const;
  SparseAttentionParams sparse_params() const;
  DenseAttentionParams dense_params() const;
  IndexKlParams kl_params(bool whole_prefix) const;
  SelectionRecallParams recall_params() const;

  /// The same tokens, rounded already, in float32: the reference on it is exact to float32's rounding.
  Problem as_float32() const;
  /// Sequence s alone, with its blocks.
  Problem only(std::int64_t s) const;
  /// Queries [begin, end) of a problem of one sequence, with the keys up to the last of them: one chunk of a prefill.
  Problem chunk(std::int64_t begin, std::int64_t end) const;
  /// The query rows `rows` alone (ascending), at their positions.
  Problem sample(const std::vector<std::int64_t>& rows) const;
};

/// The keys of a problem in shuffled pages. Pages nobody uses and the tails of the last pages hold NaN; unused table
/// entries are -1.
struct PagedProblem {
  PagedProblem(const Problem& problem, std::int64_t page, std::uint64_t seed = 7);

  const Problem* problem;
  std::int64_t max_pages = 0;
  std::vector<std::int32_t> page_table;
  std::vector<std::int32_t> seqlens_k;
  Tensor k, v, k_idx;

  Batch batch() const;
  SelectBlocksParams select_params() const;
  OracleBlocksParams oracle_params() const;
  SparseAttentionParams sparse_params() const;
  DenseAttentionParams dense_params() const;
  IndexKlParams kl_params(bool whole_prefix) const;
  SelectionRecallParams recall_params() const;
};

// What an operator wrote. Outputs start as NaN and lie between gaps.
struct AttentionResult {
  Tensor out, lse;
};
struct AttentionGradients {
  Tensor dq, dk, dv;
};
struct KlResult {
  float value = 0;
  Tensor lse_main, lse_index, teacher_norm;
  IndexKlSaved saved() { return {lse_main.view(), lse_index.view(), teacher_norm.view()}; }
};
struct KlGradients {
  Tensor dq_idx, dk_idx;
};

Tensor run_select(const Context& context, const SelectBlocksParams& params);
Tensor run_oracle(const Context& context, const OracleBlocksParams& params);
AttentionResult run_sparse(const Context& context, const SparseAttentionParams& params);
AttentionResult run_dense(const Context& context, const DenseAttentionParams& params);
AttentionGradients run_sparse_backward(const Context& context, const SparseAttentionParams& params,
                                       const AttentionResult& forward, const Tensor& dout, const Tensor* dlse);
AttentionGradients run_dense_backward(const Context& context, const DenseAttentionParams& params,
                                      const AttentionResult& forward, const Tensor& dout, const Tensor* dlse);
KlResult run_kl(const Context& context, const IndexKlParams& params);
KlGradients run_kl_backward(const Context& context, const IndexKlParams& params, KlResult& forward, float grad_output);

/// Random gradients of out and lse for a problem. Padding rows hold NaN.
Tensor make_dout(const Problem& problem, std::uint64_t seed = 11);
Tensor make_dlse(const Problem& problem, std::uint64_t seed = 12);

}  // namespace msa::testing
