// SPDX-License-Identifier: Apache-2.0
// A model's config.json as plain values: the Llama family (llama, mistral, qwen2, qwen3) and the MiniMax-M3 text model,
// dense or with an MSA index branch. Whatever would change the mathematics and is not implemented is refused by name;
// keys that mean nothing here are kept and written back untouched. Tested in tests/unit/files_config_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace msa::files {

enum class RopeType { kDefault, kLinear, kLlama3 };

/// Rotary position embedding: dimension i of the first rotary_dim turns with i + rotary_dim / 2, at the frequency
/// theta^(-2i / rotary_dim), scaled by type. The remaining dimensions of a head pass unturned.
struct RopeConfig {
  RopeType type = RopeType::kDefault;
  double theta = 10000.0;
  std::int64_t rotary_dim = 0;    // even, at most head_dim
  double factor = 1.0;            // linear, llama3: frequencies divided by this (llama3: the low ones)
  double low_freq_factor = 1.0;   // llama3: wavelengths above original / low are divided by factor
  double high_freq_factor = 4.0;  // llama3: wavelengths below original / high are left alone
  std::int64_t original_max_position_embeddings = 0;  // llama3: the context before the extension
  bool operator==(const RopeConfig&) const = default;
};

enum class AttentionType { kFull, kSparse };  // layer_types: "full_attention", "minimax_m3_sparse"
enum class MlpType { kDense, kExperts };      // mlp_layer_types: "dense", "sparse"

struct ModelConfig {
  std::string model_type;  // "llama", "mistral", "qwen2", "qwen3" or "minimax_m3_vl_text"
  std::string dtype;       // storage of the checkpoint as config.json states it ("bfloat16"); may be empty

  // Shape of the decoder.
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;  // of the MLP; in MiniMax-M3 of one routed expert
  std::int64_t num_hidden_layers = 0;
  std::int64_t num_attention_heads = 0;  // query_heads, a multiple of num_key_value_heads
  std::int64_t num_key_value_heads = 0;  // kv_heads
  std::int64_t head_dim = 0;             // D = Dv; need not be hidden_size / num_attention_heads
  std::int64_t vocab_size = 0;
  std::int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  double initializer_range = 0.02;   // standard deviation of fresh weights
  bool tie_word_embeddings = false;  // the output head is the embedding
  RopeConfig rope;

  // Variants of the layer.
  bool qkv_bias = false;    // q, k and v projections add a bias (always in qwen2)
  bool o_bias = false;      // so does the output projection
  bool mlp_bias = false;    // so do gate, up and down
  bool qk_norm = false;     // RMSNorm over head_dim of each q and k head before RoPE (qwen3, MiniMax-M3)
  bool gemma_norm = false;  // every RMSNorm scales by 1 + weight (MiniMax-M3)

  // Tokens. generation_config.json has its own say: see stop_token_ids.
  std::optional<std::int64_t> bos_token_id;
  std::vector<std::int64_t> eos_token_ids;
  std::optional<std::int64_t> pad_token_id;

  // Index branch (SPEC section 2). Meaningful when has_sparse_layers(); 0 in a model that never had one.
  std::vector<AttentionType> layer_types;       // one a layer
  std::int64_t index_n_heads = 0;               // one a group: equals num_key_value_heads
  std::int64_t index_head_dim = 0;              // Di: a multiple of 16 up to 256, at least rope.rotary_dim
  std::int64_t index_block_size = 0;            // Bk: a power of two from 16 to 256
  std::vector<std::int64_t> index_topk_blocks;  // k of each layer, 1 to 64; empty, or one a layer
  std::int64_t index_local_blocks = 1;
  std::int64_t index_init_blocks = 0;
  bool index_qk_norm = true;  // RMSNorm over index_head_dim of index queries and keys before RoPE
  /// An index head is this many equal parts, each turned by RoPE as a head of the main branch is. 1: the first
  /// rotary_dim dimensions turn and the rest pass (MiniMax-M3).
  std::int64_t index_rope_tiles = 1;

  // Ablations of the paper, both learned with the language-model loss (docs/training.md).
  std::int64_t index_value_dim = 0;  // of the index branch's values, whose attention is added; 0: no index value head
  bool attention_sink = false;       // a logit a query head that takes part in every softmax and has no value

  // Mixture of experts (MiniMax-M3 only; otherwise empty and zero).
  std::vector<MlpType> mlp_layer_types;       // one a layer
  std::int64_t num_local_experts = 0;         // routed experts
  std::int64_t num_experts_per_tok = 0;       // of them chosen for a token
  std::int64_t dense_intermediate_size = 0;   // of a dense layer's MLP
  std::int64_t shared_intermediate_size = 0;  // of the shared expert
  double routed_scaling_factor = 1.0;         // of the routed experts' sum
  double swiglu_alpha = 1.702;                // gain inside the sigmoid
  double swiglu_limit = 7.0;                  // clamp of gate (above) and up (both sides)

  /// The text this was parsed from, the source of the keys that to_json keeps. Empty for a configuration made by hand.
  std::string source;

  bool is_minimax_m3() const { return model_type == "minimax_m3_vl_text"; }
  bool has_sparse_layers() const;
  std::int64_t group_size() const { return num_attention_heads / num_key_value_heads; }
};

/// Parses and validates. `origin` names the text in errors. A missing optional key takes the default that the
/// transformers package gives that model_type. Throws msa::Error naming the key that is missing, out of range or asks
/// for something not supported.
ModelConfig parse_model_config(std::string_view text, const std::string& origin);

/// From a file, or from config.json in a directory.
ModelConfig load_model_config(const std::filesystem::path& path);

/// The rules between fields, for a configuration changed by hand (parse_model_config applies them too). Throws
/// msa::Error naming the key. O(layers).
void validate(const ModelConfig& config, const std::string& origin);

/// JSON text: `source` with the keys changed since parsing replaced and nothing else touched, or every key when there
/// is no source. Throws msa::Error when the result would not read back as `config` (a combination that config.json
/// cannot say, such as a bias on q but not on o in a llama model).
std::string to_json(const ModelConfig& config);

/// What generation_config.json suggests.
struct GenerationConfig {
  std::optional<std::int64_t> bos_token_id;
  std::vector<std::int64_t> eos_token_ids;
  bool do_sample = false;
  double temperature = 1.0;
  double top_p = 1.0;
  std::int64_t top_k = 0;  // 0: all
};

GenerationConfig parse_generation_config(std::string_view text, const std::string& origin);
/// The directory's generation_config.json; defaults when there is none.
GenerationConfig load_generation_config(const std::filesystem::path& directory);

/// The tokens that end a generation: those of generation_config.json, or else of config.json.
std::vector<std::int64_t> stop_token_ids(const ModelConfig& config, const GenerationConfig& generation);

}  // namespace msa::files
