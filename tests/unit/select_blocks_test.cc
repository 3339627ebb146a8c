// SPDX-License-Identifier: Apache-2.0
// Block selection on every backend and instruction set: equal to the reference wherever arithmetic is exact, right
// within the rounding of two dot products elsewhere (SPEC sections 2 and 6), and its oracle.
#include "msa/select_blocks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "src/core/layout.h"
#include "src/reference/rows.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/selection.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// A problem with one group whose token scores are given: index_dim 16, q_idx = (1, 0, ...), k_idx[j] = (scores[j], 0,
/// ...). Only the last token queries.
Problem with_scores(const std::vector<double>& scores, std::int64_t block_size, std::int64_t topk,
                    DType dtype = DType::kFloat32) {
  Problem problem(
      Case{{1, 1, 16, 16, 16, block_size, topk}, {{1, static_cast<std::int64_t>(scores.size())}}, dtype, dtype});
  problem.q_idx.fill(0);
  problem.q_idx.set(1, 0, 0, 0);
  problem.k_idx.fill(0);
  for (std::size_t j = 0; j < scores.size(); ++j) problem.k_idx.set(scores[j], static_cast<std::int64_t>(j), 0);
  return problem;
}

/// One score a block, held by a token in the middle of the block; the other tokens score `rest`.
std::vector<double> block_scores(const std::vector<double>& scores, double rest = -100) {
  std::vector<double> tokens;
  for (std::size_t b = 0; b < scores.size(); ++b) {
    for (std::size_t j = 0; j < 16; ++j) tokens.push_back(j == (b * 7 + 3) % 16 ? scores[b] : rest);
  }
  return tokens;
}

void expect_selected(const Problem& problem, const Ids& expected) {
  for_each_target(Targets::kAll, [&](const Context& context) {
    EXPECT_EQ(row_of(run_select(context, problem.select_params()), 0, 0), expected);
  });
}

class SelectBlocks : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, SelectBlocks, ::testing::ValuesIn(all_cases()), case_name);

TEST_P(SelectBlocks, EqualsTheReferenceOnExactInputs) {
  // Integers up to 2: products and sums are exact in float32, and with dims of 16 to 256 ties are everywhere.
  Problem problem(GetParam());
  Random random(3);
  problem.q_idx.fill_integers(random, 2);
  problem.k_idx.fill_integers(random, 2);
  for (const auto& [local, init] :
       std::vector<std::pair<int, int>>{{1, 0}, {0, 0}, {2, 1}, {0, 3}, {1, 3}, {100, 100}}) {
    SCOPED_TRACE("local_blocks " + std::to_string(local) + ", init_blocks " + std::to_string(init));
    problem.local_blocks = local;
    problem.init_blocks = init;
    const Tensor expected = run_select(reference_context(), problem.select_params());
    expect_well_formed(problem, expected);
    for_each_target(Targets::kCpu, [&](const Context& context) {
      expect_same_bytes("blocks", run_select(context, problem.select_params()), expected);
    });
  }
}

TEST_P(SelectBlocks, IsRightWithinRoundingOnRandomInputs) {
  Problem problem(GetParam());
  for_each_target(Targets::kAll, [&](const Context& context) {
    const Tensor blocks = run_select(context, problem.select_params());
    expect_well_formed(problem, blocks);
    expect_selection_within_rounding(problem, blocks);
  });
}

TEST_P(SelectBlocks, OracleTakesTheBlocksOfMostMass) {
  const Problem problem(GetParam());
  const OracleBlocksParams params = problem.oracle_params();
  const std::int64_t group_size = problem.geometry.query_heads / problem.geometry.kv_heads;
  const double scale = 1 / std::sqrt(static_cast<double>(problem.geometry.head_dim));
  for_each_target(Targets::kAll, [&](const Context& context) {
    const Tensor blocks = run_oracle(context, params);
    expect_well_formed(problem, blocks);
    const reference::Keys keys(params.k, params.batch);
    reference::for_each_query(params.batch, [&](const reference::Query& query) {
      const std::int64_t visible = query.position / params.block_size + 1;
      if (visible <= params.topk) return;
      const auto prefix = reference::row_support({}, params.block_size, 0, query);
      for (std::int64_t group = 0; group < blocks.size(0); ++group) {
        std::vector<double> mass(static_cast<std::size_t>(visible), 0.0);
        double deviation = 0;  // how far float32 may take a logit: bounds the relative error of a probability
        for (std::int64_t head = group * group_size; head < (group + 1) * group_size; ++head) {
          const auto q = reference::read_row(params.q, query.row, head);
          const auto scores = reference::read_scores(q, keys, query, group, prefix, scale);
          const auto p = reference::softmax(scores).probabilities;
          for (std::size_t j = 0; j < p.size(); ++j) mass[j / static_cast<std::size_t>(params.block_size)] += p[j];
          for (const std::int64_t j : prefix) {
            const auto k = keys.read(query.sequence, j, group);
            double magnitude = 0;
            for (std::size_t d = 0; d < k.size(); ++d) magnitude += std::abs(q[d] * k[d]) * scale;
            deviation = std::max(deviation, magnitude * static_cast<double>(k.size() + 2) * 0x1p-24);
          }
        }
        // A probability is an exponential over a sum of as many, each off by `deviation`, plus the roundings of the
        // sums over the tokens and the heads and of the exponentials themselves (4 each).
        const double relative = 2 * deviation + static_cast<double>(2 * prefix.size() + 8 + group_size) * 0x1p-24;
        const Ids ids = row_of(blocks, group, query.row);
        const auto forced = core::forced_blocks(visible, params.topk, 1, 0);
        for (std::int64_t out = 0; out < visible; ++out) {
          if (std::find(ids.begin(), ids.end(), static_cast<int>(out)) != ids.end()) continue;
          for (const int in : ids) {
            if (in < 0 || forced.contains(in)) continue;
            ASSERT_LE(mass[static_cast<std::size_t>(out)] * (1 - relative),
                      mass[static_cast<std::size_t>(in)] * (1 + relative))
                << "row " << query.row << " group " << group << ": " << out << " left out, " << in << " taken";
          }
        }
      }
    });
  });
}

TEST(SelectBlocksRules, TakesTheBestBlocksAndTheLocalOne) {
  expect_selected(with_scores(block_scores({5, 9, 1, 7, 3, 0}), 16, 3), {1, 3, 5});
  expect_selected(with_scores(block_scores({5, 9, 1, 7, 3, 0}), 16, 1), {5});
  expect_selected(with_scores(block_scores({5, 9, 1, 7, 3, 99}), 16, 2), {1, 5});
}

TEST(SelectBlocksRules, EqualScoresGoToTheLowerBlock) {
  expect_selected(with_scores(block_scores({2, 2, 2, 2, 2, 2}), 16, 3), {0, 1, 5});
  expect_selected(with_scores(block_scores({1, 2, 1, 2, 2, 0}), 16, 3), {1, 3, 5});
}

TEST(SelectBlocksRules, LocalAndInitBlocksCountAgainstTopk) {
  Problem problem = with_scores(block_scores({1, 2, 3, 9, 8, 0, 0, 0}), 16, 4);
  problem.local_blocks = 0;
  expect_selected(problem, {1, 2, 3, 4});
  problem.init_blocks = 1;
  expect_selected(problem, {0, 2, 3, 4});
  problem.local_blocks = 2;
  expect_selected(problem, {0, 3, 6, 7});
  problem.init_blocks = 3;  // local first, then two init blocks: nothing is left to score
  expect_selected(problem, {0, 1, 6, 7});
  problem.local_blocks = 5;  // local alone exceed topk: the nearest ones
  expect_selected(problem, {4, 5, 6, 7});
  problem.local_blocks = 3;
  problem.init_blocks = 0;
  expect_selected(problem, {3, 5, 6, 7});
}

TEST(SelectBlocksRules, ABlockThatIsBothInitAndLocalCountsOnce) {
  Problem problem = with_scores(block_scores({1, 5, 3}), 16, 3);
  problem.local_blocks = 2;
  problem.init_blocks = 2;
  expect_selected(problem, {0, 1, 2});
  problem = with_scores(block_scores({1, 5, 3, 4, 0}), 16, 4);
  problem.local_blocks = 1;
  problem.init_blocks = 3;
  expect_selected(problem, {0, 1, 2, 4});
}

TEST(SelectBlocksRules, FewerVisibleBlocksThanTopkAreAllTaken) {
  expect_selected(with_scores(block_scores({-kInfinity, kNaN, 3}), 16, 8), {0, 1, 2, -1, -1, -1, -1, -1});
  expect_selected(with_scores({-kInfinity}, 16, 2), {0, -1});
}

TEST(SelectBlocksRules, NanRanksBelowEveryNumber) {
  // One NaN token does not hide the block's other tokens ...
  std::vector<double> tokens = block_scores({1, 9, 2, 3, 0});
  tokens[16] = kNaN;
  expect_selected(with_scores(tokens, 16, 2), {1, 4});
  // ... a block of nothing else ranks behind -inf, and is still taken before nothing.
  tokens = block_scores({kNaN, -kInfinity, kNaN, 0}, -kInfinity);
  for (std::size_t j = 0; j < 16; ++j) tokens[j] = tokens[32 + j] = kNaN;
  expect_selected(with_scores(tokens, 16, 2), {1, 3});
  expect_selected(with_scores(tokens, 16, 3), {0, 1, 3});
  expect_selected(with_scores(tokens, 16, 4), {0, 1, 2, 3});
}

TEST(SelectBlocksRules, NanAndMinusInfinityInEveryPosition) {
  // The lanes of a vector, the first and the last token, and a NaN before, behind and between numbers.
  for (std::size_t at = 0; at < 32; ++at) {
    std::vector<double> tokens(64, 1.0);
    for (std::size_t j = 32; j < 64; ++j) tokens[j] = 0;
    std::fill(tokens.begin(), tokens.begin() + 32, kNaN);
    tokens[at] = -kInfinity;
    expect_selected(with_scores(tokens, 32, 1), {1});
    Problem problem = with_scores(tokens, 32, 1);
    problem.local_blocks = 0;
    expect_selected(problem, {1});
    std::fill(tokens.begin() + 32, tokens.end(), kNaN);
    problem = with_scores(tokens, 32, 1);
    problem.local_blocks = 0;
    expect_selected(problem, {0});  // -inf beats NaN
    tokens[at] = kNaN;
    tokens[32 + at] = -kInfinity;
    problem = with_scores(tokens, 32, 1);
    problem.local_blocks = 0;
    expect_selected(problem, {1});
  }
}

TEST(SelectBlocksRules, AllNanTakesTheLowestIds) {
  const std::vector<double> tokens(16 * 5, kNaN);
  expect_selected(with_scores(tokens, 16, 3), {0, 1, 4});
}

TEST(SelectBlocksRules, AllMinusInfinityTakesTheLowestIds) {
  expect_selected(with_scores(std::vector<double>(16 * 5, -kInfinity), 16, 3), {0, 1, 4});
}

TEST(SelectBlocksRules, PlusInfinityRanksFirst) {
  expect_selected(with_scores(block_scores({1, 2, kInfinity, 1e30, 0}), 16, 2), {2, 4});
}

TEST(SelectBlocksRules, SubnormalScoresAreValues) {
  const double least = std::numeric_limits<float>::denorm_min();
  expect_selected(with_scores(block_scores({0, least, 2 * least, -least, 0}, -1), 16, 2), {2, 4});
  expect_selected(with_scores(block_scores({0, 0, least, 0, 0}, -1), 16, 2), {2, 4});
  expect_selected(with_scores(block_scores({-least, 0, -least, 0, 0}, -1), 16, 2), {1, 4});
  // Subnormal in the storage type: 2^-24 in float16, 2^-133 in bfloat16.
  expect_selected(with_scores(block_scores({0, 0, 0x1p-24, 0, 0}, -1), 16, 2, DType::kFloat16), {2, 4});
  expect_selected(with_scores(block_scores({0, 0, 0x1p-133, 0, 0}, -1), 16, 2, DType::kBFloat16), {2, 4});
}

TEST(SelectBlocksRules, MinusZeroEqualsPlusZero) {
  // All scores are zeros of either sign; the ids decide. The sign comes out of the product with -1, behind 15 zeros.
  expect_selected(with_scores(block_scores({-0.0, 0.0, -0.0, 0.0, -0.0}), 16, 3), {0, 1, 4});
  expect_selected(with_scores(block_scores({0.0, -0.0, 0.0, -0.0, 0.0}), 16, 3), {0, 1, 4});
  Problem problem = with_scores(block_scores({-0.0, 0.0, -0.0, 0.0, -0.0}), 16, 3);
  for (std::int64_t d = 1; d < 16; ++d) problem.q_idx.set(-0.0, 0, 0, d);
  expect_selected(problem, {0, 1, 4});
}

TEST(SelectBlocksRules, OverflowKeepsRowsWellFormed) {
  Problem problem(Case{{2, 2, 16, 16, 32, 16, 3}, {{20, 100}}});
  Random random(5);
  problem.q_idx.fill_normal(random, 1e30);
  problem.k_idx.fill_normal(random, 1e30);
  for_each_target(Targets::kAll, [&](const Context& context) {
    expect_well_formed(problem, run_select(context, problem.select_params()));
  });
}

TEST(SelectBlocksRules, LargestTopkOverManyBlocks) {
  Problem problem(Case{{3, 3, 16, 16, 16, 16, 64}, {{3, 16 * 150 + 5}, {2, 64 * 16}, {2, 65 * 16 + 1}}});
  Random random(6);
  for (const int bound : {1, 2, 1000}) {
    problem.q_idx.fill_integers(random, bound);
    problem.k_idx.fill_integers(random, bound);
    const Tensor expected = run_select(reference_context(), problem.select_params());
    for_each_target(Targets::kCpu, [&](const Context& context) {
      expect_same_bytes("blocks", run_select(context, problem.select_params()), expected);
    });
  }
}

TEST(SelectBlocksRules, RisingAndFallingScores) {
  // Streams that replace the kept blocks at every step, and never.
  std::vector<double> rising;
  std::vector<double> falling;
  for (int b = 0; b < 40; ++b) {
    rising.push_back(b);
    falling.push_back(-b);
  }
  expect_selected(with_scores(block_scores(rising), 16, 4), {36, 37, 38, 39});
  expect_selected(with_scores(block_scores(falling), 16, 4), {0, 1, 2, 39});
}

}  // namespace
}  // namespace msa::testing
