// SPDX-License-Identifier: Apache-2.0
// Everything an operator can run on here: the reference, and the cpu backend once for each instruction set of this
// machine, or the emulated GPU in the program that is linked with one. A test loops over them with for_each_target(),
// so that what it expects is worked out once.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "msa/context.h"

namespace msa::testing {

struct Target {
  std::string name;
  Context context;
  std::string instruction_set;  ///< empty: not forced (reference)
};

enum class Targets {
  kAll,
  kCpu,  ///< all but the reference, where that is what is compared with
};

/// Set before main() by what takes the cpu backend's place, if anything does.
inline std::function<std::vector<Target>()>& device_targets() {
  static std::function<std::vector<Target>()> targets;
  return targets;
}

/// Whether the kernels run in an emulator: tests of how work is cut for threads, and long ones, leave it out.
inline bool emulates_device() { return device_targets() != nullptr; }

inline Context reference_context() {
  Context context;
  context.threads = 1;
  context.backend = Backend::kReference;
  return context;
}

inline std::vector<Target> list_targets(Targets which) {
  std::vector<Target> targets;
  if (which == Targets::kAll) targets.push_back({"reference", reference_context(), ""});
  if (device_targets()) {
    for (const Target& target : device_targets()()) targets.push_back(target);
    return targets;
  }
  Context context;
  context.threads = 2;
  context.backend = Backend::kCpu;
  for (const std::string& set : supported_instruction_sets()) targets.push_back({"cpu/" + set, context, set});
  return targets;
}

/// Forces a target's instruction set for as long as it lives.
class ForcedTarget {
 public:
  explicit ForcedTarget(const Target& target) { force_instruction_set(target.instruction_set); }
  ~ForcedTarget() { force_instruction_set(""); }
  ForcedTarget(const ForcedTarget&) = delete;
  ForcedTarget& operator=(const ForcedTarget&) = delete;
};

template <class Body>
void for_each_target(Targets which, const Body& body) {
  for (const Target& target : list_targets(which)) {
    SCOPED_TRACE(target.name);
    const ForcedTarget forced(target);
    body(target.context);
  }
}

}  // namespace msa::testing
