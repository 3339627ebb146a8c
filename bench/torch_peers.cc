// SPDX-License-Identifier: Apache-2.0
// See torch_peers.h.
#include "bench/torch_peers.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <functional>
#include <optional>
#include <vector>

namespace msa::bench {
namespace {

using Way = std::function<void()>;

// Each way runs once to find the fastest, which is then timed.
Timing time_fastest(const TimingLimits& limits, const std::vector<Way>& ways) {
  if (ways.size() == 1) return time_median(limits, ways[0]);
  const Way* fastest = nullptr;
  double least = 0;
  for (const Way& way : ways) {
    if (limits.should_stop && limits.should_stop()) throw Stopped();
    double seconds = seconds_of(way);
    // The first call of a kind sets things up; where it is short, that shows.
    if (seconds < limits.budget_seconds / 20) seconds = seconds_of(way);
    if (fastest == nullptr || seconds < least) fastest = &way, least = seconds;
  }
  if (2 * least > limits.budget_seconds) return {least, 1};
  return time_median(limits, *fastest);
}

class Attention {
 public:
  explicit Attention(const AttentionTensors& tensors)
      : queries_(tensors.q.size(0)),
        context_(tensors.k.size(0)),
        kv_heads_(tensors.k.size(1)),
        group_(tensors.q.size(1) / kv_heads_),
        q_(tensors.q),
        k_(tensors.k.transpose(0, 1).contiguous()),
        v_(tensors.v.transpose(0, 1).contiguous()) {
    if (queries_ < context_ && queries_ > 1 && queries_ * 8 > context_) {
      const at::Tensor positions = at::arange(context_ - queries_, context_).unsqueeze(1);
      mask_ = at::arange(context_).unsqueeze(0).le(positions);
    }
  }

  void require_gradients() {
    q_ = q_.detach().clone().requires_grad_();
    k_ = k_.detach().clone().requires_grad_();
    v_ = v_.detach().clone().requires_grad_();
  }
  void drop_gradients() {
    for (at::Tensor* tensor : {&q_, &k_, &v_}) tensor->mutable_grad().reset();
  }

  bool is_square() const { return queries_ == context_; }
  bool has_mask() const { return mask_.has_value(); }

  /// [kv_heads, group, queries, head_dim]
  at::Tensor by_heads() const {
    const at::Tensor q = q_.view({queries_, kv_heads_, group_, q_.size(2)}).permute({1, 2, 0, 3});
    const auto shared = [&](const at::Tensor& keys) {
      return keys.unsqueeze(1).expand({kv_heads_, group_, context_, keys.size(2)});
    };
    return at::scaled_dot_product_attention(q, shared(k_), shared(v_), mask_, 0.0, is_square() && queries_ > 1);
  }
  /// [kv_heads, 1, group * queries, head_dim]; without mask only
  at::Tensor by_groups() const {
    const at::Tensor q = q_.view({queries_, kv_heads_, group_, q_.size(2)})
                             .permute({1, 2, 0, 3})
                             .reshape({kv_heads_, 1, group_ * queries_, q_.size(2)});
    return at::scaled_dot_product_attention(q, k_.unsqueeze(1), v_.unsqueeze(1));
  }

  std::vector<std::function<at::Tensor()>> ways() const {
    std::vector<std::function<at::Tensor()>> ways = {[this] { return by_heads(); }};
    if (!has_mask() && (!is_square() || queries_ == 1) && group_ > 1) ways.emplace_back([this] { return by_groups(); });
    return ways;
  }

 private:
  std::int64_t queries_, context_, kv_heads_, group_;
  at::Tensor q_, k_, v_;
  std::optional<at::Tensor> mask_;
};

}  // namespace

Timing time_torch_attention(const TimingLimits& limits, const AttentionTensors& tensors) {
  const at::NoGradGuard no_grad;
  const Attention attention(tensors);
  std::vector<Way> ways;
  for (const auto& way : attention.ways()) ways.emplace_back([way] { way(); });
  return time_fastest(limits, ways);
}

Timing time_torch_attention_backward(const TimingLimits& limits, const AttentionTensors& tensors) {
  const at::AutoGradMode with_grad(true);
  Attention attention(tensors);
  attention.require_gradients();
  std::vector<Way> ways;
  for (const auto& way : attention.ways()) {
    ways.emplace_back([&attention, way] {
      const at::Tensor out = way();
      out.backward(at::ones_like(out));
      attention.drop_gradients();
    });
  }
  return time_fastest(limits, ways);
}

Timing time_torch_topk(const TimingLimits& limits, const at::Tensor& scores, std::int64_t topk) {
  const at::NoGradGuard no_grad;
  return time_fastest(
      limits, {[&] { at::topk(scores, topk, 1, true, true); }, [&] { at::topk(scores, topk, 1, true, false); }});
}

}  // namespace msa::bench
