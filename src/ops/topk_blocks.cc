// SPDX-License-Identifier: Apache-2.0
// Front door of top-k alone: validate, choose a backend, call it.
#include <limits>

#include "msa/topk.h"
#include "src/cpu/operators.h"
#include "src/ops/validate.h"
#include "src/reference/operators.h"

namespace msa {

void topk_blocks(const Context& context, const TopkBlocksParams& params, const TensorView& ids) {
  const ops::Validator check("topk_blocks");
  check.check_topk(params.topk);
  check.check_layout("scores", params.scores, 2);
  check.check_dtype("scores", params.scores, DType::kFloat32);
  if (params.scores.size(1) > std::numeric_limits<std::int32_t>::max()) {
    check.fail("scores", describe(params.scores) + " has more blocks than an int32 id can name");
  }
  check.check_layout("ids", ids, 2);
  check.check_dtype("ids", ids, DType::kInt32);
  check.check_size("ids", ids, 0, params.scores.size(0), "the rows of scores");
  check.check_size("ids", ids, 1, params.topk, "topk");
  ops::dispatch(
      context, [&] { reference::topk_blocks(context, params, ids); }, [&] { cpu::topk_blocks(context, params, ids); });
}

}  // namespace msa
