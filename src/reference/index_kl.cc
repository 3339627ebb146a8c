// SPDX-License-Identifier: Apache-2.0
// The KL loss that aligns the index branch with the main branch (SPEC section 4), and its gradient in the index branch:
// the teacher is detached. Tested in tests/unit/index_kl_test.cc.
#include "msa/index_kl.h"

#include "src/reference/attention_rows.h"
#include "src/reference/operators.h"
#include "src/reference/rows.h"

namespace msa::reference {
namespace {

/// Teacher P and student Q of one (query, group) row over its support.
struct Distributions {
  Row teacher;
  Row lse_main;             // one a head of the group
  double teacher_norm = 0;  // what the heads' mass is divided by
  Row student;
  double lse_index = -kInfinity;
};

Distributions read_distributions(const IndexKlParams& params, const Query& query, std::int64_t group,
                                 const std::vector<std::int64_t>& support) {
  const Keys keys(params.k, params.batch);
  const Keys index_keys(params.k_idx, params.batch);
  const std::int64_t group_size = params.q.size(1) / params.q_idx.size(1);
  Distributions row;
  Row mass(support.size(), 0.0);  // sum or max of the heads' probabilities
  for (std::int64_t head = group * group_size; head < (group + 1) * group_size; ++head) {
    const Row q = read_row(params.q, query.row, head);
    const Softmax p = softmax(read_scores(q, keys, query, group, support, *params.scale));
    row.lse_main.push_back(p.lse);
    for (std::size_t j = 0; j < support.size(); ++j) {
      if (params.teacher == Teacher::kMean) {
        mass[j] += p.probabilities[j];
      } else {
        mass[j] = mass[j] > p.probabilities[j] ? mass[j] : p.probabilities[j];
      }
    }
  }
  if (params.teacher == Teacher::kMean) {
    row.teacher_norm = static_cast<double>(group_size);
  } else {
    for (const double m : mass) row.teacher_norm += m;
  }
  for (const double m : mass) row.teacher.push_back(m / row.teacher_norm);

  const Row q_idx = read_row(params.q_idx, query.row, group);
  Softmax student = softmax(read_scores(q_idx, index_keys, query, 0, support, *params.index_scale));
  row.student = std::move(student.probabilities);
  row.lse_index = student.lse;
  return row;
}

/// T * kv_heads: every packed query counts, with or without blocks.
double count_rows(const IndexKlParams& params) {
  return static_cast<double>(core::total_queries(params.batch) * params.q_idx.size(1));
}

}  // namespace

float index_kl(const Context&, const IndexKlParams& params, const IndexKlSaved& saved) {
  const std::int64_t kv_heads = params.q_idx.size(1);
  const std::int64_t group_size = params.q.size(1) / kv_heads;
  fill(saved.lse_main, -kInfinity);
  fill(saved.lse_index, -kInfinity);
  fill(saved.teacher_norm, 0);
  double sum = 0;
  for_each_query(params.batch, [&](const Query& query) {
    for (std::int64_t group = 0; group < kv_heads; ++group) {
      const auto support = row_support(params.blocks, params.block_size, group, query);
      if (support.empty()) continue;
      const Distributions row = read_distributions(params, query, group, support);
      for (std::size_t j = 0; j < support.size(); ++j) {
        if (row.teacher[j] == 0) continue;  // p log p -> 0
        sum += row.teacher[j] * std::log(row.teacher[j] / row.student[j]);
      }
      for (std::int64_t i = 0; i < group_size; ++i) {
        write(saved.lse_main, row.lse_main[static_cast<std::size_t>(i)], query.row, group * group_size + i);
      }
      write(saved.lse_index, row.lse_index, query.row, group);
      write(saved.teacher_norm, row.teacher_norm, query.row, group);
    }
  });
  return core::total_queries(params.batch) == 0 ? 0.0f : static_cast<float>(sum / count_rows(params));
}

/// dL/dlogit = (Q - P) / (T * kv_heads), logit = index_scale * <q_idx, k_idx>. The saved values are computed afresh.
void index_kl_backward(const Context&, const IndexKlParams& params, const IndexKlSaved&, float grad_output,
                       const TensorView& dq_idx, const TensorView& dk_idx) {
  const Keys index_keys(params.k_idx, params.batch);
  KeyGradients dk(dk_idx);
  fill(dq_idx, 0);
  for_each_query(params.batch, [&](const Query& query) {
    for (std::int64_t group = 0; group < params.q_idx.size(1); ++group) {
      const auto support = row_support(params.blocks, params.block_size, group, query);
      if (support.empty()) continue;
      const Distributions row = read_distributions(params, query, group, support);
      const Row q_idx = read_row(params.q_idx, query.row, group);
      Row dq(q_idx.size(), 0.0);
      for (std::size_t j = 0; j < support.size(); ++j) {
        const double dlogit = grad_output * (row.student[j] - row.teacher[j]) / count_rows(params);
        const double factor = dlogit * *params.index_scale;
        add_scaled(dq, factor, index_keys.read(query.sequence, support[j]));
        add_scaled(dk.at(params.batch, query.sequence, support[j]), factor, q_idx);
      }
      write_row(dq_idx, dq, query.row, group);
    }
  });
  dk.write_all();
}

}  // namespace msa::reference
