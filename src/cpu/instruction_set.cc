// SPDX-License-Identifier: Apache-2.0
// See instruction_set.h. Highway keeps one dispatch mask a process; choosing a set means leaving a single bit in it.
// Two sets more stand before AVX-512: the same vector code, with the dot products of narrow types that some machines
// add. Tested in tests/unit/instruction_set_test.cc.
#include "src/cpu/instruction_set.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>

#include "msa/error.h"
#include "src/cpu/dot_products.h"
#include "src/cpu/targets_mask.h"

namespace msa::cpu {
namespace {

struct InstructionSet {
  std::string name;
  std::int64_t target = 0;  // Highway's
  DotProducts dots = DotProducts::kNone;
};

std::string name_of(std::int64_t target) {
  switch (target) {
#if HWY_ARCH_X86
    case HWY_SSE4: return "sse4";
    case HWY_AVX2: return "avx2";
    case HWY_AVX3: return "avx512";
#endif
#if HWY_ARCH_ARM
    case HWY_NEON: return "neon";
#endif
    default: return "portable";
  }
}

// Sets that are both compiled in and on this machine, best first: Highway gives better sets lower bits.
const std::vector<InstructionSet>& usable_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
    for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
#if HWY_ARCH_X86
      if (target == HWY_AVX3) {
        const DotProducts dots = detect_dot_products();
        if (dots == DotProducts::kAmx) found.push_back({"amx", target, DotProducts::kAmx});
        const auto place = found.end() - found.begin();
        if (dots != DotProducts::kNone) found.push_back({"avx512_vnni", target, DotProducts::kVnni});
        if (dots >= DotProducts::kAvx512) {
          found.insert(bf16_dots_are_fast() ? found.begin() + place : found.end(),
                       {"avx512_bf16", target, DotProducts::kAvx512});
        }
      }
#endif
      found.push_back({name_of(target), target, DotProducts::kNone});
    }
    return found;
  }();
  if (sets.empty()) {
    throw Error("this machine has none of the instruction sets the cpu backend was built for (the least is " +
                name_of(HWY_STATIC_TARGET) + "); use the reference backend");
  }
  return sets;
}

const InstructionSet& find_set(const std::string& name, const std::string& who) {
  std::string choices;
  for (const InstructionSet& set : usable_sets()) {
    if (set.name == name) return set;
    choices += choices.empty() ? "" : ", ";
    choices += set.name;
  }
  throw Error(who + ": instruction set \"" + name + "\" is not available on this machine; choices: " + choices);
}

const InstructionSet& default_set() {
  const char* wanted = std::getenv("MSA_ISA");
  if (wanted == nullptr || *wanted == '\0') return usable_sets().front();
  return find_set(wanted, "MSA_ISA");
}

std::atomic<const InstructionSet*> active{nullptr};  // null: not chosen yet
std::mutex choosing;

void choose(const InstructionSet& set) {
  hwy::GetChosenTarget().Update(set.target);
  active.store(&set, std::memory_order_release);
}

}  // namespace

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : usable_sets()) names.push_back(set.name);
  return names;
}

void ensure_instruction_set() {
  if (active.load(std::memory_order_acquire) != nullptr) return;
  const std::lock_guard<std::mutex> lock(choosing);
  if (active.load(std::memory_order_relaxed) == nullptr) choose(default_set());
}

std::string active_instruction_set() {
  ensure_instruction_set();
  return active.load(std::memory_order_acquire)->name;
}

DotProducts active_dot_products() {
  ensure_instruction_set();
  return active.load(std::memory_order_acquire)->dots;
}

void force_instruction_set(const std::string& name) {
  const std::lock_guard<std::mutex> lock(choosing);
  choose(name.empty() ? default_set() : find_set(name, "force_instruction_set"));
}

}  // namespace msa::cpu
