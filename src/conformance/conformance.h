// SPDX-License-Identifier: Apache-2.0
// Conformance of a backend with the reference on this machine: every operator, every storage type, geometries with odd
// head counts and partial blocks. The first thing to run on a new machine or backend. Tested in
// tests/integration/test_cli.py.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "msa/context.h"

namespace msa::conformance {

struct CheckResult {
  std::string op;        ///< "sparse_attention.out"
  std::string geometry;  ///< "9/3 heads, D 64, Dv 64, Di 64, block 64, topk 4, bfloat16"
  double error = 0;      ///< largest error against the reference; for selections: rows that differ
  double allowed = 0;    ///< what the tolerance rule allows
  bool passed = false;
};

/// Runs all checks of context.backend on the active instruction set; seconds of work. `progress` hears each geometry.
std::vector<CheckResult> run_conformance(const Context& context,
                                         const std::function<void(const std::string&)>& progress);

}  // namespace msa::conformance
