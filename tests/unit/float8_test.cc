// SPDX-License-Identifier: Apache-2.0
// float8_e4m3 as the storage of keys, values and index keys: the numbers themselves, and operators that must give bit
// for bit what they give on the same numbers in a wider type, on every backend and instruction set.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "msa/error.h"
#include "src/cache/paged_cache.h"
#include "src/core/float_convert.h"
#include "tests/unit/support/differences.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::testing {
namespace {

using core::f8_to_float;
using core::float_to_f8;

TEST(Float8, EveryNumberHasItsValueAndComesBack) {
  for (int bits = 0; bits < 256; ++bits) {
    const auto byte = static_cast<std::uint8_t>(bits);
    const int exponent = (bits >> 3) & 15, mantissa = bits & 7;
    const float value = f8_to_float(byte);
    EXPECT_EQ(std::signbit(value), bits >= 128);
    if ((bits & 127) == 127) {
      EXPECT_TRUE(std::isnan(value));
    } else {
      const double magnitude = exponent == 0 ? mantissa * 0x1p-9 : std::ldexp(1 + mantissa / 8.0, exponent - 7);
      EXPECT_EQ(std::abs(value), magnitude) << bits;
    }
    EXPECT_EQ(float_to_f8(value), byte);
  }
}

TEST(Float8, RoundsToNearestEvenAndStopsAt448) {
  for (int bits = 0; bits < 126; ++bits) {  // between neighbours, subnormal ones too
    const auto low = static_cast<std::uint8_t>(bits), high = static_cast<std::uint8_t>(bits + 1);
    const float middle = (f8_to_float(low) + f8_to_float(high)) / 2;
    EXPECT_EQ(float_to_f8(middle), bits % 2 == 0 ? low : high) << bits;
    EXPECT_EQ(float_to_f8(std::nextafter(middle, 0.0f)), low) << bits;
    EXPECT_EQ(float_to_f8(-std::nextafter(middle, 1e9f)), high | 0x80) << bits;
  }
  for (const float large : {448.0f, 449.0f, 1e30f, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(f8_to_float(float_to_f8(large)), 448.0f);
    EXPECT_EQ(f8_to_float(float_to_f8(-large)), -448.0f);
  }
  EXPECT_EQ(float_to_f8(1e-30f), 0);
}

// Keys and values of a problem as float8, and the same numbers in the problem's own dtype.
struct Rounded {
  explicit Rounded(const Case& c) : wide(c), narrow(c) {
    for (Tensor* tensor : {&narrow.k, &narrow.v, &narrow.k_idx}) *tensor = tensor->as(DType::kFloat8E4M3);
    wide.k = narrow.k.as(c.dtype);
    wide.v = narrow.v.as(c.dtype);
    wide.k_idx = narrow.k_idx.as(c.index_dtype);
    wide.select();
    narrow.blocks = wide.blocks;
  }
  Problem wide, narrow;
};

class Float8 : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, Float8, ::testing::ValuesIn(all_cases()), case_name);

TEST_P(Float8, OperatorsTakeItAsTheNumbersItIs) {
  const Rounded rounded(GetParam());
  const PagedProblem pages(rounded.narrow, 2 * rounded.narrow.geometry.block_size);
  for_each_target(Targets::kAll, [&](const Context& context) {
    expect_same_bytes("blocks", run_select(context, rounded.narrow.select_params()),
                      run_select(context, rounded.wide.select_params()));
    expect_same_bytes("blocks, paged", run_select(context, pages.select_params()),
                      run_select(context, rounded.wide.select_params()));
    const AttentionResult sparse = run_sparse(context, rounded.wide.sparse_params());
    for (const AttentionResult& got :
         {run_sparse(context, rounded.narrow.sparse_params()), run_sparse(context, pages.sparse_params())}) {
      expect_same_bytes("sparse out", got.out, sparse.out);
      expect_same_bytes("sparse lse", got.lse, sparse.lse);
    }
    const AttentionResult dense = run_dense(context, rounded.wide.dense_params());
    const AttentionResult got = run_dense(context, rounded.narrow.dense_params());
    expect_same_bytes("dense out", got.out, dense.out);
    expect_same_bytes("dense lse", got.lse, dense.lse);
  });
}

TEST(Float8Rules, EveryNumberIsRead) {
  // A value tensor that holds all numbers but NaN; with one key a query's result is its value.
  Case c{{1, 1, 16, 16, 16, 16, 1}, {}};
  for (int i = 0; i < 16; ++i) c.lengths.push_back({1, 1});
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    c.dtype = dtype;
    Rounded rounded(c);
    for (int i = 0; i < 256; ++i) {
      rounded.narrow.v.set((i & 127) == 127 ? 0.0 : f8_to_float(static_cast<std::uint8_t>(i)), i / 16, 0, i % 16);
    }
    for_each_target(Targets::kAll, [&](const Context& context) {
      const AttentionResult got = run_sparse(context, rounded.narrow.sparse_params());
      for (int i = 0; i < 256; ++i) {
        EXPECT_EQ(got.out.at(i / 16, 0, i % 16), rounded.narrow.v.at(i / 16, 0, i % 16)) << i;
      }
    });
  }
}

TEST(Float8Rules, EveryIndexKeyIsRead) {
  // Windows of eight neighbours in the order of their values, NaN the least, each the one number of a block, of which
  // the query chooses four: two numbers next to each other are told apart by one of them.
  std::vector<int> order;
  for (int i = 0; i < 256; ++i) order.push_back(i);
  const auto rank = [](int bits) {
    const float value = f8_to_float(static_cast<std::uint8_t>(bits));
    return std::isnan(value) ? -1e9f : value;
  };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return rank(a) < rank(b); });
  for (const std::int64_t dim : {16, 48, 80, 128}) {
    Case c{{1, 1, 16, 16, dim, 16, 4}, {}};
    for (int i = 0; i + 8 <= 256; ++i) c.lengths.push_back({1, 8 * 16});
    Problem narrow(c);
    narrow.k_idx = narrow.k_idx.as(DType::kFloat8E4M3);
    narrow.local_blocks = 0;
    for (std::int64_t s = 0; s < narrow.sequences(); ++s) {
      const std::int64_t place = s % 16, at = (s * 7) % dim;
      for (std::int64_t d = 0; d < dim; ++d) narrow.q_idx.set(d == at ? 1.0 : 0.0, s, 0, d);
      for (std::int64_t j = 0; j < 8 * 16; ++j) {
        const bool is_number = j % 16 == place;
        const int bits = is_number ? order[static_cast<std::size_t>(s + j / 16)] : 0x7f;
        for (std::int64_t d = 0; d < dim; ++d) {
          narrow.k_idx.set(d == at ? f8_to_float(static_cast<std::uint8_t>(bits)) : 0.0, s * 8 * 16 + j, d);
        }
      }
    }
    narrow.select();
    for_each_target(Targets::kAll, [&](const Context& context) {
      expect_same_bytes("blocks", run_select(context, narrow.select_params()), narrow.blocks);
    });
  }
}

TEST(Float8Rules, GradientsAndMixedTypesAreRefused) {
  const Problem problem(Case{{4, 2, 32, 16, 16, 16, 2}, {{9, 50}}});
  Problem narrow = problem;
  narrow.k = narrow.k.as(DType::kFloat8E4M3);
  const Context context = reference_context();
  EXPECT_THROW(run_sparse(context, narrow.sparse_params()), Error) << "v must have k's dtype";
  narrow.v = narrow.v.as(DType::kFloat8E4M3);
  const AttentionResult forward = run_sparse(context, narrow.sparse_params());
  EXPECT_THROW(run_sparse_backward(context, narrow.sparse_params(), forward, make_dout(problem), nullptr), Error);
  narrow.q = narrow.q.as(DType::kFloat8E4M3);
  EXPECT_THROW(run_sparse(context, narrow.sparse_params()), Error) << "queries are not stored";
  narrow = problem;
  narrow.k_idx = narrow.k_idx.as(DType::kFloat8E4M3);
  EXPECT_THROW(run_kl(context, narrow.kl_params(false)), Error);
}

TEST(Float8Rules, ACacheRoundsWhatItIsGiven) {
  cache::CacheShape shape;
  shape.page_size = 4;
  shape.dtype = shape.index_dtype = DType::kFloat8E4M3;
  shape.layers = {{2, 16, 16, 16}};
  EXPECT_EQ(shape.bytes_per_token(), 2 * 16 + 2 * 16 + 16u);
  cache::PagedCache cache(shape, 3);
  const cache::SequenceId sequence = cache.create_sequence();
  Random random(3);
  Tensor k(DType::kBFloat16, {7, 2, 16}, Layout::kContiguous), v(DType::kFloat32, {7, 2, 16}, Layout::kContiguous);
  Tensor k_idx(DType::kFloat16, {7, 16}, Layout::kGaps);
  k.fill_normal(random, 300.0);  // some beyond 448
  v.fill_normal(random, 0.01);   // some subnormal
  k_idx.fill_normal(random);
  cache.append(sequence, 7);
  cache.write(0, sequence, 0, k.view(), v.view(), k_idx.view());
  const auto pages = cache.pages(sequence);
  const auto stored = [&](const ConstTensorView& view, std::int64_t row, std::int64_t head, std::int64_t d) {
    std::int64_t offset = pages[static_cast<std::size_t>(row / 4)] * view.stride(0) + row % 4 * view.stride(1) + d;
    if (view.rank == 4) offset += head * view.stride(2);
    return static_cast<double>(core::load_element(view.data, view.dtype, offset));
  };
  const auto rounded = [](double x) { return static_cast<double>(f8_to_float(float_to_f8(static_cast<float>(x)))); };
  for (std::int64_t row = 0; row < 7; ++row) {
    for (std::int64_t d = 0; d < 16; ++d) {
      for (std::int64_t head = 0; head < 2; ++head) {
        EXPECT_EQ(stored(cache.keys(0), row, head, d), rounded(k.at(row, head, d)));
        EXPECT_EQ(stored(cache.values(0), row, head, d), rounded(v.at(row, head, d)));
      }
      EXPECT_EQ(stored(cache.index_keys(0), row, 0, d), rounded(k_idx.at(row, d)));
    }
  }
}

}  // namespace
}  // namespace msa::testing
