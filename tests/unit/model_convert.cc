// SPDX-License-Identifier: Apache-2.0
// Conversion: the closed form against its defining property (one kv head: index scores are the group-mean scores
// exactly), its recall beside means and random, q/k norms and partial rotary, what is refused, and what lands on disk.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "msa/error.h"
#include "src/model/calibrate.h"
#include "src/model/convert.h"
#include "src/model/evaluate.h"
#include "src/model/files/safetensors.h"
#include "src/model/train_random.h"

namespace msa::model {
namespace {

namespace fs = std::filesystem;

struct Shape {
  std::string model_type = "llama";
  std::int64_t query_heads = 4, kv_heads = 2;
  double partial_rotary = 1.0;
};

files::ModelConfig dense_config(const Shape& shape) {
  // wide initial weights make attention peaked, so that there is something to align with
  return files::parse_model_config(
      R"({"model_type": ")" + shape.model_type +
          R"(", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": )" +
          std::to_string(shape.query_heads) + R"(, "num_key_value_heads": )" + std::to_string(shape.kv_heads) +
          R"(, "mlp_layer_types": ["dense", "dense"], "layer_types": ["full_attention", "full_attention"],
             "dense_intermediate_size": 64, "head_dim": 32, "vocab_size": 300, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
             "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true, "initializer_range": 0.2,
             "partial_rotary_factor": )" +
          std::to_string(shape.partial_rotary) + "}",
      "dense");
}

std::vector<Tokens> random_windows(std::size_t count, std::size_t length, std::uint64_t seed) {
  std::vector<Tokens> windows(count, Tokens(length));
  Random random(seed);
  for (Tokens& window : windows) {
    for (std::int64_t& token : window) token = random.below(300);
  }
  return windows;
}

ConvertOptions small_options(Initialization initialization) {
  ConvertOptions options;
  options.block_size = 16;
  options.topk = 3;
  options.initialization = initialization;
  return options;
}

Alignment alignment_of(const Decoder& decoder) {
  EvaluationOptions options;
  options.modes = {parse_evaluation_mode("dense"), parse_evaluation_mode("sparse")};
  options.recall_rows = 128;
  return evaluate(decoder, random_windows(2, 256, 99), options).recalls.at(0).alignment;
}

TEST(Convert, OneKvHeadKeepsTheMeanScoresExactly) {
  Shape shape;
  shape.kv_heads = 1;
  Decoder decoder = Decoder::create(dense_config(shape), 3);
  add_index(decoder, small_options(Initialization::kClosedForm), random_windows(2, 128, 1));
  const at::NoGradGuard no_grad;
  ForwardOptions forward;
  forward.attention.mode = AttentionMode::kDense;
  int layers = 0;
  forward.observer = [&](const LayerView& view) {
    ++layers;
    const at::Tensor positions = at::arange(view.x.size(0), at::kLong);
    const auto [q_idx, k_idx] = decoder.index_branch(view.layer, view.x, positions);
    const at::Tensor mean = at::matmul(view.q.mean(1), view.k.squeeze(1).t());
    const at::Tensor index = at::matmul(q_idx.squeeze(1), k_idx.t());
    // float32 sums of 32 products of float32 projections over 64 inputs
    EXPECT_LT((mean - index).abs().max().item<double>(), 1e-4 * mean.abs().max().item<double>());
  };
  const Tokens tokens = random_windows(1, 64, 2)[0];
  (void)decoder.forward(at::tensor(tokens, at::kLong), at::tensor({0, 64}, at::kInt), forward);
  EXPECT_EQ(layers, 2);
}

TEST(Convert, ClosedFormBeatsMeansAndRandom) {
  const std::vector<std::string> types = {"llama", "qwen3"};
  for (const std::string& type : types) {
    Shape shape;
    shape.model_type = type;
    double last = 2;
    for (const Initialization initialization :
         {Initialization::kClosedForm, Initialization::kMean, Initialization::kRandom}) {
      Decoder decoder = Decoder::create(dense_config(shape), 3);
      add_index(decoder, small_options(initialization), random_windows(4, 256, 1));
      const Alignment alignment = alignment_of(decoder);
      EXPECT_LT(alignment.score_recall, last) << type << " " << initialization_name(initialization);
      last = alignment.score_recall;
    }
  }
}

TEST(Convert, TakesAnyIndexDimensionTheOperatorsTake) {
  Shape shape;
  shape.model_type = "minimax_m3_vl_text";  // dense so far; q/k norms, rotary dimension 16 of 32
  shape.partial_rotary = 0.5;
  for (const std::int64_t index_dim : {16, 32, 48, 64}) {
    for (const Initialization initialization : {Initialization::kClosedForm, Initialization::kMean}) {
      Decoder decoder = Decoder::create(dense_config(shape), 3);
      ConvertOptions options = small_options(initialization);
      options.index_dim = index_dim;
      add_index(decoder, options, random_windows(2, 128, 1));
      EXPECT_EQ(decoder.parameter("model.layers.1.self_attn.indexer.k_proj.weight").size(0), index_dim);
      EXPECT_GT(alignment_of(decoder).score_recall, 0.4) << index_dim;
    }
  }
  Decoder decoder = Decoder::create(dense_config({}), 3);
  for (const std::int64_t bad : {8, 16, 40, 272}) {  // not a multiple of 16; below the rotary dimension; too wide
    ConvertOptions options = small_options(Initialization::kMean);
    options.index_dim = bad;
    EXPECT_THROW(add_index(decoder, options, {}), Error) << bad;
  }
}

TEST(Convert, RefusesWhatItCannotDo) {
  Decoder decoder = Decoder::create(dense_config({}), 3);
  EXPECT_THROW(add_index(decoder, small_options(Initialization::kClosedForm), {}), Error);  // no calibration text
  ConvertOptions options = small_options(Initialization::kMean);
  options.layers = {5};
  EXPECT_THROW(add_index(decoder, options, {}), Error);
  options.layers = {};
  options.block_size = 24;
  EXPECT_THROW(add_index(decoder, options, {}), Error);
  options.block_size = 16;
  add_index(decoder, options, {});
  EXPECT_THROW(add_index(decoder, options, {}), Error);  // has one already
  EXPECT_THROW(parse_initialization("other"), Error);
}

TEST(Convert, ParsesLayerLists) {
  EXPECT_EQ(parse_layers("all", 3), (std::vector<std::int64_t>{0, 1, 2}));
  EXPECT_EQ(parse_layers("3,0-1,1", 4), (std::vector<std::int64_t>{0, 1, 3}));
  for (const char* bad : {"", "4", "-1", "1,", "a", "1-", "0 1"}) EXPECT_THROW(parse_layers(bad, 4), Error) << bad;
}

TEST(Convert, WritesACheckpointThatLoadsAndKeepsTheBase) {
  const fs::path root = fs::temp_directory_path() / ("msa_model_convert_" + std::to_string(::getpid()));
  fs::remove_all(root);
  fs::create_directories(root);
  const Decoder base = Decoder::create(dense_config({}), 3, at::kBFloat16);
  base.save((root / "base").string());
  std::ofstream(root / "base" / "tokenizer_config.json") << "{}";
  std::ofstream(root / "base" / "pytorch_model.bin") << "weights";
  Decoder decoder = Decoder::load((root / "base").string());
  ConvertOptions options = small_options(Initialization::kMean);
  options.layers = {1};
  add_index(decoder, options, {});
  const fs::path out = root / "msa";
  write_converted(decoder, root / "base", out, "{}", false);
  EXPECT_THROW(write_converted(decoder, root / "base", out, "{}", false), Error);
  EXPECT_NO_THROW(write_converted(decoder, root / "base", out, "{}", true));
  EXPECT_THROW(write_converted(decoder, root / "base", root / "base", "{}", true), Error);
  EXPECT_TRUE(fs::exists(out / "tokenizer_config.json"));
  EXPECT_FALSE(fs::exists(out / "pytorch_model.bin"));
  EXPECT_FALSE(fs::exists(root / "msa.partial"));

  const files::CheckpointReader before = files::CheckpointReader::open(root / "base");
  const files::CheckpointReader after = files::CheckpointReader::open(out);
  std::set<std::string> added;
  for (const std::string& name : after.names()) {
    if (before.find(name) == nullptr) {
      added.insert(name);
      EXPECT_EQ(after.get(name).dtype, files::DType::kBf16);
      continue;
    }
    const auto a = before.bytes(name), b = after.bytes(name);
    EXPECT_TRUE(std::equal(a.begin(), a.end(), b.begin(), b.end())) << name;
  }
  EXPECT_EQ(added, (std::set<std::string>{"model.layers.1.self_attn.indexer.k_proj.weight",
                                          "model.layers.1.self_attn.indexer.q_proj.weight"}));
  const Decoder loaded = Decoder::load(out.string());
  EXPECT_FALSE(loaded.has_index_branch(0));
  EXPECT_TRUE(loaded.has_index_branch(1));
  EXPECT_EQ(loaded.config().index_block_size, 16);
  EXPECT_EQ(loaded.config().index_topk_blocks, (std::vector<std::int64_t>{3, 3}));
  EXPECT_EQ(loaded.config().layer_types[0], files::AttentionType::kFull);
  fs::remove_all(root);
}

TEST(Calibrate, RanksALayerThatLostItsIndexFirst) {
  Decoder decoder = Decoder::create(dense_config({}), 3);
  add_index(decoder, small_options(Initialization::kClosedForm), random_windows(4, 256, 1));
  decoder.parameter("model.layers.1.self_attn.indexer.q_proj.weight").neg_();  // prefers what it should avoid
  std::vector<RetrievalDocument> documents;
  for (Tokens& window : random_windows(2, 256, 5)) documents.push_back({std::move(window), 128});
  const std::vector<LayerGain> ranking = rank_layers(decoder, documents, {});
  ASSERT_EQ(ranking.size(), 2U);
  EXPECT_EQ(ranking[0].layer, 1);
  EXPECT_GT(ranking[0].gain, ranking[1].gain);
}

TEST(Calibrate, SpendsTheBudgetOnTheFirst) {
  files::ModelConfig config = dense_config({});
  config.num_hidden_layers = 4;
  config.layer_types.assign(4, files::AttentionType::kSparse);
  config.index_n_heads = 2;
  config.index_head_dim = 32;
  config.index_block_size = 16;
  config.index_topk_blocks.assign(4, 16);
  const std::vector<LayerGain> ranking = {{2, 0.9, 0}, {0, 0.5, 0}, {1, 0.1, 0}, {3, 0.0, 0}};
  files::ModelConfig boosted = config;
  spend_budget(boosted, ranking, 1, 40, false);
  EXPECT_EQ(boosted.index_topk_blocks, (std::vector<std::int64_t>{16, 16, 40, 16}));
  boosted = config;
  spend_budget(boosted, ranking, 1, 40, true);
  EXPECT_EQ(boosted.index_topk_blocks, (std::vector<std::int64_t>{8, 8, 40, 8}));  // mean 16
  boosted = config;
  spend_budget(boosted, ranking, 2, 0, true);
  EXPECT_EQ(boosted.layer_types[2], files::AttentionType::kFull);
  EXPECT_EQ(boosted.layer_types[0], files::AttentionType::kFull);
  EXPECT_EQ(boosted.index_topk_blocks[1], 16);
  EXPECT_THROW(spend_budget(boosted, ranking, 5, 16, true), Error);
}

}  // namespace
}  // namespace msa::model
