// SPDX-License-Identifier: Apache-2.0
// The fast KL loss for Hopper, run by the emulator: value, saved log-sums and gradients within the tolerance rule of
// the reference over the fast geometries and both stages, the same bits in any order of blocks and threads, with
// asynchronous operations early or late, packed or paged, alone or in a batch; what nobody sees reaches nobody; and its
// plan.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "src/cuda/index_kl.cu"
#include "src/cuda/sparse_attention.h"
#include "tests/cuda/fast_support.h"
#include "tests/cuda/generic_support.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::cuda {
namespace {

using msa::testing::all_options;
using msa::testing::Case;
using msa::testing::copy_of;
using msa::testing::edges;
using msa::testing::expect_same_bytes;
using msa::testing::expect_within_rule;
using msa::testing::KlGradients;
using msa::testing::KlResult;
using msa::testing::Layout;
using msa::testing::Lengths;
using msa::testing::PagedProblem;
using msa::testing::Problem;
using msa::testing::reference_context;
using msa::testing::slice;
using msa::testing::Tensor;
using msa::testing::Workspace;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// `params` with default scales, in contiguous tensors, which the copy engine wants; they live as long as this.
struct Prepared {
  explicit Prepared(const IndexKlParams& wanted)
      : q(copy_of(wanted.q, Layout::kContiguous)),
        k(copy_of(wanted.k, Layout::kContiguous)),
        q_idx(copy_of(wanted.q_idx, Layout::kContiguous)),
        k_idx(copy_of(wanted.k_idx, Layout::kContiguous)),
        params(msa::testing::with_scale(wanted)) {
    params.q = q.view();
    params.k = k.view();
    params.q_idx = q_idx.view();
    params.k_idx = k_idx.view();
    EXPECT_TRUE(takes_index_kl(params));
  }
  Tensor q, k, q_idx, k_idx;
  IndexKlParams params;
};

Context context_with(Workspace& workspace) {
  Context context;
  context.workspace = workspace.data();
  return context;
}

/// How the small problems of these tests are cut up as large ones are.
struct Cut {
  std::int64_t queries_at_once = 0;  ///< 0: all of them
  std::int64_t item_queries = 0;     ///< backward; 0: as ever
};
/// The plan for all queries at once has room enough for fewer.
IndexKlPlan cut_plan(IndexKlPlan plan, const Cut& cut) {
  if (cut.queries_at_once > 0) plan.queries_at_once = cut.queries_at_once;
  return plan;
}

KlResult run(const IndexKlParams& wanted, const Cut& cut = {}) {
  const Prepared prepared(wanted);
  const IndexKlParams& params = prepared.params;
  KlResult result;
  result.value = std::numeric_limits<float>::quiet_NaN();
  result.lse_main = Tensor(DType::kFloat32, {params.q.size(0), params.q.size(1)});
  result.lse_index = Tensor(DType::kFloat32, {params.q.size(0), params.q_idx.size(1)});
  result.teacher_norm = Tensor(DType::kFloat32, {params.q.size(0), params.q_idx.size(1)});
  const IndexKlPlan plan = cut_plan(plan_fast_index_kl(params, 0), cut);
  Workspace workspace(plan.bytes);
  run_kl(context_with(workspace), params, plan, result.saved(), 3, &result.value);
  EXPECT_TRUE(workspace.guard_intact());
  for (const Tensor* tensor : {&result.lse_main, &result.lse_index, &result.teacher_norm}) {
    EXPECT_TRUE(tensor->gaps_intact());
  }
  return result;
}

KlGradients run_backward(const IndexKlParams& wanted, KlResult& forward, float grad_output, const Cut& cut = {}) {
  const Prepared prepared(wanted);
  const IndexKlParams& params = prepared.params;
  KlGradients grads{Tensor(params.q_idx.dtype, {params.q_idx.size(0), params.q_idx.size(1), params.q_idx.size(2)}),
                    Tensor(params.k_idx.dtype, {params.k_idx.size(0), params.k_idx.size(1)})};
  const IndexKlPlan plan = cut_plan(plan_fast_index_kl_backward(params, 0, cut.item_queries), cut);
  Workspace workspace(plan.bytes);
  run_kl_backward(context_with(workspace), params, plan, forward.saved(), 3, &grad_output, grads.dq_idx.view(),
                  grads.dk_idx.view());
  EXPECT_TRUE(workspace.guard_intact());
  EXPECT_TRUE(grads.dq_idx.gaps_intact());
  EXPECT_TRUE(grads.dk_idx.gaps_intact());
  return grads;
}

struct Everything {
  KlResult forward;
  KlGradients grads;
};
Everything run_both(const IndexKlParams& params, float grad_output = 1, const Cut& cut = {}) {
  Everything all{run(params, cut), {}};
  all.grads = run_backward(params, all.forward, grad_output, cut);
  return all;
}

void expect_same(const KlResult& a, const KlResult& b) {
  expect_same_bytes("lse_main", a.lse_main, b.lse_main);
  expect_same_bytes("lse_index", a.lse_index, b.lse_index);
  expect_same_bytes("teacher_norm", a.teacher_norm, b.teacher_norm);
  EXPECT_EQ(a.value, b.value);
}
void expect_same(const Everything& a, const Everything& b) {
  expect_same(a.forward, b.forward);
  expect_same_bytes("dq_idx", a.grads.dq_idx, b.grads.dq_idx);
  expect_same_bytes("dk_idx", a.grads.dk_idx, b.grads.dk_idx);
}

// Padding rows are not compared: there the reference leaves teacher_norm to itself.
std::vector<double> of_queries(const Tensor& tensor, const Problem& problem) {
  return copy_of(slice(tensor.view(), 0, problem.queries())).values();
}

void expect_within_rule_of_reference(const Problem& problem, bool whole_prefix, const Cut& cut = {}) {
  const auto grad_output = static_cast<float>(std::max<std::int64_t>(1, problem.queries()));
  const Problem wide = problem.as_float32();
  KlResult exact = msa::testing::run_kl(reference_context(), wide.kl_params(whole_prefix));
  const KlResult naive = msa::testing::naive_kl(problem.kl_params(whole_prefix));
  const Everything got = run_both(problem.kl_params(whole_prefix), grad_output, cut);
  expect_within_rule("value", {got.forward.value}, {exact.value}, {naive.value}, problem.q.dtype());
  expect_within_rule("lse_main", got.forward.lse_main, exact.lse_main, naive.lse_main);
  expect_within_rule("lse_index", got.forward.lse_index, exact.lse_index, naive.lse_index);
  expect_within_rule("teacher_norm", of_queries(got.forward.teacher_norm, problem),
                     of_queries(exact.teacher_norm, problem), of_queries(naive.teacher_norm, problem), DType::kFloat32);
  const KlGradients exact_grads =
      msa::testing::run_kl_backward(reference_context(), wide.kl_params(whole_prefix), exact, grad_output);
  const KlGradients naive_grads = msa::testing::naive_kl_backward(problem.kl_params(whole_prefix), grad_output);
  expect_within_rule("dq_idx", got.grads.dq_idx, exact_grads.dq_idx, naive_grads.dq_idx);
  expect_within_rule("dk_idx", got.grads.dk_idx, exact_grads.dk_idx, naive_grads.dk_idx);
}

std::vector<Case> fast_cases() {
  const DType bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  // query_heads, kv_heads, head_dim, value_dim, index_dim, block_size, topk
  return {
      {{8, 2, 128, 16, 128, 128, 3}, edges(128), bf16, bf16, Layout::kContiguous, 3},
      {{6, 2, 64, 16, 128, 64, 2}, edges(64), f16, f16, Layout::kContiguous, 2},
      {{3, 3, 64, 16, 64, 64, 3}, {{150, 200}, {7, 7}}, bf16, bf16, Layout::kContiguous, 5},
      {{7, 1, 128, 16, 64, 64, 4}, {{16, 3 * 64 + 7}, {3, 3 * 64}, {0, 64}}, f16, f16, Layout::kContiguous, 0},
      {{4, 2, 64, 16, 64, 128, 16}, {{1, 128}, {70, 300}, {1, 129}}, f16, f16, Layout::kContiguous, 1},
      {{2, 1, 128, 16, 128, 64, 64}, {{40, 40}, {2, 500}}, bf16, bf16, Layout::kContiguous, 1},
      {{64, 1, 64, 16, 64, 64, 2}, {{5, 100}, {1, 1}}, bf16, bf16, Layout::kContiguous, 0},
      {{1, 1, 64, 16, 128, 128, 1}, {{140, 260}}, bf16, bf16, Layout::kContiguous, 0},
  };
}

class FastIndexKl : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, FastIndexKl, ::testing::ValuesIn(fast_cases()), msa::testing::case_name);

TEST_P(FastIndexKl, IsWithinTheRule) {
  Problem problem(GetParam());
  for (const Teacher teacher : {Teacher::kMean, Teacher::kMax}) {
    problem.teacher = teacher;
    for (const bool whole_prefix : {false, true}) {
      SCOPED_TRACE(std::string(whole_prefix ? "whole prefix" : "selected") +
                   (teacher == Teacher::kMean ? ", mean" : ", max"));
      expect_within_rule_of_reference(problem, whole_prefix);
    }
  }
}

TEST_P(FastIndexKl, IsTheSameHoweverItRuns) {
  const Problem problem(GetParam());
  const std::int64_t block_size = problem.geometry.block_size;
  for (const bool whole_prefix : {false, true}) {
    SCOPED_TRACE(whole_prefix);
    const Everything got = run_both(problem.kl_params(whole_prefix));
    for (const emulator::Options& options : all_options()) {
      const emulator::WithOptions with(options);
      expect_same(run_both(problem.kl_params(whole_prefix)), got);
    }
    const Cut thirds{problem.queries() / 3 + 1, 0};
    if (!whole_prefix) expect_same(run_both(problem.kl_params(false), 1, thirds), got);
    expect_same(run(PagedProblem(problem, block_size).kl_params(whole_prefix)), got.forward);
    expect_same(run(PagedProblem(problem, 2 * block_size).kl_params(whole_prefix)), got.forward);
  }
}

TEST_P(FastIndexKl, DoesNotDependOnTheBatch) {
  Problem problem(GetParam());
  // The loss is a mean over the batch's queries. With as many queries for grad_output, and a power of two for the
  // scale, what (Q - P) is multiplied with is exactly the same in every batch.
  problem.index_scale = 0.125;
  for (const bool whole_prefix : {false, true}) {
    SCOPED_TRACE(whole_prefix);
    const Everything got = run_both(problem.kl_params(whole_prefix), static_cast<float>(problem.queries()));
    for (std::int64_t s = 0; s < problem.sequences(); ++s) {
      const auto at = static_cast<std::size_t>(s);
      const std::int64_t begin = problem.cu_seqlens_q[at], end = problem.cu_seqlens_q[at + 1];
      const std::int64_t first_key = problem.cu_seqlens_k[at], end_key = problem.cu_seqlens_k[at + 1];
      if (begin == end) continue;
      Problem alone = problem.only(s);
      alone.index_scale = problem.index_scale;
      const Everything part = run_both(alone.kl_params(whole_prefix), static_cast<float>(end - begin));
      const auto expect_same_rows = [](const char* what, const Tensor& some, const Tensor& all, std::int64_t first,
                                       std::int64_t last) {
        expect_same_bytes(what, some.bytes(0, 0, last - first), all.bytes(0, first, last));
      };
      expect_same_rows("lse_main", part.forward.lse_main, got.forward.lse_main, begin, end);
      expect_same_rows("lse_index", part.forward.lse_index, got.forward.lse_index, begin, end);
      expect_same_rows("dq_idx", part.grads.dq_idx, got.grads.dq_idx, begin, end);
      expect_same_rows("dk_idx", part.grads.dk_idx, got.grads.dk_idx, first_key, end_key);
    }
  }
}

TEST(FastIndexKlRules, ABlockOfManyQueriesIsSharedOut) {
  Problem problem(
      Case{{4, 2, 64, 16, 64, 64, 2}, {{300, 400}, {9, 130}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  for (std::int64_t group = 0; group < 2; ++group) {
    for (std::int64_t row = 0; row < 300; ++row) {
      problem.blocks.set(0, group, row, 0);
      problem.blocks.set((row + 100) / 64, group, row, 1);
    }
  }
  for (const bool whole_prefix : {false, true}) {
    SCOPED_TRACE(whole_prefix);
    // An item takes a tile and a half, which is two: the next one starts with a tile of its own.
    expect_within_rule_of_reference(problem, whole_prefix, {0, 192});
    const Everything got = run_both(problem.kl_params(whole_prefix), 1, {0, 256});
    const emulator::WithOptions with({true, emulator::BlockOrder::kShuffled, true, 9});
    expect_same(run_both(problem.kl_params(whole_prefix), 1, {0, 256}), got);
    // Chunks that end within an item, and within a tile.
    if (!whole_prefix) expect_same(run_both(problem.kl_params(false), 1, {90, 256}), got);
  }
}

TEST(FastIndexKlRules, ASampleOfRowsGivesTheirBits) {
  Problem problem(
      Case{{4, 2, 64, 16, 64, 64, 3}, {{150, 200}, {70, 70}}, DType::kFloat16, DType::kFloat16, Layout::kContiguous});
  problem.index_scale = 0.125;
  const std::vector<std::int64_t> rows = {0, 1, 13, 14, 78, 79, 130, 149, 150, 199, 213, 214, 219};
  Problem some = problem.sample(rows);
  some.index_scale = problem.index_scale;
  for (const bool whole_prefix : {false, true}) {
    SCOPED_TRACE(whole_prefix);
    const Everything all = run_both(problem.kl_params(whole_prefix), 220);
    const Everything got = run_both(some.kl_params(whole_prefix), static_cast<float>(rows.size()));
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const auto at = static_cast<std::int64_t>(i);
      expect_same_bytes("lse_main", got.forward.lse_main.bytes(0, at, at + 1),
                        all.forward.lse_main.bytes(0, rows[i], rows[i] + 1));
      expect_same_bytes("dq_idx", got.grads.dq_idx.bytes(0, at, at + 1),
                        all.grads.dq_idx.bytes(0, rows[i], rows[i] + 1));
    }
    expect_within_rule_of_reference(some, whole_prefix);
  }
}

TEST(FastIndexKlRules, WhatIsNotSeenNeverReaches) {
  // Sequence 0 of two, 40 queries at the end of 104 tokens; from position 80 on the keys of one branch, or the index
  // query of position 80 alone, are not finite.
  const Problem clean(
      Case{{4, 2, 64, 16, 64, 64, 2}, {{40, 104}, {30, 40}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  for (const bool whole_prefix : {false, true}) {
    const Everything want = run_both(clean.kl_params(whole_prefix));
    for (const double poison : {kNaN, kInfinity, -kInfinity}) {
      for (const std::string what : {"k", "k_idx", "q_idx"}) {
        SCOPED_TRACE(what + " " + std::to_string(poison) + (whole_prefix ? " whole" : " selected"));
        Problem problem = clean;
        for (std::int64_t position = 80; position < 104; ++position) {
          if (what == "k") problem.k.set(poison, position, 1, 3);
          if (what == "k_idx") problem.k_idx.set(poison, position, 60);
        }
        if (what == "q_idx") problem.q_idx.set(poison, 16, 1, 60);
        const Everything got = run_both(problem.kl_params(whole_prefix));
        expect_same_bytes("lse_main", got.forward.lse_main.bytes(0, 0, 16), want.forward.lse_main.bytes(0, 0, 16));
        expect_same_bytes("lse_index", got.forward.lse_index.bytes(0, 0, 16), want.forward.lse_index.bytes(0, 0, 16));
        expect_same_bytes("dq before", got.grads.dq_idx.bytes(0, 0, 16), want.grads.dq_idx.bytes(0, 0, 16));
        expect_same_bytes("dq elsewhere", got.grads.dq_idx.bytes(0, 40, 70), want.grads.dq_idx.bytes(0, 40, 70));
        expect_same_bytes("dk elsewhere", got.grads.dk_idx.bytes(0, 104, 144), want.grads.dk_idx.bytes(0, 104, 144));
        EXPECT_FALSE(std::isfinite(got.grads.dq_idx.at(16, 1, 0)));
        if (what == "q_idx") {  // the keys behind position 80 see no more of it than it of them
          expect_same_bytes("dq behind", got.grads.dq_idx.bytes(0, 17, 40), want.grads.dq_idx.bytes(0, 17, 40));
          expect_same_bytes("dk behind", got.grads.dk_idx.bytes(0, 81, 104), want.grads.dk_idx.bytes(0, 81, 104));
          EXPECT_FALSE(std::isfinite(got.grads.dk_idx.at(80, 5)));
        }
        if (what == "k") {
          for (std::int64_t row = 16; row < 40; ++row) {
            EXPECT_EQ(got.grads.dq_idx.at(row, 0, 5), want.grads.dq_idx.at(row, 0, 5)) << "group 0 has no poison";
          }
        }
      }
    }
  }
}

TEST(FastIndexKlRules, RowsWithoutBlocksAndPaddingRowsAreInert) {
  Case c{{4, 2, 64, 16, 128, 64, 2}, {{6, 140}, {3, 3}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous};
  c.padding_rows = 4;
  Problem problem(c);
  for (const std::int64_t row : {0, 3, 8}) {
    for (std::int64_t slot = 0; slot < 2; ++slot) problem.blocks.set(-1, 1, row, slot);
  }
  problem.blocks.set(1 << 20, 1, 4, 1);  // an id that was never checked counts as absent
  problem.blocks.set(-3, 1, 4, 0);
  const Everything got = run_both(problem.kl_params(false));
  EXPECT_TRUE(std::isfinite(got.forward.value));
  for (const std::int64_t row : {0, 3, 4, 8, 9, 10, 11, 12}) {
    EXPECT_EQ(got.forward.lse_main.at(row, 3), -kInfinity);
    EXPECT_EQ(got.forward.lse_index.at(row, 1), -kInfinity);
    EXPECT_EQ(got.forward.teacher_norm.at(row, 1), 0);
    for (std::int64_t d = 0; d < 128; ++d) EXPECT_EQ(got.grads.dq_idx.at(row, 1, d), 0);
    EXPECT_EQ(std::isfinite(got.forward.lse_index.at(row, 0)), row < 9);
  }
  for (std::int64_t row = 143; row < 147; ++row) {
    for (std::int64_t d = 0; d < 128; ++d) EXPECT_EQ(got.grads.dk_idx.at(row, d), 0);
  }
}

TEST(FastIndexKlRules, ABlockThatARowNamesTwiceIsVisitedOnce) {
  // Ids that a caller vouched for, wrongly: what the row's own query gets is open, the other rows and the keys are not.
  Problem problem(
      Case{{4, 2, 64, 16, 64, 64, 2}, {{200, 260}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  for (std::int64_t group = 0; group < 2; ++group) {
    for (std::int64_t row = 0; row < 200; ++row) {
      problem.blocks.set(0, group, row, 0);
      problem.blocks.set(-1, group, row, 1);
    }
  }
  KlResult forward = run(problem.kl_params(false));
  for (const std::int64_t twice : {3, 60, 200}) {  // visits of 200 rows: the padding is a tile's end, whole items
    for (std::int64_t row = 200 - twice; row < 200; ++row) problem.blocks.set(-1, 0, row, 1);
    const KlGradients want = run_backward(problem.kl_params(false), forward, 1, {0, 128});
    for (std::int64_t row = 200 - twice; row < 200; ++row) problem.blocks.set(0, 0, row, 1);
    for (const std::int64_t queries_at_once : {0, 90}) {
      SCOPED_TRACE(std::to_string(twice) + " rows, " + std::to_string(queries_at_once) + " at once");
      const KlGradients got = run_backward(problem.kl_params(false), forward, 1, {queries_at_once, 128});
      expect_same_bytes("dk_idx", got.dk_idx, want.dk_idx);
      expect_same_bytes("dq_idx", got.dq_idx.bytes(0, 0, 200 - twice), want.dq_idx.bytes(0, 0, 200 - twice));
    }
  }
}

TEST(FastIndexKlRules, NothingToDo) {
  Case c{{4, 2, 64, 16, 64, 64, 2}, {{0, 0}, {0, 9}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous, 2};
  for (const bool has_keys : {true, false}) {
    if (!has_keys) c = {c.geometry, {{0, 0}}, c.dtype, c.index_dtype, c.layout, 0};
    const Problem problem(c);
    for (const bool whole_prefix : {false, true}) {
      const Everything got = run_both(problem.kl_params(whole_prefix));
      EXPECT_EQ(got.forward.value, 0);
      for (const double value : got.grads.dq_idx.values()) EXPECT_EQ(value, 0);
      for (const double value : got.grads.dk_idx.values()) EXPECT_EQ(value, 0);
    }
  }
}

TEST(FastIndexKlRules, ScalesAreArgumentsAndLargeLogitsDoNotOverflow) {
  Problem problem(
      Case{{4, 2, 64, 16, 64, 64, 3}, {{20, 150}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous});
  for (const double scale : {0.0, -0.5, 3.0}) {
    SCOPED_TRACE(scale);
    problem.scale = scale;
    problem.index_scale = scale / 3;
    Problem wide = problem.as_float32();
    wide.scale = problem.scale;
    wide.index_scale = problem.index_scale;
    const KlResult exact = msa::testing::run_kl(reference_context(), wide.kl_params(false));
    const KlResult naive = msa::testing::naive_kl(problem.kl_params(false));
    const KlResult got = run(problem.kl_params(false));
    expect_within_rule("value", {got.value}, {exact.value}, {naive.value}, DType::kBFloat16);
    expect_within_rule("lse_main", got.lse_main, exact.lse_main, naive.lse_main);
    expect_within_rule("lse_index", got.lse_index, exact.lse_index, naive.lse_index);
  }
}

IndexKlParams paper_shapes(std::int64_t tokens, bool is_dense) {
  const auto view = [](std::initializer_list<std::int64_t> shape) {
    return make_view(static_cast<const void*>(nullptr), DType::kBFloat16, shape);
  };
  IndexKlParams params;
  params.q = view({tokens, 64, 128});
  params.k = view({tokens, 4, 128});
  params.q_idx = view({tokens, 4, 128});
  params.k_idx = view({tokens, 128});
  if (!is_dense) params.blocks = make_view(static_cast<const std::int32_t*>(nullptr), {4, tokens, 16});
  static const std::int32_t none[2] = {0, 0};
  params.batch = Batch::packed(none, none);
  return params;
}

TEST(IndexKlPlan, RespectsItsLimit) {
  const IndexKlParams params = paper_shapes(131072, false);
  EXPECT_TRUE(takes_index_kl(params));
  std::int64_t last[2] = {0, 0};
  for (const std::size_t limit : {std::size_t{1} << 29, std::size_t{3} << 28, std::size_t{1} << 30}) {
    const IndexKlPlan plans[2] = {plan_fast_index_kl(params, limit / 4), plan_fast_index_kl_backward(params, limit)};
    for (int i = 0; i < 2; ++i) {
      EXPECT_LE(plans[i].bytes, i == 0 ? limit / 4 : limit);
      EXPECT_GT(plans[i].queries_at_once, last[i]);
      last[i] = plans[i].queries_at_once;
    }
  }
  // What is given back by the `..._workspace` functions is enough for a plan of the same bytes.
  for (const std::int64_t tokens : {300, 131072, 1 << 20}) {
    for (const bool is_dense : {false, true}) {
      const IndexKlParams shapes = paper_shapes(tokens, is_dense);
      const std::size_t forward = plan_fast_index_kl(shapes, 0).bytes;
      const std::size_t backward = plan_fast_index_kl_backward(shapes, 0).bytes;
      EXPECT_LE(plan_fast_index_kl(shapes, forward).bytes, forward);
      EXPECT_LE(plan_fast_index_kl_backward(shapes, backward).bytes, backward);
    }
  }
  EXPECT_LE(plan_fast_index_kl(paper_shapes(1 << 20, false), 0).bytes, kDefaultWorkspace);
}

TEST(IndexKlPlan, FastGeometries) {
  IndexKlParams params = paper_shapes(4, false);
  params.block_size = 32;
  EXPECT_FALSE(takes_index_kl(params));
  params.block_size = 64;
  EXPECT_TRUE(takes_index_kl(params));
  params.q_idx.dtype = params.k_idx.dtype = DType::kFloat32;  // an index branch of another type
  EXPECT_FALSE(takes_index_kl(params));
  params = paper_shapes(4, true);
  EXPECT_TRUE(takes_index_kl(params));
  params.q_idx.shape[2] = params.k_idx.shape[1] = 32;
  EXPECT_FALSE(takes_index_kl(params));
}

}  // namespace
}  // namespace msa::cuda
