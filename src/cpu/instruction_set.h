// SPDX-License-Identifier: Apache-2.0
// Which instruction set the vector kernels run on: chosen once, high up, by Highway's dispatch table; MSA_ISA overrides
// it.
#pragma once

#include <string>
#include <vector>

namespace msa::cpu {

std::vector<std::string> supported_instruction_sets();
std::string active_instruction_set();
void force_instruction_set(const std::string& name);

/// Called by every kernel's entry: applies MSA_ISA once a process. Throws msa::Error when it names a set that this
/// machine or build does not have.
void ensure_instruction_set();

}  // namespace msa::cpu
