// SPDX-License-Identifier: Apache-2.0
// Top-k of given scores by the CUDA kernel in the emulator: equal to the reference, id for id, on rows shaped to meet
// every path of the kernel: pieces of 256 and 1024 scores and their tails, ties across the border, NaN, zeros of both
// signs, streams that overflow the list of survivors.
#include "src/cuda/topk_blocks.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "msa/topk.h"
#include "src/cuda/topk_blocks.cu"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tensor.h"
#include "tests/unit/support/tolerance.h"

namespace msa::cuda {
namespace {

using namespace msa::testing;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kLeast = std::numeric_limits<float>::denorm_min();
constexpr std::int64_t kProcessors = 2;

Tensor run_emulated(const Tensor& scores, std::int64_t topk) {
  Tensor ids(DType::kInt32, {scores.size(0), topk});
  const ConstTensorView from = scores.view();
  const TensorView to = ids.view();
  launch_topk(plan_topk(scores.size(0), scores.size(1), kProcessors), reinterpret_cast<const float*>(from.data),
              from.stride(0), from.size(0), from.size(1), topk, reinterpret_cast<std::int32_t*>(to.data), to.stride(0),
              nullptr);
  EXPECT_TRUE(ids.gaps_intact()) << "wrote beside the ids";
  return ids;
}

void expect_as_reference(const Tensor& scores, std::int64_t topk) {
  Tensor expected(DType::kInt32, {scores.size(0), topk});
  msa::topk_blocks(reference_context(), {.scores = scores.view(), .topk = topk}, expected.view());
  for (const bool reverse : {false, true}) {
    const emulator::WithOptions with({reverse, emulator::BlockOrder::kShuffled, reverse, 5});
    const Tensor ids = run_emulated(scores, topk);
    for (std::int64_t row = 0; row < scores.size(0); ++row) {
      for (std::int64_t slot = 0; slot < topk; ++slot) {
        ASSERT_EQ(ids.at(row, slot), expected.at(row, slot)) << "row " << row << " slot " << slot;
      }
    }
  }
}

struct Pattern {
  const char* name;
  std::function<double(Random&, std::int64_t b, std::int64_t blocks)> score;
};

double normal(Random& random) { return std::normal_distribution<float>()(random); }

const std::vector<Pattern> kPatterns = {
    {"normal", [](Random& random, auto, auto) { return normal(random); }},
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
       return std::vector<double>{0.0, -0.0, kLeast, -kLeast, 2 * kLeast}[random() % 5];
     }},
    {"mostly NaN", [](Random& random, auto, auto) { return random() % 16 != 0 ? kNaN : normal(random); }},
    {"NaN, infinities and ties",
     [](Random& random, auto, auto) {
       return std::vector<double>{kNaN, -kInfinity, kInfinity, 1, -1}[random() % 5];
     }},
    {"-inf and NaN", [](Random& random, auto, auto) { return random() % 2 != 0 ? -kInfinity : kNaN; }},
    {"one number at the end", [](Random&, auto b, auto blocks) { return b == blocks - 1 ? -5.0 : kNaN; }},
    // The groups whose maxima give the bound are a lane's: here one lane has all that counts, there one has nothing.
    {"one lane ascending", [](Random&, auto b, auto) { return b / 4 % 32 == 5 ? 1e3 + static_cast<double>(b) : -1.0; }},
    {"others ascending", [](Random&, auto b, auto) { return b / 4 % 32 == 5 ? -1.0 : 1e3 + static_cast<double>(b); }},
    {"first piece low", [](Random& random, auto b, auto) { return b < 1024 ? -1e3 : normal(random); }},
    {"few above a tie", [](Random& random, auto, auto) { return random() % 32 == 0 ? 9 + normal(random) : -2.0; }},
    {"close scores", [](Random& random, auto, auto) { return 1 + 0x1p-23 * static_cast<double>(random() % 1024); }},
    {"the next number at the end", [](Random&, auto b, auto blocks) { return b >= blocks - 5 ? 1 + 0x1p-23 : 1.0; }},
    {"both ends of the range",
     [](Random& random, auto, auto) { return std::ldexp(normal(random), static_cast<int>(random() % 240) - 120); }},
};

TEST(CudaTopk, EqualsTheReference) {
  Random random(11);
  for (const std::int64_t blocks : {0, 1, 3, 5, 16, 17, 63, 65, 127, 129, 255, 256, 257, 513, 1024, 1030, 2049, 3500}) {
    Tensor scores(DType::kFloat32, {static_cast<std::int64_t>(kPatterns.size()), blocks});
    for (std::size_t row = 0; row < kPatterns.size(); ++row) {
      for (std::int64_t b = 0; b < blocks; ++b) {
        scores.set(kPatterns[row].score(random, b, blocks), static_cast<std::int64_t>(row), b);
      }
    }
    for (const std::int64_t topk : {1, 2, 16, 31, 33, 64}) {
      SCOPED_TRACE(std::to_string(blocks) + " blocks, topk " + std::to_string(topk));
      ASSERT_NO_FATAL_FAILURE(expect_as_reference(scores, topk));
    }
  }
}

TEST(CudaTopk, LongRowsOfEveryKind) {
  const std::int64_t blocks = 8192;
  Tensor scores(DType::kFloat32, {5, blocks}, Layout::kContiguous);
  Random random(12);
  for (std::int64_t b = 0; b < blocks; ++b) {
    scores.set(normal(random), 0, b);
    scores.set(b % 4 == 3 ? -1e9 : static_cast<double>(b), 1, b);
    scores.set(b % 4 == 3 ? -1e9 : 1.0, 2, b);
    scores.set(b < blocks - 20 ? kNaN : 1.0, 3, b);
    scores.set(static_cast<double>((b * 7919) % 1009), 4, b);
  }
  for (const std::int64_t topk : {16, 32, 64}) expect_as_reference(scores, topk);
}

TEST(CudaTopk, MoreRowsThanWarps) {
  Tensor scores(DType::kFloat32, {101, 70});
  Random random(13);
  scores.fill_integers(random, 20);
  expect_as_reference(scores, 9);
  expect_as_reference(Tensor(DType::kFloat32, {0, 70}), 9);
}

TEST(CudaTopk, PlanFillsTheProcessors) {
  EXPECT_EQ(plan_topk(0, 1024, 132).thread_blocks, 0);
  EXPECT_EQ(plan_topk(1, 1024, 132), (TopkPlan{kTopkWideVectors, 1}));
  EXPECT_EQ(plan_topk(9, 256, 132), (TopkPlan{kTopkNarrowVectors, 2}));
  EXPECT_EQ(plan_topk(9, 257, 132), (TopkPlan{kTopkWideVectors, 2}));
  EXPECT_EQ(plan_topk(std::int64_t{1} << 40, 8192, 132).thread_blocks, 132 * kTopkBlocksPerProcessor);
}

}  // namespace
}  // namespace msa::cuda
