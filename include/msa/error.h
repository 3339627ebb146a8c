// SPDX-License-Identifier: Apache-2.0
// The one exception type of the library. Every entry point reports bad input and exhausted limits by throwing it; the
// message names the argument, what it was, and the rule it broke. Tested wherever an error is provoked.
#pragma once

#include <stdexcept>
#include <string>

namespace msa {

class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& what) : std::runtime_error(what) {}
};

}  // namespace msa
