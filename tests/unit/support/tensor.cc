// SPDX-License-Identifier: Apache-2.0
// See tensor.h.
#include "tests/unit/support/tensor.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "src/core/float_convert.h"

namespace msa::testing {
namespace {

constexpr std::int64_t kRowGap = 3;
constexpr std::int64_t kPlaneGap = 5;
constexpr std::int32_t kPoisonId = 0x7eadbeef;

std::int64_t bytes_of(DType dtype) { return static_cast<std::int64_t>(dtype_size(dtype)); }

}  // namespace

Tensor::Tensor(DType dtype, std::vector<std::int64_t> shape, Layout layout) : dtype_(dtype), shape_(std::move(shape)) {
  const std::size_t rank = shape_.size();
  std::vector<std::size_t> order(rank);  // dimensions from fastest to slowest in memory
  for (std::size_t d = 0; d < rank; ++d) order[d] = rank - 1 - d;
  if (layout == Layout::kHeadsFirst && rank >= 3) std::rotate(order.begin() + 1, order.begin() + 2, order.end());
  strides_.assign(rank, 1);
  const bool gaps = layout == Layout::kGaps;
  std::int64_t stride = 1;
  for (std::size_t i = 0; i < rank; ++i) {
    strides_[order[i]] = stride;
    stride *= std::max<std::int64_t>(1, shape_[order[i]]);
    if (gaps) stride += i == 0 ? kRowGap : kPlaneGap;
  }
  start_ = gaps ? 1 : 0;
  memory_.resize(static_cast<std::size_t>((start_ + stride) * bytes_of(dtype_)));
  for (std::int64_t i = 0; i < start_ + stride; ++i) store(i, std::numeric_limits<double>::quiet_NaN());
}

void Tensor::store(std::int64_t offset, double value) {
  if (dtype_ == DType::kInt32) {
    const std::int32_t id = value != value ? kPoisonId : static_cast<std::int32_t>(value);
    std::memcpy(memory_.data() + offset * 4, &id, 4);
  } else {
    core::store_element(memory_.data(), dtype_, offset, static_cast<float>(value));
  }
}

double Tensor::load(std::int64_t offset) const {
  if (dtype_ == DType::kInt32) {
    std::int32_t id = 0;
    std::memcpy(&id, memory_.data() + offset * 4, 4);
    return id;
  }
  return core::load_element(memory_.data(), dtype_, offset);
}

std::int64_t Tensor::elements() const {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape_) count *= extent;
  return count;
}

std::int64_t Tensor::offset(std::int64_t logical) const {
  std::int64_t result = start_;
  for (std::size_t d = shape_.size(); d-- > 0;) {
    result += logical % shape_[d] * strides_[d];
    logical /= shape_[d];
  }
  return result;
}

void Tensor::for_each_offset(const std::function<void(std::int64_t)>& body) const {
  for (std::int64_t i = 0; i < elements(); ++i) body(offset(i));
}

TensorView Tensor::view() {
  TensorView view;
  view.data = memory_.data() + start_ * bytes_of(dtype_);
  view.dtype = dtype_;
  view.rank = static_cast<int>(shape_.size());
  for (std::size_t d = 0; d < shape_.size(); ++d) {
    view.shape[d] = shape_[d];
    view.strides[d] = strides_[d];
  }
  return view;
}

ConstTensorView Tensor::view() const { return const_cast<Tensor*>(this)->view(); }

double Tensor::at(std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t l) const {
  const std::int64_t index[] = {i, j, k, l};
  std::int64_t position = start_;
  for (std::size_t d = 0; d < shape_.size(); ++d) position += index[d] * strides_[d];
  return load(position);
}

void Tensor::set(double value, std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t l) {
  const std::int64_t index[] = {i, j, k, l};
  std::int64_t position = start_;
  for (std::size_t d = 0; d < shape_.size(); ++d) position += index[d] * strides_[d];
  store(position, value);
}

std::vector<double> Tensor::values() const {
  std::vector<double> result;
  for_each_offset([&](std::int64_t at) { result.push_back(load(at)); });
  return result;
}

std::vector<std::byte> Tensor::bytes() const {
  std::vector<std::byte> result;
  for_each_offset([&](std::int64_t at) {
    const std::byte* first = memory_.data() + at * bytes_of(dtype_);
    result.insert(result.end(), first, first + bytes_of(dtype_));
  });
  return result;
}

std::vector<std::byte> Tensor::bytes(int dim, std::int64_t begin, std::int64_t end) const {
  return copy_of(slice_dim(view(), dim, begin, end)).bytes();
}

bool Tensor::gaps_intact() const {
  const Tensor fresh = [&] {
    Tensor copy = *this;
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(memory_.size()) / bytes_of(dtype_); ++i) {
      copy.store(i, std::numeric_limits<double>::quiet_NaN());
    }
    return copy;
  }();
  Tensor poisoned = *this;
  for_each_offset([&](std::int64_t at) { poisoned.store(at, std::numeric_limits<double>::quiet_NaN()); });
  return poisoned.memory_ == fresh.memory_;
}

void Tensor::fill(double value) {
  for_each_offset([&](std::int64_t at) { store(at, value); });
}

void Tensor::fill_normal(Random& random, double deviation) {
  std::normal_distribution<double> normal(0.0, deviation);
  for_each_offset([&](std::int64_t at) { store(at, normal(random)); });
}

void Tensor::fill_integers(Random& random, int bound) {
  std::uniform_int_distribution<int> uniform(-bound, bound);
  for_each_offset([&](std::int64_t at) { store(at, uniform(random)); });
}

Tensor Tensor::as(DType dtype) const {
  Tensor result(dtype, shape_);
  for (std::int64_t i = 0; i < elements(); ++i) result.store(result.offset(i), load(offset(i)));
  return result;
}

ConstTensorView slice_dim(const ConstTensorView& view, int dim, std::int64_t begin, std::int64_t end) {
  ConstTensorView result = view;
  result.data += begin * view.stride(dim) * static_cast<std::int64_t>(dtype_size(view.dtype));
  result.shape[static_cast<std::size_t>(dim)] = end - begin;
  return result;
}

ConstTensorView slice(const ConstTensorView& view, std::int64_t begin, std::int64_t end) {
  return slice_dim(view, 0, begin, end);
}

TensorView slice(const TensorView& view, std::int64_t begin, std::int64_t end) {
  TensorView result = view;
  result.data += begin * view.stride(0) * static_cast<std::int64_t>(dtype_size(view.dtype));
  result.shape[0] = end - begin;
  return result;
}

Tensor copy_of(const ConstTensorView& view, Layout layout) {
  Tensor result(view.dtype, {view.shape.begin(), view.shape.begin() + view.rank}, layout);
  const TensorView target = result.view();
  const auto bytes = static_cast<std::int64_t>(dtype_size(view.dtype));
  for (std::int64_t i = 0; i < view.elements(); ++i) {
    std::int64_t rest = i;
    std::int64_t from = 0;
    std::int64_t to = 0;
    for (int d = view.rank; d-- > 0;) {
      from += rest % view.size(d) * view.stride(d);
      to += rest % view.size(d) * target.stride(d);
      rest /= view.size(d);
    }
    std::memcpy(target.data + to * bytes, view.data + from * bytes, static_cast<std::size_t>(bytes));
  }
  return result;
}

std::string name_of(DType dtype) { return dtype_name(dtype); }

}  // namespace msa::testing
