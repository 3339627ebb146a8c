// SPDX-License-Identifier: Apache-2.0
// See conformance.h. Each case draws inputs, asks the reference and the backend for everything, and holds the
// difference against what the naive program would have been allowed (naive.h).
#include "src/conformance/conformance.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>

#include "msa/msa.h"
#include "src/conformance/naive.h"
#include "src/core/float_convert.h"

namespace msa::conformance {
namespace {

struct Geometry {
  std::int64_t query_heads, kv_heads, head_dim, value_dim, index_dim, block_size, topk;
};

// Powers of two and not, every dimension different, smallest and largest blocks, the paper's and SmolLM2's geometry.
constexpr Geometry kGeometries[] = {
    {64, 4, 128, 128, 128, 128, 2}, {9, 3, 64, 64, 64, 64, 3},   {1, 1, 16, 16, 16, 16, 1},
    {5, 5, 48, 80, 32, 16, 5},      {14, 2, 80, 32, 112, 32, 4}, {6, 2, 256, 256, 256, 256, 1},
};

// Whole prefill over block borders, a chunk behind a prefix, decode, an empty sequence.
constexpr std::pair<std::int64_t, std::int64_t> kSequences[] = {{40, 40}, {3, 131}, {1, 97}, {0, 5}, {17, 290}};

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// A buffer in the storage type, made from floats.
class Storage {
 public:
  Storage(DType dtype, std::size_t count) : dtype_(dtype), bytes_(count * dtype_size(dtype)) {}
  Storage(DType dtype, const std::vector<float>& values) : Storage(dtype, values.size()) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      core::store_element(bytes_.data(), dtype, static_cast<std::int64_t>(i), values[i]);
    }
  }
  TensorView view(std::initializer_list<std::int64_t> shape) { return make_view(bytes_.data(), dtype_, shape); }
  std::vector<float> floats() const {
    std::vector<float> values(bytes_.size() / dtype_size(dtype_));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = core::load_element(bytes_.data(), dtype_, static_cast<std::int64_t>(i));
    }
    return values;
  }

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

// All outputs of one backend as float.
struct Outputs {
  std::vector<float> out, lse, dq, dk, dv, dq_idx, dk_idx;
  float kl = 0;
  SelectionRecall recall;
};

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
    batch_ = Batch::packed(in_.cu_seqlens_q, in_.cu_seqlens_k);
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
    compare("sparse_attention", true);
    compare("dense_attention", false);
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
    const std::int64_t tq = in_.queries(), tk = in_.keys();
    std::uniform_int_distribution<int> small(-2, 2);
    std::vector<float> q(at(tq * g_.kv_heads * g_.index_dim)), k(at(tk * g_.index_dim));
    for (auto* values : {&q, &k}) {
      for (float& value : *values) value = static_cast<float>(small(random_));
    }
    Storage q_idx(in_.dtype, q), k_idx(in_.dtype, k);
    SelectBlocksParams params;
    params.q_idx = q_idx.view({tq, g_.kv_heads, g_.index_dim});
    params.k_idx = k_idx.view({tk, g_.index_dim});
    params.batch = batch_;
    params.block_size = g_.block_size;
    params.topk = g_.topk;
    std::vector<std::int32_t> expected(at(g_.kv_heads * tq * g_.topk)), actual(expected.size(), -7);
    select_blocks(reference(), params, make_view(expected.data(), {g_.kv_heads, tq, g_.topk}));
    select_blocks(context_, params, make_view(actual.data(), {g_.kv_heads, tq, g_.topk}));
    std::int64_t rows = 0;
    for (std::size_t row = 0; row < expected.size() / at(g_.topk); ++row) {
      const std::size_t first = row * at(g_.topk);
      rows += std::equal(expected.begin() + static_cast<std::ptrdiff_t>(first),
                         expected.begin() + static_cast<std::ptrdiff_t>(first + at(g_.topk)),
                         actual.begin() + static_cast<std::ptrdiff_t>(first))
                  ? 0
                  : 1;
    }
    add("select_blocks", static_cast<double>(rows), 0);
    in_.blocks = expected;
  }

  static Context reference() {
    Context context;
    context.backend = Backend::kReference;
    return context;
  }

  Outputs evaluate(const Context& context, bool sparse) {
    const std::int64_t tq = in_.queries(), tk = in_.keys();
    const DType dtype = in_.dtype;
    Storage q(dtype, in_.q), k(dtype, in_.k), v(dtype, in_.v), dout(dtype, in_.dout);
    Storage q_idx(dtype, in_.q_idx), k_idx(dtype, in_.k_idx);
    Storage out(dtype, in_.dout.size()), dq(dtype, in_.q.size()), dk(dtype, in_.k.size()), dv(dtype, in_.v.size());
    Storage dq_idx(dtype, in_.q_idx.size()), dk_idx(dtype, in_.k_idx.size());
    Outputs result;
    result.lse.resize(in_.dlse.size());
    const ConstTensorView blocks =
        make_view(static_cast<const std::int32_t*>(in_.blocks.data()), {g_.kv_heads, tq, g_.topk});
    const ConstTensorView q_view = q.view({tq, g_.query_heads, g_.head_dim});
    const ConstTensorView k_view = k.view({tk, g_.kv_heads, g_.head_dim});
    const ConstTensorView v_view = v.view({tk, g_.kv_heads, g_.value_dim});
    const TensorView out_view = out.view({tq, g_.query_heads, g_.value_dim});
    const TensorView lse = make_view(result.lse.data(), {tq, g_.query_heads});
    const AttentionSaved saved{out_view, lse, dout.view({tq, g_.query_heads, g_.value_dim}),
                               make_view(static_cast<const float*>(in_.dlse.data()), {tq, g_.query_heads})};
    const AttentionGrads grads{dq.view({tq, g_.query_heads, g_.head_dim}), dk.view({tk, g_.kv_heads, g_.head_dim}),
                               dv.view({tk, g_.kv_heads, g_.value_dim})};
    if (sparse) {
      SparseAttentionParams params;
      params.q = q_view, params.k = k_view, params.v = v_view, params.blocks = blocks;
      params.batch = batch_;
      params.block_size = g_.block_size;
      sparse_attention(context, params, out_view, lse);
      sparse_attention_backward(context, params, saved, grads);
    } else {
      DenseAttentionParams params;
      params.q = q_view, params.k = k_view, params.v = v_view;
      params.batch = batch_;
      dense_attention(context, params, out_view, lse);
      dense_attention_backward(context, params, saved, grads);
    }
    std::vector<float> lse_main(result.lse.size()), lse_index(at(tq * g_.kv_heads)), norm(at(tq * g_.kv_heads));
    const IndexKlSaved kl_saved{make_view(lse_main.data(), {tq, g_.query_heads}),
                                make_view(lse_index.data(), {tq, g_.kv_heads}),
                                make_view(norm.data(), {tq, g_.kv_heads})};
    IndexKlParams kl;
    kl.q = q_view, kl.k = k_view;
    kl.q_idx = q_idx.view({tq, g_.kv_heads, g_.index_dim});
    kl.k_idx = k_idx.view({tk, g_.index_dim});
    if (sparse) kl.blocks = blocks;
    kl.batch = batch_;
    kl.block_size = g_.block_size;
    result.kl = index_kl(context, kl, kl_saved);
    index_kl_backward(context, kl, kl_saved, 1.0f, dq_idx.view({tq, g_.kv_heads, g_.index_dim}),
                      dk_idx.view({tk, g_.index_dim}));
    SelectionRecallParams recall;
    recall.q = q_view, recall.k = k_view, recall.blocks = blocks;
    recall.batch = batch_;
    recall.block_size = g_.block_size;
    result.recall = selection_recall(context, recall);
    result.out = out.floats(), result.dq = dq.floats(), result.dk = dk.floats(), result.dv = dv.floats();
    result.dq_idx = dq_idx.floats(), result.dk_idx = dk_idx.floats();
    return result;
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
    const Outputs exact = evaluate(reference(), sparse);
    const Outputs actual = evaluate(context_, sparse);
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
  Batch batch_;
  std::string name_;
  std::mt19937 random_{20260613};
  std::normal_distribution<float> normal_{0.0f, 1.0f};
};

// Rows of given scores, ties and NaN among them, shorter and longer than topk: every row must be the reference's.
void check_topk(const Context& context, std::vector<CheckResult>& results) {
  Context reference;
  reference.backend = Backend::kReference;
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
      TopkBlocksParams params;
      params.scores = make_view(static_cast<const float*>(scores.data()), {kRows, blocks});
      params.topk = topk;
      std::vector<std::int32_t> expected(at(kRows * topk)), actual(expected.size(), -7);
      topk_blocks(reference, params, make_view(expected.data(), {kRows, topk}));
      topk_blocks(context, params, make_view(actual.data(), {kRows, topk}));
      double differ = 0;
      for (std::int64_t row = 0; row < kRows; ++row) {
        const auto first = static_cast<std::ptrdiff_t>(row * topk);
        const auto last = first + static_cast<std::ptrdiff_t>(topk);
        if (!std::equal(expected.begin() + first, expected.begin() + last, actual.begin() + first)) ++differ;
      }
      const std::string name = std::to_string(kRows) + " rows of " + std::to_string(blocks) + " blocks, topk " +
                               std::to_string(topk) + ", float32";
      results.push_back({"topk_blocks", name, differ, 0, differ == 0});
    }
  }
}

}  // namespace

std::vector<CheckResult> run_conformance(const Context& context,
                                         const std::function<void(const std::string&)>& progress) {
  std::vector<CheckResult> results;
  progress("top-k of given scores");
  check_topk(context, results);
  for (const Geometry& geometry : kGeometries) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      Case one(context, geometry, dtype, results);
      progress(one.name());
      one.run();
    }
  }
  return results;
}

}  // namespace msa::conformance
