// SPDX-License-Identifier: Apache-2.0
// Which blocks the scores of select_blocks decide about, query by query (SPEC section 2, rules 1 to 3). Tested through
// the operator.
#pragma once

#include <cstdint>

#include "msa/select_blocks.h"
#include "src/core/layout.h"
#include "src/cpu/topk.h"

namespace msa::cpu {

/// Which blocks the queries of a sequence choose from.
class Choices {
 public:
  Choices(const SelectBlocksParams& params, const core::Sequence& sequence) : params_(params), sequence_(sequence) {
    // The same for every row that chooses at all: it sees more than topk blocks.
    const core::ForcedBlocks forced = forced_of(params.topk + 1);
    begin_ = forced.init_end;
    slots_ = free_slots(forced, params.topk + 1, params.topk);
  }

  const core::Sequence& sequence() const { return sequence_; }
  std::int64_t position(std::int64_t i) const { return core::query_position(params_.batch, sequence_, i); }
  std::int64_t visible(std::int64_t i) const { return position(i) / params_.block_size + 1; }
  core::ForcedBlocks forced_of(std::int64_t visible) const {
    return core::forced_blocks(visible, params_.topk, params_.local_blocks, params_.init_blocks);
  }
  /// Slots that are left to the scores.
  std::int64_t slots() const { return slots_; }
  /// Query i chooses among the blocks [begin(), end(i)): none when all it sees are taken. end(i) grows with i.
  std::int64_t begin() const { return begin_; }
  std::int64_t end(std::int64_t i) const {
    const std::int64_t n = visible(i);
    return n > params_.topk && slots_ > 0 ? forced_of(n).local_begin : 0;
  }

 private:
  const SelectBlocksParams& params_;
  core::Sequence sequence_;
  std::int64_t begin_ = 0;
  std::int64_t slots_ = 0;
};

}  // namespace msa::cpu
