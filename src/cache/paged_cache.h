// SPDX-License-Identifier: Apache-2.0
// The paged cache: keys, values and index keys of every layer for several sequences, in pages of a fixed number of
// tokens. One page id stands for the same tokens in all layers and in all three kinds of tensor, so whatever moves a
// sequence (copy, crop, free) moves its index keys with it. Pages are counted references: copying a sequence costs
// nothing until one of the copies writes. Tested in tests/unit/cache_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "msa/batch.h"
#include "msa/tensor.h"
#include "src/core/buffer.h"

namespace msa::cache {

/// Rows of one layer's cache. A layer without an index branch has index_dim 0.
struct LayerShape {
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  std::int64_t index_dim = 0;
};

struct CacheShape {
  std::int64_t page_size = 128;         ///< tokens a page; a multiple of every layer's block size
  DType dtype = DType::kFloat32;        ///< of keys and values; float8_e4m3 takes half of bf16's memory
  DType index_dtype = DType::kFloat32;  ///< of index keys; float8_e4m3 too
  std::vector<LayerShape> layers;

  /// Bytes one token takes over all layers. Throws msa::Error on dimensions below 0 (or, other than index_dim, 0), on a
  /// dtype that is no float, or when the product overflows.
  std::size_t bytes_per_token() const;
  std::size_t bytes_per_page() const { return bytes_per_token() * static_cast<std::size_t>(page_size); }
};

/// Name of a sequence in one cache.
using SequenceId = std::int64_t;

/// Key-side half of a paged Batch for some sequences; owns its arrays.
struct PageTable {
  std::vector<std::int32_t> pages;    ///< [B, max_pages], unused entries -1
  std::vector<std::int32_t> seqlens;  ///< [B]
  std::int64_t max_pages = 0;

  /// A view of this table with the caller's cu_seqlens_q; valid while both live.
  Batch batch(std::span<const std::int32_t> cu_seqlens_q) const {
    return Batch::paged(cu_seqlens_q, pages, max_pages, seqlens);
  }
};

/// Memory is reserved once, in the constructor, for `max_pages` pages, and never grows: the operators take one base
/// pointer a layer, and a cache that cannot move needs no copy. The system backs an address with memory when a page is
/// first written, so a large cache that is little used costs little. Not thread safe: one caller at a time.
class PagedCache {
 public:
  /// Throws msa::Error when the shape is invalid, max_pages < 1, or memory cannot be reserved.
  PagedCache(CacheShape shape, std::int64_t max_pages);
  /// How many pages of `shape` fit into `bytes`; throws msa::Error when none does.
  static std::int64_t pages_within(const CacheShape& shape, std::size_t bytes);
  /// Pages that hold `tokens` tokens of one sequence.
  static std::int64_t pages_for(std::int64_t tokens, std::int64_t page_size) {
    return (tokens + page_size - 1) / page_size;
  }

  PagedCache(PagedCache&&) noexcept = default;
  PagedCache& operator=(PagedCache&&) noexcept = default;
  PagedCache(const PagedCache&) = delete;
  PagedCache& operator=(const PagedCache&) = delete;

  const CacheShape& shape() const { return shape_; }
  std::int64_t max_pages() const { return max_pages_; }
  std::int64_t free_pages() const { return static_cast<std::int64_t>(free_.size()); }

  /// A new, empty sequence. Takes no page.
  SequenceId create_sequence();
  /// A new sequence with the tokens of `sequence`. Takes no page: both read the same ones until either appends.
  SequenceId copy_sequence(SequenceId sequence);
  /// Ends a sequence and returns the pages that no other one reads. Its id may be given to a later sequence.
  void free_sequence(SequenceId sequence);
  std::int64_t length(SequenceId sequence) const { return find(sequence).length; }

  /// Makes `sequence` longer by `tokens` and returns its length before; the new rows are the caller's to write, in
  /// every layer. When the last page is shared with another sequence, its rows are copied first (all layers, index keys
  /// too). Throws msa::Error, naming the pages wanted and free, and changes nothing when the cache is full. O(tokens /
  /// page_size).
  std::int64_t append(SequenceId sequence, std::int64_t tokens);
  /// Drops all tokens but the first `length` (rollback), and returns the pages that fall free. Throws msa::Error when
  /// the sequence is shorter.
  void crop(SequenceId sequence, std::int64_t length);

  /// Writes rows [position, position + n) of one layer: k [n, kv_heads, head_dim], v [n, kv_heads, value_dim] in the
  /// cache's dtype, k_idx [n, index_dim] in its index dtype (empty for a layer without an index branch). A float8 cache
  /// takes rows of any float type and rounds them, what is beyond 448 to 448. Throws msa::Error on another shape or
  /// dtype, and on rows that were not appended or that another sequence shares.
  void write(std::int64_t layer, SequenceId sequence, std::int64_t position, const ConstTensorView& k,
             const ConstTensorView& v, const ConstTensorView& k_idx);

  /// All pages of a layer, for the paged operators: [max_pages, page_size, kv_heads, head_dim] and so on, strided: a
  /// head's rows of a page follow each other. index_keys of a layer without an index branch is an empty view.
  ConstTensorView keys(std::int64_t layer) const;
  ConstTensorView values(std::int64_t layer) const;
  ConstTensorView index_keys(std::int64_t layer) const;

  /// Page ids of a sequence, in order. Valid until the sequence changes.
  std::span<const std::int32_t> pages(SequenceId sequence) const { return find(sequence).pages; }
  PageTable page_table(std::span<const SequenceId> sequences) const;

 private:
  struct Sequence {
    std::vector<std::int32_t> pages;
    std::int64_t length = 0;
    bool alive = false;
  };
  /// One kind of rows of one layer: pages [max_pages, heads, page_size, row_bytes], back to back. A head's part of a
  /// page is one run of memory, which attention reads whole: in 4 heads of 128 bf16 dimensions, 32 KiB from 8 pages of
  /// memory in place of 128 runs of 256 bytes from 32 (docs/cache.md).
  struct Store {
    core::Buffer<std::byte> data;
    std::int64_t heads = 0;
    std::int64_t dim = 0;
    std::size_t row_bytes = 0;  ///< of a token and head
  };
  struct Layer {
    Store k, v, k_idx;
  };

  const Sequence& find(SequenceId sequence) const;
  Sequence& find(SequenceId sequence);
  const LayerShape& layer_shape(std::int64_t layer) const;
  void copy_rows(std::int32_t from_page, std::int32_t to_page, std::int64_t rows);
  void release(std::int32_t page);
  std::byte* row_of(Store& store, std::int32_t page, std::int64_t head, std::int64_t offset) const;
  ConstTensorView view_of(const Store& store, DType dtype) const;
  void write_rows(Store& store, DType dtype, const Sequence& sequence, std::int64_t position,
                  const ConstTensorView& rows);

  CacheShape shape_;
  std::int64_t max_pages_ = 0;
  std::vector<Layer> layers_;
  std::vector<std::int32_t> free_;        // a stack: the page freed last is used first, its memory being warm
  std::vector<std::int32_t> references_;  // sequences that read a page
  std::vector<Sequence> sequences_;
};

}  // namespace msa::cache
