// SPDX-License-Identifier: Apache-2.0
// What every operator of the reference shares: reading rows of any storage type as double, writing doubles back,
// walking over the queries of a batch, and the tokens a query's row is allowed to see. Clarity first: nothing here is
// fast. Tested through the operators.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "msa/batch.h"
#include "msa/tensor.h"
#include "src/core/float_convert.h"
#include "src/core/layout.h"

namespace msa::reference {

using Row = std::vector<double>;

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline Row read_row(const std::byte* row, DType dtype, std::int64_t count) {
  Row values(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) values[static_cast<std::size_t>(i)] = core::load_element(row, dtype, i);
  return values;
}

/// Row (t, head) of a tensor [tokens, heads, dim].
inline Row read_row(const ConstTensorView& tensor, std::int64_t t, std::int64_t head) {
  const std::int64_t offset = t * tensor.stride(0) + head * tensor.stride(1);
  const auto bytes = static_cast<std::int64_t>(dtype_size(tensor.dtype));
  return read_row(tensor.data + offset * bytes, tensor.dtype, tensor.size(2));
}

/// Element (i, j) or (i, j, k) of a tensor of floating type, rounded once to its dtype.
inline void write(const TensorView& tensor, double value, std::int64_t i, std::int64_t j, std::int64_t k = 0) {
  const std::int64_t offset = i * tensor.stride(0) + j * tensor.stride(1) + (tensor.rank == 3 ? k : 0);
  core::store_element(tensor.data, tensor.dtype, offset, static_cast<float>(value));
}

inline void write_row(const TensorView& tensor, const Row& values, std::int64_t t, std::int64_t head) {
  for (std::size_t d = 0; d < values.size(); ++d) write(tensor, values[d], t, head, static_cast<std::int64_t>(d));
}

/// Every element of a tensor of rank 2 or 3.
inline void fill(const TensorView& tensor, double value) {
  for (std::int64_t i = 0; i < tensor.size(0); ++i) {
    for (std::int64_t j = 0; j < tensor.size(1); ++j) {
      for (std::int64_t k = 0; k < (tensor.rank == 3 ? tensor.size(2) : 1); ++k) write(tensor, value, i, j, k);
    }
  }
}

inline double dot(const Row& a, const Row& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

/// target += factor * row
inline void add_scaled(Row& target, double factor, const Row& row) {
  for (std::size_t i = 0; i < target.size(); ++i) target[i] += factor * row[i];
}

/// One query of a batch: its sequence s, its row t in the query buffers, and its position p in the sequence.
struct Query {
  std::int64_t sequence = 0;
  std::int64_t row = 0;
  std::int64_t position = 0;
};

/// Calls body(query) for every query of every sequence. The padding rows behind the last sequence are not visited:
/// outputs are filled with their inert values first.
template <class Body>
void for_each_query(const Batch& batch, const Body& body) {
  for (std::int64_t s = 0; s < batch.sequences(); ++s) {
    const core::Sequence sequence = core::get_sequence(batch, s);
    for (std::int64_t i = 0; i < sequence.queries; ++i) {
      body(Query{s, sequence.query_begin + i, core::query_position(batch, sequence, i)});
    }
  }
}

/// The valid entries of blocks[group, row, :].
inline std::vector<std::int64_t> read_blocks(const ConstTensorView& blocks, std::int64_t group, std::int64_t row) {
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < blocks.size(2); ++i) {
    std::int32_t id = 0;
    const std::int64_t offset = group * blocks.stride(0) + row * blocks.stride(1) + i;
    std::memcpy(&id, blocks.data + offset * static_cast<std::int64_t>(sizeof id), sizeof id);
    if (id >= 0) ids.push_back(id);
  }
  return ids;
}

/// The tokens a (query, group) row attends to: those of its selected blocks that are visible (token causality holds
/// inside the local block), or the whole visible prefix when `blocks` is empty.
inline std::vector<std::int64_t> row_support(const ConstTensorView& blocks, std::int64_t block_size, std::int64_t group,
                                             const Query& query) {
  std::vector<std::int64_t> support;
  if (blocks.empty()) {
    for (std::int64_t j = 0; j <= query.position; ++j) support.push_back(j);
    return support;
  }
  for (const std::int64_t block : read_blocks(blocks, group, query.row)) {
    for (std::int64_t j = block * block_size; j < (block + 1) * block_size && j <= query.position; ++j) {
      support.push_back(j);
    }
  }
  return support;
}

/// Keys or values of one sequence and head, read as double.
class Keys {
 public:
  Keys(const ConstTensorView& tensor, const Batch& batch)
      : rows_(tensor, batch), dtype_(tensor.dtype), dim_(tensor.size(tensor.rank - 1)) {}
  Row read(std::int64_t sequence, std::int64_t position, std::int64_t head = 0) const {
    return read_row(rows_.row(sequence, position, head), dtype_, dim_);
  }

 private:
  core::KeyRows rows_;
  DType dtype_;
  std::int64_t dim_;
};

/// scale * <q, k_j> for every token j of the support.
inline Row read_scores(const Row& q, const Keys& keys, const Query& query, std::int64_t head,
                       const std::vector<std::int64_t>& support, double scale) {
  Row scores;
  for (const std::int64_t j : support) scores.push_back(scale * dot(q, keys.read(query.sequence, j, head)));
  return scores;
}

struct Softmax {
  Row probabilities;
  double lse = -kInfinity;  ///< ln sum exp(score), -inf over nothing
};

inline Softmax softmax(const Row& scores) {
  Softmax result;
  if (scores.empty()) return result;
  double largest = -kInfinity;
  for (const double score : scores) largest = score > largest ? score : largest;
  double sum = 0;
  for (const double score : scores) sum += std::exp(score - largest);
  result.lse = largest + std::log(sum);
  for (const double score : scores) result.probabilities.push_back(std::exp(score - largest) / sum);
  return result;
}

}  // namespace msa::reference
