// SPDX-License-Identifier: Apache-2.0
// Linear layers. Long inputs and everything that needs a gradient are torch's GEMM. A pass of a few tokens (decode) is
// bound by reading the weights once, and what surrounds that reading is what can be saved: several layers of the same
// input share one parallel region, weights are read in the type they are stored in, the next ones are fetched ahead,
// and the sums are float32. Tested in tests/unit/model_linear.cc.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <span>

namespace msa::model {

/// y = x W^T + b. Does not own its parameters; a layer that the model does not have has no weight.
struct Linear {
  const at::Tensor* weight = nullptr;  ///< [out, in]
  const at::Tensor* bias = nullptr;    ///< [out], or null

  at::Tensor operator()(const at::Tensor& x) const;
};

/// Rows of x up to which a product is bound by reading the weights: above, GEMM reuses them from its caches.
inline constexpr std::int64_t kFewRows = 4;

/// Whether autograd would record an operation on these (undefined ones do not count).
bool wants_grad(std::initializer_list<const at::Tensor*> tensors);

/// Calls body(begin, end) on parts of [0, count) of at least `grain` items, by as many threads as torch has.
void for_parts(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& body);

/// outputs[i] = layers[i](x). x [T, in]; null layers are left out.
void apply_layers(const at::Tensor& x, std::span<const Linear* const> layers, std::span<at::Tensor> outputs);

template <std::size_t N>
std::array<at::Tensor, N> apply_layers(const at::Tensor& x, const std::array<const Linear*, N>& layers) {
  std::array<at::Tensor, N> outputs;
  apply_layers(x, layers, outputs);
  return outputs;
}

}  // namespace msa::model
