// SPDX-License-Identifier: Apache-2.0
// The fast dense attention forward for Hopper, run by the emulator: within the tolerance rule of the reference over
// the fast geometries, the same bits packed or in pages of any size, alone or in a batch, with spans merged in the
// kernel or by the second one, in any order of blocks and threads, with asynchronous operations early or late; and its
// plan.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "src/cuda/dense_attention.cu"
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
using msa::testing::expect_same_bytes;
using msa::testing::expect_within_rule;
using msa::testing::Layout;
using msa::testing::Lengths;
using msa::testing::naive_attention;
using msa::testing::over_whole_prefix;
using msa::testing::PagedProblem;
using msa::testing::Problem;
using msa::testing::run_dense;
using msa::testing::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};

enum class Spans { kMergedInKernel, kItems };

/// Two tiles of keys a span, so that short sequences have several.
constexpr std::int64_t kShortSpan = 2 * kDenseTileKeys;

/// `queries_at_once`: where spans are items; 0: all.
AttentionResult run(DenseAttentionParams params, Spans spans = Spans::kMergedInKernel, std::int64_t queries_at_once = 0,
                    Layout out_layout = Layout::kContiguous) {
  if (!params.scale) params.scale = 1 / std::sqrt(static_cast<double>(params.q.size(2)));
  EXPECT_TRUE(is_fast_geometry(params));
  // The copy engine wants aligned rows.
  const Tensor q = copy_of(params.q, Layout::kContiguous), k = copy_of(params.k, Layout::kContiguous),
               v = copy_of(params.v, Layout::kContiguous);
  params.q = q.view();
  params.k = k.view();
  params.v = v.view();
  EXPECT_TRUE(has_fast_layout(params));
  DenseAttentionPlan plan = plan_dense_attention(params, 0, kShortSpan);
  EXPECT_EQ(plan.is_split, plan.max_spans > 1);  // so few tiles are split; the other way takes no more of the workspace
  plan.is_split = plan.is_split && spans == Spans::kItems;
  if (queries_at_once > 0) plan.queries_at_once = queries_at_once;
  AttentionResult result{Tensor(params.q.dtype, {params.q.size(0), params.q.size(1), params.q.size(2)}, out_layout),
                         Tensor(DType::kFloat32, {params.q.size(0), params.q.size(1)})};
  const std::unique_ptr<void, Free> workspace(std::aligned_alloc(256, plan.bytes));
  std::memset(workspace.get(), 0xff, plan.bytes);
  Context context;
  context.workspace = workspace.get();
  context.workspace_bytes = plan.bytes;
  with_dense_geometry(params, [&]<class T, int D, bool kWidens>() {
    run_fast_dense<T, D, kWidens>(context, params, plan, 3, result.out.view(), result.lse.view());
  });
  EXPECT_TRUE(result.out.gaps_intact());
  EXPECT_TRUE(result.lse.gaps_intact());
  return result;
}

void expect_same(const AttentionResult& a, const AttentionResult& b) {
  expect_same_bytes("out", a.out, b.out);
  expect_same_bytes("lse", a.lse, b.lse);
}

std::vector<Lengths> edges() { return {{1, 1}, {0, 0}, {3, 127}, {0, 5}, {2, 128}, {33, 129}, {2, 256}, {2, 257}}; }
std::vector<Lengths> decode() { return {{1, 387}, {1, 1}, {1, 128}, {1, 129}, {1, 511}}; }
std::vector<Lengths> speculate() { return {{2, 513}, {16, 391}, {3, 384}, {0, 128}}; }

std::vector<Case> fast_cases() {
  const DType bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  // query_heads, kv_heads, head_dim, value_dim, index_dim, block_size, topk
  return {
      {{32, 2, 128, 128, 16, 128, 1}, edges(), bf16, bf16, Layout::kContiguous, 3},
      {{16, 1, 128, 128, 16, 128, 1}, speculate(), f16, f16, Layout::kContiguous, 20},
      {{9, 3, 64, 64, 16, 128, 1}, edges(), bf16, bf16, Layout::kContiguous, 5},
      {{14, 2, 64, 64, 16, 128, 1}, decode(), f16, bf16, Layout::kContiguous, 1},
      {{2, 2, 64, 64, 16, 128, 1}, {{150, 400}, {7, 7}}, bf16, bf16, Layout::kContiguous, 0},
      {{8, 2, 128, 128, 16, 128, 1}, {{20, 300}, {130, 140}}, bf16, bf16, Layout::kContiguous, 0},
      {{64, 1, 64, 64, 16, 128, 1}, speculate(), bf16, bf16, Layout::kContiguous, 1},
      {{48, 1, 128, 128, 16, 128, 1}, decode(), f16, f16, Layout::kContiguous, 0},
  };
}

class FastDenseAttention : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, FastDenseAttention, ::testing::ValuesIn(fast_cases()), msa::testing::case_name);

TEST_P(FastDenseAttention, IsWithinTheRuleAndTheSameHoweverItRuns) {
  const Problem problem(GetParam());
  const Problem wide = problem.as_float32();
  const AttentionResult exact = run_dense(msa::testing::reference_context(), wide.dense_params());
  const AttentionResult naive = naive_attention(over_whole_prefix(problem.dense_params()));
  const AttentionResult got = run(problem.dense_params());
  expect_within_rule("out", got.out, exact.out, naive.out);
  expect_within_rule("lse", got.lse, exact.lse, naive.lse);

  for (const emulator::Options& options : all_options()) {
    const emulator::WithOptions with(options);
    expect_same(run(problem.dense_params()), got);
    expect_same(run(problem.dense_params(), Spans::kItems), got);
  }
  expect_same(run(problem.dense_params(), Spans::kItems, 5), got);
  expect_same(run(problem.dense_params(), Spans::kMergedInKernel, 0, Layout::kGaps), got);
  for (const std::int64_t page : {48, 256, 7}) {  // 48 and 7 do not divide a tile
    expect_same(run(PagedProblem(problem, page).dense_params()), got);
  }
  expect_same(run(PagedProblem(problem, 64).dense_params(), Spans::kItems, 7), got);
}

TEST_P(FastDenseAttention, ARowIsTheSameAlone) {
  const Problem problem(GetParam());
  const AttentionResult got = run(problem.dense_params());
  for (std::int64_t s = 0; s < problem.sequences(); ++s) {
    const std::int64_t begin = problem.cu_seqlens_q[static_cast<std::size_t>(s)];
    const std::int64_t end = problem.cu_seqlens_q[static_cast<std::size_t>(s) + 1];
    if (begin == end) continue;
    const Problem sequence = problem.only(s);
    const std::int64_t keys = sequence.cu_seqlens_k.back(), prefix = keys - (end - begin);
    expect_same_bytes("out alone", run(sequence.dense_params()).out.bytes(0, 0, end - begin),
                      got.out.bytes(0, begin, end));
    for (const std::int64_t i : {std::int64_t{0}, (end - begin) / 2, end - begin - 1}) {
      const AttentionResult alone = run(sequence.sample({i}).dense_params(), Spans::kItems);
      expect_same_bytes("a token's out", alone.out.bytes(0, 0, 1), got.out.bytes(0, begin + i, begin + i + 1));
      expect_same_bytes("a token's lse", alone.lse.bytes(0, 0, 1), got.lse.bytes(0, begin + i, begin + i + 1));
    }
    EXPECT_GE(prefix, 0);
  }
}

TEST_P(FastDenseAttention, Float8KeysAndValuesAreThoseWidened) {
  Problem narrow(GetParam());
  narrow.k = narrow.k.as(DType::kFloat8E4M3);
  narrow.v.set(1.0 / 512, 1, 0, 5);  // the smallest number
  narrow.v.set(-448, 2, 0, 5);       // the largest
  narrow.v.set(std::numeric_limits<double>::quiet_NaN(), narrow.cu_seqlens_k.back() - 1, 0,
               3);  // only its own row sees it
  narrow.v = narrow.v.as(DType::kFloat8E4M3);
  Problem wide = narrow;
  wide.k = narrow.k.as(narrow.q.dtype());
  wide.v = narrow.v.as(narrow.q.dtype());
  const AttentionResult want = run(wide.dense_params());
  const emulator::WithOptions with(all_options()[1]);
  expect_same(run(narrow.dense_params()), want);
  expect_same(run(PagedProblem(narrow, 16).dense_params()), want);
  expect_same(run(PagedProblem(narrow, 24).dense_params(), Spans::kItems), want);
}

TEST(FastDenseAttentionRules, ChunksOfAPrefillGiveTheSameBits) {
  const Problem problem(
      Case{{16, 2, 64, 64, 16, 128, 1}, {{600, 600}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  const AttentionResult whole = run(problem.dense_params());
  for (const auto& [begin, end] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{0, 250}, {250, 251}, {251, 260}, {260, 600}}) {
    const AttentionResult part = run(problem.chunk(begin, end).dense_params(), Spans::kItems);
    expect_same_bytes("out", part.out.bytes(), whole.out.bytes(0, begin, end));
    expect_same_bytes("lse", part.lse.bytes(), whole.lse.bytes(0, begin, end));
  }
}

TEST(FastDenseAttentionRules, ScaleIsAnArgumentAndLargeLogitsDoNotOverflow) {
  Problem problem(
      Case{{8, 2, 64, 64, 16, 128, 1}, {{20, 350}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  for (const double scale : {1.0, 0.0, -0.5, 1000.0}) {
    SCOPED_TRACE(scale);
    problem.scale = scale;
    Problem wide = problem.as_float32();
    wide.scale = scale;
    const AttentionResult exact = run_dense(msa::testing::reference_context(), wide.dense_params());
    const AttentionResult naive = naive_attention(over_whole_prefix(problem.dense_params()));
    const AttentionResult got = run(problem.dense_params());
    expect_within_rule("out", got.out, exact.out, naive.out);
    expect_within_rule("lse", got.lse, exact.lse, naive.lse);
    expect_same(run(problem.dense_params(), Spans::kItems), got);
  }
}

TEST(FastDenseAttentionRules, LargestScoresInAnyOrder) {
  // Keys that grow, shrink, and grow by leaps: the running maximum moves at every tile, at none, and past 2^127.
  for (const double step : {0.05, -0.05, 4.0}) {
    SCOPED_TRACE(step);
    Problem problem(
        Case{{4, 1, 64, 64, 16, 128, 1}, {{40, 700}}, DType::kFloat16, DType::kFloat16, Layout::kContiguous});
    for (std::int64_t key = 0; key < 700; ++key) {
      for (std::int64_t d = 0; d < 64; ++d) problem.k.set(step * static_cast<double>(key) / 8, key, 0, d);
    }
    for (std::int64_t row = 0; row < 40; ++row) {
      for (std::int64_t d = 0; d < 64; ++d) problem.q.set(row % 2 == 0 ? 1 : -1, row, 1, d);
    }
    const AttentionResult exact = run_dense(msa::testing::reference_context(), problem.as_float32().dense_params());
    const AttentionResult naive = naive_attention(over_whole_prefix(problem.dense_params()));
    const AttentionResult got = run(problem.dense_params());
    expect_within_rule("out", got.out, exact.out, naive.out);
    expect_within_rule("lse", got.lse, exact.lse, naive.lse);
    expect_same(run(problem.dense_params(), Spans::kItems), got);
  }
}

TEST(FastDenseAttentionRules, WhatARowDoesNotSeeNeverReachesIt) {
  // Sequence 0 of two; from position 300 on its keys and values are NaN or infinite.
  for (const double poison : {std::numeric_limits<double>::quiet_NaN(), kInfinity, -kInfinity}) {
    SCOPED_TRACE(poison);
    const Problem clean(Case{
        {8, 2, 64, 64, 16, 128, 1}, {{60, 330}, {30, 40}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
    const AttentionResult want = run(clean.dense_params());
    Problem problem = clean;
    for (std::int64_t position = 300; position < 330; ++position) {
      for (std::int64_t d = 0; d < 64; ++d) {
        problem.k.set(poison, position, 1, d);
        if (d % 3 == 0) problem.v.set(poison, position, 1, d);
      }
    }
    for (const Spans spans : {Spans::kMergedInKernel, Spans::kItems}) {
      const AttentionResult got = run(problem.dense_params(), spans);
      expect_same_bytes("before", got.out.bytes(0, 0, 30), want.out.bytes(0, 0, 30));
      expect_same_bytes("lse before", got.lse.bytes(0, 0, 30), want.lse.bytes(0, 0, 30));
      expect_same_bytes("the other sequence", got.out.bytes(0, 60, 90), want.out.bytes(0, 60, 90));
      for (std::int64_t row = 30; row < 60; ++row) {
        EXPECT_EQ(got.out.at(row, 3, 5), want.out.at(row, 3, 5)) << "kv head 0 has no poison";
        EXPECT_FALSE(std::isfinite(got.out.at(row, 4, 0)));
      }
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

TEST(FastDenseAttentionRules, ValuesAloneAreNotFinite) {
  // The keys are fine, so that only 0 * NaN could carry a value to a row that does not see it, and rows that see
  // infinity are infinite, as in the reference, also where its probability underflows (key 20 against the others).
  for (const auto& [dtype, factor] :
       std::vector<std::pair<DType, double>>{{DType::kFloat16, 60}, {DType::kBFloat16, 1}}) {
    SCOPED_TRACE(factor);
    Problem problem(Case{{6, 1, 128, 128, 16, 128, 1}, {{120, 330}, {1, 3}}, dtype, dtype, Layout::kContiguous});
    const AttentionResult clean = run(problem.dense_params());
    const double nan = std::numeric_limits<double>::quiet_NaN();
    problem.v.set(nan, 260, 0, 7);
    problem.v.set(kInfinity, 290, 0, 100);
    problem.v.set(kInfinity, 20, 0, 101);
    problem.v.set(-kInfinity, 311, 0, 102);
    problem.v.set(kInfinity, 22, 0, 103);
    problem.v.set(-kInfinity, 300, 0, 103);
    problem.v.set(nan, 329, 0, 101);
    for (std::int64_t d = 0; d < 128; ++d) problem.k.set(factor * problem.k.at(20, 0, d), 20, 0, d);
    const AttentionResult want = run_dense(msa::testing::reference_context(), problem.dense_params());
    const AttentionResult got = run(problem.dense_params());
    expect_same_values(got, want, 0.05);
    expect_same(run(problem.dense_params(), Spans::kItems), got);
    expect_same(run(PagedProblem(problem, 32).dense_params()), got);
    for (const std::int64_t row : {0, 45, 46, 85, 119}) {
      const AttentionResult alone = run(problem.only(0).sample({row}).dense_params(), Spans::kItems);
      expect_same_bytes("alone", alone.out.bytes(0, 0, 1), got.out.bytes(0, row, row + 1));
    }
    if (factor == 1) expect_same_bytes("lse", got.lse, clean.lse);
  }
}

TEST(FastDenseAttentionRules, PositionsAreGiven) {
  const Problem problem(
      Case{{6, 2, 64, 64, 16, 128, 1}, {{500, 500}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  const AttentionResult whole = run(problem.dense_params());
  const std::vector<std::int64_t> rows = {0, 5, 127, 128, 300, 301, 499};
  const AttentionResult got = run(problem.sample(rows).dense_params());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i);
    expect_same_bytes("out", got.out.bytes(0, at, at + 1), whole.out.bytes(0, rows[i], rows[i] + 1));
  }
}

TEST(FastDenseAttentionRules, PaddingRowsAreInertAndNothingIsNothing) {
  Case c{{4, 2, 64, 64, 16, 128, 1}, {{6, 140}, {0, 9}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous};
  c.padding_rows = 70;
  for (const Spans spans : {Spans::kMergedInKernel, Spans::kItems}) {
    const AttentionResult got = run(Problem(c).dense_params(), spans);
    for (std::int64_t row = 6; row < 76; ++row) {
      for (std::int64_t head = 0; head < 4; ++head) {
        EXPECT_EQ(got.lse.at(row, head), -kInfinity);
        for (std::int64_t d = 0; d < 64; ++d) EXPECT_EQ(got.out.at(row, head, d), 0);
      }
    }
  }
  c.lengths = {{0, 0}};
  c.padding_rows = 2;
  const AttentionResult got = run(Problem(c).dense_params());
  for (const double value : got.out.values()) EXPECT_EQ(value, 0);
}

TEST(FastDenseAttentionOrder, ListsEveryRowOnceLongestFirst) {
  Case c{{16, 1, 64, 64, 16, 128, 1}, {{40, 1100}, {900, 900}, {1, 5000}, {0, 7}, {13, 13}}};
  c.padding_rows = 11;
  const Problem problem(c);
  std::vector<DenseItem> items(200);
  DenseTotals totals{};
  DenseOrder order{};
  const Batch batch = problem.batch();
  order.batch = view_of(batch);
  order.items = items.data();
  order.totals = &totals;
  order.queries = static_cast<std::int32_t>(problem.rows());
  order.positions = 8;
  order.span_keys = 0x7fffffff;
  order.most_items = 200;
  launch(dim3(1), dim3(kOrderThreads), 0, nullptr, order_items, order);
  std::vector<int> seen(static_cast<std::size_t>(problem.rows()));
  ASSERT_EQ(totals.items, 5 + 113 + 1 + 2 + 2);
  for (std::int32_t i = 0; i < totals.items; ++i) {
    const DenseItem& item = items[static_cast<std::size_t>(i)];
    for (std::int32_t row = item.first_query; row < item.first_query + item.count; ++row) {
      ++seen[static_cast<std::size_t>(row)];
      EXPECT_EQ(item.sequence, row < problem.queries() ? problem.sequence_of(row) : -1);
      EXPECT_LT(row < problem.queries() ? problem.position(row) : -1, item.end);
    }
    const DenseItem& before = items[static_cast<std::size_t>(i == 0 ? 0 : i - 1)];
    EXPECT_LE((item.end + 127) / 128, (before.end + 127) / 128);
  }
  for (const int count : seen) EXPECT_EQ(count, 1);
}

DenseAttentionParams paper_shapes(std::int64_t queries, std::int64_t keys) {
  DenseAttentionParams params;
  const auto view = [](std::initializer_list<std::int64_t> shape) {
    return make_view(static_cast<const void*>(nullptr), DType::kBFloat16, shape);
  };
  params.q = view({queries, 64, 128});
  params.k = view({keys, 4, 128});
  params.v = params.k;
  static const std::int32_t none[2] = {0, 0};
  params.batch = Batch::packed(none, none);
  return params;
}

TEST(DenseAttentionPlan, SplitsWhereTilesAreFew) {
  const DenseAttentionPlan prefill = plan_dense_attention(paper_shapes(131072, 131072), 0);
  EXPECT_FALSE(prefill.is_split);
  EXPECT_EQ(prefill.queries_at_once, 131072);
  EXPECT_LT(prefill.bytes, std::size_t{1} << 20);
  const DenseAttentionPlan decode = plan_dense_attention(paper_shapes(1, 1 << 20), 0);
  EXPECT_TRUE(decode.is_split);
  EXPECT_EQ(decode.max_spans, 256);
  EXPECT_EQ(decode.max_items, 256);
  EXPECT_LT(decode.bytes, std::size_t{10} << 20);
  EXPECT_FALSE(plan_dense_attention(paper_shapes(1, kDenseSpanKeys), 0).is_split);
}

TEST(DenseAttentionPlan, RespectsItsLimit) {
  const DenseAttentionParams params = paper_shapes(1000, 1 << 20);
  std::int64_t last = 0;
  for (const std::size_t limit : {std::size_t{1} << 24, std::size_t{1} << 26, std::size_t{0}, std::size_t{1} << 30}) {
    const DenseAttentionPlan plan = plan_dense_attention(params, limit);
    EXPECT_LE(plan.bytes, limit == 0 ? kDenseWorkspace : limit);
    EXPECT_GT(plan.queries_at_once, last);
    last = plan.queries_at_once;
  }
  EXPECT_EQ(plan_dense_attention(params, 4096).queries_at_once, 1) << "the least, which is more";
}

TEST(DenseAttentionPlan, FastGeometries) {
  DenseAttentionParams params = paper_shapes(4, 4);
  EXPECT_TRUE(is_fast_geometry(params));
  params.q.dtype = DType::kFloat32;
  EXPECT_FALSE(is_fast_geometry(params));
  params = paper_shapes(4, 4);
  params.k.shape[1] = params.v.shape[1] = 1;
  EXPECT_TRUE(is_fast_geometry(params));
  params.k.dtype = DType::kFloat8E4M3;
  EXPECT_FALSE(is_fast_geometry(params));
  params.v.dtype = DType::kFloat8E4M3;
  EXPECT_TRUE(is_fast_geometry(params));
  params.q.shape[1] = 65;
  EXPECT_FALSE(is_fast_geometry(params));
}

}  // namespace
}  // namespace msa::cuda
