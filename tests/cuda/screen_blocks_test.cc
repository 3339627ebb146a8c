// SPDX-License-Identifier: Apache-2.0
// Screened block selection in the emulator: bit for bit the unscreened one on any input, with bounds that hold, and
// given up where it does not help; and its plan. The kernels are linked from select_blocks_test.cc.
#include "src/cuda/screen_blocks.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>

#include "tests/cuda/select_support.h"

namespace msa::cuda {
namespace {

using core::ScreenSwitch;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

SelectPlan plan_with(const SelectBlocksParams& params, ScreenSwitch screening) {
  return plan_select(shape_of(params), SelectSchedule::kManyRows, screening);
}

/// Screened, in chunks of `chunk` queries (0: as planned), is what unscreened is.
void expect_unscreened(const SelectBlocksParams& params, std::int64_t chunk = 0) {
  const Tensor expected = run_planned(plan_with(params, ScreenSwitch::kNever), params, 2);
  SelectPlan plan = plan_with(params, ScreenSwitch::kAlways);
  ASSERT_TRUE(plan.screen.use);
  if (chunk > 0) plan.chunk_queries = plan.screen.first_queries = chunk;
  expect_same_bytes("blocks", run_planned(plan, params, 2), expected);
}

const std::vector<Case> kCases = {
    make_case(1, 64, 64, 2, {{1, 1}, {1, 200}, {3, 64}, {2, 900}}, DType::kBFloat16),
    make_case(4, 128, 128, 2, {{1, 128}, {1, 641}, {2, 1513}, {0, 300}, {16, 1030}}, DType::kBFloat16,
              Layout::kContiguous, 3),
    make_case(3, 128, 64, 3, {{90, 700}, {5, 5}, {30, 400}}, DType::kFloat16, Layout::kHeadsFirst, 1),
    make_case(5, 64, 128, 2, {{0, 0}, {60, 1300}, {1, 1}, {7, 900}}, DType::kFloat16),
    make_case(2, 64, 64, 5, {{300, 1000}}, DType::kBFloat16, Layout::kHeadsFirst),
};

class CudaScreen : public ::testing::TestWithParam<std::size_t> {
 protected:
  const Case& c() const { return kCases[GetParam()]; }
};
INSTANTIATE_TEST_SUITE_P(Cases, CudaScreen, ::testing::Range(std::size_t{0}, kCases.size()));

TEST_P(CudaScreen, SelectsWhatUnscreenedDoes) {
  Problem problem = aligned(c());
  std::size_t turn = GetParam();
  for (const auto& [local, init] : std::vector<std::pair<int, int>>{{1, 0}, {2, 1}}) {
    problem.local_blocks = local;
    problem.init_blocks = init;
    const emulator::WithOptions with(kOptions[turn++ % 3]);
    expect_unscreened(problem.select_params());
    expect_unscreened(problem.select_params(), 19);
  }
  const AlignedPages paged(problem, 2 * problem.geometry.block_size);
  const emulator::WithOptions with(kOptions[turn % 3]);
  expect_unscreened(paged.select_params());
}

TEST_P(CudaScreen, SelectsWhatUnscreenedDoesOnTies) {
  Problem problem = aligned(c());
  Random random(3);
  problem.q_idx.fill_integers(random, 2);
  problem.k_idx.fill_integers(random, 2);
  expect_unscreened(problem.select_params());
}

/// Inputs made to mislead bounds: each changes a problem of normal numbers, 3 groups, index_dim 64, 20 blocks.
struct Adversary {
  const char* name;
  std::function<void(Problem&)> change;
};

void scale(Tensor& tensor, double factor) {
  for (std::int64_t i = 0; i < tensor.size(0); ++i) {
    for (std::int64_t j = 0; j < tensor.size(1); ++j) {
      const std::int64_t depth = tensor.shape().size() == 3 ? tensor.size(2) : 1;
      for (std::int64_t d = 0; d < depth; ++d) tensor.set(tensor.at(i, j, d) * factor, i, j, d);
    }
  }
}
void for_each_key(Problem& p, const std::function<double(std::int64_t, std::int64_t, double)>& change) {
  for (std::int64_t t = 0; t < p.k_idx.size(0); ++t) {
    for (std::int64_t d = 0; d < p.k_idx.size(1); ++d) p.k_idx.set(change(t, d, p.k_idx.at(t, d)), t, d);
  }
}

const std::vector<Adversary> kAdversaries = {
    {"one channel 3000 times as strong",
     [](Problem& p) { for_each_key(p, [](auto, auto d, double x) { return d == 5 ? 3000 * x : x; }); }},
    {"a bias in every key",
     [](Problem& p) { for_each_key(p, [](auto, auto d, double x) { return 100 * (d % 3) + x; }); }},
    {"keys that hardly differ",
     [](Problem& p) {
       for_each_key(p, [](auto, auto d, double x) { return 1.0 + 0.001 * static_cast<double>(d) + 1e-3 * x; });
     }},
    {"one key far out in each third block",
     [](Problem& p) { for_each_key(p, [](auto t, auto, double x) { return t % 192 == 7 ? 1e4 * x : x; }); }},
    {"all keys zero", [](Problem& p) { p.k_idx.fill(0); }},
    {"all queries zero", [](Problem& p) { p.q_idx.fill(0); }},
    {"tiny",
     [](Problem& p) {
       scale(p.k_idx, 0x1p-80);
       scale(p.q_idx, 0x1p-30);
     }},
    {"at the edges of what is bounded",
     [](Problem& p) {
       scale(p.k_idx, 0x1p-39);
       scale(p.q_idx, 0x1p36);
     }},
    {"huge, within float", [](Problem& p) { scale(p.k_idx, 0x1p60); }},
    {"blocks of all magnitudes",
     [](Problem& p) {
       for_each_key(p, [](auto t, auto, double x) { return std::ldexp(x, static_cast<int>(t / 64 * 9 % 100) - 60); });
     }},
    {"NaN keys",
     [](Problem& p) { for_each_key(p, [](auto t, auto, double x) { return t % 97 == 0 || t / 64 == 3 ? kNaN : x; }); }},
    {"nearly all keys NaN",
     [](Problem& p) { for_each_key(p, [](auto t, auto, double x) { return t / 64 != 4 ? kNaN : x; }); }},
    {"infinite keys",
     [](Problem& p) {
       for_each_key(p, [](auto t, auto d, double x) {
         return t % 300 == 9 && d == 1 ? (t % 2 == 0 ? kInfinity : -kInfinity) : x;
       });
     }},
    {"NaN and infinite queries",
     [](Problem& p) {
       for (std::int64_t t = 0; t < p.q_idx.size(0); t += 3) p.q_idx.set(t % 2 == 0 ? kNaN : kInfinity, t, t % 3, 7);
     }},
};

TEST(CudaScreenAdversaries, SelectWhatUnscreenedDoes) {
  for (const Adversary& adversary : kAdversaries) {
    SCOPED_TRACE(adversary.name);
    Problem problem = aligned(make_case(3, 64, 64, 3, {{40, 1300}}, DType::kBFloat16));
    adversary.change(problem);
    expect_unscreened(problem.select_params());
  }
}

TEST(CudaScreenAdversaries, ScoresOneRoundingApart) {
  // Block b's best token scores 1 + b / 128 in bf16 steps, hidden among dimensions that cancel.
  Problem problem = aligned(make_case(1, 64, 64, 4, {{3, 1400}}, DType::kBFloat16));
  for_each_key(problem, [](auto t, auto d, double) {
    const double sign = d % 2 == 0 ? 1 : -1;
    if (d > 1) return sign * 50.0;
    return d == 0 && t % 64 == 11 ? 1.0 + static_cast<double>(t / 64 * 7 % 16) / 128 : 0.0;
  });
  problem.q_idx.fill(1);
  expect_unscreened(problem.select_params());
}

TEST(CudaScreenRules, MissingPagesAreNeverAddressed) {
  const Problem problem = aligned(make_case(2, 64, 64, 2, {{3, 700}, {1, 400}}, DType::kBFloat16));
  AlignedPages paged(problem, 128);
  paged.pages.page_table[1] = -1;
  paged.pages.page_table[2] = 1 << 30;
  paged.pages.page_table[4] = -5;
  expect_unscreened(paged.select_params());
}

TEST(CudaScreenRules, MoreKeysThanThereAreIsNeverBelieved) {
  // 700 keys of 12 blocks and 20 slots; a length that nobody checked says 79 blocks, from which 20 would be chosen.
  for (const std::int64_t topk : {4, 20}) {
    const Problem problem = aligned(make_case(2, 64, 64, topk, {{1, 400}, {70, 700}}, DType::kBFloat16));
    AlignedPages paged(problem, 128);
    paged.pages.seqlens_k[1] = 5000;
    expect_unscreened(paged.select_params());
  }
}

/// A screened call, and what it left in its workspace.
struct Screened {
  explicit Screened(const SelectBlocksParams& params, const SelectPlan& with)
      : plan(with), workspace(plan.bytes), blocks(run_in(workspace, plan, params, 2)) {}
  template <class T>
  const T* part(std::size_t at) {
    return reinterpret_cast<const T*>(static_cast<const std::byte*>(workspace.data()) + at);
  }
  const ScreenState& state() { return *part<ScreenState>(plan.screen.state); }

  SelectPlan plan;
  Workspace workspace;
  Tensor blocks;
};

TEST(CudaScreenBound, HoldsAndIsNotIdle) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const std::int64_t block : {64, 128}) {
      for (const std::int64_t dim : {64, 128}) {
        const Problem problem = aligned(make_case(2, dim, block, 2, {{30, 30 * block}}, dtype));
        const SelectBlocksParams params = problem.select_params();
        Screened run(params, plan_with(params, ScreenSwitch::kAlways));
        const auto* maxima = run.part<float>(run.plan.maxima);
        const auto* doubts = run.part<std::uint32_t>(run.plan.screen.doubts[0]);
        const auto* more_doubts = run.part<std::uint32_t>(run.plan.screen.doubts[1]);
        double worst = 0;
        int approximate = 0;
        for (std::int64_t row = 0; row < 60; ++row) {
          const RowBound bound = run.part<RowBound>(run.plan.screen.row_bounds)[row];
          for (std::int64_t b = 0; b < 28; ++b) {
            const std::int64_t word = b * block / 128 * run.plan.screen.row_words + row / 32;
            if (((doubts[word] | more_doubts[word]) >> (row % 32) & 1u) != 0) continue;
            double exact = -kInfinity;
            for (std::int64_t t = b * block; t < (b + 1) * block; ++t) {
              double score = 0;
              for (std::int64_t d = 0; d < dim; ++d) {
                score += problem.q_idx.at(row / 2, row % 2, d) * problem.k_idx.at(t, d);
              }
              exact = std::max(exact, score);
            }
            const KeyBound key = run.part<KeyBound>(run.plan.screen.key_bounds)[b];
            const double error = bound.copied * key.error + bound.rest * key.norm;
            const double off = std::abs(maxima[row * run.plan.maxima_stride + b] - exact);
            ASSERT_LE(off, error) << "row " << row << ", block " << b;
            worst = std::max(worst, off / error);
            ++approximate;
          }
        }
        EXPECT_GT(approximate, 500) << "nothing was left out";
        EXPECT_GT(worst, 0.05) << "the bound says nothing";
        EXPECT_GT(run.state().doubts, 60u);
        EXPECT_LT(run.state().doubts, 60u * 14) << "normal keys leave few blocks in doubt";
      }
    }
  }
}

TEST(CudaScreenDecision, GivesUpWhereScreeningDoesNotHelp) {
  Problem problem = aligned(make_case(2, 64, 64, 2, {{96, 40 * 64}}, DType::kBFloat16));
  for (const bool helps : {true, false}) {
    if (!helps) for_each_key(problem, [](auto, auto d, double x) { return 100 * (d % 3) + 0.01 * x; });
    const SelectBlocksParams params = problem.select_params();
    SelectPlan plan = plan_with(params, ScreenSwitch::kAlways);
    plan.chunk_queries = plan.screen.first_queries = 32;
    plan.screen.always = false;
    Screened run(params, plan);
    EXPECT_EQ(run.state().use, helps ? 1 : 0);
    EXPECT_EQ(run.state().rows, 64u) << "of the last chunk that was screened";
    EXPECT_EQ(run.state().screened_items > 0, helps);
    EXPECT_EQ(run.state().exact_items > 0, !helps);
    const Tensor expected = run_planned(plan_with(params, ScreenSwitch::kNever), params, 2);
    expect_same_bytes("blocks", run.blocks, expected);

    // One chunk: what it finds out comes too late for another, not for itself.
    plan = plan_with(params, ScreenSwitch::kAlways);
    plan.screen.first_queries = plan.chunk_queries;
    plan.screen.always = false;
    Screened whole(params, plan);
    EXPECT_EQ(whole.state().use, helps ? 1 : 0);
    EXPECT_EQ(whole.state().rows, 192u) << "it was screened";
    EXPECT_EQ(whole.state().exact_items > 0, !helps);
    expect_same_bytes("blocks", whole.blocks, expected);
  }
}

SelectShape prefill(std::int64_t queries, std::int64_t keys) {
  return {.query_rows = queries, .groups = 4, .sequences = 1, .max_keys = keys};
}
bool screens(const SelectShape& shape, ScreenSwitch wanted = ScreenSwitch::kAuto) {
  return plan_select(shape, SelectSchedule::kAuto, wanted).screen.use;
}

TEST(CudaScreenPlan, ScreensLongPrefillsOnly) {
  EXPECT_TRUE(screens(prefill(512, 1 << 20)));
  EXPECT_TRUE(screens(prefill(1 << 16, 1 << 16)));
  EXPECT_FALSE(screens(prefill(1 << 14, 1 << 14))) << "half of 128 blocks would be in doubt";
  EXPECT_FALSE(screens(prefill(128, 1 << 20))) << "the copies would cost more";
  EXPECT_FALSE(screens(prefill(1, 1 << 20)));
  SelectShape shape = prefill(1 << 16, 1 << 16);
  EXPECT_FALSE(screens(shape, ScreenSwitch::kNever));
  shape.local_blocks = 0;
  EXPECT_FALSE(screens(shape, ScreenSwitch::kAlways)) << "rows choose among blocks they see a part of";
  EXPECT_TRUE(screens(prefill(1 << 14, 1 << 14), ScreenSwitch::kAlways));
  EXPECT_FALSE(screens(prefill(1, 1 << 20), ScreenSwitch::kAlways)) << "decoding reads as many bytes either way";
}

TEST(CudaScreenPlan, TakesAnEighthToFindOut) {
  const SelectPlan plan = plan_select(prefill(1 << 16, 1 << 16));
  EXPECT_EQ(plan.screen.first_queries * 8, plan.chunk_queries);
  EXPECT_EQ(plan.queries_of_chunk(0, 1 << 16), plan.screen.first_queries);
  EXPECT_EQ(plan.queries_of_chunk(plan.screen.first_queries, 1 << 16), plan.chunk_queries);
  EXPECT_EQ(plan.queries_of_chunk((1 << 16) - 5, 1 << 16), 5);
}

TEST(CudaScreenPlan, MemoryIsAByteForAKeyElementAndATenthOfTheMaxima) {
  for (const std::int64_t keys : {1 << 16, 1 << 20, 1 << 22}) {
    const SelectPlan screened = plan_select(prefill(1 << 16, keys));
    const SelectPlan plain = plan_select(prefill(1 << 16, keys), SelectSchedule::kAuto, ScreenSwitch::kNever);
    ASSERT_TRUE(screened.screen.use);
    const auto copies = static_cast<std::size_t>(keys) * 128;
    EXPECT_GE(screened.bytes - plain.bytes, copies);
    EXPECT_LE(screened.bytes - plain.bytes, copies + copies / 64 + (std::size_t{256} << 20) / 4);
  }
}

TEST(CudaScreenSwitch, IsWhatTheEnvironmentSays) {
  const char* before = std::getenv("MSA_SCREEN");
  const std::string saved = before == nullptr ? "" : before;
  setenv("MSA_SCREEN", "0", 1);
  EXPECT_EQ(core::screen_switch(), ScreenSwitch::kNever);
  setenv("MSA_SCREEN", "1", 1);
  EXPECT_EQ(core::screen_switch(), ScreenSwitch::kAlways);
  setenv("MSA_SCREEN", "yes", 1);
  EXPECT_THROW(core::screen_switch(), Error);
  setenv("MSA_SCREEN", "", 1);
  EXPECT_EQ(core::screen_switch(), ScreenSwitch::kAuto);
  if (before == nullptr) {
    unsetenv("MSA_SCREEN");
  } else {
    setenv("MSA_SCREEN", saved.c_str(), 1);
  }
}

}  // namespace
}  // namespace msa::cuda
