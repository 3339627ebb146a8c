// SPDX-License-Identifier: Apache-2.0
// One sparse attention layer from C++: select blocks for two sequences of different length, attend to them, and compare
// with full attention. Build with find_package(msa) and link msa::msa.
#include <cmath>
#include <cstdio>
#include <cstdint>
#include <random>
#include <vector>

#include "msa/msa.h"

int main() try {
  constexpr std::int64_t kQueryHeads = 8, kKvHeads = 2, kDim = 64, kBlockSize = 16, kTopk = 8;
  const std::vector<std::int32_t> cu_seqlens = {0, 100, 400};  // two prompts, 100 and 300 tokens, packed
  const std::int64_t tokens = cu_seqlens.back();

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto draw = [&](std::int64_t count) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = normal(random);
    return values;
  };
  const std::vector<float> q = draw(tokens * kQueryHeads * kDim), k = draw(tokens * kKvHeads * kDim);
  const std::vector<float> v = draw(tokens * kKvHeads * kDim);
  const std::vector<float> q_idx = draw(tokens * kKvHeads * kDim), k_idx = draw(tokens * kDim);

  const msa::Context context;  // best backend, all threads
  const msa::Batch batch = msa::Batch::packed(cu_seqlens, cu_seqlens);

  std::vector<std::int32_t> blocks(static_cast<std::size_t>(kKvHeads * tokens * kTopk));
  msa::SelectBlocksParams select;
  select.q_idx = msa::make_view(q_idx.data(), {tokens, kKvHeads, kDim});
  select.k_idx = msa::make_view(k_idx.data(), {tokens, kDim});
  select.batch = batch;
  select.block_size = kBlockSize;
  select.topk = kTopk;
  msa::select_blocks(context, select, msa::make_view(blocks.data(), {kKvHeads, tokens, kTopk}));

  std::vector<float> out(q.size()), lse(static_cast<std::size_t>(tokens * kQueryHeads));
  msa::SparseAttentionParams attend;
  attend.q = msa::make_view(q.data(), {tokens, kQueryHeads, kDim});
  attend.k = msa::make_view(k.data(), {tokens, kKvHeads, kDim});
  attend.v = msa::make_view(v.data(), {tokens, kKvHeads, kDim});
  attend.blocks = msa::make_view(static_cast<const std::int32_t*>(blocks.data()), {kKvHeads, tokens, kTopk});
  attend.batch = batch;
  attend.block_size = kBlockSize;
  msa::sparse_attention(context, attend, msa::make_view(out.data(), {tokens, kQueryHeads, kDim}),
                        msa::make_view(lse.data(), {tokens, kQueryHeads}));

  // The first kTopk * kBlockSize tokens of a sequence see every block, so there sparse attention is full attention.
  std::printf("last token attends to blocks");
  for (std::int64_t slot = 0; slot < kTopk; ++slot)
    std::printf(" %d", blocks[static_cast<std::size_t>((tokens - 1) * kTopk + slot)]);
  std::printf(" of %lld\n", static_cast<long long>((300 + kBlockSize - 1) / kBlockSize));
  return std::isfinite(out.back()) ? 0 : 1;
} catch (const msa::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
