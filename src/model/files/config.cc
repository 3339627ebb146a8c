// SPDX-License-Identifier: Apache-2.0
// See config.h. Parsing goes from JSON to the struct by model type; writing goes back through one flat view of the
// struct, compared with the same view of what was parsed, so that only real changes touch the file.
#include "src/model/files/config.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <utility>

#include "msa/error.h"
#include "src/model/files/file_io.h"
#include "src/model/files/json.h"
#include "src/model/files/quote.h"

namespace msa::files {
namespace {

constexpr std::size_t kMaxConfigBytes = 16'000'000;
constexpr std::int64_t kMaxWidth = std::int64_t{1} << 20;  // hidden and intermediate sizes, heads
constexpr std::int64_t kMaxLayers = 4096;
constexpr std::int64_t kMaxHeadDim = 4096;
constexpr std::int64_t kMaxVocabulary = std::int64_t{1} << 24;
constexpr std::int64_t kMaxPositions = std::int64_t{1} << 30;  // positions are int32 in the operators
constexpr std::int64_t kMaxExperts = 65536;
constexpr std::int64_t kMaxTokenId = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kMaxTopk = 64;       // SPEC section 1
constexpr std::int64_t kMaxIndexDim = 256;  // SPEC section 1
constexpr std::int64_t kMissing = -1;

constexpr char kMinimaxM3[] = "minimax_m3_vl_text";
constexpr char kFullAttention[] = "full_attention";
constexpr char kSparseAttention[] = "minimax_m3_sparse";

// Keys that MiniMax-M3 publishes in a nested object, and the flat keys they stand for.
struct Alias {
  const char* flat;
  const char* nested;
};
constexpr std::array<Alias, 7> kSparseAliases = {{{"index_n_heads", "sparse_num_index_heads"},
                                                  {"index_head_dim", "sparse_index_dim"},
                                                  {"index_block_size", "sparse_block_size"},
                                                  {"index_topk_blocks", "sparse_topk_blocks"},
                                                  {"index_local_blocks", "sparse_local_block"},
                                                  {"index_init_blocks", "sparse_init_block"},
                                                  {"layer_types", "sparse_attention_freq"}}};

// What the transformers package assumes of a key that config.json leaves out; kMissing: derived from others.
struct TypeDefaults {
  const char* model_type;
  std::int64_t num_key_value_heads;
  std::int64_t head_dim;
  std::int64_t max_position_embeddings;
  double rope_theta;
};
constexpr std::array<TypeDefaults, 5> kTypes = {{{"llama", kMissing, kMissing, 2048, 1e4},
                                                 {"mistral", 8, kMissing, 131072, 1e4},
                                                 {"qwen2", 32, kMissing, 32768, 1e4},
                                                 {"qwen3", 32, 128, 32768, 1e4},
                                                 {kMinimaxM3, 4, 128, 524288, 5e6}}};

const TypeDefaults& find_type(const std::string& model_type, const std::string& origin) {
  for (const TypeDefaults& type : kTypes) {
    if (model_type == type.model_type) return type;
  }
  throw Error(key_error(origin, "model_type",
                        quote(model_type) + " is not supported; llama, mistral, qwen2, qwen3 and minimax_m3_vl are"));
}

/// A JSON object with the name it goes by in errors.
struct Reader {
  const Json& object;
  const std::string& origin;

  const Json* find(const char* key) const { return find_value(object, key); }
  bool has(const char* key) const { return find(key) != nullptr; }
  [[noreturn]] void fail(std::string_view key, const std::string& what) const {
    throw Error(key_error(origin, key, what));
  }
  std::int64_t integer(const char* key, std::int64_t fallback, std::int64_t low, std::int64_t high) const {
    return read_int(object, key, fallback, low, high, origin);
  }
  std::int64_t required(const char* key, std::int64_t high) const {
    if (!has(key)) fail(key, "is missing");
    return integer(key, 0, 1, high);
  }
  double number(const char* key, double fallback, double low, double high) const {
    return read_number(object, key, fallback, low, high, origin);
  }
  bool flag(const char* key, bool fallback) const { return read_bool(object, key, fallback, origin); }
  std::string text(const char* key, const std::string& fallback) const {
    return read_string(object, key, fallback, origin);
  }
  /// The key, when present, must say what is implemented.
  void require_flag(const char* key, bool implemented) const {
    if (flag(key, implemented) != implemented)
      fail(key, std::string(implemented ? "false" : "true") + " is not supported");
  }
  void require_text(const char* key, const std::string& implemented) const {
    const std::string value = text(key, implemented);
    if (value != implemented) fail(key, quote(value) + " is not supported, only " + quote(implemented) + " is");
  }
  /// An array with one entry a layer, or nullptr.
  const Json* layer_list(const char* key, std::int64_t layers) const {
    const Json* const list = find(key);
    if (list == nullptr) return nullptr;
    if (!list->is_array() || list->size() != static_cast<std::size_t>(layers)) {
      fail(key, "must be a list with one entry for each of the " + std::to_string(layers) + " layers");
    }
    return list;
  }
};

std::vector<std::int64_t> read_token_ids(const Reader& reader, const char* key) {
  std::vector<std::int64_t> ids;
  const Json* const value = reader.find(key);
  if (value == nullptr) return ids;
  const std::size_t count = value->is_array() ? value->size() : 1;
  if (count > 1024) reader.fail(key, "lists more than 1024 tokens");
  for (std::size_t i = 0; i < count; ++i) {
    const Json& id = value->is_array() ? (*value)[i] : *value;
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() > static_cast<std::uint64_t>(kMaxTokenId)) {
      reader.fail(key, "must be a token id or a list of them, not " + quote(value->dump()));
    }
    ids.push_back(id.get<std::int64_t>());
  }
  return ids;
}

std::optional<std::int64_t> read_token_id(const Reader& reader, const char* key) {
  // -1 is an old way of saying none.
  const std::int64_t id = reader.integer(key, -1, -1, kMaxTokenId);
  return id < 0 ? std::nullopt : std::optional(id);
}

/// 0/1 flags a layer, as the published MiniMax-M3 configuration has them.
std::vector<bool> read_layer_flags(const Json& list, const Reader& reader, const char* key) {
  std::vector<bool> flags;
  for (const Json& flag : list) {
    if (flag.is_boolean()) {
      flags.push_back(flag.get<bool>());
    } else if (flag.is_number_integer()) {
      flags.push_back(flag.get<std::int64_t>() != 0);
    } else {
      reader.fail(key, "must list 0 or 1 for each layer");
    }
  }
  return flags;
}

RopeConfig read_rope(const Reader& reader, const ModelConfig& config, double default_theta) {
  // The older form: rope_theta beside rope_scaling {type or rope_type, ...}. The newer: all in rope_parameters.
  const Json empty = Json::object();
  const Json* parameters = reader.find("rope_scaling");
  const char* key = "rope_scaling";
  if (parameters == nullptr || (parameters->is_object() && parameters->empty())) {
    key = "rope_parameters";
    parameters = reader.find(key);
  }
  if (parameters == nullptr) parameters = &empty;
  if (!parameters->is_object()) reader.fail(key, "must be an object");
  const std::string where = reader.origin + ": " + key;
  const Reader rope{*parameters, where};
  for (const auto& [name, value] : parameters->items()) {
    if (value.is_object()) reader.fail(key, "has parameters of its own for " + quote(name) + "; that is not supported");
  }
  if (rope.has("mrope_section")) rope.fail("mrope_section", "is not supported");

  RopeConfig result;
  const std::string type = rope.text("rope_type", rope.text("type", "default"));
  if (type == "linear") {
    result.type = RopeType::kLinear;
  } else if (type == "llama3") {
    result.type = RopeType::kLlama3;
  } else if (type != "default") {
    rope.fail("rope_type", quote(type) + " is not supported; default, linear and llama3 are");
  }
  result.theta = rope.number("rope_theta", reader.number("rope_theta", default_theta, 1.0, 1e15), 1.0, 1e15);
  if (result.type != RopeType::kDefault) {
    if (!rope.has("factor")) rope.fail("factor", "is missing");
    result.factor = rope.number("factor", 1.0, 1.0, 1e6);
  }
  if (result.type == RopeType::kLlama3) {
    for (const char* name : {"low_freq_factor", "high_freq_factor"}) {
      if (!rope.has(name)) rope.fail(name, "is missing");
    }
    result.low_freq_factor = rope.number("low_freq_factor", 1.0, 1e-6, 1e6);
    result.high_freq_factor = rope.number("high_freq_factor", 4.0, 1e-6, 1e6);
    result.original_max_position_embeddings = reader.integer(
        "original_max_position_embeddings",
        rope.integer("original_max_position_embeddings", config.max_position_embeddings, 1, kMaxPositions), 1,
        kMaxPositions);
  }

  // The turned part of a head: a factor in either place, else rotary_dim, else all.
  double fraction = reader.number("partial_rotary_factor", -1.0, 0.0, 1.0);
  fraction = rope.number("partial_rotary_factor", fraction, 0.0, 1.0);
  result.rotary_dim = config.head_dim;
  if (fraction >= 0.0) {
    result.rotary_dim = static_cast<std::int64_t>(static_cast<double>(config.head_dim) * fraction);
  } else if (config.is_minimax_m3()) {
    // The transformers package writes its default of 64 into every configuration, narrow heads included.
    result.rotary_dim = std::min(config.head_dim, reader.integer("rotary_dim", config.head_dim, 1, kMaxHeadDim));
  }
  if (!config.is_minimax_m3() && result.rotary_dim != config.head_dim) {
    reader.fail("partial_rotary_factor", "other than 1 is not supported for model_type " + quote(config.model_type));
  }
  return result;
}

void refuse_sliding_window(const Reader& reader, const ModelConfig& config) {
  if (config.model_type == "mistral") {
    // Absent means 4096 there, null means none; a window no shorter than the context never cuts anything off.
    const auto found = reader.object.find("sliding_window");
    const bool absent = found == reader.object.end();
    if (!absent && found->is_null()) return;
    const std::int64_t window = reader.integer("sliding_window", 4096, 1, std::numeric_limits<std::int64_t>::max());
    if (window < config.max_position_embeddings) {
      reader.fail("sliding_window", std::to_string(window) + (absent ? " (the default)" : "") +
                                        " is shorter than max_position_embeddings; sliding windows are not supported");
    }
  }
  if (config.model_type == "qwen2" || config.model_type == "qwen3") {
    const bool windowed = reader.flag("use_sliding_window", false) && !reader.has("layer_types");
    if (windowed && reader.integer("max_window_layers", 28, 0, kMaxLayers) < config.num_hidden_layers) {
      reader.fail("use_sliding_window", "true is not supported");
    }
  }
}

void read_layer_types(const Reader& reader, ModelConfig* config) {
  config->layer_types.assign(static_cast<std::size_t>(config->num_hidden_layers), AttentionType::kFull);
  const Json* const list = reader.layer_list("layer_types", config->num_hidden_layers);
  if (list == nullptr) return;
  for (std::size_t i = 0; i < list->size(); ++i) {
    const Json& type = (*list)[i];
    if (type == kSparseAttention) {
      config->layer_types[i] = AttentionType::kSparse;
    } else if (type != kFullAttention) {
      reader.fail("layer_types", "entry " + quote(type.dump()) + " of layer " + std::to_string(i) +
                                     " is not supported; full_attention and minimax_m3_sparse are");
    }
  }
}

/// `sparse` is MiniMax-M3's nested sparse_attention_config; the transformers package lets it win over the flat keys.
void read_index(const Reader& reader, const Reader& sparse, ModelConfig* config) {
  const bool m3 = config->is_minimax_m3();
  const auto layers = static_cast<std::size_t>(config->num_hidden_layers);
  if (m3 && !reader.has("layer_types")) {
    if (const Json* const list = sparse.layer_list("sparse_attention_freq", config->num_hidden_layers)) {
      const std::vector<bool> flags = read_layer_flags(*list, sparse, "sparse_attention_freq");
      for (std::size_t i = 0; i < layers; ++i) {
        if (flags[i]) config->layer_types[i] = AttentionType::kSparse;
      }
    }
  }
  const auto read = [&](std::size_t alias, std::int64_t fallback, std::int64_t low, std::int64_t high) {
    const std::int64_t flat = reader.integer(kSparseAliases[alias].flat, fallback, low, high);
    return m3 ? sparse.integer(kSparseAliases[alias].nested, flat, low, high) : flat;
  };
  config->index_n_heads = read(0, m3 ? 4 : config->has_sparse_layers() ? config->num_key_value_heads : 0, 0, kMaxWidth);
  config->index_head_dim = read(1, m3 ? 128 : 0, 0, kMaxHeadDim);
  config->index_block_size = read(2, m3 ? 128 : 0, 0, kMaxPositions);
  config->index_local_blocks = read(4, 1, 0, kMaxPositions);
  config->index_init_blocks = read(5, 0, 0, kMaxPositions);
  config->index_qk_norm = reader.flag("index_qk_norm", true);
  config->index_rope_tiles = reader.integer("index_rope_tiles", 1, 1, kMaxIndexDim / 16);
  config->index_value_dim = reader.integer("index_value_dim", 0, 0, kMaxHeadDim);

  const Json* const topk = reader.find("index_topk_blocks");
  if (topk != nullptr && topk->is_array() && !(m3 && sparse.has("sparse_topk_blocks"))) {
    reader.layer_list("index_topk_blocks", config->num_hidden_layers);
    for (const Json& entry : *topk) {
      if (!entry.is_number_unsigned() || entry.get<std::uint64_t>() > static_cast<std::uint64_t>(kMaxTopk)) {
        reader.fail("index_topk_blocks", "must hold integers up to 64, not " + quote(entry.dump()));
      }
      config->index_topk_blocks.push_back(entry.get<std::int64_t>());
    }
  } else {
    std::int64_t flat = m3 ? 16 : 0;
    if (topk != nullptr && !topk->is_array()) flat = reader.integer("index_topk_blocks", flat, 1, kMaxTopk);
    if (m3) flat = sparse.integer("sparse_topk_blocks", flat, 1, kMaxTopk);
    if (flat > 0) config->index_topk_blocks.assign(layers, flat);
  }
}

void read_experts(const Reader& reader, ModelConfig* config) {
  config->num_local_experts = reader.integer("num_local_experts", 128, 1, kMaxExperts);
  config->num_experts_per_tok = reader.integer("num_experts_per_tok", 4, 1, kMaxExperts);
  config->dense_intermediate_size = reader.integer("dense_intermediate_size", 12288, 1, kMaxWidth);
  config->shared_intermediate_size = reader.integer("shared_intermediate_size", 3072, 1, kMaxWidth);
  config->routed_scaling_factor = reader.number("routed_scaling_factor", 2.0, -1e6, 1e6);
  config->swiglu_alpha = reader.number("swiglu_alpha", 1.702, -1e6, 1e6);
  config->swiglu_limit = reader.number("swiglu_limit", 7.0, 1e-6, 1e30);

  config->mlp_layer_types.assign(static_cast<std::size_t>(config->num_hidden_layers), MlpType::kExperts);
  if (const Json* const list = reader.layer_list("mlp_layer_types", config->num_hidden_layers)) {
    for (std::size_t i = 0; i < list->size(); ++i) {
      if ((*list)[i] == "dense") {
        config->mlp_layer_types[i] = MlpType::kDense;
      } else if ((*list)[i] != "sparse") {
        reader.fail("mlp_layer_types", "entry " + quote((*list)[i].dump()) + " is not supported; dense and sparse are");
      }
    }
  } else if (const Json* const freq = reader.layer_list("moe_layer_freq", config->num_hidden_layers)) {
    const std::vector<bool> flags = read_layer_flags(*freq, reader, "moe_layer_freq");
    for (std::size_t i = 0; i < flags.size(); ++i) {
      if (!flags[i]) config->mlp_layer_types[i] = MlpType::kDense;
    }
  }
}

/// Switches of the published MiniMax-M3 configuration of which only one position is implemented.
void require_minimax_m3_switches(const Reader& reader, const Reader& sparse, const ModelConfig& config) {
  reader.require_flag("use_qk_norm", true);
  reader.require_text("qk_norm_type", "per_head");
  reader.require_flag("use_gemma_norm", true);
  reader.require_flag("attention_output_gate", false);
  reader.require_text("scoring_func", "sigmoid");
  if (reader.integer("n_shared_experts", 1, 0, kMaxExperts) != 1)
    reader.fail("n_shared_experts", "other than 1 is not supported");
  sparse.require_text("sparse_score_type", "max");
  if (config.has_sparse_layers()) sparse.require_flag("use_sparse_attention", true);
  if (const Json* const list = sparse.find("sparse_disable_index_value"); list != nullptr && list->is_array()) {
    const std::vector<bool> disabled =
        read_layer_flags(*sparse.layer_list("sparse_disable_index_value", config.num_hidden_layers), sparse,
                         "sparse_disable_index_value");
    for (std::size_t i = 0; i < disabled.size(); ++i) {
      if (config.layer_types[i] == AttentionType::kSparse && !disabled[i]) {
        sparse.fail("sparse_disable_index_value", "0 in sparse layer " + std::to_string(i) + " is not supported");
      }
    }
  }
}

/// The object that describes the decoder: the document, or its text_config.
template <class AnyJson>  // const or not
AnyJson& text_object(AnyJson& document) {
  const auto nested = document.find("text_config");
  return nested != document.end() && nested->is_object() ? *nested : document;
}

ModelConfig read_config(const Json& document, const std::string& origin) {
  if (!document.is_object()) throw Error(origin + ": must be a JSON object");
  const Json& text = text_object(document);
  const bool nested = &text != &document;
  const Reader top{document, origin};
  const Reader reader{text, origin};

  ModelConfig config;
  config.model_type = top.text("model_type", "");
  if (config.model_type == "minimax_m3_vl" || config.model_type == "minimax_m3") config.model_type = kMinimaxM3;
  const TypeDefaults& type = find_type(config.model_type, origin);
  const bool m3 = config.is_minimax_m3();
  if (nested && !m3) top.fail("text_config", "is not supported for model_type " + quote(config.model_type));
  for (const Reader& level : {top, reader}) {
    if (level.has("quantization_config")) level.fail("quantization_config", "is not supported");
  }

  config.hidden_size = reader.required("hidden_size", kMaxWidth);
  config.intermediate_size = reader.required("intermediate_size", kMaxWidth);
  config.num_hidden_layers = reader.required("num_hidden_layers", kMaxLayers);
  config.num_attention_heads = reader.required("num_attention_heads", kMaxWidth);
  config.vocab_size = reader.required("vocab_size", kMaxVocabulary);
  // null is "as many as query heads"; an absent key is the type's default.
  const bool kv_absent = type.num_key_value_heads != kMissing && !text.contains("num_key_value_heads");
  config.num_key_value_heads = reader.integer(
      "num_key_value_heads", kv_absent ? type.num_key_value_heads : config.num_attention_heads, 1, kMaxWidth);
  config.head_dim = reader.integer("head_dim", type.head_dim == kMissing ? 0 : type.head_dim, 1, kMaxHeadDim);
  if (config.head_dim == 0) {
    if (config.hidden_size % config.num_attention_heads != 0) {
      reader.fail("head_dim", "is missing and hidden_size is not a multiple of num_attention_heads");
    }
    config.head_dim = config.hidden_size / config.num_attention_heads;
  }
  config.max_position_embeddings =
      reader.integer("max_position_embeddings", type.max_position_embeddings, 1, kMaxPositions);
  config.rms_norm_eps = reader.number("rms_norm_eps", 1e-6, 1e-30, 1.0);
  config.initializer_range = reader.number("initializer_range", 0.02, 0.0, 1e3);
  config.tie_word_embeddings = reader.flag("tie_word_embeddings", false) || top.flag("tie_word_embeddings", false);
  config.dtype = reader.text("dtype", reader.text("torch_dtype", top.text("dtype", top.text("torch_dtype", ""))));
  config.rope = read_rope(reader, config, type.rope_theta);

  const std::string activation = reader.text("hidden_act", "silu");
  if (activation != "silu" && !(m3 && activation == "swigluoai")) {
    reader.fail("hidden_act", quote(activation) + " is not supported, only silu is");
  }
  reader.require_flag("rope_interleaved", false);
  if (config.model_type == "llama" || config.model_type == "qwen3") {
    config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  } else if (config.model_type == "qwen2") {
    config.qkv_bias = true;
  } else {
    reader.require_flag("attention_bias", false);
  }
  if (config.model_type == "llama") {
    config.mlp_bias = reader.flag("mlp_bias", false);
  } else {
    reader.require_flag("mlp_bias", false);
  }
  config.attention_sink = reader.flag("attention_sink", false);
  config.qk_norm = m3 || config.model_type == "qwen3";
  config.gemma_norm = m3;

  const auto token_level = [&](const char* key) { return reader.has(key) ? reader : top; };
  config.bos_token_id = read_token_id(token_level("bos_token_id"), "bos_token_id");
  config.eos_token_ids = read_token_ids(token_level("eos_token_id"), "eos_token_id");
  config.pad_token_id = read_token_id(token_level("pad_token_id"), "pad_token_id");

  refuse_sliding_window(reader, config);
  read_layer_types(reader, &config);
  const Json empty = Json::object();
  const Json* const nested_sparse = m3 ? reader.find("sparse_attention_config") : nullptr;
  if (nested_sparse != nullptr && !nested_sparse->is_object())
    reader.fail("sparse_attention_config", "must be an object");
  const Reader sparse{nested_sparse == nullptr ? empty : *nested_sparse, origin};
  read_index(reader, sparse, &config);
  if (m3) {
    read_experts(reader, &config);
    require_minimax_m3_switches(reader, sparse, config);
  }
  validate(config, origin);
  return config;
}

const char* rope_type_name(RopeType type) {
  return type == RopeType::kLinear ? "linear" : type == RopeType::kLlama3 ? "llama3" : "default";
}

Json flatten_rope(const ModelConfig& config) {
  Json rope = {{"rope_type", rope_type_name(config.rope.type)}, {"rope_theta", config.rope.theta}};
  if (config.is_minimax_m3()) {  // always said: a rotary_dim elsewhere in the file would speak otherwise
    rope["partial_rotary_factor"] = static_cast<double>(config.rope.rotary_dim) / static_cast<double>(config.head_dim);
  }
  if (config.rope.type != RopeType::kDefault) rope["factor"] = config.rope.factor;
  if (config.rope.type == RopeType::kLlama3) {
    rope["low_freq_factor"] = config.rope.low_freq_factor;
    rope["high_freq_factor"] = config.rope.high_freq_factor;
    rope["original_max_position_embeddings"] = config.rope.original_max_position_embeddings;
  }
  return rope;
}

/// Every field as the key and value that config.json has for it. null: the key need not be there.
Json flatten(const ModelConfig& config) {
  const auto optional_id = [](const std::optional<std::int64_t>& id) { return id ? Json(*id) : Json(nullptr); };
  Json flat = {{"model_type", config.model_type},
               {"dtype", config.dtype.empty() ? Json(nullptr) : Json(config.dtype)},
               {"hidden_size", config.hidden_size},
               {"intermediate_size", config.intermediate_size},
               {"num_hidden_layers", config.num_hidden_layers},
               {"num_attention_heads", config.num_attention_heads},
               {"num_key_value_heads", config.num_key_value_heads},
               {"head_dim", config.head_dim},
               {"vocab_size", config.vocab_size},
               {"max_position_embeddings", config.max_position_embeddings},
               {"rms_norm_eps", config.rms_norm_eps},
               {"initializer_range", config.initializer_range},
               {"tie_word_embeddings", config.tie_word_embeddings},
               {"rope_parameters", flatten_rope(config)},
               {"hidden_act", "silu"},
               {"attention_sink", config.attention_sink},
               {"bos_token_id", optional_id(config.bos_token_id)},
               {"pad_token_id", optional_id(config.pad_token_id)}};
  if (config.eos_token_ids.empty()) {
    flat["eos_token_id"] = nullptr;
  } else {
    flat["eos_token_id"] =
        config.eos_token_ids.size() == 1 ? Json(config.eos_token_ids[0]) : Json(config.eos_token_ids);
  }
  if (config.model_type == "llama" || config.model_type == "qwen3") flat["attention_bias"] = config.o_bias;
  if (config.model_type == "llama") flat["mlp_bias"] = config.mlp_bias;
  if (config.model_type == "mistral") flat["sliding_window"] = nullptr;

  if (config.has_sparse_layers() || config.is_minimax_m3() || config.index_head_dim != 0) {
    Json layer_types = Json::array();
    for (const AttentionType type : config.layer_types) {
      layer_types.push_back(type == AttentionType::kSparse ? kSparseAttention : kFullAttention);
    }
    flat["layer_types"] = std::move(layer_types);
    flat["index_n_heads"] = config.index_n_heads;
    flat["index_head_dim"] = config.index_head_dim;
    flat["index_block_size"] = config.index_block_size;
    const std::vector<std::int64_t>& topk = config.index_topk_blocks;
    const bool one_value =
        !topk.empty() && topk[0] > 0 && std::count(topk.begin(), topk.end(), topk[0]) == std::ssize(topk);
    flat["index_topk_blocks"] = topk.empty() ? Json(nullptr) : one_value ? Json(topk[0]) : Json(topk);
    flat["index_local_blocks"] = config.index_local_blocks;
    flat["index_init_blocks"] = config.index_init_blocks;
    flat["index_qk_norm"] = config.index_qk_norm;
    flat["index_rope_tiles"] = config.index_rope_tiles;
    flat["index_value_dim"] = config.index_value_dim;
  }
  if (config.is_minimax_m3()) {
    Json mlp_types = Json::array();
    for (const MlpType type : config.mlp_layer_types) mlp_types.push_back(type == MlpType::kDense ? "dense" : "sparse");
    flat["mlp_layer_types"] = std::move(mlp_types);
    flat["num_local_experts"] = config.num_local_experts;
    flat["num_experts_per_tok"] = config.num_experts_per_tok;
    flat["dense_intermediate_size"] = config.dense_intermediate_size;
    flat["shared_intermediate_size"] = config.shared_intermediate_size;
    flat["routed_scaling_factor"] = config.routed_scaling_factor;
    flat["swiglu_alpha"] = config.swiglu_alpha;
    flat["swiglu_limit"] = config.swiglu_limit;
  }
  return flat;
}

/// Puts one key into the object that describes the decoder and takes out every other way of saying the same.
void store_key(Json& text, const std::string& key, const Json& value) {
  if (key == "rope_parameters") {
    for (const char* old :
         {"rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"}) {
      text.erase(old);
    }
  } else if (key == "dtype") {
    text.erase("torch_dtype");
  } else if (key == "mlp_layer_types") {
    text.erase("moe_layer_freq");
  }
  if (const auto sparse = text.find("sparse_attention_config"); sparse != text.end() && sparse->is_object()) {
    for (const Alias& alias : kSparseAliases) {
      if (key == alias.flat) sparse->erase(alias.nested);
    }
  }
  text[key] = value;
}

}  // namespace

bool ModelConfig::has_sparse_layers() const {
  return std::find(layer_types.begin(), layer_types.end(), AttentionType::kSparse) != layer_types.end();
}

void validate(const ModelConfig& config, const std::string& origin) {
  const auto check = [&](bool holds, const char* key, const std::string& rule) {
    if (!holds) throw Error(key_error(origin, key, rule));
  };
  const auto in_range = [&](const char* key, std::int64_t value, std::int64_t high) {
    check(value >= 1 && value <= high, key, std::to_string(value) + " must be from 1 to " + std::to_string(high));
  };
  find_type(config.model_type, origin);
  in_range("hidden_size", config.hidden_size, kMaxWidth);
  in_range("intermediate_size", config.intermediate_size, kMaxWidth);
  in_range("num_hidden_layers", config.num_hidden_layers, kMaxLayers);
  in_range("num_attention_heads", config.num_attention_heads, kMaxWidth);
  in_range("num_key_value_heads", config.num_key_value_heads, kMaxWidth);
  in_range("head_dim", config.head_dim, kMaxHeadDim);
  in_range("vocab_size", config.vocab_size, kMaxVocabulary);
  in_range("max_position_embeddings", config.max_position_embeddings, kMaxPositions);
  check(config.num_attention_heads % config.num_key_value_heads == 0, "num_key_value_heads",
        std::to_string(config.num_key_value_heads) + " must divide num_attention_heads " +
            std::to_string(config.num_attention_heads));
  check(config.rope.rotary_dim >= 2 && config.rope.rotary_dim % 2 == 0 && config.rope.rotary_dim <= config.head_dim,
        "rope_parameters",
        "turns " + std::to_string(config.rope.rotary_dim) + " of head_dim " + std::to_string(config.head_dim) +
            " dimensions; an even number from 2 is needed");
  if (config.rope.type == RopeType::kLlama3) {
    check(config.rope.low_freq_factor < config.rope.high_freq_factor, "high_freq_factor",
          "must exceed low_freq_factor");
  }
  const auto layers = static_cast<std::size_t>(config.num_hidden_layers);
  const std::string a_layer = "must have one entry for each of the " + std::to_string(layers) + " layers";
  check(config.layer_types.size() == layers, "layer_types", a_layer);
  if (config.has_sparse_layers()) {
    check(config.index_n_heads == config.num_key_value_heads, "index_n_heads",
          std::to_string(config.index_n_heads) + " must equal num_key_value_heads " +
              std::to_string(config.num_key_value_heads) + ": one index query head for each group");
    check(config.index_head_dim >= 16 && config.index_head_dim <= kMaxIndexDim && config.index_head_dim % 16 == 0,
          "index_head_dim", std::to_string(config.index_head_dim) + " must be a multiple of 16 from 16 to 256");
    check(config.index_rope_tiles >= 1 && config.index_head_dim % config.index_rope_tiles == 0, "index_rope_tiles",
          std::to_string(config.index_rope_tiles) + " must divide index_head_dim " +
              std::to_string(config.index_head_dim));
    check(config.index_head_dim / config.index_rope_tiles >= config.rope.rotary_dim, "index_head_dim",
          std::to_string(config.index_head_dim) + " in " + std::to_string(config.index_rope_tiles) +
              " parts is narrower than the rotary part of " + std::to_string(config.rope.rotary_dim) + " dimensions");
    check(config.index_block_size >= 16 && config.index_block_size <= 256 &&
              std::has_single_bit(static_cast<std::uint64_t>(config.index_block_size)),
          "index_block_size", std::to_string(config.index_block_size) + " must be a power of two from 16 to 256");
    check(config.index_value_dim >= 0 && config.index_value_dim <= kMaxIndexDim && config.index_value_dim % 16 == 0,
          "index_value_dim", std::to_string(config.index_value_dim) + " must be 0 or a multiple of 16 up to 256");
    check(config.index_local_blocks >= 0 && config.index_local_blocks <= kMaxPositions, "index_local_blocks",
          "must not be negative");
    check(config.index_init_blocks >= 0 && config.index_init_blocks <= kMaxPositions, "index_init_blocks",
          "must not be negative");
    check(config.index_topk_blocks.size() == layers, "index_topk_blocks", a_layer);
    for (std::size_t i = 0; i < layers; ++i) {
      const bool sparse = config.layer_types[i] == AttentionType::kSparse;
      check(config.index_topk_blocks[i] >= (sparse ? 1 : 0) && config.index_topk_blocks[i] <= kMaxTopk,
            "index_topk_blocks",
            std::to_string(config.index_topk_blocks[i]) + " of layer " + std::to_string(i) + " must be from 1 to 64");
    }
  }
  check(config.index_value_dim == 0 || config.has_sparse_layers(), "index_value_dim",
        std::to_string(config.index_value_dim) + " asks for an index value head, but no layer is sparse");
  if (config.is_minimax_m3()) {
    check(config.mlp_layer_types.size() == layers, "mlp_layer_types", a_layer);
    in_range("num_local_experts", config.num_local_experts, kMaxExperts);
    in_range("num_experts_per_tok", config.num_experts_per_tok, config.num_local_experts);
    in_range("dense_intermediate_size", config.dense_intermediate_size, kMaxWidth);
    in_range("shared_intermediate_size", config.shared_intermediate_size, kMaxWidth);
  }
}

ModelConfig parse_model_config(std::string_view text, const std::string& origin) {
  ModelConfig config = read_config(parse_json(text, origin), origin);
  config.source = text;
  return config;
}

ModelConfig load_model_config(const std::filesystem::path& path) {
  std::error_code ignored;
  const std::filesystem::path file = std::filesystem::is_directory(path, ignored) ? path / "config.json" : path;
  return parse_model_config(read_text_file(file, kMaxConfigBytes), quote(file.string()));
}

std::string to_json(const ModelConfig& config) {
  const std::string origin = "configuration to write";
  validate(config, origin);
  Json document = Json::object();
  const Json wanted = flatten(config);
  if (config.source.empty()) {
    document = wanted;
  } else {
    document = parse_json(config.source, origin);
    const Json before = flatten(read_config(document, origin));
    Json& text = text_object(document);
    for (const auto& [key, value] : wanted.items()) {
      if (!before.contains(key) || before[key] != value) store_key(text, key, value);
    }
  }
  const std::string result = document.dump(2) + "\n";
  const ModelConfig again = read_config(parse_json(result, origin), origin);
  const Json written = flatten(again);
  for (const auto& [key, value] : wanted.items()) {
    if (!written.contains(key) || written[key] != value) {
      throw Error(key_error(origin, key,
                            "cannot be written: it would read back as " +
                                quote(written.contains(key) ? written[key].dump() : "nothing") + " in place of " +
                                quote(value.dump())));
    }
  }
  // What a model_type implies has no key of its own.
  const bool same_biases =
      again.qkv_bias == config.qkv_bias && again.o_bias == config.o_bias && again.mlp_bias == config.mlp_bias;
  const bool same_norms = again.qk_norm == config.qk_norm && again.gemma_norm == config.gemma_norm;
  if (!same_biases || !same_norms || again.rope != config.rope) {
    throw Error(key_error(origin, "model_type",
                          quote(config.model_type) + " cannot have these " +
                              (!same_biases  ? "biases"
                               : !same_norms ? "norms"
                                             : "rope parameters")));
  }
  return result;
}

GenerationConfig parse_generation_config(std::string_view text, const std::string& origin) {
  const Json document = parse_json(text, origin);
  if (!document.is_object()) throw Error(origin + ": must be a JSON object");
  const Reader reader{document, origin};
  GenerationConfig config;
  config.bos_token_id = read_token_id(reader, "bos_token_id");
  config.eos_token_ids = read_token_ids(reader, "eos_token_id");
  config.do_sample = reader.flag("do_sample", false);
  config.temperature = reader.number("temperature", 1.0, 0.0, 1e6);
  config.top_p = reader.number("top_p", 1.0, 0.0, 1.0);
  config.top_k = reader.integer("top_k", 0, 0, kMaxVocabulary);
  return config;
}

GenerationConfig load_generation_config(const std::filesystem::path& directory) {
  const std::filesystem::path file = directory / "generation_config.json";
  std::error_code ignored;
  if (!std::filesystem::exists(file, ignored)) return {};
  return parse_generation_config(read_text_file(file, kMaxConfigBytes), quote(file.string()));
}

std::vector<std::int64_t> stop_token_ids(const ModelConfig& config, const GenerationConfig& generation) {
  return generation.eos_token_ids.empty() ? config.eos_token_ids : generation.eos_token_ids;
}

}  // namespace msa::files
