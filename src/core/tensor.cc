// SPDX-License-Identifier: Apache-2.0
// Helpers of the tensor views. Tested in tests/unit/tensor_test.cc.
#include "msa/tensor.h"

#include "msa/error.h"

namespace msa {
namespace {

template <class View, class Pointer>
View make(Pointer data, DType dtype, std::initializer_list<std::int64_t> shape) {
  if (shape.size() > static_cast<std::size_t>(kMaxRank)) {
    throw Error("make_view: rank " + std::to_string(shape.size()) + " is above the limit of " +
                std::to_string(kMaxRank));
  }
  View view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<int>(shape.size());
  std::size_t d = 0;
  for (const std::int64_t extent : shape) {
    if (extent < 0) throw Error("make_view: extent " + std::to_string(extent) + " is negative");
    view.shape[d++] = extent;
  }
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    view.strides[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

}  // namespace

std::size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    case DType::kFloat8E4M3: return 1;
  }
  return 0;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kInt32: return "int32";
    case DType::kFloat8E4M3: return "float8_e4m3";
  }
  return "unknown";
}

TensorView make_view(void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  return make<TensorView>(static_cast<std::byte*>(data), dtype, shape);
}

ConstTensorView make_view(const void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  return make<ConstTensorView>(static_cast<const std::byte*>(data), dtype, shape);
}

std::string describe(const ConstTensorView& view) {
  std::string text = dtype_name(view.dtype);
  text += '[';
  for (int d = 0; d < view.rank; ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(view.size(d));
  }
  return text + ']';
}

}  // namespace msa
