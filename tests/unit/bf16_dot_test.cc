// SPDX-License-Identifier: Apache-2.0
// Products of bf16 matrices on every family of instructions this machine has: against sums in double, and a row's
// result independent of the rows beside it.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "src/core/float_convert.h"
#include "src/cpu/amx_tiles.h"
#include "src/cpu/bf16_dot.h"

namespace msa::cpu {
namespace {

#if defined(__x86_64__)

struct Family {
  const char* name;
  DotProducts needs;
  Bf16Kernel kernel;
};

std::vector<Family> families() {
  std::vector<Family> found;
  if (detect_dot_products() != DotProducts::kNone)
    found.push_back({"avx512", DotProducts::kAvx512, multiply_bf16_avx512});
  if (detect_dot_products() == DotProducts::kAmx) found.push_back({"amx", DotProducts::kAmx, multiply_bf16_amx});
  return found;
}

// Runs the kernel on rows first, first + 1, ... of a.
std::vector<float> run(const Family& family, const std::vector<std::uint16_t>& a, const std::vector<std::uint16_t>& b,
                       std::int64_t first, std::int64_t rows, std::int64_t cols, std::int64_t inner, bool scattered) {
  std::optional<AmxTiles> tiles;
  if (family.needs == DotProducts::kAmx) tiles.emplace();
  std::vector<const std::uint16_t*> a_rows;
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t row = scattered ? first + rows - 1 - i : first + i;
    a_rows.push_back(a.data() + row * inner);
  }
  const std::int64_t c_stride = cols + 16;
  std::vector<float> c(static_cast<std::size_t>((rows + 15) / 16 * 16 * c_stride), -1.0f);
  Bf16Product product;
  product.rows = rows, product.cols = cols, product.inner = inner;
  product.a = a_rows.data();
  product.b = b.data();
  product.b_stride = padded_pair_stride(cols);
  product.c = c.data();
  product.c_stride = c_stride;
  family.kernel(product);
  std::vector<float> out;
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t row = scattered ? rows - 1 - i : i;
    for (std::int64_t j = 0; j < cols; ++j) out.push_back(c[static_cast<std::size_t>(row * c_stride + j)]);
  }
  return out;
}

TEST(Bf16Dot, EqualsTheSumsOfProducts) {
  if (families().empty()) GTEST_SKIP() << "no bf16 dot products on this machine";
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const Family& family : families()) {
    for (const std::int64_t rows : {1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 48}) {
      for (const std::int64_t cols : {16, 32, 48, 64, 80, 128, 256}) {
        for (const std::int64_t inner : {32, 64, 128, 256}) {
          SCOPED_TRACE(std::string(family.name) + " " + std::to_string(rows) + "x" + std::to_string(cols) + "x" +
                       std::to_string(inner));
          std::vector<std::uint16_t> a(static_cast<std::size_t>(rows * inner));
          std::vector<std::uint16_t> b(static_cast<std::size_t>(inner / 2 * padded_pair_stride(cols)));
          for (auto& x : a) x = core::float_to_bf16(normal(random));
          for (auto& x : b) x = core::float_to_bf16(normal(random));
          const std::vector<float> c = run(family, a, b, 0, rows, cols, inner, false);
          for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t j = 0; j < cols; ++j) {
              double exact = 0, sizes = 0;
              for (std::int64_t k = 0; k < inner; ++k) {
                const double x = core::bf16_to_float(a[static_cast<std::size_t>(i * inner + k)]);
                const double y =
                    core::bf16_to_float(b[static_cast<std::size_t>(k / 2 * padded_pair_stride(cols) + 2 * j + k % 2)]);
                exact += x * y;
                sizes += std::abs(x * y);
              }
              // One rounding a pair and one a sum, of sums no larger than the sum of sizes.
              ASSERT_NEAR(c[static_cast<std::size_t>(i * cols + j)], exact,
                          static_cast<double>(inner) * 0x1p-24 * sizes);
            }
          }
          EXPECT_EQ(run(family, a, b, 0, rows, cols, inner, true), c) << "rows in reverse order";
          const std::vector<float> last = run(family, a, b, rows - 1, 1, cols, inner, false);
          EXPECT_EQ(std::vector<float>(c.end() - cols, c.end()), last) << "a row alone";
        }
      }
    }
  }
}

#endif

}  // namespace
}  // namespace msa::cpu
