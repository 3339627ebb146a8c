// SPDX-License-Identifier: Apache-2.0
// Views and the scalar conversions between float and the 16-bit storage types, over all 65536 patterns.
#include "msa/tensor.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "src/core/buffer.h"
#include "src/core/float_convert.h"
#include "tests/unit/support/tensor.h"

namespace msa::testing {
namespace {

TEST(TensorView, RowMajorStrides) {
  std::vector<float> data(24);
  const TensorView view = make_view(data.data(), {2, 3, 4});
  EXPECT_EQ(view.rank, 3);
  EXPECT_EQ(view.dtype, DType::kFloat32);
  EXPECT_EQ(view.size(0), 2);
  EXPECT_EQ(view.stride(0), 12);
  EXPECT_EQ(view.stride(1), 4);
  EXPECT_EQ(view.stride(2), 1);
  EXPECT_EQ(view.elements(), 24);
  EXPECT_FALSE(view.empty());
  EXPECT_EQ(describe(view), "float32[2, 3, 4]");
}

TEST(TensorView, DefaultIsEmpty) {
  EXPECT_TRUE(TensorView().empty());
  EXPECT_TRUE(ConstTensorView().empty());
}

TEST(TensorView, ZeroExtents) {
  const ConstTensorView view = make_view(static_cast<const void*>(nullptr), DType::kFloat16, {0, 3, 16});
  EXPECT_EQ(view.elements(), 0);
  EXPECT_FALSE(view.empty());
  EXPECT_EQ(describe(view), "float16[0, 3, 16]");
}

TEST(TensorView, ConstFromMutable) {
  std::int32_t ids[6] = {};
  const TensorView view = make_view(ids, {2, 3});
  const ConstTensorView constant = view;
  EXPECT_EQ(constant.data, view.data);
  EXPECT_EQ(constant.dtype, DType::kInt32);
  EXPECT_EQ(constant.strides, view.strides);
}

TEST(TensorView, DTypes) {
  EXPECT_EQ(dtype_size(DType::kFloat32), 4u);
  EXPECT_EQ(dtype_size(DType::kInt32), 4u);
  EXPECT_EQ(dtype_size(DType::kBFloat16), 2u);
  EXPECT_EQ(dtype_size(DType::kFloat16), 2u);
  EXPECT_STREQ(dtype_name(DType::kBFloat16), "bfloat16");
  EXPECT_STREQ(dtype_name(DType::kInt32), "int32");
}

TEST(FloatConvert, EveryHalfThereAndBack) {
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const float wide = core::bf16_to_float(bits);
    const float half = core::f16_to_float(bits);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(core::bf16_to_float(core::float_to_bf16(wide)))) << i;
    } else {
      EXPECT_EQ(core::float_to_bf16(wide), bits);
    }
    if (std::isnan(half)) {
      EXPECT_TRUE(std::isnan(core::f16_to_float(core::float_to_f16(half)))) << i;
    } else {
      EXPECT_EQ(core::float_to_f16(half), bits);
    }
  }
}

TEST(FloatConvert, EveryHalfHasItsValue) {
  // sign * mantissa * 2^exponent, worked out in double from the definition of the format.
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const double sign = (i & 0x8000u) != 0 ? -1 : 1;
    const int exponent = static_cast<int>((i >> 10) & 31u);
    const int mantissa = static_cast<int>(i & 1023u);
    const float half = core::f16_to_float(static_cast<std::uint16_t>(i));
    if (exponent == 31) {
      EXPECT_TRUE(mantissa == 0 ? std::isinf(half) : std::isnan(half)) << i;
      EXPECT_EQ(std::signbit(half), sign < 0) << i;
    } else if (exponent == 0) {
      EXPECT_EQ(half, sign * std::ldexp(mantissa, -24)) << i;
      EXPECT_EQ(std::signbit(half), sign < 0) << i;
    } else {
      EXPECT_EQ(half, sign * std::ldexp(1024 + mantissa, exponent - 25)) << i;
    }
  }
}

// Nearest of the finite values, ties to the even pattern; `to` and `from` are the conversions under test.
template <class From, class To>
void expect_rounds_to_nearest(From from, To to, std::uint16_t infinity) {
  for (std::uint16_t low = 0; low + 1 < infinity; ++low) {
    const double a = from(low);
    const double b = from(static_cast<std::uint16_t>(low + 1));
    const double middle = (a + b) / 2;  // exact in double, and in float for both formats
    const std::uint16_t even = low % 2 == 0 ? low : static_cast<std::uint16_t>(low + 1);
    const auto value = static_cast<float>(middle);
    ASSERT_EQ(value, middle);
    ASSERT_EQ(to(value), even);
    ASSERT_EQ(to(-value), even | 0x8000u);
    ASSERT_EQ(to(std::nextafter(value, 0.0f)), low);
    ASSERT_EQ(to(std::nextafter(value, std::numeric_limits<float>::infinity())), low + 1);
  }
  EXPECT_EQ(to(std::numeric_limits<float>::max()), infinity);
  EXPECT_EQ(to(std::numeric_limits<float>::infinity()), infinity);
  EXPECT_EQ(to(-std::numeric_limits<float>::infinity()), infinity | 0x8000u);
}

TEST(FloatConvert, RoundsToNearestEven) {
  expect_rounds_to_nearest(core::f16_to_float, core::float_to_f16, 0x7c00);
  expect_rounds_to_nearest(core::bf16_to_float, core::float_to_bf16, 0x7f80);
  EXPECT_EQ(core::float_to_f16(65519.0f), 0x7bff);
  EXPECT_EQ(core::float_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(core::float_to_f16(0x1p-25f), 0);  // half of the least: to even
  EXPECT_EQ(core::float_to_f16(0x1.8p-25f), 1);
  EXPECT_EQ(core::float_to_f16(std::numeric_limits<float>::denorm_min()), 0);
}

TEST(FloatConvert, ElementsOfABuffer) {
  for (const DType dtype : kFloatTypes) {
    std::vector<std::byte> memory(64);
    for (std::int64_t i = 0; i < 8; ++i) core::store_element(memory.data(), dtype, i, static_cast<float>(i) - 3.5f);
    for (std::int64_t i = 0; i < 8; ++i) {
      EXPECT_EQ(core::load_element(memory.data(), dtype, i), static_cast<float>(i) - 3.5f);
    }
  }
}

TEST(Buffer, IsAlignedAndMayBeEmpty) {
  for (const std::size_t count : {std::size_t{1}, std::size_t{3}, std::size_t{64}, std::size_t{1000}}) {
    core::Buffer<float> buffer(count);
    EXPECT_EQ(buffer.size(), count);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % core::kCacheLine, 0u);
    buffer[count - 1] = 1;
    EXPECT_EQ(buffer[count - 1], 1);
  }
  EXPECT_EQ(core::Buffer<float>(0).data(), nullptr);
  EXPECT_EQ(core::Buffer<float>().size(), 0u);
}

// The tests' own tensors: everything else leans on them.
TEST(TestTensor, LayoutsHoldTheSameValues) {
  Random random(1);
  Tensor first(DType::kBFloat16, {3, 4, 16}, Layout::kContiguous);
  first.fill_normal(random);
  for (const Layout layout : {Layout::kContiguous, Layout::kGaps, Layout::kHeadsFirst}) {
    Tensor other = copy_of(first.view(), layout);
    EXPECT_EQ(other.values(), first.values());
    EXPECT_EQ(other.bytes(), first.bytes());
    EXPECT_TRUE(other.gaps_intact());
    EXPECT_EQ(other.view().stride(2), 1);
  }
  EXPECT_EQ(copy_of(first.view(), Layout::kHeadsFirst).view().stride(0), 16);
  const Tensor& constant = first;
  EXPECT_EQ(copy_of(slice(constant.view(), 1, 3)).bytes(), first.bytes(0, 1, 3));
}

TEST(TestTensor, NoticesWritesIntoGaps) {
  Tensor tensor(DType::kFloat32, {2, 16}, Layout::kGaps);
  tensor.fill(1);
  EXPECT_TRUE(tensor.gaps_intact());
  const float zero = 0;
  std::memcpy(tensor.view().data + 16 * 4, &zero, 4);  // one past the first row
  EXPECT_FALSE(tensor.gaps_intact());
}

}  // namespace
}  // namespace msa::testing
