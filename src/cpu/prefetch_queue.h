// SPDX-License-Identifier: Apache-2.0
// Memory that a kernel will want, asked for while it does something else. Tested through the operators.
#pragma once

#include <cstdint>

namespace msa::cpu {

/// Memory that is wanted soon, asked for a few cache lines at a time between other work: a burst would wait for the 16
/// or so requests that a core can have on their way.
class PrefetchQueue {
 public:
  void clear() { count_ = next_ = 0; }
  /// What has no room is not asked for.
  void push(const void* first, std::int64_t bytes) {
    if (count_ < kMost) ranges_[count_++] = {static_cast<const char*>(first), static_cast<const char*>(first) + bytes};
  }
  void ask(std::int64_t lines) {
    for (; lines > 0 && next_ < count_; --lines) {
      Range& range = ranges_[next_];
      __builtin_prefetch(range.first, 0, 2);  // into the second level
      range.first += 128;
      if (range.first >= range.last) ++next_;
    }
  }

 private:
  static constexpr std::int64_t kMost = 3 * 256;
  struct Range {
    const char* first;
    const char* last;
  };
  Range ranges_[kMost];
  std::int64_t count_ = 0;
  std::int64_t next_ = 0;
};

}  // namespace msa::cpu
