// SPDX-License-Identifier: Apache-2.0
// Small operations on rows of floats, and rows of tensors by row and head: what the backward kernels add to tile-inl.h.
// Tested through the operators.
#if defined(MSA_CPU_ROW_OPS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_ROW_OPS_INL_H_
#undef MSA_CPU_ROW_OPS_INL_H_
#else
#define MSA_CPU_ROW_OPS_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "msa/tensor.h"
#include "src/cpu/tile-inl.h"
#include "src/cpu/tile.h"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu {
namespace HWY_NAMESPACE {

/// out[0, count) += in, count a multiple of 16.
inline HWY_ATTR void add_row(const float* HWY_RESTRICT in, std::int64_t count, float* HWY_RESTRICT out) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  for (std::int64_t i = 0; i < count; i += lanes) {
    hn::StoreU(hn::Add(hn::LoadU(df, out + i), hn::LoadU(df, in + i)), df, out + i);
  }
}

/// row[0, count) *= factor, count a multiple of 16.
inline HWY_ATTR void scale_row(float factor, std::int64_t count, float* HWY_RESTRICT row) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto f = hn::Set(df, factor);
  for (std::int64_t i = 0; i < count; i += lanes) hn::StoreU(hn::Mul(hn::LoadU(df, row + i), f), df, row + i);
}

/// First element of a head of a row of a tensor [rows, heads, dim] or [rows, heads].
inline const std::byte* head_row(const ConstTensorView& tensor, std::int64_t row, std::int64_t head) {
  return tensor.data +
         (row * tensor.stride(0) + head * tensor.stride(1)) * static_cast<std::int64_t>(dtype_size(tensor.dtype));
}
inline std::byte* head_row(const TensorView& tensor, std::int64_t row, std::int64_t head) {
  return tensor.data +
         (row * tensor.stride(0) + head * tensor.stride(1)) * static_cast<std::int64_t>(dtype_size(tensor.dtype));
}
/// An element of a float32 tensor [rows, heads].
inline float read_float(const ConstTensorView& tensor, std::int64_t row, std::int64_t head) {
  return *reinterpret_cast<const float*>(head_row(tensor, row, head));
}

/// Rows of a score tile or of the queries behind it: row r belongs to head r % heads of the query members[r / heads]
/// (of query r / heads when members is null).
template <class T>
struct TileRows {
  T* first;
  const std::int32_t* members;
  std::int64_t heads;
  std::int64_t query_stride;
  std::int64_t head_stride;
  T* row(std::int64_t r) const {
    const std::int64_t query = r / heads;
    return first + (members == nullptr ? query : members[query]) * query_stride + r % heads * head_stride;
  }
};

/// c[rows, cols] = a[rows, inner] * b[inner, cols], as `product`. The addresses are found once, not once a register
/// tile: they cost a division each.
inline HWY_ATTR void product_of_tile(std::int64_t rows, std::int64_t cols, std::int64_t inner,
                                     const TileRows<const float>& a, const float* HWY_RESTRICT b, std::int64_t b_row,
                                     const TileRows<float>& c) {
  const float* a_rows[kScoreRows];
  float* c_rows[kScoreRows];
  for (std::int64_t begin = 0; begin < rows; begin += kScoreRows) {
    const std::int64_t count = std::min(kScoreRows, rows - begin);
    for (std::int64_t r = 0; r < count; ++r) {
      a_rows[r] = a.row(begin + r);
      c_rows[r] = c.row(begin + r);
    }
    product_of_rows(count, cols, inner, a_rows, 1, b, b_row, c_rows, Sums::kReplace);
  }
}

/// Whether rows [0, rows) of `dim` elements (a multiple of 16) hold finite numbers only.
inline HWY_ATTR bool are_finite(const float* HWY_RESTRICT first, std::int64_t stride, std::int64_t rows,
                                std::int64_t dim) {
  const FloatTag df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  auto sum = hn::Zero(df);  // of 0 times each: 0 unless one is infinite or NaN
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = first + r * stride;
    for (std::int64_t i = 0; i < dim; i += lanes) sum = hn::MulAdd(hn::Zero(df), hn::LoadU(df, row + i), sum);
  }
  return hn::AllTrue(df, hn::Eq(sum, hn::Zero(df)));
}

}  // namespace HWY_NAMESPACE
}  // namespace msa::cpu
HWY_AFTER_NAMESPACE();

#endif  // MSA_CPU_ROW_OPS_INL_H_
