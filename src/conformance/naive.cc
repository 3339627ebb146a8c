// SPDX-License-Identifier: Apache-2.0
// See naive.h.
#include "src/conformance/naive.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "src/core/float_convert.h"

namespace msa::conformance {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

float dot(const float* a, const float* b, std::int64_t n) {
  float sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

class NaiveRun {
 public:
  explicit NaiveRun(const NaiveInputs& in) : in_(in) {
    const std::int64_t tq = in.queries(), tk = in.keys();
    result_.out.assign(at(tq * in.query_heads * in.value_dim), 0.0f);
    result_.lse.assign(at(tq * in.query_heads), -std::numeric_limits<float>::infinity());
    result_.dq.assign(in.q.size(), 0.0f);
    result_.dk.assign(at(tk * in.kv_heads * in.head_dim), 0.0f);
    result_.dv.assign(at(tk * in.kv_heads * in.value_dim), 0.0f);
    result_.dq_idx.assign(in.q_idx.size(), 0.0f);
    result_.dk_idx.assign(in.k_idx.size(), 0.0f);
    rows_ = std::max<std::int64_t>(1, tq * in.kv_heads);
  }

  NaiveOutputs run() {
    for (std::size_t s = 0; s + 1 < in_.cu_seqlens_q.size(); ++s) {
      const std::int64_t begin = in_.cu_seqlens_q[s], queries = in_.cu_seqlens_q[s + 1] - begin;
      const std::int64_t key_begin = in_.cu_seqlens_k[s], keys = in_.cu_seqlens_k[s + 1] - key_begin;
      for (std::int64_t i = 0; i < queries; ++i) {
        for (std::int64_t group = 0; group < in_.kv_heads; ++group) {
          row(begin + i, group, key_begin, support(begin + i, group, keys - queries + i));
        }
      }
    }
    for (auto* values : {&result_.dq, &result_.dk, &result_.dv, &result_.dq_idx, &result_.dk_idx}) {
      for (float& value : *values) value = rounded(value);
    }
    result_.kl = static_cast<float>(kl_sum_ / static_cast<double>(rows_));
    return std::move(result_);
  }

 private:
  float rounded(float value) const { return round_to(in_.dtype, value); }

  std::vector<std::int64_t> support(std::int64_t row, std::int64_t group, std::int64_t position) const {
    std::vector<std::int64_t> tokens;
    if (in_.blocks.empty()) {
      for (std::int64_t j = 0; j <= position; ++j) tokens.push_back(j);
      return tokens;
    }
    for (std::int64_t slot = 0; slot < in_.topk; ++slot) {
      const std::int64_t block = in_.blocks[at((group * in_.queries() + row) * in_.topk + slot)];
      if (block < 0) break;
      const std::int64_t end = std::min((block + 1) * in_.block_size, position + 1);
      for (std::int64_t j = block * in_.block_size; j < end; ++j) tokens.push_back(j);
    }
    return tokens;
  }

  // Softmax in float over scores rounded to storage; returns probabilities before their own rounding.
  std::vector<float> softmax(std::vector<float>& scores, float& lse) const {
    float top = -std::numeric_limits<float>::infinity();
    for (float& s : scores) top = std::max(top, s = rounded(s));
    float sum = 0;
    std::vector<float> p(scores.size());
    for (std::size_t j = 0; j < p.size(); ++j) sum += p[j] = std::exp(scores[j] - top);
    for (float& value : p) value /= sum;
    lse = top + std::log(sum);
    return p;
  }

  void row(std::int64_t row, std::int64_t group, std::int64_t key_begin, const std::vector<std::int64_t>& tokens) {
    if (tokens.empty()) return;
    const std::int64_t group_size = in_.query_heads / in_.kv_heads;
    const float scale = 1.0f / std::sqrt(static_cast<float>(in_.head_dim));
    const auto key = [&](std::size_t j, std::int64_t dim) {
      return at(((key_begin + tokens[j]) * in_.kv_heads + group) * dim);
    };
    std::vector<float> teacher(tokens.size(), 0.0f), scores(tokens.size());
    for (std::int64_t h = group * group_size; h < (group + 1) * group_size; ++h) {
      const std::size_t head = at(row * in_.query_heads + h);
      const float* q = in_.q.data() + head * at(in_.head_dim);
      const float* dout = in_.dout.data() + head * at(in_.value_dim);
      float* out = result_.out.data() + head * at(in_.value_dim);
      for (std::size_t j = 0; j < tokens.size(); ++j) {
        scores[j] = scale * dot(q, in_.k.data() + key(j, in_.head_dim), in_.head_dim);
      }
      const std::vector<float> p = softmax(scores, result_.lse[head]);
      for (std::size_t j = 0; j < tokens.size(); ++j) {
        teacher[j] += rounded(p[j]) / static_cast<float>(group_size);
        for (std::int64_t d = 0; d < in_.value_dim; ++d) out[d] += rounded(p[j]) * in_.v[key(j, in_.value_dim) + at(d)];
      }
      for (std::int64_t d = 0; d < in_.value_dim; ++d) out[d] = rounded(out[d]);
      const float delta = dot(dout, out, in_.value_dim);
      for (std::size_t j = 0; j < tokens.size(); ++j) {
        const float dp = rounded(dot(dout, in_.v.data() + key(j, in_.value_dim), in_.value_dim));
        const float ds = rounded(rounded(p[j]) * (dp - delta + in_.dlse[head]));
        for (std::int64_t d = 0; d < in_.head_dim; ++d) {
          result_.dq[head * at(in_.head_dim) + at(d)] += scale * ds * in_.k[key(j, in_.head_dim) + at(d)];
          result_.dk[key(j, in_.head_dim) + at(d)] += scale * ds * q[d];
        }
        for (std::int64_t d = 0; d < in_.value_dim; ++d)
          result_.dv[key(j, in_.value_dim) + at(d)] += rounded(p[j]) * dout[d];
      }
    }
    index_row(row, group, key_begin, tokens, teacher);
  }

  void index_row(std::int64_t row, std::int64_t group, std::int64_t key_begin, const std::vector<std::int64_t>& tokens,
                 const std::vector<float>& teacher) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(in_.index_dim));
    const std::size_t q_at = at((row * in_.kv_heads + group) * in_.index_dim);
    std::vector<float> scores(tokens.size());
    for (std::size_t j = 0; j < tokens.size(); ++j) {
      scores[j] = scale * dot(in_.q_idx.data() + q_at, in_.k_idx.data() + at((key_begin + tokens[j]) * in_.index_dim),
                              in_.index_dim);
    }
    float lse = 0;
    const std::vector<float> student = softmax(scores, lse);
    for (std::size_t j = 0; j < tokens.size(); ++j) {
      const float p = rounded(teacher[j]);
      if (p > 0) kl_sum_ += static_cast<double>(p) * (std::log(p) - (scores[j] - lse));
      const float dlogit = scale * rounded((rounded(student[j]) - p) / static_cast<float>(rows_));
      const std::size_t k_at = at((key_begin + tokens[j]) * in_.index_dim);
      for (std::int64_t d = 0; d < in_.index_dim; ++d) {
        result_.dq_idx[q_at + at(d)] += dlogit * in_.k_idx[k_at + at(d)];
        result_.dk_idx[k_at + at(d)] += dlogit * in_.q_idx[q_at + at(d)];
      }
    }
  }

  const NaiveInputs& in_;
  NaiveOutputs result_;
  std::int64_t rows_ = 1;
  double kl_sum_ = 0;
};

}  // namespace

float round_to(DType dtype, float value) {
  switch (dtype) {
    case DType::kBFloat16: return core::bf16_to_float(core::float_to_bf16(value));
    case DType::kFloat16: return core::f16_to_float(core::float_to_f16(value));
    default: return value;
  }
}

NaiveOutputs run_naive(const NaiveInputs& inputs) { return NaiveRun(inputs).run(); }

}  // namespace msa::conformance
