// SPDX-License-Identifier: Apache-2.0
// Results of an earlier run, for `msa bench --from FILE --plot`: what `msa bench --json` and bench/gpu_bench.py write.
// Tested in tests/integration/test_gpu_tools.py.
#pragma once

#include <string>

#include "bench/plot.h"

namespace msa::app {

/// Throws msa::Error when the file cannot be read or is not such a result.
bench::Plot read_plot(const std::string& path);

}  // namespace msa::app
