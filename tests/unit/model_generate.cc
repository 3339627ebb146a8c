// SPDX-License-Identifier: Apache-2.0
// Sampling and sessions: greedy equals the argmax of a fresh run, seeds repeat, top-p cuts where it should, prefixes
// are reused without changing the result, and every way to stop stops.
#include "src/model/generate.h"

#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "msa/error.h"
#include "tests/unit/model_support.h"

namespace msa::model {
namespace {

std::vector<std::int32_t> random_prompt(std::int64_t count, std::uint64_t seed) {
  const at::Tensor tokens = testing::random_tokens(count, 61, seed);
  const auto* const ids = tokens.const_data_ptr<std::int64_t>();
  return {ids, ids + count};
}

std::vector<std::int32_t> greedy_by_full_passes(const Decoder& decoder, std::vector<std::int32_t> tokens,
                                                std::int64_t count, const AttentionOptions& attention) {
  const c10::NoGradGuard no_grad;
  std::vector<std::int32_t> made;
  ForwardOptions options;
  options.attention = attention;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto length = static_cast<int>(tokens.size());
    const at::Tensor ids = at::tensor(std::vector<std::int64_t>(tokens.begin(), tokens.end()), at::kLong);
    const at::Tensor hidden = decoder.forward(ids, at::tensor({0, length}, at::kInt), options).hidden;
    made.push_back(static_cast<std::int32_t>(decoder.logits(hidden.narrow(0, length - 1, 1)).argmax().item<int64_t>()));
    tokens.push_back(made.back());
  }
  return made;
}

GenerateOptions greedy(std::int64_t max_tokens, std::int64_t chunk = 512) {
  GenerateOptions options;
  options.max_tokens = max_tokens;
  options.chunk = chunk;
  return options;
}

TEST(Session, GreedyEqualsFullPasses) {
  const Decoder decoder = Decoder::create(testing::tiny_config(), 1);
  const std::vector<std::int32_t> prompt = random_prompt(70, 1);
  for (const AttentionMode mode : {AttentionMode::kSparse, AttentionMode::kDense}) {
    GenerateOptions options = greedy(12);
    options.attention.mode = mode;
    const std::vector<std::int32_t> expected = greedy_by_full_passes(decoder, prompt, 12, options.attention);
    for (const std::int64_t chunk : {1, 16, 33, 512}) {
      options.chunk = chunk;
      Session session(decoder, 200);
      EXPECT_EQ(session.generate(prompt, options).tokens, expected) << attention_mode_name(mode) << " chunk " << chunk;
    }
  }
}

TEST(Session, ReusesThePrefix) {
  const Decoder decoder = Decoder::create(testing::tiny_config(), 2);
  Session session(decoder, 200);
  std::vector<std::int32_t> prompt = random_prompt(50, 2);
  const Generation first = session.generate(prompt, greedy(5));
  EXPECT_EQ(first.stats.reused_tokens, 0);
  // The conversation goes on: the prompt, the answer (its last token was never run), and a new question.
  prompt.insert(prompt.end(), first.tokens.begin(), first.tokens.end());
  const std::vector<std::int32_t> question = random_prompt(20, 3);
  prompt.insert(prompt.end(), question.begin(), question.end());
  const Generation second = session.generate(prompt, greedy(5));
  EXPECT_EQ(second.stats.reused_tokens, 54);
  EXPECT_EQ(second.tokens, greedy_by_full_passes(decoder, prompt, 5, {}));
  // The same prompt again runs its last token only; another kind of attention runs everything.
  EXPECT_EQ(session.generate(prompt, greedy(5)).stats.reused_tokens, 74);
  GenerateOptions dense = greedy(5);
  dense.attention.mode = AttentionMode::kDense;
  const Generation third = session.generate(prompt, dense);
  EXPECT_EQ(third.stats.reused_tokens, 0);
  EXPECT_EQ(third.tokens, greedy_by_full_passes(decoder, prompt, 5, dense.attention));
  prompt[10] = (prompt[10] + 1) % 61;
  EXPECT_EQ(session.generate(prompt, dense).stats.reused_tokens, 10);
}

TEST(Session, Stops) {
  const Decoder decoder = Decoder::create(testing::tiny_config(), 1);
  const std::vector<std::int32_t> prompt = random_prompt(30, 4);
  Session session(decoder, 40);
  const Generation whole = session.generate(prompt, greedy(6));
  EXPECT_EQ(whole.stats.stop, StopReason::kMaxTokens);
  EXPECT_EQ(whole.tokens.size(), 6U);
  EXPECT_EQ(whole.stats.decode_steps, 5);

  GenerateOptions with_stop = greedy(6);
  with_stop.stop_tokens = {whole.tokens[2]};
  const Generation stopped = session.generate(prompt, with_stop);
  const auto end = std::find(whole.tokens.begin(), whole.tokens.end(), whole.tokens[2]);  // it may come sooner
  EXPECT_EQ(stopped.tokens, std::vector<std::int32_t>(whole.tokens.begin(), end));
  EXPECT_EQ(stopped.stats.stop, StopReason::kStopToken);

  const Generation full = session.generate(prompt, greedy(100));
  EXPECT_EQ(full.stats.stop, StopReason::kContextFull);
  EXPECT_EQ(prompt.size() + full.tokens.size(), 40U);

  int calls = 0;
  const Generation cut = session.generate(prompt, greedy(6), [&](std::int32_t) { return ++calls < 2; });
  EXPECT_EQ(cut.stats.stop, StopReason::kCallback);
  EXPECT_EQ(cut.tokens, std::vector<std::int32_t>(whole.tokens.begin(), whole.tokens.begin() + 2));
}

TEST(Session, EndsWhenAskedInPromptAndAnswer) {
  const Decoder decoder = Decoder::create(testing::tiny_config(), 1);
  const std::vector<std::int32_t> prompt = random_prompt(50, 4);
  Session session(decoder, 100);
  const Generation whole = session.generate(prompt, greedy(6));
  EXPECT_EQ(whole.stats.prefill_tokens, 50);
  session.generate(random_prompt(2, 9), greedy(1));  // nothing of the prompt is left in the cache

  std::vector<std::int64_t> told;
  int questions = 0;
  GenerateOptions options = greedy(6, 10);
  options.on_prefill = [&](std::int64_t tokens) { told.push_back(tokens); };
  options.should_stop = [&] { return ++questions == 4; };  // before the fourth chunk
  const Generation in_prompt = session.generate(prompt, options);
  EXPECT_EQ(in_prompt.stats.stop, StopReason::kInterrupted);
  EXPECT_TRUE(in_prompt.tokens.empty());
  EXPECT_EQ(in_prompt.stats.prefill_tokens, 30);
  EXPECT_EQ(told, (std::vector<std::int64_t>{10, 20, 30}));

  // What ran is kept: the same prompt goes on from there, and is stopped after two tokens.
  questions = 0;
  const Generation in_answer = session.generate(prompt, options);
  EXPECT_EQ(in_answer.stats.reused_tokens, 30);
  EXPECT_EQ(in_answer.stats.stop, StopReason::kInterrupted);
  EXPECT_EQ(in_answer.tokens, std::vector<std::int32_t>(whole.tokens.begin(), whole.tokens.begin() + 2));
  options.should_stop = nullptr;
  EXPECT_EQ(session.generate(prompt, options).tokens, whole.tokens);
}

TEST(Session, RefusesWhatDoesNotFit) {
  const Decoder decoder = Decoder::create(testing::tiny_config(), 1);
  Session session(decoder, 40);
  EXPECT_THROW(session.generate({}, greedy(1)), Error);
  EXPECT_THROW(session.generate(random_prompt(40, 1), greedy(1)), Error);
  EXPECT_THROW(session.generate(random_prompt(4, 1), greedy(0)), Error);
  EXPECT_THROW(session.generate(random_prompt(4, 1), greedy(1, 0)), Error);
  const std::vector<std::int32_t> outside = {1, 61};
  EXPECT_THROW(session.generate(outside, greedy(1)), Error);
  EXPECT_EQ(session.generate(random_prompt(39, 1), greedy(9)).tokens.size(), 1U);  // usable after all that
  EXPECT_EQ(Session(decoder, 1 << 20).context(), 256);                             // the model's own limit
  EXPECT_THROW(Session(decoder, 0), Error);
}

TEST(Sampler, GreedyTakesTheLowestOfEquals) {
  Sampler sampler({});
  const std::array<float, 4> logits = {-1.0F, 2.0F, 2.0F, 0.0F};
  EXPECT_EQ(sampler.sample(logits), 1);
}

TEST(Sampler, DrawsTheDistribution) {
  constexpr int kDraws = 20000;
  const std::array<float, 4> logits = {std::log(0.5F), std::log(0.3F), std::log(0.15F), std::log(0.05F)};
  const auto count = [&](double temperature, double top_p) {
    Sampler sampler({temperature, top_p, 11});
    std::map<std::int32_t, double> share;
    for (int i = 0; i < kDraws; ++i) share[sampler.sample(logits)] += 1.0 / kDraws;
    return share;
  };
  // Five standard deviations of a share at its widest, sqrt(0.25 / draws).
  const double bound = 5 * std::sqrt(0.25 / kDraws);
  auto share = count(1.0, 1.0);
  EXPECT_NEAR(share[0], 0.5, bound);
  EXPECT_NEAR(share[1], 0.3, bound);
  EXPECT_NEAR(share[3], 0.05, bound);
  share = count(1.0, 0.7);  // the first two reach it
  EXPECT_EQ(share.size(), 2U);
  EXPECT_NEAR(share[0], 0.625, bound);
  EXPECT_EQ(count(1.0, 0.4).size(), 1U);
  share = count(0.5, 1.0);  // squares: 0.25, 0.09, 0.0225, 0.0025
  EXPECT_NEAR(share[0], 0.25 / 0.365, bound);
}

TEST(Sampler, SeedsRepeat) {
  const at::Tensor logits = at::randn({500}, at::kFloat);
  const std::span<const float> values(logits.const_data_ptr<float>(), 500);
  Sampler a({1.0, 0.9, 3}), b({1.0, 0.9, 3}), c({1.0, 0.9, 4});
  int differences = 0;
  for (int i = 0; i < 50; ++i) {
    const std::int32_t token = a.sample(values);
    EXPECT_EQ(token, b.sample(values));
    differences += token != c.sample(values) ? 1 : 0;
  }
  EXPECT_GT(differences, 0);
}

TEST(Sampler, RefusesWhatIsNotFinite) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const double temperature : {0.0, 1.0}) {
    Sampler sampler({temperature, 1.0, 0});
    EXPECT_THROW(sampler.sample(std::array<float, 2>{1.0F, std::nanf("")}), Error);
    EXPECT_THROW(sampler.sample(std::array<float, 2>{1.0F, kInf}), Error);
    EXPECT_THROW(sampler.sample(std::array<float, 2>{-kInf, -kInf}), Error);
    EXPECT_THROW(sampler.sample({}), Error);
    EXPECT_EQ(sampler.sample(std::array<float, 2>{-kInf, 1.0F}), 1);  // a token ruled out is never drawn
  }
  EXPECT_THROW(Sampler({-1.0, 1.0, 0}), Error);
  EXPECT_THROW(Sampler({std::nan(""), 1.0, 0}), Error);
  EXPECT_THROW(Sampler({1.0, 0.0, 0}), Error);
  EXPECT_THROW(Sampler({1.0, 1.5, 0}), Error);
}

}  // namespace
}  // namespace msa::model
