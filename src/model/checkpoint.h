// SPDX-License-Identifier: Apache-2.0
// What a decoder's parameters are called, how large they are, and where a Hugging Face checkpoint keeps them. A
// parameter has one canonical name (that of transformers' save_pretrained for the text model); a checkpoint may store
// it under another, or in pieces: the published MiniMax-M3 files hold one tensor an expert. The pieces are found on
// loading, and a save writes the same ones. Tested in tests/unit/model_decoder.cc and tests/python/test_decoder.py.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "src/model/files/config.h"

namespace msa::model {

enum class ParameterKind {
  kWeight,      ///< drawn from normal(0, initializer_range) when created
  kNorm,        ///< RMSNorm scale: starts as the identity
  kBias,        ///< starts at 0
  kRouterBias,  ///< the router's choice bias: starts at 0, float32 always, moved by no gradient
};

struct ParameterSpec {
  std::string name;
  std::vector<std::int64_t> shape;
  ParameterKind kind = ParameterKind::kWeight;
  bool required = true;  ///< false: present if the checkpoint has it (an index branch in a dense layer, index norms)
  bool in_sparse_layer = false;  ///< of an index branch: its layer is sparse
};

/// All parameters a model of this configuration may have, in their fixed order. O(layers).
std::vector<ParameterSpec> list_parameters(const files::ModelConfig& config);
/// The specs of one layer's index branch, canonical order q_proj, k_proj, q_norm, k_norm and, with an index value head,
/// v_proj, o_proj.
std::vector<ParameterSpec> list_index_parameters(const files::ModelConfig& config, std::int64_t layer);
std::string layer_prefix(std::int64_t layer);  // "model.layers.3."

/// A stored tensor and the part of its parameter that it holds: rows [row_begin, row_begin + rows) of expert `expert`
/// (-1: the parameter has no expert dimension, or is stored whole); rows 0 stands for all.
struct StoredPart {
  std::string name;
  std::int64_t expert = -1;
  std::int64_t row_begin = 0;
  std::int64_t rows = 0;

  /// That part of the parameter, a view.
  at::Tensor of(const at::Tensor& parameter) const;
};
using StoredParts = std::vector<StoredPart>;

struct Checkpoint {
  files::ModelConfig config;
  std::map<std::string, at::Tensor> parameters;  ///< by canonical name
  std::map<std::string, StoredParts> stored;     ///< by canonical name; one not listed is stored whole under its name
};

/// Reads a directory; parameters are converted to `dtype` (kFloat, kBFloat16 or kHalf). Throws msa::Error naming the
/// tensor when one is missing, has another shape, no floating type, or is unknown and would change what the model
/// computes. Memory: the parameters, and one stored tensor.
Checkpoint load_checkpoint(const std::string& directory, at::ScalarType dtype);
/// Writes config.json and the tensors into a directory, made if it does not exist. Tensors keep the order of
/// list_parameters and the dtype they are held in.
void save_checkpoint(const std::string& directory, const files::ModelConfig& config,
                     const std::map<std::string, at::Tensor>& parameters,
                     const std::map<std::string, StoredParts>& stored);

}  // namespace msa::model
