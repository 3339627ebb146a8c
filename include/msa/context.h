// SPDX-License-Identifier: Apache-2.0
// What a call runs on: backend, thread count and a limit on scratch memory; for a GPU, the stream and its scratch
// memory. A context is a plain value and every operator takes one; the library keeps no other state between calls.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace msa {

enum class Backend {
  kAuto,       ///< the fastest one that takes the tensors: today always kCpu
  kReference,  ///< scalar fp64, the executable specification; slow
  kCpu,        ///< vector code, instruction set chosen at run time
  kCuda,       ///< a Hopper GPU: all tensors of the call and the spans of Batch lie in device memory (docs/cuda.md)
};

const char* backend_name(Backend backend);
/// "auto", "reference", "cpu" or "cuda"; throws msa::Error on anything else, naming the choices.
Backend parse_backend(const std::string& name);

struct Context {
  Backend backend = Backend::kAuto;
  /// Worker threads of a call; 0 means one for each hardware thread. Results do not depend on it.
  int threads = 0;
  /// Most bytes of scratch memory a call may take, inputs and outputs apart; 0 means no limit. A plan that cannot be
  /// cut down to it makes the call throw msa::Error with the bytes it needs. On kCuda it bounds what the `..._workspace`
  /// functions ask for, and what a call uses of a larger workspace.
  std::size_t workspace_limit = 0;

  // kCuda only. A call runs on the calling thread's current device and enqueues its work on `stream`.
  void* stream = nullptr;  ///< a cudaStream_t; null is the default stream
  /// Device scratch of the call, aligned to kWorkspaceAlignment, at least the bytes that the operator's `..._workspace`
  /// function gives. Free for other use once the stream has passed the call. Nothing is allocated behind its back.
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  /// Check what lies in device memory, too (sequence bounds, page tables, positions, block ids): a kernel, and one wait
  /// of the host. Without it the host never waits, and ids out of range are treated as absent; the operators that
  /// return a number to the host wait in any case. While the stream captures a graph nothing is checked.
  bool check_device_data = true;
};

inline constexpr std::size_t kWorkspaceAlignment = 256;  ///< of Context::workspace

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
