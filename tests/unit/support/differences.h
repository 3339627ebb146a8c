// SPDX-License-Identifier: Apache-2.0
// Central finite differences, with an error bar of their own: the truncation error is estimated from two step widths,
// the rounding error is that of the float32 outputs that the loss is summed from.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>

#include "tests/unit/support/problem.h"

namespace msa::testing {

/// A loss and a bound on its rounding error.
struct Loss {
  double value = 0;
  double rounding = 0;
};

/// sum(out * dout) + sum(lse * dlse): the loss whose gradients in out and lse are dout and dlse.
inline Loss weigh_outputs(const AttentionResult& result, const Tensor& dout, const Tensor& dlse) {
  Loss loss;
  const auto add = [&](const Tensor& values, const Tensor& weights) {
    const auto value = values.values();
    const auto weight = weights.values();
    for (std::size_t i = 0; i < value.size(); ++i) {
      loss.value += value[i] * weight[i];
      loss.rounding += std::abs(value[i] * weight[i]) * 0x1p-24;
    }
  };
  add(result.out, dout);
  add(result.lse, dlse);
  return loss;
}

/// Checks `gradient` against the differences of `loss` in a sample of the elements of `input`, which `loss` reads.
inline void expect_gradient_of(const std::function<Loss()>& loss, Tensor& input, const Tensor& gradient,
                               const std::string& what) {
  // A step of 2^-6 balances the two errors: about step^2 = 2^-12 of a third derivative against 2^-24 / step = 2^-18.
  const double step = 0x1p-6;
  const std::int64_t dims = input.shape().size() == 3 ? input.size(2) : 1;
  const std::int64_t count = input.elements();
  const std::int64_t stride = count / 41 + 1;  // some forty elements, from all rows and columns
  for (std::int64_t at = 0; at < count; at += stride) {
    const std::int64_t k = at % dims;
    const std::int64_t j = at / dims % input.size(1);
    const std::int64_t i = at / dims / input.size(1);
    const double value = input.at(i, j, k);
    double rounding = 0;
    const auto difference = [&](double h) {
      input.set(value + h, i, j, k);
      const double up = input.at(i, j, k);
      const Loss above = loss();
      input.set(value - h, i, j, k);
      const double down = input.at(i, j, k);
      const Loss below = loss();
      rounding = (above.rounding + below.rounding) / (up - down);
      return (above.value - below.value) / (up - down);
    };
    const double coarse = difference(2 * step);
    const double fine = difference(step);
    input.set(value, i, j, k);
    // The error of `fine` is about (coarse - fine) / 3; the whole of it leaves room for the next term of the series.
    EXPECT_NEAR(gradient.at(i, j, k), fine, std::abs(coarse - fine) + 2 * rounding)
        << what << "[" << i << ", " << j << ", " << k << "]";
  }
}

}  // namespace msa::testing
