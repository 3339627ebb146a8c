// SPDX-License-Identifier: Apache-2.0
// What sparse_attention and dense_attention share outside the vector code: their input in one form, and its plan.
#pragma once

#include <cstdint>
#include <string>

#include "msa/batch.h"
#include "msa/context.h"
#include "msa/tensor.h"
#include "src/cpu/bf16_dot.h"
#include "src/cpu/plan.h"

namespace msa::cpu {

struct AttentionInput {
  ConstTensorView q;       ///< [Tq, query_heads, head_dim]
  ConstTensorView k;       ///< [Tk, kv_heads, head_dim] or pages
  ConstTensorView v;       ///< [Tk, kv_heads, value_dim] or pages
  ConstTensorView blocks;  ///< int32 [kv_heads, Tq, topk]; empty: dense
  Batch batch;
  float scale = 1;
  Bf16Kernel multiply_bf16 = nullptr;  ///< set when shape.has_bf16_dots
  bool needs_amx_tiles = false;        ///< of the thread that calls multiply_bf16
  TensorView out;                      ///< [Tq, query_heads, value_dim]
  TensorView lse;                      ///< float32 [Tq, query_heads]
  AttentionShape shape;
  ChunkPlan plan;
  AttentionLayout layout;  ///< of a chunk of plan.chunk queries
};

/// Whether the fused kernel on AMX tiles (attention_amx.h) takes the tensors, on the instruction set in use.
bool fits_tiles(const AttentionInput& input);

/// Fills shape, plan and layout from the tensors.
void plan_input(const std::string& op, const Context& context, std::int64_t block_size, AttentionInput& input);

/// out 0 and lse -inf in the rows behind the last sequence.
void clear_padding_rows(const AttentionInput& input);

/// What follows a block: whatever it reads may be asked for while the block is computed.
struct NextBlock {
  std::int64_t block = -1;                ///< -1: none
  const std::uint64_t* visits = nullptr;  ///< [count] of it (sparse_visits.h); null: not known
  std::int64_t count = 0;
};

}  // namespace msa::cpu
