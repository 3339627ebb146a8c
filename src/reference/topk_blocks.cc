// SPDX-License-Identifier: Apache-2.0
// Top-k of given scores: SPEC section 2, rules 2 to 4, no block forced. Tested in tests/unit/topk_blocks_test.cc.
#include "msa/topk.h"

#include <cstring>

#include "src/reference/choose_blocks.h"
#include "src/reference/operators.h"
#include "src/reference/rows.h"

namespace msa::reference {

void topk_blocks(const Context&, const TopkBlocksParams& params, const TensorView& ids) {
  for (std::int64_t row = 0; row < params.scores.size(0); ++row) {
    const std::byte* scores =
        params.scores.data + row * params.scores.stride(0) * static_cast<std::int64_t>(sizeof(float));
    const std::vector<std::int64_t> chosen =
        choose_blocks(read_row(scores, DType::kFloat32, params.scores.size(1)), params.topk, 0, 0);
    for (std::int64_t slot = 0; slot < params.topk; ++slot) {
      const auto i = static_cast<std::size_t>(slot);
      const auto id = static_cast<std::int32_t>(i < chosen.size() ? chosen[i] : -1);
      std::memcpy(ids.data + (row * ids.stride(0) + slot) * static_cast<std::int64_t>(sizeof id), &id, sizeof id);
    }
  }
}

}  // namespace msa::reference
