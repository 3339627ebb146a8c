// SPDX-License-Identifier: Apache-2.0
// Decoder-only language models with dense or MSA layers (SPEC section 8): Llama-family (Llama, SmolLM2, Qwen2, Qwen3)
// and the MiniMax-M3 text model. One forward serves training (autograd, packed sequences) and inference (paged cache);
// what a caller wants to see of the inside it gets through an observer. Tested in tests/unit/model_decoder.cc and,
// against transformers, in tests/python/test_decoder.py.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "msa/index_kl.h"
#include "src/cache/paged_cache.h"
#include "src/model/files/config.h"

namespace msa::model {

/// How the layers that the config calls sparse attend; dense layers are always dense.
enum class AttentionMode {
  kSparse,  ///< blocks chosen by the index branch
  kDense,   ///< full attention
  kWindow,  ///< fixed: first block + the most recent ones, same budget (baseline)
  kOracle,  ///< blocks of largest true attention mass, same budget (upper bound)
};
AttentionMode parse_attention_mode(const std::string& name);  // "sparse" | "dense" | "window" | "oracle"
const char* attention_mode_name(AttentionMode mode);

struct AttentionOptions {
  AttentionMode mode = AttentionMode::kSparse;
  std::optional<std::int64_t> topk;  ///< overrides every sparse layer's topk
  /// Overrides topk and the config by layer index (size num_hidden_layers; 0 = dense layer); empty: no override.
  std::vector<std::int64_t> layer_topk;
};

/// What one attention layer saw and did. Tensors are packed [T, ...]; index tensors are undefined where the layer has
/// no index branch or did not need it, blocks where attention was dense.
struct LayerView {
  std::int64_t layer = 0;
  at::Tensor x;        ///< [T, hidden] normalised layer input
  at::Tensor q, k, v;  ///< [T, heads, dim] after norm and RoPE
  at::Tensor q_idx, k_idx;
  at::Tensor blocks;  ///< int32 [kv_heads, T, topk]
};
/// Called after each layer's attention with what it computed (for the cached forward: q and x of the new tokens only).
using LayerObserver = std::function<void(const LayerView&)>;

struct ForwardOptions {
  AttentionOptions attention;
  LayerObserver observer;  ///< optional
  /// Compute the KL of every layer with an index branch (support: whole prefix in kDense, selected blocks in kSparse)
  /// and return their sum; index inputs detached unless detach_index is false (ablation).
  bool with_kl = false;
  bool detach_index = true;
  Teacher teacher = Teacher::kMean;
};

/// Wall-clock seconds of one forward, all layers together. What is neither selection nor attention is linear layers,
/// norms and the cache.
struct ForwardSeconds {
  double selection = 0;  ///< choosing blocks
  double attention = 0;  ///< attending to them, or to everything
  double total = 0;

  ForwardSeconds& operator+=(const ForwardSeconds& other) {
    selection += other.selection;
    attention += other.attention;
    total += other.total;
    return *this;
  }
};

struct ForwardResult {
  at::Tensor hidden;             ///< [T, hidden] after the final norm
  at::Tensor kl_sum;             ///< scalar; undefined unless with_kl
  std::vector<double> layer_kl;  ///< a value a layer with index branch, NaN elsewhere; empty unless with_kl
  ForwardSeconds seconds;
};

class Decoder {
 public:
  /// Loads a Hugging Face directory; parameters are held in `dtype` (kFloat or kBFloat16).
  static Decoder load(const std::string& directory, at::ScalarType dtype = at::kFloat);
  /// Randomly initialised (normal, std 0.02, as is usual; residual projections not rescaled), for pre-training and
  /// tests.
  static Decoder create(const files::ModelConfig& config, std::uint64_t seed, at::ScalarType dtype = at::kFloat);
  /// Writes config.json and *.safetensors under the names the checkpoint was loaded with; copies nothing else.
  void save(const std::string& directory) const;

  const files::ModelConfig& config() const;
  files::ModelConfig& mutable_config();  ///< index settings may be changed; shapes may not
  /// Adds a (zero) index branch to a dense layer; convert fills it in.
  void add_index_branch(std::int64_t layer, std::int64_t index_dim);
  bool has_index_branch(std::int64_t layer) const;
  /// Ablations (SPEC section 5), for a model that was made without them. Both start without effect: the value head's
  /// output projection at 0, the sinks far below every score. A switch that is on already stays as it is; throws
  /// msa::Error when the value head has another dimension or no layer is sparse.
  void add_index_values(std::int64_t value_dim, std::uint64_t seed);
  void add_attention_sinks();

  /// Parameter by its canonical checkpoint name ("model.layers.3.self_attn.q_proj.weight"); throws if unknown.
  at::Tensor& parameter(const std::string& name);
  /// All parameters, in a fixed order.
  std::vector<std::pair<std::string, at::Tensor>> named_parameters() const;
  /// What the KL trains: projections and norms of an index branch, its value head excepted.
  static bool is_index_parameter(const std::string& name);
  /// Learned with the language-model loss, as the backbone is.
  static bool is_value_head_parameter(const std::string& name);

  /// Packed sequences, no cache; differentiable when gradients are enabled. tokens int64 [T], cu_seqlens int32 [B+1].
  ForwardResult forward(const at::Tensor& tokens, const at::Tensor& cu_seqlens, const ForwardOptions& options) const;
  /// Appends `tokens` to sequence `sequence` of the cache and runs them (chunked prefill, decode, verification are this
  /// one call at different lengths). No gradients. On any error the sequence is left as it was. Attention is bitwise
  /// independent of how a sequence is cut into calls. The linear layers are torch's GEMM, which may round a row
  /// differently in batches of different sizes, so hidden states agree to rounding only.
  ForwardResult forward_cached(const at::Tensor& tokens, cache::PagedCache& cache, std::int64_t sequence,
                               const ForwardOptions& options) const;
  /// Layer shapes for a cache of this model. Without index keys, the cache serves every mode but kSparse. Index values
  /// lie behind the index key in one row of index_dim + index_value_dim; a layer with a value head always has it.
  cache::CacheShape cache_shape(std::int64_t page_size, bool with_index_keys = true) const;
  /// Caches of this model hold keys, values and index keys as float8: a quarter or half of the memory, rounded.
  void use_float8_cache();

  /// hidden [N, hidden] -> float32 logits [N, vocab].
  at::Tensor logits(const at::Tensor& hidden) const;
  /// Index branch of one layer on its normalised input: (q_idx [T, kv_heads, Di], k_idx [T, Di]), RoPE applied at
  /// `positions` (int64 [T]); differentiable in the index parameters. For training on cached activations.
  std::pair<at::Tensor, at::Tensor> index_branch(std::int64_t layer, const at::Tensor& x,
                                                 const at::Tensor& positions) const;

  /// The two halves of index_branch, for callers that need queries of a few rows and keys of all: [T, kv_heads, Di] and
  /// [T, Di]. RoPE rotates the first rotary_dim of the Di dimensions (SPEC section 2: as MiniMax-M3), the rest pass
  /// through.
  at::Tensor index_queries(std::int64_t layer, const at::Tensor& x, const at::Tensor& positions) const;
  at::Tensor index_keys(std::int64_t layer, const at::Tensor& x, const at::Tensor& positions) const;

  struct Impl;

 private:
  explicit Decoder(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace msa::model
