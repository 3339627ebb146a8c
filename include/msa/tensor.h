// SPDX-License-Identifier: Apache-2.0
// Non-owning strided views: the only way tensors enter and leave the library. A view is a pointer, a type, and up to
// four extents with element strides; the last dimension must be contiguous (stride 1), the others may have any stride.
// Tested in tests/unit/tensor_test.cc.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace msa {

enum class DType : std::uint8_t {
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt32,
  kFloat8E4M3,  ///< OCP E4M3 without infinities: up to 448, steps of a 16th; storage of keys and values in inference
};

/// Bytes of one element.
std::size_t dtype_size(DType dtype);
/// "float32", "bfloat16", "float16", "int32", "float8_e4m3".
const char* dtype_name(DType dtype);

inline constexpr int kMaxRank = 4;

/// View of memory owned by somebody else. `Byte` is `std::byte` or `const std::byte`. A default-made view is empty:
/// rank 0, null data; optional arguments are left that way.
template <class Byte>
struct BasicTensorView {
  Byte* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};  ///< in elements

  bool empty() const { return rank == 0; }
  std::int64_t size(int dim) const { return shape[static_cast<std::size_t>(dim)]; }
  std::int64_t stride(int dim) const { return strides[static_cast<std::size_t>(dim)]; }
  std::int64_t elements() const {
    std::int64_t n = 1;
    for (int d = 0; d < rank; ++d) n *= size(d);
    return n;
  }
};

struct TensorView : BasicTensorView<std::byte> {};

struct ConstTensorView : BasicTensorView<const std::byte> {
  ConstTensorView() = default;
  ConstTensorView(const TensorView& view) {  // NOLINT(google-explicit-constructor): as pointer to pointer-to-const
    data = view.data;
    dtype = view.dtype;
    rank = view.rank;
    shape = view.shape;
    strides = view.strides;
  }
};

/// Contiguous (row-major) view of `data`.
TensorView make_view(void* data, DType dtype, std::initializer_list<std::int64_t> shape);
ConstTensorView make_view(const void* data, DType dtype, std::initializer_list<std::int64_t> shape);

inline TensorView make_view(float* data, std::initializer_list<std::int64_t> shape) {
  return make_view(static_cast<void*>(data), DType::kFloat32, shape);
}
inline ConstTensorView make_view(const float* data, std::initializer_list<std::int64_t> shape) {
  return make_view(static_cast<const void*>(data), DType::kFloat32, shape);
}
inline TensorView make_view(std::int32_t* data, std::initializer_list<std::int64_t> shape) {
  return make_view(static_cast<void*>(data), DType::kInt32, shape);
}
inline ConstTensorView make_view(const std::int32_t* data, std::initializer_list<std::int64_t> shape) {
  return make_view(static_cast<const void*>(data), DType::kInt32, shape);
}

/// "float32[12, 4, 64]", for messages.
std::string describe(const ConstTensorView& view);

}  // namespace msa
