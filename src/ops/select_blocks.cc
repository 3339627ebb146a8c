// SPDX-License-Identifier: Apache-2.0
// Front door of block selection, by the index branch and by the oracle: validate, choose a backend, call it.
#include "msa/select_blocks.h"

#include "src/cpu/operators.h"
#include "src/ops/validate.h"
#include "src/reference/operators.h"

namespace msa {
namespace {

void check_output(const ops::Validator& check, const TensorView& blocks, std::int64_t kv_heads, std::int64_t query_rows,
                  std::int64_t topk) {
  check.check_layout("blocks", blocks, 3);
  check.check_dtype("blocks", blocks, DType::kInt32);
  check.check_size("blocks", blocks, 0, kv_heads, "kv_heads");
  check.check_size("blocks", blocks, 1, query_rows, "the query rows");
  check.check_size("blocks", blocks, 2, topk, "topk");
}

}  // namespace

void select_blocks(const Context& context, const SelectBlocksParams& params, const TensorView& blocks) {
  const ops::Validator check("select_blocks");
  check.check_block_size(params.block_size);
  check.check_topk(params.topk);
  check.check_forced(params.local_blocks, params.init_blocks);
  check.check_layout("q_idx", params.q_idx, 3);
  check.check_float("q_idx", params.q_idx);
  if (params.q_idx.size(1) < 1) check.fail("q_idx", describe(params.q_idx) + " must have at least one head");
  check.check_head_dim("q_idx", params.q_idx, 2);
  check.check_keys("k_idx", params.k_idx, params.batch, false);
  check.check_key_dtype("k_idx", params.k_idx, "q_idx", params.q_idx);
  check.check_size("k_idx", params.k_idx, params.k_idx.rank - 1, params.q_idx.size(2), "index_dim of q_idx");
  check.check_batch(params.batch, params.q_idx.size(0), "k_idx", params.k_idx, params.block_size);
  check_output(check, blocks, params.q_idx.size(1), params.q_idx.size(0), params.topk);
  ops::dispatch(
      context, [&] { reference::select_blocks(context, params, blocks); },
      [&] { cpu::select_blocks(context, params, blocks); });
}

void select_blocks_oracle(const Context& context, const OracleBlocksParams& params, const TensorView& blocks) {
  const ops::Validator check("select_blocks_oracle");
  check.check_block_size(params.block_size);
  check.check_topk(params.topk);
  check.check_forced(params.local_blocks, params.init_blocks);
  check.check_scale("scale", params.scale);
  const std::int64_t kv_heads = check.check_queries_and_keys(params.q, params.k, params.batch);
  check.check_batch(params.batch, params.q.size(0), "k", params.k, params.block_size);
  check_output(check, blocks, kv_heads, params.q.size(0), params.topk);
  OracleBlocksParams resolved = params;
  resolved.scale = ops::resolve_scale(params.scale, params.q.size(2));
  ops::dispatch(
      context, [&] { reference::select_blocks_oracle(context, resolved, blocks); },
      [&] { cpu::select_blocks_oracle(context, resolved, blocks); });
}

}  // namespace msa
