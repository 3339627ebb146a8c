// SPDX-License-Identifier: Apache-2.0
// See convert.h.
#include "src/model/convert.h"

#include <c10/core/GradMode.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <map>
#include <set>
#include <system_error>
#include <utility>

#include "msa/error.h"
#include "msa/select_blocks.h"
#include "src/model/files/file_io.h"
#include "src/model/files/safetensors.h"
#include "src/model/train_random.h"

namespace msa::model {
namespace {

namespace fs = std::filesystem;
using at::indexing::Slice;

std::string projection_name(std::int64_t layer, const char* what) {
  return "model.layers." + std::to_string(layer) + ".self_attn." + what + ".weight";
}

// The two halves of every pair of head dimensions that turns together. Dimensions beyond the rotary part do not turn at
// all; they are paired the same way, since a pair that stands still commutes with complex combinations too.
struct Pairs {
  at::Tensor first, second;  // int64 [head_dim / 2]
};

Pairs pair_dimensions(std::int64_t head_dim, std::int64_t rotary_dim) {
  const std::int64_t still = head_dim - rotary_dim;
  const at::Tensor turning = at::arange(rotary_dim / 2, at::kLong);
  const at::Tensor standing = at::arange(still / 2, at::kLong) + rotary_dim;
  return {at::cat({turning, standing}), at::cat({turning + rotary_dim / 2, standing + still / 2})};
}

// [..., head_dim, n] -> complex [..., head_dim / 2, n] (dim -2)
at::Tensor to_complex(const at::Tensor& values, const Pairs& pairs) {
  return at::complex(values.index_select(-2, pairs.first), values.index_select(-2, pairs.second));
}

// complex [..., head_dim / 2, n] -> [..., head_dim, n]
at::Tensor to_real(const at::Tensor& values, const Pairs& pairs) {
  std::vector<std::int64_t> shape = values.sizes().vec();
  shape[shape.size() - 2] *= 2;
  at::Tensor result = at::empty(shape, at::kDouble);
  result.index_copy_(-2, pairs.first, at::real(values).to(at::kDouble));
  result.index_copy_(-2, pairs.second, at::imag(values).to(at::kDouble));
  return result;
}

// What the closed form needs of one layer, summed over calibration tokens.
struct Moments {
  at::Tensor keys;                  // complex128 [pairs, kv_heads, kv_heads]: sum k_r conj(k_s)
  at::Tensor queries;               // float64 [kv_heads, pairs]: sum |mean query of the group|^2
  at::Tensor key_gain, query_gain;  // float64 [heads, 2]: energy after and before the norm (models with q/k norms)
  std::int64_t tokens = 0;
};

// Projections of one layer with the base model's q/k norms folded in.
struct Projections {
  at::Tensor queries, keys;  // float64 [heads, head_dim, hidden]
};

Projections project(Decoder& decoder, std::int64_t layer, const Moments* moments) {
  const files::ModelConfig& config = decoder.config();
  const auto take = [&](const char* name, std::int64_t heads) {
    return decoder.parameter(projection_name(layer, name))
        .detach()
        .to(at::kDouble)
        .view({heads, config.head_dim, config.hidden_size});
  };
  Projections result{take("q_proj", config.num_attention_heads), take("k_proj", config.num_key_value_heads)};
  if (!config.qk_norm) return result;
  const auto fold = [&](at::Tensor& weight, const char* norm, const at::Tensor& gain) {
    at::Tensor scale = decoder.parameter(projection_name(layer, norm)).detach().to(at::kDouble);
    if (config.gemma_norm) scale = scale + 1.0;
    weight = weight * scale.view({1, -1, 1});
    if (gain.defined())
      weight = weight * (gain.select(1, 0) / gain.select(1, 1).clamp_min(1e-30)).sqrt().view({-1, 1, 1});
  };
  fold(result.queries, "q_norm", moments != nullptr ? moments->query_gain : at::Tensor());
  fold(result.keys, "k_norm", moments != nullptr ? moments->key_gain : at::Tensor());
  return result;
}

std::map<std::int64_t, Moments> collect_moments(Decoder& decoder, const std::set<std::int64_t>& layers,
                                                const std::vector<Tokens>& windows, const Pairs& pairs) {
  const files::ModelConfig& config = decoder.config();
  const std::int64_t kv_heads = config.num_key_value_heads;
  std::map<std::int64_t, Moments> moments;
  std::map<std::int64_t, Projections> projections;  // models with q/k norms only
  if (config.qk_norm) {
    for (const std::int64_t layer : layers) projections.emplace(layer, project(decoder, layer, nullptr));
  }
  ForwardOptions options;
  options.attention.mode = AttentionMode::kDense;
  options.observer = [&](const LayerView& view) {
    if (!layers.contains(view.layer)) return;
    Moments& sum = moments[view.layer];
    // [pairs, T, heads]
    const auto complex_heads = [&](const at::Tensor& heads) {
      return to_complex(heads.to(at::kFloat).permute({1, 2, 0}), pairs).permute({1, 2, 0});
    };
    const at::Tensor keys = complex_heads(view.k);
    const at::Tensor queries = complex_heads(
        view.q.to(at::kFloat).view({view.q.size(0), kv_heads, config.group_size(), config.head_dim}).mean(2));
    const at::Tensor key_sum = at::matmul(keys.transpose(1, 2), keys.conj()).to(at::kComplexDouble);
    const at::Tensor query_sum = at::real(queries * queries.conj()).sum(1).t().to(at::kDouble);
    at::Tensor key_gain, query_gain;
    if (config.qk_norm) {
      const auto gain = [&](const at::Tensor& after, const at::Tensor& weight) {
        const at::Tensor before = at::matmul(view.x.to(at::kFloat), weight.flatten(0, 1).t().to(at::kFloat))
                                      .view({after.size(0), after.size(1), config.head_dim});
        return at::stack({after.to(at::kFloat).square().sum(at::IntArrayRef{0, 2}),
                          before.square().sum(at::IntArrayRef{0, 2})},
                         1)
            .to(at::kDouble);
      };
      key_gain = gain(view.k, projections.at(view.layer).keys);
      query_gain = gain(view.q, projections.at(view.layer).queries);
    }
    if (sum.tokens == 0) {
      sum = {key_sum, query_sum, key_gain, query_gain, view.x.size(0)};
      return;
    }
    sum.keys += key_sum;
    sum.queries += query_sum;
    if (config.qk_norm) sum.key_gain += key_gain, sum.query_gain += query_gain;
    sum.tokens += view.x.size(0);
  };
  for (const Tokens& window : windows) {
    const auto length = static_cast<std::int64_t>(window.size());
    const at::Tensor cu_seqlens = at::tensor({std::int64_t{0}, length}, at::kInt);
    (void)decoder.forward(at::tensor(window, at::kLong), cu_seqlens, options);
  }
  return moments;
}

struct IndexWeights {
  at::Tensor queries;  // float64 [kv_heads, index_dim, hidden]
  at::Tensor keys;     // float64 [index_dim, hidden]
};

at::Tensor random_rows(std::vector<std::int64_t> shape, Random& random) {
  at::Tensor result = at::empty(shape, at::kDouble);
  const double deviation = 1.0 / std::sqrt(static_cast<double>(shape.back()));
  double* values = result.data_ptr<double>();
  for (std::int64_t i = 0; i < result.numel(); ++i) {  // Box-Muller
    const double radius = std::sqrt(-2.0 * std::log(1.0 - random.uniform()));
    values[i] = deviation * radius * std::cos(6.283185307179586 * random.uniform());
  }
  return result;
}

// Rows of head_dim width, made index_dim wide. Narrower: the rotary part stays, and of the standing pairs those of
// largest `weight`. Wider: the rest stands still under RoPE, where no more of the turning pairs can be kept, and starts
// small and random (zeros on both sides would never learn).
IndexWeights fit_width(const IndexWeights& full, const files::ModelConfig& config, const Pairs& pairs,
                       std::int64_t index_dim, const at::Tensor& weight, Random& random) {
  constexpr double kSmall = 0.1;
  const std::int64_t rest = index_dim - config.head_dim;
  if (rest > 0) {
    const at::Tensor more_queries =
        random_rows({config.num_key_value_heads, rest, config.hidden_size}, random) * kSmall;
    const at::Tensor more_keys = random_rows({rest, config.hidden_size}, random) * kSmall;
    return {at::cat({full.queries, more_queries}, 1), at::cat({full.keys, more_keys}, 0)};
  }
  if (rest == 0) return full;
  const std::int64_t rotary_pairs = config.rope.rotary_dim / 2;
  const std::int64_t kept = (index_dim - config.rope.rotary_dim) / 2;
  const at::Tensor order = weight.slice(0, rotary_pairs).argsort(0, true).slice(0, 0, kept) + rotary_pairs;
  const at::Tensor turning = at::arange(config.rope.rotary_dim, at::kLong);
  const at::Tensor rows = at::cat({turning, pairs.first.index_select(0, order), pairs.second.index_select(0, order)});
  return {full.queries.index_select(1, rows), full.keys.index_select(0, rows)};
}

IndexWeights closed_form(const Projections& projections, const Moments& moments, const files::ModelConfig& config,
                         const Pairs& pairs, std::int64_t index_dim, Random& random) {
  const std::int64_t kv_heads = config.num_key_value_heads;
  const std::int64_t head_dim = config.head_dim;
  const double tokens = static_cast<double>(moments.tokens);
  const at::Tensor weight = (moments.queries / tokens).clamp_min(1e-12).sqrt();  // [kv_heads, pairs]
  const at::Tensor mean_queries = to_complex(
      projections.queries.view({kv_heads, config.group_size(), head_dim, config.hidden_size}).mean(1), pairs);
  const at::Tensor keys = to_complex(projections.keys, pairs) * weight.unsqueeze(-1);  // [kv_heads, pairs, hidden]
  const at::Tensor weights_by_pair = weight.t();                                       // [pairs, kv_heads]
  const at::Tensor covariance = moments.keys / tokens * (weights_by_pair.unsqueeze(2) * weights_by_pair.unsqueeze(1));
  const auto [values, vectors] = at::linalg_eigh(covariance);  // ascending; [pairs, kv_heads, n]
  // The scale of a pair is free (its query takes the inverse): keep index keys as large as the model's own.
  const at::Tensor size = weight.square().mean(0).sqrt();  // [pairs]
  const at::Tensor v = vectors.select(2, kv_heads - 1);    // [pairs, kv_heads]
  const at::Tensor key = at::einsum("ir,rih->ih", {v.conj(), keys}) / size.unsqueeze(-1);
  const at::Tensor query = mean_queries * (v.t().conj() / weight * size).unsqueeze(-1);
  return fit_width({to_real(query, pairs), to_real(key, pairs)}, config, pairs, index_dim,
                   values.select(1, kv_heads - 1), random);
}

IndexWeights plain_means(const Projections& projections, const files::ModelConfig& config, const Pairs& pairs,
                         std::int64_t index_dim, Random& random) {
  const std::int64_t kv_heads = config.num_key_value_heads;
  const IndexWeights means{
      projections.queries.view({kv_heads, config.group_size(), config.head_dim, config.hidden_size}).mean(1),
      projections.keys.mean(0)};
  const at::Tensor energy = at::real(to_complex(means.keys, pairs)).square().sum(1);
  return fit_width(means, config, pairs, index_dim, energy, random);
}

}  // namespace

Initialization parse_initialization(const std::string& name) {
  if (name == "closed-form") return Initialization::kClosedForm;
  if (name == "mean") return Initialization::kMean;
  if (name == "random") return Initialization::kRandom;
  throw Error("initialization '" + name + "': not one of closed-form, mean, random");
}

const char* initialization_name(Initialization value) {
  switch (value) {
    case Initialization::kClosedForm: return "closed-form";
    case Initialization::kMean: return "mean";
    case Initialization::kRandom: return "random";
  }
  return "?";
}

void add_index(Decoder& decoder, const ConvertOptions& options, const std::vector<Tokens>& calibration) {
  const at::NoGradGuard no_grad;
  const files::ModelConfig base = decoder.config();
  const std::int64_t index_dim = options.index_dim == 0 ? base.head_dim : options.index_dim;
  if (base.has_sparse_layers()) {
    throw Error(
        "convert: the model has an index branch already (layer_types); convert the dense checkpoint it came from");
  }
  if (index_dim % kHeadDimMultiple != 0 || index_dim > kMaxHeadDim || index_dim < base.rope.rotary_dim) {
    throw Error("convert: index_dim " + std::to_string(index_dim) + " is not a multiple of " +
                std::to_string(kHeadDimMultiple) + " between the rotary dimension " +
                std::to_string(base.rope.rotary_dim) + " and " + std::to_string(kMaxHeadDim));
  }
  std::set<std::int64_t> layers(options.layers.begin(), options.layers.end());
  if (options.layers.empty()) {
    for (std::int64_t layer = 0; layer < base.num_hidden_layers; ++layer) layers.insert(layer);
  }
  if (*layers.begin() < 0 || *layers.rbegin() >= base.num_hidden_layers) {
    throw Error("convert: layers must lie in 0.." + std::to_string(base.num_hidden_layers - 1));
  }
  files::ModelConfig config = base;
  config.layer_types.assign(static_cast<std::size_t>(base.num_hidden_layers), files::AttentionType::kFull);
  for (const std::int64_t layer : layers)
    config.layer_types[static_cast<std::size_t>(layer)] = files::AttentionType::kSparse;
  config.index_n_heads = base.num_key_value_heads;
  config.index_head_dim = index_dim;
  config.index_block_size = options.block_size;
  config.index_topk_blocks.assign(static_cast<std::size_t>(base.num_hidden_layers), options.topk);
  config.index_local_blocks = 1;
  config.index_init_blocks = 0;
  config.index_qk_norm = false;
  files::validate(config, "convert");

  const Pairs pairs = pair_dimensions(base.head_dim, base.rope.rotary_dim);
  std::map<std::int64_t, Moments> moments;
  if (options.initialization == Initialization::kClosedForm) {
    if (calibration.empty()) throw Error("convert: the closed form needs calibration text");
    moments = collect_moments(decoder, layers, calibration, pairs);
  }
  decoder.mutable_config() = config;
  // Scores are divided by sqrt(index_dim) in the KL, by sqrt(head_dim) in the model.
  const double logit_scale = std::sqrt(static_cast<double>(index_dim) / static_cast<double>(base.head_dim));
  for (const std::int64_t layer : layers) {
    Random random(options.seed, 0x1d7, static_cast<std::uint64_t>(layer));
    const auto known = moments.find(layer);
    const Moments* layer_moments = known == moments.end() ? nullptr : &known->second;
    IndexWeights weights;
    if (options.initialization == Initialization::kRandom) {
      weights = {random_rows({base.num_key_value_heads, index_dim, base.hidden_size}, random),
                 random_rows({index_dim, base.hidden_size}, random)};
    } else {
      const Projections projections = project(decoder, layer, layer_moments);
      weights = options.initialization == Initialization::kClosedForm
                    ? closed_form(projections, *layer_moments, base, pairs, index_dim, random)
                    : plain_means(projections, base, pairs, index_dim, random);
      weights.queries = weights.queries * logit_scale;
    }
    decoder.add_index_branch(layer, index_dim);
    decoder.parameter(projection_name(layer, "indexer.q_proj")).copy_(weights.queries.flatten(0, 1));
    decoder.parameter(projection_name(layer, "indexer.k_proj")).copy_(weights.keys);
  }
}

std::vector<std::int64_t> parse_layers(const std::string& text, std::int64_t count) {
  std::set<std::int64_t> layers;
  const auto fail = [&](const std::string& why) { return Error("layers '" + text + "': " + why); };
  if (text == "all") {
    for (std::int64_t layer = 0; layer < count; ++layer) layers.insert(layer);
    return {layers.begin(), layers.end()};
  }
  const char* at = text.data();
  const char* end = at + text.size();
  const auto number = [&] {
    std::int64_t value = 0;
    const auto [next, error] = std::from_chars(at, end, value);
    if (error != std::errc()) throw fail("a list such as 0,3,8-11, or all");
    at = next;
    if (value < 0 || value >= count) throw fail("the model has layers 0.." + std::to_string(count - 1));
    return value;
  };
  while (true) {
    const std::int64_t first = number();
    std::int64_t last = first;
    if (at != end && *at == '-') {
      ++at;
      last = number();
    }
    for (std::int64_t layer = first; layer <= last; ++layer) layers.insert(layer);
    if (at == end) break;
    if (*at != ',') throw fail("a list such as 0,3,8-11, or all");
    ++at;
  }
  return {layers.begin(), layers.end()};
}

void copy_companions(const fs::path& from, const fs::path& to) {
  constexpr std::uintmax_t kLargest = 256 << 20;  // a tokenizer is a few MB
  for (const fs::directory_entry& entry : fs::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    const std::string extension = entry.path().extension().string();
    if (!entry.is_regular_file() || name[0] == '.' || name == "config.json" || name == "msa_conversion.json") continue;
    if (extension == ".safetensors" || name.ends_with(".index.json") || extension == ".bin" || extension == ".pt" ||
        extension == ".pth" || extension == ".gguf" || extension == ".jsonl" || entry.file_size() > kLargest) {
      continue;
    }
    fs::copy_file(entry.path(), to / name, fs::copy_options::overwrite_existing);
  }
}

void write_converted(const Decoder& decoder, const fs::path& from, const fs::path& out, const std::string& record,
                     bool replace) {
  std::error_code error;
  const fs::path target = fs::absolute(out).lexically_normal();
  const fs::path final_path = target.has_filename() ? target : target.parent_path();
  if (fs::exists(final_path) && !replace) {
    throw Error("convert: " + final_path.string() + " exists; name another directory, or --force to replace it");
  }
  if (fs::equivalent(from, final_path, error))
    throw Error("convert: " + out.string() + " is the model being converted");
  fs::create_directories(final_path.parent_path());
  const fs::path partial = final_path.string() + ".partial";
  fs::remove_all(partial);
  fs::create_directory(partial);
  try {
    copy_companions(from, partial);
    // Base tensors straight from the mapped files; index tensors from the decoder.
    const files::CheckpointReader reader = files::CheckpointReader::open(from);
    std::vector<files::TensorSpec> specs;
    std::vector<at::Tensor> owned;  // parallel to specs; undefined: the reader's
    for (const std::string& name : reader.names()) {
      specs.push_back(reader.get(name));
      owned.emplace_back();
    }
    for (const auto& [name, tensor] : decoder.named_parameters()) {
      if (!Decoder::is_index_parameter(name) || reader.find(name) != nullptr) continue;
      const std::size_t layer_end = name.find(".self_attn.");
      const files::TensorInfo* sibling = reader.find(name.substr(0, layer_end) + ".self_attn.q_proj.weight");
      files::TensorSpec spec;
      spec.name = name;
      spec.dtype = sibling != nullptr ? sibling->dtype : files::DType::kF32;
      at::ScalarType type = at::kFloat;
      if (spec.dtype == files::DType::kBf16)
        type = at::kBFloat16;
      else if (spec.dtype == files::DType::kF16)
        type = at::kHalf;
      else
        spec.dtype = files::DType::kF32;
      spec.shape = tensor.sizes().vec();
      specs.push_back(spec);
      owned.push_back(tensor.detach().to(type).contiguous());
    }
    files::write_checkpoint(partial, specs, [&](std::size_t i) -> std::span<const std::byte> {
      if (!owned[i].defined()) return reader.bytes(specs[i].name);
      return {static_cast<const std::byte*>(owned[i].const_data_ptr()), owned[i].nbytes()};
    });
    files::write_text_file(partial / "config.json", files::to_json(decoder.config()));
    if (!record.empty()) files::write_text_file(partial / "msa_conversion.json", record);
    if (fs::exists(final_path)) {
      const fs::path old = final_path.string() + ".old";
      fs::remove_all(old);
      fs::rename(final_path, old);
      fs::rename(partial, final_path);
      fs::remove_all(old);
    } else {
      fs::rename(partial, final_path);
    }
  } catch (...) {
    fs::remove_all(partial, error);
    throw;
  }
}

}  // namespace msa::model
