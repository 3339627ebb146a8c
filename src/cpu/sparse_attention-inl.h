// SPDX-License-Identifier: Apache-2.0
// sparse_attention: the rows' selections turned round, so that each selected block is visited once by all rows of the
// chunk that chose it; for few queries, the two halves of split_attention.h. Tested in
// tests/unit/sparse_attention_test.cc.
#if defined(MSA_CPU_SPARSE_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_SPARSE_ATTENTION_INL_H_
#undef MSA_CPU_SPARSE_ATTENTION_INL_H_
#else
#define MSA_CPU_SPARSE_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "src/cpu/attention_chunk-inl.h"
#include "src/cpu/sparse_visits.h"
#include "src/cpu/split_attention.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

template <class Chunk>
HWY_ATTR void attend_sparsely_with(const AttentionInput& input, const QueryChunk& chunk, std::int64_t kv_head,
                                   float* scratch) {
  Chunk attention(input, chunk, kv_head, scratch);
  auto* visits = reinterpret_cast<std::uint64_t*>(scratch + input.layout.visits);
  const std::int64_t count = sort_visits(input, chunk, kv_head, visits);
  for_each_block(visits, count,
                 [&](std::int64_t block, std::int64_t first, std::int64_t last, const NextBlock& next) HWY_ATTR {
                   for (std::int64_t v = first; v < last; ++v) attention.members()[v - first] = visit_query(visits[v]);
                   attention.add_block(block, last - first, next);
                 });
  attention.write();
}

/// One task: the rows of a chunk and a kv head.
inline HWY_ATTR void attend_sparsely(const AttentionInput& input, const QueryChunk& chunk, std::int64_t kv_head,
                                     float* scratch) {
  with_chunk_of(input, [&](auto type) HWY_ATTR {
    attend_sparsely_with<typename decltype(type)::Chunk>(input, chunk, kv_head, scratch);
  });
}

template <class Chunk>
HWY_ATTR void start_split_block(const SplitWork& work, const SplitBlock& block, Chunk& attention) {
  const std::int32_t* members = work.members.data() + block.first_member;
  std::copy(members, members + block.member_count, attention.members());
}

/// One task of the first half: scores of a span of blocks.
inline HWY_ATTR void score_split_span(const SplitWork& work, const SplitSpan& span, float* scratch, float* scores) {
  const AttentionInput& input = work.slices[0];
  const SplitItem& item = work.items[static_cast<std::size_t>(span.item)];
  with_chunk_of(input, [&](auto type) HWY_ATTR {
    typename decltype(type)::Chunk attention(input, item.task.chunk, item.task.head, scratch);
    for (std::int64_t b = span.first; b < span.last; ++b) {
      const SplitBlock& block = work.blocks[static_cast<std::size_t>(b)];
      start_split_block(work, block, attention);
      attention.score_block(block.block, block.member_count, scores + block.scores);
    }
  });
}

/// One task of the second half: everything that follows from the scores, of a slice of the value dimensions.
inline HWY_ATTR void weigh_split_item(const SplitWork& work, const SplitItem& item, const AttentionInput& slice,
                                      float* scratch, const float* scores) {
  with_chunk_of(slice, [&](auto type) HWY_ATTR {
    typename decltype(type)::Chunk attention(slice, item.task.chunk, item.task.head, scratch);
    for (std::int64_t b = item.first_block; b < item.last_block; ++b) {
      const SplitBlock& block = work.blocks[static_cast<std::size_t>(b)];
      start_split_block(work, block, attention);
      attention.weigh_block(block.block, block.member_count, scores + block.scores);
    }
    attention.write();
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_SPARSE_ATTENTION_INL_H_
