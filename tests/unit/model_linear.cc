// SPDX-License-Identifier: Apache-2.0
// Products of a few rows against float64, in both types, with shapes that leave remainders; and that a row's result
// depends on neither its neighbours nor the threads.
#include "src/model/linear.h"

#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

namespace msa::model {
namespace {

TEST(Linear, FewRowsEqualTheExactProduct) {
  const c10::NoGradGuard no_grad;
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    for (const std::int64_t in : {1, 31, 32, 97, 576}) {
      for (const std::int64_t rows : {1, 2, 3, 4, 5}) {
        const at::Tensor x = at::randn({rows, in}).to(type);
        const at::Tensor a = at::randn({37, in}).to(type), b = at::randn({300, in}).to(type);
        const at::Tensor bias = at::randn({300}).to(type);
        const Linear first{&a, nullptr}, second{&b, &bias};
        const auto results = apply_layers(x, std::array<const Linear*, 3>{&first, nullptr, &second});
        EXPECT_FALSE(results[1].defined());
        // An exact product rounded once to the type, and n roundings of float32 (at worst) of the sum of magnitudes.
        const double once = type == at::kFloat ? 6e-8 : 4e-3;
        const auto check = [&](const at::Tensor& actual, const at::Tensor& weight, const at::Tensor& add) {
          ASSERT_EQ(actual.scalar_type(), type);
          const at::Tensor exact = at::linear(x.to(at::kDouble), weight.to(at::kDouble), add.to(at::kDouble));
          const at::Tensor size =
              at::linear(x.to(at::kDouble).abs(), weight.to(at::kDouble).abs(), add.to(at::kDouble).abs());
          const at::Tensor bound = once * exact.abs() + 6e-8 * static_cast<double>(in) * size;
          EXPECT_TRUE(((actual.to(at::kDouble) - exact).abs() <= bound).all().item<bool>())
              << type << " " << in << " " << rows;
        };
        check(results[0], a, at::zeros({37}));
        check(results[2], b, bias);
      }
    }
  }
}

TEST(Linear, ARowDependsOnNothingElse) {
  const c10::NoGradGuard no_grad;
  const int before = at::get_num_threads();
  const at::Tensor x = at::randn({4, 200}), weight = at::randn({1000, 200});
  const Linear layer{&weight, nullptr};
  const at::Tensor together = layer(x);
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    for (std::int64_t row = 0; row < 4; ++row) {
      EXPECT_TRUE(at::equal(layer(x.narrow(0, row, 1))[0], together[row])) << threads << " " << row;
    }
  }
  at::set_num_threads(before);
}

TEST(Linear, GradientsAreLeftToTorch) {
  const at::Tensor x = at::randn({2, 40});
  at::Tensor weight = at::randn({7, 40});
  weight.requires_grad_(true);
  const Linear layer{&weight, nullptr};
  layer(x).sum().backward();
  EXPECT_TRUE(at::allclose(weight.grad(), x.sum(0).expand({7, 40})));
}

}  // namespace
}  // namespace msa::model
