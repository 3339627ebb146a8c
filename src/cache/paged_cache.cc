// SPDX-License-Identifier: Apache-2.0
// The paged cache: page accounting first, then the rows. Tested in tests/unit/cache_test.cc.
#include "src/cache/paged_cache.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "msa/error.h"
#include "src/core/float_convert.h"

namespace msa::cache {
namespace {

// Page ids and positions are int32 in the operators.
constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();

std::size_t multiply(std::size_t a, std::size_t b) {
  if (a != 0 && b > std::numeric_limits<std::size_t>::max() / a) throw Error("cache shape: its size overflows");
  return a * b;
}

void check_shape(const CacheShape& shape) {
  if (shape.page_size < 1 || shape.page_size > kMaxTokens) {
    throw Error("cache shape: page_size is " + std::to_string(shape.page_size) + "; it must be at least 1");
  }
  if (shape.dtype == DType::kInt32 || shape.index_dtype == DType::kInt32) {
    throw Error("cache shape: dtype int32; keys and values are float32, bfloat16, float16 or float8_e4m3");
  }
  for (std::size_t i = 0; i < shape.layers.size(); ++i) {
    const LayerShape& layer = shape.layers[i];
    const auto out_of_range = [](std::int64_t dim, std::int64_t low) { return dim < low || dim > kMaxTokens; };
    if (out_of_range(layer.kv_heads, 1) || out_of_range(layer.head_dim, 1) || out_of_range(layer.value_dim, 1) ||
        out_of_range(layer.index_dim, 0)) {
      throw Error("cache shape: layer " + std::to_string(i) + " has kv_heads " + std::to_string(layer.kv_heads) +
                  ", head_dim " + std::to_string(layer.head_dim) + ", value_dim " + std::to_string(layer.value_dim) +
                  ", index_dim " + std::to_string(layer.index_dim) + "; all but index_dim must be at least 1");
    }
  }
}

struct RowBytes {
  std::size_t k, v, k_idx;
};

RowBytes row_bytes(const CacheShape& shape, const LayerShape& layer) {
  const std::size_t heads = multiply(static_cast<std::size_t>(layer.kv_heads), dtype_size(shape.dtype));
  return {multiply(heads, static_cast<std::size_t>(layer.head_dim)),
          multiply(heads, static_cast<std::size_t>(layer.value_dim)),
          multiply(static_cast<std::size_t>(layer.index_dim), dtype_size(shape.index_dtype))};
}

void check_rows(const char* name, const ConstTensorView& view, DType dtype, std::initializer_list<std::int64_t> shape) {
  const bool rounds = dtype == DType::kFloat8E4M3 && view.dtype != DType::kInt32;
  bool good = (view.dtype == dtype || rounds) && view.rank == static_cast<int>(shape.size()) &&
              std::equal(shape.begin(), shape.end(), view.shape.begin());
  // Rows are copied whole, so everything behind the first dimension must be contiguous.
  std::int64_t stride = 1;
  for (int d = view.rank - 1; good && d > 0; --d) {
    good = view.stride(d) == stride || view.size(d) == 1;
    stride *= view.size(d);
  }
  if (good && (view.data != nullptr || view.elements() == 0)) return;
  std::string wanted = dtype_name(dtype);
  wanted += "[";
  for (const std::int64_t extent : shape) wanted += (wanted.back() == '[' ? "" : ", ") + std::to_string(extent);
  throw Error(std::string("cache write: ") + name + " is " + describe(view) + "; expected " + wanted +
              "] with contiguous rows");
}

}  // namespace

std::size_t CacheShape::bytes_per_token() const {
  check_shape(*this);
  std::size_t bytes = 0;
  for (const LayerShape& layer : layers) {
    const RowBytes row = row_bytes(*this, layer);
    for (const std::size_t part : {row.k, row.v, row.k_idx}) {
      if (part > std::numeric_limits<std::size_t>::max() - bytes) throw Error("cache shape: its size overflows");
      bytes += part;
    }
  }
  return bytes;
}

PagedCache::PagedCache(CacheShape shape, std::int64_t max_pages) : shape_(std::move(shape)), max_pages_(max_pages) {
  const std::size_t token_bytes = shape_.bytes_per_token();
  if (max_pages < 1 || max_pages > kMaxTokens / shape_.page_size) {
    throw Error("cache: max_pages is " + std::to_string(max_pages) + " of " + std::to_string(shape_.page_size) +
                " tokens; it must be at least 1 and hold less than 2^31 tokens in all");
  }
  const std::size_t rows = static_cast<std::size_t>(max_pages * shape_.page_size);
  multiply(rows, token_bytes);
  const auto reserve = [rows](std::int64_t heads, std::int64_t dim, DType dtype) {
    const std::size_t bytes = static_cast<std::size_t>(dim) * dtype_size(dtype);
    return Store{core::Buffer<std::byte>(rows * static_cast<std::size_t>(heads) * bytes), heads, dim, bytes};
  };
  layers_.reserve(shape_.layers.size());
  for (const LayerShape& layer : shape_.layers) {
    layers_.push_back({reserve(layer.kv_heads, layer.head_dim, shape_.dtype),
                       reserve(layer.kv_heads, layer.value_dim, shape_.dtype),
                       reserve(1, layer.index_dim, shape_.index_dtype)});
  }
  references_.assign(static_cast<std::size_t>(max_pages), 0);
  free_.reserve(static_cast<std::size_t>(max_pages));
  for (std::int64_t page = max_pages - 1; page >= 0; --page) free_.push_back(static_cast<std::int32_t>(page));
}

std::int64_t PagedCache::pages_within(const CacheShape& shape, std::size_t bytes) {
  const std::size_t page_bytes = multiply(shape.bytes_per_token(), static_cast<std::size_t>(shape.page_size));
  const std::size_t pages = page_bytes == 0 ? 0 : bytes / page_bytes;
  if (pages == 0) {
    throw Error("cache: " + std::to_string(bytes) + " bytes do not hold one page of " + std::to_string(page_bytes) +
                " bytes");
  }
  return static_cast<std::int64_t>(
      std::min<std::size_t>(pages, static_cast<std::size_t>(kMaxTokens / shape.page_size)));
}

SequenceId PagedCache::create_sequence() {
  const auto slot = std::find_if(sequences_.begin(), sequences_.end(), [](const Sequence& s) { return !s.alive; });
  const auto id = static_cast<SequenceId>(slot - sequences_.begin());
  if (slot == sequences_.end()) sequences_.emplace_back();
  sequences_[static_cast<std::size_t>(id)].alive = true;
  return id;
}

SequenceId PagedCache::copy_sequence(SequenceId sequence) {
  find(sequence);
  const SequenceId id = create_sequence();  // may move sequences_, so the source is looked up again
  const Sequence& source = find(sequence);
  Sequence& copy = find(id);
  copy.pages = source.pages;
  copy.length = source.length;
  for (const std::int32_t page : copy.pages) ++references_[static_cast<std::size_t>(page)];
  return id;
}

void PagedCache::free_sequence(SequenceId sequence) {
  crop(sequence, 0);
  find(sequence).alive = false;
}

std::int64_t PagedCache::append(SequenceId sequence, std::int64_t tokens) {
  Sequence& target = find(sequence);
  const std::int64_t begin = target.length;
  if (tokens < 0 || tokens > kMaxTokens - begin) {
    throw Error("cache append: " + std::to_string(tokens) + " tokens to a sequence of " + std::to_string(begin) +
                "; the sum must lie in [0, 2^31)");
  }
  if (tokens == 0) return begin;
  const std::int64_t partial = begin % shape_.page_size;  // rows in use of the last page
  const bool copies_last = partial != 0 && references_[static_cast<std::size_t>(target.pages.back())] > 1;
  const std::int64_t fresh =
      pages_for(begin + tokens, shape_.page_size) - static_cast<std::int64_t>(target.pages.size());
  const std::int64_t wanted = fresh + (copies_last ? 1 : 0);
  if (wanted > free_pages()) {
    throw Error("cache is full: sequence " + std::to_string(sequence) + " of " + std::to_string(begin) +
                " tokens wants " + std::to_string(tokens) + " more (" + std::to_string(wanted) + " pages of " +
                std::to_string(shape_.page_size) + "), " + std::to_string(free_pages()) + " of " +
                std::to_string(max_pages_) + " pages are free");
  }
  target.pages.reserve(target.pages.size() + static_cast<std::size_t>(fresh));  // the last thing that may throw
  const auto take = [this] {
    const std::int32_t page = free_.back();
    free_.pop_back();
    references_[static_cast<std::size_t>(page)] = 1;
    return page;
  };
  if (copies_last) {
    const std::int32_t page = take();
    copy_rows(target.pages.back(), page, partial);
    release(target.pages.back());
    target.pages.back() = page;
  }
  for (std::int64_t i = 0; i < fresh; ++i) target.pages.push_back(take());
  target.length = begin + tokens;
  return begin;
}

void PagedCache::crop(SequenceId sequence, std::int64_t length) {
  Sequence& target = find(sequence);
  if (length < 0 || length > target.length) {
    throw Error("cache crop: sequence " + std::to_string(sequence) + " has " + std::to_string(target.length) +
                " tokens and cannot be cropped to " + std::to_string(length));
  }
  const auto keep = static_cast<std::size_t>(pages_for(length, shape_.page_size));
  while (target.pages.size() > keep) {
    release(target.pages.back());
    target.pages.pop_back();
  }
  target.length = length;
}

void PagedCache::write(std::int64_t layer, SequenceId sequence, std::int64_t position, const ConstTensorView& k,
                       const ConstTensorView& v, const ConstTensorView& k_idx) {
  const LayerShape& dims = layer_shape(layer);
  const Sequence& target = find(sequence);
  if (k.rank < 1) throw Error("cache write: k is empty");
  const std::int64_t rows = k.size(0);
  check_rows("k", k, shape_.dtype, {rows, dims.kv_heads, dims.head_dim});
  check_rows("v", v, shape_.dtype, {rows, dims.kv_heads, dims.value_dim});
  if (dims.index_dim > 0) {
    check_rows("k_idx", k_idx, shape_.index_dtype, {rows, dims.index_dim});
  } else if (!k_idx.empty()) {
    throw Error("cache write: k_idx is " + describe(k_idx) + ", but layer " + std::to_string(layer) +
                " has no index branch");
  }
  if (position < 0 || rows > target.length - position) {
    throw Error("cache write: rows [" + std::to_string(position) + ", " + std::to_string(position + rows) +
                ") of sequence " + std::to_string(sequence) + ", which has " + std::to_string(target.length) +
                "; append them first");
  }
  if (rows == 0) return;
  for (std::int64_t page = position / shape_.page_size; page <= (position + rows - 1) / shape_.page_size; ++page) {
    if (references_[static_cast<std::size_t>(target.pages[static_cast<std::size_t>(page)])] > 1) {
      throw Error("cache write: position " + std::to_string(std::max(position, page * shape_.page_size)) +
                  " of sequence " + std::to_string(sequence) +
                  " is shared with a copy; only appended rows are written");
    }
  }
  Layer& stores = layers_[static_cast<std::size_t>(layer)];
  write_rows(stores.k, shape_.dtype, target, position, k);
  write_rows(stores.v, shape_.dtype, target, position, v);
  if (dims.index_dim > 0) write_rows(stores.k_idx, shape_.index_dtype, target, position, k_idx);
}

ConstTensorView PagedCache::view_of(const Store& store, DType dtype) const {
  ConstTensorView view = make_view(static_cast<const void*>(store.data.data()), dtype,
                                   {max_pages_, shape_.page_size, store.heads, store.dim});
  view.strides[1] = store.dim;
  view.strides[2] = shape_.page_size * store.dim;
  return view;
}

ConstTensorView PagedCache::keys(std::int64_t layer) const {
  layer_shape(layer);
  return view_of(layers_[static_cast<std::size_t>(layer)].k, shape_.dtype);
}

ConstTensorView PagedCache::values(std::int64_t layer) const {
  layer_shape(layer);
  return view_of(layers_[static_cast<std::size_t>(layer)].v, shape_.dtype);
}

ConstTensorView PagedCache::index_keys(std::int64_t layer) const {
  const LayerShape& dims = layer_shape(layer);
  if (dims.index_dim == 0) return {};
  const void* data = layers_[static_cast<std::size_t>(layer)].k_idx.data.data();
  return make_view(data, shape_.index_dtype, {max_pages_, shape_.page_size, dims.index_dim});
}

PageTable PagedCache::page_table(std::span<const SequenceId> sequences) const {
  PageTable table;
  for (const SequenceId id : sequences) {
    table.max_pages = std::max(table.max_pages, static_cast<std::int64_t>(find(id).pages.size()));
  }
  table.pages.assign(sequences.size() * static_cast<std::size_t>(table.max_pages), -1);
  table.seqlens.reserve(sequences.size());
  auto row = table.pages.begin();
  for (const SequenceId id : sequences) {
    const Sequence& sequence = find(id);
    std::copy(sequence.pages.begin(), sequence.pages.end(), row);
    row += table.max_pages;
    table.seqlens.push_back(static_cast<std::int32_t>(sequence.length));
  }
  return table;
}

const PagedCache::Sequence& PagedCache::find(SequenceId sequence) const {
  if (sequence < 0 || sequence >= static_cast<SequenceId>(sequences_.size()) ||
      !sequences_[static_cast<std::size_t>(sequence)].alive) {
    throw Error("cache: there is no sequence " + std::to_string(sequence));
  }
  return sequences_[static_cast<std::size_t>(sequence)];
}

PagedCache::Sequence& PagedCache::find(SequenceId sequence) {
  return const_cast<Sequence&>(std::as_const(*this).find(sequence));
}

const LayerShape& PagedCache::layer_shape(std::int64_t layer) const {
  if (layer < 0 || layer >= static_cast<std::int64_t>(shape_.layers.size())) {
    throw Error("cache: layer " + std::to_string(layer) + " of " + std::to_string(shape_.layers.size()));
  }
  return shape_.layers[static_cast<std::size_t>(layer)];
}

std::byte* PagedCache::row_of(Store& store, std::int32_t page, std::int64_t head, std::int64_t offset) const {
  const std::int64_t row = (page * store.heads + head) * shape_.page_size + offset;
  return store.data.data() + static_cast<std::size_t>(row) * store.row_bytes;
}

void PagedCache::copy_rows(std::int32_t from_page, std::int32_t to_page, std::int64_t rows) {
  for (Layer& layer : layers_) {
    for (Store* store : {&layer.k, &layer.v, &layer.k_idx}) {
      if (store->row_bytes == 0) continue;
      for (std::int64_t head = 0; head < store->heads; ++head) {
        std::memcpy(row_of(*store, to_page, head, 0), row_of(*store, from_page, head, 0),
                    static_cast<std::size_t>(rows) * store->row_bytes);
      }
    }
  }
}

void PagedCache::release(std::int32_t page) {
  if (--references_[static_cast<std::size_t>(page)] == 0) free_.push_back(page);
}

void PagedCache::write_rows(Store& store, DType dtype, const Sequence& sequence, std::int64_t position,
                            const ConstTensorView& rows) {
  const auto element_bytes = static_cast<std::int64_t>(dtype_size(rows.dtype));
  const std::int64_t head_bytes = store.dim * element_bytes;
  const bool rounds = rows.dtype != dtype;
  for (std::int64_t i = 0; i < rows.size(0); ++i) {
    const std::int32_t page = sequence.pages[static_cast<std::size_t>((position + i) / shape_.page_size)];
    const std::byte* source = rows.data + i * rows.stride(0) * element_bytes;
    for (std::int64_t head = 0; head < store.heads; ++head, source += head_bytes) {
      std::byte* target = row_of(store, page, head, (position + i) % shape_.page_size);
      if (!rounds) {
        std::memcpy(target, source, store.row_bytes);
        continue;
      }
      for (std::int64_t e = 0; e < store.dim; ++e) {
        core::store_element(target, dtype, e, core::load_element(source, rows.dtype, e));
      }
    }
  }
}

}  // namespace msa::cache
