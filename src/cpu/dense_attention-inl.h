// SPDX-License-Identifier: Apache-2.0
// dense_attention: every row visits every block up to its own. Tested in tests/unit/dense_attention_test.cc.
#if defined(MSA_CPU_DENSE_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_DENSE_ATTENTION_INL_H_
#undef MSA_CPU_DENSE_ATTENTION_INL_H_
#else
#define MSA_CPU_DENSE_ATTENTION_INL_H_
#endif

#include <cstdint>
#include <numeric>

#include "src/cpu/attention_chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

template <class Chunk>
HWY_ATTR void attend_densely_with(const AttentionInput& input, const QueryChunk& chunk, std::int64_t kv_head,
                                  float* scratch) {
  Chunk attention(input, chunk, kv_head, scratch);
  const std::int64_t block_size = input.shape.block_size;
  const std::int64_t blocks = attention.position_of(attention.count() - 1) / block_size + 1;
  std::int64_t first = 0;  // first query that sees the block
  for (std::int64_t b = 0; b < blocks; ++b) {
    while (attention.position_of(first) < b * block_size) ++first;
    const std::int64_t n = attention.count() - first;
    std::iota(attention.members(), attention.members() + n, static_cast<std::int32_t>(first));
    NextBlock next;
    if (b + 1 < blocks) next.block = b + 1;
    attention.add_block(b, n, next);
  }
  attention.write();
}

/// One task: the rows of a chunk and a kv head.
inline HWY_ATTR void attend_densely(const AttentionInput& input, const QueryChunk& chunk, std::int64_t kv_head,
                                    float* scratch) {
  with_chunk_of(input, [&](auto type) HWY_ATTR {
    attend_densely_with<typename decltype(type)::Chunk>(input, chunk, kv_head, scratch);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_DENSE_ATTENTION_INL_H_
