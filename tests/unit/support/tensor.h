// SPDX-License-Identifier: Apache-2.0
// Tensors that own their memory, for tests: any dtype, with gaps between rows that hold poison, so that a kernel which
// ignores a stride or writes past a row is caught. Everything starts as NaN (int32: a huge id).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "msa/tensor.h"

namespace msa::testing {

enum class Layout {
  kContiguous,
  kGaps,        ///< odd gaps behind the rows of every dimension, and an odd start: nothing is aligned
  kHeadsFirst,  ///< the last dimension but one varies slowest in memory (a transposed view)
};

using Random = std::mt19937_64;

class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::vector<std::int64_t> shape, Layout layout = Layout::kGaps);

  TensorView view();
  ConstTensorView view() const;
  DType dtype() const { return dtype_; }
  const std::vector<std::int64_t>& shape() const { return shape_; }
  std::int64_t size(int dim) const { return shape_[static_cast<std::size_t>(dim)]; }
  std::int64_t elements() const;

  double at(std::int64_t i, std::int64_t j = 0, std::int64_t k = 0, std::int64_t l = 0) const;
  void set(double value, std::int64_t i, std::int64_t j = 0, std::int64_t k = 0, std::int64_t l = 0);
  /// All elements, row-major.
  std::vector<double> values() const;
  /// The bytes of all elements, row-major, without gaps: what bitwise comparisons compare.
  std::vector<std::byte> bytes() const;
  /// Bytes of the elements [begin, end) along `dim`.
  std::vector<std::byte> bytes(int dim, std::int64_t begin, std::int64_t end) const;
  /// Whether the memory between the rows still holds what it held at the start.
  bool gaps_intact() const;

  void fill(double value);
  void fill_normal(Random& random, double deviation = 1.0);
  /// Integers in [-bound, bound]: exact in every dtype, and with ties everywhere.
  void fill_integers(Random& random, int bound);
  /// The same values in another dtype; exact towards float32.
  Tensor as(DType dtype) const;

 private:
  std::int64_t offset(std::int64_t logical) const;
  void for_each_offset(const std::function<void(std::int64_t)>& body) const;
  void store(std::int64_t offset, double value);
  double load(std::int64_t offset) const;

  DType dtype_ = DType::kFloat32;
  std::vector<std::int64_t> shape_;
  std::vector<std::int64_t> strides_;
  std::int64_t start_ = 0;
  std::vector<std::byte> memory_;
};

/// Rows [begin, end) of the first dimension.
ConstTensorView slice(const ConstTensorView& view, std::int64_t begin, std::int64_t end);
TensorView slice(const TensorView& view, std::int64_t begin, std::int64_t end);
/// Elements [begin, end) of dimension `dim`.
ConstTensorView slice_dim(const ConstTensorView& view, int dim, std::int64_t begin, std::int64_t end);

/// A copy of the viewed elements.
Tensor copy_of(const ConstTensorView& view, Layout layout = Layout::kGaps);

/// "float32" and so on, for test names.
std::string name_of(DType dtype);

inline const std::vector<DType> kFloatTypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

}  // namespace msa::testing
