// SPDX-License-Identifier: Apache-2.0
// See calibrate.h.
#include "src/model/calibrate.h"

#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <tuple>

#include "bindings/torch/ops.h"
#include "msa/error.h"
#include "msa/select_blocks.h"

namespace msa::model {

std::vector<LayerGain> rank_layers(const Decoder& decoder, const std::vector<RetrievalDocument>& documents,
                                   const RankOptions& options) {
  const at::NoGradGuard no_grad;
  const files::ModelConfig& config = decoder.config();
  std::map<std::int64_t, at::Tensor> gains;  // [query_heads], float64, summed over documents
  for (const RetrievalDocument& document : documents) {
    const auto length = static_cast<std::int64_t>(document.tokens.size());
    const std::int64_t begin = std::max(document.tail_begin, length - options.max_rows);
    const at::Tensor rows = at::arange(begin, length, at::kInt);
    const at::Tensor positions = rows.to(at::kLong);
    const at::Tensor cu_q = at::tensor({std::int64_t{0}, length - begin}, at::kInt);
    const at::Tensor cu_k = at::tensor({std::int64_t{0}, length}, at::kInt);
    const double blocks = options.budget * static_cast<double>(length) / static_cast<double>(config.index_block_size);
    const auto topk = static_cast<std::int64_t>(std::clamp(std::round(blocks), 1.0, static_cast<double>(kMaxTopk)));
    ForwardOptions forward;
    forward.attention.mode = AttentionMode::kDense;
    forward.observer = [&](const LayerView& view) {
      if (!decoder.has_index_branch(view.layer)) return;
      const at::Tensor q = view.q.index_select(0, positions);
      const at::Tensor q_idx = decoder.index_queries(view.layer, view.x.index_select(0, positions), positions);
      const at::Tensor k_idx = decoder.index_keys(view.layer, view.x, at::arange(length, at::kLong));
      const at::Tensor chosen = torch_ops::select_blocks(q_idx, k_idx, cu_q, cu_k, config.index_block_size, topk,
                                                         config.index_local_blocks, config.index_init_blocks, rows);
      const at::Tensor best =
          torch_ops::select_blocks_oracle(q, view.k, cu_q, cu_k, config.index_block_size, topk,
                                          config.index_local_blocks, config.index_init_blocks, std::nullopt, rows);
      // exp(lse of the selected - lse of all) is the attention mass that a head finds in the selected blocks
      const at::Tensor all = std::get<1>(torch_ops::dense_attention(q, view.k, view.v, cu_q, cu_k, std::nullopt, rows));
      const auto mass = [&](const at::Tensor& selected) {
        const at::Tensor lse = std::get<1>(torch_ops::sparse_attention(q, view.k, view.v, selected, cu_q, cu_k,
                                                                       config.index_block_size, std::nullopt, rows));
        return (lse - all).to(at::kDouble).exp();  // [rows, query_heads]
      };
      const at::Tensor gain = (mass(best) - mass(chosen)).mean(0);
      at::Tensor& sum = gains[view.layer];
      sum = sum.defined() ? sum + gain : gain;
    };
    (void)decoder.forward(at::tensor(document.tokens, at::kLong), cu_k, forward);
  }
  std::vector<LayerGain> ranking;
  for (const auto& [layer, sum] : gains) {
    const auto [value, head] = sum.max(0);
    ranking.push_back({layer, value.item<double>() / static_cast<double>(documents.size()), head.item<std::int64_t>()});
  }
  std::stable_sort(ranking.begin(), ranking.end(),
                   [](const LayerGain& a, const LayerGain& b) { return a.gain > b.gain; });
  return ranking;
}

void spend_budget(files::ModelConfig& config, const std::vector<LayerGain>& ranking, std::int64_t count,
                  std::int64_t topk, bool keep_budget) {
  if (count < 0 || count > static_cast<std::int64_t>(ranking.size())) {
    throw Error("calibrate: " + std::to_string(count) + " layers to favour of " + std::to_string(ranking.size()));
  }
  std::set<std::size_t> favoured;
  for (std::int64_t i = 0; i < count; ++i) {
    favoured.insert(static_cast<std::size_t>(ranking[static_cast<std::size_t>(i)].layer));
  }
  double before = 0;
  double fixed = 0;
  std::vector<std::size_t> others;
  for (std::size_t layer = 0; layer < config.layer_types.size(); ++layer) {
    if (config.layer_types[layer] != files::AttentionType::kSparse) continue;
    if (favoured.contains(layer) && topk == 0) continue;
    before += static_cast<double>(config.index_topk_blocks.at(layer));
    if (favoured.contains(layer)) {
      fixed += static_cast<double>(topk);
    } else {
      others.push_back(layer);
    }
  }
  double others_sum = 0;
  for (const std::size_t layer : others) others_sum += static_cast<double>(config.index_topk_blocks.at(layer));
  if (keep_budget && !others.empty() && fixed > 0) {
    const double factor = (before - fixed) / others_sum;
    for (const std::size_t layer : others) {
      const double wanted = std::round(static_cast<double>(config.index_topk_blocks[layer]) * factor);
      config.index_topk_blocks[layer] =
          static_cast<std::int64_t>(std::clamp(wanted, 1.0, static_cast<double>(kMaxTopk)));
    }
  }
  for (const std::size_t layer : favoured) {
    if (topk == 0) {
      config.layer_types[layer] = files::AttentionType::kFull;
    } else {
      config.index_topk_blocks[layer] = topk;
    }
  }
  files::validate(config, "calibrate");
}

}  // namespace msa::model
