// SPDX-License-Identifier: Apache-2.0
// What the two passes of attention's backward work on: the arguments of the sparse or the dense operator as one, and
// the key pass's tasks. See attention_backward-inl.h.
#pragma once

#include <cstdint>
#include <limits>

#include "msa/attention.h"

namespace msa::cpu {

struct BackwardProblem {
  ConstTensorView q, k, v;
  ConstTensorView blocks;  ///< empty: dense
  const Batch* batch = nullptr;
  float scale = 1;
  AttentionSaved saved;
  AttentionGrads grads;
};

/// What the query pass finds of a row and head, for both passes: P = weight e^(scale S - shift), dS = P ((dP - mean) +
/// lse_grad), in this order: a row that sees one key has dP = mean, and its dS is lse_grad to the last bit.
struct RowTerms {
  float shift = 0;     ///< the row's largest scaled score
  float weight = 0;    ///< 1 / sum of e^(scale S - shift)
  float mean = 0;      ///< rowsum(P dP)
  float lse_grad = 0;  ///< dlse
};

/// Running sums of a row in the query pass.
struct RowSums {
  double total = 0;     ///< of e^(score - largest)
  double weighted = 0;  ///< of e^(score - largest) dP
  float largest = -std::numeric_limits<float>::infinity();
};

/// Queries [begin, end) of the list of those that chose a key block. A block has one task, or several, of one split
/// each.
struct KeyTask {
  std::int32_t sequence = 0;
  std::int32_t kv_head = 0;
  std::int64_t block = 0;  ///< of the sequence
  std::int64_t begin = 0;
  std::int64_t end = 0;
  float* sum = nullptr;  ///< where a task that is a part of its block leaves its sum
};

/// The queries of a sequence that chose a block, ascending: an explicit list, or (dense) all from `first` on.
struct QueryList {
  const std::int32_t* ids = nullptr;
  std::int64_t first = 0;
  std::int64_t query(std::int64_t i) const { return ids != nullptr ? ids[i] : first + i; }
};

}  // namespace msa::cpu
