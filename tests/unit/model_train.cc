// SPDX-License-Identifier: Apache-2.0
// The trainer's parts (random numbers, schedules, AdamW, corpus, retrieval documents, pass keys, budgets) and whole
// runs on a tiny random model: that the KL falls, and that a stopped and resumed run repeats the uninterrupted one bit
// for bit.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "msa/error.h"
#include "src/model/corpus.h"
#include "src/model/evaluate.h"
#include "src/model/files/config.h"
#include "src/model/optimizer.h"
#include "src/model/passkey.h"
#include "src/model/retrieval.h"
#include "src/model/schedule.h"
#include "src/model/train.h"
#include "src/model/train_random.h"

namespace msa::model {
namespace {

namespace fs = std::filesystem;

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    static int count = 0;
    path_ =
        fs::temp_directory_path() / ("msa_model_train_" + std::to_string(::getpid()) + "_" + std::to_string(count++));
    fs::create_directories(path_);
  }
  ~TemporaryDirectory() { fs::remove_all(path_); }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

void write_file(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

std::string prose(std::size_t lines, std::uint64_t seed) {
  Random random(seed);
  const std::vector<std::string> words = {"the", "model", "reads", "a",      "block",
                                          "of",  "keys",  "and",   "values", "again"};
  std::string text;
  for (std::size_t i = 0; i < lines; ++i) {
    for (int w = 0; w < 8; ++w) text += words[static_cast<std::size_t>(random.below(10))] + (w == 7 ? ".\n" : " ");
  }
  return text;
}

files::ModelConfig tiny_config(bool with_index) {
  const std::string index = R"(, "layer_types": ["minimax_m3_sparse", "minimax_m3_sparse"], "index_n_heads": 2,
      "index_head_dim": 16, "index_block_size": 16, "index_topk_blocks": 2, "index_local_blocks": 1,
      "index_qk_norm": false)";
  return files::parse_model_config(R"({"model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
      "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 257,
      "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
      "tie_word_embeddings": true, "initializer_range": 0.15)" +
                                       (with_index ? index : "") + "}",
                                   "tiny");
}

TEST(Random, DrawsTheSameEverywhereAndWithinBounds) {
  Random a(7, 1, 2), b(7, 1, 2), c(7, 1, 3);
  EXPECT_EQ(a.next(), b.next());
  EXPECT_NE(a.next(), c.next());
  std::vector<int> counts(5);
  for (int i = 0; i < 5000; ++i) ++counts[static_cast<std::size_t>(a.below(5))];
  for (const int count : counts) EXPECT_NEAR(count, 1000, 5 * std::sqrt(800.0));  // 5 standard deviations
  EXPECT_EQ(a.below(1), 0);
}

TEST(Random, SamplesDistinctAscending) {
  for (const std::int64_t n : {0, 1, 2, 17, 100}) {
    for (const std::int64_t count : {0, 1, 16, 17, 200}) {
      const std::vector<std::int32_t> sample = Random(3, 0, static_cast<std::uint64_t>(n)).sample(n, count);
      EXPECT_EQ(static_cast<std::int64_t>(sample.size()), std::min<std::int64_t>(n, count));
      EXPECT_TRUE(std::is_sorted(sample.begin(), sample.end()));
      EXPECT_EQ(std::set<std::int32_t>(sample.begin(), sample.end()).size(), sample.size());
      for (const std::int32_t value : sample) EXPECT_TRUE(value >= 0 && value < n);
    }
  }
}

TEST(Schedule, RisesHoldsAndFalls) {
  ScheduleOptions options{Schedule::kCosine, 100, 10, 0.1, 0.2};
  EXPECT_DOUBLE_EQ(schedule_factor(options, 0), 0.1);
  EXPECT_DOUBLE_EQ(schedule_factor(options, 9), 1.0);
  EXPECT_DOUBLE_EQ(schedule_factor(options, 10), 1.0);
  EXPECT_NEAR(schedule_factor(options, 55), 0.55, 1e-12);  // half way: the middle of 0.1 and 1
  EXPECT_GT(schedule_factor(options, 99), 0.1);
  options.kind = Schedule::kWsd;
  EXPECT_DOUBLE_EQ(schedule_factor(options, 79), 1.0);
  EXPECT_DOUBLE_EQ(schedule_factor(options, 80), 1.0);
  EXPECT_NEAR(schedule_factor(options, 90), 0.55, 1e-12);
  EXPECT_NEAR(schedule_factor(options, 99), 0.145, 1e-12);
  options.kind = Schedule::kConstant;
  EXPECT_DOUBLE_EQ(schedule_factor(options, 99), 1.0);
  EXPECT_THROW(parse_schedule("linear"), Error);
}

TEST(AdamW, EqualsTheScalarAlgorithm) {
  at::Tensor w = at::tensor({0.5F, -1.0F}, at::kFloat).view({1, 2});
  w.requires_grad_(true);
  AdamWOptions options;
  options.weight_decay = 0.1;
  AdamW adamw({{"w", w}}, options);
  double x[2] = {0.5, -1.0}, m[2] = {0, 0}, v[2] = {0, 0};
  for (int step = 1; step <= 5; ++step) {
    const double g[2] = {0.3 * step, -0.2};
    adamw.zero_grad();
    w.mutable_grad() = at::tensor({static_cast<float>(g[0]), static_cast<float>(g[1])}, at::kFloat).view({1, 2});
    adamw.step([](const std::string&) { return 0.01; });
    for (int i = 0; i < 2; ++i) {
      x[i] *= 1 - 0.01 * options.weight_decay;
      m[i] = options.beta1 * m[i] + (1 - options.beta1) * g[i];
      v[i] = options.beta2 * v[i] + (1 - options.beta2) * g[i] * g[i];
      const double mean = m[i] / (1 - std::pow(options.beta1, step));
      const double square = v[i] / (1 - std::pow(options.beta2, step));
      x[i] -= 0.01 * mean / (std::sqrt(square) + options.epsilon);
    }
  }
  // 5 steps of a handful of float32 operations on values of magnitude 1
  for (int i = 0; i < 2; ++i) EXPECT_NEAR(w.detach().flatten()[i].item<float>(), x[i], 50 * 0x1p-24);
}

TEST(AdamW, KeepsMastersOfLowPrecisionParameters) {
  at::Tensor w = at::ones({4}, at::kBFloat16);
  w.requires_grad_(true);
  AdamW adamw({{"w", w}}, {});
  for (int step = 0; step < 10; ++step) {
    adamw.zero_grad();
    w.mutable_grad() = at::ones({4}, at::kBFloat16);
    adamw.step([](const std::string&) { return 1e-3; });  // a fourth of a bfloat16 step below 1: lost without masters
  }
  EXPECT_LT(w.detach()[0].item<float>(), 0.995F);
}

TEST(AdamW, ClipsByGroupAndRefusesNonFiniteGradients) {
  at::Tensor a = at::zeros({1}), b = at::zeros({1});
  a.requires_grad_(true);
  b.requires_grad_(true);
  AdamW adamw({{"a", a}, {"b", b}}, {});
  a.mutable_grad() = at::full({1}, 3.0F);
  b.mutable_grad() = at::full({1}, 0.5F);
  EXPECT_NEAR(adamw.clip_gradients(1.0, [](const std::string& name) { return name; }), std::sqrt(9.25), 1e-6);
  EXPECT_FLOAT_EQ(a.grad().item<float>(), 1.0F);
  EXPECT_FLOAT_EQ(b.grad().item<float>(), 0.5F);
  b.mutable_grad() = at::full({1}, std::numeric_limits<float>::infinity());
  EXPECT_THROW(adamw.clip_gradients(1.0), Error);
}

TEST(Corpus, ReadsTextAndOnlyText) {
  const TemporaryDirectory directory;
  write_file(directory.path() / "a" / "one.txt", prose(200, 1));
  write_file(directory.path() / "b.bin", std::string("\x7f"
                                                     "ELF\0\1\2",
                                                     7) +
                                             prose(200, 2));
  write_file(directory.path() / "latin1.txt", "caf\xe9 " + prose(200, 3));
  write_file(directory.path() / ".hidden" / "x.txt", prose(200, 4));
  write_file(directory.path() / "module.pm", "package X;\nsub x {}\n=head1 NAME\n\nX does things.\n\n=cut\nsub y {}\n");
  const Corpus corpus = Corpus::open({directory.path()});
  const std::size_t total = corpus.bytes(Split::kTrain) + corpus.bytes(Split::kHeldOut);
  EXPECT_EQ(total, prose(200, 1).size() + std::string("=head1 NAME\n\nX does things.\n\n").size());
  try {
    Corpus::open({directory.path() / "b.bin"});
    FAIL() << "a binary file was taken for text";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("b.bin"), std::string::npos) << error.what();
  }
  EXPECT_THROW(Corpus::open({directory.path() / "missing"}), Error);
  EXPECT_THROW(Corpus::open({}), Error);
}

TEST(Corpus, CutsOneFileIntoBothSplits) {
  const std::string text = prose(20000, 5);  // about a megabyte: several units
  const Corpus corpus = Corpus::from_texts({{"only.txt", text}});
  EXPECT_GT(corpus.bytes(Split::kHeldOut), 0U);
  EXPECT_EQ(corpus.bytes(Split::kHeldOut) + corpus.bytes(Split::kTrain), text.size());
  const Corpus small = Corpus::from_texts({{"small.txt", prose(50, 6)}});
  EXPECT_GT(small.bytes(Split::kHeldOut), 0U);
}

TEST(Corpus, WindowsAreDeterministicExactAndDisjoint) {
  std::vector<std::pair<std::string, std::string>> documents;
  for (int i = 0; i < 40; ++i)
    documents.emplace_back("doc" + std::to_string(i), prose(60, 100 + static_cast<std::uint64_t>(i)));
  const Corpus corpus = Corpus::from_texts(documents);
  const TextTools tools = make_byte_tools();
  const auto first = corpus.windows(tools.encode, Split::kTrain, 128, 50, 9, 256);
  EXPECT_EQ(first.size(), 50U);
  for (const Tokens& window : first) EXPECT_EQ(window.size(), 128U);
  EXPECT_EQ(first, corpus.windows(tools.encode, Split::kTrain, 128, 50, 9, 256));
  EXPECT_NE(first, corpus.windows(tools.encode, Split::kTrain, 128, 50, 10, 256));
  // no text twice: all windows together are no longer than the text and its separators
  const auto all = corpus.windows(tools.encode, Split::kHeldOut, 128, 100000, 9, -1);
  EXPECT_LE(all.size() * 128, corpus.bytes(Split::kHeldOut));
  EXPECT_GT((all.size() + 1) * 128, corpus.bytes(Split::kHeldOut));
  EXPECT_THROW(corpus.windows(tools.encode, Split::kHeldOut, 1 << 20, 1, 9, -1), Error);
}

TEST(RetrievalDocument, HasTheLengthAndTheAnswersInItsTail) {
  const TextTools tools = make_byte_tools();
  Tokens filler(4096, 'x');
  for (std::uint64_t i = 0; i < 50; ++i) {
    Random random(1, 0, i);
    const RetrievalDocument document = make_retrieval_document(tools, filler, 2048, random);
    ASSERT_EQ(document.tokens.size(), 2048U);
    EXPECT_GT(document.tail_begin, 1024);
    EXPECT_LT(document.tail_begin, 2048);
  }
  Random random(1);
  EXPECT_THROW(make_retrieval_document(tools, filler, 32, random), Error);
}

TEST(Passkey, TrialsHoldTheirKeyAndShareTheirBeginnings) {
  const TextTools tools = make_byte_tools();
  const Tokens filler(8192, 'x');
  const std::vector<Trial> trials = make_trials(RetrievalTask::kPasskey, tools, filler, {1024, 2048}, 5, 3);
  ASSERT_EQ(trials.size(), 10U);
  std::set<double> depths;
  for (const Trial& trial : trials) {
    EXPECT_EQ(static_cast<std::int64_t>(trial.prompt.size()), trial.length - answer_tokens(RetrievalTask::kPasskey));
    const std::string text(trial.prompt.begin(), trial.prompt.end());
    EXPECT_NE(text.find("The pass key is " + trial.key + "."), std::string::npos);
    EXPECT_EQ(trial.key.size(), 5U);
    EXPECT_TRUE(trial.depth >= 0 && trial.depth <= 1);
    if (trial.length == 1024) depths.insert(trial.depth);
  }
  EXPECT_EQ(depths.size(), 5U);
  // some short document is the beginning of a long one up to its question
  bool shares = false;
  for (std::size_t i = 0; i < 5; ++i) {
    for (std::size_t j = 5; j < 10; ++j) shares = shares || trials[i].key == trials[j].key;
  }
  EXPECT_TRUE(shares);
  EXPECT_THROW(make_trials(RetrievalTask::kPasskey, tools, filler, {128}, 5, 3), Error);
  EXPECT_THROW(make_trials(RetrievalTask::kPasskey, tools, filler, {16384}, 5, 3), Error);
  EXPECT_EQ(make_trials(RetrievalTask::kMultikey, tools, filler, {2048}, 6, 3).size(), 6U);
}

TEST(Passkey, SharedCacheGivesTheAnswersOfFreshOnes) {
  const Decoder decoder = Decoder::create(tiny_config(true), 11);
  const TextTools tools = make_byte_tools();
  Tokens filler;
  for (const char c : prose(200, 8)) filler.push_back(static_cast<unsigned char>(c));
  const std::vector<Trial> trials = make_trials(RetrievalTask::kPasskey, tools, filler, {512, 768}, 3, 3);
  TrialOptions options;
  options.chunk = 100;
  options.decode = [](const Tokens& tokens) {
    std::string text;
    for (const std::int64_t token : tokens) text += std::to_string(token) + " ";
    return text;
  };
  const TrialRun together = run_trials(decoder, trials, options);
  EXPECT_LT(together.computed_tokens, together.prompt_tokens);
  for (std::size_t i = 0; i < trials.size(); ++i) {
    EXPECT_EQ(run_trials(decoder, {trials[i]}, options).results[0].answer, together.results[i].answer);
  }
}

TEST(VariableTracking, ChainsAreCompleteAndInOrder) {
  const TextTools tools = make_byte_tools();
  const Tokens filler(8192, 'x');
  const std::vector<Trial> trials = make_trials(RetrievalTask::kVariableTracking, tools, filler, {2048, 1024}, 4, 3);
  ASSERT_EQ(trials.size(), 8U);
  for (const Trial& trial : trials) {
    EXPECT_EQ(static_cast<std::int64_t>(trial.prompt.size()),
              trial.length - answer_tokens(RetrievalTask::kVariableTracking));
    const std::string text(trial.prompt.begin(), trial.prompt.end());
    ASSERT_EQ(trial.answers.size(), 5U);
    std::string value = trial.key;
    std::size_t last = 0;
    for (const std::string& name : trial.answers) {
      const std::size_t link = text.find("\nVAR " + name + " = " + value + "\n");
      ASSERT_NE(link, std::string::npos) << name;
      EXPECT_GT(link, last);
      last = link;
      value = "VAR " + name;
    }
    EXPECT_EQ(std::set<std::string>(trial.answers.begin(), trial.answers.end()).size(), 5U);
    EXPECT_LT(last, text.find("assigned the value " + trial.key));
    EXPECT_TRUE(trial.depth >= 0 && trial.depth <= 0.2);
  }
  EXPECT_EQ(trials[0].answers, trials[4].answers);  // the same chain at both lengths
  EXPECT_NE(trials[0].answers, trials[1].answers);
  EXPECT_EQ(make_trials(RetrievalTask::kVariableTracking, tools, filler, {1024}, 1, 3)[0].prompt, trials[0].prompt);
  EXPECT_THROW(make_trials(RetrievalTask::kVariableTracking, tools, filler, {256}, 1, 3), Error);
}

TEST(VariableTracking, CountsTheNamesFound) {
  const Decoder decoder = Decoder::create(tiny_config(true), 11);
  const std::vector<Trial> trials =
      make_trials(RetrievalTask::kVariableTracking, make_byte_tools(), Tokens(1024, 'x'), {700}, 3, 3);
  TrialOptions options;
  options.max_answer = 2;
  std::size_t named = 0;  // the answer says so many names of the trial's chain
  std::size_t current = 0;
  options.decode = [&](const Tokens& tokens) {
    EXPECT_EQ(tokens.size(), 2U);
    std::string text;
    for (std::size_t i = 0; i < named; ++i) text += trials[current].answers[i] + ", ";
    return text;
  };
  for (current = 0; current < 3; ++current) {
    named = current == 2 ? 5 : 3;
    const TrialRun run = run_trials(decoder, {trials[current]}, options);
    EXPECT_EQ(run.results[0].hit, named == 5);
    EXPECT_DOUBLE_EQ(run.results[0].found, static_cast<double>(named) / 5);
    EXPECT_EQ(run.tally.at(700).hits, named == 5 ? 1 : 0);
    EXPECT_DOUBLE_EQ(run.tally.at(700).found, static_cast<double>(named) / 5);
  }
  EXPECT_EQ(parse_retrieval_task("variable-tracking"), RetrievalTask::kVariableTracking);
  EXPECT_STREQ(retrieval_task_name(RetrievalTask::kVariableTracking), "variable-tracking");
}

TEST(Budget, ParsesAndSpreads) {
  EXPECT_DOUBLE_EQ(parse_budget("1/8"), 0.125);
  EXPECT_DOUBLE_EQ(parse_budget("0.25"), 0.25);
  for (const char* bad : {"", "0", "2", "1/0", "-1/8", "1/8x", "x"}) EXPECT_THROW(parse_budget(bad), Error) << bad;
  EXPECT_EQ(*parse_evaluation_mode("sparse@16").topk, 16);
  EXPECT_DOUBLE_EQ(parse_evaluation_mode("oracle@1/4").budget, 0.25);
  EXPECT_THROW(parse_evaluation_mode("dense@1/4"), Error);
  EXPECT_THROW(parse_evaluation_mode("sparse@65"), Error);
  EXPECT_THROW(parse_evaluation_mode("other"), Error);

  files::ModelConfig config = tiny_config(true);
  config.layer_types = {files::AttentionType::kSparse, files::AttentionType::kFull, files::AttentionType::kSparse};
  config.index_topk_blocks = {30, 1, 10};
  // 512 tokens are 32 blocks; a quarter of them a layer on average, three to one
  EXPECT_EQ(spread_budget(config, 0.25, 512), (std::vector<std::int64_t>{12, 0, 4}));
  // 64 is the most a layer takes; the other gets the rest
  EXPECT_EQ(spread_budget(config, 0.5, 1600), (std::vector<std::int64_t>{64, 0, 36}));
}

TrainOptions tiny_options(const fs::path& out) {
  TrainOptions options;
  options.context = 96;
  options.rows = 24;
  options.cache_windows = 6;
  options.sparse_cache_windows = 3;
  options.long_windows = 1;
  options.long_context = 160;
  options.index_learning_rate = 1e-2;
  options.learning_rate = 3e-3;
  options.probe_every = 4;
  options.probe_rows = 48;
  options.probe_budget = 0.34;
  options.out = out;
  return options;
}

struct Curve {
  std::vector<std::string> lines;  // without their times
  TrainResult result;
};

Curve run_training(const Corpus& corpus, TrainOptions options, std::int64_t stop_after) {
  Decoder decoder = Decoder::create(tiny_config(true), 5);
  Curve curve;
  std::int64_t last = 0;
  TrainHooks hooks;
  hooks.on_step = [&](StepRecord record) {
    last = record.step;
    record.seconds = 0;
    curve.lines.push_back(to_json_line(record));
  };
  hooks.should_stop = [&] { return stop_after > 0 && last >= stop_after; };
  curve.result = train(decoder, corpus, make_byte_tools(), 256, options, hooks);
  return curve;
}

Corpus tiny_corpus() {
  std::vector<std::pair<std::string, std::string>> documents;
  for (int i = 0; i < 30; ++i)
    documents.emplace_back("doc" + std::to_string(i), prose(40, 700 + static_cast<std::uint64_t>(i)));
  return Corpus::from_texts(documents);
}

class TrainResume : public testing::TestWithParam<bool> {};

TEST_P(TrainResume, CurveEqualsTheUninterruptedOne) {
  const bool frozen = GetParam();
  const Corpus corpus = tiny_corpus();
  const TemporaryDirectory whole, parts;
  TrainOptions options = tiny_options(whole.path());
  options.freeze_backbone = frozen;
  options.stages = {{false, 6}, {true, 6}};
  options.accumulate = 2;
  options.warmup_steps = 2;
  const Curve uninterrupted = run_training(corpus, options, 0);
  EXPECT_TRUE(uninterrupted.result.finished);
  EXPECT_EQ(uninterrupted.lines.size(), 13U);  // the state before, and 12 steps

  options.out = parts.path();
  std::vector<std::string> lines;
  // stops inside the first stage, at its end, and inside the second
  for (const std::int64_t stop : {3, 6, 9, 0}) {
    const Curve part = run_training(corpus, options, stop);
    EXPECT_EQ(part.result.finished, stop == 0);
    EXPECT_EQ(part.result.steps, stop == 0 ? 12 : stop);
    lines.insert(lines.end(), part.lines.begin(), part.lines.end());
  }
  EXPECT_EQ(lines, uninterrupted.lines);
  const Curve again = run_training(corpus, options, 0);
  EXPECT_TRUE(again.lines.empty());
  EXPECT_EQ(again.result.steps, 12);

  options.clip = 0.5;
  try {
    run_training(corpus, options, 0);
    FAIL() << "resumed with another clip";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("clip"), std::string::npos) << error.what();
  }
  options.resume = false;
  EXPECT_EQ(run_training(corpus, options, 0).lines.size(), 13U);
}

INSTANTIATE_TEST_SUITE_P(Backbones, TrainResume, testing::Values(true, false),
                         [](const auto& info) { return info.param ? "Frozen" : "Trained"; });

TEST(Train, FrozenWarmupLowersTheKlAndLeavesTheBackboneAlone) {
  const Corpus corpus = tiny_corpus();
  TrainOptions options = tiny_options({});
  options.freeze_backbone = true;
  options.stages = {{false, 60}};
  Decoder decoder = Decoder::create(tiny_config(true), 5);
  std::vector<std::pair<std::string, at::Tensor>> before;
  for (const auto& [name, tensor] : decoder.named_parameters()) before.emplace_back(name, tensor.clone());
  double first = 0, last = 0;
  TrainHooks hooks;
  hooks.on_step = [&](const StepRecord& record) {
    if (!record.probed) return;
    (record.step == 0 ? first : last) = record.held_out.kl;
  };
  train(decoder, corpus, make_byte_tools(), 256, options, hooks);
  EXPECT_GT(first, 0);
  EXPECT_LT(last, 0.5 * first);
  bool index_moved = false;
  for (const auto& [name, tensor] : before) {
    const bool same = at::equal(tensor, decoder.parameter(name));
    if (Decoder::is_index_parameter(name)) {
      index_moved = index_moved || !same;
    } else {
      EXPECT_TRUE(same) << name;
    }
    EXPECT_FALSE(decoder.parameter(name).requires_grad());
  }
  EXPECT_TRUE(index_moved);
}

TEST(Train, KlNeverReachesADetachedBackbone) {
  // With lambda a million and no language-model signal left out, the backbone's path must equal that of lambda 0.
  const Corpus corpus = tiny_corpus();
  std::vector<std::vector<at::Tensor>> results;
  for (const double lambda : {0.0, 1e6}) {
    TrainOptions options = tiny_options({});
    options.stages = {{false, 3}};
    options.lambda = lambda;
    options.clip = 0;
    options.probe_every = 0;
    Decoder decoder = Decoder::create(tiny_config(true), 5);
    train(decoder, corpus, make_byte_tools(), 256, options, {});
    results.emplace_back();
    for (const auto& [name, tensor] : decoder.named_parameters()) {
      if (!Decoder::is_index_parameter(name)) results.back().push_back(tensor.clone());
    }
  }
  for (std::size_t i = 0; i < results[0].size(); ++i) EXPECT_TRUE(at::equal(results[0][i], results[1][i]));
}

TEST(Train, FromScratchSparseFollowsDense) {
  const Corpus corpus = tiny_corpus();
  std::vector<double> last;
  for (const bool dense : {true, false}) {
    TrainOptions options = tiny_options({});
    options.attention = dense ? AttentionMode::kDense : AttentionMode::kSparse;
    options.batch = 2;
    options.stages = {{false, 20}, {true, 20}};
    double first = 0, final = 0;
    TrainHooks hooks;
    hooks.on_step = [&](const StepRecord& record) {
      if (record.step == 0) first = record.held_out_lm_loss;
      if (record.probed) final = record.held_out_lm_loss;
    };
    Decoder decoder = Decoder::create(tiny_config(true), 5);
    train(decoder, corpus, make_byte_tools(), 256, options, hooks);
    EXPECT_LT(final, first - 1) << (dense ? "dense" : "sparse");
    last.push_back(final);
  }
  EXPECT_NEAR(last[0], last[1], 0.25);
}

// Each ablation that learns from the language-model loss, alone and together: trained from scratch, every parameter
// moves, and a run that was stopped gives the same weights as one that was not.
TEST(Train, AblationsFromScratchMoveAndResume) {
  const Corpus corpus = tiny_corpus();
  for (const auto& [value_dim, sink] : std::vector<std::pair<int, bool>>{{16, false}, {0, true}, {32, true}}) {
    files::ModelConfig config = tiny_config(true);
    config.index_value_dim = value_dim;
    config.attention_sink = sink;
    const auto run = [&](const std::filesystem::path& out, int stop_after, Decoder& decoder) {
      TrainOptions options = tiny_options({});
      options.stages = {{false, 3}, {true, 3}};
      options.probe_every = 0;
      options.out = out;
      int steps = 0;
      TrainHooks hooks;
      hooks.on_step = [&](const StepRecord& record) {
        EXPECT_TRUE(std::isfinite(record.loss));
        ++steps;
      };
      hooks.should_stop = [&] { return steps == stop_after; };
      return train(decoder, corpus, make_byte_tools(), 256, options, hooks);
    };
    const TemporaryDirectory whole_out, parts_out;
    const Decoder before = Decoder::create(config, 5);
    Decoder whole = Decoder::create(config, 5);
    EXPECT_TRUE(run(whole_out.path(), -1, whole).finished);
    Decoder first = Decoder::create(config, 5);
    EXPECT_FALSE(run(parts_out.path(), 4, first).finished);
    Decoder second = Decoder::create(config, 5);
    EXPECT_TRUE(run(parts_out.path(), -1, second).finished);
    const auto start = before.named_parameters(), end = whole.named_parameters(), resumed = second.named_parameters();
    ASSERT_EQ(start.size(), end.size());
    for (std::size_t i = 0; i < end.size(); ++i) {
      EXPECT_FALSE(at::equal(start[i].second, end[i].second)) << end[i].first;
      EXPECT_TRUE(at::equal(end[i].second, resumed[i].second)) << end[i].first;
    }
  }
}

TEST(Train, AFrozenBackboneKeepsValueHeadAndSinks) {
  const Corpus corpus = tiny_corpus();
  files::ModelConfig config = tiny_config(true);
  config.index_value_dim = 16;
  config.attention_sink = true;
  Decoder decoder = Decoder::create(config, 5);
  const Decoder before = Decoder::create(config, 5);
  TrainOptions options = tiny_options({});
  options.freeze_backbone = true;
  options.stages = {{false, 3}, {true, 3}};
  train(decoder, corpus, make_byte_tools(), 256, options, {});
  const auto start = before.named_parameters(), end = decoder.named_parameters();
  for (std::size_t i = 0; i < end.size(); ++i) {
    EXPECT_EQ(at::equal(start[i].second, end[i].second), !Decoder::is_index_parameter(end[i].first)) << end[i].first;
  }
}

TEST(Train, AFixedWindowTrainsWithoutAnIndex) {
  const Corpus corpus = tiny_corpus();
  Decoder decoder = Decoder::create(tiny_config(true), 5);
  const Decoder before = Decoder::create(tiny_config(true), 5);
  TrainOptions options = tiny_options({});
  options.attention = AttentionMode::kWindow;
  options.stages = {{true, 3}};
  std::string stage;
  TrainHooks hooks;
  hooks.on_step = [&](const StepRecord& record) { stage = record.stage; };
  train(decoder, corpus, make_byte_tools(), 256, options, hooks);
  EXPECT_EQ(stage, "window");
  const auto start = before.named_parameters(), end = decoder.named_parameters();
  for (std::size_t i = 0; i < end.size(); ++i) {
    EXPECT_EQ(at::equal(start[i].second, end[i].second), Decoder::is_index_parameter(end[i].first)) << end[i].first;
  }
}

TEST(Train, RefusesWhatCannotBeTrained) {
  const Corpus corpus = tiny_corpus();
  Decoder dense = Decoder::create(tiny_config(false), 5);
  TrainOptions options = tiny_options({});
  options.stages = {{false, 2}};
  EXPECT_THROW(train(dense, corpus, make_byte_tools(), 256, options, {}), Error);  // no index branch
  Decoder decoder = Decoder::create(tiny_config(true), 5);
  options.freeze_backbone = true;
  options.cache_bytes = 100;
  EXPECT_THROW(train(decoder, corpus, make_byte_tools(), 256, options, {}), Error);  // nothing fits
  options.cache_bytes = std::size_t{1} << 30;
  options.stages = {};
  EXPECT_THROW(train(decoder, corpus, make_byte_tools(), 256, options, {}), Error);
  options.stages = {{false, 2}};
  files::ModelConfig with_values = tiny_config(true);
  with_values.index_value_dim = 16;
  Decoder value_head = Decoder::create(with_values, 5);
  options.freeze_backbone = false;
  for (const AttentionMode mode : {AttentionMode::kDense, AttentionMode::kWindow, AttentionMode::kOracle}) {
    options.attention = mode;  // without the index branch there are no values
    EXPECT_THROW(train(value_head, corpus, make_byte_tools(), 256, options, {}), Error);
  }
  options.attention = AttentionMode::kSparse;
  options.context = 1 << 20;
  EXPECT_THROW(train(decoder, corpus, make_byte_tools(), 256, options, {}), Error);  // no window that long
}

TEST(Evaluate, ModesAgreeWhereTheyMust) {
  const Decoder decoder = Decoder::create(tiny_config(true), 5);
  const std::vector<Tokens> windows = tiny_corpus().windows(make_byte_tools().encode, Split::kHeldOut, 96, 2, 1, 256);
  EvaluationOptions options;
  // 96 tokens are 6 blocks: with all of them every mode is dense attention
  for (const char* name : {"dense", "sparse@6", "oracle@6", "window@6", "sparse@2", "oracle@2"}) {
    options.modes.push_back(parse_evaluation_mode(name));
  }
  options.last_positions = 10;
  options.map_layers = {0, 1};
  const Evaluation evaluation = evaluate(decoder, windows, options);
  ASSERT_EQ(evaluation.modes.size(), 6U);
  for (std::size_t i = 1; i < 4; ++i) {
    EXPECT_NEAR(evaluation.modes[i].loss, evaluation.modes[0].loss, 1e-4) << evaluation.modes[i].name;
    EXPECT_NEAR(evaluation.modes[i].last_loss, evaluation.modes[0].last_loss, 1e-4);
  }
  ASSERT_EQ(evaluation.recalls.size(), 2U);
  EXPECT_TRUE(std::isnan(evaluation.recalls[0].alignment.block_recall));  // no row sees more than 6 blocks
  EXPECT_GT(evaluation.recalls[1].alignment.block_recall, 0);
  EXPECT_LE(evaluation.recalls[1].alignment.score_recall, 1);
  ASSERT_EQ(evaluation.maps.size(), 4U);  // two layers, two groups
  for (const SelectionMap& map : evaluation.maps) {
    ASSERT_EQ(map.frequency.size(), 6U);
    for (std::size_t row = 0; row < 6; ++row) {
      EXPECT_DOUBLE_EQ(map.frequency[row][row], 1.0);  // the local block
      double sum = 0;
      for (const double value : map.frequency[row]) sum += value;
      EXPECT_NEAR(sum, static_cast<double>(std::min<std::int64_t>(map.topk, static_cast<std::int64_t>(row) + 1)), 1e-9);
    }
  }
}

}  // namespace
}  // namespace msa::model
