// SPDX-License-Identifier: Apache-2.0
// Runs the operators of a backend, forward and backward, on data of the host: what the checks of conformance.h compare.
#pragma once

#include <cstdint>
#include <vector>

#include "msa/context.h"
#include "msa/index_kl.h"
#include "src/conformance/naive.h"

namespace msa::conformance {

/// What one backend wrote, widened to float: equal bits stay equal, different ones different. Empty: not run.
struct Outputs {
  std::vector<float> out, lse, dq, dk, dv;
  std::vector<float> lse_main, lse_index, dq_idx, dk_idx;
  float kl = 0;
  SelectionRecall recall;
};

/// Attention over the blocks of `in` (sparse) or the whole prefix, and the KL loss of the same, with all gradients; the
/// recalls of the blocks. `page` > 0: keys lie in shuffled pages of so many tokens, and gradients are left out.
Outputs run_attention(const Context& context, const NaiveInputs& in, bool sparse, std::int64_t page = 0);

/// The recalls alone.
SelectionRecall run_recall(const Context& context, const NaiveInputs& in);

/// int32 [kv_heads, queries, topk], by the index branch, and by the main branch's own mass.
std::vector<std::int32_t> run_select(const Context& context, const NaiveInputs& in, std::int64_t page = 0);
std::vector<std::int32_t> run_oracle(const Context& context, const NaiveInputs& in, std::int64_t page = 0);

/// int32 [rows, topk] of scores [rows, blocks].
std::vector<std::int32_t> run_topk(const Context& context, const std::vector<float>& scores, std::int64_t blocks,
                                   std::int64_t topk);

}  // namespace msa::conformance
