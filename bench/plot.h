// SPDX-License-Identifier: Apache-2.0
// The picture of `msa bench --plot`: time against context, dense attention and MSA, both axes logarithmic. Tested in
// tests/integration/test_cli.py and test_gpu_tools.py.
#pragma once

#include <string>
#include <vector>

#include "bench/op_bench.h"

namespace msa::bench {

enum class Curve { kTorchFloat32, kTorchBFloat16, kDense, kMsa };

struct PlotPoint {
  Curve curve = Curve::kMsa;
  double context = 0;
  double seconds = 0;
};

struct Plot {
  std::string title, subtitle;
  std::vector<PlotPoint> points;  ///< in any order
};

/// The prefill rows: torch's attention, our dense attention, the MSA layer.
Plot prefill_plot(const OpBenchOptions& options, const OpBenchResult& result);

/// An SVG document. Throws msa::Error when there is no point of MSA to draw.
std::string draw(const Plot& plot);

}  // namespace msa::bench
