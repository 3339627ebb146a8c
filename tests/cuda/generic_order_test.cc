// SPDX-License-Identifier: Apache-2.0
// No generic kernel depends on the order in which a device happens to run blocks and threads: every result is the same
// bit for bit whichever comes first.
#include <gtest/gtest.h>

#include "tests/cuda/generic_support.h"

namespace msa::testing {
namespace {

using cuda::emulator::BlockOrder;

std::vector<Tensor> run_everything(const Problem& problem) {
  const Tensor dout = make_dout(problem);
  const Tensor dlse = make_dlse(problem);
  std::vector<Tensor> all;
  all.push_back(generic_select(problem.select_params()));
  all.push_back(generic_oracle(problem.oracle_params()));
  for (const bool dense : {false, true}) {
    const SparseAttentionParams params = dense ? over_whole_prefix(problem.dense_params()) : problem.sparse_params();
    const AttentionResult forward = generic_attention(params);
    AttentionGradients grads = generic_attention_backward(params, forward, dout, &dlse);
    all.insert(all.end(), {forward.out, forward.lse, grads.dq, grads.dk, grads.dv});
    KlResult kl = generic_kl(problem.kl_params(dense));
    KlGradients kl_grads = generic_kl_backward(problem.kl_params(dense), kl, 1);
    Tensor value(DType::kFloat32, {1});
    value.set(kl.value, 0);
    all.insert(all.end(), {value, kl.lse_main, kl.lse_index, kl.teacher_norm, kl_grads.dq_idx, kl_grads.dk_idx});
  }
  return all;
}

TEST(GenericOrder, BlocksAndThreadsMayRunInAnyOrder) {
  Case c{{6, 2, 32, 48, 16, 16, 2}, {{12, 75}, {0, 4}, {17, 17}, {1, 130}}, DType::kBFloat16, DType::kBFloat16};
  c.padding_rows = 2;
  const Problem problem(c);
  const std::vector<Tensor> usual = run_everything(problem);
  for (const BlockOrder order : {BlockOrder::kAscending, BlockOrder::kDescending, BlockOrder::kShuffled}) {
    for (const bool reverse_threads : {false, true}) {
      cuda::emulator::Options options;
      options.block_order = order;
      options.reverse_threads = reverse_threads;
      const cuda::emulator::WithOptions with(options);
      const std::vector<Tensor> now = run_everything(problem);
      for (std::size_t i = 0; i < usual.size(); ++i) expect_same_bytes("tensor " + std::to_string(i), now[i], usual[i]);
    }
  }
}

}  // namespace
}  // namespace msa::testing
