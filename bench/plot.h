// SPDX-License-Identifier: Apache-2.0
// The picture of `msa bench --plot`: time against context, dense attention and MSA, both axes logarithmic.
#pragma once

#include <string>

#include "bench/op_bench.h"

namespace msa::bench {

/// An SVG document of the prefill rows: torch's attention, our dense attention, the MSA layer. Throws msa::Error when
/// there is no row of the layer to draw. Tested in tests/integration/test_cli.py.
std::string plot_prefill(const OpBenchOptions& options, const OpBenchResult& result);

}  // namespace msa::bench
