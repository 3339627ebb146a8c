// SPDX-License-Identifier: Apache-2.0
// See attention.h.
#include "src/cpu/attention.h"

#include <algorithm>
#include <limits>

#include "src/core/layout.h"
#include "src/core/threads.h"

namespace msa::cpu {

namespace {

bool fits_bf16_dots(const AttentionInput& input) {
  // Every float8 number is a bf16 number.
  const auto fits = [](const ConstTensorView& keys) {
    return keys.dtype == DType::kBFloat16 || keys.dtype == DType::kFloat8E4M3;
  };
  return input.q.dtype == DType::kBFloat16 && input.out.dtype == DType::kBFloat16 && fits(input.k) && fits(input.v);
}

}  // namespace

bool fits_tiles(const AttentionInput& input) {
  // The fused kernel takes the maximum before the scale.
  return fits_bf16_dots(input) && active_dot_products() == DotProducts::kAmx && input.scale > 0 &&
         input.scale < 0x1p127f;
}

void plan_input(const std::string& op, const Context& context, std::int64_t block_size, AttentionInput& input) {
  AttentionShape& shape = input.shape;
  shape.queries = count_queries(input.batch);
  shape.kv_heads = input.k.size(input.k.rank - 2);
  shape.group_size = input.q.size(1) / shape.kv_heads;
  shape.head_dim = input.q.size(2);
  shape.value_dim = input.v.size(input.v.rank - 1);
  shape.block_size = block_size;
  shape.topk = input.blocks.empty() ? 0 : input.blocks.size(2);
  if (fits_bf16_dots(input)) {
    input.multiply_bf16 = active_bf16_kernel();
    input.needs_amx_tiles = active_dot_products() == DotProducts::kAmx;
    shape.has_bf16_dots = input.multiply_bf16 != nullptr;
    shape.has_tiles = fits_tiles(input);
  }
  input.plan = plan_attention(op, shape, core::resolve_threads(context.threads), context.workspace_limit);
  input.layout = lay_out_attention(shape, input.plan.chunk);
}

void clear_padding_rows(const AttentionInput& input) {
  const auto element = static_cast<std::int64_t>(dtype_size(input.out.dtype));
  auto* lse = reinterpret_cast<float*>(input.lse.data);
  for (std::int64_t row = core::total_queries(input.batch); row < input.out.size(0); ++row) {
    for (std::int64_t head = 0; head < input.out.size(1); ++head) {
      std::byte* out = input.out.data + (row * input.out.stride(0) + head * input.out.stride(1)) * element;
      std::fill(out, out + input.out.size(2) * element, std::byte{0});  // all bits 0 are 0 in every storage type
      lse[row * input.lse.stride(0) + head * input.lse.stride(1)] = -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace msa::cpu
