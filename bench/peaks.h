// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most, measured: the denominators of every figure that `msa bench` prints.
#pragma once

namespace msa::bench {

/// Float multiply-add peak of `threads` cores in GFLOP/s: independent register-only chains, best of several runs.
double measure_fma_gflops(int threads);

/// Read bandwidth of `threads` cores in GB/s: sums over a buffer far larger than the caches, best of several runs.
double measure_read_gbytes(int threads);

}  // namespace msa::bench
