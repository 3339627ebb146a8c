// SPDX-License-Identifier: Apache-2.0
// Front door of block selection, by the index branch and by the oracle: validate, choose a backend, call it.
#include "msa/select_blocks.h"

#include "src/cpu/operators.h"
#include "src/cuda/operators.h"
#include "src/ops/device_call.h"
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

void check_select(const ops::Validator& check, const SelectBlocksParams& params) {
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
}

/// Returns the parameters with their scale filled in.
OracleBlocksParams check_oracle(const ops::Validator& check, const OracleBlocksParams& params) {
  check.check_block_size(params.block_size);
  check.check_topk(params.topk);
  check.check_forced(params.local_blocks, params.init_blocks);
  check.check_scale("scale", params.scale);
  check.check_queries_and_keys(params.q, params.k, params.batch);
  check.check_batch(params.batch, params.q.size(0), "k", params.k, params.block_size);
  OracleBlocksParams resolved = params;
  resolved.scale = ops::resolve_scale(params.scale, params.q.size(2));
  return resolved;
}

}  // namespace

void select_blocks(const Context& context, const SelectBlocksParams& params, const TensorView& blocks) {
  const ops::Validator check("select_blocks", context);
  check_select(check, params);
  check_output(check, blocks, params.q_idx.size(1), params.q_idx.size(0), params.topk);
  ops::dispatch(
      context, [&] { reference::select_blocks(context, params, blocks); },
      [&] { cpu::select_blocks(context, params, blocks); },
      [&] {
        const ops::DeviceCall call(check, context, cuda::select_blocks_workspace(params, ops::operator_limit(context)),
                                   {&params.batch, params.q_idx.size(0), "k_idx", params.k_idx, {}, 0});
        cuda::select_blocks(call.context(), params, blocks);
      });
}

std::size_t select_blocks_workspace(const Context& context, const SelectBlocksParams& params) {
  const ops::Validator check("select_blocks", context, ops::Validator::Reads::kShapes);
  check_select(check, params);
  return context.backend == Backend::kCuda
             ? ops::device_bytes(check, context, cuda::select_blocks_workspace(params, ops::operator_limit(context)))
             : 0;
}

void select_blocks_oracle(const Context& context, const OracleBlocksParams& params, const TensorView& blocks) {
  const ops::Validator check("select_blocks_oracle", context);
  const OracleBlocksParams resolved = check_oracle(check, params);
  check_output(check, blocks, params.k.size(params.k.rank - 2), params.q.size(0), params.topk);
  ops::dispatch(
      context, [&] { reference::select_blocks_oracle(context, resolved, blocks); },
      [&] { cpu::select_blocks_oracle(context, resolved, blocks); },
      [&] {
        const ops::DeviceCall call(check, context, cuda::select_blocks_oracle_workspace(resolved),
                                   {&resolved.batch, resolved.q.size(0), "k", resolved.k, {}, 0});
        cuda::select_blocks_oracle(call.context(), resolved, blocks);
      });
}

std::size_t select_blocks_oracle_workspace(const Context& context, const OracleBlocksParams& params) {
  const ops::Validator check("select_blocks_oracle", context, ops::Validator::Reads::kShapes);
  const OracleBlocksParams resolved = check_oracle(check, params);
  return context.backend == Backend::kCuda
             ? ops::device_bytes(check, context, cuda::select_blocks_oracle_workspace(resolved))
             : 0;
}

}  // namespace msa
