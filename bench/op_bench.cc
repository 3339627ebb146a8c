// SPDX-License-Identifier: Apache-2.0
// See op_bench.h. A ShapeBench holds the tensors of one context and times what is asked of it; torch's side is in
// torch_peers.cc, how often a thing is run in timing.h.
#include "bench/op_bench.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/version.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <optional>
#include <random>
#include <utility>

#include "bench/timing.h"
#include "bench/torch_peers.h"
#include "msa/error.h"
#include "msa/msa.h"
#include "src/core/threads.h"
#include "src/cpu/dot_products.h"
#include "src/cpu/screen.h"

namespace msa::bench {
namespace {

DType view_dtype(at::ScalarType type) {
  if (type == at::kFloat) return DType::kFloat32;
  if (type == at::kFloat8_e4m3fn) return DType::kFloat8E4M3;
  return type == at::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

at::ScalarType scalar_type(const std::string& dtype) {
  return dtype == "float32" ? at::kFloat : dtype == "bfloat16" ? at::kBFloat16 : at::kHalf;
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

// ---- Work, and what it is held against ----

/// What a row does: products by their arithmetic, and bytes that must come from memory.
struct Work {
  std::vector<std::pair<Arithmetic, double>> operations;
  double bytes = 0;

  Work& operator+=(const Work& other) {
    operations.insert(operations.end(), other.operations.begin(), other.operations.end());
    bytes += other.bytes;
    return *this;
  }
};

// The arithmetic of attention's products on the instruction set in use.
Arithmetic attention_arithmetic(at::ScalarType type) {
  if (type != at::kBFloat16) return Arithmetic::kFloat;
  switch (cpu::active_dot_products()) {
    case cpu::DotProducts::kAmx: return Arithmetic::kBf16Amx;
    case cpu::DotProducts::kAvx512: return Arithmetic::kBf16Dot;
    case cpu::DotProducts::kVnni:
    case cpu::DotProducts::kNone: break;
  }
  return Arithmetic::kFloat;
}

// Of the scores of the index branch: all of them in the cheapest products of the machine, to find the few that are
// worth a float (int8; with AMX tiles it is bf16 that screens, held against int8 all the same). A single query is bound
// by reading.
Arithmetic screening_arithmetic(std::int64_t queries) {
  if (queries == 1) return Arithmetic::kFloat;
  switch (cpu::active_dot_products()) {
    case cpu::DotProducts::kAmx: return Arithmetic::kInt8Amx;
    case cpu::DotProducts::kAvx512:
    case cpu::DotProducts::kVnni: return Arithmetic::kInt8Dot;
    case cpu::DotProducts::kNone: break;
  }
  return Arithmetic::kFloat;
}

// torch takes the best there is, whatever set we are told to use.
Arithmetic torch_arithmetic(at::ScalarType type, const Peaks& peaks) {
  if (type != at::kBFloat16) return Arithmetic::kFloat;
  if (peaks.has(Arithmetic::kBf16Amx)) return Arithmetic::kBf16Amx;
  return peaks.of(Arithmetic::kBf16Dot) > peaks.of(Arithmetic::kFloat) ? Arithmetic::kBf16Dot : Arithmetic::kFloat;
}

void set_peak(OpBenchRow& row, const Work& work, const Peaks& peaks) {
  double compute = 0;
  std::string names;
  for (const auto& [arithmetic, operations] : work.operations) {
    row.operations += operations;
    if (operations == 0) continue;
    compute += operations / (peaks.of(arithmetic) * 1e9);
    const std::string name = arithmetic_name(arithmetic);
    if (names.find(name) == std::string::npos) names += names.empty() ? name : " + " + name;
  }
  row.bytes = work.bytes;
  const double memory = work.bytes / (peaks.read_gbytes * 1e9);
  if (compute == 0 && memory == 0) return;
  row.memory_bound = memory > compute;
  row.peak = row.memory_bound ? "read" : names;
  row.peak_fraction = std::max(compute, memory) / row.seconds;
}

// ---- What all rows share ----

class Bench {
 public:
  Bench(const OpBenchOptions& options, const OpBenchHooks& hooks, OpBenchResult& result)
      : o(options), result_(result), hooks_(hooks) {
    limits.repeats = o.repeats;
    limits.budget_seconds = o.budget_seconds;
    limits.should_stop = hooks.should_stop;
    context.threads = result.threads;
  }

  bool wants(const char* op) const {
    return std::any_of(o.ops.begin(), o.ops.end(),
                       [&](const std::string& name) { return name == "all" || name == op; });
  }
  const Peaks& peaks() const { return result_.peaks; }

  void tell(const std::string& what) const {
    if (hooks_.progress) hooks_.progress(what);
  }

  OpBenchRow& add(const std::string& section, const std::string& name, std::int64_t tokens, std::int64_t queries,
                  const Timing& timing, const Work& work, std::vector<Speedup> speedups = {}) {
    OpBenchRow row;
    row.section = section;
    row.name = name;
    row.context = tokens;
    row.queries = queries;
    row.threads = context.threads;
    row.runs = timing.runs;
    row.seconds = timing.seconds;
    row.speedups = std::move(speedups);
    set_peak(row, work, result_.peaks);
    result_.rows.push_back(std::move(row));
    return result_.rows.back();
  }

  OpBenchRow& last_row() { return result_.rows.back(); }

  const OpBenchOptions& o;
  TimingLimits limits;
  Context context;

 private:
  OpBenchResult& result_;
  const OpBenchHooks& hooks_;
};

/// A peer whose time is known already.
struct Peer {
  std::string name;
  double seconds = 0;
};

std::vector<Speedup> compare(const std::vector<Peer>& peers, double seconds) {
  std::vector<Speedup> speedups;
  for (const Peer& peer : peers) speedups.push_back({peer.name, peer.seconds / seconds});
  return speedups;
}

/// What torch's forward and backward took over all of `tokens` tokens, in each type.
struct TorchTimes {
  std::int64_t tokens = 0;
  std::map<std::string, double> seconds;
};

/// [tokens, heads, dim] with a head's rows one after the other, as caches keep them and torch's attention takes them.
at::Tensor head_by_head(const at::Tensor& rows) { return rows.transpose(0, 1).contiguous().transpose(0, 1); }

/// The last `queries` tokens of one sequence of `context` tokens.
class ShapeBench {
 public:
  ShapeBench(Bench& bench, std::string section, std::int64_t context, std::int64_t queries)
      : bench_(bench), o_(bench.o), section_(std::move(section)), context_(context), queries_(queries) {
    type_ = scalar_type(o_.dtype);
    at::manual_seed(1);
    q_ = at::randn({queries, o_.query_heads, o_.head_dim}).to(type_);
    k_ = at::randn({context, o_.kv_heads, o_.head_dim}).to(type_);
    v_ = at::randn({context, o_.kv_heads, o_.head_dim}).to(type_);
    if (section_ != "training") {
      k_ = head_by_head(k_);
      v_ = head_by_head(v_);
    }
    q_idx_ = at::randn({queries, o_.kv_heads, o_.index_dim}).to(type_);
    k_idx_ = at::randn({context, o_.index_dim}).to(type_);
    out_ = at::empty_like(q_);
    lse_ = at::empty({queries, o_.query_heads}, at::kFloat);
    selected_ = at::empty({o_.kv_heads, queries, o_.topk}, at::kInt);
    cu_q_ = {0, static_cast<std::int32_t>(queries)};
    cu_k_ = {0, static_cast<std::int32_t>(context)};
    batch_ = Batch::packed(cu_q_, cu_k_);
    blocks_ = random_blocks(o_, context, queries);
  }

  /// torch in bfloat16, then in float32: what the other rows are compared with.
  void time_torch() {
    for (const std::string& dtype : o_.torch_dtypes) {
      const at::ScalarType type = scalar_type(dtype);
      const std::string name = "torch sdpa " + dtype;
      tell(name);
      const Timing timing = time_torch_attention(bench_.limits, tensors_as(type));
      peers_.push_back({name, timing.seconds});
      bench_.add(section_, name, context_, queries_, timing,
                 {{{torch_arithmetic(type, bench_.peaks()), attention_operations(dense_pairs())}},
                  key_value_bytes(context_, type)});
    }
  }
  void time_dense() {
    const Timing timing = time("dense_attention", [&] { dense(); });
    add("dense_attention", timing,
        {{{attention_arithmetic(type_), attention_operations(dense_pairs())}}, key_value_bytes(context_, type_)});
    own_dense_ = timing.seconds;
  }
  void time_select() {
    const Timing timing = time("select_blocks", [&] { select(); });
    add("select_blocks", timing, select_work());
    if (screening_arithmetic(queries_) == Arithmetic::kFloat) return;
    const Unscreened unscreened;
    const Timing full = time("select_blocks, unscreened", [&] { select(); });
    bench_.last_row().speedups.push_back({"unscreened", full.seconds / timing.seconds});
    add("select_blocks, unscreened", full, unscreened_work());
  }
  void time_sparse() {
    const Timing timing = time("sparse_attention (random blocks)", [&] { sparse(blocks_); });
    add("sparse_attention (random blocks)", timing, sparse_work());
  }
  void time_layer(const std::string& name = "msa layer (select + sparse)") {
    const Timing timing = time(name, [&] { layer(); });
    Work work = select_work();
    work += sparse_work();
    OpBenchRow& added = add(name, timing, work);
    if (own_dense_ > 0) added.speedups.push_back({"dense_attention", own_dense_ / timing.seconds});
    added.flop_ratio = flop_ratio();
  }
  /// The layer again, on a cache that holds its index keys, then all of its keys and values, in a byte each.
  void time_layer_of_float8() {
    k_idx_ = k_idx_.to(at::kFloat8_e4m3fn);
    time_layer("msa layer, float8 index keys");
    k_ = k_.to(at::kFloat8_e4m3fn);
    v_ = v_.to(at::kFloat8_e4m3fn);
    time_layer("msa layer, float8 cache");
  }
  /// A layer on one thread and on all.
  void time_threads() {
    if (bench_.context.threads == 1) return;
    select();
    const std::vector<std::pair<std::string, std::function<void()>>> things = {
        {"select_blocks", [&] { select(); }},
        {"sparse_attention (random blocks)", [&] { sparse(blocks_); }},
        {"msa layer (select + sparse)", [&] { layer(); }}};
    for (const auto& [name, body] : things) {
      const Timing all = time(name + ", all threads", body);
      const int threads = std::exchange(bench_.context.threads, 1);
      const Timing one = time(name + ", one thread", body);
      bench_.add(section_, name, context_, queries_, one, {});
      bench_.context.threads = threads;
      bench_.add(section_, name, context_, queries_, all, {}, {{"one thread", one.seconds / all.seconds}});
    }
  }

  /// torch's times, which the rows of longer contexts may need, too.
  TorchTimes time_torch_backward() {
    TorchTimes times{context_, {}};
    for (const std::string& dtype : o_.torch_dtypes) {
      const std::string name = torch_backward_name(dtype);
      tell(name);
      const Timing timing = time_torch_attention_backward(bench_.limits, tensors_as(scalar_type(dtype)));
      times.seconds[dtype] = timing.seconds;
      add_torch_backward(dtype, timing);
    }
    return times;
  }
  /// For a context that would take torch too long: scaled from a shorter one by the pairs of a query and a key that it
  /// sees, N (N + 1) / 2. Keys and values of the longer one fit the caches less, so this flatters torch if anything.
  void derive_torch_backward(const TorchTimes& times) {
    const auto pairs = [](std::int64_t tokens) {
      return static_cast<double>(tokens) * static_cast<double>(tokens + 1);
    };
    const double factor = pairs(context_) / pairs(times.tokens);
    for (const auto& [dtype, seconds] : times.seconds) {
      add_torch_backward(dtype, {seconds * factor, 0}).scaled_from = times.tokens;
    }
  }
  /// One step of a layer in the sparse stage: selection, attention, KL, and the way back; and its parts.
  void time_training() {
    make_gradients();
    struct Part {
      std::string name;
      Work work;
      std::function<void()> run;
      std::vector<double> seconds;
    };
    std::vector<Part> parts = {
        {"select_blocks", select_work(), [&] { select(); }, {}},
        {"sparse_attention", sparse_work(), [&] { sparse(selected_); }, {}},
        {"index_kl", kl_work(sparse_pairs()), [&] { kl(selected_); }, {}},
        {"sparse_attention_backward", sparse_backward_work(), [&] { sparse_backward(selected_); }, {}},
        {"index_kl_backward", kl_backward_work(sparse_pairs()), [&] { kl_backward(selected_); }, {}}};
    const Timing timing = time("msa layer with KL, fwd + bwd", [&] {
      for (Part& part : parts) part.seconds.push_back(seconds_of(part.run));
    });
    Work work;
    for (const Part& part : parts) work += part.work;
    OpBenchRow& added = add("msa layer with KL, fwd + bwd", timing, work);
    added.flop_ratio = flop_ratio();
    for (Part& part : parts) {
      if (part.seconds.size() > 1) part.seconds.erase(part.seconds.begin());  // the warm-up
      bench_.add(section_, "  of which " + part.name, context_, queries_,
                 {median(part.seconds), static_cast<int>(part.seconds.size())}, part.work);
    }

    sparse(blocks_);
    const Timing backward = time("sparse_attention_backward", [&] { sparse_backward(blocks_); });
    bench_.add(section_, "sparse_attention_backward (random blocks)", context_, queries_, backward,
               sparse_backward_work());
  }
  void time_kl(bool warmup) {
    make_gradients();
    const at::Tensor blocks = warmup ? at::Tensor() : blocks_;
    const std::string what = warmup ? " (warmup)" : " (random blocks)";
    const double pairs = warmup ? dense_pairs() : sparse_pairs();
    const Timing forward = time("index_kl" + what, [&] { kl(blocks); });
    bench_.add(section_, "index_kl" + what, context_, queries_, forward, kl_work(pairs));
    const Timing backward = time("index_kl_backward" + what, [&] { kl_backward(blocks); });
    bench_.add(section_, "index_kl_backward" + what, context_, queries_, backward, kl_backward_work(pairs));
  }

 private:
  /// Scores every block in float for as long as it lives.
  struct Unscreened {
    Unscreened() { cpu::force_screening(cpu::Screening::kNever); }
    ~Unscreened() { cpu::force_screening(cpu::Screening::kAuto); }
    Unscreened(const Unscreened&) = delete;
    Unscreened& operator=(const Unscreened&) = delete;
  };

  // ---- Counting ----

  // (query, key) pairs of one head: the whole visible prefix, or the selected blocks, the local one half full on
  // average.
  double dense_pairs() const {
    const auto n = static_cast<double>(queries_);
    return n * static_cast<double>(context_ - queries_) + n * (n + 1) / 2;
  }
  double sparse_pairs() const {
    if (context_ <= o_.topk * o_.block_size) return dense_pairs();
    return static_cast<double>(queries_) *
           (static_cast<double>(o_.topk * o_.block_size) - static_cast<double>(o_.block_size - 1) / 2);
  }
  // Two products, each a multiplication and an addition for every pair and dimension.
  double attention_operations(double pairs) const {
    return 4 * pairs * static_cast<double>(o_.query_heads * o_.head_dim);
  }
  double index_operations(double pairs) const { return 2 * pairs * static_cast<double>(o_.kv_heads * o_.index_dim); }
  double key_value_bytes(std::int64_t tokens, at::ScalarType type) const {
    return 2 * static_cast<double>(tokens * o_.kv_heads * o_.head_dim) * static_cast<double>(c10::elementSize(type));
  }
  double index_bytes() const {
    return static_cast<double>(context_ * o_.index_dim) * static_cast<double>(k_idx_.element_size());
  }

  Work select_work() const {
    return {{{screening_arithmetic(queries_), index_operations(dense_pairs())}}, index_bytes()};
  }
  Work unscreened_work() const { return {{{Arithmetic::kFloat, index_operations(dense_pairs())}}, index_bytes()}; }
  Work sparse_work() const {
    return {{{attention_arithmetic(type_), attention_operations(sparse_pairs())}},
            key_value_bytes(std::min(context_, queries_ * o_.topk * o_.block_size), k_.scalar_type())};
  }
  Work sparse_backward_work() const {  // 5 products in place of the forward's 2
    return {{{attention_arithmetic(type_), 2.5 * attention_operations(sparse_pairs())}}, 0};
  }
  // Scores of the teacher and of the student; on the way back both again, and two products for the gradients.
  Work kl_work(double pairs) const {
    return {
        {{attention_arithmetic(type_), attention_operations(pairs) / 2}, {Arithmetic::kFloat, index_operations(pairs)}},
        0};
  }
  Work kl_backward_work(double pairs) const {
    return {{{attention_arithmetic(type_), attention_operations(pairs) / 2},
             {Arithmetic::kFloat, 3 * index_operations(pairs)}},
            0};
  }
  /// Dense over MSA for a causal pass over the whole context: 2 Hq D N^2 over Hkv Di N^2 + 4 Hq D N k Bk.
  double flop_ratio() const {
    const auto n = static_cast<double>(context_);
    const auto main = static_cast<double>(o_.query_heads * o_.head_dim);
    const double dense = 2 * main * n * n;
    const double index = static_cast<double>(o_.kv_heads * o_.index_dim) * n * n;
    return dense / (index + 4 * main * n * std::min(n, static_cast<double>(o_.topk * o_.block_size)));
  }

  // ---- Running ----

  void select() {
    SelectBlocksParams params;
    params.q_idx = view(q_idx_), params.k_idx = view(k_idx_);
    params.batch = batch_;
    params.block_size = o_.block_size;
    params.topk = o_.topk;
    msa::select_blocks(bench_.context, params, view(selected_));
  }
  SparseAttentionParams sparse_params(const at::Tensor& blocks) const {
    SparseAttentionParams params;
    params.q = view(q_), params.k = view(k_), params.v = view(v_), params.blocks = view(blocks);
    params.batch = batch_;
    params.block_size = o_.block_size;
    return params;
  }
  void sparse(const at::Tensor& blocks) {
    msa::sparse_attention(bench_.context, sparse_params(blocks), view(out_), view(lse_));
  }
  void layer() {
    select();
    sparse(selected_);
  }
  void dense() {
    msa::dense_attention(bench_.context, {.q = view(q_), .k = view(k_), .v = view(v_), .batch = batch_, .scale = {}},
                         view(out_), view(lse_));
  }
  void make_gradients() {
    if (dout_.defined()) return;
    dout_ = at::randn_like(q_.to(at::kFloat)).to(type_);
    dq_ = at::empty_like(q_), dk_ = at::empty_like(k_), dv_ = at::empty_like(v_);
    dq_idx_ = at::empty_like(q_idx_), dk_idx_ = at::empty_like(k_idx_);
    kl_lse_main_ = at::empty_like(lse_);
    kl_lse_index_ = at::empty({queries_, o_.kv_heads}, at::kFloat);
    kl_norm_ = at::empty({queries_, o_.kv_heads}, at::kFloat);
  }
  void sparse_backward(const at::Tensor& blocks) {
    const AttentionSaved saved{.out = view(out_), .lse = view(lse_), .dout = view(dout_), .dlse = {}};
    msa::sparse_attention_backward(bench_.context, sparse_params(blocks), saved,
                                   {.dq = view(dq_), .dk = view(dk_), .dv = view(dv_)});
  }
  IndexKlParams kl_params(const at::Tensor& blocks) const {
    IndexKlParams params;
    params.q_idx = view(q_idx_), params.k_idx = view(k_idx_), params.q = view(q_), params.k = view(k_);
    if (blocks.defined()) params.blocks = view(blocks);
    params.batch = batch_;
    params.block_size = o_.block_size;
    return params;
  }
  void kl(const at::Tensor& blocks) { msa::index_kl(bench_.context, kl_params(blocks), kl_saved()); }
  void kl_backward(const at::Tensor& blocks) {
    msa::index_kl_backward(bench_.context, kl_params(blocks), kl_saved(), 1.0f, view(dq_idx_), view(dk_idx_));
  }
  IndexKlSaved kl_saved() const {
    return {.lse_main = view(kl_lse_main_), .lse_index = view(kl_lse_index_), .teacher_norm = view(kl_norm_)};
  }

  static std::string torch_backward_name(const std::string& dtype) { return "torch sdpa " + dtype + ", fwd + bwd"; }
  OpBenchRow& add_torch_backward(const std::string& dtype, const Timing& timing) {
    const Arithmetic arithmetic = torch_arithmetic(scalar_type(dtype), bench_.peaks());
    peers_.push_back({torch_backward_name(dtype), timing.seconds});
    return bench_.add(section_, peers_.back().name, context_, queries_, timing,
                      {{{arithmetic, 3.5 * attention_operations(dense_pairs())}}, 0});
  }
  AttentionTensors tensors_as(at::ScalarType type) const { return {q_.to(type), k_.to(type), v_.to(type)}; }
  void tell(const std::string& what) const { bench_.tell(section_ + " at " + std::to_string(context_) + ": " + what); }
  Timing time(const std::string& what, const std::function<void()>& body) {
    tell(what);
    return time_median(bench_.limits, body);
  }
  OpBenchRow& add(const std::string& name, const Timing& timing, const Work& work) {
    return bench_.add(section_, name, context_, queries_, timing, work, compare(peers_, timing.seconds));
  }

  Bench& bench_;
  const OpBenchOptions& o_;
  std::string section_;
  std::int64_t context_, queries_;
  at::ScalarType type_;
  at::Tensor q_, k_, v_, q_idx_, k_idx_, out_, lse_, selected_, blocks_;
  at::Tensor dout_, dq_, dk_, dv_, dq_idx_, dk_idx_, kl_lse_main_, kl_lse_index_, kl_norm_;
  std::vector<std::int32_t> cu_q_, cu_k_;
  Batch batch_;
  std::vector<Peer> peers_;
  double own_dense_ = 0;
};

// Top-k alone has shapes of its own: rows of block scores as a long context gives them.
void time_topk(Bench& bench) {
  struct Shape {
    std::int64_t rows, blocks, topk;
  };
  for (const Shape& shape : {Shape{4096, 1024, 16}, Shape{4096, 4096, 16}, Shape{4096, 8192, 32}}) {
    at::manual_seed(1);
    const at::Tensor scores = at::randn({shape.rows, shape.blocks});
    const at::Tensor ids = at::empty({shape.rows, shape.topk}, at::kInt);
    const std::string what =
        " (" + std::to_string(shape.rows) + ", " + std::to_string(shape.blocks) + ") k" + std::to_string(shape.topk);
    const Work work{{}, static_cast<double>(shape.rows * shape.blocks) * sizeof(float)};
    bench.tell("torch.topk" + what);
    const Timing peer = time_torch_topk(bench.limits, scores, shape.topk);
    bench.add("top-k", "torch.topk" + what, shape.blocks, shape.rows, peer, work);
    bench.tell("topk_blocks" + what);
    const Timing ours = time_median(bench.limits, [&] {
      msa::topk_blocks(bench.context, {.scores = view(scores), .topk = shape.topk}, view(ids));
    });
    bench.add("top-k", "topk_blocks" + what, shape.blocks, shape.rows, ours, work,
              {{"torch.topk", peer.seconds / ours.seconds}});
  }
}

// The KL of the warmup over whole sequences up to here: its teacher is dense attention.
constexpr std::int64_t kLongestWarmup = 8192;

// Trained on as a whole, torch on as much of it as the options allow; or on the last tokens alone.
void time_training(Bench& bench, std::int64_t context, TorchTimes& torch_times) {
  const OpBenchOptions& o = bench.o;
  const bool is_whole = context <= o.train_whole;
  const bool is_derived = is_whole && context > o.torch_whole;
  if (is_derived && torch_times.tokens != o.torch_whole) {
    torch_times = ShapeBench(bench, "training", o.torch_whole, o.torch_whole).time_torch_backward();
  }
  ShapeBench training(bench, "training", context, is_whole ? context : o.queries);
  if (is_derived) {
    training.derive_torch_backward(torch_times);
  } else {
    const TorchTimes times = training.time_torch_backward();
    if (is_whole) torch_times = times;
  }
  training.time_training();
  if (bench.wants("index_kl")) training.time_kl(false);
}

void run_all(Bench& bench) {
  const OpBenchOptions& o = bench.o;
  if (bench.wants("topk_blocks")) time_topk(bench);
  TorchTimes torch_times;
  for (const std::int64_t context : o.contexts) {
    if (bench.wants("select_blocks") || bench.wants("sparse_attention") || bench.wants("layer") ||
        bench.wants("dense_attention")) {
      ShapeBench prefill(bench, "prefill", context, o.queries);
      if (bench.wants("sparse_attention") || bench.wants("dense_attention") || bench.wants("layer")) {
        prefill.time_torch();
      }
      if (bench.wants("dense_attention") || bench.wants("layer")) prefill.time_dense();
      if (bench.wants("select_blocks")) prefill.time_select();
      if (bench.wants("sparse_attention")) prefill.time_sparse();
      if (bench.wants("layer")) prefill.time_layer();
    }
    if (bench.wants("decode")) {
      ShapeBench decode(bench, "decode", context, 1);
      decode.time_torch();
      decode.time_dense();
      decode.time_select();
      decode.time_sparse();
      decode.time_layer();
      decode.time_layer_of_float8();
      for (const std::int64_t drafts : {4, 16}) {
        if (context < drafts) continue;
        ShapeBench verification(bench, "decode", context, drafts);
        verification.time_select();
        verification.time_sparse();
        verification.time_layer();
      }
    }
    if (bench.wants("backward")) time_training(bench, context, torch_times);
    if (bench.wants("index_kl") && context <= kLongestWarmup) {
      ShapeBench(bench, "training", context, std::min(context, o.queries)).time_kl(true);
    }
    if (bench.wants("threads")) ShapeBench(bench, "threads", context, o.queries).time_threads();
  }
}

void check_options(const OpBenchOptions& o) {
  const auto require = [](bool ok, const std::string& what) {
    if (!ok) throw Error("bench: " + what);
  };
  require(!o.ops.empty(), "no op is given");
  for (const std::string& op : o.ops) {
    const bool is_known = op == "all" || std::find(op_names().begin(), op_names().end(), op) != op_names().end();
    require(is_known, "op '" + op + "' is unknown");
  }
  require(!o.torch_dtypes.empty(), "no type is given for torch");
  require(o.torch_whole >= 1, "torch's longest whole context must be at least 1");
  require(!o.contexts.empty(), "no context is given");
  require(o.repeats >= 1 && o.queries >= 1, "repeats and queries must be at least 1");
  require(
      o.kv_heads >= 1 && o.query_heads >= 1 && o.query_heads % o.kv_heads == 0,
      "query heads " + std::to_string(o.query_heads) + " must be a multiple of kv heads " + std::to_string(o.kv_heads));
  const auto multiple = [](std::int64_t dim) {
    return dim >= kHeadDimMultiple && dim <= kMaxHeadDim && dim % kHeadDimMultiple == 0;
  };
  require(multiple(o.head_dim) && multiple(o.index_dim), "head and index dimensions must be multiples of " +
                                                             std::to_string(kHeadDimMultiple) + " up to " +
                                                             std::to_string(kMaxHeadDim));
  const bool power = o.block_size > 0 && (o.block_size & (o.block_size - 1)) == 0;
  require(power && o.block_size >= kMinBlockSize && o.block_size <= kMaxBlockSize,
          "block size " + std::to_string(o.block_size) + " must be a power of two from " +
              std::to_string(kMinBlockSize) + " to " + std::to_string(kMaxBlockSize));
  require(o.topk >= 1 && o.topk <= kMaxTopk,
          "topk " + std::to_string(o.topk) + " must be from 1 to " + std::to_string(kMaxTopk));
  for (const std::int64_t context : o.contexts) {
    require(context >= o.queries,
            "context " + std::to_string(context) + " is below the " + std::to_string(o.queries) + " queries");
  }
}

}  // namespace

const std::vector<std::string>& op_names() {
  static const std::vector<std::string> names = {"select_blocks",   "topk_blocks", "sparse_attention",
                                                 "dense_attention", "layer",       "decode",
                                                 "backward",        "index_kl",    "threads"};
  return names;
}

const OpBenchRow* find_row(const OpBenchResult& result, const std::string& section, const std::string& name,
                           std::int64_t context) {
  const auto found = std::find_if(result.rows.begin(), result.rows.end(), [&](const OpBenchRow& row) {
    return row.section == section && row.name == name && row.context == context;
  });
  return found == result.rows.end() ? nullptr : &*found;
}

OpBenchResult run_op_bench(const OpBenchOptions& options, const OpBenchHooks& hooks) {
  check_options(options);
  const at::NoGradGuard no_grad;
  OpBenchResult result;
  result.threads = core::resolve_threads(options.threads);
  result.instruction_set = active_instruction_set();
  result.torch_version = TORCH_VERSION;
  at::set_num_threads(result.threads);
  Bench bench(options, hooks, result);
  try {
    bench.tell("peaks of the machine");
    result.peaks = measure_peaks(result.threads);
    run_all(bench);
  } catch (const Stopped&) {
    result.interrupted = true;
  }
  return result;
}

}  // namespace msa::bench
