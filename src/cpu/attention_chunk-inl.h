// SPDX-License-Identifier: Apache-2.0
// The arithmetic that a chunk of attention runs in: AMX tiles, bf16 dot products or floats. Tested through
// sparse_attention and dense_attention.
#if defined(MSA_CPU_ATTENTION_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_ATTENTION_CHUNK_INL_H_
#undef MSA_CPU_ATTENTION_CHUNK_INL_H_
#else
#define MSA_CPU_ATTENTION_CHUNK_INL_H_
#endif

#include <optional>

#include "src/cpu/attention-inl.h"
#include "src/cpu/attention_amx-inl.h"
#include "src/cpu/attention_bf16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

template <class ChunkClass>
struct ChunkType {
  using Chunk = ChunkClass;
};

/// Calls body(ChunkType<C>()) with the class C that takes the input on this instruction set, within AmxTiles where it
/// needs them.
template <class Body>
HWY_ATTR void with_chunk_of([[maybe_unused]] const AttentionInput& input, const Body& body) {
#if HWY_TARGET == HWY_AVX3
  if (input.multiply_bf16 != nullptr) {
    std::optional<AmxTiles> tiles;
    if (input.needs_amx_tiles) tiles.emplace();
    if (input.shape.has_tiles) {
      body(ChunkType<AmxChunkAttention>());
    } else {
      body(ChunkType<Bf16ChunkAttention>());
    }
    return;
  }
#endif
  body(ChunkType<ChunkAttention>());
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_ATTENTION_CHUNK_INL_H_
