// SPDX-License-Identifier: Apache-2.0
// The best `slots` blocks of one row, kept while its block scores stream by; and the writing of a finished row (SPEC
// section 2, rules 1 to 4). No exponential, no sorting of all scores. Tested in tests/unit/screen_test.cc and through
// the selection operators.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "msa/tensor.h"
#include "src/core/layout.h"

namespace msa::cpu {

/// Scores as integers in their order: -0 and +0 are one value, NaN comes below -inf.
inline std::int32_t order_key(float score) {
  if (score != score) return INT32_MIN;
  const auto bits = std::bit_cast<std::int32_t>(score);
  return bits >= 0 ? bits : (bits == INT32_MIN ? 0 : bits ^ 0x7fffffff);
}

/// Running top-k of one row, on memory of the caller: keys and ids of at least `slots` elements, kept best first. A
/// block that does not beat the last one costs one comparison; one that does finds its place by counting what ranks
/// before it (a loop without branches, which compilers make vectors of) and moves the rest down.
class RowTopk {
 public:
  RowTopk(std::int32_t* keys, std::int32_t* ids, std::int64_t slots)
      : keys_(keys), ids_(ids), slots_(static_cast<std::int32_t>(slots)) {}

  /// Blocks may come in any order, each once; equal scores rank by id.
  void offer(std::int32_t id, float score) {
    const std::int32_t key = order_key(score);
    if (count_ == slots_) {
      if (count_ == 0) return;
      const std::int32_t last = keys_[count_ - 1];
      if (key < last || (key == last && id > ids_[count_ - 1])) return;
      --count_;
    }
    std::int32_t place = 0;
    for (std::int32_t i = 0; i < count_; ++i) {
      place += static_cast<std::int32_t>(keys_[i] > key) |
               (static_cast<std::int32_t>(keys_[i] == key) & static_cast<std::int32_t>(ids_[i] < id));
    }
    const auto behind = static_cast<std::size_t>(count_ - place) * sizeof(std::int32_t);
    std::memmove(keys_ + place + 1, keys_ + place, behind);
    std::memmove(ids_ + place + 1, ids_ + place, behind);
    keys_[place] = key;
    ids_[place] = id;
    ++count_;
  }

  /// Least order key that a block with a higher id than all so far must have to be taken.
  std::int32_t least_key() const {
    if (count_ < slots_) return INT32_MIN;
    return slots_ == 0 ? INT32_MAX : keys_[count_ - 1] + 1;  // no key is INT32_MAX: +inf is 0x7f800000
  }

  std::int64_t count() const { return count_; }
  const std::int32_t* ids() const { return ids_; }

 private:
  std::int32_t* keys_;
  std::int32_t* ids_;
  std::int32_t slots_;
  std::int32_t count_ = 0;
};

/// Slots that the forced blocks leave to the scores.
inline std::int64_t free_slots(const core::ForcedBlocks& forced, std::int64_t visible, std::int64_t topk) {
  return std::max<std::int64_t>(0, topk - forced.init_end - (visible - forced.local_begin));
}

/// Address of blocks[group, row, 0].
inline std::int32_t* block_row(const TensorView& blocks, std::int64_t group, std::int64_t row) {
  return reinterpret_cast<std::int32_t*>(blocks.data) + group * blocks.stride(0) + row * blocks.stride(1);
}
inline const std::int32_t* block_row(const ConstTensorView& blocks, std::int64_t group, std::int64_t row) {
  return reinterpret_cast<const std::int32_t*>(blocks.data) + group * blocks.stride(0) + row * blocks.stride(1);
}

/// Writes a row of topk ids: the forced blocks and `count` chosen ones, ascending, -1 behind them. `visible` is the
/// number of visible blocks; with visible <= topk all of them are written and `chosen` is not read.
inline void write_selection(std::int32_t* out, std::int64_t topk, std::int64_t visible,
                            const core::ForcedBlocks& forced, const std::int32_t* chosen, std::int64_t count) {
  std::int64_t n = 0;
  if (visible <= topk) {
    for (; n < visible; ++n) out[n] = static_cast<std::int32_t>(n);
  } else {
    for (std::int64_t b = 0; b < forced.init_end; ++b) out[n++] = static_cast<std::int32_t>(b);
    for (std::int64_t i = 0; i < count; ++i) out[n++] = chosen[i];
    for (std::int64_t b = forced.local_begin; b < visible; ++b) out[n++] = static_cast<std::int32_t>(b);
    std::sort(out, out + n);
  }
  std::fill(out + n, out + topk, -1);
}

/// -1 in every row behind the last sequence.
inline void clear_padding_rows(const TensorView& blocks, std::int64_t first_row) {
  for (std::int64_t group = 0; group < blocks.size(0); ++group) {
    for (std::int64_t row = first_row; row < blocks.size(1); ++row) {
      std::int32_t* ids = block_row(blocks, group, row);
      std::fill(ids, ids + blocks.size(2), -1);
    }
  }
}

}  // namespace msa::cpu
