// SPDX-License-Identifier: Apache-2.0
// Front door of top-k alone: validate, choose a backend, call it.
#include <limits>

#include "msa/topk.h"
#include "src/cpu/operators.h"
#include "src/cuda/operators.h"
#include "src/ops/device_call.h"
#include "src/ops/validate.h"
#include "src/reference/operators.h"

namespace msa {
namespace {

void check_params(const ops::Validator& check, const TopkBlocksParams& params) {
  check.check_topk(params.topk);
  check.check_layout("scores", params.scores, 2);
  check.check_dtype("scores", params.scores, DType::kFloat32);
  if (params.scores.size(1) > std::numeric_limits<std::int32_t>::max()) {
    check.fail("scores", describe(params.scores) + " has more blocks than an int32 id can name");
  }
}

}  // namespace

void topk_blocks(const Context& context, const TopkBlocksParams& params, const TensorView& ids) {
  const ops::Validator check("topk_blocks", context);
  check_params(check, params);
  check.check_layout("ids", ids, 2);
  check.check_dtype("ids", ids, DType::kInt32);
  check.check_size("ids", ids, 0, params.scores.size(0), "the rows of scores");
  check.check_size("ids", ids, 1, params.topk, "topk");
  ops::dispatch(
      context, [&] { reference::topk_blocks(context, params, ids); }, [&] { cpu::topk_blocks(context, params, ids); },
      [&] {
        const ops::DeviceCall call(check, context, cuda::topk_blocks_workspace(params), {});
        cuda::topk_blocks(call.context(), params, ids);
      });
}

std::size_t topk_blocks_workspace(const Context& context, const TopkBlocksParams& params) {
  const ops::Validator check("topk_blocks", context, ops::Validator::Reads::kShapes);
  check_params(check, params);
  return context.backend == Backend::kCuda ? ops::device_bytes(check, context, cuda::topk_blocks_workspace(params)) : 0;
}

}  // namespace msa
