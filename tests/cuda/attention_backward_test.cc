// SPDX-License-Identifier: Apache-2.0
// The fast sparse attention backward for Hopper, run by the emulator: within the tolerance rule of the reference over
// every fast geometry, the same bits alone or in a batch, with any number of heads and queries at once, in any order of
// blocks and threads, with asynchronous operations early or late; and its plan.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "src/cuda/attention_backward.cu"
#include "tests/cuda/fast_support.h"
#include "tests/cuda/backward_support.h"

namespace msa::cuda {
namespace {

using msa::testing::all_options;
using msa::testing::AtOnce;
using msa::testing::AttentionGradients;
using msa::testing::AttentionResult;
using msa::testing::Case;
using msa::testing::edges;
using msa::testing::expect_same;
using msa::testing::expect_same_alone;
using msa::testing::expect_same_bytes;
using msa::testing::Layout;
using msa::testing::Lengths;
using msa::testing::Problem;
using msa::testing::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

AttentionGradients run(const SparseAttentionParams& params, const AttentionResult& forward, const Tensor& dout,
                       const Tensor* dlse, const AtOnce& at_once = {}) {
  return msa::testing::run_fast_backward(params, forward, dout, dlse, at_once);
}
AttentionResult forward_of(const Problem& problem) { return msa::testing::exact_forward(problem, false); }
AttentionGradients expect_right(const Problem& problem, const AttentionResult& forward, const Tensor& dout,
                                const Tensor* dlse, const AtOnce& at_once = {}) {
  return msa::testing::expect_right_backward(problem, false, forward, dout, dlse, at_once);
}

std::vector<Lengths> prefill(std::int64_t bk) { return {{bk + 3, bk + 3}, {1, 3 * bk + 3}, {bk / 2, 2 * bk + 1}}; }

std::vector<Case> fast_cases() {
  const DType bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  // query_heads, kv_heads, head_dim, value_dim, index_dim, block_size, topk
  return {
      {{32, 2, 128, 128, 16, 128, 3}, edges(128), bf16, bf16, Layout::kContiguous, 3},
      {{16, 1, 128, 128, 16, 64, 4}, prefill(64), f16, f16, Layout::kContiguous, 2},
      {{9, 3, 64, 64, 16, 64, 3}, edges(64), bf16, bf16, Layout::kContiguous, 5},
      {{14, 2, 64, 64, 16, 128, 16}, edges(128), f16, bf16, Layout::kContiguous, 1},
      {{3, 3, 64, 64, 16, 64, 2}, {{150, 200}, {7, 7}}, bf16, bf16, Layout::kContiguous, 0},
      {{4, 2, 128, 128, 16, 64, 64}, {{40, 40}, {2, 300}}, f16, f16, Layout::kContiguous, 1},
      {{8, 2, 128, 128, 16, 128, 1}, {{20, 300}, {130, 140}}, bf16, bf16, Layout::kContiguous, 0},
      {{64, 1, 64, 64, 16, 64, 5}, {{16, 203}, {1, 1}}, bf16, bf16, Layout::kContiguous, 1},
      {{48, 1, 128, 128, 16, 128, 2}, {{9, 300}, {5, 5}}, f16, f16, Layout::kContiguous, 0},
  };
}

class FastBackward : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, FastBackward, ::testing::ValuesIn(fast_cases()), msa::testing::case_name);

TEST_P(FastBackward, IsWithinTheRuleAndTheSameHoweverItRuns) {
  const Problem problem(GetParam());
  const AttentionResult forward = forward_of(problem);
  const Tensor dout = make_dout(problem), dlse = make_dlse(problem);
  const AttentionGradients got = expect_right(problem, forward, dout, &dlse);
  const SparseAttentionParams params = problem.sparse_params();
  for (const emulator::Options& options : all_options()) {
    const emulator::WithOptions with(options);
    expect_same(run(params, forward, dout, &dlse), got);
  }
  expect_same(run(params, forward, dout, &dlse, {1, 0}), got);
  expect_same(run(params, forward, dout, &dlse, {1, 5}), got);
  expect_same_alone(problem, false, forward, dout, dlse, got);
}

TEST(FastBackwardRules, NoDlseMeansZeroAndScaleIsAnArgument) {
  Problem problem(
      Case{{8, 2, 64, 64, 16, 64, 3}, {{20, 150}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  const Tensor dout = make_dout(problem);
  Tensor zero = make_dlse(problem);
  zero.fill(0);
  for (const double scale : {1.0, 0.0, -0.5, 20.0}) {
    SCOPED_TRACE(scale);
    problem.scale = scale;
    const AttentionResult forward = forward_of(problem);
    expect_same(expect_right(problem, forward, dout, nullptr), run(problem.sparse_params(), forward, dout, &zero));
  }
}

TEST(FastBackwardRules, AHotBlockIsCutIntoPieces) {
  for (const auto& geometry : {msa::testing::Geometry{16, 1, 64, 64, 16, 64, 1}, {24, 1, 128, 128, 16, 128, 1}}) {
    Problem problem(Case{geometry, {{150, 160}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
    problem.blocks.fill(0);
    const AttentionResult forward = forward_of(problem);
    const Tensor dout = make_dout(problem);
    constexpr std::int64_t kTiles = 4;
    const AttentionGradients got = expect_right(problem, forward, dout, nullptr, {0, 0, kTiles});
    expect_same(run(problem.sparse_params(), forward, dout, nullptr, {1, 41, kTiles}), got);
    const emulator::WithOptions with({true, emulator::BlockOrder::kShuffled, true, 9});
    expect_same(run(problem.sparse_params(), forward, dout, nullptr, {1, 100, kTiles}), got);
  }
}

TEST(FastBackwardRules, WhatARowDoesNotSeeNeverReachesIt) {
  // Sequence 0 of two; from position 80 on its keys and values are not finite, and row 90's q and row 95's dout.
  for (const double poison : {kNaN, kInfinity, -kInfinity}) {
    SCOPED_TRACE(poison);
    const Problem clean(Case{
        {8, 2, 64, 64, 16, 64, 2}, {{104, 104}, {30, 40}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
    const AttentionResult forward = forward_of(clean);
    const Tensor dout = make_dout(clean);
    const AttentionGradients want = run(clean.sparse_params(), forward, dout, nullptr);
    Problem problem = clean;
    for (std::int64_t position = 80; position < 104; ++position) {
      for (std::int64_t d = 0; d < 64; ++d) {
        if (d % 3 == 0) problem.k.set(poison, position, 1, d);
        if (d % 5 == 0) problem.v.set(poison, position, 1, d);
      }
    }
    const AttentionGradients got = run(problem.sparse_params(), forward, dout, nullptr);
    expect_same_bytes("dq before", got.dq.bytes(0, 0, 80), want.dq.bytes(0, 0, 80));
    for (const auto& [mine, clean_grad] : {std::pair{&got.dq, &want.dq}, {&got.dk, &want.dk}, {&got.dv, &want.dv}}) {
      expect_same_bytes("the other sequence", mine->bytes(0, 104, mine->size(0)),
                        clean_grad->bytes(0, 104, mine->size(0)));
    }
    for (std::int64_t row = 80; row < 104; ++row) {
      EXPECT_EQ(got.dq.at(row, 3, 5), want.dq.at(row, 3, 5)) << "kv head 0 has no poison";
      EXPECT_FALSE(std::isfinite(got.dq.at(row, 4, 0)));
    }
  }
}

TEST(FastBackwardRules, ARowsNaNReachesTheKeysThatItSeesAlone) {
  for (const std::int64_t block_size : {64, 128}) {
    for (const bool in_dout : {false, true}) {
      SCOPED_TRACE(in_dout);
      Problem problem(Case{{4, 2, 128, 128, 16, block_size, 2},
                           {{100, 300}, {30, 40}},
                           DType::kFloat16,
                           DType::kFloat16,
                           Layout::kContiguous});
      // Query 20 stands at 220, within the last block but one or the last.
      const std::int64_t bad = 20, position = 220, local = position / block_size;
      for (std::int64_t row = 0; row < 100; ++row) {
        const std::int64_t own = problem.position(row) / block_size;
        problem.blocks.set(0, 0, row, 0);
        problem.blocks.set(static_cast<double>(own), 0, row, 1);
      }
      problem.blocks.set(static_cast<double>(local), 0, bad, 0);
      problem.blocks.set(-1, 0, bad, 1);
      const AttentionResult forward = forward_of(problem);
      Tensor dout = make_dout(problem);
      const AttentionGradients want = run(problem.sparse_params(), forward, dout, nullptr);
      (in_dout ? dout : problem.q).set(kNaN, bad, 1, 77);
      const AttentionGradients got = run(problem.sparse_params(), forward, dout, nullptr);
      for (std::int64_t row = 0; row < 130; ++row) {
        for (std::int64_t head = 0; head < 4; ++head) {
          if (row == bad && head == 1) {
            EXPECT_TRUE(std::isnan(got.dq.at(row, head, 3)));
          } else {
            ASSERT_EQ(got.dq.at(row, head, 3), want.dq.at(row, head, 3)) << row << " " << head;
          }
        }
      }
      for (std::int64_t key = 0; key < 340; ++key) {
        const bool sees = key >= local * block_size && key <= position;
        for (const std::int64_t d : {0, 77, 127}) {
          if (sees) {
            ASSERT_TRUE(std::isnan(got.dk.at(key, 0, d))) << key;
          } else {
            ASSERT_EQ(got.dk.at(key, 0, d), want.dk.at(key, 0, d)) << key;
            ASSERT_EQ(got.dv.at(key, 0, d), want.dv.at(key, 0, d)) << key;
          }
          ASSERT_EQ(got.dk.at(key, 1, d), want.dk.at(key, 1, d)) << key;
          ASSERT_EQ(got.dv.at(key, 1, d), want.dv.at(key, 1, d)) << key;
        }
      }
    }
  }
}

TEST(FastBackwardRules, RowsWithoutBlocksAndPaddingRowsAreInert) {
  Case c{{4, 2, 64, 64, 16, 64, 2}, {{6, 140}, {3, 3}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous};
  c.padding_rows = 4;
  Problem problem(c);
  for (const std::int64_t row : {0, 3, 8}) {
    for (std::int64_t slot = 0; slot < 2; ++slot) problem.blocks.set(-1, 1, row, slot);
  }
  const AttentionResult forward = forward_of(problem);
  Problem broken = problem;  // ids that were never checked count as absent
  broken.blocks.set(1 << 20, 1, 3, 1);
  broken.blocks.set(-3, 1, 3, 0);
  const Tensor dout = make_dout(problem), dlse = make_dlse(problem);
  const AttentionGradients got = run(broken.sparse_params(), forward, dout, &dlse);
  expect_same(got, run(problem.sparse_params(), forward, dout, &dlse));
  for (const std::int64_t row : {0, 3, 8, 9, 10, 11, 12}) {
    for (std::int64_t d = 0; d < 64; ++d) EXPECT_EQ(got.dq.at(row, 2, d), 0);
  }
  for (const Tensor* tensor : {&got.dq, &got.dk, &got.dv}) {
    for (const double value : tensor->values()) ASSERT_TRUE(std::isfinite(value));
  }
  for (std::int64_t key = 143; key < 147; ++key) {
    for (std::int64_t d = 0; d < 64; ++d) {
      EXPECT_EQ(got.dk.at(key, 0, d), 0);
      EXPECT_EQ(got.dv.at(key, 1, d), 0);
    }
  }
}

TEST(FastBackwardRules, ABlockThatARowNamesTwiceIsVisitedOnce) {
  // Ids that a caller vouched for, wrongly: what the row itself gets is open, the sums are not.
  Problem problem(
      Case{{16, 1, 64, 64, 16, 64, 2}, {{40, 140}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  for (std::int64_t row = 0; row < 40; ++row) {
    problem.blocks.set(1, 0, row, 0);
    problem.blocks.set(-1, 0, row, 1);
  }
  const AttentionResult forward = forward_of(problem);
  const Tensor dout = make_dout(problem);
  AtOnce small_pieces;
  small_pieces.tiles_per_piece = 1;
  for (const AtOnce& at_once : {AtOnce{}, small_pieces}) {
    for (const std::int64_t step : {18, 1}) {  // the padding is a piece's end; whole pieces of small ones
      SCOPED_TRACE(std::to_string(at_once.tiles_per_piece) + " tiles a piece, each " + std::to_string(step));
      for (std::int64_t row = 3; row < 40; row += step) problem.blocks.set(-1, 0, row, 1);
      const AttentionGradients want = run(problem.sparse_params(), forward, dout, nullptr, at_once);
      for (std::int64_t row = 3; row < 40; row += step) problem.blocks.set(1, 0, row, 1);
      const AttentionGradients got = run(problem.sparse_params(), forward, dout, nullptr, at_once);
      expect_same_bytes("dk", got.dk, want.dk);
      expect_same_bytes("dv", got.dv, want.dv);
      for (std::int64_t row = 0; row < 40; ++row) problem.blocks.set(-1, 0, row, 1);
    }
  }
}

TEST(FastBackwardRules, NothingToDo) {
  const Problem problem(
      Case{{4, 2, 64, 64, 16, 64, 2}, {{0, 0}, {0, 9}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous, 2});
  const AttentionResult forward = forward_of(problem);
  const AttentionGradients got = run(problem.sparse_params(), forward, make_dout(problem), nullptr);
  for (const Tensor* tensor : {&got.dq, &got.dk, &got.dv}) {
    for (const double value : tensor->values()) EXPECT_EQ(value, 0);
  }
}

SparseAttentionParams paper_shapes(std::int64_t queries, std::int64_t keys) {
  SparseAttentionParams params;
  const auto view = [](std::initializer_list<std::int64_t> shape) {
    return make_view(static_cast<const void*>(nullptr), DType::kBFloat16, shape);
  };
  params.q = view({queries, 64, 128});
  params.k = view({keys, 4, 128});
  params.v = params.k;
  params.blocks = make_view(static_cast<const std::int32_t*>(nullptr), {4, queries, 16});
  static const std::int32_t none[2] = {0, 0};
  params.batch = Batch::packed(none, none);
  return params;
}

TEST(AttentionBackwardPlan, RespectsItsLimit) {
  const SparseAttentionParams params = paper_shapes(131072, 131072);
  EXPECT_TRUE(takes_backward(params));
  std::int64_t last = 0;
  for (const int shift : {29, 30, 31, 33, 34, 36}) {
    const std::size_t limit = std::size_t{1} << shift;
    const AttentionBackwardPlan plan = plan_attention_backward(params, limit);
    EXPECT_LE(plan.bytes, limit);
    EXPECT_TRUE(plan.heads_at_once == 1 || plan.queries_at_once == 131072) << "fewer heads come first";
    EXPECT_GT(plan.heads_at_once * plan.queries_at_once, last);
    last = plan.heads_at_once * plan.queries_at_once;
  }
  EXPECT_EQ(last, 4 * 131072);
  EXPECT_EQ(plan_attention_backward(params, 4096).queries_at_once, 1) << "the least, which is more";
  EXPECT_LE(plan_attention_backward(params, 0).bytes, kDefaultBackwardWorkspace);
  EXPECT_GE(plan_attention_backward(paper_shapes(1 << 20, 1 << 20), 0).queries_at_once, kMinBackwardQueries);
}

TEST(AttentionBackwardPlan, BackwardGeometries) {
  SparseAttentionParams params = paper_shapes(4, 4);
  params.block_size = 32;
  EXPECT_FALSE(takes_backward(params));
  params.block_size = 64;
  EXPECT_TRUE(takes_backward(params));
  params.q.dtype = DType::kFloat32;
  EXPECT_FALSE(takes_backward(params));
  ConstTensorView dout = paper_shapes(4, 4).q;
  EXPECT_TRUE(takes_gradient(dout));
  dout.strides[0] = 0;  // the gradient of a sum, expanded
  EXPECT_FALSE(takes_gradient(dout));
}

}  // namespace
}  // namespace msa::cuda
