// SPDX-License-Identifier: Apache-2.0
// Screening of key blocks in int8 or bf16 (docs/select-blocks.md): what a block and a candidate carry, the products to
// screen with, and the switch that forces it on or off. How blocks are screened: screen-inl.h. Tested in
// tests/unit/screen_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/select_blocks.h"
#include "src/cpu/bf16_max.h"
#include "src/cpu/int8_dot.h"

namespace msa::cpu {

enum class Screening {
  kAuto,  ///< where it is expected to pay
  kNever,
  kAlways,      ///< also where it does not pay, on the plainest instruction set too
  kAlwaysBf16,  ///< as kAlways, with products of bf16 whatever the instruction set: for tests
};

/// Overrides MSA_SCREEN process-wide (kAuto returns to it). For tests; not to be called while an operator runs.
void force_screening(Screening screening);

/// What force_screening or else the environment variable MSA_SCREEN says: "0" never, "1" always, unset or empty auto.
/// Throws msa::Error on another value.
Screening active_screening();

/// The products that blocks are screened with: one of the two.
struct ScreenDot {
  Int8BlockMax int8 = nullptr;
  Bf16BlockMax bf16 = nullptr;
  bool needs_amx_tiles = false;
  bool is_fast = false;  ///< whether it beats products in float by so much that screening pays

  bool is_bf16() const { return bf16 != nullptr; }
  std::int64_t element_bytes() const { return is_bf16() ? 2 : 1; }
  std::int64_t dim_multiple() const { return is_bf16() ? 32 : 4; }
};

/// Of the instruction set in use. AMX screens in bf16 although its int8 products are twice as fast: the rest of the
/// work is then so much less (docs/select-blocks.md).
ScreenDot active_screen_dot(Screening screening);

/// Powers of two, one a channel (dimension), by which queries are multiplied and keys divided before they are
/// quantised: their products stay as they are, and one strong channel does not take the bits of all others.
class Balance {
 public:
  /// From the largest magnitude of each channel: both factors become its geometric mean, as near as powers of two get.
  void set(const float* queries, const float* keys, std::int64_t dim);
  /// Null: all ones.
  const float* of_queries() const { return is_even_ ? nullptr : queries_; }
  const float* of_keys() const { return is_even_ ? nullptr : keys_; }

 private:
  bool is_even_ = true;
  alignas(64) float queries_[kMaxHeadDim] = {};
  alignas(64) float keys_[kMaxHeadDim] = {};
};

/// How a call screens.
struct ScreenSetup {
  ScreenDot dot;
  Balance balance;           ///< int8 only
  std::int64_t dim = 0;      ///< the index dimension, padded to what the products take; 0: no screening
  bool is_in_place = false;  ///< the keys are bf16 and lie as the products read them: nothing is copied

  std::int64_t row_bytes() const { return dim * dot.element_bytes(); }
};

/// What a block of keys k says about the ones that it is screened with: k = scale * k8 + e, or k = k16 + e and scale 1.
struct BlockBounds {
  float scale = 0;
  float error = 0;  ///< at least the largest |e|
  float norm = 0;   ///< at least the largest |k|; infinite: the keys cannot be bounded
};

/// A block that a row may yet choose: its score in exact float arithmetic lies in [score - error, score + error].
struct Candidate {
  static constexpr float kExact = -1;  ///< as error: score is the exact one

  std::int32_t block = 0;
  float score = 0;
  float error = 0;

  bool is_exact() const { return error < 0; }
  // NaN ranks below every number; as a bound -infinity stands for it.
  float number() const { return score == score ? score : -__builtin_inff(); }
  float lower() const { return is_exact() ? number() : score - error; }
  float upper() const { return is_exact() ? number() : score + error; }
};

/// Blocks of one sequence that all tasks share: [first, first + count).
struct SharedBlocks {
  const std::byte* keys = nullptr;  ///< [count, block_size] rows of int8 + 128 or bf16; null: read in place
  const BlockBounds* bounds = nullptr;
  std::int64_t first = 0;
  std::int64_t count = 0;
};

}  // namespace msa::cpu
