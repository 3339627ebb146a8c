// SPDX-License-Identifier: Apache-2.0
// How long the units of AMX tiles take to wake up: the time of one tile product and of one tile store after pauses of
// other work, and whether products or stores amid the pause shorten it. docs/attention.md draws on it. Usage:
// tile_sleep
#include <cstdio>

#if defined(__x86_64__)

#include <x86intrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "src/cpu/amx_tiles.h"
#include "src/cpu/dot_products.h"

namespace {

constexpr int kRuns = 5000;
constexpr int kStep = 30;  // cycles of the pause between two looks at whether something is due

enum class Measured { kProduct, kStore };
enum class Amid { kNothing, kProducts, kProductsAndStores };

alignas(64) float nowhere[256];

MSA_AMX_TARGET void multiply_tiles() { _tile_dpbf16ps(0, 2, 4); }
MSA_AMX_TARGET void store_tile() { _tile_stored(0, nowhere, 64); }

// Ten multiplications that wait for each other.
void pause_a_step(std::uint32_t& x) {
  for (int i = 0; i < kStep / 3; ++i) asm volatile("imul %0, %0" : "+r"(x));
}

std::uint64_t now() {
  _mm_lfence();
  const std::uint64_t ticks = __rdtsc();
  _mm_lfence();
  return ticks;
}

// Median, in ticks of the time stamp counter.
std::uint64_t ticks_after(int pause, Amid amid, Measured measured) {
  std::vector<std::uint64_t> ticks;
  std::uint32_t x = 3;
  for (int run = 0; run < kRuns; ++run) {
    for (int at = 0; at < pause; at += kStep) {
      pause_a_step(x);
      if (at % 900 != 0 || amid == Amid::kNothing) continue;
      multiply_tiles();
      if (amid == Amid::kProductsAndStores) store_tile();
    }
    const std::uint64_t start = now();
    if (measured == Measured::kProduct) {
      multiply_tiles();
    } else {
      store_tile();
    }
    ticks.push_back(now() - start);
  }
  std::nth_element(ticks.begin(), ticks.begin() + kRuns / 2, ticks.end());
  return ticks[kRuns / 2];
}

}  // namespace

int main() {
  if (msa::cpu::active_dot_products() != msa::cpu::DotProducts::kAmx) {
    std::fputs("no AMX tiles on this machine\n", stderr);
    return 2;
  }
  const msa::cpu::AmxTiles tiles;
  std::printf("ticks of the time stamp counter; every 900 cycles of the pause:\n%8s %21s %21s %21s\n%8s", "", "nothing",
              "a product", "a product and a store", "pause");
  for (int i = 0; i < 3; ++i) std::printf(" %10s %10s", "product", "store");
  std::printf("\n");
  for (const int pause : {300, 1500, 1800, 2100, 3000, 6000, 12000}) {
    std::printf("%8d", pause);
    for (const Amid amid : {Amid::kNothing, Amid::kProducts, Amid::kProductsAndStores}) {
      for (const Measured measured : {Measured::kProduct, Measured::kStore}) {
        std::printf(" %10llu", static_cast<unsigned long long>(ticks_after(pause, amid, measured)));
      }
    }
    std::printf("\n");
  }
  return 0;
}

#else

int main() {
  std::fputs("no AMX tiles on this machine\n", stderr);
  return 2;
}

#endif
