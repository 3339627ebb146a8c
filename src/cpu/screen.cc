// SPDX-License-Identifier: Apache-2.0
// See screen.h: the switch.
#include "src/cpu/screen.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "msa/error.h"

namespace msa::cpu {
namespace {

std::atomic<Screening> forced{Screening::kAuto};

Screening read_environment() {
  const char* value = std::getenv("MSA_SCREEN");
  const std::string wanted = value == nullptr ? "" : value;
  if (wanted.empty()) return Screening::kAuto;
  if (wanted == "0") return Screening::kNever;
  if (wanted == "1") return Screening::kAlways;
  throw Error("MSA_SCREEN: \"" + wanted + "\" is neither 0 (never screen) nor 1 (always screen)");
}

}  // namespace

void force_screening(Screening screening) { forced.store(screening, std::memory_order_relaxed); }

Screening active_screening() {
  const Screening now = forced.load(std::memory_order_relaxed);
  if (now != Screening::kAuto) return now;
  static const Screening from_environment = read_environment();
  return from_environment;
}

}  // namespace msa::cpu
