// SPDX-License-Identifier: Apache-2.0
// Where a block budget is best spent. A mean over layers hides that retrieval hangs on a few heads: of some layer one
// query head looks far back for an answer, and blocks chosen for its group miss it. Each layer is therefore ranked by
// what the oracle (blocks of largest true attention mass) would let its most affected head see beyond what the index
// does, on the question and answer rows of synthetic retrieval documents; the first layers of the ranking get more
// blocks, or full attention. Tested in tests/unit/model_convert.cc.
#pragma once

#include <cstdint>
#include <vector>

#include "src/model/decoder.h"
#include "src/model/retrieval.h"

namespace msa::model {

struct LayerGain {
  std::int64_t layer = 0;
  double gain = 0;        ///< attention mass, of the head that gains most: oracle's minus index's, mean over rows
  std::int64_t head = 0;  ///< that head
};

struct RankOptions {
  double budget = 0.25;         ///< share of a document that both may select: small ones blame every layer
  std::int64_t max_rows = 256;  ///< rows of a document
};

/// The layers with an index branch, largest gain first (equal gains: lower layer first). One dense forward a document.
std::vector<LayerGain> rank_layers(const Decoder& decoder, const std::vector<RetrievalDocument>& documents,
                                   const RankOptions& options);

/// Gives the first `count` layers of the ranking `topk` blocks, or full attention when topk is 0. With `keep_budget`
/// the other layers get fewer, so that the mean over sparse layers stays (a layer of full attention is not in the
/// mean).
void spend_budget(files::ModelConfig& config, const std::vector<LayerGain>& ranking, std::int64_t count,
                  std::int64_t topk, bool keep_budget);

}  // namespace msa::model
