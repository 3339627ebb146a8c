// SPDX-License-Identifier: Apache-2.0
// See instruction_set.h. Highway keeps one dispatch mask a process; choosing a set means leaving a single bit in it.
// Tested in tests/unit/instruction_set_test.cc.
#include "src/cpu/instruction_set.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>

#include "msa/error.h"
#include "src/cpu/targets_mask.h"

namespace msa::cpu {
namespace {

std::string name_of(std::int64_t target) {
  switch (target) {
#if HWY_ARCH_X86
    case HWY_SSE4:
      return "sse4";
    case HWY_AVX2:
      return "avx2";
    case HWY_AVX3:
      return "avx512";
#endif
#if HWY_ARCH_ARM
    case HWY_NEON:
      return "neon";
#endif
    default:
      return "portable";
  }
}

// Sets that are both compiled in and on this machine, best first: Highway gives better sets lower bits.
std::vector<std::int64_t> usable_targets() {
  std::vector<std::int64_t> targets = hwy::SupportedAndGeneratedTargets();
  if (targets.empty()) {
    throw Error("this machine has none of the instruction sets the cpu backend was built for (the least is " +
                name_of(HWY_STATIC_TARGET) + "); use the reference backend");
  }
  return targets;
}

std::int64_t find_target(const std::string& name, const std::string& who) {
  std::string choices;
  for (const std::int64_t target : usable_targets()) {
    if (name_of(target) == name) return target;
    choices += choices.empty() ? "" : ", ";
    choices += name_of(target);
  }
  throw Error(who + ": instruction set \"" + name + "\" is not available on this machine; choices: " + choices);
}

std::int64_t default_target() {
  const char* wanted = std::getenv("MSA_ISA");
  if (wanted == nullptr || *wanted == '\0') return usable_targets().front();
  return find_target(wanted, "MSA_ISA");
}

std::atomic<std::int64_t> active{0};  // 0: not chosen yet
std::mutex choosing;

void choose(std::int64_t target) {
  hwy::GetChosenTarget().Update(target);
  active.store(target, std::memory_order_release);
}

}  // namespace

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  for (const std::int64_t target : usable_targets()) names.push_back(name_of(target));
  return names;
}

void ensure_instruction_set() {
  if (active.load(std::memory_order_acquire) != 0) return;
  const std::lock_guard<std::mutex> lock(choosing);
  if (active.load(std::memory_order_relaxed) == 0) choose(default_target());
}

std::string active_instruction_set() {
  ensure_instruction_set();
  return name_of(active.load(std::memory_order_acquire));
}

void force_instruction_set(const std::string& name) {
  const std::lock_guard<std::mutex> lock(choosing);
  choose(name.empty() ? default_target() : find_target(name, "force_instruction_set"));
}

}  // namespace msa::cpu
