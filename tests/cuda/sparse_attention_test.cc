// SPDX-License-Identifier: Apache-2.0
// The fast sparse attention forward for Hopper, run by the emulator: within the tolerance rule of the reference over
// every fast geometry, the same bits packed or paged, whole or in chunks, in any order of blocks and threads, with
// asynchronous operations early or late; and its plan.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "src/cuda/sparse_attention.cu"
#include "tests/cuda/fast_support.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::cuda {
namespace {

using msa::testing::all_options;
using msa::testing::AttentionResult;
using msa::testing::Case;
using msa::testing::copy_of;
using msa::testing::edges;
using msa::testing::expect_same_bytes;
using msa::testing::expect_within_rule;
using msa::testing::Layout;
using msa::testing::Lengths;
using msa::testing::naive_attention;
using msa::testing::PagedProblem;
using msa::testing::Problem;
using msa::testing::run_sparse;
using msa::testing::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};

/// Ways to run a call. They give the same bits; small tests would take the direct one.
const AttentionOrders kDirect{true, 0}, kByBlock{false, 0}, kByTile{false, 32}, kMixed{false, 2};

SparseAttentionPlan plan_for(const SparseAttentionParams& params, std::int64_t queries_at_once,
                             const AttentionOrders& orders) {
  SparseAttentionPlan plan = plan_sparse_attention(params, 0, orders);
  if (queries_at_once > 0) {  // the largest limit that gives no more queries at once
    std::size_t limit = plan.bytes;
    while (plan.queries_at_once > queries_at_once)
      plan = plan_sparse_attention(params, limit -= limit / 16 + 1, orders);
  }
  return plan;
}

AttentionResult run(SparseAttentionParams params, std::int64_t queries_at_once = 0,
                    const AttentionOrders& orders = kByBlock) {
  if (!params.scale) params.scale = 1 / std::sqrt(static_cast<double>(params.q.size(2)));
  EXPECT_TRUE(is_fast_geometry(params));
  // The copy engine wants aligned rows.
  const Tensor q = copy_of(params.q, Layout::kContiguous), k = copy_of(params.k, Layout::kContiguous),
               v = copy_of(params.v, Layout::kContiguous);
  params.q = q.view();
  params.k = k.view();
  params.v = v.view();
  EXPECT_TRUE(has_fast_layout(params));
  const SparseAttentionPlan plan = plan_for(params, queries_at_once, orders);
  // Tiles of queries are written 16 bytes at a time; the other outputs lie at odd places.
  const Layout layout = orders.most_waste > 0 ? Layout::kContiguous : Layout::kGaps;
  AttentionResult result{
      Tensor(params.q.dtype, {params.q.size(0), params.q.size(1), params.v.size(params.v.rank - 1)}, layout),
      Tensor(DType::kFloat32, {params.q.size(0), params.q.size(1)})};
  const std::unique_ptr<void, Free> workspace(std::aligned_alloc(256, plan.bytes));
  std::memset(workspace.get(), 0xff, plan.bytes);
  Context context;
  context.workspace = workspace.get();
  context.workspace_bytes = plan.bytes;
  with_attention_geometry(params, [&]<class T, int D, int kBlock>() {
    run_fast_attention<T, D, kBlock>(context, params, plan, 3, result.out.view(), result.lse.view());
  });
  EXPECT_TRUE(result.out.gaps_intact());
  EXPECT_TRUE(result.lse.gaps_intact());
  return result;
}

void expect_same(const AttentionResult& a, const AttentionResult& b) {
  expect_same_bytes("out", a.out, b.out);
  expect_same_bytes("lse", a.lse, b.lse);
}

std::vector<Lengths> decode(std::int64_t bk) {
  return {{1, 3 * bk + 3}, {1, 1}, {1, bk}, {1, bk + 1}, {1, 4 * bk - 1}};
}
std::vector<Lengths> speculate(std::int64_t bk) { return {{2, 4 * bk + 1}, {16, 3 * bk + 7}, {3, 3 * bk}, {0, bk}}; }

std::vector<Case> fast_cases() {
  const DType bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  // query_heads, kv_heads, head_dim, value_dim, index_dim, block_size, topk
  return {
      {{32, 2, 128, 128, 16, 128, 3}, edges(128), bf16, bf16, Layout::kContiguous, 3},
      {{16, 1, 128, 128, 16, 64, 4}, speculate(64), f16, f16, Layout::kContiguous, 2},
      {{9, 3, 64, 64, 16, 64, 3}, edges(64), bf16, bf16, Layout::kContiguous, 5},
      {{14, 2, 64, 64, 16, 128, 16}, decode(128), f16, bf16, Layout::kContiguous, 1},
      {{3, 3, 64, 64, 16, 64, 2}, {{150, 200}, {7, 7}}, bf16, bf16, Layout::kContiguous, 0},
      {{4, 2, 128, 128, 16, 64, 64}, {{40, 40}, {2, 500}}, f16, f16, Layout::kContiguous, 1},
      {{8, 2, 128, 128, 16, 128, 1}, {{20, 300}, {130, 140}}, bf16, bf16, Layout::kContiguous, 0},
      {{64, 1, 64, 64, 16, 64, 5}, speculate(64), bf16, bf16, Layout::kContiguous, 1},
      {{48, 1, 64, 64, 16, 64, 2}, decode(64), f16, f16, Layout::kContiguous, 0},
      {{12, 1, 128, 128, 16, 64, 3}, edges(64), f16, bf16, Layout::kContiguous, 2},
      {{5, 1, 64, 64, 16, 128, 2}, speculate(128), bf16, bf16, Layout::kContiguous, 0},
      {{24, 1, 128, 128, 16, 64, 2}, decode(64), bf16, bf16, Layout::kContiguous, 1},
  };
}

class FastSparseAttention : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, FastSparseAttention, ::testing::ValuesIn(fast_cases()), msa::testing::case_name);

TEST_P(FastSparseAttention, IsWithinTheRuleAndTheSameHoweverItRuns) {
  const Problem problem(GetParam());
  const Problem wide = problem.as_float32();
  const AttentionResult exact = run_sparse(msa::testing::reference_context(), wide.sparse_params());
  const AttentionResult naive = naive_attention(problem.sparse_params());
  const AttentionResult got = run(problem.sparse_params());
  expect_within_rule("out", got.out, exact.out, naive.out);
  expect_within_rule("lse", got.lse, exact.lse, naive.lse);

  for (const emulator::Options& options : all_options()) {
    const emulator::WithOptions with(options);
    expect_same(run(problem.sparse_params()), got);
    if (options.late_async) expect_same(run(problem.sparse_params(), 0, kByTile), got);
  }
  expect_same(run(problem.sparse_params(), 0, kMixed), got);
  expect_same(run(problem.sparse_params(), 5, kByTile), got);
  expect_same(run(problem.sparse_params(), 0, kDirect), got);
  expect_same(run(problem.sparse_params(), 5), got);
  const std::int64_t block_size = problem.geometry.block_size;
  expect_same(run(PagedProblem(problem, block_size).sparse_params()), got);
  expect_same(run(PagedProblem(problem, 2 * block_size).sparse_params(), 0, kByTile), got);
  expect_same(run(PagedProblem(problem, 2 * block_size).sparse_params(), 7, kDirect), got);
  for (std::int64_t s = 0; s < problem.sequences(); ++s) {
    const std::int64_t begin = problem.cu_seqlens_q[static_cast<std::size_t>(s)];
    const std::int64_t end = problem.cu_seqlens_q[static_cast<std::size_t>(s) + 1];
    if (begin == end) continue;
    const AttentionResult alone = run(problem.only(s).sparse_params());
    expect_same_bytes("out alone", alone.out.bytes(0, 0, end - begin), got.out.bytes(0, begin, end));
    expect_same_bytes("lse alone", alone.lse.bytes(0, 0, end - begin), got.lse.bytes(0, begin, end));
  }
}

TEST(FastSparseAttentionRules, ChunksOfAPrefillGiveTheSameBits) {
  const Problem problem(
      Case{{16, 2, 64, 64, 16, 64, 3}, {{200, 200}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  const AttentionResult whole = run(problem.sparse_params());
  for (const auto& [begin, end] : std::vector<std::pair<std::int64_t, std::int64_t>>{{0, 70}, {70, 71}, {71, 200}}) {
    const AttentionResult part = run(problem.chunk(begin, end).sparse_params(), 0, end - begin > 1 ? kMixed : kDirect);
    expect_same_bytes("out", part.out.bytes(), whole.out.bytes(0, begin, end));
    expect_same_bytes("lse", part.lse.bytes(), whole.lse.bytes(0, begin, end));
  }
}

TEST(FastSparseAttentionRules, ScaleIsAnArgumentAndLargeLogitsDoNotOverflow) {
  Problem problem(
      Case{{8, 2, 64, 64, 16, 64, 3}, {{20, 150}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  for (const double scale : {1.0, 0.0, -0.5, 1000.0}) {
    SCOPED_TRACE(scale);
    problem.scale = scale;
    Problem wide = problem.as_float32();
    wide.scale = scale;
    const AttentionResult exact = run_sparse(msa::testing::reference_context(), wide.sparse_params());
    const AttentionResult naive = naive_attention(problem.sparse_params());
    const AttentionResult got = run(problem.sparse_params());
    expect_within_rule("out", got.out, exact.out, naive.out);
    expect_within_rule("lse", got.lse, exact.lse, naive.lse);
  }
}

TEST(FastSparseAttentionRules, WhatARowDoesNotSeeNeverReachesIt) {
  // Sequence 0 of two, 64 + 40 positions; from position 80 on its keys and values are NaN, infinite or huge.
  for (const double poison : {std::numeric_limits<double>::quiet_NaN(), kInfinity, -kInfinity}) {
    SCOPED_TRACE(poison);
    const Problem clean(Case{
        {8, 2, 64, 64, 16, 64, 2}, {{104, 104}, {30, 40}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
    const AttentionResult want = run(clean.sparse_params());
    Problem problem = clean;
    for (std::int64_t position = 80; position < 104; ++position) {
      for (std::int64_t d = 0; d < 64; ++d) {
        problem.k.set(poison, position, 1, d);
        if (d % 3 == 0) problem.v.set(poison, position, 1, d);
      }
    }
    const AttentionResult got = run(problem.sparse_params());
    expect_same_bytes("before", got.out.bytes(0, 0, 80), want.out.bytes(0, 0, 80));
    expect_same_bytes("lse before", got.lse.bytes(0, 0, 80), want.lse.bytes(0, 0, 80));
    expect_same_bytes("the other sequence", got.out.bytes(0, 104, 134), want.out.bytes(0, 104, 134));
    for (std::int64_t row = 80; row < 104; ++row) {
      EXPECT_EQ(got.out.at(row, 3, 5), want.out.at(row, 3, 5)) << "kv head 0 has no poison";
      EXPECT_FALSE(std::isfinite(got.out.at(row, 4, 0)));
    }
  }
}

void expect_same_values(const AttentionResult& got, const AttentionResult& want, double tolerance) {
  for (std::int64_t row = 0; row < got.out.size(0); ++row) {
    for (std::int64_t head = 0; head < got.out.size(1); ++head) {
      for (std::int64_t d = 0; d < got.out.size(2); ++d) {
        const double a = got.out.at(row, head, d), b = want.out.at(row, head, d);
        if (std::isfinite(b)) {
          ASSERT_NEAR(a, b, tolerance) << row << " " << head << " " << d;
        } else {
          ASSERT_TRUE(a == b || (std::isnan(a) && std::isnan(b))) << row << " " << head << " " << d << ": " << a;
        }
      }
    }
  }
}

TEST(FastSparseAttentionRules, ValuesAloneAreNotFinite) {
  // The keys are fine, so that only 0 * NaN could carry a value to a row that does not see it, and rows that see
  // infinity are infinite, as in the reference, also where its probability underflows (key 20 against the others).
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    Problem problem(Case{{6, 1, 64, 64, 16, 64, 3}, {{72, 200}}, dtype, dtype, Layout::kContiguous});
    const AttentionResult clean = run(problem.sparse_params());
    const double nan = std::numeric_limits<double>::quiet_NaN();
    problem.v.set(nan, 60, 0, 7);
    problem.v.set(kInfinity, 90, 0, 40);
    problem.v.set(kInfinity, 20, 0, 41);
    problem.v.set(-kInfinity, 21, 0, 42);
    problem.v.set(kInfinity, 22, 0, 43);
    problem.v.set(-kInfinity, 150, 0, 43);
    problem.v.set(nan, 199, 0, 41);
    for (const double factor : {1.0, 60.0}) {  // of key 20: its scores rise and fall by it
      SCOPED_TRACE(factor);
      Problem wild = problem;
      for (std::int64_t d = 0; d < 64; ++d) wild.k.set(factor * wild.k.at(20, 0, d), 20, 0, d);
      const AttentionResult want = run_sparse(msa::testing::reference_context(), wild.sparse_params());
      const AttentionResult got = run(wild.sparse_params());
      expect_same_values(got, want, 0.05);
      expect_same(run(wild.sparse_params(), 7), got);
      expect_same(run(wild.sparse_params(), 0, kByTile), got);
      expect_same(run(wild.sparse_params(), 0, kDirect), got);
      if (factor == 1) expect_same_bytes("lse", got.lse, clean.lse);
    }
  }
}

TEST(FastSparseAttentionRules, RowsWithoutBlocksAndPaddingRowsAreInert) {
  Case c{{4, 2, 64, 64, 16, 64, 2}, {{6, 140}, {3, 3}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous};
  c.padding_rows = 4;
  Problem problem(c);
  for (const std::int64_t row : {0, 3, 8}) {
    for (std::int64_t slot = 0; slot < 2; ++slot) problem.blocks.set(-1, 1, row, slot);
  }
  problem.blocks.set(1 << 20, 1, 4, 1);  // an id that was never checked counts as absent
  problem.blocks.set(-3, 1, 4, 0);
  for (const AttentionOrders& orders : {kDirect, kByBlock, kByTile}) {
    const AttentionResult got = run(problem.sparse_params(), 0, orders);
    for (const std::int64_t row : {0, 3, 4, 8, 9, 10, 11, 12}) {
      for (std::int64_t head = 2; head < 4; ++head) {
        EXPECT_EQ(got.lse.at(row, head), -kInfinity);
        for (std::int64_t d = 0; d < 64; ++d) EXPECT_EQ(got.out.at(row, head, d), 0);
      }
      EXPECT_EQ(std::isfinite(got.lse.at(row, 0)), row < 9);
    }
  }
}

TEST(FastSparseAttentionRules, AHotBlockIsCutAndShared) {
  // 300 queries of one block, more than an item takes (16 tiles of 128 / 16 positions).
  Problem problem(
      Case{{16, 1, 64, 64, 16, 64, 2}, {{300, 400}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  for (std::int64_t row = 0; row < 300; ++row) {
    problem.blocks.set(0, 0, row, 0);
    problem.blocks.set((row + 100) / 64, 0, row, 1);
  }
  const AttentionResult exact = run_sparse(msa::testing::reference_context(), problem.as_float32().sparse_params());
  const AttentionResult naive = naive_attention(problem.sparse_params());
  const AttentionResult got = run(problem.sparse_params());
  expect_within_rule("out", got.out, exact.out, naive.out);
  const emulator::WithOptions with({true, emulator::BlockOrder::kShuffled, true, 9});
  expect_same(run(problem.sparse_params()), got);
}

TEST(FastSparseAttentionRules, NothingToDo) {
  const Problem problem(
      Case{{4, 2, 64, 64, 16, 64, 2}, {{0, 0}, {0, 9}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous, 2});
  const AttentionResult got = run(problem.sparse_params());
  for (const double value : got.out.values()) EXPECT_EQ(value, 0);
  for (const double value : got.lse.values()) EXPECT_EQ(value, -kInfinity);
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

TEST(SparseAttentionPlan, RespectsItsLimit) {
  const SparseAttentionParams params = paper_shapes(131072, 131072);
  EXPECT_TRUE(is_fast_geometry(params));
  std::int64_t last = 0;
  for (const std::size_t limit : {std::size_t{1} << 24, std::size_t{1} << 28, std::size_t{1} << 30, std::size_t{0}}) {
    const SparseAttentionPlan plan = plan_sparse_attention(params, limit);
    EXPECT_LE(plan.bytes, limit == 0 ? kDefaultWorkspace : limit);
    EXPECT_GT(plan.queries_at_once, last);
    last = plan.queries_at_once;
  }
  EXPECT_EQ(plan_sparse_attention(params, 4096).queries_at_once, 1) << "the least, which is more";
  const SparseAttentionPlan small = plan_sparse_attention(paper_shapes(16, 1 << 20), 0);
  EXPECT_TRUE(small.is_direct);
  EXPECT_EQ(small.queries_at_once, 16);
  EXPECT_LT(small.bytes, std::size_t{5} << 20);  // partial results and their log-sums
}

TEST(SparseAttentionPlan, FastGeometries) {
  SparseAttentionParams params = paper_shapes(4, 4);
  params.block_size = 32;
  EXPECT_FALSE(is_fast_geometry(params));
  params.block_size = 64;
  EXPECT_TRUE(is_fast_geometry(params));
  params.q.dtype = DType::kFloat32;
  EXPECT_FALSE(is_fast_geometry(params));
  params = paper_shapes(4, 4);
  params.k.shape[1] = params.v.shape[1] = 1;
  EXPECT_TRUE(is_fast_geometry(params));
  params.q.shape[1] = 65;
  EXPECT_FALSE(is_fast_geometry(params));
}

}  // namespace
}  // namespace msa::cuda
