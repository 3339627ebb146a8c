// SPDX-License-Identifier: Apache-2.0
// Exact softmax attention of one row after the other, forward and backward, over whatever tokens row_support() says:
// the selected blocks or, with no blocks, the whole prefix (SPEC section 3). sparse_attention.cc and dense_attention.cc
// are the two ways in. Tested in tests/unit/sparse_attention_test.cc and dense_attention_test.cc.
#pragma once

#include "msa/attention.h"
#include "src/reference/rows.h"

namespace msa::reference {

/// Sums over many rows, kept in double until the last row is in.
class KeyGradients {
 public:
  explicit KeyGradients(const TensorView& tensor)
      : tensor_(tensor),
        heads_(tensor.rank == 3 ? tensor.size(1) : 1),
        rows_(static_cast<std::size_t>(tensor.size(0) * heads_),
              Row(static_cast<std::size_t>(tensor.size(tensor.rank - 1)), 0.0)) {}

  Row& at(const Batch& batch, std::int64_t sequence, std::int64_t position, std::int64_t head = 0) {
    const std::int64_t token = batch.cu_seqlens_k[static_cast<std::size_t>(sequence)] + position;
    return rows_[static_cast<std::size_t>(token * heads_ + head)];
  }

  /// Tokens that no query reached get zeros.
  void write_all() const {
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      const auto token = static_cast<std::int64_t>(i) / heads_;
      const auto head = static_cast<std::int64_t>(i) % heads_;
      for (std::size_t d = 0; d < rows_[i].size(); ++d) {
        const auto column = static_cast<std::int64_t>(d);
        if (tensor_.rank == 3) {
          write(tensor_, rows_[i][d], token, head, column);
        } else {
          write(tensor_, rows_[i][d], token, column);
        }
      }
    }
  }

 private:
  TensorView tensor_;
  std::int64_t heads_;
  std::vector<Row> rows_;
};

/// out[h] = sum_j p_j v_j and lse[h] = ln sum_j exp(scale <q_h, k_j>), p the softmax over the support.
inline void attend(const SparseAttentionParams& params, const TensorView& out, const TensorView& lse) {
  const Keys keys(params.k, params.batch);
  const Keys values(params.v, params.batch);
  const std::int64_t kv_heads = params.k.size(params.k.rank - 2);
  const std::int64_t group_size = params.q.size(1) / kv_heads;
  fill(out, 0);
  fill(lse, -kInfinity);
  for_each_query(params.batch, [&](const Query& query) {
    for (std::int64_t head = 0; head < params.q.size(1); ++head) {
      const std::int64_t group = head / group_size;
      const auto support = row_support(params.blocks, params.block_size, group, query);
      const Row q = read_row(params.q, query.row, head);
      const Softmax p = softmax(read_scores(q, keys, query, group, support, *params.scale));
      Row sum(static_cast<std::size_t>(out.size(2)), 0.0);
      for (std::size_t i = 0; i < support.size(); ++i) {
        add_scaled(sum, p.probabilities[i], values.read(query.sequence, support[i], group));
      }
      write_row(out, sum, query.row, head);
      write(lse, p.lse, query.row, head);
    }
  });
}

/// With dp_j = <dout, v_j> the gradient of the score s_j is ds_j = p_j (dp_j - sum_i p_i dp_i + dlse), because the
/// gradient of lse in s_j is p_j. Probabilities are computed afresh rather than from the saved float32 lse.
inline void attend_backward(const SparseAttentionParams& params, const AttentionSaved& saved,
                            const AttentionGrads& grads) {
  const Batch& batch = params.batch;
  const Keys keys(params.k, batch);
  const Keys values(params.v, batch);
  const double scale = *params.scale;
  const std::int64_t group_size = params.q.size(1) / params.k.size(1);
  KeyGradients dk(grads.dk);
  KeyGradients dv(grads.dv);
  fill(grads.dq, 0);
  for_each_query(batch, [&](const Query& query) {
    for (std::int64_t head = 0; head < params.q.size(1); ++head) {
      const std::int64_t group = head / group_size;
      const auto support = row_support(params.blocks, params.block_size, group, query);
      const Row q = read_row(params.q, query.row, head);
      const Row dout = read_row(saved.dout, query.row, head);
      double dlse = 0;
      if (!saved.dlse.empty()) {
        dlse = core::load_element(saved.dlse.data, saved.dlse.dtype,
                                  query.row * saved.dlse.stride(0) + head * saved.dlse.stride(1));
      }
      const Softmax p = softmax(read_scores(q, keys, query, group, support, scale));
      Row dp;
      for (const std::int64_t j : support) dp.push_back(dot(dout, values.read(query.sequence, j, group)));
      const double mean = dot(p.probabilities, dp);
      Row dq(q.size(), 0.0);
      for (std::size_t i = 0; i < support.size(); ++i) {
        const double ds = p.probabilities[i] * (dp[i] - mean + dlse);
        add_scaled(dq, scale * ds, keys.read(query.sequence, support[i], group));
        add_scaled(dk.at(batch, query.sequence, support[i], group), scale * ds, q);
        add_scaled(dv.at(batch, query.sequence, support[i], group), p.probabilities[i], dout);
      }
      write_row(grads.dq, dq, query.row, head);
    }
  });
  dk.write_all();
  dv.write_all();
}

}  // namespace msa::reference
