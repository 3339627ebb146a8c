// SPDX-License-Identifier: Apache-2.0
// Bitwise independence (SPEC section 6): threads, batch composition, packing and paging, chunks of a prefill, samples
// of the rows, and repetition change no bit of any result, forward or backward, within a backend and an instruction
// set.
#include <gtest/gtest.h>

#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "msa/msa.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::testing {
namespace {

// Everything the operators write for a problem. Gradients of index_kl are taken with a loss scale of T * kv_heads,
// powers of two below, so that the mean over the rows is the same exact factor whatever the number of rows.
struct Everything {
  Tensor blocks, oracle;
  AttentionResult sparse, dense;
  AttentionGradients sparse_grads, dense_grads;
  KlResult kl_selected, kl_prefix;
  KlGradients kl_selected_grads, kl_prefix_grads;
  SelectionRecall recall;
};

// dout and dlse of the rows, taken from those of a larger problem.
struct OutputGradients {
  Tensor dout, dlse;
};

OutputGradients take(const OutputGradients& whole, const std::vector<std::int64_t>& rows) {
  const auto count = static_cast<std::int64_t>(rows.size());
  OutputGradients part{Tensor(whole.dout.dtype(), {count, whole.dout.size(1), whole.dout.size(2)}),
                       Tensor(whole.dlse.dtype(), {count, whole.dlse.size(1)})};
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = rows[static_cast<std::size_t>(i)];
    for (std::int64_t h = 0; h < whole.dout.size(1); ++h) {
      for (std::int64_t d = 0; d < whole.dout.size(2); ++d) part.dout.set(whole.dout.at(row, h, d), i, h, d);
      part.dlse.set(whole.dlse.at(row, h), i, h);
    }
  }
  return part;
}

Everything run_everything(const Context& context, const Problem& problem, const OutputGradients& gradients) {
  Everything all;
  const auto loss_scale = static_cast<float>(problem.queries() * problem.geometry.kv_heads);
  all.blocks = run_select(context, problem.select_params());
  all.oracle = run_oracle(context, problem.oracle_params());
  all.sparse = run_sparse(context, problem.sparse_params());
  all.dense = run_dense(context, problem.dense_params());
  all.sparse_grads = run_sparse_backward(context, problem.sparse_params(), all.sparse, gradients.dout, &gradients.dlse);
  all.dense_grads = run_dense_backward(context, problem.dense_params(), all.dense, gradients.dout, &gradients.dlse);
  all.kl_selected = run_kl(context, problem.kl_params(false));
  all.kl_prefix = run_kl(context, problem.kl_params(true));
  all.kl_selected_grads = run_kl_backward(context, problem.kl_params(false), all.kl_selected, loss_scale);
  all.kl_prefix_grads = run_kl_backward(context, problem.kl_params(true), all.kl_prefix, loss_scale);
  all.recall = selection_recall(context, problem.recall_params());
  return all;
}

// Whether row `from + i` of the one holds what row `to + i` of the other does, for tensors of queries.
void expect_same_rows(const char* what, const Tensor& a, std::int64_t from, const Tensor& b, std::int64_t to,
                      std::int64_t count, int dim = 0) {
  expect_same_bytes(what, a.bytes(dim, from, from + count), b.bytes(dim, to, to + count));
}

void expect_same_query_rows(const Everything& a, std::int64_t from, const Everything& b, std::int64_t to,
                            std::int64_t count) {
  expect_same_rows("blocks", a.blocks, from, b.blocks, to, count, 1);
  expect_same_rows("oracle", a.oracle, from, b.oracle, to, count, 1);
  expect_same_rows("sparse out", a.sparse.out, from, b.sparse.out, to, count);
  expect_same_rows("sparse lse", a.sparse.lse, from, b.sparse.lse, to, count);
  expect_same_rows("dense out", a.dense.out, from, b.dense.out, to, count);
  expect_same_rows("dense lse", a.dense.lse, from, b.dense.lse, to, count);
  expect_same_rows("sparse dq", a.sparse_grads.dq, from, b.sparse_grads.dq, to, count);
  expect_same_rows("dense dq", a.dense_grads.dq, from, b.dense_grads.dq, to, count);
  expect_same_rows("selected lse_main", a.kl_selected.lse_main, from, b.kl_selected.lse_main, to, count);
  expect_same_rows("selected lse_index", a.kl_selected.lse_index, from, b.kl_selected.lse_index, to, count);
  expect_same_rows("selected teacher_norm", a.kl_selected.teacher_norm, from, b.kl_selected.teacher_norm, to, count);
  expect_same_rows("prefix lse_main", a.kl_prefix.lse_main, from, b.kl_prefix.lse_main, to, count);
  expect_same_rows("prefix lse_index", a.kl_prefix.lse_index, from, b.kl_prefix.lse_index, to, count);
  expect_same_rows("selected dq_idx", a.kl_selected_grads.dq_idx, from, b.kl_selected_grads.dq_idx, to, count);
  expect_same_rows("prefix dq_idx", a.kl_prefix_grads.dq_idx, from, b.kl_prefix_grads.dq_idx, to, count);
}

void expect_same_key_rows(const Everything& a, std::int64_t from, const Everything& b, std::int64_t to,
                          std::int64_t count) {
  expect_same_rows("sparse dk", a.sparse_grads.dk, from, b.sparse_grads.dk, to, count);
  expect_same_rows("sparse dv", a.sparse_grads.dv, from, b.sparse_grads.dv, to, count);
  expect_same_rows("dense dk", a.dense_grads.dk, from, b.dense_grads.dk, to, count);
  expect_same_rows("dense dv", a.dense_grads.dv, from, b.dense_grads.dv, to, count);
  expect_same_rows("selected dk_idx", a.kl_selected_grads.dk_idx, from, b.kl_selected_grads.dk_idx, to, count);
  expect_same_rows("prefix dk_idx", a.kl_prefix_grads.dk_idx, from, b.kl_prefix_grads.dk_idx, to, count);
}

void expect_same_scalars(const Everything& a, const Everything& b) {
  EXPECT_EQ(a.kl_selected.value, b.kl_selected.value);
  EXPECT_EQ(a.kl_prefix.value, b.kl_prefix.value);
  EXPECT_EQ(a.recall.block_recall, b.recall.block_recall);
  EXPECT_EQ(a.recall.score_recall, b.recall.score_recall);
  EXPECT_EQ(a.recall.rows, b.recall.rows);
}

// Numbers of queries whose products with kv_heads are powers of two, a whole and its parts alike.
std::vector<Case> invariance_cases() {
  const Geometry narrow = {6, 2, 32, 48, 16, 16, 2};
  const Geometry wide = {14, 2, 80, 64, 48, 32, 3};
  std::vector<Case> cases = {
      {narrow, {{64, 64}, {32, 101}, {16, 16}, {16, 200}}, DType::kFloat32, DType::kFloat32, Layout::kGaps, 0},
      {narrow,
       {{32, 75}, {1, 47}, {16, 49}, {1, 1}, {0, 9}, {2, 90}, {4, 90}, {8, 8}},
       DType::kBFloat16,
       DType::kFloat32,
       Layout::kGaps,
       0},
      {wide, {{64, 130}, {64, 127}}, DType::kFloat16, DType::kFloat16, Layout::kHeadsFirst, 0},
  };
  if (emulates_device()) cases.pop_back();  // long
  return cases;
}

class Invariance : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, Invariance, ::testing::ValuesIn(invariance_cases()), case_name);

TEST_P(Invariance, ThreadsAndRepetition) {
  const Problem problem(GetParam());
  const OutputGradients gradients{make_dout(problem), make_dlse(problem)};
  for_each_target(Targets::kCpu, [&](Context context) {
    context.threads = 1;
    const Everything one = run_everything(context, problem, gradients);
    for (const int threads : emulates_device() ? std::vector<int>{1} : std::vector<int>{1, 2, 3, 7}) {
      SCOPED_TRACE("threads " + std::to_string(threads));
      context.threads = threads;
      const Everything many = run_everything(context, problem, gradients);
      expect_same_query_rows(one, 0, many, 0, problem.rows());
      expect_same_key_rows(one, 0, many, 0, problem.k.size(0));
      expect_same_scalars(one, many);
    }
  });
}

TEST(InvarianceOfTasks, ThreadsAndBatchesOfManyQueries) {
  if (emulates_device()) GTEST_SKIP() << "threads are the cpu backend's";
  // Queries enough for several tasks a sequence and head, whose sums over the same keys have one order.
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Problem problem(Case{{4, 2, 16, 16, 16, 32, 3}, {{768, 800}, {300, 300}}, dtype, dtype});
    const OutputGradients gradients{make_dout(problem), make_dlse(problem)};
    const Problem first = problem.only(0);
    std::vector<std::int64_t> rows(768);
    std::iota(rows.begin(), rows.end(), 0);
    const OutputGradients first_gradients = take(gradients, rows);
    for_each_target(Targets::kCpu, [&](Context context) {
      const auto attention = [&](const Problem& p, const OutputGradients& g) {
        const AttentionResult sparse = run_sparse(context, p.sparse_params());
        const AttentionResult dense = run_dense(context, p.dense_params());
        return std::pair(run_sparse_backward(context, p.sparse_params(), sparse, g.dout, &g.dlse),
                         run_dense_backward(context, p.dense_params(), dense, g.dout, &g.dlse));
      };
      const auto kl = [&](bool whole_prefix) {
        KlResult forward = run_kl(context, problem.kl_params(whole_prefix));
        return run_kl_backward(context, problem.kl_params(whole_prefix), forward, 1);
      };
      context.threads = 1;
      const auto one = attention(problem, gradients);
      const auto alone = attention(first, first_gradients);
      for (const auto& [a, b] : {std::pair(&alone.first, &one.first), std::pair(&alone.second, &one.second)}) {
        expect_same_bytes("dq", a->dq.bytes(), b->dq.bytes(0, 0, 768));
        expect_same_bytes("dk", a->dk.bytes(), b->dk.bytes(0, 0, 800));
        expect_same_bytes("dv", a->dv.bytes(), b->dv.bytes(0, 0, 800));
      }
      const KlGradients kl_one[2] = {kl(false), kl(true)};
      for (const int threads : {2, 5}) {
        SCOPED_TRACE("threads " + std::to_string(threads));
        context.threads = threads;
        const auto many = attention(problem, gradients);
        for (const auto& [a, b] : {std::pair(&many.first, &one.first), std::pair(&many.second, &one.second)}) {
          expect_same_bytes("dq", a->dq, b->dq);
          expect_same_bytes("dk", a->dk, b->dk);
          expect_same_bytes("dv", a->dv, b->dv);
        }
        for (const bool whole_prefix : {false, true}) {
          const KlGradients grads = kl(whole_prefix);
          expect_same_bytes("dq_idx", grads.dq_idx, kl_one[whole_prefix].dq_idx);
          expect_same_bytes("dk_idx", grads.dk_idx, kl_one[whole_prefix].dk_idx);
        }
      }
    });
  }
}

// Few queries on more threads than kv heads are done in halves (split_attention.h), with the bits of whole tasks and of
// a longer prefill: rows in tiles of two queries, a last block that is there in part, and slices of different widths.
TEST(InvarianceOfTasks, HalvesOfFewQueries) {
  if (emulates_device()) GTEST_SKIP() << "threads are the cpu backend's";
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const std::int64_t kv_heads : {1, 3}) {
      Problem prefill(Case{{6 * kv_heads, kv_heads, 128, 112, 16, 128, 16}, {{20, 2390}}, dtype, dtype});
      // Seen by the last eight queries alone.
      prefill.v.set(std::numeric_limits<double>::infinity(), 2382, 0, 5);
      const std::int64_t rows = prefill.rows();
      for_each_target(Targets::kCpu, [&](Context context) {
        context.threads = 1;
        const AttentionResult whole = run_sparse(context, prefill.sparse_params());
        for (const std::int64_t queries : {1, 3, 16}) {
          const Problem last = prefill.chunk(rows - queries, rows);
          for (const int threads : {1, 2, 5}) {
            SCOPED_TRACE(std::to_string(queries) + " queries, threads " + std::to_string(threads));
            context.threads = threads;
            const AttentionResult got = run_sparse(context, last.sparse_params());
            expect_same_rows("out", got.out, 0, whole.out, rows - queries, queries);
            expect_same_rows("lse", got.lse, 0, whole.lse, rows - queries, queries);
          }
        }
      });
    }
  }
}

TEST_P(Invariance, BatchComposition) {
  const Problem problem(GetParam());
  const OutputGradients gradients{make_dout(problem), make_dlse(problem)};
  for_each_target(Targets::kCpu, [&](Context context) {
    context.threads = 1;
    const Everything together = run_everything(context, problem, gradients);
    for (std::int64_t s = 0; s < problem.sequences(); ++s) {
      SCOPED_TRACE("sequence " + std::to_string(s));
      const auto i = static_cast<std::size_t>(s);
      const Problem alone = problem.only(s);
      std::vector<std::int64_t> rows(static_cast<std::size_t>(alone.queries()));
      std::iota(rows.begin(), rows.end(), problem.cu_seqlens_q[i]);
      const Everything apart = run_everything(context, alone, take(gradients, rows));
      expect_same_query_rows(together, problem.cu_seqlens_q[i], apart, 0, alone.queries());
      expect_same_key_rows(together, problem.cu_seqlens_k[i], apart, 0, alone.k.size(0));
    }
  });
}

TEST_P(Invariance, ChunksOfAPrefill) {
  const Problem whole = Problem(GetParam()).only(0);
  const OutputGradients gradients{make_dout(whole), make_dlse(whole)};
  for_each_target(Targets::kCpu, [&](Context context) {
    context.threads = 1;
    const Everything at_once = run_everything(context, whole, gradients);
    std::int64_t begin = 0;
    for (const std::int64_t size : {1, 1, 2, 4, 16, 8}) {  // also a decode step and a few draft tokens
      SCOPED_TRACE("queries from " + std::to_string(begin));
      const Problem chunk = whole.chunk(begin, begin + size);
      std::vector<std::int64_t> rows(static_cast<std::size_t>(size));
      std::iota(rows.begin(), rows.end(), begin);
      const Everything part = run_everything(context, chunk, take(gradients, rows));
      expect_same_query_rows(at_once, begin, part, 0, size);
      begin += size;
    }
  });
}

TEST_P(Invariance, SamplesOfTheRows) {
  const Problem problem(GetParam());
  const OutputGradients gradients{make_dout(problem), make_dlse(problem)};
  // Eight rows of all sequences, not evenly spaced.
  std::vector<std::int64_t> rows;
  for (const std::int64_t eighth : {0, 1, 2, 3, 5, 6, 7}) rows.push_back(eighth * (problem.queries() - 1) / 8);
  rows.push_back(problem.queries() - 1);
  const Problem sample = problem.sample(rows);
  for_each_target(Targets::kCpu, [&](Context context) {
    context.threads = 1;
    const Everything all = run_everything(context, problem, gradients);
    const Everything some = run_everything(context, sample, take(gradients, rows));
    for (std::size_t i = 0; i < rows.size(); ++i) {
      SCOPED_TRACE("row " + std::to_string(rows[i]));
      expect_same_query_rows(all, rows[i], some, static_cast<std::int64_t>(i), 1);
    }
  });
}

TEST_P(Invariance, PositionsThatAreTheDefaultChangeNothing) {
  Problem problem(GetParam());
  const OutputGradients gradients{make_dout(problem), make_dlse(problem)};
  Problem explicit_positions = problem;
  for (std::int64_t row = 0; row < problem.queries(); ++row) {
    explicit_positions.query_positions.push_back(static_cast<std::int32_t>(problem.position(row)));
  }
  for_each_target(Targets::kCpu, [&](Context context) {
    context.threads = 1;
    const Everything a = run_everything(context, problem, gradients);
    const Everything b = run_everything(context, explicit_positions, gradients);
    expect_same_query_rows(a, 0, b, 0, problem.rows());
    expect_same_key_rows(a, 0, b, 0, problem.k.size(0));
    expect_same_scalars(a, b);
  });
}

TEST_P(Invariance, PagesOfOneBlockAndOfSeveral) {
  const Problem problem(GetParam());
  for (const std::int64_t blocks_a_page : {1, 2, 4}) {
    SCOPED_TRACE("page of " + std::to_string(blocks_a_page) + " blocks");
    const PagedProblem paged(problem, blocks_a_page * problem.geometry.block_size);
    for_each_target(Targets::kCpu, [&](Context context) {
      context.threads = 1;
      expect_same_bytes("blocks", run_select(context, paged.select_params()),
                        run_select(context, problem.select_params()));
      expect_same_bytes("oracle", run_oracle(context, paged.oracle_params()),
                        run_oracle(context, problem.oracle_params()));
      const AttentionResult sparse = run_sparse(context, problem.sparse_params());
      const AttentionResult paged_sparse = run_sparse(context, paged.sparse_params());
      expect_same_bytes("sparse out", paged_sparse.out, sparse.out);
      expect_same_bytes("sparse lse", paged_sparse.lse, sparse.lse);
      const AttentionResult dense = run_dense(context, problem.dense_params());
      const AttentionResult paged_dense = run_dense(context, paged.dense_params());
      expect_same_bytes("dense out", paged_dense.out, dense.out);
      expect_same_bytes("dense lse", paged_dense.lse, dense.lse);
      for (const bool whole_prefix : {false, true}) {
        const KlResult kl = run_kl(context, problem.kl_params(whole_prefix));
        const KlResult paged_kl = run_kl(context, paged.kl_params(whole_prefix));
        EXPECT_EQ(paged_kl.value, kl.value);
        expect_same_bytes("lse_main", paged_kl.lse_main, kl.lse_main);
        expect_same_bytes("lse_index", paged_kl.lse_index, kl.lse_index);
      }
      const SelectionRecall recall = selection_recall(context, problem.recall_params());
      const SelectionRecall paged_recall = selection_recall(context, paged.recall_params());
      EXPECT_EQ(paged_recall.block_recall, recall.block_recall);
      EXPECT_EQ(paged_recall.score_recall, recall.score_recall);
    });
  }
}

TEST(InvarianceOfDense, PagesOfAnySize) {
  // No rule ties a page to a block when there are no blocks.
  const Problem problem(Case{{6, 2, 32, 48, 16, 16, 2}, {{20, 77}, {1, 130}, {5, 5}}});
  for (const std::int64_t page : {1, 5, 24, 100}) {
    SCOPED_TRACE("page of " + std::to_string(page));
    const PagedProblem paged(problem, page);
    for_each_target(Targets::kAll, [&](const Context& context) {
      const AttentionResult dense = run_dense(context, problem.dense_params());
      const AttentionResult paged_dense = run_dense(context, paged.dense_params());
      expect_same_bytes("out", paged_dense.out, dense.out);
      expect_same_bytes("lse", paged_dense.lse, dense.lse);
    });
  }
}

TEST(InvarianceOfLayout, StridesChangeNothing) {
  Case c{{6, 2, 48, 32, 64, 16, 2}, {{20, 77}, {1, 130}, {11, 11}}};
  for (const DType dtype : kFloatTypes) {
    c.dtype = c.index_dtype = dtype;
    const Problem gaps(c);
    const OutputGradients gradients{make_dout(gaps), make_dlse(gaps)};
    for (const Layout layout : {Layout::kContiguous, Layout::kHeadsFirst}) {
      Problem other = gaps;
      for (const auto& [to, from] : std::vector<std::pair<Tensor*, const Tensor*>>{{&other.q, &gaps.q},
                                                                                   {&other.k, &gaps.k},
                                                                                   {&other.v, &gaps.v},
                                                                                   {&other.q_idx, &gaps.q_idx},
                                                                                   {&other.k_idx, &gaps.k_idx},
                                                                                   {&other.blocks, &gaps.blocks}}) {
        *to = copy_of(from->view(), layout);
      }
      for_each_target(Targets::kCpu, [&](Context context) {
        context.threads = 1;
        const Everything a = run_everything(context, gaps, gradients);
        const Everything b = run_everything(context, other, gradients);
        expect_same_query_rows(a, 0, b, 0, gaps.rows());
        expect_same_key_rows(a, 0, b, 0, gaps.k.size(0));
        expect_same_scalars(a, b);
      });
    }
  }
}

TEST(InvarianceOfDecode, ADecodeStepEqualsItsPrefillRow) {
  // Every row of a prefill, decoded one by one through pages.
  const Problem prefill(Case{{4, 2, 32, 16, 32, 16, 2}, {{70, 70}}, DType::kBFloat16, DType::kBFloat16});
  for_each_target(Targets::kCpu, [&](Context context) {
    context.threads = 1;
    const Tensor blocks = run_select(context, prefill.select_params());
    Problem selected = prefill;
    selected.blocks = blocks;
    const AttentionResult sparse = run_sparse(context, selected.sparse_params());
    for (std::int64_t row = 0; row < 70; ++row) {
      Problem step = selected.chunk(row, row + 1);
      const PagedProblem paged(step, 16, 100 + static_cast<std::uint64_t>(row));
      step.blocks = run_select(context, paged.select_params());
      expect_same_bytes("blocks", step.blocks.bytes(), blocks.bytes(1, row, row + 1));
      const AttentionResult decoded = run_sparse(context, paged.sparse_params());
      expect_same_bytes("out", decoded.out.bytes(), sparse.out.bytes(0, row, row + 1));
      expect_same_bytes("lse", decoded.lse.bytes(), sparse.lse.bytes(0, row, row + 1));
    }
  });
}

}  // namespace
}  // namespace msa::testing
