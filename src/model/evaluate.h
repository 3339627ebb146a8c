// SPDX-License-Identifier: Apache-2.0
// How good a model and its index are: loss and perplexity on held-out windows under each way of attending, the KL and
// the recalls of the index branch, and maps of what it selects. One dense forward of a window serves the loss, the KL
// and the recalls of every budget asked for. Tested in tests/unit/model_train.cc and tests/python/test_train.py.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "src/model/corpus.h"
#include "src/model/decoder.h"

namespace msa::model {

/// Negative log-likelihood of every next token, float32 [T - 1]: hidden [T, hidden] of tokens int64 [T]. Logits are
/// made a few hundred rows at a time.
at::Tensor token_losses(const Decoder& decoder, const at::Tensor& hidden, const at::Tensor& tokens);

/// What one layer's index branch is worth on some query rows of one window. NaN where there is nothing to measure.
struct LayerAlignment {
  double kl = 0;            ///< over the whole prefix, mean over rows and groups
  double block_recall = 0;  ///< of the topk blocks of largest attention mass, mean over rows that see more than topk
  double score_recall = 0;
};
/// x [T, hidden] the layer's normalised input; q [R, query_heads, head_dim] the queries at `rows` (int32 [R],
/// ascending); k [T, kv_heads, head_dim]. topk 0 leaves the recalls NaN. Computes index queries of the rows only.
LayerAlignment measure_alignment(const Decoder& decoder, std::int64_t layer, const at::Tensor& x, const at::Tensor& q,
                                 const at::Tensor& k, const at::Tensor& rows, std::int64_t topk, Teacher teacher);

/// A layer each (NaN for layers without an index branch) and their means.
struct Alignment {
  std::vector<double> layer_kl, layer_block_recall, layer_score_recall;
  double kl = 0, block_recall = 0, score_recall = 0;
};

/// Means of LayerAlignments over windows, then over layers; NaN values are left out.
class AlignmentMeter {
 public:
  explicit AlignmentMeter(std::int64_t layers);
  void add(std::int64_t layer, const LayerAlignment& value);
  Alignment result() const;

 private:
  struct Mean {
    double sum = 0;
    std::int64_t count = 0;
  };
  std::vector<Mean> kl_, block_, score_;
};

/// One way to run the model: a mode at the checkpoint's own budget, at a number of blocks, or at a share of the
/// context.
struct EvaluationMode {
  AttentionMode attention = AttentionMode::kSparse;
  std::optional<std::int64_t> topk;
  double budget = 0;  ///< share of the context, 0: not given
  std::string name;   ///< as it was written: "dense", "sparse", "window@1/8", "sparse@16"
};
/// "dense", "sparse", "window@1/8", "oracle@0.25", "sparse@16" (blocks). Throws msa::Error quoting the text.
EvaluationMode parse_evaluation_mode(const std::string& text);
/// "1/8" or "0.125" -> 0.125; throws msa::Error outside (0, 1].
double parse_budget(const std::string& text);

/// Blocks a layer so that the sparse layers' mean is `budget` of `context` tokens and their proportions are the
/// checkpoint's; 0 for dense layers. Each within 1..64 (kMaxTopk).
std::vector<std::int64_t> spread_budget(const files::ModelConfig& config, double budget, std::int64_t context);
AttentionOptions attention_options(const EvaluationMode& mode, const files::ModelConfig& config, std::int64_t context);

struct ModeResult {
  std::string name;
  double loss = 0, perplexity = 0;            ///< over all positions
  double last_loss = 0, last_perplexity = 0;  ///< over the last `last_positions` of each window
  std::vector<double> window_losses;
  ForwardSeconds seconds;  ///< of the forward passes, without the head
  std::int64_t tokens = 0;
};

struct RecallResult {
  std::string name;  ///< the sparse mode whose budget it is
  Alignment alignment;
  std::optional<Alignment> untrained;  ///< of the baseline's index
};

/// How often the queries of a block of positions select a block of keys: frequency [query blocks][key blocks].
struct SelectionMap {
  std::int64_t layer = 0, group = 0, topk = 0;
  std::vector<std::vector<double>> frequency;
};

struct EvaluationOptions {
  std::vector<EvaluationMode> modes;
  std::int64_t last_positions = 1024;
  std::int64_t recall_rows = 256;        ///< query rows a window on which KL and recalls are measured; 0: none
  std::vector<std::int64_t> map_layers;  ///< layers whose selections are mapped, on the first window
  Teacher teacher = Teacher::kMean;
  std::uint64_t seed = 0;
  const Decoder* baseline = nullptr;  ///< same base model with another index (untrained), measured beside
  std::function<void(const std::string&)> progress;  ///< optional: one line of text a step
};

struct Evaluation {
  std::vector<ModeResult> modes;
  std::vector<RecallResult> recalls;
  std::vector<SelectionMap> maps;
};

/// Runs every window under every mode. Windows of equal length. KL and recalls are taken from the dense pass, or from
/// the first pass when no mode is dense; maps from the first sparse pass. Throws msa::Error on no windows or no modes.
Evaluation evaluate(const Decoder& decoder, const std::vector<Tokens>& windows, const EvaluationOptions& options);

}  // namespace msa::model
