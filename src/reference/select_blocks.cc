// SPDX-License-Identifier: Apache-2.0
// Block selection and its oracle, as SPEC section 2 puts them: a score a visible block, forced blocks first, then the
// highest scores. Tested in tests/unit/select_blocks_test.cc.
#include "msa/select_blocks.h"

#include "src/reference/choose_blocks.h"
#include "src/reference/operators.h"
#include "src/reference/rows.h"

namespace msa::reference {
namespace {

void write_block(const TensorView& blocks, std::int64_t group, std::int64_t row, std::int64_t slot, std::int64_t id) {
  const auto value = static_cast<std::int32_t>(id);
  const std::int64_t offset = group * blocks.stride(0) + row * blocks.stride(1) + slot;
  std::memcpy(blocks.data + offset * static_cast<std::int64_t>(sizeof value), &value, sizeof value);
}

/// -1 everywhere: unused tails and padding rows stay so.
void clear(const TensorView& blocks) {
  for (std::int64_t group = 0; group < blocks.size(0); ++group) {
    for (std::int64_t row = 0; row < blocks.size(1); ++row) {
      for (std::int64_t slot = 0; slot < blocks.size(2); ++slot) write_block(blocks, group, row, slot, -1);
    }
  }
}

void write_chosen(const TensorView& blocks, std::int64_t group, std::int64_t row,
                  const std::vector<std::int64_t>& chosen) {
  for (std::size_t i = 0; i < chosen.size(); ++i)
    write_block(blocks, group, row, static_cast<std::int64_t>(i), chosen[i]);
}

/// M[r,p,b] = max over the visible tokens j of block b of <q_idx[p,r], k_idx[j]>, for every visible block. A NaN token
/// counts below every number, so the block is NaN only when all its visible tokens are.
Row read_block_scores(const Row& q_idx, const Keys& keys, const Query& query, std::int64_t block_size) {
  Row scores(static_cast<std::size_t>(query.position / block_size + 1), std::numeric_limits<double>::quiet_NaN());
  for (std::int64_t j = 0; j <= query.position; ++j) {
    const double score = dot(q_idx, keys.read(query.sequence, j));
    double& best = scores[static_cast<std::size_t>(j / block_size)];
    if (std::isnan(best) || score > best) best = score;
  }
  return scores;
}

}  // namespace

void select_blocks(const Context&, const SelectBlocksParams& params, const TensorView& blocks) {
  const Keys keys(params.k_idx, params.batch);
  clear(blocks);
  for_each_query(params.batch, [&](const Query& query) {
    for (std::int64_t group = 0; group < params.q_idx.size(1); ++group) {
      const Row q_idx = read_row(params.q_idx, query.row, group);
      const Row scores = read_block_scores(q_idx, keys, query, params.block_size);
      write_chosen(blocks, group, query.row,
                   choose_blocks(scores, params.topk, params.local_blocks, params.init_blocks));
    }
  });
}

void select_blocks_oracle(const Context&, const OracleBlocksParams& params, const TensorView& blocks) {
  const std::int64_t kv_heads = blocks.size(0);
  const std::int64_t group_size = params.q.size(1) / kv_heads;
  const Keys keys(params.k, params.batch);
  clear(blocks);
  for_each_query(params.batch, [&](const Query& query) {
    for (std::int64_t group = 0; group < kv_heads; ++group) {
      const Row mass = read_block_mass(params.q, keys, query, group, group_size, params.block_size, *params.scale);
      write_chosen(blocks, group, query.row, choose_blocks(mass, params.topk, params.local_blocks, params.init_blocks));
    }
  });
}

}  // namespace msa::reference
