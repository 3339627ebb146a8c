// SPDX-License-Identifier: Apache-2.0
// See problem.h.
#include "tests/unit/support/problem.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <sstream>

#include "tests/unit/support/targets.h"

namespace msa::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Lengths written in terms of the block size, so that every geometry meets its own boundaries.
std::vector<Lengths> edges(std::int64_t bk) {
  return {{1, 1}, {0, 0}, {bk - 1, bk - 1}, {0, 5}, {bk, bk}, {bk + 1, bk + 1}, {2, bk}};
}
std::vector<Lengths> prefill(std::int64_t bk) { return {{3 * bk + 5, 3 * bk + 5}}; }
std::vector<Lengths> decode(std::int64_t bk) {
  return {{1, 5 * bk + 3}, {1, 1}, {1, bk}, {1, bk + 1}, {1, 4 * bk - 1}};
}
std::vector<Lengths> speculate(std::int64_t bk) { return {{2, 4 * bk + 1}, {16, 3 * bk + 7}, {3, 3 * bk}, {0, bk}}; }
std::vector<Lengths> chunks(std::int64_t bk) { return {{bk + 3, 4 * bk + 9}, {7, 7}, {bk, 6 * bk}}; }

void set_rows(Tensor& tensor, std::int64_t begin, double value) {
  const Tensor rest = copy_of(slice(tensor.view(), begin, tensor.size(0)));
  const TensorView view = slice(tensor.view(), begin, tensor.size(0));
  Tensor filled(tensor.dtype(), rest.shape());
  filled.fill(value);
  const ConstTensorView source = filled.view();
  const auto bytes = static_cast<std::int64_t>(dtype_size(view.dtype));
  for (std::int64_t i = 0; i < view.elements(); ++i) {
    std::int64_t at = i;
    std::int64_t from = 0;
    std::int64_t to = 0;
    for (int d = view.rank; d-- > 0;) {
      from += at % view.size(d) * source.stride(d);
      to += at % view.size(d) * view.stride(d);
      at /= view.size(d);
    }
    std::copy_n(source.data + from * bytes, bytes, view.data + to * bytes);
  }
}

Tensor take_rows(const Tensor& tensor, int dim, const std::vector<std::int64_t>& rows) {
  std::vector<std::int64_t> shape = tensor.shape();
  shape[static_cast<std::size_t>(dim)] = static_cast<std::int64_t>(rows.size());
  Tensor result(tensor.dtype(), shape);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto to = static_cast<std::int64_t>(i);
    for (std::int64_t a = 0; a < (dim == 0 ? shape[1] : shape[0]); ++a) {
      for (std::int64_t b = 0; b < (shape.size() == 3 ? shape[2] : 1); ++b) {
        if (dim == 0) {
          result.set(tensor.at(rows[i], a, b), to, a, b);
        } else {
          result.set(tensor.at(a, rows[i], b), a, to, b);
        }
      }
    }
  }
  return result;
}

std::vector<std::int64_t> range(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> result(static_cast<std::size_t>(end - begin));
  std::iota(result.begin(), result.end(), begin);
  return result;
}

}  // namespace

std::vector<Case> all_cases() {
  const DType f32 = DType::kFloat32;
  const DType bf16 = DType::kBFloat16;
  const DType f16 = DType::kFloat16;
  //                           Hq Hkv D   Dv   Di   Bk  k
  const Geometry smallest = {1, 1, 16, 16, 16, 16, 1};
  const Geometry smollm = {9, 3, 64, 64, 64, 16, 3};
  const Geometry one_group = {3, 1, 32, 16, 48, 16, 2};
  const Geometry mixed = {8, 2, 64, 32, 16, 32, 2};
  const Geometry paper = {64, 4, 128, 128, 128, 128, 2};
  const Geometry multi_head = {5, 5, 48, 80, 112, 16, 64};
  const Geometry group_of_7 = {14, 2, 16, 256, 32, 16, 2};
  const Geometry widest = {4, 2, 256, 48, 256, 64, 3};
  const Geometry largest_block = {2, 1, 16, 32, 16, 256, 1};
  const Geometry odd_heads = {6, 3, 80, 240, 96, 32, 5};
  return {
      {smallest, {{0, 0}}, f32, f32, Layout::kGaps, 0},
      {smallest, {{0, 0}, {0, 7}}, bf16, bf16, Layout::kGaps, 3},
      {smallest, {{1, 1}, {1, 1}}, f32, f32, Layout::kGaps, 0},  // certain rows: dq, dk and dlogit are 0
      {smallest, edges(16), f32, f32, Layout::kContiguous, 0},
      {smallest, chunks(16), bf16, f16, Layout::kGaps, 2},
      {smollm, edges(16), bf16, bf16, Layout::kGaps, 5},
      {smollm, chunks(16), f32, f32, Layout::kHeadsFirst, 0},
      {smollm, prefill(16), f16, f16, Layout::kGaps, 1},
      {one_group, prefill(16), f32, bf16, Layout::kGaps, 0},
      {one_group, speculate(16), f16, f32, Layout::kContiguous, 4},
      {mixed, edges(32), f16, f16, Layout::kGaps, 0},
      {mixed, chunks(32), f32, f32, Layout::kGaps, 2},
      {mixed, decode(32), bf16, bf16, Layout::kHeadsFirst, 0},
      {paper, decode(128), bf16, bf16, Layout::kContiguous, 0},
      {paper, {{5, 389}}, f32, f32, Layout::kGaps, 2},
      {multi_head, edges(16), f32, f16, Layout::kGaps, 1},
      {multi_head, speculate(16), bf16, bf16, Layout::kGaps, 0},
      {group_of_7, chunks(16), f32, f32, Layout::kGaps, 0},
      {group_of_7, speculate(16), f16, f16, Layout::kHeadsFirst, 1},
      {widest, speculate(64), f32, f32, Layout::kContiguous, 1},
      {widest, decode(64), f16, bf16, Layout::kGaps, 0},
      {largest_block, {{3, 258}, {1, 255}, {2, 256}, {1, 513}}, bf16, f32, Layout::kGaps, 1},
      {odd_heads, speculate(32), bf16, bf16, Layout::kContiguous, 0},
      {odd_heads, edges(32), f32, f32, Layout::kGaps, 0},
  };
}

std::string case_name(const ::testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  const Geometry& g = c.geometry;
  std::ostringstream name;
  name << info.index << "_heads" << g.query_heads << "_" << g.kv_heads << "_dims" << g.head_dim << "_" << g.value_dim
       << "_" << g.index_dim << "_block" << g.block_size << "_topk" << g.topk << "_" << name_of(c.dtype) << "_"
       << name_of(c.index_dtype);
  for (const Lengths& l : c.lengths) name << "_" << l.queries << "of" << l.keys;
  return name.str();
}

Problem::Problem(const Case& c, std::uint64_t seed) : geometry(c.geometry), cu_seqlens_q{0}, cu_seqlens_k{0} {
  for (const Lengths& l : c.lengths) {
    cu_seqlens_q.push_back(cu_seqlens_q.back() + static_cast<std::int32_t>(l.queries));
    cu_seqlens_k.push_back(cu_seqlens_k.back() + static_cast<std::int32_t>(l.keys));
  }
  const std::int64_t query_rows = cu_seqlens_q.back() + c.padding_rows;
  const std::int64_t key_rows = cu_seqlens_k.back() + c.padding_rows;
  const Geometry& g = geometry;
  q = Tensor(c.dtype, {query_rows, g.query_heads, g.head_dim}, c.layout);
  k = Tensor(c.dtype, {key_rows, g.kv_heads, g.head_dim}, c.layout);
  v = Tensor(c.dtype, {key_rows, g.kv_heads, g.value_dim}, c.layout);
  q_idx = Tensor(c.index_dtype, {query_rows, g.kv_heads, g.index_dim}, c.layout);
  k_idx = Tensor(c.index_dtype, {key_rows, g.index_dim}, c.layout);
  Random random(seed);
  for (Tensor* tensor : {&q, &k, &v, &q_idx, &k_idx}) tensor->fill_normal(random);
  for (Tensor* tensor : {&q, &q_idx}) set_rows(*tensor, cu_seqlens_q.back(), kNaN);
  for (Tensor* tensor : {&k, &v, &k_idx}) set_rows(*tensor, cu_seqlens_k.back(), kNaN);
  select();
}

void Problem::select() { blocks = run_select(reference_context(), select_params()); }

std::int64_t Problem::sequence_of(std::int64_t row) const {
  std::int64_t s = 0;
  while (cu_seqlens_q[static_cast<std::size_t>(s) + 1] <= row) ++s;
  return s;
}

std::int64_t Problem::position(std::int64_t row) const {
  if (!query_positions.empty()) return query_positions[static_cast<std::size_t>(row)];
  const auto s = static_cast<std::size_t>(sequence_of(row));
  const std::int64_t from_the_end = cu_seqlens_q[s + 1] - row;
  return cu_seqlens_k[s + 1] - cu_seqlens_k[s] - from_the_end;
}

Batch Problem::batch() const {
  Batch batch = Batch::packed(cu_seqlens_q, cu_seqlens_k);
  batch.query_positions = query_positions;
  return batch;
}

SelectBlocksParams Problem::select_params() const {
  return {q_idx.view(), k_idx.view(), batch(), geometry.block_size, geometry.topk, local_blocks, init_blocks};
}

OracleBlocksParams Problem::oracle_params() const {
  return {q.view(), k.view(), batch(), geometry.block_size, geometry.topk, local_blocks, init_blocks, scale};
}

SparseAttentionParams Problem::sparse_params() const {
  return {q.view(), k.view(), v.view(), blocks.view(), batch(), geometry.block_size, scale, false};
}

DenseAttentionParams Problem::dense_params() const { return {q.view(), k.view(), v.view(), batch(), scale}; }

IndexKlParams Problem::kl_params(bool whole_prefix) const {
  IndexKlParams params;
  params.q_idx = q_idx.view();
  params.k_idx = k_idx.view();
  params.q = q.view();
  params.k = k.view();
  if (!whole_prefix) params.blocks = blocks.view();
  params.batch = batch();
  params.block_size = geometry.block_size;
  params.index_scale = index_scale;
  params.scale = scale;
  params.teacher = teacher;
  return params;
}

SelectionRecallParams Problem::recall_params() const {
  return {q.view(), k.view(), blocks.view(), batch(), geometry.block_size, scale};
}

Problem Problem::as_float32() const {
  Problem result = *this;
  for (Tensor* tensor : {&result.q, &result.k, &result.v, &result.q_idx, &result.k_idx}) {
    *tensor = tensor->as(DType::kFloat32);
  }
  return result;
}

Problem Problem::only(std::int64_t s) const {
  const auto i = static_cast<std::size_t>(s);
  const auto query_rows = range(cu_seqlens_q[i], cu_seqlens_q[i + 1]);
  const auto key_rows = range(cu_seqlens_k[i], cu_seqlens_k[i + 1]);
  Problem result = *this;
  result.cu_seqlens_q = {0, static_cast<std::int32_t>(query_rows.size())};
  result.cu_seqlens_k = {0, static_cast<std::int32_t>(key_rows.size())};
  if (!query_positions.empty()) {
    result.query_positions.assign(query_positions.begin() + cu_seqlens_q[i],
                                  query_positions.begin() + cu_seqlens_q[i + 1]);
  }
  result.q = take_rows(q, 0, query_rows);
  result.q_idx = take_rows(q_idx, 0, query_rows);
  result.blocks = take_rows(blocks, 1, query_rows);
  result.k = take_rows(k, 0, key_rows);
  result.v = take_rows(v, 0, key_rows);
  result.k_idx = take_rows(k_idx, 0, key_rows);
  return result;
}

Problem Problem::chunk(std::int64_t begin, std::int64_t end) const {
  Problem result = *this;
  const std::int64_t keys = end == begin ? position(begin) : position(end - 1) + 1;
  result.cu_seqlens_q = {0, static_cast<std::int32_t>(end - begin)};
  result.cu_seqlens_k = {0, static_cast<std::int32_t>(keys)};
  result.q = take_rows(q, 0, range(begin, end));
  result.q_idx = take_rows(q_idx, 0, range(begin, end));
  result.blocks = take_rows(blocks, 1, range(begin, end));
  result.k = take_rows(k, 0, range(0, keys));
  result.v = take_rows(v, 0, range(0, keys));
  result.k_idx = take_rows(k_idx, 0, range(0, keys));
  return result;
}

Problem Problem::sample(const std::vector<std::int64_t>& rows) const {
  Problem result = *this;
  result.cu_seqlens_q.assign(cu_seqlens_q.size(), 0);
  result.query_positions.clear();
  for (const std::int64_t row : rows) {
    result.query_positions.push_back(static_cast<std::int32_t>(position(row)));
    for (auto s = static_cast<std::size_t>(sequence_of(row)) + 1; s < cu_seqlens_q.size(); ++s) {
      ++result.cu_seqlens_q[s];
    }
  }
  result.q = take_rows(q, 0, rows);
  result.q_idx = take_rows(q_idx, 0, rows);
  result.blocks = take_rows(blocks, 1, rows);
  return result;
}

PagedProblem::PagedProblem(const Problem& of, std::int64_t page, std::uint64_t seed) : problem(&of) {
  std::int64_t used = 0;
  for (std::int64_t s = 0; s < of.sequences(); ++s) {
    const auto i = static_cast<std::size_t>(s);
    seqlens_k.push_back(of.cu_seqlens_k[i + 1] - of.cu_seqlens_k[i]);
    const std::int64_t pages = (seqlens_k.back() + page - 1) / page;
    used += pages;
    max_pages = std::max(max_pages, pages);
  }
  max_pages += 2;  // every row has unused entries
  const std::int64_t pages = used + 3;
  k = Tensor(of.k.dtype(), {pages, page, of.geometry.kv_heads, of.geometry.head_dim});
  v = Tensor(of.v.dtype(), {pages, page, of.geometry.kv_heads, of.geometry.value_dim});
  k_idx = Tensor(of.k_idx.dtype(), {pages, page, of.geometry.index_dim});
  auto ids = range(0, pages);
  Random random(seed);
  std::shuffle(ids.begin(), ids.end(), random);
  std::size_t next = 0;
  page_table.assign(static_cast<std::size_t>(of.sequences() * max_pages), -1);
  for (std::int64_t s = 0; s < of.sequences(); ++s) {
    for (std::int64_t j = 0; j < seqlens_k[static_cast<std::size_t>(s)]; ++j) {
      std::int32_t& id = page_table[static_cast<std::size_t>(s * max_pages + j / page)];
      if (id < 0) id = static_cast<std::int32_t>(ids[next++]);
      const std::int64_t row = of.cu_seqlens_k[static_cast<std::size_t>(s)] + j;
      for (std::int64_t head = 0; head < of.geometry.kv_heads; ++head) {
        for (std::int64_t d = 0; d < of.geometry.head_dim; ++d) k.set(of.k.at(row, head, d), id, j % page, head, d);
        for (std::int64_t d = 0; d < of.geometry.value_dim; ++d) v.set(of.v.at(row, head, d), id, j % page, head, d);
      }
      for (std::int64_t d = 0; d < of.geometry.index_dim; ++d) k_idx.set(of.k_idx.at(row, d), id, j % page, d);
    }
  }
}

Batch PagedProblem::batch() const {
  Batch batch = Batch::paged(problem->cu_seqlens_q, page_table, max_pages, seqlens_k);
  batch.query_positions = problem->query_positions;
  return batch;
}

SelectBlocksParams PagedProblem::select_params() const {
  SelectBlocksParams params = problem->select_params();
  params.k_idx = k_idx.view();
  params.batch = batch();
  return params;
}

OracleBlocksParams PagedProblem::oracle_params() const {
  OracleBlocksParams params = problem->oracle_params();
  params.k = k.view();
  params.batch = batch();
  return params;
}

SparseAttentionParams PagedProblem::sparse_params() const {
  SparseAttentionParams params = problem->sparse_params();
  params.k = k.view();
  params.v = v.view();
  params.batch = batch();
  return params;
}

DenseAttentionParams PagedProblem::dense_params() const {
  DenseAttentionParams params = problem->dense_params();
  params.k = k.view();
  params.v = v.view();
  params.batch = batch();
  return params;
}

IndexKlParams PagedProblem::kl_params(bool whole_prefix) const {
  IndexKlParams params = problem->kl_params(whole_prefix);
  params.k = k.view();
  params.k_idx = k_idx.view();
  params.batch = batch();
  return params;
}

SelectionRecallParams PagedProblem::recall_params() const {
  SelectionRecallParams params = problem->recall_params();
  params.k = k.view();
  params.batch = batch();
  return params;
}

Tensor run_select(const Context& context, const SelectBlocksParams& params) {
  Tensor blocks(DType::kInt32, {params.q_idx.size(1), params.q_idx.size(0), params.topk});
  select_blocks(context, params, blocks.view());
  EXPECT_TRUE(blocks.gaps_intact());
  return blocks;
}

Tensor run_oracle(const Context& context, const OracleBlocksParams& params) {
  Tensor blocks(DType::kInt32, {params.k.size(params.k.rank - 2), params.q.size(0), params.topk});
  select_blocks_oracle(context, params, blocks.view());
  EXPECT_TRUE(blocks.gaps_intact());
  return blocks;
}

namespace {

AttentionResult make_result(const ConstTensorView& q, const ConstTensorView& v) {
  return {Tensor(q.dtype, {q.size(0), q.size(1), v.size(v.rank - 1)}), Tensor(DType::kFloat32, {q.size(0), q.size(1)})};
}

AttentionSaved make_saved(const AttentionResult& forward, const Tensor& dout, const Tensor* dlse) {
  AttentionSaved saved{forward.out.view(), forward.lse.view(), dout.view(), {}};
  if (dlse != nullptr) saved.dlse = dlse->view();
  return saved;
}

template <class Params>
AttentionGradients make_gradients(const Params& params) {
  const auto like = [](const ConstTensorView& view) {
    return Tensor(view.dtype, {view.size(0), view.size(1), view.size(2)});
  };
  return {like(params.q), like(params.k), like(params.v)};
}

void expect_gaps_intact(const AttentionGradients& grads) {
  EXPECT_TRUE(grads.dq.gaps_intact());
  EXPECT_TRUE(grads.dk.gaps_intact());
  EXPECT_TRUE(grads.dv.gaps_intact());
}

}  // namespace

AttentionResult run_sparse(const Context& context, const SparseAttentionParams& params) {
  AttentionResult result = make_result(params.q, params.v);
  sparse_attention(context, params, result.out.view(), result.lse.view());
  EXPECT_TRUE(result.out.gaps_intact());
  EXPECT_TRUE(result.lse.gaps_intact());
  return result;
}

AttentionResult run_dense(const Context& context, const DenseAttentionParams& params) {
  AttentionResult result = make_result(params.q, params.v);
  dense_attention(context, params, result.out.view(), result.lse.view());
  EXPECT_TRUE(result.out.gaps_intact());
  EXPECT_TRUE(result.lse.gaps_intact());
  return result;
}

AttentionGradients run_sparse_backward(const Context& context, const SparseAttentionParams& params,
                                       const AttentionResult& forward, const Tensor& dout, const Tensor* dlse) {
  AttentionGradients grads = make_gradients(params);
  sparse_attention_backward(context, params, make_saved(forward, dout, dlse),
                            {grads.dq.view(), grads.dk.view(), grads.dv.view()});
  expect_gaps_intact(grads);
  return grads;
}

AttentionGradients run_dense_backward(const Context& context, const DenseAttentionParams& params,
                                      const AttentionResult& forward, const Tensor& dout, const Tensor* dlse) {
  AttentionGradients grads = make_gradients(params);
  dense_attention_backward(context, params, make_saved(forward, dout, dlse),
                           {grads.dq.view(), grads.dk.view(), grads.dv.view()});
  expect_gaps_intact(grads);
  return grads;
}

KlResult run_kl(const Context& context, const IndexKlParams& params) {
  KlResult result;
  result.lse_main = Tensor(DType::kFloat32, {params.q.size(0), params.q.size(1)});
  result.lse_index = Tensor(DType::kFloat32, {params.q.size(0), params.q_idx.size(1)});
  result.teacher_norm = Tensor(DType::kFloat32, {params.q.size(0), params.q_idx.size(1)});
  result.value = index_kl(context, params, result.saved());
  EXPECT_TRUE(result.lse_main.gaps_intact());
  EXPECT_TRUE(result.lse_index.gaps_intact());
  EXPECT_TRUE(result.teacher_norm.gaps_intact());
  return result;
}

KlGradients run_kl_backward(const Context& context, const IndexKlParams& params, KlResult& forward, float grad_output) {
  const ConstTensorView& q_idx = params.q_idx;
  const ConstTensorView& k_idx = params.k_idx;
  KlGradients grads{Tensor(q_idx.dtype, {q_idx.size(0), q_idx.size(1), q_idx.size(2)}),
                    Tensor(k_idx.dtype, {k_idx.size(0), k_idx.size(1)})};
  index_kl_backward(context, params, forward.saved(), grad_output, grads.dq_idx.view(), grads.dk_idx.view());
  EXPECT_TRUE(grads.dq_idx.gaps_intact());
  EXPECT_TRUE(grads.dk_idx.gaps_intact());
  return grads;
}

Tensor make_dout(const Problem& problem, std::uint64_t seed) {
  Tensor dout(problem.q.dtype(), {problem.rows(), problem.geometry.query_heads, problem.geometry.value_dim});
  Random random(seed);
  dout.fill_normal(random);
  set_rows(dout, problem.queries(), kNaN);
  return dout;
}

Tensor make_dlse(const Problem& problem, std::uint64_t seed) {
  Tensor dlse(DType::kFloat32, {problem.rows(), problem.geometry.query_heads});
  Random random(seed);
  dlse.fill_normal(random);
  set_rows(dlse, problem.queries(), kNaN);
  return dlse;
}

}  // namespace msa::testing
