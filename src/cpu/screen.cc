// SPDX-License-Identifier: Apache-2.0
// See screen.h: the switch, the choice of products, and the balance of channels.
#include "src/cpu/screen.h"

#include <atomic>
#include <cmath>
#include <cstdint>

#include "src/core/screen_switch.h"
#include "src/cpu/dot_products.h"

namespace msa::cpu {
namespace {

std::atomic<Screening> forced{Screening::kAuto};

Screening read_environment() {
  switch (core::screen_switch()) {
    case core::ScreenSwitch::kNever: return Screening::kNever;
    case core::ScreenSwitch::kAlways: return Screening::kAlways;
    case core::ScreenSwitch::kAuto: break;
  }
  return Screening::kAuto;
}

}  // namespace

void force_screening(Screening screening) { forced.store(screening, std::memory_order_relaxed); }

Screening active_screening() {
  const Screening now = forced.load(std::memory_order_relaxed);
  if (now != Screening::kAuto) return now;
  static const Screening from_environment = read_environment();
  return from_environment;
}

ScreenDot active_screen_dot(Screening screening) {
  ScreenDot dot;
  const DotProducts products = active_dot_products();
#if defined(__x86_64__)
  dot.is_fast = products != DotProducts::kNone;
  if (products == DotProducts::kAmx) {
    dot.bf16 = bf16_block_max_amx;
    dot.needs_amx_tiles = true;
  } else if (dot.is_fast) {
    dot.int8 = int8_block_max_avx512;
  }
#endif
  if (screening == Screening::kAlwaysBf16 && !dot.is_bf16()) return {.bf16 = bf16_block_max_portable};
  if (products == DotProducts::kNone) dot.int8 = int8_block_max_portable;
  return dot;
}

void Balance::set(const float* queries, const float* keys, std::int64_t dim) {
  is_even_ = true;
  for (std::int64_t d = 0; d < dim; ++d) {
    // sqrt(key / query) as a power of two. 2^12 either way leaves every product of two bounded elements in range.
    const bool is_used = queries[d] > 0 && keys[d] > 0;
    const double exponent =
        is_used ? 0.5 * (std::log2(static_cast<double>(keys[d])) - std::log2(static_cast<double>(queries[d]))) : 0.0;
    const int steps = static_cast<int>(std::lround(std::fmin(std::fmax(exponent, -12.0), 12.0)));
    queries_[d] = std::ldexp(1.0f, steps);
    keys_[d] = std::ldexp(1.0f, -steps);
    is_even_ = is_even_ && queries_[d] == queries_[0];
  }
}

}  // namespace msa::cpu
