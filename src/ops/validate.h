// SPDX-License-Identifier: Apache-2.0
// The rules of SPEC section 7, checked once at the front door, so that backends can trust what they get. A broken rule
// throws msa::Error: "op: argument: what it was; the rule". Tested in tests/unit/validate_test.cc.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "msa/batch.h"
#include "msa/context.h"
#include "msa/tensor.h"

namespace msa::ops {

/// Checks of one call; remembers the operator's name for the messages.
class Validator {
 public:
  /// kShapes: the call reads no tensor, so that null pointers will do.
  enum class Reads { kData, kShapes };

  /// Refuses a backend that is not in this build.
  Validator(const char* op, const Context& context, Reads reads = Reads::kData);

  [[noreturn]] void fail(const std::string& argument, const std::string& problem) const;

  /// Rank, a contiguous last dimension, and non-null data where there are elements.
  void check_layout(const char* name, const ConstTensorView& view, int rank) const;
  void check_float(const char* name, const ConstTensorView& view) const;
  void check_dtype(const char* name, const ConstTensorView& view, DType dtype) const;
  /// Keys and values of a forward pass: the dtype of the queries, or float8_e4m3.
  void check_key_dtype(const char* name, const ConstTensorView& keys, const char* other_name,
                       const ConstTensorView& other) const;
  void check_same_dtype(const char* name, const ConstTensorView& view, const char* other_name,
                        const ConstTensorView& other) const;
  void check_size(const char* name, const ConstTensorView& view, int dim, std::int64_t expected,
                  const std::string& meaning) const;
  /// A gradient: layout, shape and dtype of its input.
  void check_like(const char* name, const ConstTensorView& grad, const char* input_name,
                  const ConstTensorView& input) const;
  /// Multiple of 16 in [16, 256].
  void check_head_dim(const char* name, const ConstTensorView& view, int dim) const;
  void check_block_size(std::int64_t block_size) const;
  void check_topk(std::int64_t topk) const;
  void check_forced(std::int64_t local_blocks, std::int64_t init_blocks) const;
  void check_scale(const char* name, const std::optional<double>& scale) const;

  /// Rank and float dtype of a key-side tensor: [tokens, (heads,) dim], with a page dimension in front when paged.
  void check_keys(const char* name, const ConstTensorView& keys, const Batch& batch, bool has_heads) const;
  /// cu_seqlens, page table and positions against the buffers. block_size 0: no rule ties pages to blocks (dense). What
  /// they hold is checked here when it lies in host memory; else by DeviceCall.
  void check_batch(const Batch& batch, std::int64_t query_rows, const char* keys_name, const ConstTensorView& keys,
                   std::int64_t block_size) const;
  /// A second key-side tensor agrees with the first in its token (or page) extents.
  void check_same_tokens(const char* name, const ConstTensorView& keys, const char* first_name,
                         const ConstTensorView& first, const Batch& batch) const;
  void check_packed(const Batch& batch) const;
  /// Shape of blocks [kv_heads, Tq, topk]; when `ids` also every id: ascending, unique, visible, -1 only behind them.
  /// The ids as check_batch the batch: here on the host only.
  void check_blocks(const ConstTensorView& blocks, const Batch& batch, std::int64_t kv_heads, std::int64_t query_rows,
                    std::int64_t block_size, bool ids) const;

  // The parts of check_batch and check_blocks that read what the arrays hold.
  void check_batch_contents(const Batch& batch, std::int64_t query_rows, const char* keys_name,
                            const ConstTensorView& keys) const;
  void check_block_ids(const ConstTensorView& blocks, const Batch& batch, std::int64_t block_size) const;

  const char* op() const { return op_; }
  /// Main-branch q [Tq, query_heads, head_dim] and its keys: layout, dtypes, heads. Returns kv_heads.
  std::int64_t check_queries_and_keys(const ConstTensorView& q, const ConstTensorView& k, const Batch& batch) const;
  /// q against k (and v): head counts and dims. Returns kv_heads.
  std::int64_t check_heads(const ConstTensorView& q, const ConstTensorView& k) const;

 private:
  void check_cu_seqlens(const char* name, std::span<const std::int32_t> cu_seqlens, std::int64_t rows,
                        const char* buffer) const;
  bool reads_contents() const { return reads_ == Reads::kData && context_.backend != Backend::kCuda; }

  const char* op_;
  Context context_;
  Reads reads_;
};

/// The dimension of a key-side tensor that holds its heads.
inline int heads_dim(const Batch& batch) { return batch.is_paged ? 2 : 1; }

/// 1/sqrt(dim) unless given.
double resolve_scale(const std::optional<double>& scale, std::int64_t dim);

/// Calls reference(...), cpu(...) or cuda(...), as the context says.
template <class Reference, class Cpu, class Cuda>
decltype(auto) dispatch(const Context& context, Reference&& reference, Cpu&& cpu, Cuda&& cuda) {
  if (context.backend == Backend::kReference) return reference();
  if (context.backend == Backend::kCuda) return cuda();
  return cpu();
}

}  // namespace msa::ops
