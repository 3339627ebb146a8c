// SPDX-License-Identifier: Apache-2.0
// Screening of key blocks in int8 (docs/select-blocks.md): what a block and a candidate carry, and the switch that
// forces it on or off. How blocks are screened: screen-inl.h. Tested in tests/unit/screen_test.cc.
#pragma once

#include <cstdint>

#include "msa/select_blocks.h"

namespace msa::cpu {

enum class Screening {
  kAuto,  ///< where it is expected to pay
  kNever,
  kAlways,  ///< also where it does not pay, on the plainest instruction set too
};

/// Overrides MSA_SCREEN process-wide (kAuto returns to it). For tests; not to be called while an operator runs.
void force_screening(Screening screening);

/// What force_screening or else the environment variable MSA_SCREEN says: "0" never, "1" always, unset or empty auto.
/// Throws msa::Error on another value.
Screening active_screening();

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

/// What a block of quantised keys k8 says about its keys k: k = scale * k8 + e.
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

/// Quantised blocks of one sequence that all tasks share: blocks [first, first + count).
struct SharedBlocks {
  const std::uint8_t* keys = nullptr;  ///< [count, block_size, screen_dim]
  const BlockBounds* bounds = nullptr;
  std::int64_t first = 0;
  std::int64_t count = 0;
};

}  // namespace msa::cpu
