// SPDX-License-Identifier: Apache-2.0
// The blocks that a chunk of queries attends to, one after the other in ascending order, each with the queries that do:
// how the backward kernels stream over keys, sparse and dense alike. Tested through the operators.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "msa/batch.h"
#include "msa/tensor.h"
#include "src/core/layout.h"
#include "src/cpu/topk.h"

namespace msa::cpu {

class BlockWalk {
 public:
  /// int32 elements of scratch memory for a chunk of `queries`.
  static std::int64_t scratch_elements(std::int64_t queries) { return 3 * queries; }

  /// Queries [begin, end) of the sequence in kv head `group`; `blocks` empty means every visible block.
  BlockWalk(const Batch& batch, const core::Sequence& sequence, const ConstTensorView& blocks, std::int64_t group,
            std::int64_t block_size, std::int64_t begin, std::int64_t end, std::int32_t* scratch)
      : blocks_(&blocks),
        group_(group),
        first_row_(sequence.query_begin + begin),
        block_size_(block_size),
        queries_(end - begin),
        topk_(blocks.empty() ? 0 : blocks.size(2)),
        positions_(scratch),
        cursors_(scratch + queries_),
        members_(scratch + 2 * queries_) {
    for (std::int64_t i = 0; i < queries_; ++i) {
      positions_[i] = static_cast<std::int32_t>(core::query_position(batch, sequence, begin + i));
    }
    rewind();
  }

  /// Starts again before the first block.
  void rewind() {
    block_ = -1;
    count_ = 0;
    std::fill(cursors_, cursors_ + queries_, 0);
  }

  /// Moves on to the next block; false behind the last.
  bool next() {
    count_ = 0;
    if (blocks_->empty()) {
      ++block_;
      std::int64_t first = 0;
      while (first < queries_ && positions_[first] < block_ * block_size_) ++first;
      for (std::int64_t i = first; i < queries_; ++i) members_[count_++] = static_cast<std::int32_t>(i);
      return count_ > 0;
    }
    constexpr std::int32_t kNone = std::numeric_limits<std::int32_t>::max();
    std::int32_t least = kNone;
    for (std::int64_t i = 0; i < queries_; ++i) {
      const std::int32_t id = current(i);
      if (id < 0 || id > least) continue;
      if (id < least) count_ = 0;
      least = id;
      members_[count_++] = static_cast<std::int32_t>(i);
    }
    if (least == kNone) return false;
    for (std::int64_t t = 0; t < count_; ++t) ++cursors_[members_[t]];
    block_ = least;
    return true;
  }

  std::int64_t block() const { return block_; }
  /// Queries of the chunk, counted from its begin, that attend to the block; ascending.
  const std::int32_t* members() const { return members_; }
  std::int64_t count() const { return count_; }
  std::int64_t position(std::int64_t i) const { return positions_[i]; }
  /// Keys of the block that query i of the chunk sees.
  std::int64_t visible_keys(std::int64_t i) const {
    return std::min(block_size_, positions_[i] + 1 - block_ * block_size_);
  }
  /// Keys of the block that at least one member sees: what has to be loaded.
  std::int64_t block_keys() const { return visible_keys(members_[count_ - 1]); }

 private:
  std::int32_t current(std::int64_t i) const {
    return cursors_[i] < topk_ ? block_row(*blocks_, group_, first_row_ + i)[cursors_[i]] : -1;
  }

  const ConstTensorView* blocks_;
  std::int64_t group_;
  std::int64_t first_row_;
  std::int64_t block_size_;
  std::int64_t queries_;
  std::int64_t topk_;
  std::int32_t* positions_;
  std::int32_t* cursors_;
  std::int32_t* members_;
  std::int64_t block_ = -1;
  std::int64_t count_ = 0;
};

}  // namespace msa::cpu
