// SPDX-License-Identifier: Apache-2.0
// A chunk of queries turned round: for every key block the queries of the chunk that attend to it, ascending. A
// counting sort of the (block, query) visits, done once; the backward kernels stream over keys with it, sparse and
// dense alike. Tested in tests/unit/plan_test.cc and through the operators.
#pragma once

#include <algorithm>
#include <cstdint>

#include "msa/batch.h"
#include "msa/tensor.h"
#include "src/core/layout.h"
#include "src/cpu/topk.h"

namespace msa::cpu {

class BlockLists {
 public:
  /// int32 elements of scratch memory for `queries` with `row_blocks` chosen blocks each (0: dense) out of `blocks`.
  static std::int64_t scratch_elements(std::int64_t queries, std::int64_t row_blocks, std::int64_t blocks) {
    return queries + (row_blocks == 0 ? queries : queries * row_blocks + blocks + 1);
  }

  /// Queries [begin, end) of the sequence in kv head `group`; `blocks` empty means every visible block.
  BlockLists(const Batch& batch, const core::Sequence& sequence, const ConstTensorView& blocks, std::int64_t group,
             std::int64_t block_size, std::int64_t begin, std::int64_t end, std::int32_t* scratch)
      : block_size_(block_size), queries_(end - begin), positions_(scratch), ids_(scratch + queries_) {
    for (std::int64_t i = 0; i < queries_; ++i) {
      positions_[i] = static_cast<std::int32_t>(core::query_position(batch, sequence, begin + i));
    }
    blocks_ = queries_ == 0 ? 0 : positions_[queries_ - 1] / block_size_ + 1;
    if (blocks.empty()) {
      for (std::int64_t i = 0; i < queries_; ++i) ids_[i] = static_cast<std::int32_t>(i);
      return;
    }
    const std::int64_t topk = blocks.size(2);
    ends_ = ids_ + queries_ * topk;
    const auto for_each_visit = [&](const auto& body) {
      for (std::int64_t i = 0; i < queries_; ++i) {
        const std::int32_t* row = block_row(blocks, group, sequence.query_begin + begin + i);
        for (std::int64_t slot = 0; slot < topk && row[slot] >= 0; ++slot)
          body(static_cast<std::int32_t>(i), row[slot]);
      }
    };
    // ends_[b + 1] counts block b, then holds where its list goes on; when all is placed that is where it ends, and so
    // where the next one begins.
    std::fill(ends_, ends_ + blocks_ + 1, 0);
    for_each_visit([&](std::int32_t, std::int32_t block) { ++ends_[block + 1]; });
    std::int32_t sum = 0;
    for (std::int64_t b = 0; b < blocks_; ++b) {
      const std::int32_t count = ends_[b + 1];
      ends_[b + 1] = sum;
      sum += count;
    }
    for_each_visit([&](std::int32_t query, std::int32_t block) { ids_[ends_[block + 1]++] = query; });
  }

  /// Blocks that the last query sees; those behind have no members.
  std::int64_t blocks() const { return blocks_; }
  /// Queries of the chunk, counted from its begin, that attend to a block; ascending.
  const std::int32_t* members(std::int64_t block) const {
    return ends_ == nullptr ? ids_ + first_behind(block) : ids_ + ends_[block];
  }
  std::int64_t count(std::int64_t block) const {
    return ends_ == nullptr ? queries_ - first_behind(block) : ends_[block + 1] - ends_[block];
  }
  /// Keys of a block that query i of the chunk sees.
  std::int64_t visible_keys(std::int64_t i, std::int64_t block) const {
    return std::min(block_size_, positions_[i] + 1 - block * block_size_);
  }

 private:
  // Dense: the first query at or behind the block's begin.
  std::int64_t first_behind(std::int64_t block) const {
    return std::lower_bound(positions_, positions_ + queries_, block * block_size_) - positions_;
  }

  std::int64_t block_size_;
  std::int64_t queries_;
  std::int64_t blocks_ = 0;
  std::int32_t* positions_;
  std::int32_t* ids_;
  std::int32_t* ends_ = nullptr;
};

}  // namespace msa::cpu
