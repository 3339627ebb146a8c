// SPDX-License-Identifier: Apache-2.0
// Microbenchmarks for development: one thread, data in the caches, rates as counters. For what users see, and for
// figures that are compared with anything, there is `msa bench`.
//
//   cmake --preset release -DMSA_BUILD_MICROBENCH=ON && cmake --build build --target msa_microbench
//   MSA_ISA=avx2 build/bin/msa_microbench --benchmark_filter=topk
#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "bench/micro/kernels.h"
#include "msa/msa.h"
#include "src/core/buffer.h"
#include "src/core/float_convert.h"
#include "src/cpu/tile.h"

namespace msa::bench {
namespace {

using Floats = core::Buffer<float>;

Floats random_floats(std::int64_t count) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  Floats values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = normal(random);
  return values;
}

// A tensor of random values in a storage type.
class Storage {
 public:
  Storage(DType dtype, std::int64_t count)
      : dtype_(dtype), bytes_(static_cast<std::size_t>(count) * dtype_size(dtype)) {
    const Floats values = random_floats(count);
    for (std::int64_t i = 0; i < count; ++i) {
      core::store_element(bytes_.data(), dtype, i, values[static_cast<std::size_t>(i)]);
    }
  }
  TensorView view(std::initializer_list<std::int64_t> shape) { return make_view(bytes_.data(), dtype_, shape); }

 private:
  DType dtype_;
  core::Buffer<std::byte> bytes_;
};

void set_rate(benchmark::State& state, const char* name, double amount) {
  state.counters[name] =
      benchmark::Counter(amount, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::OneK::kIs1000);
}

Context one_thread() {
  Context context;
  context.threads = 1;
  return context;
}

void exp(benchmark::State& state) {
  const std::int64_t count = state.range(0);
  const Floats in = random_floats(count);
  Floats out(in.size());
  for (auto _ : state) {
    run_exp(in.data(), count, out.data());
    benchmark::ClobberMemory();
  }
  set_rate(state, "exp/s", static_cast<double>(count));
}
BENCHMARK(exp)->Arg(2048);

void softmax(benchmark::State& state) {
  const std::int64_t count = state.range(0);
  const Floats in = random_floats(count);
  Floats row(in.size());
  for (auto _ : state) {
    std::copy(in.data(), in.data() + count, row.data());
    benchmark::DoNotOptimize(run_softmax(row.data(), count, 0.1f));
  }
  set_rate(state, "scores/s", static_cast<double>(count));
}
BENCHMARK(softmax)->Arg(64)->Arg(128);

// rows, cols, inner: a score tile of each geometry, and its product with values.
void product(benchmark::State& state) {
  const std::int64_t rows = state.range(0), cols = state.range(1), inner = state.range(2);
  const Floats a = random_floats(rows * inner), b = random_floats(inner * cpu::padded_stride(cols));
  Floats c(static_cast<std::size_t>(rows * cpu::padded_stride(cols)));
  for (auto _ : state) {
    run_product(rows, cols, inner, a.data(), b.data(), c.data());
    benchmark::ClobberMemory();
  }
  set_rate(state, "FLOP/s", 2 * static_cast<double>(rows * cols * inner));
}
BENCHMARK(product)->Args({96, 128, 128})->Args({96, 64, 64})->Args({16, 128, 128})->Args({3, 64, 64});

void transpose(benchmark::State& state) {
  const std::int64_t rows = state.range(0), cols = state.range(1);
  const Floats in = random_floats(rows * cols);
  Floats out(static_cast<std::size_t>(cols * cpu::padded_stride(rows)));
  for (auto _ : state) {
    run_transpose(in.data(), rows, cols, out.data(), cpu::padded_stride(rows));
    benchmark::ClobberMemory();
  }
  set_rate(state, "floats/s", static_cast<double>(rows * cols));
}
BENCHMARK(transpose)->Args({128, 128})->Args({64, 64});

// blocks, topk.
void topk(benchmark::State& state) {
  constexpr std::int64_t kRows = 32;
  const std::int64_t blocks = state.range(0), topk = state.range(1);
  const Floats scores = random_floats(kRows * blocks);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(kRows * topk));
  const TopkBlocksParams params{.scores = make_view(scores.data(), {kRows, blocks}), .topk = topk};
  for (auto _ : state) topk_blocks(one_thread(), params, make_view(ids.data(), {kRows, topk}));
  set_rate(state, "rows/s", static_cast<double>(kRows));
}
BENCHMARK(topk)->Args({64, 16})->Args({256, 16})->Args({1024, 16})->Args({1024, 64})->Args({8192, 32});

// context, kv heads, index dimension, block size.
void select(benchmark::State& state) {
  constexpr std::int64_t kQueries = 64, kTopk = 16;
  const std::int64_t context = state.range(0), kv_heads = state.range(1), dim = state.range(2);
  Storage q_idx(DType::kBFloat16, kQueries * kv_heads * dim), k_idx(DType::kBFloat16, context * dim);
  const std::vector<std::int32_t> cu_q = {0, kQueries}, cu_k = {0, static_cast<std::int32_t>(context)};
  std::vector<std::int32_t> blocks(static_cast<std::size_t>(kv_heads * kQueries * kTopk));
  SelectBlocksParams params;
  params.q_idx = q_idx.view({kQueries, kv_heads, dim});
  params.k_idx = k_idx.view({context, dim});
  params.batch = Batch::packed(cu_q, cu_k);
  params.block_size = state.range(3);
  params.topk = kTopk;
  for (auto _ : state) select_blocks(one_thread(), params, make_view(blocks.data(), {kv_heads, kQueries, kTopk}));
  set_rate(state, "FLOP/s", 2 * static_cast<double>(kQueries * kv_heads * context * dim));
}
BENCHMARK(select)->Args({16384, 4, 128, 128})->Args({16384, 3, 64, 64})->Unit(benchmark::kMillisecond);

// query heads, kv heads, head dimension, block size.
void sparse(benchmark::State& state) {
  constexpr std::int64_t kQueries = 64, kTopk = 16, kContext = 16384;
  const std::int64_t heads = state.range(0), kv_heads = state.range(1), dim = state.range(2),
                     block_size = state.range(3);
  Storage q(DType::kBFloat16, kQueries * heads * dim), out(DType::kBFloat16, kQueries * heads * dim);
  Storage k(DType::kBFloat16, kContext * kv_heads * dim), v(DType::kBFloat16, kContext * kv_heads * dim);
  const std::vector<std::int32_t> cu_q = {0, kQueries}, cu_k = {0, kContext};
  std::vector<float> lse(static_cast<std::size_t>(kQueries * heads));
  // Each row takes kTopk neighbouring blocks from a place of its own.
  std::vector<std::int32_t> blocks;
  std::mt19937 random(2);
  for (std::int64_t row = 0; row < kv_heads * kQueries; ++row) {
    const auto first =
        static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(kContext / block_size - 2 * kTopk));
    for (std::int32_t i = 0; i < kTopk; ++i) blocks.push_back(first + i);
  }
  SparseAttentionParams params;
  params.q = q.view({kQueries, heads, dim});
  params.k = k.view({kContext, kv_heads, dim});
  params.v = v.view({kContext, kv_heads, dim});
  params.blocks = make_view(static_cast<const std::int32_t*>(blocks.data()), {kv_heads, kQueries, kTopk});
  params.batch = Batch::packed(cu_q, cu_k);
  params.block_size = block_size;
  for (auto _ : state) {
    sparse_attention(one_thread(), params, out.view({kQueries, heads, dim}), make_view(lse.data(), {kQueries, heads}));
  }
  set_rate(state, "FLOP/s", 4 * static_cast<double>(kQueries * heads * dim * kTopk * block_size));
}
BENCHMARK(sparse)->Args({64, 4, 128, 128})->Args({9, 3, 64, 64})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace msa::bench
