// SPDX-License-Identifier: Apache-2.0
// Bad input: every rule of every operator's arguments, broken one at a time, gives msa::Error that names the operator
// and the argument (SPEC section 7). Also backends and instruction sets by name.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>

#include "msa/error.h"
#include "msa/msa.h"
#include "src/cuda/operators.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/targets.h"

namespace msa::testing {
namespace {

const Geometry kGeometry = {4, 2, 32, 48, 16, 16, 3};

// A valid problem: two sequences, one with a prefix.
Problem make_problem() {
  static const Problem problem(Case{kGeometry, {{5, 5}, {3, 70}}});
  return problem;
}

Context one_thread() {
  Context context;
  context.threads = 1;
  return context;
}

void expect_error(const std::string& op, const std::string& argument, const std::function<void()>& call) {
  const std::string start = op + ": " + argument + ": ";
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).substr(0, start.size()), start) << error.what();
    return;
  }
  ADD_FAILURE() << "no error; expected one that starts with \"" << start << '"';
}

ConstTensorView with_dtype(ConstTensorView view, DType dtype) {
  view.dtype = dtype;
  return view;
}

ConstTensorView with_rank(ConstTensorView view, int rank) {
  if (rank > view.rank) {
    view.shape[static_cast<std::size_t>(rank) - 1] = view.strides[static_cast<std::size_t>(rank) - 1] = 1;
  }
  view.rank = rank;
  return view;
}

ConstTensorView with_size(ConstTensorView view, int dim, std::int64_t size) {
  view.shape[static_cast<std::size_t>(dim)] = size;
  return view;
}

ConstTensorView with_stride(ConstTensorView view, int dim, std::int64_t stride) {
  view.strides[static_cast<std::size_t>(dim)] = stride;
  return view;
}

ConstTensorView without_data(ConstTensorView view) {
  view.data = nullptr;
  return view;
}

TensorView resized(TensorView view, int dim, std::int64_t size) {
  view.shape[static_cast<std::size_t>(dim)] = size;
  return view;
}

// The operators, each as a struct of what can be broken and a call.
struct SelectCall {
  Problem problem = make_problem();
  SelectBlocksParams params = problem.select_params();
  Tensor blocks = Tensor(DType::kInt32, {2, 8, 3});
  TensorView out = blocks.view();
  void operator()() const { select_blocks(one_thread(), params, out); }
};

struct OracleCall {
  Problem problem = make_problem();
  OracleBlocksParams params = problem.oracle_params();
  Tensor blocks = Tensor(DType::kInt32, {2, 8, 3});
  TensorView out = blocks.view();
  void operator()() const { select_blocks_oracle(one_thread(), params, out); }
};

struct SparseCall {
  Problem problem = make_problem();
  SparseAttentionParams params = problem.sparse_params();
  Tensor out_tensor = Tensor(DType::kFloat32, {8, 4, 48});
  Tensor lse_tensor = Tensor(DType::kFloat32, {8, 4});
  TensorView out = out_tensor.view();
  TensorView lse = lse_tensor.view();
  void operator()() const { sparse_attention(one_thread(), params, out, lse); }
};

struct DenseCall {
  Problem problem = make_problem();
  DenseAttentionParams params = problem.dense_params();
  Tensor out_tensor = Tensor(DType::kFloat32, {8, 4, 48});
  Tensor lse_tensor = Tensor(DType::kFloat32, {8, 4});
  TensorView out = out_tensor.view();
  TensorView lse = lse_tensor.view();
  void operator()() const { dense_attention(one_thread(), params, out, lse); }
};

struct BackwardCall {
  Problem problem = make_problem();
  SparseAttentionParams params = problem.sparse_params();
  DenseAttentionParams dense_params = problem.dense_params();
  AttentionResult forward{Tensor(DType::kFloat32, {8, 4, 48}),
                          Tensor(DType::kFloat32, {8, 4})};  // contents do not matter
  Tensor dout = make_dout(problem);
  Tensor dlse = make_dlse(problem);
  AttentionSaved saved{forward.out.view(), forward.lse.view(), dout.view(), dlse.view()};
  Tensor dq = Tensor(DType::kFloat32, {8, 4, 32});
  Tensor dk = Tensor(DType::kFloat32, {75, 2, 32});
  Tensor dv = Tensor(DType::kFloat32, {75, 2, 48});
  AttentionGrads grads{dq.view(), dk.view(), dv.view()};
  void operator()() const { sparse_attention_backward(one_thread(), params, saved, grads); }
  void dense() const { dense_attention_backward(one_thread(), dense_params, saved, grads); }
};

struct KlCall {
  Problem problem = make_problem();
  IndexKlParams params = problem.kl_params(false);
  KlResult tensors = [] {
    KlResult result;
    result.lse_main = Tensor(DType::kFloat32, {8, 4});
    result.lse_index = Tensor(DType::kFloat32, {8, 2});
    result.teacher_norm = Tensor(DType::kFloat32, {8, 2});
    return result;
  }();
  IndexKlSaved saved = tensors.saved();
  Tensor dq_idx = Tensor(DType::kFloat32, {8, 2, 16});
  Tensor dk_idx = Tensor(DType::kFloat32, {75, 16});
  TensorView dq = dq_idx.view();
  TensorView dk = dk_idx.view();
  void operator()() const { index_kl(one_thread(), params, saved); }
  void backward() const { index_kl_backward(one_thread(), params, saved, 1, dq, dk); }
};

struct RecallCall {
  Problem problem = make_problem();
  SelectionRecallParams params = problem.recall_params();
  void operator()() const { selection_recall(one_thread(), params); }
};

// Breaks one thing of a fresh call and expects the error.
template <class Call>
void expect_refused(const std::string& op, const std::string& argument, const std::function<void(Call&)>& break_it) {
  Call call;
  break_it(call);
  expect_error(op, argument, [&] { call(); });
}

using I32 = std::vector<std::int32_t>;

// The rules of a batch, the same for every operator. `batch` is found in call.params.
template <class Call>
void expect_batch_rules(const std::string& op) {
  struct Row {
    const char* argument;
    I32 cu_seqlens_q, cu_seqlens_k;
  };
  const I32 q = {0, 5, 8};
  const I32 k = {0, 5, 75};
  for (const Row& row : std::vector<Row>{
           {"cu_seqlens_q", {}, k},          // empty
           {"cu_seqlens_q", {1, 5, 8}, k},   // not from 0
           {"cu_seqlens_q", {-1, 5, 8}, k},  //
           {"cu_seqlens_q", {0, 6, 5}, k},   // decreasing
           {"cu_seqlens_q", {0, 5, 9}, k},   // beyond the buffer
           {"cu_seqlens_q", {0, 5, 2147483647}, k},
           {"cu_seqlens_k", q, {}},
           {"cu_seqlens_k", q, {0, 75}},  // another number of sequences
           {"cu_seqlens_k", q, {0, 5, 6, 75}},
           {"cu_seqlens_k", q, {2, 5, 75}},
           {"cu_seqlens_k", q, {0, 5, 4}},
           {"cu_seqlens_k", q, {0, 5, 76}},
           {"cu_seqlens_k", q, {0, -5, 75}},
           {"cu_seqlens_q", q, {0, 4, 75}},  // five queries, four keys
       }) {
    SCOPED_TRACE(::testing::PrintToString(row.cu_seqlens_q) + " " + ::testing::PrintToString(row.cu_seqlens_k));
    expect_refused<Call>(op, row.argument, [&](Call& call) {
      call.params.batch.cu_seqlens_q = row.cu_seqlens_q;
      call.params.batch.cu_seqlens_k = row.cu_seqlens_k;
    });
  }
  for (const I32& positions : std::vector<I32>{{0, 1, 2, 3, 4, 67, 68},      // too few
                                               {0, 1, 2, 3, 5, 67, 68, 69},  // not below 5 keys
                                               {0, 1, 2, 3, 4, 67, 67, 69},  // not ascending
                                               {0, 2, 1, 3, 4, 67, 68, 69},
                                               {-1, 1, 2, 3, 4, 67, 68, 69},
                                               {0, 1, 2, 3, 4, 67, 68, 70}}) {
    SCOPED_TRACE(::testing::PrintToString(positions));
    expect_refused<Call>(op, "query_positions", [&](Call& call) { call.params.batch.query_positions = positions; });
  }
}

// The rules of one floating tensor with `rank` dimensions. `field` is a pointer to the member of params.
template <class Call, class Field>
void expect_tensor_rules(const std::string& op, const std::string& argument, Field field) {
  using Break = std::function<ConstTensorView(const ConstTensorView&)>;
  const std::vector<std::pair<const char*, Break>> breaks = {
      {"rank too small", [](const ConstTensorView& v) { return with_rank(v, v.rank - 1); }},
      {"rank too large", [](const ConstTensorView& v) { return with_rank(v, v.rank + 1); }},
      {"empty", [](const ConstTensorView&) { return ConstTensorView(); }},
      {"int32", [](const ConstTensorView& v) { return with_dtype(v, DType::kInt32); }},
      {"no data", [](const ConstTensorView& v) { return without_data(v); }},
      {"last dimension strided", [](const ConstTensorView& v) { return with_stride(v, v.rank - 1, 2); }},
      {"negative stride", [](const ConstTensorView& v) { return with_stride(v, 0, -1); }},
      {"negative extent", [](const ConstTensorView& v) { return with_size(v, 0, -1); }},
      {"dim 0", [](const ConstTensorView& v) { return with_size(v, v.rank - 1, 0); }},
      {"dim 8", [](const ConstTensorView& v) { return with_size(v, v.rank - 1, 8); }},
      {"dim 24", [](const ConstTensorView& v) { return with_size(v, v.rank - 1, 24); }},
  };
  for (const auto& [what, break_it] : breaks) {
    SCOPED_TRACE(argument + ": " + what);
    const auto& change = break_it;
    // A wrong dimension may be blamed on the tensor that it has to agree with, so those two accept any argument.
    Call call;
    call.params.*field = change(call.params.*field);
    try {
      call();
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      const std::string text = error.what();
      EXPECT_EQ(text.substr(0, op.size() + 2), op + ": ") << text;
      EXPECT_NE(text.find(argument), std::string::npos) << text;
    }
  }
}

template <class Call>
void expect_block_size_rules(const std::string& op) {
  for (const std::int64_t block_size : {0, -16, 1, 8, 24, 48, 512, 1 << 20}) {
    SCOPED_TRACE(block_size);
    expect_refused<Call>(op, "block_size", [&](Call& call) { call.params.block_size = block_size; });
  }
}

template <class Call>
void expect_selection_rules(const std::string& op) {
  for (const std::int64_t topk : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{65}, std::int64_t{1} << 40}) {
    SCOPED_TRACE(topk);
    expect_refused<Call>(op, "topk", [&](Call& call) { call.params.topk = topk; });
  }
  expect_refused<Call>(op, "local_blocks", [](Call& call) { call.params.local_blocks = -1; });
  expect_refused<Call>(op, "init_blocks", [](Call& call) { call.params.init_blocks = -1; });
  expect_refused<Call>(op, "blocks", [](Call& call) { call.out = resized(call.out, 2, 2); });
  expect_refused<Call>(op, "blocks", [](Call& call) { call.out = resized(call.out, 1, 7); });
  expect_refused<Call>(op, "blocks", [](Call& call) { call.out = resized(call.out, 0, 4); });
  expect_refused<Call>(op, "blocks", [](Call& call) { call.out.dtype = DType::kFloat32; });
  expect_refused<Call>(op, "blocks", [](Call& call) { call.out.rank = 2; });
  expect_refused<Call>(op, "blocks", [](Call& call) { call.out.data = nullptr; });
}

// Ids that no row may name. Row 7 is the last of the second sequence: position 69, blocks 0 to 4.
template <class Call>
void expect_block_id_rules(const std::string& op) {
  const auto with_ids = [&](std::int64_t row, std::vector<int> ids) {
    SCOPED_TRACE("row " + std::to_string(row) + ": " + ::testing::PrintToString(ids));
    for (const std::int64_t group : {0, 1}) {
      expect_refused<Call>(op, "blocks", [&](Call& call) {
        for (std::int64_t slot = 0; slot < 3; ++slot) {
          call.problem.blocks.set(ids[static_cast<std::size_t>(slot)], group, row, slot);
        }
      });
    }
  };
  with_ids(7, {0, 0, 4});  // duplicate
  with_ids(7, {1, 4, 4});
  with_ids(7, {2, 1, 4});  // unsorted
  with_ids(7, {0, 1, 5});  // invisible: the sequence ends
  with_ids(7, {0, 1, 2147483647});
  with_ids(7, {-2, 1, 4});  // not the sentinel
  with_ids(7, {0, 4, -2});
  with_ids(7, {-2147483647 - 1, 1, 4});
  with_ids(7, {-1, 1, 4});  // holes
  with_ids(7, {0, -1, 4});
  with_ids(0, {1, -1, -1});  // invisible: the future
  with_ids(4, {0, 1, -1});   // the next sequence's tokens
  expect_refused<Call>(op, "blocks",
                       [](Call& call) { call.params.blocks = with_dtype(call.params.blocks, DType::kFloat32); });
  expect_refused<Call>(op, "blocks", [](Call& call) { call.params.blocks = with_rank(call.params.blocks, 2); });
  expect_refused<Call>(op, "blocks", [](Call& call) { call.params.blocks = with_size(call.params.blocks, 0, 1); });
  expect_refused<Call>(op, "blocks", [](Call& call) { call.params.blocks = with_size(call.params.blocks, 1, 7); });
  expect_refused<Call>(op, "blocks", [](Call& call) { call.params.blocks = with_size(call.params.blocks, 2, 0); });
  expect_refused<Call>(op, "blocks", [](Call& call) { call.params.blocks = with_size(call.params.blocks, 2, 65); });
  expect_refused<Call>(op, "blocks", [](Call& call) { call.params.blocks = without_data(call.params.blocks); });
}

template <class Call>
void expect_scale_rules(const std::string& op) {
  for (const double scale : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    expect_refused<Call>(op, "scale", [&](Call& call) { call.params.scale = scale; });
  }
}

TEST(Validate, SelectBlocks) {
  const std::string op = "select_blocks";
  EXPECT_NO_THROW(SelectCall()());
  expect_batch_rules<SelectCall>(op);
  expect_block_size_rules<SelectCall>(op);
  expect_selection_rules<SelectCall>(op);
  expect_tensor_rules<SelectCall>(op, "q_idx", &SelectBlocksParams::q_idx);
  expect_tensor_rules<SelectCall>(op, "k_idx", &SelectBlocksParams::k_idx);
  expect_refused<SelectCall>(op, "k_idx", [](SelectCall& call) { call.params.k_idx.dtype = DType::kBFloat16; });
  expect_refused<SelectCall>(op, "q_idx",
                             [](SelectCall& call) { call.params.q_idx = with_size(call.params.q_idx, 1, 0); });
  expect_refused<SelectCall>(op, "q_idx",
                             [](SelectCall& call) { call.params.q_idx = with_size(call.params.q_idx, 2, 272); });
}

TEST(Validate, SelectBlocksOracle) {
  const std::string op = "select_blocks_oracle";
  EXPECT_NO_THROW(OracleCall()());
  expect_batch_rules<OracleCall>(op);
  expect_block_size_rules<OracleCall>(op);
  expect_selection_rules<OracleCall>(op);
  expect_scale_rules<OracleCall>(op);
  expect_tensor_rules<OracleCall>(op, "q", &OracleBlocksParams::q);
  expect_tensor_rules<OracleCall>(op, "k", &OracleBlocksParams::k);
}

TEST(Validate, SparseAttention) {
  const std::string op = "sparse_attention";
  EXPECT_NO_THROW(SparseCall()());
  expect_batch_rules<SparseCall>(op);
  expect_block_size_rules<SparseCall>(op);
  expect_block_id_rules<SparseCall>(op);
  expect_scale_rules<SparseCall>(op);
  expect_tensor_rules<SparseCall>(op, "q", &SparseAttentionParams::q);
  expect_tensor_rules<SparseCall>(op, "k", &SparseAttentionParams::k);
  expect_tensor_rules<SparseCall>(op, "v", &SparseAttentionParams::v);
  expect_refused<SparseCall>(op, "q", [](SparseCall& call) { call.params.q = with_size(call.params.q, 1, 3); });
  expect_refused<SparseCall>(op, "q", [](SparseCall& call) { call.params.q = with_size(call.params.q, 1, 0); });
  expect_refused<SparseCall>(op, "k", [](SparseCall& call) { call.params.k.dtype = DType::kFloat16; });
  expect_refused<SparseCall>(op, "v", [](SparseCall& call) { call.params.v.dtype = DType::kBFloat16; });
  expect_refused<SparseCall>(op, "v", [](SparseCall& call) { call.params.v = with_size(call.params.v, 0, 74); });
  expect_refused<SparseCall>(op, "v", [](SparseCall& call) { call.params.v = with_size(call.params.v, 1, 1); });
  expect_refused<SparseCall>(op, "out", [](SparseCall& call) { call.out = resized(call.out, 0, 7); });
  expect_refused<SparseCall>(op, "out", [](SparseCall& call) { call.out = resized(call.out, 1, 2); });
  expect_refused<SparseCall>(op, "out", [](SparseCall& call) { call.out = resized(call.out, 2, 32); });
  expect_refused<SparseCall>(op, "out", [](SparseCall& call) { call.out.dtype = DType::kFloat16; });
  expect_refused<SparseCall>(op, "lse", [](SparseCall& call) { call.lse = resized(call.lse, 0, 7); });
  expect_refused<SparseCall>(op, "lse", [](SparseCall& call) { call.lse.dtype = DType::kFloat16; });
  expect_refused<SparseCall>(op, "lse", [](SparseCall& call) { call.lse = TensorView(); });
}

TEST(Validate, DenseAttention) {
  const std::string op = "dense_attention";
  EXPECT_NO_THROW(DenseCall()());
  expect_batch_rules<DenseCall>(op);
  expect_scale_rules<DenseCall>(op);
  expect_tensor_rules<DenseCall>(op, "q", &DenseAttentionParams::q);
  expect_tensor_rules<DenseCall>(op, "k", &DenseAttentionParams::k);
  expect_tensor_rules<DenseCall>(op, "v", &DenseAttentionParams::v);
  expect_refused<DenseCall>(op, "out", [](DenseCall& call) { call.out = resized(call.out, 0, 7); });
  expect_refused<DenseCall>(op, "lse", [](DenseCall& call) { call.lse = resized(call.lse, 1, 2); });
}

TEST(Validate, SparseAttentionBackward) {
  const std::string op = "sparse_attention_backward";
  EXPECT_NO_THROW(BackwardCall()());
  expect_batch_rules<BackwardCall>(op);
  expect_block_id_rules<BackwardCall>(op);
  expect_tensor_rules<BackwardCall>(op, "q", &SparseAttentionParams::q);
  const auto refuse = [&](const char* argument, const std::function<void(BackwardCall&)>& break_it) {
    SCOPED_TRACE(argument);
    expect_refused<BackwardCall>(op, argument, break_it);
    BackwardCall call;
    break_it(call);
    expect_error("dense_attention_backward", argument, [&] { call.dense(); });
  };
  refuse("out", [](BackwardCall& call) { call.saved.out = with_size(call.saved.out, 0, 7); });
  refuse("out", [](BackwardCall& call) { call.saved.out = ConstTensorView(); });
  refuse("dout", [](BackwardCall& call) { call.saved.dout = with_size(call.saved.dout, 2, 32); });
  refuse("dout", [](BackwardCall& call) { call.saved.dout.dtype = DType::kFloat16; });
  refuse("lse", [](BackwardCall& call) { call.saved.lse = with_size(call.saved.lse, 1, 2); });
  refuse("dlse", [](BackwardCall& call) { call.saved.dlse = with_size(call.saved.dlse, 0, 5); });
  refuse("dlse", [](BackwardCall& call) { call.saved.dlse.dtype = DType::kBFloat16; });
  refuse("dq", [](BackwardCall& call) { call.grads.dq = resized(call.grads.dq, 1, 2); });
  refuse("dk", [](BackwardCall& call) { call.grads.dk = resized(call.grads.dk, 0, 70); });
  refuse("dv", [](BackwardCall& call) { call.grads.dv = resized(call.grads.dv, 2, 32); });
  refuse("dv", [](BackwardCall& call) { call.grads.dv.dtype = DType::kBFloat16; });
  refuse("dk", [](BackwardCall& call) { call.grads.dk = TensorView(); });
  refuse("batch", [](BackwardCall& call) { call.params.batch.is_paged = call.dense_params.batch.is_paged = true; });
}

TEST(Validate, IndexKl) {
  const std::string op = "index_kl";
  EXPECT_NO_THROW(KlCall()());
  EXPECT_NO_THROW(KlCall().backward());
  expect_batch_rules<KlCall>(op);
  expect_block_size_rules<KlCall>(op);
  expect_block_id_rules<KlCall>(op);
  expect_scale_rules<KlCall>(op);
  expect_refused<KlCall>(op, "index_scale",
                         [](KlCall& call) { call.params.index_scale = std::numeric_limits<double>::quiet_NaN(); });
  expect_tensor_rules<KlCall>(op, "q", &IndexKlParams::q);
  expect_tensor_rules<KlCall>(op, "k", &IndexKlParams::k);
  expect_tensor_rules<KlCall>(op, "q_idx", &IndexKlParams::q_idx);
  expect_tensor_rules<KlCall>(op, "k_idx", &IndexKlParams::k_idx);
  expect_refused<KlCall>(op, "q_idx", [](KlCall& call) { call.params.q_idx = with_size(call.params.q_idx, 0, 7); });
  expect_refused<KlCall>(op, "q_idx", [](KlCall& call) { call.params.q_idx = with_size(call.params.q_idx, 1, 1); });
  expect_refused<KlCall>(op, "k_idx", [](KlCall& call) { call.params.k_idx = with_size(call.params.k_idx, 0, 70); });
  expect_refused<KlCall>(op, "k_idx", [](KlCall& call) { call.params.k_idx.dtype = DType::kFloat16; });
  expect_refused<KlCall>(op, "lse_main", [](KlCall& call) { call.saved.lse_main = TensorView(); });
  expect_refused<KlCall>(op, "lse_index",
                         [](KlCall& call) { call.saved.lse_index = resized(call.saved.lse_index, 0, 7); });
  expect_refused<KlCall>(op, "teacher_norm", [](KlCall& call) { call.saved.teacher_norm.dtype = DType::kFloat16; });
  const auto refuse_backward = [](const char* argument, const std::function<void(KlCall&)>& break_it) {
    KlCall call;
    break_it(call);
    expect_error("index_kl_backward", argument, [&] { call.backward(); });
  };
  refuse_backward("dq_idx", [](KlCall& call) { call.dq = resized(call.dq, 2, 32); });
  refuse_backward("dk_idx", [](KlCall& call) { call.dk.dtype = DType::kFloat16; });
  refuse_backward("lse_main", [](KlCall& call) { call.saved.lse_main = resized(call.saved.lse_main, 1, 2); });
  refuse_backward("batch", [](KlCall& call) { call.params.batch.is_paged = true; });
}

TEST(Validate, SelectionRecall) {
  const std::string op = "selection_recall";
  EXPECT_NO_THROW(RecallCall()());
  expect_batch_rules<RecallCall>(op);
  expect_block_size_rules<RecallCall>(op);
  expect_block_id_rules<RecallCall>(op);
  expect_scale_rules<RecallCall>(op);
  expect_tensor_rules<RecallCall>(op, "q", &SelectionRecallParams::q);
  expect_tensor_rules<RecallCall>(op, "k", &SelectionRecallParams::k);
}

TEST(Validate, Pages) {
  const Problem problem = make_problem();
  // Sequence 0 has one page of 32, sequence 1 three; max_pages is five, there are seven pages.
  const auto refuse = [&](const char* argument, const std::function<void(PagedProblem&)>& break_it) {
    PagedProblem paged(problem, 32);
    break_it(paged);
    expect_error("select_blocks", argument, [&] { run_select(one_thread(), paged.select_params()); });
    expect_error("sparse_attention", argument, [&] { run_sparse(one_thread(), paged.sparse_params()); });
    expect_error("dense_attention", argument, [&] { run_dense(one_thread(), paged.dense_params()); });
    expect_error("index_kl", argument, [&] { run_kl(one_thread(), paged.kl_params(false)); });
    expect_error("selection_recall", argument, [&] { selection_recall(one_thread(), paged.recall_params()); });
  };
  {
    const PagedProblem paged(problem, 32);
    EXPECT_NO_THROW(run_sparse(one_thread(), paged.sparse_params()));
    ASSERT_EQ(paged.max_pages, 5);
    ASSERT_EQ(paged.k.size(0), 7);
  }
  refuse("page_table", [](PagedProblem& paged) { paged.page_table[0] = -1; });  // a used entry
  refuse("page_table", [](PagedProblem& paged) { paged.page_table[7] = -1; });
  refuse("page_table", [](PagedProblem& paged) { paged.page_table[5] = 7; });
  refuse("page_table", [](PagedProblem& paged) { paged.page_table[5] = 2147483647; });
  refuse("page_table", [](PagedProblem& paged) { paged.page_table[5] = -2147483647 - 1; });
  refuse("page_table", [](PagedProblem& paged) { paged.page_table.pop_back(); });
  refuse("page_table", [](PagedProblem& paged) { paged.seqlens_k[1] = 161; });  // six pages in rows of five
  refuse("page_table", [](PagedProblem& paged) { paged.seqlens_k[1] = 2147483647; });
  refuse("page_table", [](PagedProblem& paged) { paged.seqlens_k[1] = 100; });  // the fourth page is -1
  refuse("page_table", [](PagedProblem& paged) { paged.max_pages = -1; });
  refuse("seqlens_k", [](PagedProblem& paged) { paged.seqlens_k.pop_back(); });
  refuse("seqlens_k", [](PagedProblem& paged) { paged.seqlens_k[0] = -1; });
  refuse("cu_seqlens_q", [](PagedProblem& paged) { paged.seqlens_k[1] = 2; });  // three queries
  // Page sizes that no block fits: refused, except by dense attention, which has no blocks.
  for (const std::int64_t page : {8, 24, 40}) {
    SCOPED_TRACE("page of " + std::to_string(page));
    const PagedProblem paged(problem, page);
    expect_error("select_blocks", "k_idx", [&] { run_select(one_thread(), paged.select_params()); });
    expect_error("sparse_attention", "k", [&] { run_sparse(one_thread(), paged.sparse_params()); });
    EXPECT_NO_THROW(run_dense(one_thread(), paged.dense_params()));
  }
  // Key-side tensors that disagree about the pages.
  const PagedProblem paged(problem, 32);
  const PagedProblem other(problem, 64);
  SparseAttentionParams params = paged.sparse_params();
  params.v = other.v.view();
  expect_error("sparse_attention", "v", [&] { run_sparse(one_thread(), params); });
  params = paged.sparse_params();
  params.k = problem.k.view();  // packed keys in a paged batch
  expect_error("sparse_attention", "k", [&] { run_sparse(one_thread(), params); });
}

TEST(Validate, ErrorsOfTheWorkspace) {
  // A limit no plan fits: an error with the bytes, not a crash.
  const Problem problem = make_problem();
  Context context;
  context.backend = Backend::kCpu;
  context.workspace_limit = 1;
  EXPECT_THROW(run_select(context, problem.select_params()), Error);
  EXPECT_THROW(run_sparse(context, problem.sparse_params()), Error);
  EXPECT_THROW(run_dense(context, problem.dense_params()), Error);
  EXPECT_THROW(run_kl(context, problem.kl_params(true)), Error);
  EXPECT_THROW(selection_recall(context, problem.recall_params()), Error);
}

TEST(Validate, CallsOnAGpu) {
  const Problem problem = make_problem();
  Context context;
  context.backend = Backend::kCuda;
  if (!cuda::is_built()) {  // every operator, and every size, says that the backend is missing
    expect_error("select_blocks", "backend", [&] { run_select(context, problem.select_params()); });
    expect_error("sparse_attention", "backend", [&] { run_sparse(context, problem.sparse_params()); });
    expect_error("dense_attention", "backend", [&] { run_dense(context, problem.dense_params()); });
    expect_error("index_kl", "backend", [&] { run_kl(context, problem.kl_params(true)); });
    expect_error("selection_recall", "backend", [&] { selection_recall(context, problem.recall_params()); });
    expect_error("sparse_attention", "backend", [&] { sparse_attention_workspace(context, problem.sparse_params()); });
    return;
  }
  // Shapes are refused as on the host, before anything is asked of a device; so is a workspace that is not there, with
  // the bytes that it needs.
  SparseAttentionParams params = problem.sparse_params();
  params.block_size = 24;
  expect_error("sparse_attention", "block_size", [&] { run_sparse(context, params); });
  expect_error("sparse_attention", "block_size", [&] { sparse_attention_workspace(context, params); });
  expect_error("sparse_attention", "workspace", [&] { run_sparse(context, problem.sparse_params()); });
  expect_error("select_blocks", "workspace", [&] { run_select(context, problem.select_params()); });
  try {
    run_sparse(context, problem.sparse_params());
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    const std::size_t bytes = sparse_attention_workspace(context, problem.sparse_params());
    EXPECT_NE(std::string(error.what()).find(std::to_string(bytes)), std::string::npos) << error.what();
  }
}

TEST(Validate, WorkspacesOfTheHostBackends) {
  // They need none, and the sizes read shapes only: null pointers will do, wrong shapes will not.
  const Problem problem = make_problem();
  SparseAttentionParams params = problem.sparse_params();
  params.q.data = params.k.data = params.v.data = params.blocks.data = nullptr;
  params.batch.cu_seqlens_q = {static_cast<const std::int32_t*>(nullptr), params.batch.cu_seqlens_q.size()};
  params.batch.cu_seqlens_k = {static_cast<const std::int32_t*>(nullptr), params.batch.cu_seqlens_k.size()};
  for (const Backend backend : {Backend::kAuto, Backend::kReference, Backend::kCpu}) {
    Context context;
    context.backend = backend;
    EXPECT_EQ(sparse_attention_workspace(context, params), 0U);
    EXPECT_EQ(sparse_attention_backward_workspace(context, params), 0U);
    EXPECT_EQ(select_blocks_workspace(context, problem.select_params()), 0U);
    EXPECT_EQ(index_kl_workspace(context, problem.kl_params(false)), 0U);
    SparseAttentionParams wrong = params;
    wrong.block_size = 24;
    expect_error("sparse_attention", "block_size", [&] { sparse_attention_workspace(context, wrong); });
    expect_error("sparse_attention", "q", [&] { run_sparse(context, params); });  // which does read
  }
}

TEST(Validate, ScalarsInTensors) {
  // The forms that graphs on a GPU need write the same numbers on every backend.
  const Problem problem = make_problem();
  const Context context = one_thread();
  float kl = -1;
  float recalls[2] = {-1, -1};
  const std::int64_t rows = problem.kl_params(true).q.size(0);
  const std::int64_t query_heads = problem.kl_params(true).q.size(1);
  const std::int64_t kv_heads = problem.kl_params(true).q_idx.size(1);
  std::vector<float> lse_main(static_cast<std::size_t>(rows * query_heads)), lse_index(lse_main), norm(lse_main);
  const IndexKlSaved saved{make_view(lse_main.data(), {rows, query_heads}),
                           make_view(lse_index.data(), {rows, kv_heads}), make_view(norm.data(), {rows, kv_heads})};
  index_kl(context, problem.kl_params(true), saved, make_view(&kl, {1}));
  EXPECT_EQ(kl, index_kl(context, problem.kl_params(true), saved));
  selection_recall(context, problem.recall_params(), make_view(recalls, {2}));
  const SelectionRecall recall = selection_recall(context, problem.recall_params());
  EXPECT_EQ(recalls[0], static_cast<float>(recall.block_recall));
  EXPECT_EQ(recalls[1], static_cast<float>(recall.score_recall));
  expect_error("index_kl", "kl", [&] { index_kl(context, problem.kl_params(true), saved, make_view(recalls, {2})); });
}

TEST(Validate, BackendsByName) {
  EXPECT_EQ(parse_backend("auto"), Backend::kAuto);
  EXPECT_EQ(parse_backend("reference"), Backend::kReference);
  EXPECT_EQ(parse_backend("cpu"), Backend::kCpu);
  EXPECT_EQ(parse_backend("cuda"), Backend::kCuda);
  for (const Backend backend : {Backend::kAuto, Backend::kReference, Backend::kCpu, Backend::kCuda}) {
    EXPECT_EQ(parse_backend(backend_name(backend)), backend);
  }
  try {
    parse_backend("gpu");
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("gpu"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("reference"), std::string::npos);
  }
  EXPECT_FALSE(std::string(version()).empty());
}

TEST(Validate, ViewsOfTooHighRank) {
  float value = 0;
  EXPECT_THROW(make_view(&value, {1, 1, 1, 1, 1}), Error);
  EXPECT_THROW(make_view(&value, {-1}), Error);
}

}  // namespace
}  // namespace msa::testing
