// SPDX-License-Identifier: Apache-2.0
// The vector building blocks on every instruction set: products bound by their chain of roundings and independent of
// the shape around an element, conversions equal to the scalar ones on every 16-bit pattern, transposition and exp.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/unit/tile_test.cc"
#include "src/cpu/targets.h"
// After foreach_target.h
#include "src/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

void run_product(std::int64_t rows, std::int64_t cols, std::int64_t inner, const float* a, std::int64_t a_row,
                 std::int64_t a_inner, const float* b, std::int64_t b_row, float* c, std::int64_t c_row,
                 bool accumulate) {
  product(rows, cols, inner, a, a_row, a_inner, b, b_row, c, c_row, accumulate ? Sums::kContinue : Sums::kReplace);
}

void run_load_row(const std::byte* row, DType dtype, std::int64_t count, float* out) {
  load_row(row, dtype, count, out);
}

void run_store_row(const float* values, std::int64_t count, DType dtype, std::byte* row) {
  store_row(values, count, dtype, row);
}

void run_transpose(const float* in, std::int64_t in_stride, std::int64_t rows, std::int64_t cols, float* out,
                   std::int64_t out_stride) {
  transpose(in, in_stride, rows, cols, out, out_stride);
}

void run_exp(const float* in, std::int64_t count, float* out) {
  const FloatTag df;
  for (std::int64_t i = 0; i < count; i += static_cast<std::int64_t>(hn::Lanes(df))) {
    hn::StoreU(exp_lanes(hn::LoadU(df, in + i)), df, out + i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "src/core/float_convert.h"
#include "tests/unit/support/targets.h"

namespace msa::cpu {
HWY_EXPORT(run_product);
HWY_EXPORT(run_load_row);
HWY_EXPORT(run_store_row);
HWY_EXPORT(run_transpose);
HWY_EXPORT(run_exp);

namespace {

using testing::for_each_target;
using testing::Targets;

std::vector<float> random_floats(std::size_t count, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

TEST(Tile, ProductIsWithinItsChainOfRoundings) {
  std::mt19937_64 random(1);
  for_each_target(Targets::kCpu, [&](const Context&) {
    for (const std::int64_t rows : {1, 2, 3, 5, 6, 7, 11, 12, 13, 24, 29}) {
      for (const std::int64_t cols : {16, 32, 48, 80, 128}) {
        for (const std::int64_t inner : {1, 16, 33, 128}) {
          const std::int64_t a_row = inner + 3;
          const std::int64_t b_row = cols + 5;
          const std::int64_t c_row = cols + 1;
          const auto a = random_floats(static_cast<std::size_t>(rows * a_row), random);
          const auto b = random_floats(static_cast<std::size_t>(inner * b_row), random);
          const auto start = random_floats(static_cast<std::size_t>(rows * c_row), random);
          for (const bool accumulate : {false, true}) {
            auto c = start;
            HWY_DYNAMIC_DISPATCH(run_product)
            (rows, cols, inner, a.data(), a_row, 1, b.data(), b_row, c.data(), c_row, accumulate);
            for (std::int64_t i = 0; i < rows; ++i) {
              for (std::int64_t j = 0; j < c_row; ++j) {
                const auto at = static_cast<std::size_t>(i * c_row + j);
                if (j >= cols) {
                  ASSERT_EQ(c[at], start[at]) << "written past column " << cols;
                  continue;
                }
                double exact = accumulate ? start[at] : 0;
                double magnitude = std::abs(exact);
                for (std::int64_t k = 0; k < inner; ++k) {
                  const double term = double{a[static_cast<std::size_t>(i * a_row + k)]} *
                                      double{b[static_cast<std::size_t>(k * b_row + j)]};
                  exact += term;
                  magnitude += std::abs(term);
                }
                // A product and a sum a step at most, each within 2^-24 of the running magnitude.
                ASSERT_NEAR(c[at], exact, magnitude * static_cast<double>(2 * inner + 1) * 0x1p-24)
                    << rows << " x " << cols << " x " << inner << " at " << i << ", " << j;
              }
            }
          }
        }
      }
    }
  });
}

TEST(Tile, AnElementDependsOnItsRowAndColumnAlone) {
  // One row alone, another place in a, and a taken transposed: not a bit may change.
  std::mt19937_64 random(2);
  const std::int64_t rows = 31;
  const std::int64_t cols = 96;
  const std::int64_t inner = 77;
  const auto a = random_floats(static_cast<std::size_t>(rows * inner), random);
  const auto b = random_floats(static_cast<std::size_t>(inner * cols), random);
  std::vector<float> a_transposed(a.size());
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t k = 0; k < inner; ++k) {
      a_transposed[static_cast<std::size_t>(k * rows + i)] = a[static_cast<std::size_t>(i * inner + k)];
    }
  }
  for_each_target(Targets::kCpu, [&](const Context&) {
    const auto multiply = HWY_DYNAMIC_DISPATCH(run_product);
    std::vector<float> whole(static_cast<std::size_t>(rows * cols));
    multiply(rows, cols, inner, a.data(), inner, 1, b.data(), cols, whole.data(), cols, false);
    std::vector<float> other(whole.size());
    multiply(rows, cols, inner, a_transposed.data(), 1, rows, b.data(), cols, other.data(), cols, false);
    EXPECT_EQ(std::memcmp(whole.data(), other.data(), whole.size() * sizeof(float)), 0) << "transposed a";
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < cols; j += 16) {
        float patch[16];
        multiply(1, 16, inner, a.data() + i * inner, inner, 1, b.data() + j, cols, patch, 16, false);
        ASSERT_EQ(std::memcmp(patch, whole.data() + i * cols + j, sizeof patch), 0) << "row " << i << " column " << j;
      }
    }
    // A sum in two halves, the second accumulating, is the same chain.
    std::fill(other.begin(), other.end(), -1.0f);
    multiply(rows, cols, 40, a.data(), inner, 1, b.data(), cols, other.data(), cols, false);
    multiply(rows, cols, inner - 40, a.data() + 40, inner, 1, b.data() + 40 * cols, cols, other.data(), cols, true);
    EXPECT_EQ(std::memcmp(whole.data(), other.data(), whole.size() * sizeof(float)), 0) << "two halves";
  });
}

TEST(Tile, LoadingEveryHalfEqualsTheScalarConversion) {
  std::vector<std::uint16_t> halves(65536);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i);
  for_each_target(Targets::kCpu, [&](const Context&) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      std::vector<float> out(halves.size());
      HWY_DYNAMIC_DISPATCH(run_load_row)
      (reinterpret_cast<const std::byte*>(halves.data()), dtype, static_cast<std::int64_t>(halves.size()), out.data());
      for (std::size_t i = 0; i < halves.size(); ++i) {
        const float expected =
            core::load_element(reinterpret_cast<const std::byte*>(halves.data()), dtype, static_cast<std::int64_t>(i));
        if (std::isnan(expected)) {
          ASSERT_TRUE(std::isnan(out[i])) << dtype_name(dtype) << " bits " << i;
        } else {
          ASSERT_EQ(std::bit_cast<std::uint32_t>(out[i]), std::bit_cast<std::uint32_t>(expected))
              << dtype_name(dtype) << " bits " << i;
        }
      }
    }
  });
}

TEST(Tile, StoringEqualsTheScalarConversion) {
  // Every half, the midpoints between neighbours, one float to either side of them, and random bits.
  std::vector<float> values;
  for (std::uint32_t i = 0; i < 65536; ++i) {
    for (const float half :
         {core::f16_to_float(static_cast<std::uint16_t>(i)), core::bf16_to_float(static_cast<std::uint16_t>(i))}) {
      values.push_back(half);
      const auto bits = std::bit_cast<std::uint32_t>(half);
      for (const std::uint32_t offset : {0x0fffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u}) {
        values.push_back(std::bit_cast<float>(bits + offset));
      }
    }
  }
  std::mt19937_64 random(3);
  for (int i = 0; i < 100000; ++i) values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random())));
  while (values.size() % 16 != 0) values.push_back(0);
  for_each_target(Targets::kCpu, [&](const Context&) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      std::vector<std::uint16_t> out(values.size());
      HWY_DYNAMIC_DISPATCH(run_store_row)
      (values.data(), static_cast<std::int64_t>(values.size()), dtype, reinterpret_cast<std::byte*>(out.data()));
      for (std::size_t i = 0; i < values.size(); ++i) {
        const std::uint16_t expected =
            dtype == DType::kBFloat16 ? core::float_to_bf16(values[i]) : core::float_to_f16(values[i]);
        if (std::isnan(values[i])) {
          const float back = dtype == DType::kBFloat16 ? core::bf16_to_float(out[i]) : core::f16_to_float(out[i]);
          ASSERT_TRUE(std::isnan(back)) << dtype_name(dtype);
        } else {
          ASSERT_EQ(out[i], expected) << dtype_name(dtype) << " of " << values[i];
        }
      }
    }
  });
}

TEST(Tile, Transpose) {
  std::mt19937_64 random(4);
  for_each_target(Targets::kCpu, [&](const Context&) {
    for (const std::int64_t rows : {1, 2, 3, 4, 5, 8, 15, 33}) {
      for (const std::int64_t cols : {1, 3, 4, 7, 16, 80}) {
        const std::int64_t in_stride = cols + 2;
        const std::int64_t out_stride = rows + 3;
        const auto in = random_floats(static_cast<std::size_t>(rows * in_stride), random);
        std::vector<float> out(static_cast<std::size_t>(cols * out_stride), -7.0f);
        HWY_DYNAMIC_DISPATCH(run_transpose)(in.data(), in_stride, rows, cols, out.data(), out_stride);
        for (std::int64_t c = 0; c < cols; ++c) {
          for (std::int64_t r = 0; r < out_stride; ++r) {
            const float expected = r < rows ? in[static_cast<std::size_t>(r * in_stride + c)] : -7.0f;
            ASSERT_EQ(out[static_cast<std::size_t>(c * out_stride + r)], expected) << rows << " x " << cols;
          }
        }
      }
    }
  });
}

TEST(Tile, Exp) {
  std::vector<float> in = {0.0f, -0.0f, 1.0f, -87.0f, 88.0f, -88.0f, -1e30f, -std::numeric_limits<float>::infinity()};
  for (float x = -90.0f; x <= 88.0f; x += 0.00731f) in.push_back(x);
  for (float x = -1.0f; x <= 1.0f; x += 0.00013f) in.push_back(x);
  while (in.size() % 16 != 0) in.push_back(std::numeric_limits<float>::quiet_NaN());
  in.insert(in.end(), 16, std::numeric_limits<float>::quiet_NaN());
  for_each_target(Targets::kCpu, [&](const Context&) {
    std::vector<float> out(in.size());
    HWY_DYNAMIC_DISPATCH(run_exp)(in.data(), static_cast<std::int64_t>(in.size()), out.data());
    for (std::size_t i = 0; i < in.size(); ++i) {
      if (std::isnan(in[i])) {
        ASSERT_TRUE(std::isnan(out[i]));
        continue;
      }
      const double exact = std::exp(static_cast<double>(in[i]));
      if (in[i] < -87.33f) {
        ASSERT_EQ(out[i], 0.0f) << in[i];
      } else {
        // Two units in the last place: 2 * 2^-23 relative at most.
        ASSERT_NEAR(out[i], exact, exact * 0x1p-22) << in[i];
      }
    }
    EXPECT_EQ(out[0], 1.0f);
    EXPECT_EQ(out[1], 1.0f);
  });
}

}  // namespace
}  // namespace msa::cpu
#endif  // HWY_ONCE
