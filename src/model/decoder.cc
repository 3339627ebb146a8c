// SPDX-License-Identifier: Apache-2.0
// The decoder: parameters bound to layers, one pass over the layers for packed and cached input alike. Tested in
// tests/unit/model_decoder.cc and tests/python/test_decoder.py.
#include "src/model/decoder.h"

#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/GradMode.h>

#include <limits>
#include <map>
#include <span>
#include <tuple>

#include "msa/error.h"
#include "msa/select_blocks.h"
#include "src/model/checkpoint.h"
#include "src/model/decoder_attention.h"
#include "src/model/decoder_math.h"
#include "src/model/linear.h"
#include "src/model/stopwatch.h"

namespace msa::model {
namespace {

using files::ModelConfig;

// One layer's parameters; null where the model has none.
struct Layer {
  const at::Tensor* input_norm = nullptr;
  Linear q, k, v, o;
  const at::Tensor* q_norm = nullptr;
  const at::Tensor* k_norm = nullptr;
  const at::Tensor* sinks = nullptr;
  Linear index_q, index_k, index_v, index_o;
  const at::Tensor* index_q_norm = nullptr;
  const at::Tensor* index_k_norm = nullptr;
  const at::Tensor* post_norm = nullptr;
  Linear gate, up, down, gate_up;  // Llama: gate, up, down; MiniMax-M3 dense: gate_up, down
  Linear router, shared_gate_up, shared_down;
  const at::Tensor* choice_bias = nullptr;
  const at::Tensor* experts_gate_up = nullptr;
  const at::Tensor* experts_down = nullptr;

  bool has_index() const { return index_q.weight != nullptr; }
  bool has_index_values() const { return index_v.weight != nullptr; }
};

void check_tokens(const at::Tensor& tokens, const ModelConfig& config) {
  if (!tokens.defined() || tokens.dim() != 1 || tokens.scalar_type() != at::kLong) {
    throw Error("decoder: tokens must be an int64 tensor of rank 1");
  }
  if (tokens.numel() == 0) return;
  const auto [low, high] = tokens.aminmax();
  if (low.item<std::int64_t>() < 0 || high.item<std::int64_t>() >= config.vocab_size) {
    throw Error("decoder: tokens reach from " + std::to_string(low.item<std::int64_t>()) + " to " +
                std::to_string(high.item<std::int64_t>()) + "; ids are 0 to " + std::to_string(config.vocab_size - 1));
  }
}

DType cache_dtype(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? DType::kBFloat16 : dtype == at::kHalf ? DType::kFloat16 : DType::kFloat32;
}

// Takes back what a failed forward appended.
class AppendGuard {
 public:
  AppendGuard(cache::PagedCache& cache, std::int64_t sequence, std::int64_t tokens)
      : cache_(cache), sequence_(sequence), begin_(cache.append(sequence, tokens)) {}
  ~AppendGuard() {
    if (!kept_) cache_.crop(sequence_, begin_);
  }
  AppendGuard(const AppendGuard&) = delete;
  AppendGuard& operator=(const AppendGuard&) = delete;
  std::int64_t begin() const { return begin_; }
  void keep() { kept_ = true; }

 private:
  cache::PagedCache& cache_;
  std::int64_t sequence_, begin_;
  bool kept_ = false;
};

}  // namespace

AttentionMode parse_attention_mode(const std::string& name) {
  for (const AttentionMode mode :
       {AttentionMode::kSparse, AttentionMode::kDense, AttentionMode::kWindow, AttentionMode::kOracle}) {
    if (name == attention_mode_name(mode)) return mode;
  }
  throw Error("attention mode '" + name + "' is not one of sparse, dense, window, oracle");
}

const char* attention_mode_name(AttentionMode mode) {
  switch (mode) {
    case AttentionMode::kSparse: return "sparse";
    case AttentionMode::kDense: return "dense";
    case AttentionMode::kWindow: return "window";
    case AttentionMode::kOracle: return "oracle";
  }
  return "unknown";
}

struct Decoder::Impl {
  ModelConfig config;
  std::map<std::string, at::Tensor> parameters;  // layers point into it: nodes do not move
  std::map<std::string, StoredParts> stored;
  std::vector<Layer> layers;

  // Where the rows of one pass go and what their queries see.
  struct Pass {
    at::Tensor positions;
    Batch batch;
    at::Tensor cu_seqlens;               // packed
    cache::PagedCache* cache = nullptr;  // cached
    std::int64_t sequence = 0;
    std::int64_t begin = 0;
  };

  void bind();
  at::Tensor& find(const std::string& name);
  bool has_float8_cache = false;
  at::ScalarType dtype() const { return parameters.at("model.embed_tokens.weight").scalar_type(); }
  at::Tensor norm(const at::Tensor& x, const at::Tensor* weight) const {
    return weight == nullptr ? x : rms_norm(x, *weight, config.rms_norm_eps, config.gemma_norm);
  }
  at::Tensor heads(const at::Tensor& rows, const at::Tensor* norm_weight, const RopeTable& rope, std::int64_t dim,
                   std::int64_t tiles) const {
    return apply_rope(norm(rows.view({rows.size(0), rows.size(1) / dim, dim}), norm_weight), rope, tiles);
  }
  AttentionPlan plan(std::int64_t layer, const AttentionOptions& options) const;
  at::Tensor mlp(const Layer& layer, const at::Tensor& x) const;
  const Layer& index_layer(std::int64_t layer) const;
  // From the projections to what the operators take.
  at::Tensor index_queries(const Layer& layer, const at::Tensor& projected, const RopeTable& rope) const;
  at::Tensor index_keys(const Layer& layer, const at::Tensor& projected, const RopeTable& rope) const;
  ForwardResult run(const at::Tensor& tokens, const Pass& pass, const ForwardOptions& options) const;
};

void Decoder::Impl::bind() {
  layers.assign(static_cast<std::size_t>(config.num_hidden_layers), {});
  for (std::int64_t i = 0; i < config.num_hidden_layers; ++i) {
    const std::string prefix = layer_prefix(i);
    const auto get = [&](const std::string& name) -> const at::Tensor* {
      const auto entry = parameters.find(prefix + name);
      return entry == parameters.end() ? nullptr : &entry->second;
    };
    const auto linear = [&](const std::string& name) { return Linear{get(name + ".weight"), get(name + ".bias")}; };
    Layer& layer = layers[static_cast<std::size_t>(i)];
    layer.input_norm = get("input_layernorm.weight");
    layer.q = linear("self_attn.q_proj");
    layer.k = linear("self_attn.k_proj");
    layer.v = linear("self_attn.v_proj");
    layer.o = linear("self_attn.o_proj");
    layer.q_norm = get("self_attn.q_norm.weight");
    layer.k_norm = get("self_attn.k_norm.weight");
    layer.sinks = get("self_attn.sinks");
    layer.index_q = linear("self_attn.indexer.q_proj");
    layer.index_k = linear("self_attn.indexer.k_proj");
    layer.index_v = linear("self_attn.indexer.v_proj");
    layer.index_o = linear("self_attn.indexer.o_proj");
    layer.index_q_norm = get("self_attn.indexer.q_norm.weight");
    layer.index_k_norm = get("self_attn.indexer.k_norm.weight");
    layer.post_norm = get("post_attention_layernorm.weight");
    layer.gate = linear("mlp.gate_proj");
    layer.up = linear("mlp.up_proj");
    layer.down = linear("mlp.down_proj");
    layer.gate_up = linear("mlp.gate_up_proj");
    layer.router = linear("mlp.gate");
    layer.choice_bias = get("mlp.gate.e_score_correction_bias");
    layer.experts_gate_up = get("mlp.experts.gate_up_proj");
    layer.experts_down = get("mlp.experts.down_proj");
    layer.shared_gate_up = linear("mlp.shared_experts.gate_up_proj");
    layer.shared_down = linear("mlp.shared_experts.down_proj");
  }
}

at::Tensor& Decoder::Impl::find(const std::string& name) {
  const auto entry = parameters.find(name);
  if (entry == parameters.end()) throw Error("decoder: there is no parameter " + name);
  return entry->second;
}

AttentionPlan Decoder::Impl::plan(std::int64_t layer, const AttentionOptions& options) const {
  const auto i = static_cast<std::size_t>(layer);
  AttentionPlan plan;
  if (config.index_block_size > 0) plan.block_size = config.index_block_size;
  plan.local_blocks = config.index_local_blocks;
  plan.init_blocks = config.index_init_blocks;
  if (options.mode == AttentionMode::kDense) return plan;
  if (!options.layer_topk.empty()) {
    if (options.layer_topk.size() != layers.size()) {
      throw Error("attention options: layer_topk has " + std::to_string(options.layer_topk.size()) +
                  " entries; the model has " + std::to_string(layers.size()) + " layers");
    }
    plan.topk = options.layer_topk[i];
  } else if (config.layer_types[i] == files::AttentionType::kSparse) {
    plan.topk = options.topk.value_or(config.index_topk_blocks[i]);
    if (plan.topk < 1)
      throw Error("attention options: topk is " + std::to_string(plan.topk) + "; it must be at least 1");
  }
  if (plan.topk < 0 || plan.topk > kMaxTopk) {
    throw Error("attention options: topk of layer " + std::to_string(layer) + " is " + std::to_string(plan.topk) +
                "; it must be at most " + std::to_string(kMaxTopk));
  }
  if (plan.topk == 0) return plan;
  if (config.index_block_size == 0) throw Error("attention options: config.json has no index_block_size");
  if (options.mode == AttentionMode::kSparse && !layers[i].has_index()) {
    throw Error("attention options: layer " + std::to_string(layer) + " has no index branch to choose blocks with");
  }
  plan.mode = options.mode;
  return plan;
}

at::Tensor Decoder::Impl::mlp(const Layer& layer, const at::Tensor& x) const {
  const double alpha = config.swiglu_alpha, limit = config.swiglu_limit;
  if (layer.gate.weight != nullptr) {
    const auto [gate, up] = apply_layers(x, std::array<const Linear*, 2>{&layer.gate, &layer.up});
    return layer.down(gated_silu(gate, up));
  }
  if (layer.gate_up.weight != nullptr) return layer.down(clamped_swiglu(layer.gate_up(x), alpha, limit));
  const ExpertWeights experts = {*layer.router.weight, *layer.choice_bias, *layer.experts_gate_up, *layer.experts_down};
  return routed_experts(x, experts, config) + layer.shared_down(clamped_swiglu(layer.shared_gate_up(x), alpha, limit));
}

at::Tensor Decoder::Impl::index_queries(const Layer& layer, const at::Tensor& projected, const RopeTable& rope) const {
  return heads(projected, layer.index_q_norm, rope, config.index_head_dim, config.index_rope_tiles);
}

at::Tensor Decoder::Impl::index_keys(const Layer& layer, const at::Tensor& projected, const RopeTable& rope) const {
  return heads(projected, layer.index_k_norm, rope, config.index_head_dim, config.index_rope_tiles).squeeze(1);
}

ForwardResult Decoder::Impl::run(const at::Tensor& tokens, const Pass& pass, const ForwardOptions& options) const {
  const Stopwatch total;
  ForwardResult result;
  const RopeTable rope = make_rope_table(config.rope, pass.positions);
  std::vector<at::Tensor> kl_terms;
  at::Tensor hidden = at::embedding(parameters.at("model.embed_tokens.weight"), tokens);
  for (std::int64_t i = 0; i < config.num_hidden_layers; ++i) {
    const Layer& layer = layers[static_cast<std::size_t>(i)];
    const AttentionPlan plan = this->plan(i, options.attention);
    const bool with_kl = options.with_kl && layer.has_index();
    const bool caches_index =
        pass.cache != nullptr && pass.cache->shape().layers[static_cast<std::size_t>(i)].index_dim > 0;
    const bool with_values = layer.has_index_values();
    const bool needs_index_queries = plan.mode == AttentionMode::kSparse || with_kl || with_values;
    if (pass.cache != nullptr && needs_index_queries && !caches_index) {
      throw Error("decoder: the cache holds no index keys for layer " + std::to_string(i));
    }

    const at::Tensor x = norm(hidden, layer.input_norm);
    AttentionInputs inputs;
    // The index branch sees the input cut off from the graph; where there is none, all layers of it read it together.
    const std::array<const Linear*, 3> index = {needs_index_queries ? &layer.index_q : nullptr,
                                                needs_index_queries || caches_index ? &layer.index_k : nullptr,
                                                with_values ? &layer.index_v : nullptr};
    const bool apart = options.detach_index && x.requires_grad();
    const auto together = [&](const Linear* of_index) { return apart ? nullptr : of_index; };
    auto [q, k, v, q_idx, k_idx, v_idx] =
        apply_layers(x, std::array<const Linear*, 6>{&layer.q, &layer.k, &layer.v, together(index[0]),
                                                     together(index[1]), together(index[2])});
    if (apart) std::tie(q_idx, k_idx, v_idx) = std::tuple_cat(apply_layers(x.detach(), index));
    inputs.q = heads(q, layer.q_norm, rope, config.head_dim, 1);
    inputs.k = heads(k, layer.k_norm, rope, config.head_dim, 1);
    inputs.v = v.view({x.size(0), config.num_key_value_heads, config.head_dim});
    if (q_idx.defined()) inputs.q_idx = index_queries(layer, q_idx, rope);
    if (k_idx.defined()) inputs.k_idx = index_keys(layer, k_idx, rope);
    inputs.v_idx = v_idx;
    inputs.batch = pass.batch;
    inputs.cu_seqlens = pass.cu_seqlens;
    if (pass.cache != nullptr) {
      const at::Tensor index_rows = with_values ? at::cat({inputs.k_idx, inputs.v_idx}, -1) : inputs.k_idx;
      pass.cache->write(i, pass.sequence, pass.begin, const_view(inputs.k), const_view(inputs.v),
                        caches_index ? const_view(index_rows) : ConstTensorView());
      inputs.keys = pass.cache->keys(i);
      inputs.values = pass.cache->values(i);
      if (caches_index) inputs.index_keys = narrow_last(pass.cache->index_keys(i), 0, config.index_head_dim);
      if (with_values) {
        inputs.index_values = narrow_last(pass.cache->index_keys(i), config.index_head_dim, config.index_value_dim);
      }
    } else {
      inputs.keys = const_view(inputs.k);
      inputs.values = const_view(inputs.v);
      if (inputs.k_idx.defined()) inputs.index_keys = const_view(inputs.k_idx);
      if (with_values) inputs.index_values = const_view(inputs.v_idx);
    }

    const Stopwatch selection;
    const at::Tensor blocks = choose_blocks(plan, inputs);
    result.seconds.selection += selection.seconds();
    const Stopwatch attention;
    const Attended attended = attend(plan, inputs, blocks);
    const at::Tensor of_index = with_values ? attend_index(plan, inputs, blocks).out : at::Tensor();
    result.seconds.attention += attention.seconds();
    if (options.with_kl) {
      result.layer_kl.push_back(std::numeric_limits<double>::quiet_NaN());
      if (with_kl) {
        kl_terms.push_back(align(plan, inputs, blocks, options.teacher));
        result.layer_kl.back() = kl_terms.back().item<double>();
      }
    }
    if (options.observer) options.observer({i, x, inputs.q, inputs.k, inputs.v, inputs.q_idx, inputs.k_idx, blocks});
    const at::Tensor out = layer.sinks != nullptr ? with_sink(attended, *layer.sinks) : attended.out;
    hidden = hidden + layer.o(out.flatten(1));
    if (with_values) hidden = hidden + layer.index_o(of_index.flatten(1));
    hidden = hidden + mlp(layer, norm(hidden, layer.post_norm));
  }
  result.hidden = norm(hidden, &parameters.at("model.norm.weight"));
  if (options.with_kl) result.kl_sum = kl_terms.empty() ? at::zeros({}, at::kFloat) : at::stack(kl_terms).sum();
  result.seconds.total = total.seconds();
  return result;
}

Decoder::Decoder(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Decoder Decoder::load(const std::string& directory, at::ScalarType dtype) {
  Checkpoint checkpoint = load_checkpoint(directory, dtype);
  auto impl = std::make_shared<Impl>();
  impl->config = std::move(checkpoint.config);
  impl->parameters = std::move(checkpoint.parameters);
  impl->stored = std::move(checkpoint.stored);
  impl->bind();
  return Decoder(std::move(impl));
}

Decoder Decoder::create(const ModelConfig& config, std::uint64_t seed, at::ScalarType dtype) {
  files::validate(config, "model configuration");
  auto impl = std::make_shared<Impl>();
  impl->config = config;
  const at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  for (const ParameterSpec& spec : list_parameters(config)) {
    if (is_index_parameter(spec.name) || is_value_head_parameter(spec.name)) {
      const bool is_norm = spec.kind == ParameterKind::kNorm;
      if (!spec.in_sparse_layer || (is_norm && !config.index_qk_norm)) continue;
    }
    at::Tensor parameter = at::zeros(spec.shape, at::kFloat);
    if (spec.kind == ParameterKind::kWeight) parameter.normal_(0.0, config.initializer_range, generator);
    if (spec.kind == ParameterKind::kNorm && !config.gemma_norm) parameter.fill_(1.0);
    impl->parameters[spec.name] = spec.kind == ParameterKind::kRouterBias ? parameter : parameter.to(dtype);
  }
  impl->bind();
  return Decoder(std::move(impl));
}

void Decoder::save(const std::string& directory) const {
  save_checkpoint(directory, impl_->config, impl_->parameters, impl_->stored);
}

const ModelConfig& Decoder::config() const { return impl_->config; }
ModelConfig& Decoder::mutable_config() { return impl_->config; }

void Decoder::add_index_branch(std::int64_t layer, std::int64_t index_dim) {
  ModelConfig& config = impl_->config;
  if (layer < 0 || layer >= config.num_hidden_layers) {
    throw Error("add_index_branch: layer " + std::to_string(layer) + " of " + std::to_string(config.num_hidden_layers));
  }
  if (has_index_branch(layer)) throw Error("add_index_branch: layer " + std::to_string(layer) + " has one already");
  if (index_dim < kHeadDimMultiple || index_dim > kMaxHeadDim || index_dim % kHeadDimMultiple != 0) {
    throw Error("add_index_branch: index_dim " + std::to_string(index_dim) +
                " must be a multiple of 16 from 16 to 256");
  }
  bool others = false;
  for (std::int64_t i = 0; i < config.num_hidden_layers; ++i) others = others || has_index_branch(i);
  if (others && config.index_head_dim != index_dim) {
    throw Error("add_index_branch: index_dim " + std::to_string(index_dim) + ", but other layers have " +
                std::to_string(config.index_head_dim));
  }
  config.index_head_dim = index_dim;
  config.index_n_heads = config.num_key_value_heads;
  for (const ParameterSpec& spec : list_index_parameters(config, layer)) {
    const bool is_norm = spec.kind == ParameterKind::kNorm;
    if (is_norm && !config.index_qk_norm) continue;
    const double start = is_norm && !config.gemma_norm ? 1.0 : 0.0;
    impl_->parameters[spec.name] = at::full(spec.shape, start, at::TensorOptions(impl_->dtype()));
  }
  impl_->bind();
}

void Decoder::add_index_values(std::int64_t value_dim, std::uint64_t seed) {
  ModelConfig& config = impl_->config;
  if (config.index_value_dim == value_dim) return;
  if (config.index_value_dim != 0) {
    throw Error("add_index_values: the model has an index value head of dimension " +
                std::to_string(config.index_value_dim) + ", not " + std::to_string(value_dim));
  }
  ModelConfig changed = config;
  changed.index_value_dim = value_dim;
  files::validate(changed, "add_index_values");
  config.index_value_dim = value_dim;
  const at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  for (const ParameterSpec& spec : list_parameters(config)) {
    if (!is_value_head_parameter(spec.name) || !spec.in_sparse_layer) continue;
    at::Tensor parameter = at::zeros(spec.shape, at::kFloat);
    if (spec.name.ends_with("v_proj.weight")) parameter.normal_(0.0, config.initializer_range, generator);
    impl_->parameters[spec.name] = parameter.to(impl_->dtype());
  }
  impl_->bind();
}

void Decoder::add_attention_sinks() {
  // exp(-8) is 3e-4 of one key of score 0: small beside any row, large enough for a gradient to move it.
  constexpr double kStart = -8.0;
  ModelConfig& config = impl_->config;
  if (config.attention_sink) return;
  config.attention_sink = true;
  for (std::int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    impl_->parameters[layer_prefix(layer) + "self_attn.sinks"] =
        at::full({config.num_attention_heads}, kStart, at::TensorOptions(impl_->dtype()));
  }
  impl_->bind();
}

bool Decoder::has_index_branch(std::int64_t layer) const {
  return impl_->layers.at(static_cast<std::size_t>(layer)).has_index();
}

at::Tensor& Decoder::parameter(const std::string& name) { return impl_->find(name); }

std::vector<std::pair<std::string, at::Tensor>> Decoder::named_parameters() const {
  std::vector<std::pair<std::string, at::Tensor>> named;
  for (const ParameterSpec& spec : list_parameters(impl_->config)) {
    const auto entry = impl_->parameters.find(spec.name);
    if (entry != impl_->parameters.end()) named.emplace_back(*entry);
  }
  return named;
}

bool Decoder::is_index_parameter(const std::string& name) {
  return name.find(".self_attn.indexer.") != std::string::npos && !is_value_head_parameter(name);
}

bool Decoder::is_value_head_parameter(const std::string& name) {
  return name.ends_with(".self_attn.indexer.v_proj.weight") || name.ends_with(".self_attn.indexer.o_proj.weight");
}

ForwardResult Decoder::forward(const at::Tensor& tokens, const at::Tensor& cu_seqlens,
                               const ForwardOptions& options) const {
  check_tokens(tokens, impl_->config);
  if (!cu_seqlens.defined() || cu_seqlens.dim() != 1 || cu_seqlens.scalar_type() != at::kInt ||
      cu_seqlens.numel() < 1) {
    throw Error("decoder: cu_seqlens must be an int32 tensor of rank 1 with at least one entry");
  }
  Impl::Pass pass;
  pass.cu_seqlens = cu_seqlens.contiguous();
  const std::span<const std::int32_t> bounds(pass.cu_seqlens.const_data_ptr<std::int32_t>(),
                                             static_cast<std::size_t>(cu_seqlens.numel()));
  bool good = bounds.front() == 0 && bounds.back() == tokens.numel();
  for (std::size_t s = 1; s < bounds.size(); ++s) good = good && bounds[s - 1] <= bounds[s];
  if (!good) {
    throw Error("decoder: cu_seqlens must start at 0, not decrease, and end at the number of tokens, " +
                std::to_string(tokens.numel()));
  }
  std::vector<at::Tensor> positions = {at::empty({0}, at::kLong)};
  for (std::size_t s = 1; s < bounds.size(); ++s) positions.push_back(at::arange(bounds[s] - bounds[s - 1], at::kLong));
  pass.positions = at::cat(positions);
  pass.batch = Batch::packed(bounds, bounds);
  return impl_->run(tokens, pass, options);
}

ForwardResult Decoder::forward_cached(const at::Tensor& tokens, cache::PagedCache& cache, std::int64_t sequence,
                                      const ForwardOptions& options) const {
  const c10::NoGradGuard no_grad;
  check_tokens(tokens, impl_->config);
  if (static_cast<std::int64_t>(cache.shape().layers.size()) != impl_->config.num_hidden_layers) {
    throw Error("decoder: the cache has " + std::to_string(cache.shape().layers.size()) + " layers, the model " +
                std::to_string(impl_->config.num_hidden_layers));
  }
  AppendGuard appended(cache, sequence, tokens.numel());
  Impl::Pass pass;
  pass.cache = &cache;
  pass.sequence = sequence;
  pass.begin = appended.begin();
  pass.positions = at::arange(pass.begin, pass.begin + tokens.numel(), at::kLong);
  const std::array<cache::SequenceId, 1> sequences = {sequence};
  const cache::PageTable table = cache.page_table(sequences);
  const std::array<std::int32_t, 2> bounds = {0, static_cast<std::int32_t>(tokens.numel())};
  pass.batch = table.batch(bounds);
  ForwardResult result = impl_->run(tokens, pass, options);
  appended.keep();
  return result;
}

void Decoder::use_float8_cache() { impl_->has_float8_cache = true; }

cache::CacheShape Decoder::cache_shape(std::int64_t page_size, bool with_index_keys) const {
  const ModelConfig& config = impl_->config;
  cache::CacheShape shape;
  shape.page_size = page_size;
  shape.dtype = shape.index_dtype = impl_->has_float8_cache ? DType::kFloat8E4M3 : cache_dtype(impl_->dtype());
  for (const Layer& layer : impl_->layers) {
    const bool has_index = layer.has_index() && (with_index_keys || layer.has_index_values());
    const std::int64_t row = config.index_head_dim + (layer.has_index_values() ? config.index_value_dim : 0);
    if (has_index && (page_size < 1 || page_size % config.index_block_size != 0)) {
      throw Error("cache shape: page_size " + std::to_string(page_size) + " must be a multiple of index_block_size " +
                  std::to_string(config.index_block_size));
    }
    shape.layers.push_back({config.num_key_value_heads, config.head_dim, config.head_dim, has_index ? row : 0});
  }
  return shape;
}

at::Tensor Decoder::logits(const at::Tensor& hidden) const {
  const char* const head = impl_->config.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  return Linear{&impl_->parameters.at(head)}(hidden).to(at::kFloat);
}

const Layer& Decoder::Impl::index_layer(std::int64_t layer) const {
  if (layer < 0 || layer >= config.num_hidden_layers || !layers[static_cast<std::size_t>(layer)].has_index()) {
    throw Error("index_branch: layer " + std::to_string(layer) + " has no index branch");
  }
  return layers[static_cast<std::size_t>(layer)];
}

std::pair<at::Tensor, at::Tensor> Decoder::index_branch(std::int64_t layer, const at::Tensor& x,
                                                        const at::Tensor& positions) const {
  return {index_queries(layer, x, positions), index_keys(layer, x, positions)};
}

at::Tensor Decoder::index_queries(std::int64_t layer, const at::Tensor& x, const at::Tensor& positions) const {
  const Layer& at = impl_->index_layer(layer);
  return impl_->index_queries(at, at.index_q(x), make_rope_table(impl_->config.rope, positions));
}

at::Tensor Decoder::index_keys(std::int64_t layer, const at::Tensor& x, const at::Tensor& positions) const {
  const Layer& at = impl_->index_layer(layer);
  return impl_->index_keys(at, at.index_k(x), make_rope_table(impl_->config.rope, positions));
}

}  // namespace msa::model
