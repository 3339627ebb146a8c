// SPDX-License-Identifier: Apache-2.0
// Conformance of a backend with the reference on this machine: every operator, forward and backward, every storage
// type, geometries with odd head counts and partial blocks; and bitwise independence of repetition, batch, chunks and
// pages. The first thing to run on a new machine or backend. Tested in tests/integration/test_cli.py and, on an
// emulated GPU, in tests/cuda/conformance_test.cc.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "msa/context.h"

namespace msa::conformance {

struct CheckResult {
  std::string op;        ///< "sparse_attention.out"
  std::string geometry;  ///< "9/3 heads, D 64, Dv 64, Di 64, block 64, topk 4, bfloat16"
  double error = 0;      ///< largest error against the reference; for selections: rows that differ; bits: values
  double allowed = 0;    ///< what the tolerance rule allows
  bool passed = false;
};

struct Geometry {
  std::int64_t query_heads, kv_heads, head_dim, value_dim, index_dim, block_size, topk;
};

/// Those of the whole check: powers of two and not, every dimension different, smallest and largest blocks, the paper's
/// and SmolLM2's.
std::vector<Geometry> all_geometries();

/// Runs all checks of context.backend, which must be usable, on the active instruction set or the current device;
/// seconds of work. `progress` hears each geometry. On Backend::kCuda the tensors are copied to device memory, and the
/// workspaces are made; context.workspace is not used.
std::vector<CheckResult> run_conformance(const Context& context, const std::vector<Geometry>& geometries,
                                         const std::function<void(const std::string&)>& progress);

/// The results of one operator's output, over all geometries.
struct OpSummary {
  std::string op;
  std::int64_t passed = 0;
  std::int64_t failed = 0;
  double worst = 0;  ///< largest error over what is allowed
};
/// By op, in alphabetical order.
std::vector<OpSummary> summarize(const std::vector<CheckResult>& results);

}  // namespace msa::conformance
