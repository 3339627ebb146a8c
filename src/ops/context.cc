// SPDX-License-Identifier: Apache-2.0
// Backends and instruction sets by name. Tested in tests/unit/validate_test.cc.
#include "msa/context.h"

#include "msa/error.h"
#include "src/cpu/instruction_set.h"

namespace msa {

const char* backend_name(Backend backend) {
  switch (backend) {
    case Backend::kAuto: return "auto";
    case Backend::kReference: return "reference";
    case Backend::kCpu: return "cpu";
    case Backend::kCuda: return "cuda";
  }
  return "unknown";
}

Backend parse_backend(const std::string& name) {
  for (const Backend backend : {Backend::kAuto, Backend::kReference, Backend::kCpu, Backend::kCuda}) {
    if (name == backend_name(backend)) return backend;
  }
  throw Error("backend: '" + name + "' is unknown; the choices are auto, reference, cpu, cuda");
}

std::vector<std::string> supported_instruction_sets() { return cpu::supported_instruction_sets(); }
std::string active_instruction_set() { return cpu::active_instruction_set(); }
void force_instruction_set(const std::string& name) { cpu::force_instruction_set(name); }

const char* version() { return MSA_VERSION; }

}  // namespace msa
