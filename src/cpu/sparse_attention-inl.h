// SPDX-License-Identifier: Apache-2.0
// sparse_attention: the rows' selections turned round, so that each selected block is visited once by all rows of the
// chunk that chose it. Tested in tests/unit/sparse_attention_test.cc.
#if defined(MSA_CPU_SPARSE_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_SPARSE_ATTENTION_INL_H_
#undef MSA_CPU_SPARSE_ATTENTION_INL_H_
#else
#define MSA_CPU_SPARSE_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <optional>

#include "src/cpu/attention-inl.h"
#include "src/cpu/attention_amx-inl.h"
#include "src/cpu/attention_bf16-inl.h"
#include "src/cpu/topk.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

template <class Chunk>
HWY_ATTR void attend_sparsely_with(const AttentionInput& input, const QueryChunk& chunk, std::int64_t kv_head,
                                   float* scratch) {
  Chunk attention(input, chunk, kv_head, scratch);
  // (block, query) pairs as single numbers, sorted: blocks ascending, within a block queries ascending.
  auto* visits = reinterpret_cast<std::uint64_t*>(scratch + input.layout.visits);
  std::int64_t visit_count = 0;
  for (std::int64_t i = 0; i < attention.count(); ++i) {
    const std::int32_t* ids = block_row(input.blocks, kv_head, attention.first_row() + i);
    for (std::int64_t slot = 0; slot < input.shape.topk; ++slot) {
      if (ids[slot] < 0) continue;
      visits[visit_count++] = static_cast<std::uint64_t>(ids[slot]) << 32 | static_cast<std::uint64_t>(i);
    }
  }
  std::sort(visits, visits + visit_count);
  for (std::int64_t visit = 0; visit < visit_count;) {
    const std::uint64_t block = visits[visit] >> 32;
    std::int64_t n = 0;
    for (; visit < visit_count && visits[visit] >> 32 == block; ++visit) {
      attention.members()[n++] = static_cast<std::int32_t>(visits[visit] & 0xffffffffu);
    }
    const std::int64_t next = visit < visit_count ? static_cast<std::int64_t>(visits[visit] >> 32) : -1;
    attention.add_block(static_cast<std::int64_t>(block), n, next);
  }
  attention.write();
}

/// One task: the rows of a chunk and a kv head.
inline HWY_ATTR void attend_sparsely(const AttentionInput& input, const QueryChunk& chunk, std::int64_t kv_head,
                                     float* scratch) {
#if HWY_TARGET == HWY_AVX3
  if (input.multiply_bf16 != nullptr) {
    std::optional<AmxTiles> tiles;
    if (input.needs_amx_tiles) tiles.emplace();
    if (input.shape.has_tiles) {
      attend_sparsely_with<AmxChunkAttention>(input, chunk, kv_head, scratch);
    } else {
      attend_sparsely_with<Bf16ChunkAttention>(input, chunk, kv_head, scratch);
    }
    return;
  }
#endif
  attend_sparsely_with<ChunkAttention>(input, chunk, kv_head, scratch);
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_SPARSE_ATTENTION_INL_H_
