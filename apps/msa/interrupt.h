// SPDX-License-Identifier: Apache-2.0
// Ctrl-C in subcommands that run for long: the first one asks them to come to an end in good order, a second one ends
// the program at once. Tested in tests/python/test_generate.py and tests/python/test_train.py.
#pragma once

#include <csignal>

namespace msa::app {

/// Exit status of a program that an interrupt ended, as shells report it: 128 + SIGINT.
inline constexpr int kInterruptedStatus = 128 + SIGINT;

/// While it lives, an interrupt is a request. One at a time.
class InterruptGuard {
 public:
  InterruptGuard() {
    requested_ = 0;
    previous_ = std::signal(SIGINT, [](int) {
      requested_ = 1;
      std::signal(SIGINT, SIG_DFL);
    });
  }
  ~InterruptGuard() { std::signal(SIGINT, previous_); }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

  /// Whether the end was asked for since the last guard was made.
  static bool requested() { return requested_ != 0; }

 private:
  static inline volatile std::sig_atomic_t requested_ = 0;
  void (*previous_)(int) = SIG_DFL;
};

}  // namespace msa::app
