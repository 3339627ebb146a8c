// SPDX-License-Identifier: Apache-2.0
// See op_bench.h. Peer: at::scaled_dot_product_attention, the fastest of the ways to ask it for the same rows (with the causal
// mask, and without any mask, which is a little more work on paper but often faster); kv heads are batch entries and the
// group's heads share keys by a stride of 0, so that nothing is copied for it.
#include "bench/op_bench.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/version.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <random>

#include "bench/peaks.h"
#include "msa/error.h"
#include "msa/msa.h"
#include "src/core/threads.h"

namespace msa::bench {
namespace {

DType view_dtype(at::ScalarType type) {
  if (type == at::kFloat) return DType::kFloat32;
  return type == at::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

TensorView view(const at::Tensor& tensor) {
  TensorView result;
  result.data = static_cast<std::byte*>(tensor.data_ptr());
  result.dtype = tensor.scalar_type() == at::kInt ? DType::kInt32 : view_dtype(tensor.scalar_type());
  result.rank = static_cast<int>(tensor.dim());
  for (int d = 0; d < result.rank; ++d) {
    result.shape[static_cast<std::size_t>(d)] = tensor.size(d);
    result.strides[static_cast<std::size_t>(d)] = tensor.stride(d);
  }
  return result;
}

double median_seconds(int repeats, const std::function<void()>& body) {
  body();  // warm-up
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    body();
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[static_cast<std::size_t>(repeats / 2)];
}

// Independent random selections, the local block among them: the hardest case for locality.
at::Tensor random_blocks(const OpBenchOptions& o, std::int64_t context, std::int64_t queries) {
  at::Tensor blocks = at::full({o.kv_heads, queries, o.topk}, -1, at::kInt);
  auto* data = blocks.data_ptr<std::int32_t>();
  std::mt19937 random(7);
  std::vector<std::int32_t> ids;
  for (std::int64_t h = 0; h < o.kv_heads; ++h) {
    for (std::int64_t i = 0; i < queries; ++i) {
      const std::int64_t local = (context - queries + i) / o.block_size;
      ids.resize(static_cast<std::size_t>(local));
      std::iota(ids.begin(), ids.end(), 0);
      const auto others = std::min<std::int64_t>(o.topk - 1, local);
      for (std::int64_t j = 0; j < others; ++j) {
        const auto pick = j + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(local - j));
        std::swap(ids[static_cast<std::size_t>(j)], ids[static_cast<std::size_t>(pick)]);
      }
      ids.resize(static_cast<std::size_t>(others));
      ids.push_back(static_cast<std::int32_t>(local));
      std::sort(ids.begin(), ids.end());
      std::copy(ids.begin(), ids.end(), data + (h * queries + i) * o.topk);
    }
  }
  return blocks;
}

// Score entries (query, key) of one head: the whole prefix, or the selected blocks only.
double dense_pairs(std::int64_t context, std::int64_t queries) {
  const auto n = static_cast<double>(queries);
  return n * static_cast<double>(context - queries) + n * (n + 1) / 2;
}

class ShapeBench {
 public:
  ShapeBench(const OpBenchOptions& o, std::int64_t context, std::int64_t queries, OpBenchResult& result,
             const std::function<void(const std::string&)>& progress)
      : o_(o), context_(context), queries_(queries), result_(result), progress_(progress) {
    run_.threads = result.threads;
    const at::ScalarType type = o.dtype == "float32" ? at::kFloat : o.dtype == "bfloat16" ? at::kBFloat16 : at::kHalf;
    at::manual_seed(1);
    q_ = at::randn({queries, o.query_heads, o.head_dim}).to(type);
    k_ = at::randn({context, o.kv_heads, o.head_dim}).to(type);
    v_ = at::randn({context, o.kv_heads, o.head_dim}).to(type);
    q_idx_ = at::randn({queries, o.kv_heads, o.index_dim}).to(type);
    k_idx_ = at::randn({context, o.index_dim}).to(type);
    out_ = at::empty_like(q_);
    lse_ = at::empty({queries, o.query_heads}, at::kFloat);
    selected_ = at::empty({o.kv_heads, queries, o.topk}, at::kInt);
    cu_q_ = {0, static_cast<std::int32_t>(queries)};
    cu_k_ = {0, static_cast<std::int32_t>(context)};
    batch_ = Batch::packed(cu_q_, cu_k_);
    blocks_ = random_blocks(o, context, queries);
    peer_ = "torch sdpa " + o.dtype;
  }

  double time_peer() {
    progress_(peer_ + ", context " + std::to_string(context_));
    const std::int64_t group = o_.query_heads / o_.kv_heads;
    const auto heads_first = [&](const at::Tensor& keys) {
      return keys.transpose(0, 1).unsqueeze(1).expand({o_.kv_heads, group, context_, o_.head_dim});
    };
    const at::Tensor q = q_.view({queries_, o_.kv_heads, group, o_.head_dim}).permute({1, 2, 0, 3});
    const at::Tensor k = heads_first(k_), v = heads_first(v_);
    const at::Tensor positions = at::arange(context_ - queries_, context_).unsqueeze(1);
    const at::Tensor mask = at::arange(context_).unsqueeze(0).le(positions);
    const double masked =
        median_seconds(o_.repeats, [&] { at::scaled_dot_product_attention(q, k, v, mask, 0.0, false); });
    const double plain = median_seconds(o_.repeats, [&] { at::scaled_dot_product_attention(q, k, v); });
    const double seconds = std::min(masked, plain);
    add(peer_, seconds, attention_flops(dense_pairs(context_, queries_)), kv_bytes(context_), 0);
    return seconds;
  }

  double time_select(double peer) {
    return time_op("select_blocks", index_flops(), index_bytes(), peer, [&] { select(); });
  }
  double time_sparse(double peer) {
    return time_op("sparse_attention (random blocks)", attention_flops(sparse_pairs()), sparse_bytes(), peer,
                   [&] { sparse(blocks_); });
  }
  double time_layer(double peer) {
    return time_op("msa layer (select + sparse)", index_flops() + attention_flops(sparse_pairs()),
                   index_bytes() + sparse_bytes(), peer, [&] {
                     select();
                     sparse(selected_);
                   });
  }
  double time_dense(double peer) {
    return time_op("dense_attention", attention_flops(dense_pairs(context_, queries_)), kv_bytes(context_), peer, [&] {
      msa::dense_attention(run_, {.q = view(q_), .k = view(k_), .v = view(v_), .batch = batch_, .scale = {}}, view(out_),
                           view(lse_));
    });
  }
  void time_backward() {
    sparse(blocks_);
    const at::Tensor dout = at::randn_like(q_.to(at::kFloat)).to(q_.scalar_type());
    const at::Tensor dq = at::empty_like(q_), dk = at::empty_like(k_), dv = at::empty_like(v_);
    const AttentionSaved saved{.out = view(out_), .lse = view(lse_), .dout = view(dout), .dlse = {}};
    const AttentionGrads grads{.dq = view(dq), .dk = view(dk), .dv = view(dv)};
    // 5 products in place of the forward's 2.
    time_op("sparse_attention_backward", 2.5 * attention_flops(sparse_pairs()), sparse_bytes(), 0,
            [&] { msa::sparse_attention_backward(run_, sparse_params(blocks_), saved, grads); });
  }
  void time_kl() {
    const at::Tensor lse_index = at::empty({queries_, o_.kv_heads}, at::kFloat);
    const at::Tensor norm = at::empty({queries_, o_.kv_heads}, at::kFloat);
    const at::Tensor dq_idx = at::empty_like(q_idx_), dk_idx = at::empty_like(k_idx_);
    const IndexKlSaved saved{.lse_main = view(lse_), .lse_index = view(lse_index), .teacher_norm = view(norm)};
    IndexKlParams params;
    params.q_idx = view(q_idx_), params.k_idx = view(k_idx_), params.q = view(q_), params.k = view(k_);
    params.batch = batch_;
    params.block_size = o_.block_size;
    const double pairs = dense_pairs(context_, queries_);
    const double scores = 2 * pairs *
                          static_cast<double>(o_.query_heads * o_.head_dim + o_.kv_heads * o_.index_dim);
    time_op("index_kl (warmup)", 2 * scores, 0, 0, [&] { msa::index_kl(run_, params, saved); });
    time_op("index_kl_backward (warmup)", scores + 4 * pairs * static_cast<double>(o_.kv_heads * o_.index_dim), 0, 0,
            [&] { msa::index_kl_backward(run_, params, saved, 1.0f, view(dq_idx), view(dk_idx)); });
  }

 private:
  double attention_flops(double pairs) const {
    return 4 * pairs * static_cast<double>(o_.query_heads * o_.head_dim);
  }
  double index_flops() const {
    return 2 * dense_pairs(context_, queries_) * static_cast<double>(o_.kv_heads * o_.index_dim);
  }
  double sparse_pairs() const {
    return static_cast<double>(queries_) * static_cast<double>(std::min(context_, o_.topk * o_.block_size)) -
           static_cast<double>(queries_) * static_cast<double>(o_.block_size - 1) / 2;
  }
  double element() const { return static_cast<double>(q_.element_size()); }
  double kv_bytes(std::int64_t tokens) const {
    return 2 * static_cast<double>(tokens * o_.kv_heads * o_.head_dim) * element();
  }
  double index_bytes() const { return static_cast<double>(context_ * o_.index_dim) * element(); }
  double sparse_bytes() const {
    return kv_bytes(std::min(context_, queries_ * o_.topk * o_.block_size));
  }

  SparseAttentionParams sparse_params(const at::Tensor& blocks) const {
    SparseAttentionParams params;
    params.q = view(q_), params.k = view(k_), params.v = view(v_), params.blocks = view(blocks);
    params.batch = batch_;
    params.block_size = o_.block_size;
    return params;
  }
  void sparse(const at::Tensor& blocks) { msa::sparse_attention(run_, sparse_params(blocks), view(out_), view(lse_)); }
  void select() {
    SelectBlocksParams params;
    params.q_idx = view(q_idx_), params.k_idx = view(k_idx_);
    params.batch = batch_;
    params.block_size = o_.block_size;
    params.topk = o_.topk;
    msa::select_blocks(run_, params, view(selected_));
  }

  double time_op(const std::string& name, double flops, double bytes, double peer, const std::function<void()>& body) {
    progress_(name + ", context " + std::to_string(context_));
    const double seconds = median_seconds(o_.repeats, body);
    add(name, seconds, flops, bytes, peer);
    return seconds;
  }
  void add(const std::string& name, double seconds, double flops, double bytes, double peer) {
    OpBenchRow row;
    row.name = queries_ == 1 ? "decode: " + name : name;
    row.context = context_;
    row.seconds = seconds;
    row.flops = flops;
    row.bytes = bytes;
    const double compute = flops / (result_.fma_gflops * 1e9);
    const double memory = bytes / (result_.read_gbytes * 1e9);
    row.memory_bound = memory > compute;
    row.peak_fraction = std::max(compute, memory) / seconds;
    row.speedup = peer > 0 ? peer / seconds : 0;
    result_.rows.push_back(row);
  }

  const OpBenchOptions& o_;
  std::int64_t context_, queries_;
  OpBenchResult& result_;
  const std::function<void(const std::string&)>& progress_;
  Context run_;
  at::Tensor q_, k_, v_, q_idx_, k_idx_, out_, lse_, selected_, blocks_;
  std::vector<std::int32_t> cu_q_, cu_k_;
  Batch batch_;
  std::string peer_;
};

}  // namespace

const std::vector<std::string>& op_names() {
  static const std::vector<std::string> names = {"select_blocks", "sparse_attention", "dense_attention",
                                                 "layer",         "decode",           "backward",
                                                 "index_kl"};
  return names;
}

OpBenchResult run_op_bench(const OpBenchOptions& options, const std::function<void(const std::string&)>& progress) {
  if (options.op != "all" && std::find(op_names().begin(), op_names().end(), options.op) == op_names().end()) {
    throw Error("bench: op '" + options.op + "' is unknown");
  }
  for (const std::int64_t context : options.contexts) {
    if (context < options.queries) {
      throw Error("bench: context " + std::to_string(context) + " is below the " + std::to_string(options.queries) +
                  " queries");
    }
  }
  if (options.repeats < 1 || options.queries < 1) throw Error("bench: repeats and queries must be at least 1");
  const auto wants = [&](const char* op) { return options.op == "all" || options.op == op; };
  const c10::InferenceMode inference;
  OpBenchResult result;
  result.threads = core::resolve_threads(options.threads);
  result.instruction_set = active_instruction_set();
  result.torch_version = TORCH_VERSION;
  at::set_num_threads(result.threads);
  progress("peaks of the machine");
  result.fma_gflops = measure_fma_gflops(result.threads);
  result.read_gbytes = measure_read_gbytes(result.threads);
  for (const std::int64_t context : options.contexts) {
    ShapeBench bench(options, context, options.queries, result, progress);
    const bool forward = wants("select_blocks") || wants("sparse_attention") || wants("layer") || wants("dense_attention");
    const double peer = forward ? bench.time_peer() : 0;
    if (wants("dense_attention")) bench.time_dense(peer);
    if (wants("select_blocks")) bench.time_select(peer);
    if (wants("sparse_attention")) bench.time_sparse(peer);
    if (wants("layer")) bench.time_layer(peer);
    if (wants("backward")) bench.time_backward();
    if (wants("index_kl") && context <= 8192) bench.time_kl();
    if (wants("decode")) {
      ShapeBench decode(options, context, 1, result, progress);
      const double decode_peer = decode.time_peer();
      decode.time_dense(decode_peer);
      decode.time_layer(decode_peer);
    }
  }
  return result;
}

}  // namespace msa::bench
