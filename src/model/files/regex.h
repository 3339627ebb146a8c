// SPDX-License-Identifier: Apache-2.0
// The regular expressions of tokenizer.json. They are written for Oniguruma (Ruby's dialect); PCRE2 runs them, after a
// translation of the few classes on which the two disagree. Every search has a bounded number of steps, so a hostile
// pattern ends in an error and not in a hang. Tested in tests/unit/files_regex_test.cc.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace msa::files {

class Regex {
 public:
  /// Compiles an Oniguruma pattern. Throws msa::Error, naming `origin`, on a syntax error or on one of the constructs
  /// that PCRE2 would read differently (nested or intersected classes, {n,m}+, multi-line flags).
  static Regex compile(std::string_view pattern, const std::string& origin);
  /// A pattern that matches exactly `text`.
  static Regex literal(std::string_view text, const std::string& origin);

  using Visit = std::function<void(std::size_t begin, std::size_t end)>;
  /// Calls visit for each match in `text` (valid UTF-8, below 2 GiB), left to right, none overlapping; an empty match
  /// is skipped where the one before it ended. Throws msa::Error when the steps allowed for a text of this length are
  /// used up. Safe to call from several threads.
  void for_each_match(std::string_view text, const Visit& visit) const;
  /// Whether a match starts at byte `position`, a character boundary.
  bool matches_at(std::string_view text, std::size_t position) const;

 private:
  struct State;
  explicit Regex(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  static Regex compile_pcre(const std::string& pattern, const std::string& origin);
  std::shared_ptr<const State> state_;
};

}  // namespace msa::files
