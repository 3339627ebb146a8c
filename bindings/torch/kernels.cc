// SPDX-License-Identifier: Apache-2.0
// Schemas of the torch operators and their CPU, CUDA and Meta kernels. A Meta kernel checks ranks and dtypes and makes
// the outputs; the others do the same, then turn tensors into views and call the library, which checks everything else:
// all are one function, a template of where it computes. On a GPU the library works on torch's current stream, in a
// workspace from torch's allocator; both are asked for through libc10, so that nothing of CUDA is linked here. The
// packed and the paged form of an operator are one function, too: they differ in how the keys lie. Autograd is in
// autograd.cc. Tested in tests/python/test_ops*.py and tests/cuda/test_gpu_*.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "bindings/torch/ops.h"
#include "msa/msa.h"

namespace msa::torch_ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;
using TensorPair = std::tuple<Tensor, Tensor>;
using TensorTriple = std::tuple<Tensor, Tensor, Tensor>;

/// Where a kernel computes; a Meta kernel does not.
enum class Where { kMeta, kCpu, kCuda };

// ---- Checks that come before a view can be made ----

std::string describe_tensor(const Tensor& tensor) {
  std::string text = c10::getDtypeNames(tensor.scalar_type()).first;
  text += '[';
  for (std::int64_t d = 0; d < tensor.dim(); ++d) {
    if (d > 0) text += ", ";
    const c10::SymInt size = tensor.sym_size(d);
    text += size.is_heap_allocated() ? std::string("?") : std::to_string(size.expect_int());
  }
  return text + ']';
}

void check_rank(const char* op, const std::string& name, const Tensor& tensor, std::int64_t rank) {
  TORCH_CHECK(tensor.defined(), op, ": ", name, ": must be a tensor");
  TORCH_CHECK(tensor.layout() == at::kStrided, op, ": ", name, ": ", describe_tensor(tensor), " has layout ",
              tensor.layout(), "; it must be strided");
  TORCH_CHECK(tensor.dim() == rank, op, ": ", name, ": ", describe_tensor(tensor), " must have rank ", rank);
}

void check_float(const char* op, const std::string& name, const Tensor& tensor, std::int64_t rank) {
  check_rank(op, name, tensor, rank);
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, op, ": ", name, ": ",
              describe_tensor(tensor), " must be float32, bfloat16 or float16");
}

/// Keys and values of a forward pass: float8, too; the library holds them against the queries.
void check_keys(const char* op, const std::string& name, const Tensor& tensor, std::int64_t rank) {
  check_rank(op, name, tensor, rank);
  if (tensor.scalar_type() != at::kFloat8_e4m3fn) check_float(op, name, tensor, rank);
}

void check_int32(const char* op, const std::string& name, const Tensor& tensor, std::int64_t rank) {
  check_rank(op, name, tensor, rank);
  TORCH_CHECK(tensor.scalar_type() == at::kInt, op, ": ", name, ": ", describe_tensor(tensor), " must be int32");
}

void check_topk(const char* op, std::int64_t topk) {  // before the output is allocated
  TORCH_CHECK(topk >= 1 && topk <= kMaxTopk, op, ": topk: ", topk, " must be from 1 to ", kMaxTopk);
}

// ---- From tensors to views ----

DType to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    case at::kFloat8_e4m3fn: return DType::kFloat8E4M3;
    default: return DType::kInt32;  // the checks above leave nothing else
  }
}

template <class View>
View make_tensor_view(const Tensor& tensor) {
  View view;
  view.dtype = to_dtype(tensor.scalar_type());
  view.rank = static_cast<int>(tensor.dim());
  for (int d = 0; d < view.rank; ++d) {
    view.shape[static_cast<std::size_t>(d)] = tensor.size(d);
    view.strides[static_cast<std::size_t>(d)] = tensor.stride(d);
  }
  return view;
}

/// Whether a call on a GPU checks what lies in its memory, for which the host must wait: process-wide.
std::atomic<bool>& checks_device_data() {
  static std::atomic<bool> checks = [] {
    const char* const value = std::getenv("MSA_CHECK_DEVICE_DATA");
    return value == nullptr || std::string(value) != "0";
  }();
  return checks;
}

/// A contiguous tensor made by this file.
TensorView output_view(const Tensor& tensor) {
  auto view = make_tensor_view<TensorView>(tensor);
  view.data = static_cast<std::byte*>(tensor.mutable_data_ptr());
  return view;
}

/// A tensor of `size` scalars, which may have any shape.
TensorView scalars_view(const Tensor& tensor, std::int64_t size) {
  return make_view(tensor.mutable_data_ptr<float>(), {size});
}

/// Makes the views of one call; tensors copied on the way (a last dimension that is not contiguous) live as long as it.
class Inputs {
 public:
  Inputs(const char* op, Where where) : op_(op), where_(where) {
    TORCH_CHECK(where != Where::kCuda || cuda_is_built(), op, ": backend: cuda is not in this build; configure with ",
                "-DMSA_CUDA=ON (docs/cuda.md), or move all tensors to the cpu");
  }

  ConstTensorView view(const std::string& name, const Tensor& tensor) {
    check_device(name, tensor);
    const bool rows_contiguous = tensor.size(-1) <= 1 || tensor.stride(-1) == 1;
    const Tensor& kept = keep(rows_contiguous ? tensor : tensor.contiguous());
    auto view = make_tensor_view<ConstTensorView>(kept);
    view.data = static_cast<const std::byte*>(kept.const_data_ptr());
    return view;
  }

  ConstTensorView view(const std::string& name, const OptionalTensor& tensor) {
    return tensor && tensor->defined() ? view(name, *tensor) : ConstTensorView();
  }

  Batch packed(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const OptionalTensor& query_positions) {
    Batch batch = Batch::packed(span("cu_seqlens_q", cu_seqlens_q), span("cu_seqlens_k", cu_seqlens_k));
    set_positions(batch, query_positions);
    return batch;
  }

  Batch paged(const Tensor& cu_seqlens_q, const Tensor& page_table, const Tensor& seqlens_k,
              const OptionalTensor& query_positions) {
    Batch batch = Batch::paged(span("cu_seqlens_q", cu_seqlens_q), span("page_table", page_table), page_table.size(1),
                               span("seqlens_k", seqlens_k));
    // The library sees the table as one span, in which [2, 3] and [3, 2] look alike.
    TORCH_CHECK(page_table.size(0) == batch.sequences(), op_, ": page_table: ", describe_tensor(page_table), " has ",
                page_table.size(0), " rows; cu_seqlens_q has ", batch.sequences(), " sequences");
    set_positions(batch, query_positions);
    return batch;
  }

  /// The GPU of a call on one; known once a view has been made.
  const std::optional<c10::Device>& gpu() const { return gpu_; }

  /// What the call runs on, all but its workspace.
  Context context() const {
    Context context;
    context.threads = at::get_num_threads();
    if (gpu_) {
      const c10::impl::VirtualGuardImpl torch_device(c10::DeviceType::CUDA);
      context.backend = Backend::kCuda;
      context.stream = torch_device.getStream(*gpu_).native_handle();
      context.check_device_data = checks_device_data();
      return context;
    }
    if (const char* backend = std::getenv("MSA_BACKEND"); backend != nullptr && *backend != '\0') {
      context.backend = parse_backend(backend);
      TORCH_CHECK(context.backend != Backend::kCuda, op_,
                  ": MSA_BACKEND=cuda: the tensors are on the cpu; it names the ",
                  "implementation for those (auto, reference, cpu)");
    }
    return context;
  }

  /// Allocated, as everything here, in the order of the stream: free for others once the call's work is behind it.
  void give_workspace(Context& context, std::size_t bytes) {
    const Tensor& workspace =
        keep(at::empty({static_cast<std::int64_t>(bytes)}, at::TensorOptions().device(*gpu_).dtype(at::kByte)));
    context.workspace = workspace.mutable_data_ptr();
    context.workspace_bytes = bytes;
  }

 private:
  void check_device(const std::string& name, const Tensor& tensor) {
    if (where_ != Where::kCuda) {
      TORCH_CHECK(tensor.device().is_cpu(), op_, ": ", name, ": is on ", tensor.device(),
                  "; all tensors must be on the cpu");
      return;
    }
    TORCH_CHECK(tensor.device().is_cuda(), op_, ": ", name, ": is on ", tensor.device(),
                "; another tensor of the call is on a GPU, and all must be");
    if (!gpu_) gpu_ = tensor.device();
    TORCH_CHECK(tensor.device() == *gpu_, op_, ": ", name, ": is on ", tensor.device(), "; the first tensor is on ",
                *gpu_, ", and all must be");
  }

  std::span<const std::int32_t> span(const std::string& name, const Tensor& tensor) {
    check_device(name, tensor);
    const Tensor& kept = keep(tensor.contiguous());
    return {kept.const_data_ptr<std::int32_t>(), static_cast<std::size_t>(kept.numel())};
  }

  void set_positions(Batch& batch, const OptionalTensor& query_positions) {
    if (!query_positions) return;
    batch.query_positions = span("query_positions", *query_positions);
    if (gpu_) return;  // there the library takes them as they are
    // Padding rows have entries too; the library wants those of the real rows only. It checks cu_seqlens_q itself.
    if (batch.cu_seqlens_q.empty() || batch.cu_seqlens_q.back() < 0) return;
    const auto real_rows = static_cast<std::size_t>(batch.cu_seqlens_q.back());
    if (real_rows < batch.query_positions.size()) batch.query_positions = batch.query_positions.first(real_rows);
  }

  const Tensor& keep(Tensor tensor) { return *kept_.insert(kept_.end(), std::move(tensor)); }

  const char* op_;
  Where where_;
  std::optional<c10::Device> gpu_;
  std::vector<Tensor> kept_;
};

/// How the keys of a call lie: one sequence after the other, or in pages. The two forms of an operator differ in this
/// alone.
class Layout {
 public:
  static Layout packed(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const OptionalTensor& query_positions) {
    return {cu_seqlens_q, cu_seqlens_k, nullptr, query_positions};
  }
  static Layout paged(const Tensor& cu_seqlens_q, const Tensor& page_table, const Tensor& seqlens_k,
                      const OptionalTensor& query_positions) {
    return {cu_seqlens_q, seqlens_k, &page_table, query_positions};
  }

  /// Name and rank of a key tensor that is [Tk, ...] of rank `rank` when packed, [pages, page, ...] when paged.
  std::string name(const char* packed) const {
    std::string text = packed;
    if (page_table_ != nullptr) text += "_pages";
    return text;
  }
  std::int64_t rank(std::int64_t packed) const { return page_table_ != nullptr ? packed + 1 : packed; }

  void check(const char* op) const {
    check_int32(op, "cu_seqlens_q", cu_seqlens_q_, 1);
    if (page_table_ != nullptr) check_int32(op, "page_table", *page_table_, 2);
    check_int32(op, page_table_ != nullptr ? "seqlens_k" : "cu_seqlens_k", lengths_, 1);
    if (query_positions_) check_int32(op, "query_positions", *query_positions_, 1);
  }

  Batch batch(Inputs& inputs) const {
    return page_table_ != nullptr ? inputs.paged(cu_seqlens_q_, *page_table_, lengths_, query_positions_)
                                  : inputs.packed(cu_seqlens_q_, lengths_, query_positions_);
  }

 private:
  Layout(const Tensor& cu_seqlens_q, const Tensor& lengths, const Tensor* page_table,
         const OptionalTensor& query_positions)
      : cu_seqlens_q_(cu_seqlens_q), lengths_(lengths), page_table_(page_table), query_positions_(query_positions) {}

  const Tensor& cu_seqlens_q_;
  const Tensor& lengths_;     // cu_seqlens_k, or seqlens_k
  const Tensor* page_table_;  // null: packed
  const OptionalTensor& query_positions_;
};

/// The library's messages read "op: argument: problem", with the names of the packed form: puts in those of `op`.
std::string rename_message(const std::string& op, const std::string& message) {
  const std::size_t op_end = message.find(": ");
  const std::size_t argument_end = op_end == std::string::npos ? op_end : message.find(": ", op_end + 2);
  if (argument_end == std::string::npos) return op + ": " + message;
  std::string argument = message.substr(op_end + 2, argument_end - op_end - 2);
  const bool paged = op.size() > 6 && op.compare(op.size() - 6, 6, "_paged") == 0;
  if (paged && (argument == "k" || argument == "v" || argument == "k_idx")) argument += "_pages";
  return op + ": " + argument + message.substr(argument_end);
}

/// Calls the library; its exceptions become c10::Error, which Python shows as RuntimeError. `workspace` gives the bytes
/// of device scratch that a call on a GPU needs.
template <class Workspace, class Body>
void call_library(const char* op, Inputs& inputs, Workspace&& workspace, Body&& body) {
  try {
    const c10::OptionalDeviceGuard guard(inputs.gpu());
    Context context = inputs.context();
    if (context.backend == Backend::kCuda) inputs.give_workspace(context, workspace(context));
    body(context);
  } catch (const Error& error) {
    TORCH_CHECK(false, rename_message(op, error.what()));
  }
}

// ---- select_blocks ----

Tensor make_blocks(const Tensor& q, const c10::SymInt& kv_heads, std::int64_t topk) {
  return at::empty_symint({kv_heads, q.sym_size(0), c10::SymInt(topk)}, q.options().dtype(at::kInt));
}

Tensor choose_blocks(const char* op, Where where, const Tensor& q_idx, const Tensor& k_idx, const Layout& layout,
                     std::int64_t block_size, std::int64_t topk, std::int64_t local_blocks, std::int64_t init_blocks) {
  check_float(op, "q_idx", q_idx, 3);
  check_keys(op, layout.name("k_idx"), k_idx, layout.rank(2));
  layout.check(op);
  check_topk(op, topk);
  const Tensor blocks = make_blocks(q_idx, q_idx.sym_size(1), topk);
  if (where == Where::kMeta) return blocks;
  Inputs inputs(op, where);
  SelectBlocksParams params;
  params.q_idx = inputs.view("q_idx", q_idx);
  params.k_idx = inputs.view(layout.name("k_idx"), k_idx);
  params.batch = layout.batch(inputs);
  params.block_size = block_size;
  params.topk = topk;
  params.local_blocks = local_blocks;
  params.init_blocks = init_blocks;
  call_library(
      op, inputs, [&](const Context& context) { return select_blocks_workspace(context, params); },
      [&](const Context& context) { msa::select_blocks(context, params, output_view(blocks)); });
  return blocks;
}

template <Where where>
Tensor select_blocks_kernel(const Tensor& q_idx, const Tensor& k_idx, const Tensor& cu_seqlens_q,
                            const Tensor& cu_seqlens_k, std::int64_t block_size, std::int64_t topk,
                            std::int64_t local_blocks, std::int64_t init_blocks,
                            const OptionalTensor& query_positions) {
  return choose_blocks("select_blocks", where, q_idx, k_idx,
                       Layout::packed(cu_seqlens_q, cu_seqlens_k, query_positions), block_size, topk, local_blocks,
                       init_blocks);
}

template <Where where>
Tensor select_blocks_paged_kernel(const Tensor& q_idx, const Tensor& k_idx_pages, const Tensor& cu_seqlens_q,
                                  const Tensor& page_table, const Tensor& seqlens_k, std::int64_t block_size,
                                  std::int64_t topk, std::int64_t local_blocks, std::int64_t init_blocks,
                                  const OptionalTensor& query_positions) {
  return choose_blocks("select_blocks_paged", where, q_idx, k_idx_pages,
                       Layout::paged(cu_seqlens_q, page_table, seqlens_k, query_positions), block_size, topk,
                       local_blocks, init_blocks);
}

// ---- topk_blocks ----

template <Where where>
Tensor topk_blocks_kernel(const Tensor& scores, std::int64_t topk) {
  constexpr const char* op = "topk_blocks";
  check_rank(op, "scores", scores, 2);
  TORCH_CHECK(scores.scalar_type() == at::kFloat, op, ": scores: ", describe_tensor(scores), " must be float32");
  check_topk(op, topk);
  const Tensor ids = at::empty_symint({scores.sym_size(0), c10::SymInt(topk)}, scores.options().dtype(at::kInt));
  if (where == Where::kMeta) return ids;
  Inputs inputs(op, where);
  TopkBlocksParams params;
  params.scores = inputs.view("scores", scores);
  params.topk = topk;
  call_library(
      op, inputs, [&](const Context& context) { return topk_blocks_workspace(context, params); },
      [&](const Context& context) { msa::topk_blocks(context, params, output_view(ids)); });
  return ids;
}

// ---- select_blocks_oracle ----

Tensor choose_oracle_blocks(const char* op, Where where, const Tensor& q, const Tensor& k, const Layout& layout,
                            std::int64_t block_size, std::int64_t topk, std::int64_t local_blocks,
                            std::int64_t init_blocks, std::optional<double> scale) {
  check_float(op, "q", q, 3);
  check_float(op, layout.name("k"), k, layout.rank(3));
  layout.check(op);
  check_topk(op, topk);
  const Tensor blocks = make_blocks(q, k.sym_size(-2), topk);
  if (where == Where::kMeta) return blocks;
  Inputs inputs(op, where);
  OracleBlocksParams params;
  params.q = inputs.view("q", q);
  params.k = inputs.view(layout.name("k"), k);
  params.batch = layout.batch(inputs);
  params.block_size = block_size;
  params.topk = topk;
  params.local_blocks = local_blocks;
  params.init_blocks = init_blocks;
  params.scale = scale;
  call_library(
      op, inputs, [&](const Context& context) { return select_blocks_oracle_workspace(context, params); },
      [&](const Context& context) { msa::select_blocks_oracle(context, params, output_view(blocks)); });
  return blocks;
}

template <Where where>
Tensor select_blocks_oracle_kernel(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
                                   const Tensor& cu_seqlens_k, std::int64_t block_size, std::int64_t topk,
                                   std::int64_t local_blocks, std::int64_t init_blocks, std::optional<double> scale,
                                   const OptionalTensor& query_positions) {
  return choose_oracle_blocks("select_blocks_oracle", where, q, k,
                              Layout::packed(cu_seqlens_q, cu_seqlens_k, query_positions), block_size, topk,
                              local_blocks, init_blocks, scale);
}

template <Where where>
Tensor select_blocks_oracle_paged_kernel(const Tensor& q, const Tensor& k_pages, const Tensor& cu_seqlens_q,
                                         const Tensor& page_table, const Tensor& seqlens_k, std::int64_t block_size,
                                         std::int64_t topk, std::int64_t local_blocks, std::int64_t init_blocks,
                                         std::optional<double> scale, const OptionalTensor& query_positions) {
  return choose_oracle_blocks("select_blocks_oracle_paged", where, q, k_pages,
                              Layout::paged(cu_seqlens_q, page_table, seqlens_k, query_positions), block_size, topk,
                              local_blocks, init_blocks, scale);
}

// ---- Attention, sparse and dense ----

/// One body for sparse (`blocks` given) and dense, packed and paged, forward and backward, as far as they agree.
struct AttentionArguments {
  const char* op;
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Tensor* blocks;  ///< null: dense
  const Layout& layout;
  std::int64_t block_size;  ///< of blocks
  std::optional<double> scale;

  void check() const {
    check_float(op, "q", q, 3);
    check_keys(op, layout.name("k"), k, layout.rank(3));
    check_keys(op, layout.name("v"), v, layout.rank(3));
    if (blocks != nullptr) check_int32(op, "blocks", *blocks, 3);
    layout.check(op);
  }

  /// Calls `body` with the library's parameters of the one operator or the other, and `workspace` for its bytes.
  template <class Workspace, class Body>
  void call(Inputs& inputs, Workspace&& workspace, Body&& body) const {
    const auto run = [&](const auto& params) {
      call_library(
          op, inputs, [&](const Context& context) { return workspace(context, params); },
          [&](const Context& context) { body(context, params); });
    };
    const auto fill = [&](auto params) {
      params.q = inputs.view("q", q);
      params.k = inputs.view(layout.name("k"), k);
      params.v = inputs.view(layout.name("v"), v);
      params.batch = layout.batch(inputs);
      params.scale = scale;
      return params;
    };
    if (blocks == nullptr) {
      run(fill(DenseAttentionParams()));
      return;
    }
    auto params = fill(SparseAttentionParams());
    params.blocks = inputs.view("blocks", *blocks);
    params.block_size = block_size;
    run(params);
  }
};

std::size_t forward_bytes(const Context& context, const SparseAttentionParams& params) {
  return sparse_attention_workspace(context, params);
}
std::size_t forward_bytes(const Context& context, const DenseAttentionParams& params) {
  return dense_attention_workspace(context, params);
}
std::size_t backward_bytes(const Context& context, const SparseAttentionParams& params) {
  return sparse_attention_backward_workspace(context, params);
}
std::size_t backward_bytes(const Context& context, const DenseAttentionParams& params) {
  return dense_attention_backward_workspace(context, params);
}

void run_attention(const Context& context, const SparseAttentionParams& params, TensorView out, TensorView lse) {
  msa::sparse_attention(context, params, out, lse);
}
void run_attention(const Context& context, const DenseAttentionParams& params, TensorView out, TensorView lse) {
  msa::dense_attention(context, params, out, lse);
}
void run_backward(const Context& context, const SparseAttentionParams& params, const AttentionSaved& saved,
                  const AttentionGrads& grads) {
  msa::sparse_attention_backward(context, params, saved, grads);
}
void run_backward(const Context& context, const DenseAttentionParams& params, const AttentionSaved& saved,
                  const AttentionGrads& grads) {
  msa::dense_attention_backward(context, params, saved, grads);
}

TensorPair attention(Where where, const AttentionArguments& arguments) {
  const auto& [op, q, k, v, blocks, layout, block_size, scale] = arguments;
  arguments.check();
  if (where != Where::kMeta) {  // before `out` is allocated
    TORCH_CHECK(v.size(-1) <= kMaxHeadDim, op, ": ", layout.name("v"), ": ", describe_tensor(v), ": head dimension ",
                v.size(-1), " must be at most ", kMaxHeadDim);
  }
  const Tensor out = at::empty_symint({q.sym_size(0), q.sym_size(1), v.sym_size(-1)}, q.options());
  const Tensor lse = at::empty_symint({q.sym_size(0), q.sym_size(1)}, q.options().dtype(at::kFloat));
  if (where == Where::kMeta) return {out, lse};
  Inputs inputs(op, where);
  arguments.call(
      inputs, [](const Context& context, const auto& params) { return forward_bytes(context, params); },
      [&](const Context& context, const auto& params) {
        run_attention(context, params, output_view(out), output_view(lse));
      });
  return {out, lse};
}

template <Where where>
TensorPair sparse_attention_kernel(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& blocks,
                                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, std::int64_t block_size,
                                   std::optional<double> scale, const OptionalTensor& query_positions) {
  return attention(where, {"sparse_attention", q, k, v, &blocks,
                           Layout::packed(cu_seqlens_q, cu_seqlens_k, query_positions), block_size, scale});
}

template <Where where>
TensorPair sparse_attention_paged_kernel(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                         const Tensor& blocks, const Tensor& cu_seqlens_q, const Tensor& page_table,
                                         const Tensor& seqlens_k, std::int64_t block_size, std::optional<double> scale,
                                         const OptionalTensor& query_positions) {
  return attention(where, {"sparse_attention_paged", q, k_pages, v_pages, &blocks,
                           Layout::paged(cu_seqlens_q, page_table, seqlens_k, query_positions), block_size, scale});
}

template <Where where>
TensorPair dense_attention_kernel(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                  const Tensor& cu_seqlens_k, std::optional<double> scale,
                                  const OptionalTensor& query_positions) {
  return attention(where, {"dense_attention", q, k, v, nullptr,
                           Layout::packed(cu_seqlens_q, cu_seqlens_k, query_positions), 0, scale});
}

template <Where where>
TensorPair dense_attention_paged_kernel(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                        const Tensor& cu_seqlens_q, const Tensor& page_table, const Tensor& seqlens_k,
                                        std::optional<double> scale, const OptionalTensor& query_positions) {
  return attention(where, {"dense_attention_paged", q, k_pages, v_pages, nullptr,
                           Layout::paged(cu_seqlens_q, page_table, seqlens_k, query_positions), 0, scale});
}

AttentionSaved attention_saved(const char* op, Inputs& inputs, const OptionalTensor& dout, const OptionalTensor& dlse,
                               const Tensor& out, const Tensor& lse) {
  check_float(op, "out", out, 3);
  check_float(op, "lse", lse, 2);
  const bool has_dout = dout && dout->defined();
  const Tensor dout_or_zero = has_dout ? *dout : at::zeros(out.sizes(), out.options());
  check_float(op, "dout", dout_or_zero, 3);
  if (dlse && dlse->defined()) check_float(op, "dlse", *dlse, 2);
  AttentionSaved saved;
  saved.out = inputs.view("out", out);
  saved.lse = inputs.view("lse", lse);
  saved.dout = inputs.view("dout", dout_or_zero);
  saved.dlse = inputs.view("dlse", dlse);
  return saved;
}

TensorTriple attention_backward(Where where, const AttentionArguments& arguments, const OptionalTensor& dout,
                                const OptionalTensor& dlse, const Tensor& out, const Tensor& lse) {
  const auto& [op, q, k, v, blocks, layout, block_size, scale] = arguments;
  if (where != Where::kMeta) arguments.check();
  const Tensor dq = at::empty_symint(q.sym_sizes(), q.options());
  const Tensor dk = at::empty_symint(k.sym_sizes(), k.options());
  const Tensor dv = at::empty_symint(v.sym_sizes(), v.options());
  if (where == Where::kMeta) return {dq, dk, dv};
  Inputs inputs(op, where);
  const AttentionSaved saved = attention_saved(op, inputs, dout, dlse, out, lse);
  arguments.call(
      inputs, [](const Context& context, const auto& params) { return backward_bytes(context, params); },
      [&](const Context& context, const auto& params) {
        run_backward(context, params, saved, {output_view(dq), output_view(dk), output_view(dv)});
      });
  return {dq, dk, dv};
}

template <Where where>
TensorTriple sparse_attention_backward_kernel(const OptionalTensor& dout, const OptionalTensor& dlse, const Tensor& q,
                                              const Tensor& k, const Tensor& v, const Tensor& blocks, const Tensor& out,
                                              const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                              std::int64_t block_size, std::optional<double> scale,
                                              const OptionalTensor& query_positions) {
  return attention_backward(where,
                            {"sparse_attention_backward", q, k, v, &blocks,
                             Layout::packed(cu_seqlens_q, cu_seqlens_k, query_positions), block_size, scale},
                            dout, dlse, out, lse);
}

template <Where where>
TensorTriple dense_attention_backward_kernel(const OptionalTensor& dout, const OptionalTensor& dlse, const Tensor& q,
                                             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                             std::optional<double> scale, const OptionalTensor& query_positions) {
  return attention_backward(where,
                            {"dense_attention_backward", q, k, v, nullptr,
                             Layout::packed(cu_seqlens_q, cu_seqlens_k, query_positions), 0, scale},
                            dout, dlse, out, lse);
}

// ---- index_kl ----

Teacher parse_teacher(const char* op, std::string_view teacher) {
  TORCH_CHECK(teacher == "mean" || teacher == "max", op, ": teacher: \"", teacher, "\" must be \"mean\" or \"max\"");
  return teacher == "mean" ? Teacher::kMean : Teacher::kMax;
}

void check_index_kl(const char* op, const Tensor& q_idx, const Tensor& k_idx, const Tensor& q, const Tensor& k,
                    const OptionalTensor& blocks, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                    std::string_view teacher, const OptionalTensor& query_positions) {
  check_float(op, "q_idx", q_idx, 3);
  check_float(op, "k_idx", k_idx, 2);
  check_float(op, "q", q, 3);
  check_float(op, "k", k, 3);
  if (blocks) check_int32(op, "blocks", *blocks, 3);
  Layout::packed(cu_seqlens_q, cu_seqlens_k, query_positions).check(op);
  parse_teacher(op, teacher);
}

IndexKlParams index_kl_params(Inputs& inputs, const char* op, const Tensor& q_idx, const Tensor& k_idx, const Tensor& q,
                              const Tensor& k, const OptionalTensor& blocks, const Batch& batch,
                              std::int64_t block_size, std::optional<double> index_scale, std::optional<double> scale,
                              std::string_view teacher) {
  IndexKlParams params;
  params.q_idx = inputs.view("q_idx", q_idx);
  params.k_idx = inputs.view("k_idx", k_idx);
  params.q = inputs.view("q", q);
  params.k = inputs.view("k", k);
  params.blocks = inputs.view("blocks", blocks);
  params.batch = batch;
  params.block_size = block_size;
  params.index_scale = index_scale;
  params.scale = scale;
  params.teacher = parse_teacher(op, teacher);
  return params;
}

template <Where where>
std::tuple<Tensor, Tensor, Tensor, Tensor> index_kl_forward_kernel(
    const Tensor& q_idx, const Tensor& k_idx, const Tensor& q, const Tensor& k, const OptionalTensor& blocks,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, std::int64_t block_size, std::optional<double> index_scale,
    std::optional<double> scale, std::string_view teacher, const OptionalTensor& query_positions) {
  constexpr const char* op = "index_kl";
  check_index_kl(op, q_idx, k_idx, q, k, blocks, cu_seqlens_q, cu_seqlens_k, teacher, query_positions);
  const auto options = q.options().dtype(at::kFloat);
  const Tensor kl = at::empty({}, options);
  const Tensor lse_main = at::empty_symint({q.sym_size(0), q.sym_size(1)}, options);
  const Tensor lse_index = at::empty_symint({q_idx.sym_size(0), q_idx.sym_size(1)}, options);
  const Tensor teacher_norm = at::empty_symint({q_idx.sym_size(0), q_idx.sym_size(1)}, options);
  if (where == Where::kMeta) return {kl, lse_main, lse_index, teacher_norm};
  Inputs inputs(op, where);
  const Batch batch = inputs.packed(cu_seqlens_q, cu_seqlens_k, query_positions);
  const IndexKlParams params =
      index_kl_params(inputs, op, q_idx, k_idx, q, k, blocks, batch, block_size, index_scale, scale, teacher);
  const IndexKlSaved saved{output_view(lse_main), output_view(lse_index), output_view(teacher_norm)};
  call_library(
      op, inputs, [&](const Context& context) { return index_kl_workspace(context, params); },
      [&](const Context& context) { msa::index_kl(context, params, saved, scalars_view(kl, 1)); });
  return {kl, lse_main, lse_index, teacher_norm};
}

template <Where where>
Tensor index_kl_kernel(const Tensor& q_idx, const Tensor& k_idx, const Tensor& q, const Tensor& k,
                       const OptionalTensor& blocks, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                       std::int64_t block_size, std::optional<double> index_scale, std::optional<double> scale,
                       std::string_view teacher, const OptionalTensor& query_positions) {
  return std::get<0>(index_kl_forward_kernel<where>(q_idx, k_idx, q, k, blocks, cu_seqlens_q, cu_seqlens_k, block_size,
                                                    index_scale, scale, teacher, query_positions));
}

template <Where where>
TensorPair index_kl_backward_kernel(const Tensor& grad_output, const Tensor& q_idx, const Tensor& k_idx,
                                    const Tensor& q, const Tensor& k, const OptionalTensor& blocks,
                                    const Tensor& lse_main, const Tensor& lse_index, const Tensor& teacher_norm,
                                    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, std::int64_t block_size,
                                    std::optional<double> index_scale, std::optional<double> scale,
                                    std::string_view teacher, const OptionalTensor& query_positions) {
  constexpr const char* op = "index_kl_backward";
  Tensor dq_idx = at::empty_symint(q_idx.sym_sizes(), q_idx.options());
  Tensor dk_idx = at::empty_symint(k_idx.sym_sizes(), k_idx.options());
  if (where == Where::kMeta) return {dq_idx, dk_idx};
  check_index_kl(op, q_idx, k_idx, q, k, blocks, cu_seqlens_q, cu_seqlens_k, teacher, query_positions);
  TORCH_CHECK(grad_output.numel() == 1, op, ": grad_output: ", describe_tensor(grad_output), " must be a scalar");
  check_float(op, "lse_main", lse_main, 2);
  check_float(op, "lse_index", lse_index, 2);
  check_float(op, "teacher_norm", teacher_norm, 2);
  Inputs inputs(op, where);
  const Batch batch = inputs.packed(cu_seqlens_q, cu_seqlens_k, query_positions);
  const IndexKlParams params =
      index_kl_params(inputs, op, q_idx, k_idx, q, k, blocks, batch, block_size, index_scale, scale, teacher);
  // Read only, but the library's type for them is the one the forward writes to.
  const Tensor main = lse_main.contiguous();
  const Tensor index = lse_index.contiguous();
  const Tensor norm = teacher_norm.contiguous();
  const IndexKlSaved saved{output_view(main), output_view(index), output_view(norm)};
  inputs.view("grad_output", grad_output.reshape({1}));  // that all are on one device
  inputs.view("lse_main", lse_main);
  inputs.view("lse_index", lse_index);
  inputs.view("teacher_norm", teacher_norm);
  const Tensor grad = grad_output.to(at::kFloat);
  call_library(
      op, inputs, [&](const Context& context) { return index_kl_backward_workspace(context, params); },
      [&](const Context& context) {
        msa::index_kl_backward(context, params, saved, scalars_view(grad, 1), output_view(dq_idx), output_view(dk_idx));
      });
  return {dq_idx, dk_idx};
}

// ---- selection_recall ----

template <Where where>
TensorPair selection_recall_kernel(const Tensor& q, const Tensor& k, const Tensor& blocks, const Tensor& cu_seqlens_q,
                                   const Tensor& cu_seqlens_k, std::int64_t block_size, std::optional<double> scale,
                                   const OptionalTensor& query_positions) {
  constexpr const char* op = "selection_recall";
  check_float(op, "q", q, 3);
  check_float(op, "k", k, 3);
  check_int32(op, "blocks", blocks, 3);
  Layout::packed(cu_seqlens_q, cu_seqlens_k, query_positions).check(op);
  const auto options = q.options().dtype(at::kFloat);
  const Tensor block_recall = at::empty({}, options), score_recall = at::empty({}, options);
  if (where == Where::kMeta) return {block_recall, score_recall};
  Inputs inputs(op, where);
  SelectionRecallParams params;
  params.q = inputs.view("q", q);
  params.k = inputs.view("k", k);
  params.blocks = inputs.view("blocks", blocks);
  params.batch = inputs.packed(cu_seqlens_q, cu_seqlens_k, query_positions);
  params.block_size = block_size;
  params.scale = scale;
  const Tensor recalls = at::empty({2}, options);
  call_library(
      op, inputs, [&](const Context& context) { return selection_recall_workspace(context, params); },
      [&](const Context& context) { msa::selection_recall(context, params, scalars_view(recalls, 2)); });
  block_recall.copy_(recalls.select(0, 0));
  score_recall.copy_(recalls.select(0, 1));
  return {block_recall, score_recall};
}

// ---- Registration ----

std::string version_string() { return version(); }

bool check_device_data(std::optional<bool> enabled) {
  return enabled ? checks_device_data().exchange(*enabled) : checks_device_data().load();
}

template <Where where>
void register_kernels(torch::Library& m) {
  m.impl("select_blocks", select_blocks_kernel<where>);
  m.impl("topk_blocks", topk_blocks_kernel<where>);
  m.impl("select_blocks_oracle", select_blocks_oracle_kernel<where>);
  m.impl("sparse_attention", sparse_attention_kernel<where>);
  m.impl("dense_attention", dense_attention_kernel<where>);
  m.impl("index_kl", index_kl_kernel<where>);
  m.impl("selection_recall", selection_recall_kernel<where>);
  m.impl("select_blocks_paged", select_blocks_paged_kernel<where>);
  m.impl("select_blocks_oracle_paged", select_blocks_oracle_paged_kernel<where>);
  m.impl("sparse_attention_paged", sparse_attention_paged_kernel<where>);
  m.impl("dense_attention_paged", dense_attention_paged_kernel<where>);
  m.impl("sparse_attention_backward", sparse_attention_backward_kernel<where>);
  m.impl("dense_attention_backward", dense_attention_backward_kernel<where>);
  m.impl("_index_kl_forward", index_kl_forward_kernel<where>);
  m.impl("_index_kl_backward", index_kl_backward_kernel<where>);
}

}  // namespace

TORCH_LIBRARY(msa, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "select_blocks(Tensor q_idx, Tensor k_idx, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, int topk, "
      "int local_blocks=1, int init_blocks=0, *, Tensor? query_positions=None) -> Tensor",
      tags);
  m.def("topk_blocks(Tensor scores, int topk) -> Tensor", tags);
  m.def(
      "select_blocks_oracle(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, int topk, "
      "int local_blocks=1, int init_blocks=0, float? scale=None, *, Tensor? query_positions=None) -> Tensor",
      tags);
  m.def(
      "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "int block_size, float? scale=None, *, Tensor? query_positions=None) -> (Tensor out, Tensor lse)",
      tags);
  m.def(
      "dense_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float? scale=None, *, "
      "Tensor? query_positions=None) -> (Tensor out, Tensor lse)",
      tags);
  m.def(
      "index_kl(Tensor q_idx, Tensor k_idx, Tensor q, Tensor k, Tensor? blocks, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, int block_size, float? index_scale=None, float? scale=None, *, str teacher=\"mean\", "
      "Tensor? query_positions=None) -> Tensor",
      tags);
  m.def(
      "selection_recall(Tensor q, Tensor k, Tensor blocks, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, "
      "float? scale=None, *, Tensor? query_positions=None) -> (Tensor block_recall, Tensor score_recall)",
      tags);
  m.def(
      "select_blocks_paged(Tensor q_idx, Tensor k_idx_pages, Tensor cu_seqlens_q, Tensor page_table, "
      "Tensor seqlens_k, int block_size, int topk, int local_blocks=1, int init_blocks=0, *, "
      "Tensor? query_positions=None) -> Tensor",
      tags);
  m.def(
      "select_blocks_oracle_paged(Tensor q, Tensor k_pages, Tensor cu_seqlens_q, Tensor page_table, "
      "Tensor seqlens_k, int block_size, int topk, int local_blocks=1, int init_blocks=0, float? scale=None, *, "
      "Tensor? query_positions=None) -> Tensor",
      tags);
  m.def(
      "sparse_attention_paged(Tensor q, Tensor k_pages, Tensor v_pages, Tensor blocks, Tensor cu_seqlens_q, "
      "Tensor page_table, Tensor seqlens_k, int block_size, float? scale=None, *, Tensor? query_positions=None) "
      "-> (Tensor out, Tensor lse)",
      tags);
  m.def(
      "dense_attention_paged(Tensor q, Tensor k_pages, Tensor v_pages, Tensor cu_seqlens_q, Tensor page_table, "
      "Tensor seqlens_k, float? scale=None, *, Tensor? query_positions=None) -> (Tensor out, Tensor lse)",
      tags);
  m.def(
      "sparse_attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor out, "
      "Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, float? scale, Tensor? query_positions) "
      "-> (Tensor dq, Tensor dk, Tensor dv)",
      tags);
  m.def(
      "dense_attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, float? scale, Tensor? query_positions) "
      "-> (Tensor dq, Tensor dk, Tensor dv)",
      tags);
  m.def(
      "_index_kl_forward(Tensor q_idx, Tensor k_idx, Tensor q, Tensor k, Tensor? blocks, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, int block_size, float? index_scale, float? scale, str teacher, Tensor? query_positions) "
      "-> (Tensor kl, Tensor lse_main, Tensor lse_index, Tensor teacher_norm)",
      tags);
  m.def(
      "_index_kl_backward(Tensor grad_output, Tensor q_idx, Tensor k_idx, Tensor q, Tensor k, Tensor? blocks, "
      "Tensor lse_main, Tensor lse_index, Tensor teacher_norm, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "int block_size, float? index_scale, float? scale, str teacher, Tensor? query_positions) "
      "-> (Tensor dq_idx, Tensor dk_idx)",
      tags);
  m.def("version() -> str", version_string);
  m.def("cuda_is_built() -> bool", cuda_is_built);
  m.def("check_device_data(bool? enabled=None) -> bool", check_device_data);
}

TORCH_LIBRARY_IMPL(msa, CPU, m) { register_kernels<Where::kCpu>(m); }
TORCH_LIBRARY_IMPL(msa, CUDA, m) { register_kernels<Where::kCuda>(m); }
TORCH_LIBRARY_IMPL(msa, Meta, m) { register_kernels<Where::kMeta>(m); }

}  // namespace msa::torch_ops
