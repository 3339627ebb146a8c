// SPDX-License-Identifier: Apache-2.0
// See tolerance.h. The naive implementations share the reference's walk over rows and tokens, and none of its
// arithmetic.
#include "tests/unit/support/tolerance.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "src/core/float_convert.h"
#include "src/reference/rows.h"

namespace msa::testing {
namespace {

using reference::Query;
using Floats = std::vector<float>;

Floats to_floats(const reference::Row& row) { return {row.begin(), row.end()}; }

float dot_float(const Floats& a, const Floats& b) {
  float sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

struct NaiveSoftmax {
  Floats scores;
  Floats p;
  float lse = -std::numeric_limits<float>::infinity();
};

NaiveSoftmax naive_softmax(const Floats& q, const reference::Keys& keys, const Query& query, std::int64_t head,
                           const std::vector<std::int64_t>& support, double scale, DType storage) {
  NaiveSoftmax result;
  if (support.empty()) return result;
  float largest = -std::numeric_limits<float>::infinity();
  for (const std::int64_t j : support) {
    const float score = dot_float(q, to_floats(keys.read(query.sequence, j, head))) * static_cast<float>(scale);
    result.scores.push_back(round_to(storage, score));
    largest = std::max(largest, result.scores.back());
  }
  float sum = 0;
  for (const float score : result.scores) sum += std::exp(score - largest);
  for (const float score : result.scores) result.p.push_back(round_to(storage, std::exp(score - largest) / sum));
  result.lse = largest + std::log(sum);
  return result;
}

double resolve(const std::optional<double>& scale, std::int64_t dim) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(dim));
}

// Sums over rows in float32, for a tensor [tokens, heads, dim] or [tokens, dim].
class Sums {
 public:
  explicit Sums(const ConstTensorView& like)
      : shape_(like.shape.begin(), like.shape.begin() + like.rank),
        heads_(like.rank == 3 ? like.size(1) : 1),
        values_(static_cast<std::size_t>(like.elements()), 0.0f) {}

  void add(const Floats& row, float factor, std::int64_t token, std::int64_t head) {
    float* sum = values_.data() + (token * heads_ + head) * static_cast<std::int64_t>(row.size());
    for (std::size_t d = 0; d < row.size(); ++d) sum[d] += factor * row[d];
  }

  /// Rounded to the storage type.
  Tensor round(DType dtype) const {
    Tensor result(DType::kFloat32, shape_, Layout::kContiguous);
    if (!values_.empty()) std::memcpy(result.view().data, values_.data(), values_.size() * sizeof(float));
    return result.as(dtype);
  }

 private:
  std::vector<std::int64_t> shape_;
  std::int64_t heads_;
  Floats values_;
};

struct NaiveRow {
  Floats teacher;
  float norm = 0;
  Floats lse_main;
  NaiveSoftmax student;
};

NaiveRow naive_distributions(const IndexKlParams& params, const Query& query, std::int64_t group,
                             const std::vector<std::int64_t>& support) {
  const reference::Keys keys(params.k, params.batch);
  const reference::Keys index_keys(params.k_idx, params.batch);
  const std::int64_t group_size = params.q.size(1) / params.q_idx.size(1);
  const DType storage = params.q.dtype;
  NaiveRow row;
  Floats mass(support.size(), 0.0f);
  for (std::int64_t head = group * group_size; head < (group + 1) * group_size; ++head) {
    const Floats q = to_floats(reference::read_row(params.q, query.row, head));
    const NaiveSoftmax p =
        naive_softmax(q, keys, query, group, support, resolve(params.scale, params.q.size(2)), storage);
    row.lse_main.push_back(p.lse);
    for (std::size_t j = 0; j < mass.size(); ++j) {
      mass[j] = params.teacher == Teacher::kMean ? mass[j] + p.p[j] : std::max(mass[j], p.p[j]);
    }
  }
  if (params.teacher == Teacher::kMean) {
    row.norm = static_cast<float>(group_size);
  } else {
    for (const float m : mass) row.norm += m;
  }
  for (const float m : mass) row.teacher.push_back(round_to(storage, m / row.norm));
  const Floats q_idx = to_floats(reference::read_row(params.q_idx, query.row, group));
  row.student = naive_softmax(q_idx, index_keys, query, 0, support, resolve(params.index_scale, params.q_idx.size(2)),
                              params.q_idx.dtype);
  return row;
}

}  // namespace

double unit_roundoff(DType dtype) {
  if (dtype == DType::kBFloat16) return 0x1p-8;
  return dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-24;
}

float round_to(DType dtype, float value) {
  if (dtype == DType::kBFloat16) return core::bf16_to_float(core::float_to_bf16(value));
  return dtype == DType::kFloat16 ? core::f16_to_float(core::float_to_f16(value)) : value;
}

void expect_within_rule(const std::string& what, const std::vector<double>& got, const std::vector<double>& exact,
                        const std::vector<double>& naive, DType storage) {
  ASSERT_EQ(got.size(), exact.size()) << what;
  ASSERT_EQ(naive.size(), exact.size()) << what;
  double largest = 0;
  double max_got = 0;
  double max_naive = 0;
  double square_got = 0;
  double square_naive = 0;
  double count = 0;
  std::size_t worst = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    if (!std::isfinite(exact[i])) {
      ASSERT_TRUE(got[i] == exact[i] || (std::isnan(got[i]) && std::isnan(exact[i])))
          << what << ": element " << i << " is " << got[i] << ", not " << exact[i];
      continue;
    }
    ASSERT_TRUE(std::isfinite(got[i])) << what << ": element " << i << " is " << got[i] << ", not " << exact[i];
    const double error = std::abs(got[i] - exact[i]);
    if (error > max_got) worst = i;
    max_got = std::max(max_got, error);
    square_got += error * error;
    const double allowed = std::abs(naive[i] - exact[i]);
    max_naive = std::max(max_naive, allowed);
    square_naive += allowed * allowed;
    largest = std::max(largest, std::abs(exact[i]));
    count += 1;
  }
  if (count == 0) return;
  const double rounding = (unit_roundoff(storage) + unit_roundoff(DType::kFloat32)) * largest;
  EXPECT_LE(max_got, 2 * max_naive + rounding) << what << ": max error; largest value " << largest << ", worst element "
                                               << worst << ": " << got[worst] << ", not " << exact[worst];
  EXPECT_LE(std::sqrt(square_got / count), 2 * std::sqrt(square_naive / count) + rounding) << what << ": rms error";
}

SparseAttentionParams over_whole_prefix(const DenseAttentionParams& params) {
  return {params.q, params.k, params.v, {}, params.batch, kMaxBlockSize, params.scale, false};
}

AttentionResult naive_attention(const SparseAttentionParams& params) {
  const reference::Keys keys(params.k, params.batch);
  const reference::Keys values(params.v, params.batch);
  const std::int64_t value_dim = params.v.size(params.v.rank - 1);
  const std::int64_t group_size = params.q.size(1) / params.k.size(params.k.rank - 2);
  AttentionResult result{Tensor(params.q.dtype, {params.q.size(0), params.q.size(1), value_dim}),
                         Tensor(DType::kFloat32, {params.q.size(0), params.q.size(1)})};
  result.out.fill(0);
  result.lse.fill(-std::numeric_limits<double>::infinity());
  reference::for_each_query(params.batch, [&](const Query& query) {
    for (std::int64_t head = 0; head < params.q.size(1); ++head) {
      const std::int64_t group = head / group_size;
      const auto support = reference::row_support(params.blocks, params.block_size, group, query);
      const Floats q = to_floats(reference::read_row(params.q, query.row, head));
      const NaiveSoftmax p =
          naive_softmax(q, keys, query, group, support, resolve(params.scale, params.q.size(2)), params.q.dtype);
      Floats sum(static_cast<std::size_t>(value_dim), 0.0f);
      for (std::size_t i = 0; i < support.size(); ++i) {
        const Floats v = to_floats(values.read(query.sequence, support[i], group));
        for (std::size_t d = 0; d < sum.size(); ++d) sum[d] += p.p[i] * v[d];
      }
      for (std::size_t d = 0; d < sum.size(); ++d) {
        result.out.set(sum[d], query.row, head, static_cast<std::int64_t>(d));
      }
      result.lse.set(p.lse, query.row, head);
    }
  });
  return result;
}

AttentionGradients naive_attention_backward(const SparseAttentionParams& params, const Tensor& dout,
                                            const Tensor* dlse) {
  const reference::Keys keys(params.k, params.batch);
  const reference::Keys values(params.v, params.batch);
  const DType storage = params.q.dtype;
  const std::int64_t group_size = params.q.size(1) / params.k.size(1);
  const double scale = resolve(params.scale, params.q.size(2));
  const AttentionResult forward = naive_attention(params);
  Sums dq(params.q);
  Sums dk(params.k);
  Sums dv(params.v);
  reference::for_each_query(params.batch, [&](const Query& query) {
    const std::int64_t first_key = params.batch.cu_seqlens_k[static_cast<std::size_t>(query.sequence)];
    for (std::int64_t head = 0; head < params.q.size(1); ++head) {
      const std::int64_t group = head / group_size;
      const auto support = reference::row_support(params.blocks, params.block_size, group, query);
      const Floats q = to_floats(reference::read_row(params.q, query.row, head));
      const Floats d_out = to_floats(reference::read_row(dout.view(), query.row, head));
      const Floats out = to_floats(reference::read_row(forward.out.view(), query.row, head));
      const NaiveSoftmax p = naive_softmax(q, keys, query, group, support, scale, storage);
      const float delta = dot_float(d_out, out);
      const float d_lse = dlse == nullptr ? 0.0f : static_cast<float>(dlse->at(query.row, head));
      for (std::size_t i = 0; i < support.size(); ++i) {
        const Floats v = to_floats(values.read(query.sequence, support[i], group));
        const Floats k = to_floats(keys.read(query.sequence, support[i], group));
        const float dp = round_to(storage, dot_float(d_out, v));
        const float ds = round_to(storage, p.p[i] * (dp - delta + d_lse));
        const float factor = static_cast<float>(scale) * ds;
        dq.add(k, factor, query.row, head);
        dk.add(q, factor, first_key + support[i], group);
        dv.add(d_out, p.p[i], first_key + support[i], group);
      }
    }
  });
  return {dq.round(storage), dk.round(storage), dv.round(storage)};
}

KlResult naive_kl(const IndexKlParams& params) {
  const std::int64_t kv_heads = params.q_idx.size(1);
  const std::int64_t group_size = params.q.size(1) / kv_heads;
  KlResult result;
  result.lse_main = Tensor(DType::kFloat32, {params.q.size(0), params.q.size(1)});
  result.lse_index = Tensor(DType::kFloat32, {params.q.size(0), kv_heads});
  result.teacher_norm = Tensor(DType::kFloat32, {params.q.size(0), kv_heads});
  result.lse_main.fill(-std::numeric_limits<double>::infinity());
  result.lse_index.fill(-std::numeric_limits<double>::infinity());
  result.teacher_norm.fill(0);
  float sum = 0;
  reference::for_each_query(params.batch, [&](const Query& query) {
    for (std::int64_t group = 0; group < kv_heads; ++group) {
      const auto support = reference::row_support(params.blocks, params.block_size, group, query);
      if (support.empty()) continue;
      const NaiveRow row = naive_distributions(params, query, group, support);
      for (std::size_t j = 0; j < support.size(); ++j) {
        const float p = row.teacher[j];
        if (p > 0) sum += p * (std::log(p) - (row.student.scores[j] - row.student.lse));
      }
      for (std::int64_t i = 0; i < group_size; ++i) {
        result.lse_main.set(row.lse_main[static_cast<std::size_t>(i)], query.row, group * group_size + i);
      }
      result.lse_index.set(row.student.lse, query.row, group);
      result.teacher_norm.set(row.norm, query.row, group);
    }
  });
  const auto rows = static_cast<float>(core::total_queries(params.batch) * kv_heads);
  result.value = rows > 0 ? sum / rows : 0.0f;
  return result;
}

KlGradients naive_kl_backward(const IndexKlParams& params, float grad_output) {
  const reference::Keys index_keys(params.k_idx, params.batch);
  const DType storage = params.q_idx.dtype;
  const auto rows = static_cast<float>(core::total_queries(params.batch) * params.q_idx.size(1));
  const auto index_scale = static_cast<float>(resolve(params.index_scale, params.q_idx.size(2)));
  Sums dq_idx(params.q_idx);
  Sums dk_idx(params.k_idx);
  reference::for_each_query(params.batch, [&](const Query& query) {
    const std::int64_t first_key = params.batch.cu_seqlens_k[static_cast<std::size_t>(query.sequence)];
    for (std::int64_t group = 0; group < params.q_idx.size(1); ++group) {
      const auto support = reference::row_support(params.blocks, params.block_size, group, query);
      if (support.empty()) continue;
      const NaiveRow row = naive_distributions(params, query, group, support);
      const Floats q_idx = to_floats(reference::read_row(params.q_idx, query.row, group));
      for (std::size_t j = 0; j < support.size(); ++j) {
        // Rounded before the division by the number of rows, which a loss scale would undo anyway.
        const float dlogit = round_to(storage, row.student.p[j] - row.teacher[j]) * grad_output / rows;
        const float factor = index_scale * dlogit;
        dq_idx.add(to_floats(index_keys.read(query.sequence, support[j])), factor, query.row, group);
        dk_idx.add(q_idx, factor, first_key + support[j], 0);
      }
    }
  });
  return {dq_idx.round(storage), dk_idx.round(storage)};
}

void expect_same_bytes(const std::string& what, const std::vector<std::byte>& a, const std::vector<std::byte>& b) {
  ASSERT_EQ(a.size(), b.size()) << what;
  const auto difference = std::mismatch(a.begin(), a.end(), b.begin());
  EXPECT_TRUE(difference.first == a.end())
      << what << ": first difference at byte " << difference.first - a.begin() << " of " << a.size();
}

void expect_same_bytes(const std::string& what, const Tensor& a, const Tensor& b) {
  expect_same_bytes(what, a.bytes(), b.bytes());
}

}  // namespace msa::testing
