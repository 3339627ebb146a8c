// SPDX-License-Identifier: Apache-2.0
// Tiny random models for the tests of the model layer.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>
#include <vector>

#include "src/model/decoder.h"

namespace msa::model::testing {

/// Llama with an index branch in every layer but the second: 3 layers, 6 query heads in 3 groups of 2, blocks of 16,
/// the best 2. Weights are large enough that attention is far from uniform and selection matters.
inline files::ModelConfig tiny_config() {
  files::ModelConfig config = files::parse_model_config(R"({
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 96, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "vocab_size": 61,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
    "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2,
    "index_n_heads": 3, "index_head_dim": 32, "index_block_size": 16, "index_topk_blocks": 2, "index_local_blocks": 1,
    "index_rope_tiles": 2, "index_qk_norm": false,
    "layer_types": ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse"]
  })",
                                                        "tiny config");
  return config;
}

inline at::Tensor random_tokens(std::int64_t count, std::int64_t vocab, std::uint64_t seed) {
  at::Tensor tokens = at::empty({count}, at::kLong);
  auto* const ids = tokens.mutable_data_ptr<std::int64_t>();
  std::uint64_t state = seed * 2654435761U + 12345;
  for (std::int64_t i = 0; i < count; ++i) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    ids[i] = static_cast<std::int64_t>((state >> 33) % static_cast<std::uint64_t>(vocab));
  }
  return tokens;
}

/// Largest difference over the largest value of `expected`.
inline double relative_error(const at::Tensor& actual, const at::Tensor& expected) {
  return ((actual - expected).abs().max() / expected.abs().max()).item<double>();
}

}  // namespace msa::model::testing
