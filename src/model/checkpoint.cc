// SPDX-License-Identifier: Apache-2.0
// The table of parameters, the names checkpoints give them, reading and writing. Tested in tests/unit/model_decoder.cc.
#include "src/model/checkpoint.h"

#include <array>
#include <cstring>
#include <filesystem>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "msa/error.h"
#include "src/model/files/file_io.h"
#include "src/model/files/safetensors.h"

namespace msa::model {
namespace {

using files::ModelConfig;

// A checkpoint's spelling of the two prefixes. The first is ours; the others are the published MiniMax-M3 files and
// what transformers calls them inside its image-and-text model.
struct Prefix {
  const char* model;  // replaces "model."
  const char* head;   // replaces "lm_head."
};
constexpr std::array<Prefix, 3> kPrefixes = {{{"model.", "lm_head."},
                                              {"language_model.model.", "language_model.lm_head."},
                                              {"model.language_model.", "lm_head."}}};

// Tensors that take no part in the text model: frequencies we compute, the image tower, the extra prediction heads.
bool is_ignored(const ModelConfig& config, std::string_view name) {
  if (name.ends_with(".rotary_emb.inv_freq")) return true;
  if (!config.is_minimax_m3()) return false;
  for (const std::string_view part : {"vision_tower.", "multi_modal_projector.", "patch_merge_mlp.", "mtp."}) {
    if (name.starts_with(part) || name.find("." + std::string(part)) != std::string_view::npos) return true;
  }
  return false;
}

bool replace(std::string& text, std::string_view from, std::string_view to) {
  const std::size_t at = text.find(from);
  if (at == std::string::npos) return false;
  text.replace(at, from.size(), to);
  return true;
}

StoredPart whole_under(const std::string& name) { return {name, -1, 0, 0}; }

// Every way a parameter may be stored, ours first (prefixes apart).
std::vector<StoredParts> storage_choices(const ModelConfig& config, const ParameterSpec& spec) {
  std::vector<StoredParts> choices = {StoredParts(1, whole_under(spec.name))};
  if (!config.is_minimax_m3()) return choices;
  const auto renamed = [&](std::string_view from, std::string_view to) {
    std::string name = spec.name;
    if (replace(name, from, to)) choices.emplace_back(1, whole_under(name));
  };
  renamed(".self_attn.indexer.", ".self_attn.index_");
  renamed(".mlp.gate.e_score_correction_bias", ".block_sparse_moe.e_score_correction_bias");
  for (const char* const part : {"gate.", "experts.", "shared_experts."}) {
    renamed(std::string(".mlp.") + part, std::string(".block_sparse_moe.") + part);
  }
  const std::int64_t rows = spec.shape.size() > 1 ? spec.shape[spec.shape.size() - 2] : 0;
  const std::size_t whole = choices.size();
  for (std::size_t i = 0; i < whole; ++i) {
    const std::string name = choices[i][0].name;
    if (name.ends_with(".gate_up_proj.weight")) {
      const std::string stem = name.substr(0, name.size() - std::string_view("gate_up_proj.weight").size());
      choices.push_back(
          {{stem + "gate_proj.weight", -1, 0, rows / 2}, {stem + "up_proj.weight", -1, rows / 2, rows / 2}});
    }
    const bool fused = name.ends_with(".experts.gate_up_proj");
    if (fused || name.ends_with(".experts.down_proj")) {
      const std::string stem = name.substr(0, name.rfind('.') + 1);
      StoredParts parts;
      for (std::int64_t expert = 0; expert < spec.shape[0]; ++expert) {
        const std::string one = stem + std::to_string(expert);
        if (fused) {
          parts.push_back({one + ".w1.weight", expert, 0, rows / 2});
          parts.push_back({one + ".w3.weight", expert, rows / 2, rows / 2});
        } else {
          parts.push_back({one + ".w2.weight", expert, 0, 0});
        }
      }
      choices.push_back(std::move(parts));
    }
  }
  return choices;
}

void apply_prefix(const Prefix& prefix, std::string& name) {
  if (name.starts_with("model.")) {
    name.replace(0, 6, prefix.model);
  } else if (name.starts_with("lm_head.")) {
    name.replace(0, 8, prefix.head);
  }
}

const Prefix& find_prefix(const files::CheckpointReader& reader, const ModelConfig& config) {
  for (const Prefix& prefix : kPrefixes) {
    if (reader.find(std::string(prefix.model) + "embed_tokens.weight") != nullptr) return prefix;
    if (!config.is_minimax_m3()) break;
  }
  throw Error("checkpoint " + reader.directory().string() + ": tensor model.embed_tokens.weight is missing");
}

std::string describe_shape(at::IntArrayRef shape) {
  std::string text = "[";
  for (const std::int64_t extent : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  return text + "]";
}

at::ScalarType float_type(const files::TensorInfo& info, const std::string& origin) {
  switch (info.dtype) {
    case files::DType::kF32: return at::kFloat;
    case files::DType::kBf16: return at::kBFloat16;
    case files::DType::kF16: return at::kHalf;
    case files::DType::kF64: return at::kDouble;
    default:
      throw Error(origin + ": tensor " + info.name + " is " + files::dtype_name(info.dtype) +
                  "; parameters must be F32, BF16, F16 or F64");
  }
}

// Shapes are compared before anything is allocated, so memory is bounded by the size of the files.
void check_part(const files::TensorInfo& info, const ParameterSpec& spec, const StoredPart& part,
                const std::string& origin) {
  std::vector<std::int64_t> expected = spec.shape;
  if (part.expert >= 0) expected.erase(expected.begin());
  if (part.rows > 0) expected[0] = part.rows;
  if (info.shape != expected) {
    throw Error(origin + ": tensor " + info.name + " has shape " + describe_shape(info.shape) +
                "; config.json asks for " + describe_shape(expected));
  }
  float_type(info, origin);
}

at::Tensor read_part(const files::CheckpointReader& reader, const files::TensorInfo& info, const std::string& origin) {
  const auto bytes = reader.bytes(info.name);
  at::Tensor tensor = at::empty(info.shape, float_type(info, origin));  // the file's data may be unaligned
  std::memcpy(tensor.data_ptr(), bytes.data(), bytes.size());
  return tensor;
}

const char* config_dtype_name(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? "bfloat16" : dtype == at::kHalf ? "float16" : "float32";
}

}  // namespace

std::string layer_prefix(std::int64_t layer) { return "model.layers." + std::to_string(layer) + "."; }

std::vector<ParameterSpec> list_index_parameters(const ModelConfig& config, std::int64_t layer) {
  const bool required = config.layer_types.at(static_cast<std::size_t>(layer)) == files::AttentionType::kSparse;
  const std::string prefix = layer_prefix(layer) + "self_attn.indexer.";
  const std::int64_t dim = config.index_head_dim;
  const bool norms_required = required && config.is_minimax_m3();
  const std::vector<std::int64_t> q_shape = {config.num_key_value_heads * dim, config.hidden_size};
  std::vector<ParameterSpec> specs = {
      {prefix + "q_proj.weight", q_shape, ParameterKind::kWeight, required, required},
      {prefix + "k_proj.weight", {dim, config.hidden_size}, ParameterKind::kWeight, required, required},
      {prefix + "q_norm.weight", {dim}, ParameterKind::kNorm, norms_required, required},
      {prefix + "k_norm.weight", {dim}, ParameterKind::kNorm, norms_required, required}};
  if (config.index_value_dim > 0) {
    const std::int64_t values = config.index_value_dim, heads = config.num_key_value_heads;
    specs.push_back(
        {prefix + "v_proj.weight", {values, config.hidden_size}, ParameterKind::kWeight, required, required});
    specs.push_back(
        {prefix + "o_proj.weight", {config.hidden_size, heads * values}, ParameterKind::kWeight, required, required});
  }
  return specs;
}

std::vector<ParameterSpec> list_parameters(const ModelConfig& config) {
  std::vector<ParameterSpec> specs;
  std::string prefix;
  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape,
                       ParameterKind kind = ParameterKind::kWeight) {
    specs.push_back({prefix + name, std::move(shape), kind, true, false});
  };
  const auto add_linear = [&](const std::string& name, std::int64_t out, std::int64_t in, bool bias) {
    add(name + ".weight", {out, in});
    if (bias) add(name + ".bias", {out}, ParameterKind::kBias);
  };
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t q_rows = config.num_attention_heads * config.head_dim;
  const std::int64_t kv_rows = config.num_key_value_heads * config.head_dim;
  add("model.embed_tokens.weight", {config.vocab_size, hidden});
  for (std::int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    prefix = layer_prefix(layer);
    add("input_layernorm.weight", {hidden}, ParameterKind::kNorm);
    add_linear("self_attn.q_proj", q_rows, hidden, config.qkv_bias);
    add_linear("self_attn.k_proj", kv_rows, hidden, config.qkv_bias);
    add_linear("self_attn.v_proj", kv_rows, hidden, config.qkv_bias);
    add_linear("self_attn.o_proj", hidden, q_rows, config.o_bias);
    if (config.qk_norm) {
      add("self_attn.q_norm.weight", {config.head_dim}, ParameterKind::kNorm);
      add("self_attn.k_norm.weight", {config.head_dim}, ParameterKind::kNorm);
    }
    if (config.attention_sink) add("self_attn.sinks", {config.num_attention_heads}, ParameterKind::kBias);
    if (config.index_head_dim > 0) {
      for (ParameterSpec& spec : list_index_parameters(config, layer)) specs.push_back(std::move(spec));
    }
    add("post_attention_layernorm.weight", {hidden}, ParameterKind::kNorm);
    if (!config.is_minimax_m3()) {
      add_linear("mlp.gate_proj", config.intermediate_size, hidden, config.mlp_bias);
      add_linear("mlp.up_proj", config.intermediate_size, hidden, config.mlp_bias);
      add_linear("mlp.down_proj", hidden, config.intermediate_size, config.mlp_bias);
    } else if (config.mlp_layer_types[static_cast<std::size_t>(layer)] == files::MlpType::kDense) {
      add("mlp.gate_up_proj.weight", {2 * config.dense_intermediate_size, hidden});
      add("mlp.down_proj.weight", {hidden, config.dense_intermediate_size});
    } else {
      const std::int64_t experts = config.num_local_experts;
      add("mlp.gate.weight", {experts, hidden});
      add("mlp.gate.e_score_correction_bias", {experts}, ParameterKind::kRouterBias);
      add("mlp.experts.gate_up_proj", {experts, 2 * config.intermediate_size, hidden});
      add("mlp.experts.down_proj", {experts, hidden, config.intermediate_size});
      add("mlp.shared_experts.gate_up_proj.weight", {2 * config.shared_intermediate_size, hidden});
      add("mlp.shared_experts.down_proj.weight", {hidden, config.shared_intermediate_size});
    }
  }
  prefix.clear();
  add("model.norm.weight", {hidden}, ParameterKind::kNorm);
  if (!config.tie_word_embeddings) add("lm_head.weight", {config.vocab_size, hidden});
  return specs;
}

at::Tensor StoredPart::of(const at::Tensor& parameter) const {
  at::Tensor part = expert >= 0 ? parameter.select(0, expert) : parameter;
  return rows > 0 ? part.narrow(0, row_begin, rows) : part;
}

Checkpoint load_checkpoint(const std::string& directory, at::ScalarType dtype) {
  Checkpoint checkpoint;
  checkpoint.config = files::load_model_config(directory);
  ModelConfig& config = checkpoint.config;
  const files::CheckpointReader reader = files::CheckpointReader::open(directory);
  const std::string origin = "checkpoint " + directory;
  const Prefix& prefix = find_prefix(reader, config);
  std::set<std::string, std::less<>> used;

  for (const ParameterSpec& spec : list_parameters(config)) {
    std::optional<StoredParts> found;
    std::string first_name;
    for (StoredParts& choice : storage_choices(config, spec)) {
      for (StoredPart& part : choice) apply_prefix(prefix, part.name);
      if (first_name.empty()) first_name = choice[0].name;
      if (reader.find(choice[0].name) == nullptr) continue;
      found = std::move(choice);
      break;
    }
    if (!found) {
      if (!spec.required) continue;
      throw Error(origin + ": tensor " + first_name + " is missing");
    }
    for (const StoredPart& part : *found) check_part(reader.get(part.name), spec, part, origin);
    at::Tensor parameter = at::empty(spec.shape, spec.kind == ParameterKind::kRouterBias ? at::kFloat : dtype);
    for (const StoredPart& part : *found) {
      part.of(parameter).copy_(read_part(reader, reader.get(part.name), origin));
      used.insert(part.name);
    }
    checkpoint.parameters.emplace(spec.name, std::move(parameter));
    if (found->size() > 1 || found->front().name != spec.name) checkpoint.stored.emplace(spec.name, std::move(*found));
  }

  bool has_index_norm = false;
  for (std::int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    const std::string index = layer_prefix(layer) + "self_attn.indexer.";
    const auto has = [&](const char* name) { return checkpoint.parameters.contains(index + name); };
    has_index_norm = has_index_norm || has("q_norm.weight");
    if (has("q_proj.weight") != has("k_proj.weight") || has("q_norm.weight") != has("k_norm.weight") ||
        has("v_proj.weight") != has("o_proj.weight") ||
        ((has("q_norm.weight") || has("v_proj.weight")) && !has("q_proj.weight"))) {
      throw Error(
          origin + ": the index branch of layer " + std::to_string(layer) +
          " is incomplete; it needs q_proj and k_proj, both norms or neither, and v_proj and o_proj or neither");
    }
  }
  config.index_qk_norm = has_index_norm;  // the tensors decide

  for (const std::string& name : reader.names()) {
    const bool tied_head = config.tie_word_embeddings && name == std::string(prefix.head) + "weight";
    if (used.contains(name) || tied_head || is_ignored(config, name)) continue;
    throw Error(origin + ": tensor " + name + " is not known for model_type " + config.model_type +
                " with this config.json; the model would not compute what its makers meant");
  }
  return checkpoint;
}

void save_checkpoint(const std::string& directory, const ModelConfig& config,
                     const std::map<std::string, at::Tensor>& parameters,
                     const std::map<std::string, StoredParts>& stored) {
  std::error_code failure;
  std::filesystem::create_directories(directory, failure);
  if (failure) throw Error("cannot make directory " + directory + ": " + failure.message());

  std::vector<files::TensorSpec> specs;
  std::vector<at::Tensor> tensors;
  for (const ParameterSpec& spec : list_parameters(config)) {
    const auto entry = parameters.find(spec.name);
    if (entry == parameters.end()) continue;
    const auto names = stored.find(spec.name);
    const StoredParts parts = names != stored.end() ? names->second : StoredParts(1, whole_under(spec.name));
    for (const StoredPart& part : parts) {
      const at::Tensor tensor = part.of(entry->second.detach());
      files::TensorSpec out;
      out.name = part.name;
      out.dtype = tensor.scalar_type() == at::kBFloat16 ? files::DType::kBf16
                  : tensor.scalar_type() == at::kHalf   ? files::DType::kF16
                                                        : files::DType::kF32;
      out.shape = tensor.sizes().vec();
      specs.push_back(std::move(out));
      tensors.push_back(tensor);
    }
  }
  at::Tensor current;  // keeps the bytes of the tensor being written alive
  const auto source = [&](std::size_t index) {
    current = tensors[index].contiguous();
    return std::span<const std::byte>(static_cast<const std::byte*>(current.data_ptr()), current.nbytes());
  };
  files::write_checkpoint(directory, specs, source);

  ModelConfig written = config;
  written.dtype = config_dtype_name(parameters.at("model.embed_tokens.weight").scalar_type());
  files::write_text_file(std::filesystem::path(directory) / "config.json", files::to_json(written));
}

}  // namespace msa::model
