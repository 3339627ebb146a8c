// SPDX-License-Identifier: Apache-2.0
// See evaluate.h.
#include "src/model/evaluate.h"

#include <c10/core/GradMode.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "bindings/torch/ops.h"
#include "msa/error.h"
#include "msa/select_blocks.h"
#include "src/model/numbers.h"
#include "src/model/stopwatch.h"
#include "src/model/train_random.h"

namespace msa::model {
namespace {

// Rows of logits made at a time: 256 x 49152 float32 values are 48 MiB.
constexpr std::int64_t kLogitRows = 256;

SelectionMap map_selection(const LayerView& view, std::int64_t group, std::int64_t block_size) {
  const at::Tensor blocks = view.blocks.select(0, group).contiguous();  // [T, topk]
  const std::int64_t tokens = blocks.size(0);
  const std::int64_t topk = blocks.size(1);
  const auto rows = static_cast<std::size_t>((tokens + block_size - 1) / block_size);
  SelectionMap map;
  map.layer = view.layer;
  map.group = group;
  map.topk = topk;
  map.frequency.assign(rows, std::vector<double>(rows, 0.0));
  const std::int32_t* ids = blocks.const_data_ptr<std::int32_t>();
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::vector<double>& row = map.frequency[static_cast<std::size_t>(t / block_size)];
    for (std::int64_t j = 0; j < topk; ++j) {
      const std::int32_t id = ids[t * topk + j];
      if (id >= 0) row[static_cast<std::size_t>(id)] += 1;
    }
  }
  for (std::size_t r = 0; r < rows; ++r) {
    const std::int64_t in_row = std::min(block_size, tokens - static_cast<std::int64_t>(r) * block_size);
    for (double& value : map.frequency[r]) value /= static_cast<double>(in_row);
  }
  return map;
}

}  // namespace

at::Tensor token_losses(const Decoder& decoder, const at::Tensor& hidden, const at::Tensor& tokens) {
  const at::NoGradGuard no_grad;
  const std::int64_t count = tokens.size(0) - 1;
  std::vector<at::Tensor> parts;
  for (std::int64_t begin = 0; begin < count; begin += kLogitRows) {
    const std::int64_t rows = std::min(kLogitRows, count - begin);
    parts.push_back(at::cross_entropy_loss(decoder.logits(hidden.narrow(0, begin, rows)),
                                           tokens.narrow(0, begin + 1, rows), {}, at::Reduction::None));
  }
  return parts.empty() ? at::empty({0}, at::kFloat) : at::cat(parts);
}

LayerAlignment measure_alignment(const Decoder& decoder, std::int64_t layer, const at::Tensor& x, const at::Tensor& q,
                                 const at::Tensor& k, const at::Tensor& rows, std::int64_t topk, Teacher teacher) {
  const at::NoGradGuard no_grad;
  const files::ModelConfig& config = decoder.config();
  const std::int64_t tokens = x.size(0);
  const at::Tensor positions = rows.to(at::kLong);
  const at::Tensor q_idx = decoder.index_queries(layer, x.index_select(0, positions), positions);
  const at::Tensor k_idx = decoder.index_keys(layer, x, at::arange(tokens, at::kLong));
  const at::Tensor cu_q = int32_tensor({0, rows.size(0)});
  const at::Tensor cu_k = int32_tensor({0, tokens});
  LayerAlignment result;
  result.kl = torch_ops::index_kl(q_idx, k_idx, q, k, std::nullopt, cu_q, cu_k, config.index_block_size, std::nullopt,
                                  std::nullopt, teacher == Teacher::kMax ? "max" : "mean", rows)
                  .item<double>();
  result.block_recall = result.score_recall = kNan;
  if (topk > 0) {
    const at::Tensor blocks = torch_ops::select_blocks(q_idx, k_idx, cu_q, cu_k, config.index_block_size, topk,
                                                       config.index_local_blocks, config.index_init_blocks, rows);
    const auto [block, score] =
        torch_ops::selection_recall(q, k, blocks, cu_q, cu_k, config.index_block_size, std::nullopt, rows);
    result.block_recall = block.item<double>();
    result.score_recall = score.item<double>();
  }
  return result;
}

AlignmentMeter::AlignmentMeter(std::int64_t layers)
    : kl_(static_cast<std::size_t>(layers)), block_(kl_.size()), score_(kl_.size()) {}

void AlignmentMeter::add(std::int64_t layer, const LayerAlignment& value) {
  const auto put = [&](std::vector<Mean>& means, double x) {
    if (std::isnan(x)) return;
    means[static_cast<std::size_t>(layer)].sum += x;
    ++means[static_cast<std::size_t>(layer)].count;
  };
  put(kl_, value.kl);
  put(block_, value.block_recall);
  put(score_, value.score_recall);
}

Alignment AlignmentMeter::result() const {
  const auto means = [](const std::vector<Mean>& from) {
    std::vector<double> values;
    for (const Mean& mean : from) values.push_back(mean.count == 0 ? kNan : mean.sum / static_cast<double>(mean.count));
    return values;
  };
  Alignment result;
  result.layer_kl = means(kl_);
  result.layer_block_recall = means(block_);
  result.layer_score_recall = means(score_);
  result.kl = mean_of(result.layer_kl);
  result.block_recall = mean_of(result.layer_block_recall);
  result.score_recall = mean_of(result.layer_score_recall);
  return result;
}

double parse_budget(const std::string& text) {
  const auto number = [](std::string_view part, double& value) {
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), value);
    return error == std::errc() && end == part.data() + part.size();
  };
  const std::string_view view = text;
  const std::size_t slash = view.find('/');
  double share = 0;
  double over = 1;
  const bool good = slash == std::string_view::npos
                        ? number(view, share)
                        : number(view.substr(0, slash), share) && number(view.substr(slash + 1), over) && over > 0;
  share /= over;
  if (!good || !(share > 0 && share <= 1))
    throw Error("budget '" + text + "': a share of the context such as 1/8 or 0.125");
  return share;
}

EvaluationMode parse_evaluation_mode(const std::string& text) {
  EvaluationMode mode;
  const std::size_t at = text.find('@');
  mode.attention = parse_attention_mode(text.substr(0, at));
  mode.name = text;
  if (at == std::string::npos) return mode;
  const std::string amount = text.substr(at + 1);
  if (mode.attention == AttentionMode::kDense) throw Error("attention '" + text + "': dense attention has no budget");
  const bool is_count =
      !amount.empty() && std::all_of(amount.begin(), amount.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (is_count && amount != "1") {
    std::int64_t blocks = 0;
    const auto [end, error] = std::from_chars(amount.data(), amount.data() + amount.size(), blocks);
    if (error != std::errc() || blocks < 1 || blocks > kMaxTopk) {
      throw Error("attention '" + text + "': blocks a query must be 1.." + std::to_string(kMaxTopk));
    }
    mode.topk = blocks;
  } else {
    mode.budget = parse_budget(amount);
  }
  return mode;
}

std::vector<std::int64_t> spread_budget(const files::ModelConfig& config, double budget, std::int64_t context) {
  std::vector<std::size_t> free;  // layers not yet at a limit
  for (std::size_t layer = 0; layer < config.layer_types.size(); ++layer) {
    if (config.layer_types[layer] == files::AttentionType::kSparse) free.push_back(layer);
  }
  if (free.empty()) throw Error("budget: the model has no sparse layers");
  std::vector<std::int64_t> topk(config.layer_types.size(), 0);
  double left = budget * static_cast<double>(context) / static_cast<double>(config.index_block_size) *
                static_cast<double>(free.size());
  // A layer that its share would take beyond a limit gets the limit; the others share what is left.
  for (bool again = true; again && !free.empty();) {
    again = false;
    double sum = 0;
    for (const std::size_t layer : free) sum += static_cast<double>(config.index_topk_blocks.at(layer));
    const double factor = left / sum;
    std::vector<std::size_t> still_free;
    for (const std::size_t layer : free) {
      const double wanted = std::round(static_cast<double>(config.index_topk_blocks[layer]) * factor);
      topk[layer] = static_cast<std::int64_t>(std::clamp(wanted, 1.0, static_cast<double>(kMaxTopk)));
      if (wanted > static_cast<double>(kMaxTopk)) {
        left -= static_cast<double>(topk[layer]);
        again = true;
      } else {
        still_free.push_back(layer);
      }
    }
    free = std::move(still_free);
  }
  return topk;
}

AttentionOptions attention_options(const EvaluationMode& mode, const files::ModelConfig& config, std::int64_t context) {
  AttentionOptions options;
  options.mode = mode.attention;
  if (mode.attention == AttentionMode::kDense) return options;
  options.topk = mode.topk;
  if (mode.budget > 0) options.layer_topk = spread_budget(config, mode.budget, context);
  return options;
}

Evaluation evaluate(const Decoder& decoder, const std::vector<Tokens>& windows, const EvaluationOptions& options) {
  const at::NoGradGuard no_grad;
  if (windows.empty()) throw Error("eval: no windows");
  if (options.modes.empty()) throw Error("eval: no attention modes");
  const files::ModelConfig& config = decoder.config();
  const auto context = static_cast<std::int64_t>(windows.front().size());
  const auto report = [&](const std::string& text) {
    if (options.progress) options.progress(text);
  };

  // Budgets whose recalls are wanted: those of the sparse modes.
  struct Meter {
    std::string name;
    std::vector<std::int64_t> topk;  // a layer
    AlignmentMeter trained, untrained;
  };
  std::vector<Meter> meters;
  for (const EvaluationMode& mode : options.modes) {
    if (mode.attention != AttentionMode::kSparse || options.recall_rows <= 0) continue;
    std::vector<std::int64_t> topk(config.layer_types.size(), 0);
    for (std::size_t layer = 0; layer < topk.size(); ++layer) {
      if (config.layer_types[layer] != files::AttentionType::kSparse) continue;
      topk[layer] = mode.topk ? *mode.topk : config.index_topk_blocks.at(layer);
    }
    if (mode.budget > 0) topk = spread_budget(config, mode.budget, context);
    meters.push_back(
        {mode.name, topk, AlignmentMeter(config.num_hidden_layers), AlignmentMeter(config.num_hidden_layers)});
  }
  std::size_t recall_mode = 0;  // the pass in which recalls are measured
  std::size_t map_mode = options.modes.size();
  for (std::size_t m = options.modes.size(); m-- > 0;) {
    if (options.modes[m].attention == AttentionMode::kSparse) map_mode = m;
  }
  for (std::size_t m = 0; m < options.modes.size(); ++m) {
    if (options.modes[m].attention == AttentionMode::kDense) recall_mode = m;
  }

  Evaluation evaluation;
  for (std::size_t m = 0; m < options.modes.size(); ++m) {
    const EvaluationMode& mode = options.modes[m];
    ModeResult result;
    result.name = mode.name;
    double sum = 0;
    double last_sum = 0;
    std::int64_t count = 0;
    std::int64_t last_count = 0;
    for (std::size_t w = 0; w < windows.size(); ++w) {
      const auto length = static_cast<std::int64_t>(windows[w].size());
      const at::Tensor tokens = at::tensor(windows[w], at::kLong);
      Random random(options.seed, 0xe7a1, w);
      const std::vector<std::int32_t> sampled = random.sample(length, options.recall_rows);
      const at::Tensor rows = at::tensor(sampled, at::kInt);
      double observed_seconds = 0;  // the observer's own work is not the model's
      ForwardOptions forward;
      forward.attention = attention_options(mode, config, context);
      const bool measure = m == recall_mode && !meters.empty();
      const bool draw = m == map_mode && w == 0 && !options.map_layers.empty();
      if (measure || draw) {
        forward.observer = [&](const LayerView& view) {
          const Stopwatch observed;
          if (draw && view.blocks.defined() &&
              std::find(options.map_layers.begin(), options.map_layers.end(), view.layer) != options.map_layers.end()) {
            for (std::int64_t group = 0; group < config.num_key_value_heads; ++group) {
              evaluation.maps.push_back(map_selection(view, group, config.index_block_size));
            }
          }
          if (measure && decoder.has_index_branch(view.layer)) {
            const at::Tensor q = view.q.index_select(0, rows.to(at::kLong));
            for (Meter& meter : meters) {
              const std::int64_t topk = meter.topk[static_cast<std::size_t>(view.layer)];
              if (topk == 0) continue;
              meter.trained.add(view.layer,
                                measure_alignment(decoder, view.layer, view.x, q, view.k, rows, topk, options.teacher));
              if (options.baseline != nullptr && options.baseline->has_index_branch(view.layer)) {
                meter.untrained.add(view.layer, measure_alignment(*options.baseline, view.layer, view.x, q, view.k,
                                                                  rows, topk, options.teacher));
              }
            }
          }
          observed_seconds += observed.seconds();
        };
      }
      const ForwardResult run = decoder.forward(tokens, int32_tensor({0, length}), forward);
      result.seconds += run.seconds;
      result.seconds.total -= observed_seconds;
      result.tokens += length;
      const at::Tensor losses = token_losses(decoder, run.hidden, tokens).to(at::kDouble);
      const std::int64_t last = std::min(options.last_positions, losses.size(0));
      const double window_sum = losses.sum().item<double>();
      result.window_losses.push_back(window_sum / static_cast<double>(losses.size(0)));
      sum += window_sum;
      count += losses.size(0);
      last_sum += losses.narrow(0, losses.size(0) - last, last).sum().item<double>();
      last_count += last;
      report(mode.name + ": window " + std::to_string(w + 1) + " of " + std::to_string(windows.size()) +
             ", perplexity so far " + std::to_string(std::exp(sum / static_cast<double>(count))));
    }
    result.loss = sum / static_cast<double>(count);
    result.perplexity = std::exp(result.loss);
    result.last_loss = last_sum / static_cast<double>(last_count);
    result.last_perplexity = std::exp(result.last_loss);
    evaluation.modes.push_back(std::move(result));
  }
  for (const Meter& meter : meters) {
    RecallResult recall{meter.name, meter.trained.result(), std::nullopt};
    if (options.baseline != nullptr) recall.untrained = meter.untrained.result();
    evaluation.recalls.push_back(std::move(recall));
  }
  return evaluation;
}

}  // namespace msa::model
