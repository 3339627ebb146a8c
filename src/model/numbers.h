// SPDX-License-Identifier: Apache-2.0
// What training and evaluation both compute with: means that leave out what could not be measured (a NaN), and the
// small int32 tensors that say where sequences lie. Tested through both in tests/unit/model_train.cc.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

namespace msa::model {

inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// Of the values that are no NaN; NaN when there is none.
inline double mean_of(const std::vector<double>& values) {
  double sum = 0;
  std::int64_t count = 0;
  for (const double value : values) {
    if (!std::isnan(value)) sum += value, ++count;
  }
  return count == 0 ? kNan : sum / static_cast<double>(count);
}

inline at::Tensor int32_tensor(std::initializer_list<std::int64_t> values) {
  return at::tensor(at::ArrayRef<std::int64_t>(values), at::kInt);
}

}  // namespace msa::model
