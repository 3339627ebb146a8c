// SPDX-License-Identifier: Apache-2.0
// What a call runs on: backend, thread count and a limit on scratch memory. A context is a plain value and every
// operator takes one; the library keeps no other state between calls.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace msa {

enum class Backend {
  kAuto,       ///< the fastest one that takes the tensors: today always kCpu
  kReference,  ///< scalar fp64, the executable specification; slow
  kCpu,        ///< vector code, instruction set chosen at run time
};

const char* backend_name(Backend backend);
/// "auto", "reference" or "cpu"; throws msa::Error on anything else, naming the choices.
Backend parse_backend(const std::string& name);

struct Context {
  Backend backend = Backend::kAuto;
  /// Worker threads of a call; 0 means one for each hardware thread. Results do not depend on it.
  int threads = 0;
  /// Most bytes of scratch memory a call may take, inputs and outputs apart; 0 means no limit. A plan that cannot be
  /// cut down to it makes the call throw msa::Error with the bytes it needs.
  std::size_t workspace_limit = 0;
};

/// Instruction sets the CPU backend was built for and this machine has, best first: "amx", "avx512_bf16",
/// "avx512_vnni", "avx512", "avx2", "sse4"; "neon".
std::vector<std::string> supported_instruction_sets();
/// The one in use: the best, or what the environment variable MSA_ISA names.
std::string active_instruction_set();
/// Forces one of supported_instruction_sets() process-wide ("" returns to the default). Throws msa::Error on another
/// name. Not to be called while an operator runs.
void force_instruction_set(const std::string& name);

/// Version of the library, "major.minor.patch".
const char* version();

}  // namespace msa
