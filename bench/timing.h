// SPDX-License-Identifier: Apache-2.0
// How `msa bench` times: medians of repeated runs within a budget of time, so that a peer that takes half a minute is
// run once and an operator that takes a millisecond often enough.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

namespace msa::bench {

struct TimingLimits {
  int repeats = 5;             ///< timed runs at most
  double budget_seconds = 10;  ///< no further run once this much was spent on one thing
  std::function<bool()> should_stop;
};

/// Thrown between two runs when should_stop() says so.
struct Stopped {};

struct Timing {
  double seconds = 0;  ///< median
  int runs = 0;
};

inline double seconds_of(const std::function<void()>& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline double median(std::vector<double> times) {
  const auto middle = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2);
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

/// The first run warms up, and counts only when the budget allows no other.
inline Timing time_median(const TimingLimits& limits, const std::function<void()>& body) {
  const auto check_stop = [&] {
    if (limits.should_stop && limits.should_stop()) throw Stopped();
  };
  check_stop();
  std::vector<double> times;
  const double first = seconds_of(body);
  double spent = first;
  while (static_cast<int>(times.size()) < limits.repeats && spent + first <= limits.budget_seconds) {
    check_stop();
    times.push_back(seconds_of(body));
    spent += times.back();
  }
  if (times.empty()) times.push_back(first);
  return {median(times), static_cast<int>(times.size())};
}

}  // namespace msa::bench
