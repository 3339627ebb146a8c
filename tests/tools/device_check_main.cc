// SPDX-License-Identifier: Apache-2.0
// `msa check --backend cuda` without the program's dependencies, for machines that have a CUDA compiler and little else
// (tools/gpu_check): the same checks, printed as a table. Exits 1 when one fails or there is no GPU.
#include <cstdio>
#include <exception>
#include <string>

#include "msa/cuda.h"
#include "src/conformance/conformance.h"

namespace {

using namespace msa::conformance;

int check_device() {
  const msa::CudaInfo device = msa::cuda_info();
  if (!device.usable) {
    std::fprintf(stderr, "device_check: %s; nothing was checked\n", device.why_not.c_str());
    return 1;
  }
  msa::Context context;
  context.backend = msa::Backend::kCuda;
  const auto progress = [](const std::string& what) { std::fprintf(stderr, "checking %s\n", what.c_str()); };
  const auto results = run_conformance(context, all_geometries(), progress);
  std::printf("%-28s %8s %8s   worst error / allowed\n", device.device.c_str(), "passed", "failed");
  long long passed = 0, failed = 0;
  for (const OpSummary& s : summarize(results)) {
    std::printf("  %-26s %8lld %8lld   %.2f\n", s.op.c_str(), static_cast<long long>(s.passed),
                static_cast<long long>(s.failed), s.worst);
    passed += s.passed, failed += s.failed;
  }
  for (const CheckResult& r : results) {
    if (r.passed) continue;
    std::printf("  FAILED %s (%s): error %.3g, allowed %.3g\n", r.op.c_str(), r.geometry.c_str(), r.error, r.allowed);
  }
  std::printf("\n%lld passed, %lld failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return check_device();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "device_check: %s\n", error.what());
    return 1;
  }
}
