// SPDX-License-Identifier: Apache-2.0
// The decoder against itself and against plain formulas: packed and cached passes agree, sequences of a pack do not see
// each other, modes do what they say, gradients arrive where they should, checkpoints survive a round trip. Equality
// with transformers is tested in tests/python/test_decoder.py.
#include "src/model/decoder.h"

#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "msa/error.h"
#include "src/model/decoder_math.h"
#include "src/model/files/safetensors.h"
#include "tests/unit/model_support.h"

namespace msa::model {
namespace {

using testing::random_tokens;
using testing::relative_error;
using testing::tiny_config;

// Two orders of magnitude above float32 rounding over three layers, three below what a wrong block would change.
constexpr double kRounding = 1e-5;

at::Tensor bounds_of(std::vector<int> bounds) { return at::tensor(bounds, at::kInt); }

at::Tensor run_cached(const Decoder& decoder, const at::Tensor& tokens, std::int64_t chunk, std::int64_t page,
                      const ForwardOptions& options) {
  cache::PagedCache cache(decoder.cache_shape(page), cache::PagedCache::pages_for(tokens.numel(), page));
  const std::int64_t sequence = cache.create_sequence();
  std::vector<at::Tensor> parts;
  for (std::int64_t begin = 0; begin < tokens.numel(); begin += chunk) {
    const std::int64_t rows = std::min(chunk, tokens.numel() - begin);
    parts.push_back(decoder.forward_cached(tokens.narrow(0, begin, rows), cache, sequence, options).hidden);
  }
  return at::cat(parts);
}

class TemporaryDirectory {
 public:
  explicit TemporaryDirectory(const std::string& name)
      : path_(std::filesystem::path(::testing::TempDir()) / ("msa_model_decoder_" + name)) {
    std::filesystem::remove_all(path_);
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Decoder, CachedPassesEqualPackedOnes) {
  const c10::NoGradGuard no_grad;
  const Decoder decoder = Decoder::create(tiny_config(), 1);
  const at::Tensor tokens = random_tokens(131, 61, 1);
  for (const AttentionMode mode :
       {AttentionMode::kSparse, AttentionMode::kDense, AttentionMode::kWindow, AttentionMode::kOracle}) {
    ForwardOptions options;
    options.attention.mode = mode;
    const at::Tensor whole = decoder.forward(tokens, bounds_of({0, 131}), options).hidden;
    for (const std::int64_t chunk : {1, 5, 16, 100, 131}) {
      for (const std::int64_t page : {16, 32}) {
        EXPECT_LE(relative_error(run_cached(decoder, tokens, chunk, page, options), whole), kRounding)
            << attention_mode_name(mode) << " chunk " << chunk << " page " << page;
      }
    }
  }
}

files::ModelConfig ablated_config() {
  files::ModelConfig config = tiny_config();
  config.index_value_dim = 48;
  config.attention_sink = true;
  return config;
}

TEST(Decoder, AblationsOnTheCacheEqualPackedOnes) {
  const c10::NoGradGuard no_grad;
  Decoder decoder = Decoder::create(ablated_config(), 1);
  for (std::int64_t layer = 0; layer < 3; ++layer) {
    decoder.parameter("model.layers." + std::to_string(layer) + ".self_attn.sinks").uniform_(-1, 3);
  }
  const at::Tensor tokens = random_tokens(131, 61, 1);
  for (const AttentionMode mode :
       {AttentionMode::kSparse, AttentionMode::kDense, AttentionMode::kWindow, AttentionMode::kOracle}) {
    ForwardOptions options;
    options.attention.mode = mode;
    const at::Tensor whole = decoder.forward(tokens, bounds_of({0, 131}), options).hidden;
    for (const std::int64_t chunk : {1, 16, 100}) {
      EXPECT_LE(relative_error(run_cached(decoder, tokens, chunk, 32, options), whole), kRounding)
          << attention_mode_name(mode) << " chunk " << chunk;
    }
  }
  // A cache asked for without index keys has them all the same where a value head needs them.
  EXPECT_EQ(decoder.cache_shape(16, false).layers[0].index_dim, 32 + 48);
  EXPECT_EQ(decoder.cache_shape(16, false).layers[1].index_dim, 0);
}

// One layer's attention with both ablations, from the inputs that the observer shows, by the plain formulas.
TEST(Decoder, AblationsAreTheirFormulas) {
  for (const AttentionMode mode : {AttentionMode::kSparse, AttentionMode::kDense}) {
    files::ModelConfig config = ablated_config();
    config.num_hidden_layers = 1;
    config.layer_types.resize(1);
    config.index_topk_blocks.resize(1);
    config.intermediate_size = 1;
    Decoder decoder = Decoder::create(config, 4);
    const std::string prefix = "model.layers.0.";
    {
      const c10::NoGradGuard no_grad;
      decoder.parameter(prefix + "self_attn.sinks").uniform_(-1, 3);
      decoder.parameter(prefix + "mlp.down_proj.weight").zero_();  // what is left is the attention
    }
    for (auto& [name, tensor] : decoder.named_parameters()) decoder.parameter(name).set_requires_grad(true);
    const auto weight = [&](const std::string& name) { return decoder.parameter(prefix + "self_attn." + name); };
    const at::Tensor tokens = random_tokens(70, 61, 6);
    ForwardOptions options;
    options.attention.mode = mode;
    LayerView seen;
    options.observer = [&](const LayerView& view) { seen = view; };
    const at::Tensor hidden = decoder.forward(tokens, bounds_of({0, 70}), options).hidden;

    // mask [groups, T, T]: what a row of a group sees
    at::Tensor mask = at::zeros({3, 70, 70}, at::kBool);
    for (std::int64_t group = 0; group < 3; ++group) {
      for (std::int64_t row = 0; row < 70; ++row) {
        if (!seen.blocks.defined()) mask[group][row].narrow(0, 0, row + 1).fill_(true);
        for (std::int64_t slot = 0; seen.blocks.defined() && slot < 2; ++slot) {
          const std::int64_t block = seen.blocks[group][row][slot].item<std::int64_t>();
          if (block < 0) continue;
          const std::int64_t begin = 16 * block, end = std::min<std::int64_t>(begin + 16, row + 1);
          mask[group][row].narrow(0, begin, end - begin).fill_(true);
        }
      }
    }
    const at::Tensor outside = mask.logical_not();
    constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
    const at::Tensor scores = at::einsum("qhd,khd->hqk", {seen.q, seen.k.repeat_interleave(2, 1)}) / 4.0;
    const at::Tensor masked = scores.masked_fill(outside.repeat_interleave(2, 0), kMinusInfinity);
    const at::Tensor with_sink = at::cat({masked, weight("sinks").view({6, 1, 1}).expand({6, 70, 1})}, -1);
    const at::Tensor share = with_sink.softmax(-1).narrow(-1, 0, 70);
    const at::Tensor main = at::einsum("hqk,khd->qhd", {share, seen.v.repeat_interleave(2, 1)}).flatten(1);
    const at::Tensor index = at::einsum("qgd,kd->gqk", {seen.q_idx, seen.k_idx}) / std::sqrt(32.0);
    const at::Tensor v_idx = at::linear(seen.x.detach(), weight("indexer.v_proj.weight"));
    const at::Tensor added =
        at::einsum("gqk,kd->qgd", {index.masked_fill(outside, kMinusInfinity).softmax(-1), v_idx}).flatten(1);
    const at::Tensor attended =
        at::linear(main, weight("o_proj.weight")) + at::linear(added, weight("indexer.o_proj.weight"));
    const at::Tensor expected =
        rms_norm(at::embedding(decoder.parameter("model.embed_tokens.weight"), tokens) + attended,
                 decoder.parameter("model.norm.weight"), config.rms_norm_eps, false);
    EXPECT_LE(relative_error(hidden.detach(), expected.detach()), kRounding) << attention_mode_name(mode);

    // The same gradients: the naive graph hangs on the same leaves.
    std::vector<at::Tensor> gradients;
    const at::Tensor weights = at::randn({70, 96}, at::kFloat);
    for (const at::Tensor& result : {hidden, expected}) {
      for (const auto& [name, tensor] : decoder.named_parameters()) tensor.mutable_grad() = at::Tensor();
      (result * weights).sum().backward({}, /*retain_graph=*/true);
      for (const char* name : {"sinks", "indexer.v_proj.weight", "indexer.o_proj.weight", "indexer.q_proj.weight",
                               "indexer.k_proj.weight", "q_proj.weight", "v_proj.weight", "o_proj.weight"}) {
        ASSERT_TRUE(weight(name).grad().defined()) << name;
        gradients.push_back(weight(name).grad().clone());
      }
    }
    for (std::size_t i = 0; i < gradients.size() / 2; ++i) {
      EXPECT_LE(relative_error(gradients[i], gradients[gradients.size() / 2 + i]), 10 * kRounding) << i;
    }
  }
}

TEST(Decoder, AblationsSurviveACheckpoint) {
  const c10::NoGradGuard no_grad;
  const TemporaryDirectory directory("ablations");
  const Decoder decoder = Decoder::create(ablated_config(), 1);
  decoder.save(directory.path());
  const Decoder again = Decoder::load(directory.path());
  EXPECT_EQ(again.config().index_value_dim, 48);
  EXPECT_TRUE(again.config().attention_sink);
  const auto before = decoder.named_parameters(), after = again.named_parameters();
  ASSERT_EQ(before.size(), after.size());
  for (std::size_t i = 0; i < before.size(); ++i) {
    EXPECT_EQ(before[i].first, after[i].first);
    EXPECT_TRUE(at::equal(before[i].second, after[i].second)) << before[i].first;
  }
}

TEST(Decoder, AblationsAddedToAModelStartWithoutEffect) {
  const c10::NoGradGuard no_grad;
  const TemporaryDirectory directory("added");
  const at::Tensor tokens = random_tokens(80, 61, 1);
  Decoder decoder = Decoder::create(tiny_config(), 1);
  const at::Tensor before = decoder.forward(tokens, bounds_of({0, 80}), {}).hidden;
  decoder.add_index_values(16, 3);
  EXPECT_TRUE(at::equal(decoder.forward(tokens, bounds_of({0, 80}), {}).hidden, before));
  decoder.add_index_values(16, 4);  // on already
  decoder.add_attention_sinks();
  // A sink takes exp(-8 - lse) of a row. Small weights make all scores nearly 0, so lse is at least that, and each of
  // three layers loses no more of what it adds.
  files::ModelConfig small_config = tiny_config();
  small_config.initializer_range = 0.02;
  Decoder small = Decoder::create(small_config, 1);
  const at::Tensor small_before = small.forward(tokens, bounds_of({0, 80}), {}).hidden;
  small.add_attention_sinks();
  const double effect = relative_error(small.forward(tokens, bounds_of({0, 80}), {}).hidden, small_before);
  EXPECT_GT(effect, 0);
  EXPECT_LE(effect, 3 * std::exp(-8.0));
  decoder.save(directory.path());
  EXPECT_EQ(Decoder::load(directory.path()).named_parameters().size(), decoder.named_parameters().size());
  EXPECT_NE(message_of([&] { decoder.add_index_values(32, 3); }).find("index value head of dimension 16, not 32"),
            std::string::npos);
  Decoder fresh = Decoder::create(tiny_config(), 1);
  EXPECT_NE(message_of([&] { fresh.add_index_values(24, 3); }).find("index_value_dim"), std::string::npos);
  files::ModelConfig dense = tiny_config();
  dense.layer_types.assign(3, files::AttentionType::kFull);
  Decoder without = Decoder::create(dense, 1);
  EXPECT_NE(message_of([&] { without.add_index_values(16, 3); }).find("no layer is sparse"), std::string::npos);
}

TEST(Decoder, ModesDiffer) {
  const c10::NoGradGuard no_grad;
  const Decoder decoder = Decoder::create(tiny_config(), 1);
  const at::Tensor tokens = random_tokens(131, 61, 1);
  const auto run = [&](AttentionMode mode, std::vector<std::int64_t> layer_topk = {}) {
    ForwardOptions options;
    options.attention.mode = mode;
    options.attention.layer_topk = std::move(layer_topk);
    return decoder.forward(tokens, bounds_of({0, 131}), options).hidden;
  };
  const at::Tensor dense = run(AttentionMode::kDense);
  for (const AttentionMode mode : {AttentionMode::kSparse, AttentionMode::kWindow, AttentionMode::kOracle}) {
    EXPECT_GT(relative_error(run(mode), dense), 100 * kRounding) << attention_mode_name(mode);
    // The first 32 tokens see two blocks: every budget of two holds them all.
    EXPECT_LE(relative_error(run(mode).narrow(0, 0, 32), dense.narrow(0, 0, 32)), kRounding);
    EXPECT_LE(relative_error(run(mode, {9, 0, 9}), dense), kRounding) << "a budget of every block is dense attention";
    EXPECT_TRUE(at::equal(run(mode, {0, 0, 0}), dense)) << "0 makes a layer dense";
  }
  EXPECT_GT(relative_error(run(AttentionMode::kWindow, {2, 2, 2}), run(AttentionMode::kWindow)), 100 * kRounding);
}

TEST(Decoder, WindowTakesTheFirstBlockAndTheLastOnes) {
  const c10::NoGradGuard no_grad;
  const Decoder decoder = Decoder::create(tiny_config(), 1);
  ForwardOptions options;
  options.attention.mode = AttentionMode::kWindow;
  options.attention.topk = 3;
  at::Tensor blocks;
  options.observer = [&](const LayerView& view) {
    if (view.layer == 2) blocks = view.blocks;
  };
  decoder.forward(random_tokens(120, 61, 1), bounds_of({0, 20, 120}), options);
  const auto row = [&](std::int64_t token) {
    const at::Tensor ids = blocks.select(0, 1).select(0, token).contiguous();
    return std::vector<int>(ids.const_data_ptr<int>(), ids.const_data_ptr<int>() + 3);
  };
  EXPECT_EQ(row(0), (std::vector<int>{0, -1, -1}));
  EXPECT_EQ(row(19), (std::vector<int>{0, 1, -1}));
  EXPECT_EQ(row(20), (std::vector<int>{0, -1, -1}));  // blocks are counted from the sequence's own start
  EXPECT_EQ(row(20 + 47), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(row(20 + 64), (std::vector<int>{0, 3, 4}));
}

TEST(Decoder, SequencesOfAPackDoNotSeeEachOther) {
  const c10::NoGradGuard no_grad;
  const Decoder decoder = Decoder::create(tiny_config(), 2);
  const at::Tensor tokens = random_tokens(150, 61, 2);
  const ForwardOptions options;
  const at::Tensor packed = decoder.forward(tokens, bounds_of({0, 1, 1, 60, 150}), options).hidden;
  for (const auto& [begin, end] : std::vector<std::pair<int, int>>{{0, 1}, {1, 60}, {60, 150}}) {
    const at::Tensor alone =
        decoder.forward(tokens.narrow(0, begin, end - begin), bounds_of({0, end - begin}), options).hidden;
    EXPECT_LE(relative_error(packed.narrow(0, begin, end - begin), alone), kRounding) << begin;
  }
}

TEST(Decoder, TakesNoTokens) {
  const Decoder decoder = Decoder::create(tiny_config(), 2);
  EXPECT_EQ(decoder.forward(at::empty({0}, at::kLong), bounds_of({0}), {}).hidden.sizes(), at::IntArrayRef({0, 96}));
}

TEST(Decoder, RollbackAndCopyGiveTheSameAsAFreshRun) {
  const c10::NoGradGuard no_grad;
  const Decoder decoder = Decoder::create(tiny_config(), 3);
  const at::Tensor tokens = random_tokens(100, 61, 3), wrong = random_tokens(40, 61, 4);
  const at::Tensor expected = run_cached(decoder, tokens, 50, 16, {}).narrow(0, 50, 50);
  cache::PagedCache cache(decoder.cache_shape(16), 30);
  const std::int64_t sequence = cache.create_sequence();
  decoder.forward_cached(tokens.narrow(0, 0, 50), cache, sequence, {});
  const std::int64_t copy = cache.copy_sequence(sequence);
  decoder.forward_cached(wrong, cache, sequence, {});  // a draft that is refused
  cache.crop(sequence, 50);
  for (const std::int64_t id : {sequence, copy}) {
    EXPECT_TRUE(at::equal(decoder.forward_cached(tokens.narrow(0, 50, 50), cache, id, {}).hidden, expected));
  }
}

TEST(Decoder, AFailedPassLeavesTheCacheAsItWas) {
  const Decoder decoder = Decoder::create(tiny_config(), 3);
  cache::PagedCache cache(decoder.cache_shape(16), 3);
  const std::int64_t sequence = cache.create_sequence();
  decoder.forward_cached(random_tokens(20, 61, 1), cache, sequence, {});
  EXPECT_THROW(decoder.forward_cached(random_tokens(40, 61, 1), cache, sequence, {}), Error);
  EXPECT_THROW(decoder.forward_cached(at::full({1}, 61, at::kLong), cache, sequence, {}), Error);
  ForwardOptions stops;
  stops.observer = [](const LayerView& view) {
    if (view.layer == 1) throw Error("stop");
  };
  EXPECT_THROW(decoder.forward_cached(random_tokens(2, 61, 1), cache, sequence, stops), Error);
  EXPECT_EQ(cache.length(sequence), 20);
  cache::PagedCache without_index(decoder.cache_shape(16, false), 3);
  EXPECT_NE(message_of([&] {
              decoder.forward_cached(random_tokens(2, 61, 1), without_index, without_index.create_sequence(), {});
            }).find("no index keys for layer 0"),
            std::string::npos);
}

TEST(Decoder, KlReachesTheIndexBranchOnly) {
  Decoder decoder = Decoder::create(tiny_config(), 5);
  for (auto& [name, tensor] : decoder.named_parameters()) decoder.parameter(name).set_requires_grad(true);
  const at::Tensor tokens = random_tokens(80, 61, 5);
  for (const AttentionMode mode : {AttentionMode::kDense, AttentionMode::kSparse}) {
    ForwardOptions options;
    options.attention.mode = mode;
    options.with_kl = true;
    const ForwardResult result = decoder.forward(tokens, bounds_of({0, 30, 80}), options);
    ASSERT_EQ(result.layer_kl.size(), 3U);
    EXPECT_TRUE(std::isnan(result.layer_kl[1]));
    EXPECT_GT(result.layer_kl[0], 0);
    EXPECT_NEAR(result.kl_sum.item<double>(), result.layer_kl[0] + result.layer_kl[2], 1e-5);
    result.kl_sum.backward();
    for (const auto& [name, tensor] : decoder.named_parameters()) {
      EXPECT_EQ(tensor.grad().defined(), Decoder::is_index_parameter(name)) << name;
      if (tensor.grad().defined()) {
        EXPECT_GT(tensor.grad().abs().max().item<double>(), 0) << name;
      }
      tensor.mutable_grad() = at::Tensor();
    }
    // Without the detachment the loss moves the backbone too.
    options.detach_index = false;
    decoder.forward(tokens, bounds_of({0, 30, 80}), options).kl_sum.backward();
    EXPECT_TRUE(decoder.parameter("model.embed_tokens.weight").grad().defined());
    for (const auto& [name, tensor] : decoder.named_parameters()) tensor.mutable_grad() = at::Tensor();
  }
}

TEST(Decoder, KlOnTheCacheEqualsThePackedOne) {
  const c10::NoGradGuard no_grad;
  const Decoder decoder = Decoder::create(tiny_config(), 5);
  const at::Tensor tokens = random_tokens(80, 61, 5);
  for (const AttentionMode mode : {AttentionMode::kDense, AttentionMode::kSparse}) {
    ForwardOptions options;
    options.attention.mode = mode;
    options.with_kl = true;
    const ForwardResult packed = decoder.forward(tokens, bounds_of({0, 80}), options);
    cache::PagedCache cache(decoder.cache_shape(16), 5);
    const ForwardResult cached = decoder.forward_cached(tokens, cache, cache.create_sequence(), options);
    EXPECT_NEAR(packed.layer_kl[2], cached.layer_kl[2], kRounding);
  }
}

// The directional derivative of a loss through sparse layers, by central differences in the embedding.
TEST(Decoder, LanguageModelGradientsReachEveryParameter) {
  files::ModelConfig config = tiny_config();
  config.index_topk_blocks.assign(3, 8);  // every block: finite differences must not cross a change of selection
  Decoder decoder = Decoder::create(config, 6);
  for (auto& [name, tensor] : decoder.named_parameters()) decoder.parameter(name).set_requires_grad(true);
  const at::Tensor tokens = random_tokens(60, 61, 6), weights = at::rand({60, 96}, at::kFloat) - 0.5;
  const auto loss = [&] { return (decoder.forward(tokens, bounds_of({0, 60}), {}).hidden * weights).sum(); };
  loss().backward();
  for (const auto& [name, tensor] : decoder.named_parameters()) {
    if (Decoder::is_index_parameter(name)) continue;
    ASSERT_TRUE(tensor.grad().defined()) << name;
    const at::Tensor direction = tensor.grad() / tensor.grad().norm();
    const double step = 2e-3 * tensor.detach().norm().item<double>();
    const c10::NoGradGuard no_grad;
    at::Tensor parameter = decoder.parameter(name).detach();
    parameter.add_(direction, step);
    const double above = loss().item<double>();
    parameter.add_(direction, -2 * step);
    const double below = loss().item<double>();
    parameter.add_(direction, step);
    const double expected = tensor.grad().norm().item<double>();
    EXPECT_NEAR((above - below) / (2 * step), expected, 0.03 * expected) << name;
  }
}

TEST(Decoder, CheckpointsSurviveARoundTrip) {
  const c10::NoGradGuard no_grad;
  const TemporaryDirectory directory("round_trip");
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Decoder decoder = Decoder::create(tiny_config(), 7, dtype);
    decoder.save(directory.path());
    const Decoder again = Decoder::load(directory.path(), dtype);
    const auto before = decoder.named_parameters(), after = again.named_parameters();
    ASSERT_EQ(before.size(), after.size());
    for (std::size_t i = 0; i < before.size(); ++i) {
      EXPECT_EQ(before[i].first, after[i].first);
      EXPECT_TRUE(at::equal(before[i].second, after[i].second)) << before[i].first;
    }
    EXPECT_EQ(again.config().dtype, dtype == at::kFloat ? "float32" : "bfloat16");
    EXPECT_EQ(again.config().index_rope_tiles, 2);
  }
}

TEST(Decoder, AddsIndexBranches) {
  const c10::NoGradGuard no_grad;
  const TemporaryDirectory directory("add_index");
  Decoder decoder = Decoder::create(tiny_config(), 8);
  EXPECT_TRUE(decoder.has_index_branch(0));
  EXPECT_FALSE(decoder.has_index_branch(1));
  EXPECT_THROW(decoder.add_index_branch(0, 32), Error);
  EXPECT_THROW(decoder.add_index_branch(1, 16), Error);  // the other layers have 32
  EXPECT_THROW(decoder.add_index_branch(3, 32), Error);
  decoder.add_index_branch(1, 32);
  EXPECT_TRUE(decoder.has_index_branch(1));
  EXPECT_EQ(decoder.parameter("model.layers.1.self_attn.indexer.q_proj.weight").sizes(), at::IntArrayRef({96, 96}));
  decoder.save(directory.path());
  EXPECT_TRUE(Decoder::load(directory.path()).has_index_branch(1));  // in a layer that config.json calls dense
  EXPECT_EQ(decoder.cache_shape(16).layers[1].index_dim, 32);
  EXPECT_THROW(decoder.cache_shape(24), Error);
}

TEST(Decoder, IndexBranchIsWhatTheForwardUses) {
  const c10::NoGradGuard no_grad;
  const Decoder decoder = Decoder::create(tiny_config(), 9);
  ForwardOptions options;
  int seen = 0;
  options.observer = [&](const LayerView& view) {
    if (!view.q_idx.defined()) return;
    const auto [q_idx, k_idx] = decoder.index_branch(view.layer, view.x, at::arange(50, at::kLong));
    EXPECT_TRUE(at::equal(q_idx, view.q_idx));
    EXPECT_TRUE(at::equal(k_idx, view.k_idx));
    ++seen;
  };
  decoder.forward(random_tokens(50, 61, 9), bounds_of({0, 50}), options);
  EXPECT_EQ(seen, 2);
  EXPECT_THROW(decoder.index_branch(1, at::zeros({1, 96}), at::arange(1, at::kLong)), Error);
}

TEST(Decoder, RefusesBadInput) {
  const Decoder decoder = Decoder::create(tiny_config(), 1);
  const at::Tensor tokens = random_tokens(10, 61, 1);
  EXPECT_THROW(decoder.forward(tokens.to(at::kInt), bounds_of({0, 10}), {}), Error);
  EXPECT_THROW(decoder.forward(tokens, bounds_of({0, 9}), {}), Error);
  EXPECT_THROW(decoder.forward(tokens, bounds_of({0, 7, 3, 10}), {}), Error);
  EXPECT_THROW(decoder.forward(tokens, at::tensor({0, 10}, at::kLong), {}), Error);
  EXPECT_THROW(decoder.forward(tokens - 61, bounds_of({0, 10}), {}), Error);
  ForwardOptions options;
  options.attention.topk = 65;
  EXPECT_THROW(decoder.forward(tokens, bounds_of({0, 10}), options), Error);
  options.attention.topk = 0;
  EXPECT_THROW(decoder.forward(tokens, bounds_of({0, 10}), options), Error);
  options.attention = {};
  options.attention.layer_topk = {1, 1};
  EXPECT_THROW(decoder.forward(tokens, bounds_of({0, 10}), options), Error);
  options.attention.layer_topk = {1, 1, 1};  // layer 1 has no index branch
  EXPECT_NE(message_of([&] {
              decoder.forward(tokens, bounds_of({0, 10}), options);
            }).find("layer 1 has no index"),
            std::string::npos);
  options.attention.mode = AttentionMode::kOracle;  // which needs none
  EXPECT_NO_THROW(decoder.forward(tokens, bounds_of({0, 10}), options));
  EXPECT_THROW(parse_attention_mode("full"), Error);
}

// What autograd does not record is one pass over memory; it must be the same function.
TEST(DecoderMath, OnePassEqualsTheRecordedForm) {
  files::RopeConfig rope;
  rope.rotary_dim = 12;
  const RopeTable table = make_rope_table(rope, at::arange(7, 40, at::kLong));
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const double rounding = type == at::kFloat ? 1e-6 : 8e-3;  // of the largest value: a few roundings, one of bfloat16
    at::Tensor x = at::randn({33, 2, 37}).to(type), weight = at::randn({37}).to(type);
    at::Tensor heads = at::randn({33, 3, 2 * 16}).to(type);
    for (const bool gemma : {false, true}) {
      x.requires_grad_(true);
      const at::Tensor expected = rms_norm(x, weight, 1e-5, gemma);
      ASSERT_TRUE(expected.requires_grad());
      x.requires_grad_(false);
      const at::Tensor actual = rms_norm(x, weight, 1e-5, gemma);
      EXPECT_EQ(actual.scalar_type(), type);
      EXPECT_LE(relative_error(actual.to(at::kFloat), expected.detach().to(at::kFloat)), rounding);
      EXPECT_TRUE(at::equal(rms_norm(x.narrow(0, 5, 1), weight, 1e-5, gemma)[0], actual[5]));  // whatever the chunk
    }
    heads.requires_grad_(true);
    const at::Tensor expected = apply_rope(heads, table, 2).detach();
    heads.requires_grad_(false);
    const at::Tensor actual = apply_rope(heads, table, 2);
    EXPECT_EQ(actual.scalar_type(), type);
    EXPECT_LE(relative_error(actual.to(at::kFloat), expected.to(at::kFloat)), rounding);
  }
}

TEST(DecoderMath, RopeTurnsEveryTileAlike) {
  files::RopeConfig rope;
  rope.rotary_dim = 4;
  const RopeTable table = make_rope_table(rope, at::arange(5, 9, at::kLong));
  const at::Tensor one = at::rand({4, 3, 8}, at::kFloat);
  const at::Tensor turned = apply_rope(one, table);
  EXPECT_TRUE(at::equal(turned.narrow(-1, 4, 4), one.narrow(-1, 4, 4)));  // the rest of a head passes
  const at::Tensor tiled = apply_rope(at::cat({one, one}, -1), table, 2);
  EXPECT_TRUE(at::equal(tiled, at::cat({turned, turned}, -1)));
  const double angle = 6.0 * std::pow(10000.0, -0.5);
  const double first = one[1][2][1].item<double>(), second = one[1][2][3].item<double>();
  EXPECT_NEAR(turned[1][2][1].item<double>(), first * std::cos(angle) - second * std::sin(angle), 1e-6);
  EXPECT_NEAR(turned[1][2][3].item<double>(), second * std::cos(angle) + first * std::sin(angle), 1e-6);
}

}  // namespace
}  // namespace msa::model
