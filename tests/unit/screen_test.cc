// SPDX-License-Identifier: Apache-2.0
// Screened selection against the unscreened one, which it must equal bit for bit on any input: random shapes, and
// inputs made to break an error bound (outlier channels, ties, ranges far below the rounding, subnormals, NaN,
// infinities, huge values), in the arithmetic of each instruction set and in bf16. Also the products against their
// definitions, and the running top-k against sorting.
#include "src/cpu/screen.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "src/core/buffer.h"
#include "src/core/float_convert.h"
#include "src/cpu/amx_tiles.h"
#include "src/cpu/dot_products.h"
#include "src/cpu/int8_dot.h"
#include "src/cpu/topk.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// Forces screening on or off for as long as it lives.
class ForcedScreening {
 public:
  explicit ForcedScreening(cpu::Screening screening) { cpu::force_screening(screening); }
  ~ForcedScreening() { cpu::force_screening(cpu::Screening::kAuto); }
  ForcedScreening(const ForcedScreening&) = delete;
  ForcedScreening& operator=(const ForcedScreening&) = delete;
};

Tensor select(const Context& context, const SelectBlocksParams& params, cpu::Screening screening) {
  const ForcedScreening forced(screening);
  return run_select(context, params);
}

void expect_screening_changes_nothing(const SelectBlocksParams& params) {
  for_each_target(Targets::kCpu, [&](Context context) {
    const Tensor expected = select(context, params, cpu::Screening::kNever);
    expect_same_bytes("blocks", select(context, params, cpu::Screening::kAlways), expected);
    expect_same_bytes("blocks", select(context, params, cpu::Screening::kAlwaysBf16), expected);
    expect_same_bytes("blocks", select(context, params, cpu::Screening::kAuto), expected);
    context.threads = 1;
    context.workspace_limit = std::size_t{1} << 20;  // nearly nothing shared
    expect_same_bytes("blocks", select(context, params, cpu::Screening::kAlways), expected);
    expect_same_bytes("blocks", select(context, params, cpu::Screening::kAlwaysBf16), expected);
  });
}

/// A copy of a tensor row behind row, on a cache line or `offset` elements off one.
class Compact {
 public:
  Compact(const ConstTensorView& from, std::int64_t offset = 0) : dtype_(from.dtype), offset_(offset) {
    for (int d = 0; d < from.rank; ++d) shape_.push_back(from.size(d));
    const std::int64_t columns = shape_.back();
    const std::int64_t planes = from.rank == 3 ? shape_[0] : 1;
    const std::int64_t rows = shape_[shape_.size() - 2];
    const auto bytes = static_cast<std::int64_t>(dtype_size(dtype_));
    memory_ =
        std::make_unique<core::Buffer<std::byte>>(static_cast<std::size_t>((offset + planes * rows * columns) * bytes));
    for (std::int64_t i = 0; i < planes; ++i) {
      for (std::int64_t j = 0; j < rows; ++j) {
        const std::int64_t at = from.rank == 3 ? i * from.stride(0) + j * from.stride(1) : j * from.stride(0);
        std::memcpy(memory_->data() + (offset + (i * rows + j) * columns) * bytes, from.data + at * bytes,
                    static_cast<std::size_t>(columns * bytes));
      }
    }
  }
  ConstTensorView view() const {
    const std::byte* data = memory_->data() + offset_ * static_cast<std::int64_t>(dtype_size(dtype_));
    return shape_.size() == 3 ? make_view(data, dtype_, {shape_[0], shape_[1], shape_[2]})
                              : make_view(data, dtype_, {shape_[0], shape_[1]});
  }

 private:
  DType dtype_;
  std::int64_t offset_;
  std::vector<std::int64_t> shape_;
  std::unique_ptr<core::Buffer<std::byte>> memory_;
};

// What tokens are made of.
enum class Kind {
  kNormal,
  kIntegers,        // ties everywhere
  kOutlierChannel,  // one channel swamps the int8 range of keys
  kOutlierInBoth,   // of keys and queries
  kBias,            // a constant in every key that dwarfs the differences
  kAlmostEqual,     // keys that differ in their last bits
  kEqualBlocks,     // every block the same
  kZeros,           // of both signs
  kSubnormal,
  kTiny,             // products that underflow
  kHuge,             // sums that overflow float
  kLargestScreened,  // around the limits of what is bounded
  kScales,           // blocks of very different ranges
  kNanTokens,
  kInfiniteTokens,
  kNanQueries,
  kSinks,     // few blocks far above the others
  kSparse,    // mostly zeros
  kPermuted,  // equal but for the order in which they are summed
  kFlushed,   // subnormal elements that meet large ones
};
constexpr int kKinds = static_cast<int>(Kind::kFlushed) + 1;

void fill(Problem& problem, Kind kind, Random& random) {
  Tensor& q = problem.q_idx;
  Tensor& k = problem.k_idx;
  const auto each = [&](Tensor& tensor, const auto& value) {
    for (std::int64_t i = 0; i < tensor.size(0); ++i) {
      for (std::int64_t j = 0; j < tensor.size(1); ++j) {
        if (tensor.shape().size() == 2) {
          tensor.set(value(i, j), i, j);
        } else {
          for (std::int64_t d = 0; d < tensor.size(2); ++d) tensor.set(value(i, d), i, j, d);
        }
      }
    }
  };
  std::normal_distribution<double> normal;
  const auto draw = [&](std::int64_t, std::int64_t) { return normal(random); };
  const std::int64_t block_size = problem.geometry.block_size;
  const auto some = [&](int of) { return random() % static_cast<std::uint64_t>(of) == 0; };
  each(q, draw);
  each(k, draw);
  switch (kind) {
    case Kind::kNormal: break;
    case Kind::kIntegers:
      q.fill_integers(random, 2);
      k.fill_integers(random, 2);
      break;
    case Kind::kOutlierChannel:
      each(k, [&](std::int64_t, std::int64_t d) { return normal(random) * (d == 5 ? 3000 : 1); });
      each(q, [&](std::int64_t, std::int64_t d) { return normal(random) * (d == 5 ? 1e-4 : 1); });
      break;
    case Kind::kOutlierInBoth:
      each(k, [&](std::int64_t, std::int64_t d) { return normal(random) * (d == 5 ? 300 : 1); });
      each(q, [&](std::int64_t, std::int64_t d) { return normal(random) * (d == 5 ? 300 : 1); });
      break;
    case Kind::kBias:
      each(k, [&](std::int64_t, std::int64_t d) { return 100.0 * static_cast<double>(d % 3) + normal(random) * 0.01; });
      break;
    case Kind::kAlmostEqual:
      each(k, [&](std::int64_t, std::int64_t d) {
        return static_cast<double>(d % 7) - 3 + static_cast<double>(random() % 3) * 0x1p-22;
      });
      break;
    case Kind::kEqualBlocks:
      for (std::int64_t i = block_size; i < k.size(0); ++i) {
        for (std::int64_t d = 0; d < k.size(1); ++d) k.set(k.at(i - block_size, d), i, d);
      }
      break;
    case Kind::kZeros: each(k, [&](std::int64_t, std::int64_t) { return some(2) ? 0.0 : -0.0; }); break;
    case Kind::kSubnormal:
      // Few of them: processors take a hundred cycles for each.
      each(k,
           [&](std::int64_t, std::int64_t) { return some(100) ? static_cast<double>(random() % 9) * 0x1p-149 : 0.0; });
      break;
    case Kind::kTiny:
      each(k, [&](std::int64_t, std::int64_t) { return normal(random) * 0x1p-39; });
      each(q, [&](std::int64_t, std::int64_t d) { return normal(random) * (d % 2 == 0 ? 0x1p-39 : 0x1p-110); });
      break;
    case Kind::kHuge:
      each(k, [&](std::int64_t, std::int64_t) { return normal(random) * 1e30; });
      each(q, [&](std::int64_t, std::int64_t) { return normal(random) * 1e30; });
      break;
    case Kind::kLargestScreened:
      each(k, [&](std::int64_t, std::int64_t) { return normal(random) * 0x1p38; });
      each(q, [&](std::int64_t i, std::int64_t) { return normal(random) * (i % 2 == 0 ? 0x1p38 : 0x1p-40); });
      break;
    case Kind::kScales:
      each(k, [&](std::int64_t i, std::int64_t) {
        return normal(random) * std::exp2(static_cast<double>(i / block_size % 7) * 16 - 48);
      });
      break;
    case Kind::kNanTokens:
      each(k, [&](std::int64_t, std::int64_t) { return some(400) ? kNaN : normal(random); });
      break;
    case Kind::kInfiniteTokens:
      each(k, [&](std::int64_t i, std::int64_t) {
        return i / block_size % 5 == 0 && some(300) ? (some(2) ? kInfinity : -kInfinity) : normal(random);
      });
      break;
    case Kind::kNanQueries:
      each(q, [&](std::int64_t i, std::int64_t) {
        return i % 3 == 0 && some(30) ? (some(2) ? kNaN : kInfinity) : normal(random);
      });
      break;
    case Kind::kSinks:
      each(k, [&](std::int64_t i, std::int64_t) { return normal(random) * (i / block_size % 9 == 4 ? 40 : 1); });
      break;
    case Kind::kSparse:
      each(k, [&](std::int64_t, std::int64_t) { return some(30) ? normal(random) : 0.0; });
      each(q, [&](std::int64_t, std::int64_t) { return some(4) ? normal(random) : 0.0; });
      break;
    case Kind::kPermuted: {
      // Queries of one value: the exact scores of all keys are one, and only the roundings of a chain tell blocks
      // apart.
      std::vector<double> key(static_cast<std::size_t>(k.size(1)));
      for (double& value : key) value = normal(random);
      each(q, [&](std::int64_t i, std::int64_t) { return 1.0 + static_cast<double>(i % 5); });
      for (std::int64_t i = 0; i < k.size(0); ++i) {
        if (i % block_size % 8 == 0) std::shuffle(key.begin(), key.end(), random);
        for (std::int64_t d = 0; d < k.size(1); ++d) k.set(key[static_cast<std::size_t>(d)], i, d);
      }
      break;
    }
    case Kind::kFlushed:
      each(k, [&](std::int64_t, std::int64_t d) {
        return d % 2 == 0 ? normal(random) * 0x1p-38 : some(20) ? normal(random) * 0x1p-128 : 0.0;
      });
      each(q, [&](std::int64_t, std::int64_t d) { return normal(random) * (d % 2 == 0 ? 0x1p-38 : 0x1p38); });
      break;
  }
}

class ScreenedSelection : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Kinds, ScreenedSelection, ::testing::Range(0, kKinds));

TEST_P(ScreenedSelection, EqualsTheUnscreenedOne) {
  const auto kind = static_cast<Kind>(GetParam());
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed * 1000 + static_cast<std::uint64_t>(GetParam()));
    const auto pick = [&](const std::vector<std::int64_t>& from) { return from[random() % from.size()]; };
    Case c;
    c.geometry.kv_heads = pick({1, 2, 3, 4});
    c.geometry.query_heads = c.geometry.kv_heads;
    c.geometry.index_dim = pick({16, 48, 64, 80, 128, 256});
    c.geometry.block_size = pick({16, 32, 64});
    c.geometry.topk = pick({1, 2, 5, 16, 33});
    c.lengths = {{pick({40, 64, 77}), 77 + c.geometry.block_size * pick({20, 90, 140}) + pick({0, 1, 15})},
                 {pick({1, 5}), 5 + c.geometry.block_size * 40},
                 {pick({33, 65}), 65 + c.geometry.block_size * pick({3, 30})}};
    c.index_dtype = std::vector<DType>{DType::kFloat32, DType::kBFloat16, DType::kFloat16}[random() % 3];
    if (c.index_dtype == DType::kFloat16)
      c.index_dtype = kind >= Kind::kSubnormal && kind <= Kind::kScales ? DType::kFloat32  // no such values in float16
                                                                        : DType::kFloat16;
    c.padding_rows = pick({0, 3});
    c.dtype = c.index_dtype;
    Problem problem(c);
    fill(problem, kind, random);
    problem.local_blocks = pick({0, 1, 1, 2});
    problem.init_blocks = pick({0, 0, 1, 3});
    expect_screening_changes_nothing(problem.select_params());
    if (seed == 3) {
      const PagedProblem paged(problem, c.geometry.block_size * pick({1, 2}));
      expect_screening_changes_nothing(paged.select_params());
    }
  }
}

TEST_P(ScreenedSelection, InPlaceEqualsTheUnscreenedOne) {
  const auto kind = static_cast<Kind>(GetParam());
  Random random(77 + static_cast<std::uint64_t>(GetParam()));
  // One more block size for each loop over tiles: 128 dimensions, 64, any.
  const auto [dim, block_size] = std::vector<std::pair<std::int64_t, std::int64_t>>{
      {128, 32}, {64, 16}, {96, 16}, {64, 64}, {128, 16}}[static_cast<std::size_t>(GetParam()) % 5];
  Case c;
  c.geometry = {3, 3, 16, 16, dim, block_size, 5};
  c.lengths = {{45, 50 + block_size * 60}, {1, 40 + block_size * 20}};
  c.dtype = c.index_dtype = DType::kBFloat16;
  Problem problem(c);
  fill(problem, kind, random);
  SelectBlocksParams params = problem.select_params();
  for (const std::int64_t offset : {0, 8}) {  // on cache lines, where keys are not copied, and off them
    const Compact keys(problem.k_idx.view(), offset);
    params.k_idx = keys.view();
    expect_screening_changes_nothing(params);
  }
  const PagedProblem paged(problem, block_size * 2);
  SelectBlocksParams paged_params = paged.select_params();
  const Compact pages(paged_params.k_idx);
  paged_params.k_idx = pages.view();
  expect_screening_changes_nothing(paged_params);
}

TEST(Screening, OfManyBlocksAndRowsEqualsTheUnscreenedOne) {
  // Long enough for several windows, for lists that overflow (of 4 and 16 slots), and for rows that are given up on the
  // way.
  enum class Course {
    kEven,
    kSwamped,    // the second half of the keys gives up all rows
    kRising,     // every window has better blocks than all before
    kDullRows,   // rows whose scores are all 0, among others: their lists overflow
    kDullBlocks  // blocks without bounds on the way
  };
  for (const auto& [dim, block_size, topk] :
       std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t>>{{64, 16, 4}, {32, 16, 64}, {128, 32, 16}}) {
    Problem problem(Case{{3, 3, 16, 16, dim, block_size, topk}, {{44, block_size * 420 + 3}}});
    const std::int64_t keys = problem.k_idx.size(0);
    for (const Course course :
         {Course::kEven, Course::kSwamped, Course::kRising, Course::kDullRows, Course::kDullBlocks}) {
      SCOPED_TRACE("dim " + std::to_string(dim) + ", course " + std::to_string(static_cast<int>(course)));
      Random random(9);
      fill(problem, Kind::kNormal, random);
      for (std::int64_t i = 0; i < keys; ++i) {
        const double part = static_cast<double>(i) / static_cast<double>(keys);
        if (course == Course::kSwamped && i >= keys / 2) problem.k_idx.set(1e4, i, 3);
        if (course == Course::kDullBlocks && i % (block_size * 37) == 5) problem.k_idx.set(kNaN, i, 3);
        for (std::int64_t d = 0; course == Course::kRising && d < dim; ++d) {
          problem.k_idx.set((1 + 30 * part) * problem.k_idx.at(i, d), i, d);
        }
      }
      for (std::int64_t i = 0; course == Course::kDullRows && i < problem.q_idx.size(0); i += 7) {
        for (std::int64_t d = 0; d < dim; ++d) problem.q_idx.set(0, i, i % 3, d);
      }
      expect_screening_changes_nothing(problem.select_params());
    }
  }
}

// Rows whose blocks have no number among their scores, or -infinity at best: nothing may compete with them that the row
// does not see, nor twice.
TEST(Screening, OfBlocksWithoutNumbersEqualsTheUnscreenedOne) {
  for (const double value : {kNaN, -kInfinity}) {
    for (const std::int64_t local_blocks : {0, 1, 2}) {
      for (const std::int64_t dim : {32, 64}) {
        SCOPED_TRACE(std::to_string(value) + ", " + std::to_string(local_blocks) + " local blocks");
        Problem problem(Case{{3, 3, 16, 16, dim, 16, 3}, {{128, 128}}});
        Random random(5);
        fill(problem, Kind::kNormal, random);
        for (std::int64_t t = 0; t < 128; ++t) {
          for (std::int64_t g = 0; g < 3; ++g) problem.q_idx.set(1 + std::abs(problem.q_idx.at(t, g, 0)), t, g, 0);
        }
        for (std::int64_t j = 0; j < 48; ++j) problem.k_idx.set(value, j, 0);
        SelectBlocksParams params = problem.select_params();
        params.local_blocks = local_blocks;
        expect_screening_changes_nothing(params);
      }
    }
  }
}

TEST(Screening, OfSampledPositionsEqualsTheUnscreenedOne) {
  const Problem whole(Case{{3, 3, 16, 16, 64, 16, 5}, {{1200, 1500}}});
  std::vector<std::int64_t> rows;
  for (std::int64_t i = 0; i < 1200; i += 1 + i / 20) rows.push_back(i);
  expect_screening_changes_nothing(whole.sample(rows).select_params());
}

TEST(Screening, IsNotConfusedByFlushedSubnormals) {
  // A chain of roundings that underflow on the way, in every block alike but for one token.
  Problem problem(Case{{2, 2, 16, 16, 32, 16, 3}, {{40, 40 + 16 * 60}}});
  Random random(4);
  for (const double scale : {0x1p-40, 0x1p-63, 0x1p-75, 0x1p-100}) {
    problem.q_idx.fill_normal(random, scale);
    problem.k_idx.fill_normal(random, scale);
    expect_screening_changes_nothing(problem.select_params());
  }
}

class ScreenedFewRows : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Kinds, ScreenedFewRows, ::testing::Range(0, kKinds));

// Decoding and verification: bf16 queries, bf16 or float8 keys.
TEST_P(ScreenedFewRows, EqualTheUnscreenedOnes) {
  const auto kind = static_cast<Kind>(GetParam());
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed * 1000 + static_cast<std::uint64_t>(GetParam()));
    const auto pick = [&](const std::vector<std::int64_t>& from) { return from[random() % from.size()]; };
    Case c;
    c.geometry.kv_heads = pick({1, 2, 3, 4});
    c.geometry.query_heads = c.geometry.kv_heads;
    c.geometry.index_dim = pick({16, 32, 48, 64, 128, 256});
    c.geometry.block_size = pick({16, 16, 32, 64});
    c.geometry.topk = pick({1, 2, 5, 16, 33});
    for (const std::int64_t queries : {1, 2, 5, 16}) {
      c.lengths.push_back({queries, queries + c.geometry.block_size * pick({0, 3, 25, 60}) + pick({0, 1, 15})});
    }
    c.index_dtype = c.dtype = DType::kBFloat16;
    c.layout = seed % 2 == 0 ? Layout::kContiguous : Layout::kGaps;
    c.padding_rows = pick({0, 3});
    Problem problem(c);
    fill(problem, kind, random);
    problem.local_blocks = pick({0, 1, 1, 2});
    problem.init_blocks = pick({0, 0, 1, 3});
    if (seed > 2) problem.k_idx = problem.k_idx.as(DType::kFloat8E4M3);
    const PagedProblem paged(problem, c.geometry.block_size * pick({1, 2}));
    for_each_target(Targets::kCpu, [&](Context context) {
      const Tensor expected = select(context, problem.select_params(), cpu::Screening::kNever);
      for (const cpu::Screening screening :
           {cpu::Screening::kAuto, cpu::Screening::kAlways, cpu::Screening::kAlwaysBf16}) {
        expect_same_bytes("blocks", select(context, problem.select_params(), screening), expected);
        expect_same_bytes("blocks, paged", select(context, paged.select_params(), screening), expected);
      }
      context.threads = 1;
      context.workspace_limit = std::size_t{1} << 19;  // few sequences at a time
      expect_same_bytes("blocks", select(context, problem.select_params(), cpu::Screening::kAlwaysBf16), expected);
    });
  }
}

TEST(Balance, KeepsProductsAndEvensChannels) {
  const std::vector<float> queries = {1, 1, 0.001f, 4, 0, 1, 1e-30f};
  const std::vector<float> keys = {1, 64, 1000, 0.25f, 5, 0, 1e30f};
  cpu::Balance balance;
  balance.set(queries.data(), keys.data(), 7);
  ASSERT_NE(balance.of_keys(), nullptr);
  for (std::size_t d = 0; d < keys.size(); ++d) {
    const float q = balance.of_queries()[d];
    EXPECT_EQ(q * balance.of_keys()[d], 1.0f);
    int exponent = 0;
    EXPECT_EQ(std::frexp(q, &exponent), 0.5f) << "not a power of two";
    EXPECT_LE(std::abs(exponent - 1), 12);
  }
  EXPECT_EQ(balance.of_queries()[1], 8.0f);     // 64 and 1: both 8
  EXPECT_EQ(balance.of_queries()[2], 1024.0f);  // 1000 and 1/1000: both about 1
  EXPECT_EQ(balance.of_queries()[3], 0.25f);
  balance.set(queries.data(), queries.data(), 4);
  EXPECT_EQ(balance.of_keys(), nullptr);
}

TEST(Int8Dot, EqualsItsDefinition) {
  struct Kernel {
    std::string name;
    cpu::Int8BlockMax run;
    std::int64_t dim_multiple;
  };
  std::vector<Kernel> kernels;
#if defined(__x86_64__)
  if (cpu::detect_dot_products() != cpu::DotProducts::kNone)
    kernels.push_back({"avx512", cpu::int8_block_max_avx512, 4});

#endif
  if (kernels.empty()) GTEST_SKIP() << "this machine has no int8 dot products";
  Random random(2);
  for (const std::int64_t key_count : {16, 32, 48, 64, 128, 256}) {
    for (const std::int64_t dim : {16, 64, 80, 128, 192, 256}) {
      for (const std::int64_t groups : {1, 2, 3, 4, 5, 8}) {
        std::vector<std::uint8_t> keys(static_cast<std::size_t>(key_count * dim));
        core::Buffer<std::int8_t> rows(static_cast<std::size_t>(groups * 16 * dim));
        for (const bool extreme : {false, true}) {
          for (auto& key : keys) key = static_cast<std::uint8_t>(extreme ? 255 : 1 + random() % 255);
          for (std::size_t i = 0; i < rows.size(); ++i) {
            rows[i] =
                static_cast<std::int8_t>(extreme ? (i % 2 == 0 ? 127 : -127) : static_cast<int>(random() % 255) - 127);
          }
          std::vector<std::int32_t> expected(static_cast<std::size_t>(groups * 16), -1);
          cpu::int8_block_max_portable(keys.data(), key_count, dim, rows.data(), groups, expected.data());
          // The definition of the definition: row 5 of the last group.
          std::int32_t largest = INT32_MIN;
          for (std::int64_t j = 0; j < key_count; ++j) {
            std::int32_t sum = 0;
            for (std::int64_t d = 0; d < dim; ++d) {
              const std::int64_t at = cpu::int8_row_offset((groups - 1) * 16 + 5, dim) + d / 4 * 64 + d % 4;
              sum += std::int32_t{keys[static_cast<std::size_t>(j * dim + d)]} * rows[static_cast<std::size_t>(at)];
            }
            largest = std::max(largest, sum);
          }
          ASSERT_EQ(expected[static_cast<std::size_t>((groups - 1) * 16 + 5)], largest);
          for (const Kernel& kernel : kernels) {
            if (dim % kernel.dim_multiple != 0) continue;
            std::vector<std::int32_t> actual(expected.size(), -1);
            kernel.run(keys.data(), key_count, dim, rows.data(), groups, actual.data());
            ASSERT_EQ(actual, expected) << kernel.name << ", " << key_count << " keys, dim " << dim << ", " << groups
                                        << " groups";
          }
        }
      }
    }
  }
}

TEST(Bf16Max, IsTheLargestDotProduct) {
  constexpr float kUnwritten = 1e30f;
  std::vector<std::pair<std::string, cpu::Bf16BlockMax>> kernels = {{"portable", cpu::bf16_block_max_portable}};
#if defined(__x86_64__)
  std::optional<cpu::AmxTiles> tiles;
  if (cpu::detect_dot_products() == cpu::DotProducts::kAmx) {
    tiles.emplace();
    kernels.emplace_back("amx", cpu::bf16_block_max_amx);
  }
#endif
  Random random(3);
  std::normal_distribution<float> normal;
  for (const std::int64_t key_count : {16, 32, 48, 64, 128, 256}) {
    for (const std::int64_t dim : {32, 64, 96, 128, 160, 256}) {
      for (const auto& [groups, count] :
           {std::pair(1, 1), std::pair(2, 3), std::pair(2, 1), std::pair(3, 2), std::pair(8, 1)}) {
        const std::int64_t stride = dim + (key_count == 48 ? 32 : 0);
        core::Buffer<std::uint16_t> keys(static_cast<std::size_t>(count * key_count * stride));
        core::Buffer<std::uint16_t> rows(static_cast<std::size_t>(groups * 16 * dim));
        for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = core::float_to_bf16(normal(random));
        for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = core::float_to_bf16(normal(random));
        std::vector<double> expected;
        std::vector<double> bounds;
        for (std::int64_t b = 0; b < count; ++b) {
          for (std::int64_t r = 0; r < groups * 16; ++r) {
            double largest = -kInfinity;
            double bound = 0;
            for (std::int64_t j = b * key_count; j < (b + 1) * key_count; ++j) {
              double sum = 0;
              double magnitude = 0;
              for (std::int64_t d = 0; d < dim; ++d) {
                const auto at = static_cast<std::size_t>(cpu::bf16_row_offset(r, dim) + d / 2 * 32 + d % 2);
                const double product =
                    static_cast<double>(core::bf16_to_float(rows[at])) *
                    static_cast<double>(core::bf16_to_float(keys[static_cast<std::size_t>(j * stride + d)]));
                sum += product;
                magnitude += std::abs(product);
              }
              largest = std::max(largest, sum);
              bound = std::max(bound, magnitude * static_cast<double>(dim) * 0x1p-24);
            }
            expected.push_back(largest);
            bounds.push_back(bound);
          }
        }
        cpu::Bf16Blocks blocks;
        blocks.keys = keys.data();
        blocks.stride = stride;
        blocks.key_count = key_count;
        blocks.dim = dim;
        blocks.count = count;
        // The results of a block side by side, or those of a group.
        for (const auto& [block_stride, group_stride] :
             {std::pair(groups * 16 + 5, 16), std::pair(16, count * 16 + 5)}) {
          for (const auto& [name, run] : kernels) {
            std::vector<float> actual(static_cast<std::size_t>(count * block_stride + groups * group_stride),
                                      kUnwritten);
            run(blocks, rows.data(), groups, groups == 3 ? nullptr : reinterpret_cast<const std::byte*>(keys.data()),
                {actual.data(), block_stride, group_stride});
            for (std::int64_t i = 0; i < count * groups * 16; ++i) {
              const std::int64_t r = i % (groups * 16);
              float& got =
                  actual[static_cast<std::size_t>(i / (groups * 16) * block_stride + r / 16 * group_stride + r % 16)];
              const auto at = static_cast<std::size_t>(i);
              ASSERT_NEAR(static_cast<double>(got), expected[at], bounds[at])
                  << name << ", " << count << " blocks of " << key_count << " keys, dim " << dim << ", " << groups
                  << " groups, result " << i;
              got = kUnwritten;
            }
            for (const float value : actual) ASSERT_EQ(value, kUnwritten) << "written beside the results";
          }
        }
      }
    }
  }
}

TEST(RowTopk, EqualsSortingInAnyOrder) {
  Random random(8);
  for (const std::int64_t slots : {0, 1, 2, 15, 16, 17, 64}) {
    for (const std::size_t count : {0u, 1u, 5u, 16u, 200u}) {
      std::vector<float> scores(count);
      for (float& score : scores) {
        const auto kind = random() % 12;
        score = kind == 0   ? std::numeric_limits<float>::quiet_NaN()
                : kind == 1 ? -std::numeric_limits<float>::infinity()
                : kind == 2 ? -0.0f
                : kind == 3 ? 0.0f
                            : static_cast<float>(random() % 20) - 10.0f;
      }
      std::vector<std::int32_t> order(count);
      std::iota(order.begin(), order.end(), 0);
      std::vector<std::int32_t> best = order;
      std::stable_sort(best.begin(), best.end(), [&](std::int32_t a, std::int32_t b) {
        const float x = scores[static_cast<std::size_t>(a)];
        const float y = scores[static_cast<std::size_t>(b)];
        if (std::isnan(x) || std::isnan(y)) return !std::isnan(x) && std::isnan(y);
        return x > y;
      });
      best.resize(std::min(count, static_cast<std::size_t>(slots)));
      for (int shuffle = 0; shuffle < 3; ++shuffle) {
        std::vector<std::int32_t> keys(64, 7);
        std::vector<std::int32_t> ids(64, 7);
        cpu::RowTopk top(keys.data(), ids.data(), slots);
        for (const std::int32_t id : order) {
          const bool passes = cpu::order_key(scores[static_cast<std::size_t>(id)]) >= top.least_key();
          const std::vector<std::int32_t> before(top.ids(), top.ids() + top.count());
          top.offer(id, scores[static_cast<std::size_t>(id)]);
          // In ascending order of id, least_key() says whether an offer changes anything.
          if (shuffle == 0) {
            EXPECT_EQ(passes, before != std::vector<std::int32_t>(top.ids(), top.ids() + top.count()));
          }
        }
        EXPECT_EQ(std::vector<std::int32_t>(top.ids(), top.ids() + top.count()), best);
        std::shuffle(order.begin(), order.end(), random);
      }
    }
  }
}

}  // namespace
}  // namespace msa::testing
