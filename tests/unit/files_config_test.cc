// SPDX-License-Identifier: Apache-2.0
// config.json: what each family means by it, what is refused and how it is named, and that writing changes only what
// was changed.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "src/model/files/config.h"
#include "src/model/files/json.h"
#include "tests/unit/files_support.h"

namespace msa::files {
namespace {

/// A small valid configuration with `changes` laid over it; a null there takes the key away.
std::string config_text(const std::string& changes, const std::string& model_type = "llama") {
  Json config = parse_json(R"({"hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,
    "num_key_value_heads":2,"vocab_size":300,"max_position_embeddings":2048,"head_dim":16})",
                           "base");
  config["model_type"] = model_type;
  const Json changed = parse_json(changes, "changes");
  for (const auto& [key, value] : changed.items()) {
    config[key] = value;
    if (value.is_null()) config.erase(key);
  }
  return config.dump();
}

ModelConfig parse(const std::string& changes, const std::string& model_type = "llama") {
  return parse_model_config(config_text(changes, model_type), "config.json");
}

const std::string kIndex =
    R"("layer_types":["full_attention","minimax_m3_sparse"],"index_head_dim":32,"index_block_size":64,"index_topk_blocks":8)";

TEST(Config, ReadsTheLlamaFamily) {
  const ModelConfig llama =
      parse("{\"rope_theta\":1e5,\"tie_word_embeddings\":true,\"eos_token_id\":[2,7],\"extra\":1}");
  EXPECT_EQ(llama.rope.theta, 1e5);
  EXPECT_EQ(llama.rope.rotary_dim, 16);
  EXPECT_TRUE(llama.tie_word_embeddings);
  EXPECT_EQ(llama.eos_token_ids, (std::vector<std::int64_t>{2, 7}));
  EXPECT_FALSE(llama.qkv_bias || llama.o_bias || llama.mlp_bias || llama.qk_norm || llama.gemma_norm);
  EXPECT_FALSE(llama.has_sparse_layers());
  EXPECT_EQ(llama.group_size(), 2);
  EXPECT_EQ(parse(R"({"head_dim":null})").head_dim, 16);
  EXPECT_EQ(parse(R"({"num_key_value_heads":null})").num_key_value_heads, 4);
  EXPECT_TRUE(parse(R"({"attention_bias":true})").o_bias);

  const ModelConfig qwen2 = parse("{}", "qwen2");
  EXPECT_TRUE(qwen2.qkv_bias);
  EXPECT_FALSE(qwen2.o_bias);
  const ModelConfig qwen3 = parse(R"({"head_dim":null})", "qwen3");
  EXPECT_TRUE(qwen3.qk_norm);
  EXPECT_EQ(qwen3.head_dim, 128);  // its own default, not hidden_size / num_attention_heads
  EXPECT_FALSE(parse(R"({"sliding_window":4096})", "mistral").qkv_bias);
}

TEST(Config, ReadsRope) {
  const std::string llama3 =
      R"("factor":8,"low_freq_factor":1,"high_freq_factor":4,"original_max_position_embeddings":512)";
  const ModelConfig older = parse(R"({"rope_theta":5e5,"rope_scaling":{"type":"llama3",)" + llama3 + "}}");
  const ModelConfig newer = parse(R"({"rope_parameters":{"rope_theta":5e5,"rope_type":"llama3",)" + llama3 + "}}");
  EXPECT_EQ(older.rope, newer.rope);
  EXPECT_EQ(older.rope.type, RopeType::kLlama3);
  EXPECT_EQ(older.rope.original_max_position_embeddings, 512);
  EXPECT_EQ(parse(R"({"rope_scaling":{"rope_type":"linear","factor":2.0}})").rope.factor, 2.0);
  EXPECT_EQ(parse(R"({"rope_scaling":{"rope_type":"default"}})").rope.theta, 1e4);
  EXPECT_ERROR(parse(R"({"rope_scaling":{"rope_type":"yarn","factor":2.0}})"), "'yarn' is not supported");
  EXPECT_ERROR(parse(R"({"rope_scaling":{"type":"dynamic","factor":2.0}})"), "'dynamic' is not supported");
  EXPECT_ERROR(parse(R"({"rope_scaling":{"rope_type":"linear"}})"), "'factor' is missing");
  EXPECT_ERROR(parse(R"({"rope_parameters":{"full_attention":{"rope_theta":1e4}}})"), "parameters of its own");
  EXPECT_ERROR(parse(R"({"rope_theta":0})"), "rope_theta");
  EXPECT_ERROR(parse(R"({"partial_rotary_factor":0.5})"), "partial_rotary_factor");
  EXPECT_ERROR(parse(R"({"head_dim":15})"), "an even number");
  EXPECT_ERROR(parse(R"({"rope_scaling":{"type":"llama3","factor":8,"low_freq_factor":4,"high_freq_factor":4}})"),
               "high_freq_factor");
}

TEST(Config, ReadsPartialRotary) {
  const auto rotary = [](const std::string& changes) {
    return parse("{\"head_dim\":32" + changes + "}", "minimax_m3_vl_text").rope.rotary_dim;
  };
  EXPECT_EQ(rotary(""), 32);
  EXPECT_EQ(rotary(R"(,"rotary_dim":8)"), 8);
  EXPECT_EQ(rotary(R"(,"rotary_dim":64)"), 32);
  EXPECT_EQ(rotary(R"(,"rotary_dim":8,"partial_rotary_factor":0.5)"), 16);
  EXPECT_EQ(rotary(R"(,"rotary_dim":8,"rope_parameters":{"rope_theta":5e6,"partial_rotary_factor":0.75})"), 24);
}

TEST(Config, ReadsMinimaxM3AsPublished) {
  const std::string text = R"({"model_type":"minimax_m3_vl","text_config":{"model_type":"minimax_m3","hidden_size":64,
    "intermediate_size":32,"dense_intermediate_size":96,"shared_intermediate_size":48,"num_hidden_layers":2,
    "num_attention_heads":4,"num_key_value_heads":2,"head_dim":32,"vocab_size":300,"rope_theta":1e6,"rotary_dim":16,
    "moe_layer_freq":[0,1],"num_local_experts":8,"num_experts_per_tok":2,"hidden_act":"swigluoai","use_gemma_norm":true,
    "sparse_attention_config":{"use_sparse_attention":true,"sparse_index_dim":16,"sparse_num_index_heads":2,
    "sparse_topk_blocks":4,"sparse_block_size":32,"sparse_score_type":"max","sparse_init_block":0,"sparse_local_block":1,
    "sparse_attention_freq":[0,1],"sparse_disable_index_value":[0,1]}},"vision_config":{"hidden_size":8}})";
  const ModelConfig config = parse_model_config(text, "config.json");
  EXPECT_TRUE(config.is_minimax_m3());
  EXPECT_TRUE(config.qk_norm && config.gemma_norm);
  EXPECT_EQ(config.layer_types, (std::vector<AttentionType>{AttentionType::kFull, AttentionType::kSparse}));
  EXPECT_EQ(config.mlp_layer_types, (std::vector<MlpType>{MlpType::kDense, MlpType::kExperts}));
  EXPECT_EQ(config.index_topk_blocks, (std::vector<std::int64_t>{4, 4}));
  EXPECT_EQ(config.index_block_size, 32);
  EXPECT_EQ(config.swiglu_alpha, 1.702);
  EXPECT_EQ(config.routed_scaling_factor, 2.0);

  // Changing the budget replaces the nested key; the vision part and the rest stay.
  ModelConfig changed = config;
  changed.index_topk_blocks = {4, 7};
  const Json written = parse_json(to_json(changed), "written");
  EXPECT_EQ(written["text_config"]["index_topk_blocks"].dump(), "[4,7]");
  EXPECT_FALSE(written["text_config"]["sparse_attention_config"].contains("sparse_topk_blocks"));
  EXPECT_EQ(written["text_config"]["sparse_attention_config"]["sparse_block_size"], 32);
  EXPECT_EQ(written["vision_config"]["hidden_size"], 8);
  EXPECT_EQ(written["text_config"]["hidden_act"], "swigluoai");
}

TEST(Config, RefusesMinimaxM3Variants) {
  for (const char* change :
       {R"({"use_qk_norm":false})", R"({"use_gemma_norm":false})", R"({"attention_output_gate":true})",
        R"({"scoring_func":"softmax"})", R"({"n_shared_experts":2})", R"({"hidden_act":"gelu"})",
        R"({"mlp_layer_types":["dense","other"]})", R"({"num_experts_per_tok":129})",
        R"({"sparse_attention_config":{"sparse_score_type":"mean"}})"}) {
    EXPECT_THROW(parse(change, "minimax_m3_vl_text"), Error) << change;
  }
}

TEST(Config, ReadsAnIndexBranch) {
  const ModelConfig config = parse("{" + kIndex + "}");
  EXPECT_TRUE(config.has_sparse_layers());
  EXPECT_EQ(config.index_n_heads, 2);
  EXPECT_EQ(config.index_topk_blocks, (std::vector<std::int64_t>{8, 8}));
  EXPECT_EQ(config.index_local_blocks, 1);
  EXPECT_EQ(config.index_init_blocks, 0);
  EXPECT_TRUE(config.index_qk_norm);
  const auto with = [&](const std::string& change) { return "{" + kIndex + "," + change + "}"; };
  EXPECT_ERROR(parse(R"({"layer_types":["full_attention","minimax_m3_sparse"]})"), "index_head_dim");
  // A later duplicate key is an error, so changes are laid over the parsed text.
  const auto parse_with = [&](const std::string& change) {
    Json base = parse_json(config_text("{" + kIndex + "}"), "base");
    const Json changed = parse_json(change, "change");
    for (const auto& [key, value] : changed.items()) base[key] = value;
    return parse_model_config(base.dump(), "config.json");
  };
  EXPECT_EQ(parse_with(R"({"index_topk_blocks":[0,64]})").index_topk_blocks[1], 64);
  EXPECT_ERROR(parse_with(R"({"index_topk_blocks":[8,0]})"), "index_topk_blocks");
  EXPECT_ERROR(parse_with(R"({"index_topk_blocks":[8,65]})"), "index_topk_blocks");
  EXPECT_ERROR(parse_with(R"({"index_topk_blocks":[8]})"), "one entry for each of the 2 layers");
  EXPECT_ERROR(parse_with(R"({"index_topk_blocks":65})"), "index_topk_blocks");
  EXPECT_ERROR(parse_with(R"({"index_n_heads":4})"), "must equal num_key_value_heads 2");
  EXPECT_ERROR(parse_with(R"({"index_head_dim":24})"), "index_head_dim");
  EXPECT_ERROR(parse_with(R"({"index_head_dim":16,"head_dim":32})"), "narrower than the rotary part");
  for (const char* size : {"8", "48", "512"}) {
    EXPECT_ERROR(parse_with(std::string("{\"index_block_size\":") + size + "}"), "index_block_size");
  }
  EXPECT_ERROR(parse_with(R"({"layer_types":["full_attention"]})"), "layer_types");
  EXPECT_ERROR(parse_with(R"({"layer_types":["full_attention","sliding_attention"]})"), "sliding_attention");
  EXPECT_EQ(parse(with(R"("index_init_blocks":2)")).index_init_blocks, 2);
  EXPECT_EQ(parse(with(R"("index_value_dim":48)")).index_value_dim, 48);
  EXPECT_ERROR(parse(with(R"("index_value_dim":24)")), "index_value_dim");
  EXPECT_ERROR(parse(with(R"("index_value_dim":272)")), "index_value_dim");
  EXPECT_ERROR(parse(R"({"index_value_dim":16})"), "no layer is sparse");
  EXPECT_TRUE(parse(R"({"attention_sink":true})").attention_sink);
  EXPECT_ERROR(parse(R"({"attention_sink":1})"), "attention_sink");
}

TEST(Config, RefusesByName) {
  EXPECT_ERROR(parse("{}", "gpt2"), "'gpt2' is not supported");
  EXPECT_ERROR(parse(R"({"model_type":null})"), "model_type");
  EXPECT_ERROR(parse(R"({"hidden_act":"gelu"})"), "'gelu' is not supported");
  EXPECT_ERROR(parse(R"({"quantization_config":{"bits":4}})"), "quantization_config");
  EXPECT_ERROR(parse(R"({"attention_bias":true})", "mistral"), "attention_bias");
  EXPECT_ERROR(parse(R"({"mlp_bias":true})", "qwen2"), "mlp_bias");
  EXPECT_ERROR(parse(R"({"sliding_window":1024})", "mistral"), "sliding_window");
  EXPECT_ERROR(parse(R"({"max_position_embeddings":8192})", "mistral"), "4096 (the default)");
  EXPECT_ERROR(parse(R"({"use_sliding_window":true,"max_window_layers":1})", "qwen2"), "use_sliding_window");
  EXPECT_NO_THROW(parse(R"({"use_sliding_window":true,"max_window_layers":2})", "qwen2"));
  EXPECT_ERROR(parse_model_config("[]", "config.json"), "must be a JSON object");
  for (const char* key :
       {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}) {
    EXPECT_ERROR(parse(std::string("{\"") + key + "\":null}"), std::string("key '") + key + "' is missing");
    for (const char* value : {"0", "-1", "1.5", "\"64\"", "1e300", "99999999999999"}) {
      EXPECT_ERROR(parse(std::string("{\"") + key + "\":" + value + "}"), std::string("key '") + key + "'");
    }
  }
  EXPECT_ERROR(parse(R"({"num_key_value_heads":3})"), "must divide num_attention_heads 4");
  EXPECT_ERROR(parse(R"({"head_dim":null,"hidden_size":66})"), "head_dim");
  EXPECT_ERROR(parse(R"({"rms_norm_eps":0})"), "rms_norm_eps");
  EXPECT_ERROR(parse(R"({"eos_token_id":"x"})"), "eos_token_id");
}

TEST(Config, WritingTouchesOnlyWhatChanged) {
  const std::string text =
      parse_json(config_text(R"({"rope_theta":1e5,"unknown":{"kept":[1,2]},"torch_dtype":"float32"})"), "t").dump(2) +
      "\n";
  ModelConfig config = parse_model_config(text, "config.json");
  EXPECT_EQ(to_json(config), text);

  config.layer_types[1] = AttentionType::kSparse;
  config.index_n_heads = 2;
  config.index_head_dim = 32;
  config.index_block_size = 64;
  config.index_topk_blocks = {16, 16};
  config.dtype = "bfloat16";
  const std::string written = to_json(config);
  const Json document = parse_json(written, "written");
  EXPECT_EQ(document["unknown"].dump(), R"({"kept":[1,2]})");
  EXPECT_EQ(document["index_topk_blocks"], 16);
  EXPECT_EQ(document["layer_types"].dump(), R"(["full_attention","minimax_m3_sparse"])");
  EXPECT_EQ(document["dtype"], "bfloat16");
  EXPECT_FALSE(document.contains("torch_dtype"));
  EXPECT_EQ(document["rope_theta"], 1e5);
  EXPECT_FALSE(document.contains("rope_parameters"));
  EXPECT_EQ(to_json(parse_model_config(written, "written")), written);

  config.index_value_dim = 16;
  config.attention_sink = true;
  const Json ablated = parse_json(to_json(config), "written");
  EXPECT_EQ(ablated["index_value_dim"], 16);
  EXPECT_EQ(ablated["attention_sink"], true);
  EXPECT_FALSE(document.contains("attention_sink"));

  config.rope.theta = 2e5;
  const Json rope = parse_json(to_json(config), "written");
  EXPECT_EQ(rope["rope_parameters"]["rope_theta"], 2e5);
  EXPECT_FALSE(rope.contains("rope_theta"));
}

TEST(Config, WritesOneMadeByHand) {
  ModelConfig config = parse("{" + kIndex + R"(,"eos_token_id":3})", "qwen3");
  config.source.clear();
  const ModelConfig again = parse_model_config(to_json(config), "written");
  EXPECT_EQ(to_json(again), to_json(config));
  EXPECT_TRUE(again.has_sparse_layers());
  config.qkv_bias = true;
  config.o_bias = false;
  EXPECT_ERROR(to_json(config), "cannot have these biases");  // config.json has one key for both
  config.index_head_dim = 24;
  EXPECT_ERROR(to_json(config), "index_head_dim");
  ModelConfig narrow = parse("{}");
  narrow.rope.rotary_dim = 8;
  EXPECT_ERROR(to_json(narrow), "cannot have these rope parameters");
}

TEST(GenerationConfig, ReadsStopTokens) {
  const GenerationConfig generation =
      parse_generation_config(R"({"eos_token_id":[4,5],"temperature":0.6,"top_p":0.9})", "g");
  const ModelConfig config = parse(R"({"eos_token_id":2})");
  EXPECT_EQ(stop_token_ids(config, generation), (std::vector<std::int64_t>{4, 5}));
  EXPECT_EQ(stop_token_ids(config, {}), (std::vector<std::int64_t>{2}));
  EXPECT_EQ(generation.temperature, 0.6);
  EXPECT_ERROR(parse_generation_config(R"({"top_p":1.5})", "g"), "top_p");
  EXPECT_TRUE(load_generation_config("/nonexistent").eos_token_ids.empty());
}

}  // namespace
}  // namespace msa::files
