// SPDX-License-Identifier: Apache-2.0
// See validate.h.
#include "src/ops/validate.h"

#include <cmath>

#include "msa/error.h"
#include "msa/select_blocks.h"
#include "src/core/layout.h"
#include "src/core/threads.h"
#include "src/cuda/operators.h"

namespace msa::ops {
namespace {

std::string text(std::int64_t value) { return std::to_string(value); }

bool is_float(DType dtype) { return dtype != DType::kInt32 && dtype != DType::kFloat8E4M3; }

}  // namespace

Validator::Validator(const char* op, const Context& context, Reads reads) : op_(op), context_(context), reads_(reads) {
  if (context.backend == Backend::kCuda && !cuda::is_built()) {
    fail("backend", "cuda is not in this build; configure with -DMSA_CUDA=ON (docs/cuda.md)");
  }
}

void Validator::fail(const std::string& argument, const std::string& problem) const {
  throw Error(std::string(op_) + ": " + argument + ": " + problem);
}

void Validator::check_layout(const char* name, const ConstTensorView& view, int rank) const {
  if (view.rank != rank) fail(name, describe(view) + " must have rank " + std::to_string(rank));
  for (int d = 0; d < rank; ++d) {
    if (view.size(d) < 0) fail(name, describe(view) + " has a negative extent");
    if (view.stride(d) < 0) fail(name, describe(view) + " has a negative stride in dimension " + text(d));
  }
  if (view.size(rank - 1) > 1 && view.stride(rank - 1) != 1) {
    fail(name, describe(view) + " has stride " + text(view.stride(rank - 1)) +
                   " in its last dimension; it must be contiguous (stride 1)");
  }
  if (reads_ == Reads::kData && view.data == nullptr && view.elements() > 0)
    fail(name, describe(view) + " has no data (null pointer)");
}

void Validator::check_float(const char* name, const ConstTensorView& view) const {
  if (!is_float(view.dtype)) fail(name, describe(view) + " must be float32, bfloat16 or float16");
}

void Validator::check_dtype(const char* name, const ConstTensorView& view, DType dtype) const {
  if (view.dtype != dtype) fail(name, describe(view) + " must be " + dtype_name(dtype));
}

void Validator::check_same_dtype(const char* name, const ConstTensorView& view, const char* other_name,
                                 const ConstTensorView& other) const {
  if (view.dtype != other.dtype) {
    fail(name, describe(view) + " must have the dtype of " + other_name + ", " + dtype_name(other.dtype));
  }
}

void Validator::check_key_dtype(const char* name, const ConstTensorView& keys, const char* other_name,
                                const ConstTensorView& other) const {
  if (keys.dtype != DType::kFloat8E4M3 && keys.dtype != other.dtype) {
    fail(name, describe(keys) + " must have the dtype of " + other_name + ", " + dtype_name(other.dtype) +
                   ", or float8_e4m3");
  }
}

void Validator::check_size(const char* name, const ConstTensorView& view, int dim, std::int64_t expected,
                           const std::string& meaning) const {
  if (view.size(dim) != expected) {
    fail(name, describe(view) + ": dimension " + text(dim) + " must be " + meaning + " = " + text(expected));
  }
}

void Validator::check_like(const char* name, const ConstTensorView& grad, const char* input_name,
                           const ConstTensorView& input) const {
  check_layout(name, grad, input.rank);
  check_same_dtype(name, grad, input_name, input);
  for (int d = 0; d < input.rank; ++d) {
    check_size(name, grad, d, input.size(d), std::string("that of ") + input_name);
  }
}

void Validator::check_head_dim(const char* name, const ConstTensorView& view, int dim) const {
  const std::int64_t size = view.size(dim);
  if (size < kHeadDimMultiple || size > kMaxHeadDim || size % kHeadDimMultiple != 0) {
    fail(name, describe(view) + ": head dimension " + text(size) + " must be a multiple of " + text(kHeadDimMultiple) +
                   " from " + text(kHeadDimMultiple) + " to " + text(kMaxHeadDim));
  }
}

void Validator::check_block_size(std::int64_t block_size) const {
  const bool power_of_two = block_size > 0 && (block_size & (block_size - 1)) == 0;
  if (!power_of_two || block_size < kMinBlockSize || block_size > kMaxBlockSize) {
    fail("block_size",
         text(block_size) + " must be a power of two from " + text(kMinBlockSize) + " to " + text(kMaxBlockSize));
  }
}

void Validator::check_topk(std::int64_t topk) const {
  if (topk < 1 || topk > kMaxTopk) fail("topk", text(topk) + " must be from 1 to " + text(kMaxTopk));
}

void Validator::check_forced(std::int64_t local_blocks, std::int64_t init_blocks) const {
  if (local_blocks < 0) fail("local_blocks", text(local_blocks) + " must be 0 or more");
  if (init_blocks < 0) fail("init_blocks", text(init_blocks) + " must be 0 or more");
}

void Validator::check_scale(const char* name, const std::optional<double>& scale) const {
  if (scale && !std::isfinite(*scale)) fail(name, std::to_string(*scale) + " must be finite");
}

void Validator::check_keys(const char* name, const ConstTensorView& keys, const Batch& batch, bool has_heads) const {
  const int rank = (has_heads ? 3 : 2) + (batch.is_paged ? 1 : 0);
  check_layout(name, keys, rank);
  check_head_dim(name, keys, rank - 1);
}

void Validator::check_cu_seqlens(const char* name, std::span<const std::int32_t> cu_seqlens, std::int64_t rows,
                                 const char* buffer) const {
  if (cu_seqlens[0] != 0) fail(name, "entry 0 is " + text(cu_seqlens[0]) + "; it must be 0");
  for (std::size_t s = 1; s < cu_seqlens.size(); ++s) {
    if (cu_seqlens[s] < cu_seqlens[s - 1]) {
      fail(name, "entry " + std::to_string(s) + " is " + text(cu_seqlens[s]) + ", below the entry before it, " +
                     text(cu_seqlens[s - 1]) + "; entries must not decrease");
    }
  }
  if (cu_seqlens.back() > rows) {
    fail(name, "ends at " + text(cu_seqlens.back()) + ", beyond the " + text(rows) + " rows of " + buffer);
  }
}

void Validator::check_batch(const Batch& batch, std::int64_t query_rows, const char* keys_name,
                            const ConstTensorView& keys, std::int64_t block_size) const {
  if (batch.cu_seqlens_q.empty()) fail("cu_seqlens_q", "is empty; it must have sequences + 1 entries");
  const auto sequences = static_cast<std::size_t>(batch.sequences());
  if (batch.is_paged) {
    const std::int64_t page = keys.size(1);
    if (page < 1) fail(keys_name, describe(keys) + ": the page size must be at least 1");
    if (block_size > 0 && page % block_size != 0) {
      fail(keys_name, describe(keys) + ": page size " + text(page) + " must be block_size " + text(block_size) +
                          " or a multiple of it");
    }
    if (batch.seqlens_k.size() != sequences) {
      fail("seqlens_k", "has " + std::to_string(batch.seqlens_k.size()) + " entries; cu_seqlens_q has " +
                            std::to_string(sequences) + " sequences");
    }
    if (batch.max_pages < 0 || batch.page_table.size() != sequences * static_cast<std::size_t>(batch.max_pages)) {
      fail("page_table", "has " + std::to_string(batch.page_table.size()) +
                             " entries; it must be sequences * max_pages = " + std::to_string(sequences) + " * " +
                             text(batch.max_pages));
    }
  } else if (batch.cu_seqlens_k.size() != batch.cu_seqlens_q.size()) {
    fail("cu_seqlens_k", "has " + std::to_string(batch.cu_seqlens_k.size()) + " entries; cu_seqlens_q has " +
                             std::to_string(batch.cu_seqlens_q.size()));
  }
  if (context_.backend == Backend::kCuda && !batch.query_positions.empty() &&
      static_cast<std::int64_t>(batch.query_positions.size()) != query_rows) {
    fail("query_positions", "has " + std::to_string(batch.query_positions.size()) + " entries; there are " +
                                text(query_rows) + " query rows");
  }
  if (reads_contents()) check_batch_contents(batch, query_rows, keys_name, keys);
}

void Validator::check_batch_contents(const Batch& batch, std::int64_t query_rows, const char* keys_name,
                                     const ConstTensorView& keys) const {
  check_cu_seqlens("cu_seqlens_q", batch.cu_seqlens_q, query_rows, "the queries");
  const auto sequences = static_cast<std::size_t>(batch.sequences());
  if (batch.is_paged) {
    const std::int64_t pages = keys.size(0);
    const std::int64_t page = keys.size(1);
    for (std::size_t s = 0; s < sequences; ++s) {
      const std::int64_t length = batch.seqlens_k[s];
      if (length < 0)
        fail("seqlens_k", "entry " + std::to_string(s) + " is " + text(length) + "; it must be 0 or more");
      const std::int64_t used = (length + page - 1) / page;
      if (used > batch.max_pages) {
        fail("page_table", "sequence " + std::to_string(s) + " has " + text(length) + " keys, " + text(used) +
                               " pages of " + text(page) + "; the table's rows hold " + text(batch.max_pages));
      }
      for (std::int64_t i = 0; i < used; ++i) {
        const std::int64_t id =
            batch.page_table[s * static_cast<std::size_t>(batch.max_pages) + static_cast<std::size_t>(i)];
        if (id < 0 || id >= pages) {
          fail("page_table", "entry [" + std::to_string(s) + ", " + text(i) + "] is " + text(id) +
                                 "; a used entry must be a page id from 0 to " + text(pages - 1));
        }
      }
    }
  } else {
    check_cu_seqlens("cu_seqlens_k", batch.cu_seqlens_k, keys.size(0), keys_name);
  }
  const auto& positions = batch.query_positions;
  if (!positions.empty() && static_cast<std::int64_t>(positions.size()) != core::total_queries(batch)) {
    fail("query_positions", "has " + std::to_string(positions.size()) + " entries; cu_seqlens_q ends at " +
                                text(core::total_queries(batch)));
  }
  for (std::int64_t s = 0; s < batch.sequences(); ++s) {
    const core::Sequence sequence = core::get_sequence(batch, s);
    if (positions.empty()) {
      if (sequence.queries > sequence.keys) {
        fail("cu_seqlens_q", "sequence " + text(s) + " has " + text(sequence.queries) + " queries but " +
                                 text(sequence.keys) + " keys; queries are the last of the keys' tokens, so Lq <= Lk");
      }
      continue;
    }
    for (std::int64_t i = 0; i < sequence.queries; ++i) {
      const std::int64_t position = core::query_position(batch, sequence, i);
      const std::int64_t before = i == 0 ? -1 : core::query_position(batch, sequence, i - 1);
      if (position <= before || position >= sequence.keys) {
        fail("query_positions", "query " + text(i) + " of sequence " + text(s) + " is at " + text(position) +
                                    "; positions must rise strictly and lie below the " + text(sequence.keys) +
                                    " keys");
      }
    }
  }
}

void Validator::check_same_tokens(const char* name, const ConstTensorView& keys, const char* first_name,
                                  const ConstTensorView& first, const Batch& batch) const {
  check_size(name, keys, 0, first.size(0), std::string("that of ") + first_name);
  if (batch.is_paged) check_size(name, keys, 1, first.size(1), std::string("the page size of ") + first_name);
}

void Validator::check_packed(const Batch& batch) const {
  if (batch.is_paged) fail("batch", "is paged; gradients are offered for packed batches only");
}

std::int64_t Validator::check_queries_and_keys(const ConstTensorView& q, const ConstTensorView& k,
                                               const Batch& batch) const {
  check_layout("q", q, 3);
  check_float("q", q);
  check_keys("k", k, batch, true);
  check_same_dtype("k", k, "q", q);
  return check_heads(q, k);
}

std::int64_t Validator::check_heads(const ConstTensorView& q, const ConstTensorView& k) const {
  const std::int64_t query_heads = q.size(1);
  const std::int64_t kv_heads = k.size(k.rank - 2);
  if (kv_heads < 1 || query_heads < 1 || query_heads % kv_heads != 0) {
    fail("q", describe(q) + ": query_heads = " + text(query_heads) +
                  " must be a positive multiple of kv_heads = " + text(kv_heads) + " of k");
  }
  check_size("k", k, k.rank - 1, q.size(2), "head_dim of q");
  return kv_heads;
}

void Validator::check_blocks(const ConstTensorView& blocks, const Batch& batch, std::int64_t kv_heads,
                             std::int64_t query_rows, std::int64_t block_size, bool ids) const {
  check_layout("blocks", blocks, 3);
  check_dtype("blocks", blocks, DType::kInt32);
  check_size("blocks", blocks, 0, kv_heads, "kv_heads");
  check_size("blocks", blocks, 1, query_rows, "the query rows");
  const std::int64_t topk = blocks.size(2);
  if (topk < 1 || topk > kMaxTopk) {
    fail("blocks", describe(blocks) + ": topk = " + text(topk) + " must be from 1 to " + text(kMaxTopk));
  }
  if (ids && reads_contents()) check_block_ids(blocks, batch, block_size);
}

void Validator::check_block_ids(const ConstTensorView& blocks, const Batch& batch, std::int64_t block_size) const {
  const std::int64_t kv_heads = blocks.size(0);
  const std::int64_t topk = blocks.size(2);
  const auto* data = reinterpret_cast<const std::int32_t*>(blocks.data);
  const std::int64_t sequences = batch.sequences();
  core::parallel_for(core::resolve_threads(context_.threads), sequences * kv_heads, [&](std::int64_t task, int) {
    const core::Sequence sequence = core::get_sequence(batch, task / kv_heads);
    const std::int64_t head = task % kv_heads;
    for (std::int64_t i = 0; i < sequence.queries; ++i) {
      const std::int64_t row = sequence.query_begin + i;
      const std::int32_t* slots = data + head * blocks.stride(0) + row * blocks.stride(1);
      const std::int64_t visible = core::query_position(batch, sequence, i) / block_size + 1;
      std::int64_t before = -1;
      bool ended = false;
      for (std::int64_t slot = 0; slot < topk; ++slot) {
        const std::int64_t id = slots[slot];
        const auto where = [&] {
          return "entry [" + text(head) + ", " + text(row) + ", " + text(slot) + "] is " + text(id);
        };
        if (id == -1) {
          ended = true;
          continue;
        }
        if (ended) fail("blocks", where() + " behind a -1; valid ids must be packed to the left");
        if (id < 0 || id >= visible) {
          fail("blocks", where() + "; this row sees the blocks 0 to " + text(visible - 1));
        }
        if (id <= before) fail("blocks", where() + " after " + text(before) + "; ids must be unique and ascending");
        before = id;
      }
    }
  });
}

double resolve_scale(const std::optional<double>& scale, std::int64_t dim) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(dim));
}

}  // namespace msa::ops
