// SPDX-License-Identifier: Apache-2.0
// Random numbers of the training code: the same on every machine and standard library, and a pure function of where
// they are drawn. A generator is made afresh from (seed, stream, index) at each step, so that resuming a run needs no
// generator state: step 57 draws what step 57 always draws. Tested in tests/unit/model_train.cc.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace msa::model {

/// SplitMix64 (Steele, Lea, Flood 2014): a counter put through a mixer; any start state is as good as another.
class Random {
 public:
  explicit Random(std::uint64_t seed, std::uint64_t stream = 0, std::uint64_t index = 0)
      : state_(mix(mix(mix(seed) + stream) + index)) {}

  std::uint64_t next() {
    state_ += 0x9e3779b97f4a7c15U;
    return mix(state_);
  }
  /// Uniform in [0, bound), bound >= 1; unbiased: draws from the incomplete last span are thrown away.
  std::int64_t below(std::int64_t bound) {
    const auto n = static_cast<std::uint64_t>(bound);
    const std::uint64_t limit = ~std::uint64_t{0} - (~std::uint64_t{0} % n + 1) % n;
    std::uint64_t value = next();
    while (value > limit) value = next();
    return static_cast<std::int64_t>(value % n);
  }
  /// Uniform in [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  template <class T>
  void shuffle(std::vector<T>& values) {
    for (std::size_t i = values.size(); i > 1; --i) {
      std::swap(values[i - 1], values[static_cast<std::size_t>(below(static_cast<std::int64_t>(i)))]);
    }
  }
  /// `count` distinct numbers of [0, n), ascending (all of them when count >= n). O(n).
  std::vector<std::int32_t> sample(std::int64_t n, std::int64_t count) {
    std::vector<std::int32_t> chosen;
    count = std::min(n, count);
    chosen.reserve(static_cast<std::size_t>(std::max<std::int64_t>(count, 0)));
    for (std::int64_t i = 0; i < n && count > 0; ++i) {  // each left is taken with probability needed / left
      if (below(n - i) < count) {
        chosen.push_back(static_cast<std::int32_t>(i));
        --count;
      }
    }
    return chosen;
  }

 private:
  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }
  std::uint64_t state_;
};

}  // namespace msa::model
