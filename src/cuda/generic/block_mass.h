// SPDX-License-Identifier: Apache-2.0
// What ranks blocks by the main branch's own probability mass, for every geometry and dtype (SPEC section 4): plans and
// entry points of select_blocks_oracle and selection_recall on the CUDA backend's generic path. How it works:
// block_mass.cuh, docs/cuda-generic.md. Tested in tests/cuda/generic_select_test.cc.
#pragma once

#include <cstddef>

#include "msa/index_kl.h"
#include "msa/select_blocks.h"
#include "src/cuda/generic/attention.h"
#include "src/cuda/generic/select_blocks.h"

namespace msa::cuda::generic {

/// The recalls of one (query, group) row.
struct RecallRow {
  double block_recall;
  double score_recall;
  std::int64_t counts;  ///< 1: the row has more than topk visible blocks
};

/// The members of `select` that the oracle shares with select_blocks, plus the heads' log-sum-exps.
struct BlockMassArgs {
  SelectArgs select;  ///< blocks: the oracle's output; the recall does not use it
  int kv_heads = 1;
  int group_size = 1;
  float scale = 1;
  Rows lse;                          ///< [Tq, query_heads]
  BlockIds selected;                 ///< recall: what is judged
  RecallRow* row_recalls = nullptr;  ///< recall: [Tq, kv_heads]
};

struct RecallSumArgs {
  const RecallRow* row_recalls = nullptr;
  BatchPointers batch;
  int kv_heads = 1;
  float* recalls = nullptr;
  std::int64_t* rows = nullptr;
};

struct BlockMassPlan {
  AttendPlan lse;
  BlockMassArgs args;
  LaunchShape shape;
  RecallSumArgs sum_args;
  LaunchShape sum;
};

/// The heads' log-sum-exps: 4 Tq query_heads, rounded up to 256.
std::size_t select_blocks_oracle_workspace(const OracleBlocksParams& params);
/// Those and 24 bytes a row: Tq kv_heads.
std::size_t selection_recall_workspace(const SelectionRecallParams& params);
BlockMassPlan plan_select_blocks_oracle(const OracleBlocksParams& params, void* workspace, const TensorView& blocks);
BlockMassPlan plan_selection_recall(const SelectionRecallParams& params, void* workspace, float* recalls,
                                    std::int64_t* rows);

// Entry points: as in src/cuda/operators.h; recalls [2] and rows are device memory.
void select_blocks_oracle(void* stream, void* workspace, const OracleBlocksParams& params, const TensorView& blocks);
void selection_recall(void* stream, void* workspace, const SelectionRecallParams& params, float* recalls,
                      std::int64_t* rows);

}  // namespace msa::cuda::generic
