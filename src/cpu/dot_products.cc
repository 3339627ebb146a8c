// SPDX-License-Identifier: Apache-2.0
// See dot_products.h. Reads CPUID (Intel SDM volume 2, leaf 7) beside what Highway finds for AVX-512 itself.
#include "src/cpu/dot_products.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <hwy/targets.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace msa::cpu {
namespace {

#if defined(__x86_64__)
bool may_use_amx_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestFeature = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;            // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestFeature, kTileData) == 0;
#else
  return false;
#endif
}

DotProducts detect() {
  if ((hwy::SupportedTargets() & HWY_AVX3) == 0) return DotProducts::kNone;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return DotProducts::kNone;
  const bool has_vnni = (ecx >> 11 & 1) != 0;
  const bool has_tiles = (edx >> 22 & 1) != 0 && (edx >> 24 & 1) != 0 && (edx >> 25 & 1) != 0;  // bf16, tile, int8
  if (!has_vnni) return DotProducts::kNone;
  const bool has_bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1) != 0;
  if (!has_bf16) return DotProducts::kVnni;
  return has_tiles && may_use_amx_tiles() ? DotProducts::kAmx : DotProducts::kAvx512;
}
bool is_amd() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(0, &eax, &ebx, &ecx, &edx) != 0 && ebx == signature_AMD_ebx;
}
#else
DotProducts detect() { return DotProducts::kNone; }
bool is_amd() { return false; }
#endif

}  // namespace

DotProducts detect_dot_products() {
  static const DotProducts detected = detect();
  return detected;
}

bool bf16_dots_are_fast() { return is_amd(); }

}  // namespace msa::cpu
