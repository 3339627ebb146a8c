// SPDX-License-Identifier: Apache-2.0
// Norms, rotary embedding, MLPs, experts. Tested in tests/unit/model_decoder.cc.
#include "src/model/decoder_math.h"

#include <numbers>
#include <tuple>
#include <vector>

namespace msa::model {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool gemma) {
  const at::Tensor wide = x.to(at::kFloat);
  const at::Tensor scaled = wide * at::rsqrt(wide.pow(2).mean(-1, /*keepdim=*/true) + eps);
  if (gemma) return (scaled * (weight.to(at::kFloat) + 1.0)).to(x.scalar_type());
  return scaled.to(x.scalar_type()) * weight;
}

RopeTable make_rope_table(const files::RopeConfig& rope, const at::Tensor& positions) {
  const auto dim = static_cast<double>(rope.rotary_dim);
  at::Tensor frequency = at::reciprocal(at::pow(rope.theta, at::arange(0, rope.rotary_dim, 2, at::kFloat) / dim));
  if (rope.type == files::RopeType::kLinear) {
    frequency = frequency / rope.factor;
  } else if (rope.type == files::RopeType::kLlama3) {
    // Long wavelengths are stretched by `factor`, short ones left alone, those between blended.
    const auto original = static_cast<double>(rope.original_max_position_embeddings);
    const double low_wavelength = original / rope.low_freq_factor;
    const double high_wavelength = original / rope.high_freq_factor;
    const at::Tensor wavelength = 2.0 * std::numbers::pi / frequency;
    const at::Tensor stretched = at::where(wavelength > low_wavelength, frequency / rope.factor, frequency);
    const at::Tensor smooth =
        (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
    const at::Tensor blended = (1.0 - smooth) * stretched / rope.factor + smooth * stretched;
    const at::Tensor between = (wavelength >= high_wavelength).logical_and(wavelength <= low_wavelength);
    frequency = at::where(between, blended, stretched);
  }
  const at::Tensor angles = positions.to(at::kFloat).view({-1, 1, 1}) * frequency;
  return {angles.cos(), angles.sin()};
}

at::Tensor apply_rope(const at::Tensor& x, const RopeTable& table, std::int64_t tiles) {
  const std::int64_t tokens = x.size(0), heads = x.size(1), dim = x.size(2) / tiles;
  const std::int64_t half = table.cos.size(-1);
  const at::Tensor parts = x.reshape({tokens, heads * tiles, dim});
  const at::Tensor first = parts.narrow(-1, 0, half).to(at::kFloat);
  const at::Tensor second = parts.narrow(-1, half, half).to(at::kFloat);
  std::vector<at::Tensor> pieces = {(first * table.cos - second * table.sin).to(x.scalar_type()),
                                    (second * table.cos + first * table.sin).to(x.scalar_type())};
  if (dim > 2 * half) pieces.push_back(parts.narrow(-1, 2 * half, dim - 2 * half));
  return at::cat(pieces, -1).view({tokens, heads, tiles * dim});
}

at::Tensor gated_silu(const at::Tensor& gate, const at::Tensor& up) { return at::silu(gate) * up; }

at::Tensor clamped_swiglu(const at::Tensor& gate_up, double alpha, double limit) {
  const std::int64_t width = gate_up.size(-1) / 2;
  const at::Tensor gate = gate_up.narrow(-1, 0, width).clamp_max(limit);
  const at::Tensor up = gate_up.narrow(-1, width, width).clamp(-limit, limit);
  return (up + 1.0) * (gate * at::sigmoid(gate * alpha));
}

at::Tensor routed_experts(const at::Tensor& x, const ExpertWeights& weights, const files::ModelConfig& config) {
  const at::Tensor scores = at::sigmoid(at::linear(x, weights.router).to(at::kFloat));
  const at::Tensor chosen = std::get<1>((scores + weights.choice_bias).topk(config.num_experts_per_tok, -1));
  at::Tensor share = scores.gather(1, chosen);
  share = share / share.sum(-1, /*keepdim=*/true);

  // Chosen (token, expert) pairs, grouped by expert.
  const at::Tensor pairs = chosen.flatten();
  const at::Tensor order = pairs.argsort(/*stable=*/true);
  const at::Tensor count = at::bincount(pairs, {}, config.num_local_experts);
  const at::Tensor tokens = at::floor_divide(order, config.num_experts_per_tok);
  const at::Tensor pair_share = share.flatten().index_select(0, order);
  at::Tensor out = at::zeros_like(x);
  const auto* const counts = count.const_data_ptr<std::int64_t>();
  std::int64_t begin = 0;
  for (std::int64_t expert = 0; expert < config.num_local_experts; ++expert) {
    const std::int64_t rows = counts[expert];
    if (rows == 0) continue;
    const at::Tensor rows_of = tokens.narrow(0, begin, rows);
    const at::Tensor gate_up = at::linear(x.index_select(0, rows_of), weights.gate_up.select(0, expert));
    const at::Tensor hidden = clamped_swiglu(gate_up, config.swiglu_alpha, config.swiglu_limit);
    const at::Tensor down = at::linear(hidden, weights.down.select(0, expert));
    out = out.index_add(0, rows_of, (down * pair_share.narrow(0, begin, rows).unsqueeze(-1)).to(x.scalar_type()));
    begin += rows;
  }
  return out * config.routed_scaling_factor;
}

}  // namespace msa::model
