// SPDX-License-Identifier: Apache-2.0
// Memory that a kernel will want, asked for while it does something else. Tested through the operators.
#pragma once

#include <cstddef>
#include <cstdint>

namespace msa::cpu {

/// Memory that is wanted soon, asked for a few cache lines at a time between other work: a burst would wait for the 16
/// or so requests that a core can have on their way.
class PrefetchQueue {
 public:
  void clear() { count_ = at_ = lines_ = 0; }
  /// What has no room is not asked for.
  void push(const void* first, std::int64_t bytes) {
    if (count_ == kMostRuns || bytes <= 0) return;
    const auto offset = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(first) % kLine);
    const std::int64_t lines = (offset + bytes + kLine - 1) / kLine;
    runs_[count_++] = {static_cast<const char*>(first), lines};
    lines_ += lines;
  }
  /// Lines that have not been asked for.
  std::int64_t lines() const { return lines_; }
  void ask(std::int64_t lines) {
    lines = lines < lines_ ? lines : lines_;
    lines_ -= lines;
    while (lines > 0) {
      Run& run = runs_[at_];
      const std::int64_t here = lines < run.lines ? lines : run.lines;
      for (std::int64_t l = 0; l < here; ++l, run.first += kLine) __builtin_prefetch(run.first, 0, 2);  // to L2
      run.lines -= here;
      lines -= here;
      if (run.lines == 0) ++at_;
    }
  }

 private:
  static constexpr std::int64_t kLine = 64;
  static constexpr std::int64_t kMostRuns = 3 * 256;
  struct Run {
    const char* first;
    std::int64_t lines;
  };
  Run runs_[kMostRuns];
  std::int64_t count_ = 0;
  std::int64_t at_ = 0;  // the run that is asked for
  std::int64_t lines_ = 0;
};

}  // namespace msa::cpu
