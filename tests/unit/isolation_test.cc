// SPDX-License-Identifier: Apache-2.0
// Data in tokens that a row does not see never reaches it (SPEC section 7): those tokens hold NaN here, and neither the
// row's results nor its gradients change by a bit.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "msa/msa.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

void poison_token(Tensor& tensor, std::int64_t token, std::int64_t head) {
  for (std::int64_t d = 0; d < tensor.size(2); ++d) tensor.set(kNaN, token, head, d);
}

void poison_index_token(Problem& problem, std::int64_t token) {
  for (std::int64_t d = 0; d < problem.geometry.index_dim; ++d) problem.k_idx.set(kNaN, token, d);
}

// Tokens of the packed buffer that query row `row` attends to with its blocks in `group`.
std::set<std::int64_t> seen_tokens(const Problem& problem, std::int64_t group, std::int64_t row) {
  std::set<std::int64_t> seen;
  const std::int64_t first = problem.cu_seqlens_k[static_cast<std::size_t>(problem.sequence_of(row))];
  for (std::int64_t slot = 0; slot < problem.blocks.size(2); ++slot) {
    const auto block = static_cast<std::int64_t>(problem.blocks.at(group, row, slot));
    if (block < 0) continue;
    for (std::int64_t j = 0; j < problem.geometry.block_size; ++j) {
      const std::int64_t position = block * problem.geometry.block_size + j;
      if (position <= problem.position(row)) seen.insert(first + position);
    }
  }
  return seen;
}

std::vector<Case> isolation_cases() {
  std::vector<Case> cases = {
      {{4, 2, 32, 48, 16, 16, 2},
       {{3, 90}, {0, 20}, {2, 33}, {1, 16}},
       DType::kFloat32,
       DType::kFloat32,
       Layout::kGaps,
       2},
      {{9, 3, 64, 64, 64, 32, 2}, {{2, 150}, {5, 100}}, DType::kBFloat16, DType::kBFloat16, Layout::kContiguous, 0},
      {{14, 2, 16, 32, 16, 16, 3}, {{4, 130}, {1, 1}, {16, 99}}, DType::kFloat16, DType::kFloat16, Layout::kGaps, 1},
  };
  // On a device the positions have entries for padding rows, too; here they have none.
  if (emulates_device()) {
    for (Case& c : cases) c.padding_rows = 0;
  }
  return cases;
}

class Isolation : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, Isolation, ::testing::ValuesIn(isolation_cases()), case_name);

TEST_P(Isolation, UnselectedTokensDoNotReachSparseRows) {
  // Queries stand in the middle of their sequences, so that there are future keys in the local block too.
  Problem clean(GetParam());
  for (std::int64_t row = 0; row < clean.queries(); ++row) {
    const auto s = static_cast<std::size_t>(clean.sequence_of(row));
    const std::int32_t i = static_cast<std::int32_t>(row) - clean.cu_seqlens_q[s];
    const std::int32_t room =
        clean.cu_seqlens_k[s + 1] - clean.cu_seqlens_k[s] - (clean.cu_seqlens_q[s + 1] - clean.cu_seqlens_q[s]);
    clean.query_positions.push_back(room * 2 / 3 + i);
  }
  clean.select();
  Problem poisoned = clean;
  std::vector<std::set<std::int64_t>> seen(static_cast<std::size_t>(clean.geometry.kv_heads));
  for (std::int64_t group = 0; group < clean.geometry.kv_heads; ++group) {
    auto& tokens = seen[static_cast<std::size_t>(group)];
    for (std::int64_t row = 0; row < clean.queries(); ++row) tokens.merge(seen_tokens(clean, group, row));
    for (std::int64_t token = 0; token < clean.k.size(0); ++token) {
      if (tokens.count(token) != 0) continue;
      poison_token(poisoned.k, token, group);
      poison_token(poisoned.v, token, group);
    }
  }
  const Tensor dout = make_dout(clean);
  const Tensor dlse = make_dlse(clean);
  for_each_target(Targets::kAll, [&](const Context& context) {
    const AttentionResult a = run_sparse(context, clean.sparse_params());
    const AttentionResult b = run_sparse(context, poisoned.sparse_params());
    expect_same_bytes("out", b.out, a.out);
    expect_same_bytes("lse", b.lse, a.lse);
    const AttentionGradients ga = run_sparse_backward(context, clean.sparse_params(), a, dout, &dlse);
    const AttentionGradients gb = run_sparse_backward(context, poisoned.sparse_params(), b, dout, &dlse);
    expect_same_bytes("dq", gb.dq, ga.dq);
    expect_same_bytes("dk", gb.dk, ga.dk);
    expect_same_bytes("dv", gb.dv, ga.dv);
    for (std::int64_t group = 0; group < clean.geometry.kv_heads; ++group) {
      for (std::int64_t token = 0; token < clean.k.size(0); ++token) {
        if (seen[static_cast<std::size_t>(group)].count(token) != 0) continue;
        for (std::int64_t d = 0; d < clean.geometry.head_dim; ++d) ASSERT_EQ(gb.dk.at(token, group, d), 0);
        for (std::int64_t d = 0; d < clean.geometry.value_dim; ++d) ASSERT_EQ(gb.dv.at(token, group, d), 0);
      }
    }
    KlResult ka = run_kl(context, clean.kl_params(false));
    KlResult kb = run_kl(context, poisoned.kl_params(false));
    EXPECT_EQ(kb.value, ka.value);
    const KlGradients da = run_kl_backward(context, clean.kl_params(false), ka, 1);
    const KlGradients db = run_kl_backward(context, poisoned.kl_params(false), kb, 1);
    expect_same_bytes("dq_idx", db.dq_idx, da.dq_idx);
    expect_same_bytes("dk_idx", db.dk_idx, da.dk_idx);
  });
}

TEST_P(Isolation, FutureTokensDoNotReachAnyOperator) {
  // Tokens behind the last query of every sequence are NaN: the rest of the local block, whole later blocks.
  Problem clean(GetParam());
  for (std::int64_t row = 0; row < clean.queries(); ++row) {
    const auto s = static_cast<std::size_t>(clean.sequence_of(row));
    const std::int32_t i = static_cast<std::int32_t>(row) - clean.cu_seqlens_q[s];
    const std::int32_t room =
        clean.cu_seqlens_k[s + 1] - clean.cu_seqlens_k[s] - (clean.cu_seqlens_q[s + 1] - clean.cu_seqlens_q[s]);
    clean.query_positions.push_back(room / 2 + i);
  }
  clean.select();
  Problem poisoned = clean;
  for (std::int64_t s = 0; s < clean.sequences(); ++s) {
    const auto i = static_cast<std::size_t>(s);
    const bool any = clean.cu_seqlens_q[i + 1] > clean.cu_seqlens_q[i];
    const std::int64_t visible = any ? clean.position(clean.cu_seqlens_q[i + 1] - 1) + 1 : 0;
    for (std::int64_t token = clean.cu_seqlens_k[i] + visible; token < clean.cu_seqlens_k[i + 1]; ++token) {
      poison_index_token(poisoned, token);
      for (std::int64_t head = 0; head < clean.geometry.kv_heads; ++head) {
        poison_token(poisoned.k, token, head);
        poison_token(poisoned.v, token, head);
      }
    }
  }
  const Tensor dout = make_dout(clean);
  for_each_target(Targets::kAll, [&](const Context& context) {
    expect_same_bytes("blocks", run_select(context, poisoned.select_params()),
                      run_select(context, clean.select_params()));
    expect_same_bytes("oracle", run_oracle(context, poisoned.oracle_params()),
                      run_oracle(context, clean.oracle_params()));
    const AttentionResult a = run_dense(context, clean.dense_params());
    const AttentionResult b = run_dense(context, poisoned.dense_params());
    expect_same_bytes("out", b.out, a.out);
    expect_same_bytes("lse", b.lse, a.lse);
    const AttentionGradients ga = run_dense_backward(context, clean.dense_params(), a, dout, nullptr);
    const AttentionGradients gb = run_dense_backward(context, poisoned.dense_params(), b, dout, nullptr);
    expect_same_bytes("dq", gb.dq, ga.dq);
    expect_same_bytes("dk", gb.dk, ga.dk);
    expect_same_bytes("dv", gb.dv, ga.dv);
    for (const bool whole_prefix : {false, true}) {
      KlResult ka = run_kl(context, clean.kl_params(whole_prefix));
      KlResult kb = run_kl(context, poisoned.kl_params(whole_prefix));
      EXPECT_EQ(kb.value, ka.value);
      const KlGradients da = run_kl_backward(context, clean.kl_params(whole_prefix), ka, 1);
      const KlGradients db = run_kl_backward(context, poisoned.kl_params(whole_prefix), kb, 1);
      expect_same_bytes("dq_idx", db.dq_idx, da.dq_idx);
      expect_same_bytes("dk_idx", db.dk_idx, da.dk_idx);
    }
    const SelectionRecall ra = selection_recall(context, clean.recall_params());
    const SelectionRecall rb = selection_recall(context, poisoned.recall_params());
    EXPECT_EQ(rb.rows, ra.rows);
    if (ra.rows > 0) {
      EXPECT_EQ(rb.block_recall, ra.block_recall);
      EXPECT_EQ(rb.score_recall, ra.score_recall);
    }
  });
}

TEST(IsolationOfOneToken, OnlyRowsThatSeeItChange) {
  // A prefill with NaN in one token: earlier rows, rows that did not select its block and other sequences keep every
  // bit, gradients included; rows that see it turn NaN, so nothing hides it either.
  const Problem clean(Case{{4, 2, 32, 16, 16, 16, 2}, {{60, 60}, {20, 45}}});
  const std::int64_t bad = 21;
  const std::int64_t head = 1;
  Problem poisoned = clean;
  poison_token(poisoned.k, bad, head);
  poison_token(poisoned.v, bad, head);
  const Tensor dout = make_dout(clean);
  for_each_target(Targets::kAll, [&](const Context& context) {
    const AttentionResult sparse_a = run_sparse(context, clean.sparse_params());
    const AttentionResult sparse_b = run_sparse(context, poisoned.sparse_params());
    const AttentionResult dense_a = run_dense(context, clean.dense_params());
    const AttentionResult dense_b = run_dense(context, poisoned.dense_params());
    const auto sparse_ga = run_sparse_backward(context, clean.sparse_params(), sparse_a, dout, nullptr);
    const auto sparse_gb = run_sparse_backward(context, poisoned.sparse_params(), sparse_b, dout, nullptr);
    const auto dense_ga = run_dense_backward(context, clean.dense_params(), dense_a, dout, nullptr);
    const auto dense_gb = run_dense_backward(context, poisoned.dense_params(), dense_b, dout, nullptr);
    const auto compare = [&](const char* what, const Tensor& a, const Tensor& b, std::int64_t row, std::int64_t h,
                             bool sees) {
      for (std::int64_t d = 0; d < (a.shape().size() == 3 ? a.size(2) : 1); ++d) {
        if (sees) {
          ASSERT_TRUE(std::isnan(b.at(row, h, d))) << what << " row " << row << " head " << h;
        } else {
          ASSERT_EQ(b.at(row, h, d), a.at(row, h, d)) << what << " row " << row << " head " << h;
        }
      }
    };
    for (std::int64_t row = 0; row < clean.queries(); ++row) {
      for (std::int64_t h = 0; h < 4; ++h) {
        const bool sees_dense = h / 2 == head && row < 60 && clean.position(row) >= bad;
        const bool sees_sparse = h / 2 == head && seen_tokens(clean, head, row).count(bad) != 0;
        compare("sparse out", sparse_a.out, sparse_b.out, row, h, sees_sparse);
        compare("sparse lse", sparse_a.lse, sparse_b.lse, row, h, sees_sparse);
        compare("sparse dq", sparse_ga.dq, sparse_gb.dq, row, h, sees_sparse);
        compare("dense out", dense_a.out, dense_b.out, row, h, sees_dense);
        compare("dense lse", dense_a.lse, dense_b.lse, row, h, sees_dense);
        compare("dense dq", dense_ga.dq, dense_gb.dq, row, h, sees_dense);
      }
    }
    // Keys of the other sequence and of the other head.
    expect_same_bytes("sparse dk of the other sequence", sparse_gb.dk.bytes(0, 60, 105),
                      sparse_ga.dk.bytes(0, 60, 105));
    expect_same_bytes("dense dk of the other sequence", dense_gb.dk.bytes(0, 60, 105), dense_ga.dk.bytes(0, 60, 105));
    expect_same_bytes("sparse dk of the other head", sparse_gb.dk.bytes(1, 0, 1), sparse_ga.dk.bytes(1, 0, 1));
    expect_same_bytes("dense dv of the other head", dense_gb.dv.bytes(1, 0, 1), dense_ga.dv.bytes(1, 0, 1));
  });
}

TEST(IsolationOfOneToken, InTilesThatQueriesShareOnlyRowsThatSeeItChange) {
  // bf16, groups that do not fill a tile of 16 rows: a tile holds rows of queries that do not visit the token's block,
  // or do not see the token: 0 times its NaN must not reach them.
  struct Shared {
    Case c;
    std::int64_t bad;
  };
  const Shared all[] = {
      {{{2, 1, 32, 32, 16, 16, 2}, {{60, 60}}, DType::kBFloat16}, 20},
      {{{6, 2, 32, 16, 16, 16, 2}, {{60, 60}}, DType::kBFloat16}, 21},
      {{{10, 2, 64, 64, 16, 16, 1}, {{45, 45}}, DType::kBFloat16}, 31},
      {{{4, 1, 64, 64, 16, 128, 2}, {{2, 257}}, DType::kBFloat16}, 256},  // the last token, in a block of its own
      {{{7, 1, 64, 64, 16, 64, 2}, {{9, 260}}, DType::kBFloat16}, 258},
  };
  for (const Shared& shared : all) {
    const Problem clean(shared.c);
    const std::int64_t bad = shared.bad;
    Problem poisoned = clean;
    poison_token(poisoned.v, bad, 0);
    const std::int64_t group = clean.q.size(1) / clean.k.size(1);
    for_each_target(Targets::kAll, [&](const Context& context) {
      const AttentionResult sparse_a = run_sparse(context, clean.sparse_params());
      const AttentionResult sparse_b = run_sparse(context, poisoned.sparse_params());
      const AttentionResult dense_a = run_dense(context, clean.dense_params());
      const AttentionResult dense_b = run_dense(context, poisoned.dense_params());
      for (std::int64_t row = 0; row < clean.queries(); ++row) {
        for (std::int64_t h = 0; h < clean.q.size(1); ++h) {
          const bool sees_dense = h / group == 0 && clean.position(row) >= bad;
          const bool sees_sparse = h / group == 0 && seen_tokens(clean, 0, row).count(bad) != 0;
          for (std::int64_t d = 0; d < clean.v.size(2); ++d) {
            const auto compare = [&](const char* what, const AttentionResult& a, const AttentionResult& b, bool sees) {
              if (sees) {
                ASSERT_TRUE(std::isnan(b.out.at(row, h, d))) << what << " row " << row << " head " << h;
              } else {
                ASSERT_EQ(b.out.at(row, h, d), a.out.at(row, h, d)) << what << " row " << row << " head " << h;
              }
            };
            compare("sparse out", sparse_a, sparse_b, sees_sparse);
            compare("dense out", dense_a, dense_b, sees_dense);
          }
        }
      }
    });
  }
}

TEST(IsolationOfOneToken, SelectionOfEarlierRowsKeepsEveryBit) {
  const Problem clean(Case{{2, 2, 16, 16, 32, 16, 2}, {{90, 90}, {20, 45}}});
  const std::int64_t bad = 40;
  Problem poisoned = clean;
  poison_index_token(poisoned, bad);
  for_each_target(Targets::kAll, [&](const Context& context) {
    const Tensor a = run_select(context, clean.select_params());
    const Tensor b = run_select(context, poisoned.select_params());
    expect_same_bytes("earlier rows", b.bytes(1, 0, bad), a.bytes(1, 0, bad));
    expect_same_bytes("the other sequence", b.bytes(1, 90, 110), a.bytes(1, 90, 110));
    KlResult ka = run_kl(context, clean.kl_params(true));
    KlResult kb = run_kl(context, poisoned.kl_params(true));
    const KlGradients ga = run_kl_backward(context, clean.kl_params(true), ka, 1);
    const KlGradients gb = run_kl_backward(context, poisoned.kl_params(true), kb, 1);
    expect_same_bytes("dq_idx of earlier rows", gb.dq_idx.bytes(0, 0, bad), ga.dq_idx.bytes(0, 0, bad));
    expect_same_bytes("dk_idx of the other sequence", gb.dk_idx.bytes(0, 90, 135), ga.dk_idx.bytes(0, 90, 135));
    EXPECT_TRUE(std::isnan(kb.value));
  });
}

}  // namespace
}  // namespace msa::testing
