// SPDX-License-Identifier: Apache-2.0
// Attention over selected blocks, forward and backward, on every backend and instruction set: within the tolerance rule
// of SPEC section 6 of the reference, and the reference's own gradient against finite differences.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "msa/attention.h"
#include "tests/unit/support/differences.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::testing {
namespace {

class SparseAttention : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, SparseAttention, ::testing::ValuesIn(all_cases()), case_name);

TEST_P(SparseAttention, ForwardIsWithinTheRule) {
  const Problem problem(GetParam());
  const Problem wide = problem.as_float32();
  const AttentionResult exact = run_sparse(reference_context(), wide.sparse_params());
  const AttentionResult naive = naive_attention(problem.sparse_params());
  for_each_target(Targets::kAll, [&](const Context& context) {
    const AttentionResult got = run_sparse(context, problem.sparse_params());
    expect_within_rule("out", got.out, exact.out, naive.out);
    expect_within_rule("lse", got.lse, exact.lse, naive.lse);
  });
}

void expect_backward_within_rule(const Problem& problem) {
  const Problem wide = problem.as_float32();
  const Tensor dout = make_dout(problem);
  const Tensor dlse = make_dlse(problem);
  const AttentionResult wide_forward = run_sparse(reference_context(), wide.sparse_params());
  const AttentionGradients exact =
      run_sparse_backward(reference_context(), wide.sparse_params(), wide_forward, dout.as(DType::kFloat32), &dlse);
  const AttentionGradients naive = naive_attention_backward(problem.sparse_params(), dout, &dlse);
  for_each_target(Targets::kCpu, [&](const Context& context) {
    const AttentionResult forward = run_sparse(context, problem.sparse_params());
    const AttentionGradients got = run_sparse_backward(context, problem.sparse_params(), forward, dout, &dlse);
    expect_within_rule("dq", got.dq, exact.dq, naive.dq);
    expect_within_rule("dk", got.dk, exact.dk, naive.dk);
    expect_within_rule("dv", got.dv, exact.dv, naive.dv);
  });
}

TEST_P(SparseAttention, BackwardIsWithinTheRule) { expect_backward_within_rule(Problem(GetParam())); }

TEST(SparseAttentionRules, NoDlseMeansZero) {
  const Problem problem(Case{{4, 2, 32, 16, 16, 16, 2}, {{9, 50}, {20, 20}}});
  const Tensor dout = make_dout(problem);
  Tensor zero = make_dlse(problem);
  zero.fill(0);
  for_each_target(Targets::kAll, [&](const Context& context) {
    const AttentionResult forward = run_sparse(context, problem.sparse_params());
    const AttentionGradients without = run_sparse_backward(context, problem.sparse_params(), forward, dout, nullptr);
    const AttentionGradients with = run_sparse_backward(context, problem.sparse_params(), forward, dout, &zero);
    expect_same_bytes("dq", without.dq, with.dq);
    expect_same_bytes("dk", without.dk, with.dk);
    expect_same_bytes("dv", without.dv, with.dv);
  });
}

TEST(SparseAttentionRules, BackwardOfManyQueriesIsWithinTheRule) {
  if (emulates_device()) GTEST_SKIP() << "long; tests/cuda has a smaller one";
  // Queries enough for several tasks, which add to the same keys.
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    expect_backward_within_rule(Problem(Case{{4, 2, 16, 32, 16, 64, 3}, {{520, 600}, {300, 300}}, dtype, dtype}));
  }
}

TEST(SparseAttentionRules, ScaleIsAnArgument) {
  Problem problem(Case{{4, 2, 32, 16, 16, 16, 2}, {{9, 50}}});
  for (const double scale : {1.0, 0.01, 0.0, -0.5}) {
    SCOPED_TRACE(scale);
    problem.scale = scale;
    const AttentionResult exact = run_sparse(reference_context(), problem.sparse_params());
    const AttentionResult naive = naive_attention(problem.sparse_params());
    for_each_target(Targets::kCpu, [&](const Context& context) {
      const AttentionResult got = run_sparse(context, problem.sparse_params());
      expect_within_rule("out", got.out, exact.out, naive.out);
      expect_within_rule("lse", got.lse, exact.lse, naive.lse);
    });
  }
}

TEST(SparseAttentionRules, LargeLogitsDoNotOverflow) {
  // Scores of thousands: exp of any of them overflows, of their differences it does not.
  Problem problem(Case{{4, 2, 64, 32, 16, 16, 3}, {{20, 70}}});
  Random random(8);
  problem.q.fill_normal(random, 100);
  problem.k.fill_normal(random, 100);
  const AttentionResult exact = run_sparse(reference_context(), problem.sparse_params());
  const AttentionResult naive = naive_attention(problem.sparse_params());
  for_each_target(Targets::kCpu, [&](const Context& context) {
    const AttentionResult got = run_sparse(context, problem.sparse_params());
    expect_within_rule("out", got.out, exact.out, naive.out);
    expect_within_rule("lse", got.lse, exact.lse, naive.lse);
  });
}

// Keys of block b score `first` + `per_block` * b, beside their noise: what was summed first is far too small, or what
// comes last too small to count.
Problem problem_with_steps(double per_block, double first = 0) {
  Problem problem(Case{{16, 1, 64, 64, 16, 64, 4}, {{70, 256}}, DType::kBFloat16});
  Random random(11);
  std::uniform_real_distribution<double> around(0.25, 0.75);
  for (std::int64_t t = 0; t < 70; ++t) {
    for (std::int64_t h = 0; h < 16; ++h) {
      for (std::int64_t d = 0; d < 64; ++d) problem.q.set(around(random), t, h, d);
    }
  }
  problem.k.fill_normal(random, 0.5);
  for (std::int64_t t = 0; t < 256; ++t) {
    // 64 dimensions of about 0.5, scale 1/8: a step of 1 in all of them is about 4 in the score.
    const double step = (first + per_block * static_cast<double>(t / 64)) / 4;
    for (std::int64_t d = 0; d < 64; ++d) problem.k.set(problem.k.at(t, 0, d) + step, t, 0, d);
  }
  return problem;
}

TEST(SparseAttentionRules, ScoresMayRiseAndFallFromBlockToBlock) {
  for (const double per_block : {4.0, 12.0, 30.0, 200.0, 8000.0, -12.0, -60.0, -200.0}) {
    SCOPED_TRACE(per_block);
    const Problem problem = problem_with_steps(per_block);
    const AttentionResult exact = run_sparse(reference_context(), problem.as_float32().sparse_params());
    const AttentionResult naive = naive_attention(problem.sparse_params());
    for_each_target(Targets::kCpu, [&](const Context& context) {
      const AttentionResult got = run_sparse(context, problem.sparse_params());
      expect_within_rule("out", got.out, exact.out, naive.out);
      expect_within_rule("lse", got.lse, exact.lse, naive.lse);
    });
  }
}

// A kernel may take what a row's first scores lie near for granted: here they lie near 0, at the edges of that, and far
// off, and later ones come back.
TEST(SparseAttentionRules, FirstScoresMayLieAnywhere) {
  for (const double first : {-300.0, -80.0, -14.0, -12.0, -9.0, 9.0, 11.0, 12.5, 40.0, 300.0}) {
    for (const double per_block : {0.0, -first / 2}) {
      SCOPED_TRACE(first);
      SCOPED_TRACE(per_block);
      const Problem problem = problem_with_steps(per_block, first);
      const AttentionResult exact = run_sparse(reference_context(), problem.as_float32().sparse_params());
      const AttentionResult naive = naive_attention(problem.sparse_params());
      for_each_target(Targets::kCpu, [&](const Context& context) {
        const AttentionResult got = run_sparse(context, problem.sparse_params());
        expect_within_rule("out", got.out, exact.out, naive.out);
        expect_within_rule("lse", got.lse, exact.lse, naive.lse);
      });
    }
  }
}

TEST(SparseAttentionRules, AScoreThatIsNotANumberReachesItsRowsAlone) {
  const Problem clean = problem_with_steps(0);
  const std::int64_t key = 210;  // of the last block: not the first that a row sees, and hidden from the first queries
  Problem problem = clean;
  problem.k.set(std::numeric_limits<double>::quiet_NaN(), key, 0, 5);
  for_each_target(Targets::kCpu, [&](const Context& context) {
    const AttentionResult expected = run_sparse(context, clean.sparse_params());
    const AttentionResult got = run_sparse(context, problem.sparse_params());
    for (std::int64_t t = 0; t < 70; ++t) {
      const bool sees = t + 256 - 70 >= key;
      for (std::int64_t h = 0; h < 16; ++h) {
        ASSERT_EQ(std::isnan(got.lse.at(t, h)), sees) << t;
        ASSERT_EQ(std::isnan(got.out.at(t, h, 3)), sees) << t;
        if (!sees) {
          ASSERT_EQ(got.out.at(t, h, 3), expected.out.at(t, h, 3)) << t;
        }
      }
    }
  });
}

// Sixteen heads that share what arithmetic there is for sixteen rows: one whose scores jump in the third block, one
// whose scores are all far from 0, one whose query is not a number. The others must not notice.
TEST(SparseAttentionRules, HeadsOfAGroupDoNotNoticeEachOther) {
  Problem plain(Case{{16, 1, 128, 128, 16, 128, 4}, {{40, 512}}, DType::kBFloat16});
  for (std::int64_t t = 0; t < 40; ++t) {
    for (std::int64_t h = 0; h < 16; ++h) {
      plain.q.set(0, t, h, 0);
      plain.q.set(0, t, h, 1);
    }
  }
  for (std::int64_t t = 0; t < 512; ++t) {
    plain.k.set(t >= 256 && t < 384 ? 8 : 0, t, 0, 0);
    plain.k.set(8, t, 0, 1);
  }
  Problem odd = plain;
  for (std::int64_t t = 0; t < 40; ++t) {
    odd.q.set(60, t, 3, 0);
    odd.q.set(-400, t, 5, 1);
  }
  Problem poisoned = odd;
  for (std::int64_t t = 0; t < 40; ++t) poisoned.q.set(std::numeric_limits<double>::quiet_NaN(), t, 9, 7);
  const AttentionResult exact = run_sparse(reference_context(), odd.as_float32().sparse_params());
  const AttentionResult naive = naive_attention(odd.sparse_params());
  for_each_target(Targets::kCpu, [&](const Context& context) {
    const AttentionResult expected = run_sparse(context, plain.sparse_params());
    const AttentionResult got = run_sparse(context, odd.sparse_params());
    const AttentionResult with_nan = run_sparse(context, poisoned.sparse_params());
    expect_within_rule("out", got.out, exact.out, naive.out);
    expect_within_rule("lse", got.lse, exact.lse, naive.lse);
    for (std::int64_t t = 0; t < 40; ++t) {
      for (std::int64_t h = 0; h < 16; ++h) {
        ASSERT_EQ(std::isnan(with_nan.lse.at(t, h)), h == 9);
        for (std::int64_t e = 0; e < 128; ++e) {
          ASSERT_EQ(std::isnan(with_nan.out.at(t, h, e)), h == 9) << t << " " << h;
          if (h != 9) {
            ASSERT_EQ(with_nan.out.at(t, h, e), got.out.at(t, h, e)) << t << " " << h;
          }
          if (h != 3 && h != 5) {
            ASSERT_EQ(got.out.at(t, h, e), expected.out.at(t, h, e)) << t << " " << h;
          }
        }
      }
    }
  });
}

// Scores within a rounding of where a kernel may decide one way or the other: how it decides must not depend on the
// heads beside. `first` is the score of every key of the first block, `second` of one key of the second, before
// scaling; as sums of three bf16 numbers they are exact.
void expect_heads_apart_at(const double (&first)[3], const double (&second)[3], double scale) {
  Problem problem(Case{{16, 1, 64, 64, 16, 64, 3}, {{3, 192}}, DType::kBFloat16});
  for (std::int64_t d = 0; d < 64; ++d) {
    for (std::int64_t t = 0; t < 3; ++t) {
      for (std::int64_t h = 0; h < 16; ++h) problem.q.set(d < 3 ? 1 : 0, t, h, d);
    }
    for (std::int64_t t = 0; t < 192; ++t) {
      const bool is_second = t == 70;
      problem.k.set(d > 2 ? 0 : t < 64 ? first[d] : is_second ? second[d] : d == 0 ? -400 : 0, t, 0, d);
    }
  }
  Problem poisoned = problem;
  for (std::int64_t t = 0; t < 3; ++t) poisoned.q.set(std::numeric_limits<double>::quiet_NaN(), t, 9, 7);
  for_each_target(Targets::kCpu, [&](const Context& context) {
    SparseAttentionParams params = problem.sparse_params();
    SparseAttentionParams with_nan = poisoned.sparse_params();
    params.scale = with_nan.scale = scale;
    const AttentionResult expected = run_sparse(context, params);
    const AttentionResult got = run_sparse(context, with_nan);
    for (std::int64_t t = 0; t < 3; ++t) {
      for (std::int64_t h = 0; h < 16; ++h) {
        if (h != 9) {
          ASSERT_EQ(got.lse.at(t, h), expected.lse.at(t, h)) << t << " " << h;
        }
      }
    }
  });
}

TEST(SparseAttentionRules, DecisionsAtTheEdgeAreTheRowsOwn) {
  // 16 powers of two above the first: one way of rounding is beyond, the other is not.
  expect_heads_apart_at({-206, -0.4140625, -0.0017242431640625}, {-117.5, -0.1923828125, -0.00055694580078125}, 0.125);
  // Around 18 powers of two below 0, and around 16 above.
  for (int step = -40; step <= 40; ++step) {
    const double low = -12.4766 * 8 + step * 0x1p-15;
    const double high = 11.0904 * 8 + step * 0x1p-15;
    for (const double score : {low, high}) {
      const double head = std::floor(score);
      const double middle = std::floor((score - head) * 256) / 256;
      expect_heads_apart_at({head, middle, std::round((score - head - middle) * 0x1p15) * 0x1p-15}, {-400, 0, 0},
                            0.125);
    }
  }
}

TEST(SparseAttentionRules, RowsWithoutBlocksAreInert) {
  Problem problem(Case{{4, 2, 32, 48, 16, 16, 2}, {{6, 40}, {3, 3}}});
  for (const std::int64_t row : {0, 3, 8}) {
    for (std::int64_t slot = 0; slot < 2; ++slot) problem.blocks.set(-1, 1, row, slot);
  }
  const Tensor dout = make_dout(problem);
  const Tensor dlse = make_dlse(problem);
  for_each_target(Targets::kAll, [&](const Context& context) {
    const AttentionResult got = run_sparse(context, problem.sparse_params());
    const AttentionGradients grads = run_sparse_backward(context, problem.sparse_params(), got, dout, &dlse);
    for (const std::int64_t row : {0, 3, 8}) {
      for (std::int64_t head = 2; head < 4; ++head) {
        EXPECT_EQ(got.lse.at(row, head), -std::numeric_limits<double>::infinity());
        for (std::int64_t d = 0; d < 48; ++d) EXPECT_EQ(got.out.at(row, head, d), 0);
        for (std::int64_t d = 0; d < 32; ++d) EXPECT_EQ(grads.dq.at(row, head, d), 0);
      }
      EXPECT_TRUE(std::isfinite(got.lse.at(row, 0)));
    }
    for (const Tensor* tensor : {&grads.dq, &grads.dk, &grads.dv}) {
      for (const double value : tensor->values()) ASSERT_TRUE(std::isfinite(value));
    }
  });
}

TEST(SparseAttentionRules, PaddingRowsOfOutputsAreInert) {
  Case c{{4, 2, 32, 48, 16, 16, 2}, {{6, 40}, {3, 3}}};
  c.padding_rows = 4;
  const Problem problem(c);
  const Tensor dout = make_dout(problem);
  for_each_target(Targets::kAll, [&](const Context& context) {
    const AttentionResult got = run_sparse(context, problem.sparse_params());
    const AttentionGradients grads = run_sparse_backward(context, problem.sparse_params(), got, dout, nullptr);
    for (std::int64_t i = 0; i < 4; ++i) {
      for (std::int64_t head = 0; head < 4; ++head) {
        EXPECT_EQ(got.lse.at(9 + i, head), -std::numeric_limits<double>::infinity());
        for (std::int64_t d = 0; d < 48; ++d) EXPECT_EQ(got.out.at(9 + i, head, d), 0);
        for (std::int64_t d = 0; d < 32; ++d) EXPECT_EQ(grads.dq.at(9 + i, head, d), 0);
      }
      for (std::int64_t head = 0; head < 2; ++head) {
        for (std::int64_t d = 0; d < 32; ++d) EXPECT_EQ(grads.dk.at(43 + i, head, d), 0);
        for (std::int64_t d = 0; d < 48; ++d) EXPECT_EQ(grads.dv.at(43 + i, head, d), 0);
      }
    }
  });
}

TEST(SparseAttentionRules, PartialResultsMergeByLse) {
  // Two calls over complementary blocks, merged by their lse, give the call over all of them.
  Problem problem(Case{{4, 2, 32, 16, 16, 16, 4}, {{5, 64}}});
  for_each_target(Targets::kAll, [&](const Context& context) {
    const AttentionResult whole = run_sparse(context, problem.sparse_params());
    Problem low = problem;
    Problem high = problem;
    for (std::int64_t group = 0; group < 2; ++group) {
      for (std::int64_t row = 0; row < 5; ++row) {
        for (std::int64_t slot = 2; slot < 4; ++slot) {
          high.blocks.set(problem.blocks.at(group, row, slot), group, row, slot - 2);
          high.blocks.set(-1, group, row, slot);
          low.blocks.set(-1, group, row, slot);
        }
      }
    }
    const AttentionResult a = run_sparse(context, low.sparse_params());
    const AttentionResult b = run_sparse(context, high.sparse_params());
    for (std::int64_t row = 0; row < 5; ++row) {
      for (std::int64_t head = 0; head < 4; ++head) {
        const double total = std::log(std::exp(a.lse.at(row, head)) + std::exp(b.lse.at(row, head)));
        // lse is of order 1 to 8 here: a few float32 roundings of 8.
        EXPECT_NEAR(total, whole.lse.at(row, head), 16 * 0x1p-24 * 8);
        for (std::int64_t d = 0; d < 16; ++d) {
          const double merged = std::exp(a.lse.at(row, head) - total) * a.out.at(row, head, d) +
                                std::exp(b.lse.at(row, head) - total) * b.out.at(row, head, d);
          EXPECT_NEAR(merged, whole.out.at(row, head, d), 32 * 0x1p-24 * 8);
        }
      }
    }
  });
}

TEST(SparseAttentionRules, TrustedBlocksGiveTheSame) {
  const Problem problem(Case{{6, 3, 48, 16, 16, 32, 3}, {{9, 150}, {33, 40}}});
  for_each_target(Targets::kAll, [&](const Context& context) {
    SparseAttentionParams params = problem.sparse_params();
    const AttentionResult checked = run_sparse(context, params);
    params.trusted_blocks = true;
    const AttentionResult trusted = run_sparse(context, params);
    expect_same_bytes("out", trusted.out, checked.out);
    expect_same_bytes("lse", trusted.lse, checked.lse);
  });
}

TEST(SparseAttentionReference, GradientEqualsFiniteDifferences) {
  Problem problem(Case{{4, 2, 16, 32, 16, 16, 2}, {{3, 40}, {2, 2}}});
  const Tensor dout = make_dout(problem);
  const Tensor dlse = make_dlse(problem);
  const auto forward = [&] { return run_sparse(reference_context(), problem.sparse_params()); };
  const AttentionGradients grads =
      run_sparse_backward(reference_context(), problem.sparse_params(), forward(), dout, &dlse);
  const auto loss = [&] { return weigh_outputs(forward(), dout, dlse); };
  expect_gradient_of(loss, problem.q, grads.dq, "q");
  expect_gradient_of(loss, problem.k, grads.dk, "k");
  expect_gradient_of(loss, problem.v, grads.dv, "v");
}

// A key alone has probability 1 however large its score: it must be the reference, and be rounded as the score was.
TEST(SparseAttentionRules, AKeyAloneIsCertain) {
  for (const DType dtype : kFloatTypes) {
    for (const double size : {0.25, 0.6875, 0.8125, 152.0, 608.0, 24576.0}) {
      Problem problem(Case{{4, 2, 128, 64, 16, 16, 1}, {{1, 1}, {1, 1}}, dtype});
      problem.q.fill(size);
      problem.k.fill(size);
      const Tensor dout = make_dout(problem);
      for_each_target(Targets::kCpu, [&](const Context& context) {
        const AttentionResult got = run_sparse(context, problem.sparse_params());
        const AttentionGradients grads = run_sparse_backward(context, problem.sparse_params(), got, dout, nullptr);
        for (std::int64_t t = 0; t < 2; ++t) {
          for (std::int64_t h = 0; h < 4; ++h) {
            for (std::int64_t e = 0; e < 64; ++e) {
              ASSERT_EQ(got.out.at(t, h, e), problem.v.at(t, h / 2, e)) << name_of(dtype) << " " << size;
            }
          }
          for (std::int64_t g = 0; g < 2; ++g) {
            for (std::int64_t e = 0; e < 64; ++e) {
              const double exact = dout.at(t, 2 * g, e) + dout.at(t, 2 * g + 1, e);
              ASSERT_NEAR(grads.dv.at(t, g, e), exact, 0x1p-7 * std::abs(exact) + 1e-6)
                  << name_of(dtype) << " " << size;
            }
          }
        }
      });
    }
  }
}

}  // namespace
}  // namespace msa::testing
