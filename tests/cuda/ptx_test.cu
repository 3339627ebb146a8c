// SPDX-License-Identifier: Apache-2.0
// Asks a device whether it does what the emulator believes: every case of ptx_cases.cuh, and how many bits its matrix
// products keep while they add up. The first thing that tools/gpu_check runs. Exits 1 when a case fails or there is no
// GPU.
#include <cstdio>
#include <exception>

#include "tests/cuda/ptx_cases.cuh"

namespace {

using namespace msa::cuda;
using namespace msa::cuda::ptx_cases;

void print_bits(const char* type, int in_product, int in_accumulator, int most) {
  std::printf("%s: 1 + 2^-n is told from 1 up to n = %d within a product, %d in the accumulator (asked up to %d)\n",
              type, in_product, in_accumulator, most);
}

int run_cases() {
  const msa::CudaInfo device = msa::cuda_info();
  if (!device.usable) {
    std::fprintf(stderr, "ptx_test: %s; nothing was checked\n", device.why_not.c_str());
    return 1;
  }
  std::printf("%s\n", device.device.c_str());
  int passed = 0, failed = 0;
  visit_cases([&](const std::string& name, const Case& run) {
    std::printf("%s ... ", name.c_str());
    std::fflush(stdout);  // a hang names itself
    const Outcome outcome = run();
    const std::size_t wrong = count_wrong(outcome);
    std::printf(wrong == 0 ? "ok\n" : "FAILED: %zu of %zu values differ\n", wrong, outcome.want.size());
    ++(wrong == 0 ? passed : failed);
    for (std::size_t i = 0, shown = 0; wrong > 0 && i < outcome.got.size() && shown < 4; ++i) {
      if (outcome.got[i] == outcome.want[i]) continue;
      std::printf("    [%zu] is %.9g, must be %.9g\n", i, outcome.got[i], outcome.want[i]);
      ++shown;
    }
  });
  print_bits("bf16", bits_kept<BFloat16>(false, 30), bits_kept<BFloat16>(true, 30), 30);
  print_bits("fp16", bits_kept<Float16>(false, 28), bits_kept<Float16>(true, 28), 28);
  print_bits("e4m3", bits_kept<Float8E4M3>(false, 18), bits_kept<Float8E4M3>(true, 18), 18);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run_cases();
  } catch (const std::exception& error) {
    std::printf("\n");
    std::fprintf(stderr, "ptx_test: %s\n", error.what());
    return 1;
  }
}
