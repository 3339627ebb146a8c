// SPDX-License-Identifier: Apache-2.0
// See screen_switch.h.
#include "src/core/screen_switch.h"

#include <cstdlib>
#include <string>

#include "msa/error.h"

namespace msa::core {

ScreenSwitch screen_switch() {
  const char* value = std::getenv("MSA_SCREEN");
  const std::string wanted = value == nullptr ? "" : value;
  if (wanted.empty()) return ScreenSwitch::kAuto;
  if (wanted == "0") return ScreenSwitch::kNever;
  if (wanted == "1") return ScreenSwitch::kAlways;
  throw Error("MSA_SCREEN: \"" + wanted + "\" is neither 0 (never screen) nor 1 (always screen)");
}

}  // namespace msa::core
