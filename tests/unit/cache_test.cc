// SPDX-License-Identifier: Apache-2.0
// The paged cache: what is written is what is read, through append, crop, copy and free; index keys always with their
// keys; a full cache says so and keeps everything; and the operators read its pages as they read packed rows.
#include "src/cache/paged_cache.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "msa/attention.h"
#include "msa/error.h"
#include "msa/select_blocks.h"
#include "src/core/float_convert.h"

namespace msa::cache {
namespace {

constexpr std::int64_t kPage = 16;

CacheShape make_shape(DType dtype = DType::kFloat32, DType index_dtype = DType::kFloat32) {
  CacheShape shape;
  shape.page_size = kPage;
  shape.dtype = dtype;
  shape.index_dtype = index_dtype;
  shape.layers = {{2, 16, 32, 48}, {1, 16, 16, 0}, {3, 32, 16, 16}};  // the second has no index branch
  return shape;
}

// The row a token has: a different small integer for every token, layer, kind and column, exact in every dtype.
float row_value(int token, std::int64_t layer, int kind, std::int64_t column) {
  return static_cast<float>((token * 31 + static_cast<int>(layer) * 7 + kind * 3 + static_cast<int>(column)) % 251);
}

struct Rows {
  std::vector<std::byte> bytes;
  ConstTensorView view;
};

Rows make_rows(const std::vector<int>& tokens, std::int64_t layer, int kind, DType dtype, std::int64_t heads,
               std::int64_t dim) {
  Rows rows;
  const std::int64_t width = std::max<std::int64_t>(heads, 1) * dim;
  const auto count = static_cast<std::int64_t>(tokens.size());
  rows.bytes.resize(static_cast<std::size_t>(count * width) * dtype_size(dtype));
  for (std::int64_t i = 0; i < count * width; ++i) {
    core::store_element(rows.bytes.data(), dtype, i,
                        row_value(tokens[static_cast<std::size_t>(i / width)], layer, kind, i % width));
  }
  const void* data = rows.bytes.data();
  rows.view = heads > 0 ? make_view(data, dtype, {count, heads, dim}) : make_view(data, dtype, {count, dim});
  return rows;
}

void write_tokens(PagedCache& cache, SequenceId sequence, std::int64_t position, const std::vector<int>& tokens) {
  const CacheShape& shape = cache.shape();
  for (std::size_t i = 0; i < shape.layers.size(); ++i) {
    const LayerShape& dims = shape.layers[i];
    const auto layer = static_cast<std::int64_t>(i);
    const Rows k = make_rows(tokens, layer, 0, shape.dtype, dims.kv_heads, dims.head_dim);
    const Rows v = make_rows(tokens, layer, 1, shape.dtype, dims.kv_heads, dims.value_dim);
    const Rows k_idx = make_rows(tokens, layer, 2, shape.index_dtype, 0, dims.index_dim);
    cache.write(layer, sequence, position, k.view, v.view, dims.index_dim > 0 ? k_idx.view : ConstTensorView());
  }
}

void append_tokens(PagedCache& cache, SequenceId sequence, const std::vector<int>& tokens) {
  const std::int64_t position = cache.append(sequence, static_cast<std::int64_t>(tokens.size()));
  write_tokens(cache, sequence, position, tokens);
}

// Every row of every layer and kind, read through the page table as an operator would.
void expect_holds(const PagedCache& cache, SequenceId sequence, const std::vector<int>& tokens) {
  ASSERT_EQ(cache.length(sequence), static_cast<std::int64_t>(tokens.size()));
  const std::span<const std::int32_t> pages = cache.pages(sequence);
  ASSERT_EQ(static_cast<std::int64_t>(pages.size()), PagedCache::pages_for(cache.length(sequence), kPage));
  for (std::size_t i = 0; i < cache.shape().layers.size(); ++i) {
    const auto layer = static_cast<std::int64_t>(i);
    const std::array<ConstTensorView, 3> kinds = {cache.keys(layer), cache.values(layer), cache.index_keys(layer)};
    for (int kind = 0; kind < 3; ++kind) {
      const ConstTensorView& view = kinds[static_cast<std::size_t>(kind)];
      if (view.empty()) continue;
      const std::int64_t dim = view.size(view.rank - 1);
      const std::int64_t heads = view.rank == 4 ? view.size(2) : 1;
      for (std::size_t t = 0; t < tokens.size(); ++t) {
        const std::int64_t row =
            pages[t / kPage] * view.stride(0) + static_cast<std::int64_t>(t % kPage) * view.stride(1);
        for (std::int64_t column = 0; column < heads * dim; ++column) {
          const std::int64_t at = row + column / dim * (view.rank == 4 ? view.stride(2) : 0) + column % dim;
          ASSERT_EQ(core::load_element(view.data, view.dtype, at), row_value(tokens[t], layer, kind, column))
              << "layer " << layer << " kind " << kind << " token " << t << " column " << column;
        }
      }
    }
  }
}

std::vector<int> count_up(int count, int first = 0) {
  std::vector<int> tokens(static_cast<std::size_t>(count));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

std::vector<int> join(std::vector<int> a, const std::vector<int>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(PagedCache, AppendsAcrossPageBoundaries) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    PagedCache cache(make_shape(dtype), 8);
    const SequenceId sequence = cache.create_sequence();
    std::vector<int> all;
    for (const int count : {1, 14, 1, 1, 33, 0, 15}) {
      const std::vector<int> more = count_up(count, static_cast<int>(all.size()));
      append_tokens(cache, sequence, more);
      all = join(all, more);
      expect_holds(cache, sequence, all);
    }
  }
}

TEST(PagedCache, HoldsIndexKeysInTheirOwnType) {
  PagedCache cache(make_shape(DType::kBFloat16, DType::kFloat32), 4);
  const SequenceId sequence = cache.create_sequence();
  append_tokens(cache, sequence, count_up(20));
  EXPECT_EQ(cache.index_keys(0).dtype, DType::kFloat32);
  EXPECT_EQ(cache.keys(0).dtype, DType::kBFloat16);
  EXPECT_TRUE(cache.index_keys(1).empty());
  expect_holds(cache, sequence, count_up(20));
}

TEST(PagedCache, TakesStridedRows) {
  CacheShape shape;
  shape.page_size = 4;
  shape.layers = {{1, 2, 2, 0}};
  PagedCache cache(shape, 2);
  const SequenceId sequence = cache.create_sequence();
  cache.append(sequence, 5);
  std::vector<float> rows(5 * 7);
  std::iota(rows.begin(), rows.end(), 0.0F);
  TensorView k = make_view(rows.data(), {5, 1, 2});
  k.strides[0] = 7;
  cache.write(0, sequence, 0, k, k, {});
  for (std::int64_t t = 0; t < 5; ++t) {
    const std::int64_t row = cache.pages(sequence)[static_cast<std::size_t>(t / 4)] * 4 + t % 4;
    EXPECT_EQ(core::load_element(cache.keys(0).data, DType::kFloat32, row * 2 + 1), static_cast<float>(t * 7 + 1));
  }
}

TEST(PagedCache, KeepsAHeadsRowsOfAPageTogether) {
  const PagedCache cache({.page_size = 16, .layers = {{.kv_heads = 3, .head_dim = 8, .value_dim = 4}}}, 5);
  const ConstTensorView keys = cache.keys(0);
  EXPECT_EQ(keys.stride(0), 3 * 16 * 8);
  EXPECT_EQ(keys.stride(1), 8);
  EXPECT_EQ(keys.stride(2), 16 * 8);
  EXPECT_EQ(cache.values(0).stride(2), 16 * 4);
}

TEST(PagedCache, CropsAndAppendsAgain) {
  for (const int keep : {0, 1, 15, 16, 17, 32, 40}) {
    PagedCache cache(make_shape(), 4);
    const SequenceId sequence = cache.create_sequence();
    append_tokens(cache, sequence, count_up(40));
    cache.crop(sequence, keep);
    EXPECT_EQ(cache.free_pages(), 4 - PagedCache::pages_for(keep, kPage));
    expect_holds(cache, sequence, count_up(keep));
    append_tokens(cache, sequence, count_up(20, 500));  // other tokens than those dropped: nothing old shows through
    expect_holds(cache, sequence, join(count_up(keep), count_up(20, 500)));
  }
}

TEST(PagedCache, CopiesShareUntilOneAppends) {
  for (const int length : {1, 15, 16, 17, 31, 32}) {
    PagedCache cache(make_shape(), 8);
    const SequenceId first = cache.create_sequence();
    append_tokens(cache, first, count_up(length));
    const std::int64_t free_before = cache.free_pages();
    const SequenceId second = cache.copy_sequence(first);
    EXPECT_EQ(cache.free_pages(), free_before);
    append_tokens(cache, first, count_up(5, 100));
    append_tokens(cache, second, count_up(7, 200));
    expect_holds(cache, first, join(count_up(length), count_up(5, 100)));
    expect_holds(cache, second, join(count_up(length), count_up(7, 200)));
    cache.free_sequence(first);
    expect_holds(cache, second, join(count_up(length), count_up(7, 200)));
    cache.free_sequence(second);
    EXPECT_EQ(cache.free_pages(), 8);
  }
}

TEST(PagedCache, CropOfACopyLeavesTheOriginal) {
  PagedCache cache(make_shape(), 8);
  const SequenceId first = cache.create_sequence();
  append_tokens(cache, first, count_up(40));
  const SequenceId second = cache.copy_sequence(first);
  cache.crop(second, 20);  // in the middle of a shared page
  append_tokens(cache, second, count_up(30, 300));
  expect_holds(cache, first, count_up(40));
  expect_holds(cache, second, join(count_up(20), count_up(30, 300)));
}

TEST(PagedCache, RefusesToWriteRowsOfACopy) {
  PagedCache cache(make_shape(), 8);
  const SequenceId first = cache.create_sequence();
  append_tokens(cache, first, count_up(20));
  cache.copy_sequence(first);
  EXPECT_NE(message_of([&] { write_tokens(cache, first, 19, {7}); }).find("shared"), std::string::npos);
  expect_holds(cache, first, count_up(20));
}

TEST(PagedCache, FullCacheNamesPagesAndLosesNothing) {
  PagedCache cache(make_shape(), 3);
  const SequenceId first = cache.create_sequence();
  const SequenceId second = cache.create_sequence();
  append_tokens(cache, first, count_up(20));
  append_tokens(cache, second, count_up(16, 50));
  const std::string message = message_of([&] { cache.append(second, 18); });
  EXPECT_NE(message.find("wants 18 more (2 pages of 16), 0 of 3 pages are free"), std::string::npos) << message;
  expect_holds(cache, first, count_up(20));
  expect_holds(cache, second, count_up(16, 50));
  append_tokens(cache, first, count_up(12, 20));  // fits into its last page
  expect_holds(cache, first, count_up(32));
  // A copy of a partial page needs a page before it can grow.
  cache.crop(first, 17);
  cache.free_sequence(second);
  const SequenceId copy = cache.copy_sequence(first);
  append_tokens(cache, copy, {900});
  EXPECT_EQ(cache.free_pages(), 0);
  const SequenceId other = cache.copy_sequence(first);
  EXPECT_NE(message_of([&] { cache.append(other, 1); }).find("full"), std::string::npos);
  expect_holds(cache, other, count_up(17));
}

TEST(PagedCache, RefusesBadCalls) {
  PagedCache cache(make_shape(), 3);
  const SequenceId sequence = cache.create_sequence();
  append_tokens(cache, sequence, count_up(4));
  EXPECT_THROW(cache.crop(sequence, 5), Error);
  EXPECT_THROW(cache.crop(sequence, -1), Error);
  EXPECT_THROW(cache.append(sequence, -1), Error);
  EXPECT_THROW(cache.append(sequence, std::int64_t{1} << 40), Error);
  EXPECT_THROW(write_tokens(cache, sequence, 3, {1, 2}), Error);  // beyond what was appended
  EXPECT_THROW(write_tokens(cache, sequence, -1, {1}), Error);
  EXPECT_THROW(cache.length(7), Error);
  EXPECT_THROW(cache.length(-1), Error);
  EXPECT_THROW(cache.keys(3), Error);
  const Rows k = make_rows({1}, 0, 0, DType::kFloat32, 2, 16);
  const Rows v = make_rows({1}, 0, 1, DType::kFloat32, 2, 32);
  const Rows k_idx = make_rows({1}, 0, 2, DType::kFloat32, 0, 48);
  const Rows half = make_rows({1}, 0, 0, DType::kBFloat16, 2, 16);
  EXPECT_NE(message_of([&] { cache.write(0, sequence, 3, k.view, v.view, {}); }).find("k_idx"), std::string::npos);
  EXPECT_NE(message_of([&] { cache.write(0, sequence, 3, v.view, v.view, k_idx.view); }).find("k is float32[1, 2, 32]"),
            std::string::npos);
  EXPECT_THROW(cache.write(0, sequence, 3, half.view, v.view, k_idx.view), Error);
  const Rows k1 = make_rows({1}, 1, 0, DType::kFloat32, 1, 16);
  EXPECT_THROW(cache.write(1, sequence, 3, k1.view, k1.view, k_idx.view), Error);  // no index branch there
  cache.free_sequence(sequence);
  EXPECT_THROW(cache.length(sequence), Error);
  EXPECT_THROW(cache.free_sequence(sequence), Error);
  EXPECT_EQ(cache.length(cache.create_sequence()), 0);
}

TEST(PagedCache, BoundsItsMemory) {
  const CacheShape shape = make_shape();
  EXPECT_EQ(shape.bytes_per_token(), 4U * (2 * (16 + 32) + 48 + 16 + 16 + 3 * (32 + 16) + 16));
  EXPECT_EQ(PagedCache::pages_within(shape, 10 * shape.bytes_per_page() + 5), 10);
  EXPECT_THROW(PagedCache::pages_within(shape, shape.bytes_per_page() - 1), Error);
  EXPECT_THROW(PagedCache(shape, 0), Error);
  EXPECT_THROW(PagedCache(shape, std::int64_t{1} << 40), Error);
  CacheShape huge = shape;
  huge.layers.assign(2, {std::int64_t{1} << 30, std::int64_t{1} << 30, std::int64_t{1} << 30, 0});
  EXPECT_THROW(huge.bytes_per_token(), Error);
  CacheShape broken = shape;
  broken.layers[0].kv_heads = 0;
  EXPECT_THROW(PagedCache(broken, 1), Error);
  broken = shape;
  broken.dtype = DType::kInt32;
  EXPECT_THROW(PagedCache(broken, 1), Error);
}

TEST(PagedCache, PageTableOfSeveralSequences) {
  PagedCache cache(make_shape(), 8);
  const SequenceId first = cache.create_sequence();
  const SequenceId second = cache.create_sequence();
  const SequenceId empty = cache.create_sequence();
  append_tokens(cache, first, count_up(40));
  append_tokens(cache, second, count_up(3));
  const std::array<SequenceId, 3> order = {second, empty, first};
  const PageTable table = cache.page_table(order);
  EXPECT_EQ(table.max_pages, 3);
  EXPECT_EQ(table.seqlens, (std::vector<std::int32_t>{3, 0, 40}));
  ASSERT_EQ(table.pages.size(), 9U);
  EXPECT_EQ(table.pages[0], cache.pages(second)[0]);
  for (const std::size_t unused : {1U, 2U, 3U, 4U, 5U}) EXPECT_EQ(table.pages[unused], -1);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(table.pages[6 + i], cache.pages(first)[i]);
}

// Random calls against a model that keeps each sequence's tokens in a vector.
TEST(PagedCache, RandomHistoriesKeepEverySequence) {
  std::mt19937 random(5);
  const auto below = [&](std::size_t bound) { return static_cast<std::size_t>(random() % bound); };
  PagedCache cache(make_shape(), 12);
  std::map<SequenceId, std::vector<int>> expected;
  int next_token = 0, full = 0;
  for (int step = 0; step < 400; ++step) {
    if (expected.empty() || (below(8) == 0 && expected.size() < 5)) {
      expected[cache.create_sequence()] = {};
      continue;
    }
    const auto entry = std::next(expected.begin(), static_cast<std::ptrdiff_t>(below(expected.size())));
    auto& [sequence, tokens] = *entry;
    switch (below(6)) {
      case 0:
        if (expected.size() < 5) expected[cache.copy_sequence(sequence)] = std::vector<int>(tokens);
        break;
      case 1: {
        const std::size_t keep = below(tokens.size() + 1);
        cache.crop(sequence, static_cast<std::int64_t>(keep));
        tokens.resize(keep);
        break;
      }
      case 2:
        if (below(3) == 0) {
          cache.free_sequence(sequence);
          expected.erase(entry);
        }
        break;
      default: {
        const std::vector<int> more = count_up(static_cast<int>(below(40)), next_token);
        next_token += static_cast<int>(more.size());
        try {
          append_tokens(cache, sequence, more);
          tokens = join(tokens, more);
        } catch (const Error&) {
          ++full;
        }
      }
    }
    if (step % 10 == 0) {
      for (const auto& [id, held] : expected) expect_holds(cache, id, held);
    }
  }
  EXPECT_GT(full, 0);
  for (const auto& [id, held] : expected) {
    expect_holds(cache, id, held);
    cache.free_sequence(id);
  }
  EXPECT_EQ(cache.free_pages(), 12);
}

// The operators on the cache's pages equal the operators on packed rows bit for bit, also when a page holds two blocks.
TEST(PagedCache, OperatorsReadItsPages) {
  constexpr std::int64_t kBlock = 16, kHeads = 2, kDim = 16, kTopk = 2, kTokens = 77;
  std::mt19937 random(9);
  std::uniform_real_distribution<float> uniform(-1, 1);
  const auto fill = [&](std::int64_t count) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = uniform(random);
    return values;
  };
  std::vector<float> k = fill(kTokens * kHeads * kDim), v = fill(kTokens * kHeads * kDim);
  std::vector<float> k_idx = fill(kTokens * kDim), q_idx = fill(3 * kHeads * kDim), q = fill(3 * 4 * kDim);
  const std::array<std::int32_t, 2> bounds_q = {0, 3}, bounds_k = {0, kTokens};
  for (const std::int64_t page : {kBlock, 2 * kBlock}) {
    CacheShape shape;
    shape.page_size = page;
    shape.layers = {{kHeads, kDim, kDim, kDim}};
    PagedCache cache(shape, 10);
    const SequenceId other = cache.create_sequence(), sequence = cache.create_sequence();
    for (std::int64_t begin = 0; begin < kTokens; begin += 11) {  // interleaved, so that pages are out of order
      cache.append(other, 5);
      cache.append(sequence, 11);
      cache.write(0, sequence, begin,
                  make_view(&k[static_cast<std::size_t>(begin * kHeads * kDim)], {11, kHeads, kDim}),
                  make_view(&v[static_cast<std::size_t>(begin * kHeads * kDim)], {11, kHeads, kDim}),
                  make_view(&k_idx[static_cast<std::size_t>(begin * kDim)], {11, kDim}));
    }
    const std::array<SequenceId, 1> ids = {sequence};
    const PageTable table = cache.page_table(ids);
    const auto run = [&](const Batch& batch, const ConstTensorView& keys, const ConstTensorView& values,
                         const ConstTensorView& index_keys) {
      std::vector<std::int32_t> blocks(kHeads * 3 * kTopk);
      std::vector<float> out(3 * 4 * kDim), lse(3 * 4);
      SelectBlocksParams select;
      select.q_idx = make_view(q_idx.data(), {3, kHeads, kDim});
      select.k_idx = index_keys;
      select.batch = batch;
      select.block_size = kBlock;
      select.topk = kTopk;
      select_blocks({}, select, make_view(blocks.data(), {kHeads, 3, kTopk}));
      SparseAttentionParams attend;
      attend.q = make_view(q.data(), {3, 4, kDim});
      attend.k = keys;
      attend.v = values;
      attend.blocks = make_view(blocks.data(), {kHeads, 3, kTopk});
      attend.batch = batch;
      attend.block_size = kBlock;
      sparse_attention({}, attend, make_view(out.data(), {3, 4, kDim}), make_view(lse.data(), {3, 4}));
      return std::tuple(blocks, out, lse);
    };
    const auto paged = run(table.batch(bounds_q), cache.keys(0), cache.values(0), cache.index_keys(0));
    const auto packed = run(Batch::packed(bounds_q, bounds_k), make_view(k.data(), {kTokens, kHeads, kDim}),
                            make_view(v.data(), {kTokens, kHeads, kDim}), make_view(k_idx.data(), {kTokens, kDim}));
    EXPECT_EQ(paged, packed) << "page " << page;
  }
}

}  // namespace
}  // namespace msa::cache
