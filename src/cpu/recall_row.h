// SPDX-License-Identifier: Apache-2.0
// The recalls of one (query, group) row, before they are averaged; see selection_recall-inl.h.
#pragma once

namespace msa::cpu {

struct RecallRow {
  double block_recall = 0;
  double score_recall = 0;
  bool counts = false;  ///< the row has more visible blocks than topk
};

}  // namespace msa::cpu
