// SPDX-License-Identifier: Apache-2.0
// From a dense GQA checkpoint to an MSA one: every chosen layer gets an index branch whose first weights come from the
// layer's own query and key projections.
//
// The closed form. RoPE turns the pair of dimensions (i, i + rotary_dim / 2) of every head at the same angle: read as
// one complex number a pair is multiplied by exp(i * angle), so complex-linear combinations of heads commute with RoPE.
// The index branch has one key head for all groups: for each pair, the key combination that keeps most of what the
// groups' queries can see is the leading eigenvector v of the heads' key covariance C[r, s] = w_r w_s E[k_r conj(k_s)],
// weighted by the energy w_r^2 of group r's mean query. Then k_idx = sum_r conj(v_r) w_r k_r, and since k_r is close to
// v_r k_idx / w_r, the query of group r is its mean query times conj(v_r) / w_r. C needs no unrotated keys: at one
// token all heads are turned by the same angle, which cancels. Tested in tests/unit/model_convert.cc.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "src/model/corpus.h"
#include "src/model/decoder.h"

namespace msa::model {

enum class Initialization {
  kClosedForm,  ///< needs calibration text
  kMean,        ///< mean key head, mean query of each group
  kRandom,      ///< normal, standard deviation 1 / sqrt(hidden_size)
};
/// "closed-form", "mean" or "random"; throws msa::Error on anything else, naming the choices.
Initialization parse_initialization(const std::string& name);
const char* initialization_name(Initialization value);

struct ConvertOptions {
  std::int64_t block_size = 64;
  std::int64_t topk = 16;
  std::int64_t index_dim = 0;        ///< 0: head_dim. What is wider starts small and random
  std::vector<std::int64_t> layers;  ///< layers that become sparse; empty: all
  Initialization initialization = Initialization::kClosedForm;
  std::uint64_t seed = 0;
};

/// Gives `decoder` an index branch in the chosen layers and sets its index configuration. `calibration`: token windows
/// for the closed form (about 8K tokens are enough), run densely; unused otherwise. Query and key norms of the base
/// model (Qwen3) are folded into the projections: their weights exactly, the division by each head's magnitude as its
/// mean over the calibration text (ones without any); biases are left out. Throws msa::Error on shapes the index cannot
/// have.
void add_index(Decoder& decoder, const ConvertOptions& options, const std::vector<Tokens>& calibration);

/// "0,3,8-11" or "all" -> ascending layer ids below `count`. Throws msa::Error quoting the text.
std::vector<std::int64_t> parse_layers(const std::string& text, std::int64_t count);

/// Writes `decoder` as checkpoint directory `out`, whole or not at all (a temporary neighbour is renamed): the base
/// tensors of `from` byte for byte under their names, the index tensors in the type of the base's projections,
/// config.json, and the other files of `from` (tokenizer, licence; no weights). An existing `out` is replaced when
/// `replace` is set, otherwise an msa::Error names it. `record` is kept beside them as msa_conversion.json (empty: not
/// written).
void write_converted(const Decoder& decoder, const std::filesystem::path& from, const std::filesystem::path& out,
                     const std::string& record, bool replace);

/// Copies what a checkpoint directory holds besides weights and config.json: tokenizer, templates, licence.
void copy_companions(const std::filesystem::path& from, const std::filesystem::path& to);

}  // namespace msa::model
