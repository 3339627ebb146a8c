// SPDX-License-Identifier: Apache-2.0
// The fast dense attention backward for Hopper, run by the emulator: within the tolerance rule of the reference, the
// same bits alone or in a batch, with any number of heads at once, at chosen positions, in any order of blocks and
// threads, with asynchronous operations early or late; and what is not finite.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "src/cuda/dense_attention_backward.cu"
#include "tests/cuda/backward_support.h"

namespace msa::cuda {
namespace {

using msa::testing::AttentionGradients;
using msa::testing::AttentionResult;
using msa::testing::Case;
using msa::testing::expect_same;
using msa::testing::expect_same_bytes;
using msa::testing::Layout;
using msa::testing::Problem;
using msa::testing::Tensor;

AttentionGradients run(const Problem& problem, const AttentionResult& forward, const Tensor& dout, const Tensor* dlse,
                       std::int64_t heads_at_once = 0) {
  return msa::testing::run_fast_backward(msa::testing::params_of(problem, true), forward, dout, dlse,
                                         {heads_at_once, 0});
}

std::vector<Case> dense_cases() {
  const DType bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  // query_heads, kv_heads, head_dim, value_dim, index_dim, block_size, topk
  return {
      {{32, 2, 128, 128, 16, 128, 1},
       {{1, 1}, {0, 0}, {3, 127}, {0, 5}, {2, 128}, {33, 129}, {2, 256}},
       bf16,
       bf16,
       Layout::kContiguous,
       3},
      {{9, 3, 64, 64, 16, 128, 1}, {{130, 140}, {1, 300}, {64, 64}}, f16, f16, Layout::kContiguous, 2},
      {{3, 3, 64, 64, 16, 128, 1}, {{150, 200}, {7, 7}}, bf16, bf16, Layout::kContiguous, 0},
      {{48, 1, 128, 128, 16, 128, 1}, {{9, 300}, {5, 5}}, f16, f16, Layout::kContiguous, 1},
      {{64, 1, 64, 64, 16, 128, 1}, {{16, 203}, {1, 1}}, bf16, bf16, Layout::kContiguous, 0},
  };
}

class FastDenseBackward : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, FastDenseBackward, ::testing::ValuesIn(dense_cases()), msa::testing::case_name);

TEST_P(FastDenseBackward, IsWithinTheRuleAndTheSameHoweverItRuns) {
  const Problem problem(GetParam());
  const AttentionResult forward = msa::testing::exact_forward(problem, true);
  const Tensor dout = make_dout(problem), dlse = make_dlse(problem);
  const AttentionGradients got = msa::testing::expect_right_backward(problem, true, forward, dout, &dlse);
  for (const emulator::Options& options : msa::testing::all_options()) {
    const emulator::WithOptions with(options);
    expect_same(run(problem, forward, dout, &dlse), got);
  }
  expect_same(run(problem, forward, dout, &dlse, 1), got);
  msa::testing::expect_same_alone(problem, true, forward, dout, dlse, got);
  for (std::int64_t row = problem.queries(); row < problem.rows(); ++row) {
    for (std::int64_t d = 0; d < 64; ++d) ASSERT_EQ(got.dq.at(row, 0, d), 0) << "padding";
  }
}

TEST(FastDenseBackwardRules, AnyRowsAtTheirPositions) {
  const Problem whole(Case{
      {8, 2, 64, 64, 16, 128, 1}, {{200, 300}, {40, 40}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  const Problem problem = whole.sample({0, 3, 40, 41, 100, 199, 200, 230});
  const AttentionResult forward = msa::testing::exact_forward(problem, true);
  const Tensor dout = make_dout(problem);
  const AttentionGradients got = msa::testing::expect_right_backward(problem, true, forward, dout, nullptr);
  const emulator::WithOptions with({true, emulator::BlockOrder::kShuffled, true, 5});
  expect_same(run(problem, forward, dout, nullptr), got);
}

TEST(FastDenseBackwardRules, WhatARowDoesNotSeeNeverReachesIt) {
  // From position 80 on the keys and values of kv head 1 are not finite; then one row's q or dout is not.
  const Problem clean(Case{
      {8, 2, 64, 64, 16, 128, 1}, {{104, 104}, {30, 40}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  const AttentionResult forward = msa::testing::exact_forward(clean, true);
  const Tensor dout = make_dout(clean);
  const AttentionGradients want = run(clean, forward, dout, nullptr);
  for (const double poison : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Problem problem = clean;
    for (std::int64_t position = 80; position < 104; ++position) {
      for (std::int64_t d = 0; d < 64; d += 3) problem.k.set(poison, position, 1, d);
      for (std::int64_t d = 0; d < 64; d += 5) problem.v.set(poison, position, 1, d);
    }
    const AttentionGradients got = run(problem, forward, dout, nullptr);
    expect_same_bytes("dq before", got.dq.bytes(0, 0, 80), want.dq.bytes(0, 0, 80));
    expect_same_bytes("dq of the other sequence", got.dq.bytes(0, 104, 134), want.dq.bytes(0, 104, 134));
    for (std::int64_t row = 80; row < 104; ++row) {
      EXPECT_EQ(got.dq.at(row, 3, 5), want.dq.at(row, 3, 5)) << "kv head 0 has no poison";
      EXPECT_FALSE(std::isfinite(got.dq.at(row, 4, 0)));
    }
    for (const bool in_dout : {false, true}) {
      Problem bad = clean;
      Tensor bad_dout = dout;
      (in_dout ? bad_dout : bad.q).set(poison, 60, 5, 7);
      const AttentionGradients row_got = run(bad, forward, bad_dout, nullptr);
      for (std::int64_t key = 0; key < 144; ++key) {
        if (key <= 60) {
          EXPECT_FALSE(std::isfinite(row_got.dk.at(key, 1, 9)));
        } else {
          ASSERT_EQ(row_got.dk.at(key, 1, 9), want.dk.at(key, 1, 9)) << key;
          ASSERT_EQ(row_got.dv.at(key, 1, 9), want.dv.at(key, 1, 9)) << key;
        }
        ASSERT_EQ(row_got.dk.at(key, 0, 9), want.dk.at(key, 0, 9)) << key;
      }
      for (std::int64_t row = 0; row < 134; ++row) {
        if (row == 60) continue;
        ASSERT_EQ(row_got.dq.at(row, 5, 7), want.dq.at(row, 5, 7)) << row;
      }
    }
  }
}

TEST(FastDenseBackwardRules, NothingToDo) {
  const Problem problem(
      Case{{4, 2, 64, 64, 16, 64, 2}, {{0, 0}, {0, 9}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous, 2});
  const AttentionGradients got = run(problem, msa::testing::exact_forward(problem, true), make_dout(problem), nullptr);
  for (const Tensor* tensor : {&got.dq, &got.dk, &got.dv}) {
    for (const double value : tensor->values()) EXPECT_EQ(value, 0);
  }
}

}  // namespace
}  // namespace msa::cuda
