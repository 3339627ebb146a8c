// SPDX-License-Identifier: Apache-2.0
// The order of loops in sparse attention, as a ladder: the same kernel with chunks from one query (queries outermost:
// every query prepares its own blocks) to all of them (blocks outermost: a block is prepared once for all that chose
// it). The results are equal bit for bit; only the time differs. Usage: loop_order [context] [queries]
// [float32|bfloat16]
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "msa/msa.h"
#include "src/core/float_convert.h"
#include "src/core/threads.h"
#include "src/cpu/bf16_dot.h"
#include "src/cpu/plan.h"

namespace {

constexpr std::int64_t kQueryHeads = 64, kKvHeads = 4, kDim = 128, kBlock = 128, kTopk = 16;
constexpr int kRepeats = 5;

std::vector<std::byte> random_tensor(std::int64_t elements, msa::DType dtype, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<std::byte> data(static_cast<std::size_t>(elements) * msa::dtype_size(dtype));
  for (std::int64_t i = 0; i < elements; ++i) msa::core::store_element(data.data(), dtype, i, normal(random));
  return data;
}

// Independent random selections with the local block.
std::vector<std::int32_t> random_blocks(std::int64_t context, std::int64_t queries, std::mt19937& random) {
  std::vector<std::int32_t> blocks, ids;
  for (std::int64_t row = 0; row < kKvHeads * queries; ++row) {
    const std::int64_t local = (context - queries + row % queries) / kBlock;
    ids.resize(static_cast<std::size_t>(local));
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random);
    ids.resize(kTopk - 1);
    ids.push_back(static_cast<std::int32_t>(local));
    std::sort(ids.begin(), ids.end());
    blocks.insert(blocks.end(), ids.begin(), ids.end());
  }
  return blocks;
}

}  // namespace

int main(int argc, char** argv) {
  const std::int64_t context = argc > 1 ? std::atoll(argv[1]) : 32768;
  const std::int64_t queries = argc > 2 ? std::atoll(argv[2]) : 512;
  const msa::DType dtype = argc > 3 && std::string(argv[3]) == "float32" ? msa::DType::kFloat32 : msa::DType::kBFloat16;
  if (context - queries < kTopk * kBlock || queries < 1) {
    std::fprintf(stderr, "the context must hold %lld tokens before the queries\n",
                 static_cast<long long>(kTopk * kBlock));
    return 2;
  }
  std::mt19937 random(1);
  const auto q = random_tensor(queries * kQueryHeads * kDim, dtype, random);
  const auto k = random_tensor(context * kKvHeads * kDim, dtype, random);
  const auto v = random_tensor(context * kKvHeads * kDim, dtype, random);
  const auto blocks = random_blocks(context, queries, random);
  std::vector<std::byte> out(q.size());
  std::vector<float> lse(static_cast<std::size_t>(queries * kQueryHeads));
  const std::vector<std::int32_t> cu_q = {0, static_cast<std::int32_t>(queries)};
  const std::vector<std::int32_t> cu_k = {0, static_cast<std::int32_t>(context)};

  msa::SparseAttentionParams params;
  params.q = msa::make_view(static_cast<const void*>(q.data()), dtype, {queries, kQueryHeads, kDim});
  params.k = msa::make_view(static_cast<const void*>(k.data()), dtype, {context, kKvHeads, kDim});
  params.v = msa::make_view(static_cast<const void*>(v.data()), dtype, {context, kKvHeads, kDim});
  params.blocks = msa::make_view(blocks.data(), {kKvHeads, queries, kTopk});
  params.batch = msa::Batch::packed(cu_q, cu_k);
  params.block_size = kBlock;

  const std::string instruction_set = msa::active_instruction_set();
  msa::cpu::AttentionShape shape;
  shape.queries = {queries, queries};
  shape.kv_heads = kKvHeads;
  shape.group_size = kQueryHeads / kKvHeads;
  shape.head_dim = shape.value_dim = kDim;
  shape.block_size = kBlock;
  shape.topk = kTopk;
  shape.has_bf16_dots = dtype == msa::DType::kBFloat16 && msa::cpu::active_bf16_kernel() != nullptr;
  shape.has_tiles = shape.has_bf16_dots && msa::cpu::active_dot_products() == msa::cpu::DotProducts::kAmx;
  const int threads = msa::core::resolve_threads(0);
  std::printf("%lld queries on %lld keys, %s, %s, %d threads\n%8s %14s %10s %10s\n", static_cast<long long>(queries),
              static_cast<long long>(context), msa::dtype_name(dtype), instruction_set.c_str(), threads, "chunk",
              "workspace MiB", "ms", "GFLOP/s");
  const double flops = 4.0 * static_cast<double>(queries * kQueryHeads * kDim * kTopk * kBlock);
  for (std::int64_t chunk = 1; chunk <= queries; chunk *= 2) {
    // A limit that this chunk just meets makes the plan take it.
    const auto bytes = static_cast<std::size_t>(msa::cpu::lay_out_attention(shape, chunk).end) * sizeof(float) *
                       static_cast<std::size_t>(threads);
    msa::Context run;
    run.workspace_limit = bytes;
    const msa::cpu::ChunkPlan plan = msa::cpu::plan_attention("loop_order", shape, threads, bytes);
    if (plan.chunk != chunk) continue;  // larger than what the library would take
    std::vector<double> seconds;
    for (int i = 0; i < kRepeats; ++i) {
      const auto start = std::chrono::steady_clock::now();
      msa::sparse_attention(run, params,
                            msa::make_view(static_cast<void*>(out.data()), dtype, {queries, kQueryHeads, kDim}),
                            msa::make_view(lse.data(), {queries, kQueryHeads}));
      seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::nth_element(seconds.begin(), seconds.begin() + kRepeats / 2, seconds.end());
    std::printf("%8lld %14.1f %10.1f %10.0f\n", static_cast<long long>(chunk), static_cast<double>(bytes) / (1 << 20),
                seconds[kRepeats / 2] * 1e3, flops / seconds[kRepeats / 2] * 1e-9);
  }
  return 0;
}
