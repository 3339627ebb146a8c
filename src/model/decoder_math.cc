// SPDX-License-Identifier: Apache-2.0
// Norms, rotary embedding, MLPs, experts. Tested in tests/unit/model_decoder.cc.
#include "src/model/decoder_math.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <tuple>
#include <vector>

#include "src/model/linear.h"

namespace msa::model {
namespace {

// Norms and rotations outside autograd are one pass over their rows where torch's operators make eight: in a pass of
// one token calling those takes longer than all the arithmetic. Values a thread gets at least:
constexpr std::int64_t kGrainValues = 1 << 14;

bool takes_one_pass(const at::Tensor& x) {
  return (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16) && x.device().is_cpu() &&
         x.is_contiguous();
}

// Calls body(row begin, row end) over rows of `width` values, in parallel where that pays.
template <class Body>
void for_rows(std::int64_t rows, std::int64_t width, const Body& body) {
  for_parts(rows, std::max<std::int64_t>(1, kGrainValues / std::max<std::int64_t>(1, width)), body);
}

template <class T>
void rms_norm_rows(const T* x, const T* weight, std::int64_t width, double eps, bool gemma, std::int64_t begin,
                   std::int64_t end, T* out) {
  constexpr std::int64_t kLanes = 16;  // independent sums, which the compiler can make vectors of
  for (std::int64_t row = begin; row < end; ++row) {
    const T* const from = x + row * width;
    T* const to = out + row * width;
    float lanes[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      for (std::int64_t l = 0; l < kLanes; ++l) {
        const auto value = static_cast<float>(from[i + l]);
        lanes[l] += value * value;
      }
    }
    float sum = 0;
    for (const float lane : lanes) sum += lane;
    for (; i < width; ++i) sum += static_cast<float>(from[i]) * static_cast<float>(from[i]);
    const float scale = 1.0F / std::sqrt(sum / static_cast<float>(width) + static_cast<float>(eps));
    for (std::int64_t j = 0; j < width; ++j) {
      const float scaled = static_cast<float>(from[j]) * scale;
      const auto by = static_cast<float>(weight[j]);
      to[j] = gemma ? static_cast<T>(scaled * (by + 1.0F))
                    : static_cast<T>(static_cast<float>(static_cast<T>(scaled)) * by);
    }
  }
}

// One part of a head: `half` pairs are turned, what is behind them passes.
template <class T>
void turn(const T* from, const float* cos, const float* sin, std::int64_t half, std::int64_t dim, T* to) {
  for (std::int64_t i = 0; i < half; ++i) {
    const auto first = static_cast<float>(from[i]), second = static_cast<float>(from[half + i]);
    to[i] = static_cast<T>(first * cos[i] - second * sin[i]);
    to[half + i] = static_cast<T>(second * cos[i] + first * sin[i]);
  }
  std::copy(from + 2 * half, from + dim, to + 2 * half);
}

// Calls body with a value of the tensor's type: float or bfloat16.
template <class Body>
void with_type(const at::Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == at::kFloat) {
    body(float{});
  } else {
    body(c10::BFloat16{});
  }
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool gemma) {
  if (takes_one_pass(x) && weight.scalar_type() == x.scalar_type() && weight.is_contiguous() &&
      !wants_grad({&x, &weight})) {
    at::Tensor out = at::empty_like(x);
    const std::int64_t width = x.size(-1), rows = width == 0 ? 0 : x.numel() / width;
    with_type(x, [&](auto type) {
      using T = decltype(type);
      const T* const from = x.const_data_ptr<T>();
      const T* const by = weight.const_data_ptr<T>();
      T* const to = out.mutable_data_ptr<T>();
      for_rows(rows, width, [&](std::int64_t begin, std::int64_t end) {
        rms_norm_rows(from, by, width, eps, gemma, begin, end, to);
      });
    });
    return out;
  }
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
  if (takes_one_pass(x) && !wants_grad({&x})) {
    at::Tensor out = at::empty_like(x);
    const float* const cos = table.cos.const_data_ptr<float>();
    const float* const sin = table.sin.const_data_ptr<float>();
    with_type(x, [&](auto type) {
      using T = decltype(type);
      const T* const from = x.const_data_ptr<T>();
      T* const to = out.mutable_data_ptr<T>();
      const std::int64_t parts = heads * tiles;
      for_rows(tokens, parts * dim, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t token = begin; token < end; ++token) {
          for (std::int64_t part = token * parts; part < (token + 1) * parts; ++part) {
            turn(from + part * dim, cos + token * half, sin + token * half, half, dim, to + part * dim);
          }
        }
      });
    });
    return out;
  }
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
