// SPDX-License-Identifier: Apache-2.0
// See conformance.h. Runs the backend and the reference on the same inputs, the naive program beside them, and holds
// the difference against what the naive program would have been allowed (naive.h).
#include "src/conformance/conformance.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <map>
#include <random>

#include "src/conformance/invariance.h"
#include "src/conformance/naive.h"
#include "src/conformance/run_operators.h"

namespace msa::conformance {
namespace {

// Whole prefill over block borders, a chunk behind a prefix, decode, an empty sequence.
constexpr std::pair<std::int64_t, std::int64_t> kSequences[] = {{40, 40}, {3, 131}, {1, 97}, {0, 5}, {17, 290}};

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

Context reference() {
  Context context;
  context.backend = Backend::kReference;
  return context;
}

// Rows of `width` ids that are not the same.
double differing_rows(const std::vector<std::int32_t>& a, const std::vector<std::int32_t>& b, std::int64_t width) {
  double count = 0;
  for (auto left = a.begin(), right = b.begin(); left != a.end(); left += width, right += width) {
    count += std::equal(left, left + width, right) ? 0 : 1;
  }
  return count;
}

class Case {
 public:
  Case(const Context& context, const Geometry& g, DType dtype, std::vector<CheckResult>& results)
      : context_(context), g_(g), results_(results) {
    in_.dtype = dtype;
    in_.query_heads = g.query_heads, in_.kv_heads = g.kv_heads;
    in_.head_dim = g.head_dim, in_.value_dim = g.value_dim, in_.index_dim = g.index_dim;
    in_.block_size = g.block_size, in_.topk = g.topk;
    in_.cu_seqlens_q = {0}, in_.cu_seqlens_k = {0};
    for (const auto& [queries, keys] : kSequences) {
      in_.cu_seqlens_q.push_back(in_.cu_seqlens_q.back() + static_cast<std::int32_t>(queries));
      in_.cu_seqlens_k.push_back(in_.cu_seqlens_k.back() + static_cast<std::int32_t>(keys));
    }
    const std::int64_t tq = in_.queries(), tk = in_.keys();
    draw(in_.q, tq * g.query_heads * g.head_dim);
    draw(in_.k, tk * g.kv_heads * g.head_dim);
    draw(in_.v, tk * g.kv_heads * g.value_dim);
    draw(in_.dout, tq * g.query_heads * g.value_dim);
    draw(in_.q_idx, tq * g.kv_heads * g.index_dim);
    draw(in_.k_idx, tk * g.index_dim);
    in_.dlse.resize(at(tq * g.query_heads));
    for (float& value : in_.dlse) value = normal_(random_);
    name_ = std::to_string(g.query_heads) + "/" + std::to_string(g.kv_heads) + " heads, D " +
            std::to_string(g.head_dim) + ", Dv " + std::to_string(g.value_dim) + ", Di " + std::to_string(g.index_dim) +
            ", block " + std::to_string(g.block_size) + ", topk " + std::to_string(g.topk) + ", " + dtype_name(dtype);
  }
  const std::string& name() const { return name_; }

  void run() {
    check_select();
    check_oracle();
    compare("sparse_attention", true);
    compare("dense_attention", false);
    check_invariance(context_, in_, name_, results_);
  }

 private:
  void draw(std::vector<float>& values, std::int64_t count) {
    values.resize(at(count));
    for (float& value : values) value = round_to(in_.dtype, normal_(random_));
  }

  void add(const std::string& op, double error, double allowed) {
    results_.push_back({op, name_, error, allowed, error <= allowed});
  }

  // On small integers every dot product is exact, ties abound, and the selection must be the reference's.
  void check_select() {
    NaiveInputs integers = in_;
    std::uniform_int_distribution<int> small(-2, 2);
    for (auto* values : {&integers.q_idx, &integers.k_idx}) {
      for (float& value : *values) value = static_cast<float>(small(random_));
    }
    in_.blocks = run_select(reference(), integers);
    add("select_blocks", differing_rows(run_select(context_, integers), in_.blocks, g_.topk), 0);
  }

  // A near-tie of two blocks' masses may fall either way in float: the reference weighs what was chosen.
  void check_oracle() {
    NaiveInputs chosen = in_;
    chosen.blocks = run_oracle(context_, in_);
    const SelectionRecall recall = run_recall(reference(), chosen);
    add("select_blocks_oracle", recall.rows == 0 ? 0 : 1 - recall.score_recall, 1e-5);
  }

  // Unit of the last place of the storage type at the largest value.
  static double one_rounding(DType dtype, const std::vector<float>& exact) {
    double largest = 0;
    for (const float value : exact) {
      if (std::isfinite(value)) largest = std::max(largest, std::fabs(static_cast<double>(value)));
    }
    const double epsilon = dtype == DType::kFloat32 ? 0x1p-23 : dtype == DType::kBFloat16 ? 0x1p-7 : 0x1p-10;
    return largest * epsilon;
  }

  static double largest_error(const std::vector<float>& actual, const std::vector<float>& exact) {
    double error = 0;
    for (std::size_t i = 0; i < exact.size(); ++i) {
      if (actual[i] == exact[i]) continue;  // equal infinities
      const double difference = std::fabs(static_cast<double>(actual[i]) - static_cast<double>(exact[i]));
      error = std::isnan(difference) ? std::numeric_limits<double>::infinity() : std::max(error, difference);
    }
    return error;
  }

  void compare_one(const std::string& what, DType dtype, const std::vector<float>& actual,
                   const std::vector<float>& exact, const std::vector<float>& naive) {
    add(what, largest_error(actual, exact), 2 * largest_error(naive, exact) + one_rounding(dtype, exact));
  }

  void compare(const std::string& op, bool sparse) {
    const Outputs exact = run_attention(reference(), in_, sparse);
    const Outputs actual = run_attention(context_, in_, sparse);
    NaiveInputs inputs = in_;
    if (!sparse) inputs.blocks.clear();
    const NaiveOutputs naive = run_naive(inputs);
    compare_one(op + ".out", in_.dtype, actual.out, exact.out, naive.out);
    compare_one(op + ".lse", DType::kFloat32, actual.lse, exact.lse, naive.lse);
    compare_one(op + ".dq", in_.dtype, actual.dq, exact.dq, naive.dq);
    compare_one(op + ".dk", in_.dtype, actual.dk, exact.dk, naive.dk);
    compare_one(op + ".dv", in_.dtype, actual.dv, exact.dv, naive.dv);
    const std::string kl = sparse ? "index_kl(blocks)" : "index_kl(prefix)";
    compare_one(kl, DType::kFloat32, {actual.kl}, {exact.kl}, {naive.kl});
    compare_one(kl + ".dq_idx", in_.dtype, actual.dq_idx, exact.dq_idx, naive.dq_idx);
    compare_one(kl + ".dk_idx", in_.dtype, actual.dk_idx, exact.dk_idx, naive.dk_idx);
    if (sparse) {
      const auto rows = static_cast<double>(std::max<std::int64_t>(1, exact.recall.rows));
      add("selection_recall.rows", std::fabs(static_cast<double>(actual.recall.rows - exact.recall.rows)), 0);
      // A near-tie of two blocks' masses may fall either way in float: one row in the mean.
      const double block = actual.recall.block_recall - exact.recall.block_recall;
      const double score = actual.recall.score_recall - exact.recall.score_recall;
      add("selection_recall.block", exact.recall.rows == 0 ? 0 : std::fabs(block), 1.0 / rows);
      add("selection_recall.score", exact.recall.rows == 0 ? 0 : std::fabs(score), 1e-5);
    }
  }

  const Context& context_;
  Geometry g_;
  std::vector<CheckResult>& results_;
  NaiveInputs in_;
  std::string name_;
  std::mt19937 random_{20260613};
  std::normal_distribution<float> normal_{0.0f, 1.0f};
};

// Rows of given scores, ties and NaN among them, shorter and longer than topk: every row must be the reference's.
void check_topk(const Context& context, std::vector<CheckResult>& results) {
  std::mt19937 random(20260613);
  std::normal_distribution<float> normal;
  for (const std::int64_t topk : {1, 16, 64}) {
    for (const std::int64_t blocks : {16, 65, 1024}) {
      constexpr std::int64_t kRows = 24;
      std::vector<float> scores(at(kRows * blocks));
      for (std::int64_t i = 0; i < kRows * blocks; ++i) {
        const float score = normal(random);
        // A third of the rows has ties everywhere, another one NaN.
        const std::int64_t kind = i / blocks % 3;
        scores[at(i)] = kind == 0                 ? score
                        : kind == 1               ? std::round(score)
                        : std::fabs(score) > 0.5f ? std::numeric_limits<float>::quiet_NaN()
                                                  : score;
      }
      const double differ =
          differing_rows(run_topk(context, scores, blocks, topk), run_topk(reference(), scores, blocks, topk), topk);
      const std::string name = std::to_string(kRows) + " rows of " + std::to_string(blocks) + " blocks, topk " +
                               std::to_string(topk) + ", float32";
      results.push_back({"topk_blocks", name, differ, 0, differ == 0});
    }
  }
}

}  // namespace

std::vector<Geometry> all_geometries() {
  return {
      {64, 4, 128, 128, 128, 128, 2}, {9, 3, 64, 64, 64, 64, 3},   {1, 1, 16, 16, 16, 16, 1},
      {5, 5, 48, 80, 32, 16, 5},      {14, 2, 80, 32, 112, 32, 4}, {6, 2, 256, 256, 256, 256, 1},
  };
}

std::vector<CheckResult> run_conformance(const Context& context, const std::vector<Geometry>& geometries,
                                         const std::function<void(const std::string&)>& progress) {
  std::vector<CheckResult> results;
  progress("top-k of given scores");
  check_topk(context, results);
  for (const Geometry& geometry : geometries) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      Case one(context, geometry, dtype, results);
      progress(one.name());
      one.run();
    }
  }
  return results;
}

std::vector<OpSummary> summarize(const std::vector<CheckResult>& results) {
  std::map<std::string, OpSummary> by_op;
  for (const CheckResult& result : results) {
    OpSummary& summary = by_op[result.op];
    summary.op = result.op;
    ++(result.passed ? summary.passed : summary.failed);
    if (result.allowed > 0) summary.worst = std::max(summary.worst, result.error / result.allowed);
  }
  std::vector<OpSummary> summaries;
  for (auto& [op, summary] : by_op) summaries.push_back(std::move(summary));
  return summaries;
}

}  // namespace msa::conformance
