// SPDX-License-Identifier: Apache-2.0
// Top-k of given scores on every backend and instruction set: equal to the reference, id for id, on rows shaped to meet
// every path of the vector code: ties across the border, NaN, zeros of both signs, streams that overflow its buffer.
#include "msa/topk.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "msa/error.h"
#include "msa/select_blocks.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tensor.h"
#include "tests/unit/support/tolerance.h"

namespace msa::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kLeast = std::numeric_limits<float>::denorm_min();

using Ids = std::vector<int>;
using Row = std::vector<double>;

Tensor run_topk(const Context& context, const Tensor& scores, std::int64_t topk) {
  Tensor ids(DType::kInt32, {scores.size(0), topk});
  topk_blocks(context, {.scores = scores.view(), .topk = topk}, ids.view());
  EXPECT_TRUE(ids.gaps_intact()) << "wrote beside the ids";
  return ids;
}

Tensor scores_of(const std::vector<Row>& rows) {
  Tensor scores(DType::kFloat32, {static_cast<std::int64_t>(rows.size()), static_cast<std::int64_t>(rows[0].size())});
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t b = 0; b < rows[r].size(); ++b) {
      scores.set(rows[r][b], static_cast<std::int64_t>(r), static_cast<std::int64_t>(b));
    }
  }
  return scores;
}

void expect_ids(const Row& row, std::int64_t topk, const Ids& expected) {
  const Tensor scores = scores_of({row});
  for_each_target(Targets::kAll, [&](const Context& context) {
    const Tensor ids = run_topk(context, scores, topk);
    Ids actual;
    for (std::int64_t slot = 0; slot < topk; ++slot) actual.push_back(static_cast<int>(ids.at(0, slot)));
    EXPECT_EQ(actual, expected);
  });
}

// The rules again, spelled out another way than the reference does: an order in which NaN comes last.
Ids sorted_choice(const Tensor& scores, std::int64_t row, std::int64_t topk) {
  Ids ids(static_cast<std::size_t>(scores.size(1)));
  std::iota(ids.begin(), ids.end(), 0);
  const auto rank = [&](int id) {
    const double score = scores.at(row, id);
    return std::isnan(score) ? std::pair(1, 0.0) : std::pair(0, score == 0 ? 0.0 : -score);
  };
  std::sort(ids.begin(), ids.end(), [&](int a, int b) { return std::pair(rank(a), a) < std::pair(rank(b), b); });
  ids.resize(std::min(ids.size(), static_cast<std::size_t>(topk)));
  std::sort(ids.begin(), ids.end());
  ids.resize(static_cast<std::size_t>(topk), -1);
  return ids;
}

// Around the lanes of every vector (4, 8, 16), the groups of the first pass (64) and the buffer of survivors (512).
const std::vector<std::int64_t> kBlocks = {0,  1,  2,  3,  4,  5,  7,   8,   9,   15,  16,  17,  31,  32,   33,
                                           47, 63, 64, 65, 79, 80, 127, 128, 129, 255, 511, 513, 577, 1000, 2049};
const std::vector<std::int64_t> kTopk = {1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64};

/// Fills row `row` of scores; b counts its blocks.
struct Pattern {
  const char* name;
  std::function<double(Random&, std::int64_t b, std::int64_t blocks)> score;
};

double uniform(Random& random) { return std::uniform_real_distribution<float>(-1, 1)(random); }

const std::vector<Pattern> kPatterns = {
    {"normal", [](Random& random, auto, auto) { return std::normal_distribution<float>()(random); }},
    {"ties", [](Random& random, auto, auto) { return std::uniform_int_distribution<int>(-2, 2)(random); }},
    {"ascending", [](Random&, auto b, auto) { return static_cast<double>(b) - 700; }},
    {"descending", [](Random&, auto b, auto) { return 700 - static_cast<double>(b); }},
    {"all equal", [](Random&, auto, auto) { return -3.5; }},
    {"all NaN", [](Random&, auto, auto) { return kNaN; }},
    {"all -inf", [](Random&, auto, auto) { return -kInfinity; }},
    {"all +inf", [](Random&, auto, auto) { return kInfinity; }},
    {"zeros of both signs", [](Random& random, auto, auto) { return random() % 2 != 0 ? 0.0 : -0.0; }},
    {"zeros and subnormals",
     [](Random& random, auto, auto) {
       return Row{0.0, -0.0, kLeast, -kLeast, 2 * kLeast}[random() % 5];
     }},
    {"mostly NaN", [](Random& random, auto, auto) { return random() % 16 != 0 ? kNaN : uniform(random); }},
    {"some NaN", [](Random& random, auto, auto) { return random() % 4 == 0 ? kNaN : uniform(random); }},
    {"NaN, infinities and ties",
     [](Random& random, auto, auto) {
       return Row{kNaN, -kInfinity, kInfinity, 1, -1}[random() % 5];
     }},
    {"-inf and NaN", [](Random& random, auto, auto) { return random() % 2 != 0 ? -kInfinity : kNaN; }},
    {"one number at the end", [](Random&, auto b, auto blocks) { return b == blocks - 1 ? -5.0 : kNaN; }},
    // All that counts in one lane of 16: the bound is low, and what reaches it overflows the buffer.
    {"one lane ascending", [](Random&, auto b, auto) { return b % 16 == 5 ? 1000.0 + static_cast<double>(b) : -1.0; }},
    {"fifteen lanes ascending",
     [](Random&, auto b, auto) { return b % 16 == 5 ? -1.0 : 1000.0 + static_cast<double>(b); }},
    {"fifteen lanes descending", [](Random&, auto b, auto) { return b % 16 == 5 ? -1e6 : -static_cast<double>(b); }},
    {"one lane NaN", [](Random&, auto b, auto) { return b % 16 == 3 ? kNaN : static_cast<double>(b % 7); }},
    // A tie at the border of the selection, before, between and behind higher scores.
    {"few above a tie", [](Random& random, auto, auto) { return random() % 32 == 0 ? 1 + uniform(random) : -2.0; }},
    {"close scores", [](Random& random, auto, auto) { return 1 + 0x1p-23 * static_cast<double>(random() % 1024); }},
    {"both ends of the range",
     [](Random& random, auto, auto) { return std::ldexp(uniform(random), static_cast<int>(random() % 250) - 125); }},
};

TEST(TopkBlocks, EqualsTheReference) {
  Random random(11);
  for (const std::int64_t blocks : kBlocks) {
    Tensor scores(DType::kFloat32, {static_cast<std::int64_t>(kPatterns.size()), blocks});
    for (std::size_t row = 0; row < kPatterns.size(); ++row) {
      for (std::int64_t b = 0; b < blocks; ++b) {
        scores.set(kPatterns[row].score(random, b, blocks), static_cast<std::int64_t>(row), b);
      }
    }
    for (const std::int64_t topk : kTopk) {
      SCOPED_TRACE(std::to_string(blocks) + " blocks, topk " + std::to_string(topk));
      for_each_target(Targets::kAll, [&](const Context& context) {
        const Tensor ids = run_topk(context, scores, topk);
        for (std::size_t row = 0; row < kPatterns.size(); ++row) {
          const auto r = static_cast<std::int64_t>(row);
          Ids actual;
          for (std::int64_t slot = 0; slot < topk; ++slot) actual.push_back(static_cast<int>(ids.at(r, slot)));
          ASSERT_EQ(actual, sorted_choice(scores, r, topk)) << kPatterns[row].name;
        }
      });
    }
  }
}

TEST(TopkBlocks, Rules) {
  expect_ids({5, 9, 1, 7, 3, 0}, 2, {1, 3});
  expect_ids({2, 2, 2, 2, 2, 2}, 3, {0, 1, 2});
  expect_ids({1, 2, 1, 2, 2, 0}, 2, {1, 3});
  expect_ids({-0.0, 0.0, -0.0}, 2, {0, 1});
  expect_ids({0.0, kLeast, -kLeast}, 1, {1});
  expect_ids({kNaN, -kInfinity, kNaN, 0}, 3, {0, 1, 3});
  expect_ids({kNaN, kNaN, kNaN}, 2, {0, 1});
  expect_ids({1, kInfinity, 2}, 1, {1});
  expect_ids({kNaN, 1}, 4, {0, 1, -1, -1});
}

TEST(TopkBlocks, MatchesALongRowOfEveryKind) {
  // Longer than any cache of ids: many refills of the buffer, ids beyond 16 bits.
  const std::int64_t blocks = 70000;
  Tensor scores(DType::kFloat32, {5, blocks}, Layout::kContiguous);
  Random random(12);
  for (std::int64_t b = 0; b < blocks; ++b) {
    scores.set(std::normal_distribution<float>()(random), 0, b);
    scores.set(b % 16 == 9 ? -1e9 : static_cast<double>(b), 1, b);
    scores.set(b % 16 == 9 ? -1e9 : 1.0, 2, b);
    scores.set(b < blocks - 20 ? kNaN : 1.0, 3, b);
    scores.set(static_cast<double>((b * 7919) % 1009), 4, b);
  }
  for (const std::int64_t topk : {1, 16, 64}) {
    const Tensor expected = run_topk(reference_context(), scores, topk);
    for_each_target(Targets::kCpu, [&](const Context& context) {
      expect_same_bytes("ids", run_topk(context, scores, topk), expected);
    });
  }
}

TEST(TopkBlocks, ManyRowsOnAnyNumberOfThreads) {
  Tensor scores(DType::kFloat32, {401, 130});
  Random random(13);
  scores.fill_integers(random, 20);
  const Tensor expected = run_topk(reference_context(), scores, 9);
  for_each_target(Targets::kCpu, [&](Context context) {
    for (const int threads : {1, 2, 3, 8}) {
      context.threads = threads;
      expect_same_bytes("ids", run_topk(context, scores, 9), expected);
    }
  });
}

TEST(TopkBlocks, NoRowsAndNoBlocks) {
  for_each_target(Targets::kAll, [&](const Context& context) {
    EXPECT_EQ(run_topk(context, Tensor(DType::kFloat32, {0, 5}), 3).elements(), 0);
    const Tensor ids = run_topk(context, Tensor(DType::kFloat32, {2, 0}), 3);
    for (const double id : ids.values()) EXPECT_EQ(id, -1);
  });
}

TEST(TopkBlocks, RefusesBadInput) {
  const Tensor scores(DType::kFloat32, {3, 40});
  Tensor ids(DType::kInt32, {3, 4});
  const auto refuse = [&](const std::string& argument,
                          const std::function<void(TopkBlocksParams&, TensorView&)>& change) {
    TopkBlocksParams params{.scores = scores.view(), .topk = 4};
    TensorView out = ids.view();
    change(params, out);
    const std::string start = "topk_blocks: " + argument + ": ";
    try {
      topk_blocks(Context(), params, out);
      ADD_FAILURE() << "no error; expected one that starts with \"" << start << '"';
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).substr(0, start.size()), start) << error.what();
    }
  };
  for (const std::int64_t topk : {std::int64_t{0}, std::int64_t{-1}, kMaxTopk + 1, std::int64_t{1} << 40}) {
    refuse("topk", [&](auto& params, auto&) { params.topk = topk; });
  }
  refuse("scores", [](auto& params, auto&) { params.scores.dtype = DType::kBFloat16; });
  refuse("scores", [](auto& params, auto&) { params.scores.rank = 1; });
  refuse("scores", [](auto& params, auto&) { params.scores.data = nullptr; });
  refuse("scores", [](auto& params, auto&) { params.scores.strides[1] = 2; });
  refuse("scores", [](auto& params, auto&) { params.scores.shape[1] = std::int64_t{1} << 31; });
  refuse("ids", [](auto&, auto& out) { out.dtype = DType::kFloat32; });
  refuse("ids", [](auto&, auto& out) { out.shape[0] = 2; });
  refuse("ids", [](auto&, auto& out) { out.shape[1] = 5; });
  refuse("ids", [](auto&, auto& out) { out.rank = 3; });
  refuse("ids", [](auto&, auto& out) { out.data = nullptr; });
}

}  // namespace
}  // namespace msa::testing
