// SPDX-License-Identifier: Apache-2.0
// Context::workspace_limit on a GPU: operators that work in chunks ask for no more than the limit and give the same
// bits; a limit that the least of an operator does not fit is an error that names the bytes, and those bytes do.
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <regex>
#include <string>
#include <vector>

#include "msa/error.h"
#include "msa/msa.h"
#include "src/cuda/chunks.h"
#include "tests/unit/support/problem.h"

namespace msa::testing {
namespace {

using cuda::largest_chunk;

using Bytes = std::vector<std::byte>;

TEST(WorkspaceLimit, TheLargestChunkThatFits) {
  const auto bytes_of = [](std::int64_t chunk) { return static_cast<std::size_t>(100 + 8 * chunk); };
  EXPECT_EQ(largest_chunk(1000, 1, 0, bytes_of), 1000);
  EXPECT_EQ(largest_chunk(1000, 1, 8100, bytes_of), 1000);
  EXPECT_EQ(largest_chunk(1000, 1, 8099, bytes_of), 999);
  EXPECT_EQ(largest_chunk(1000, 1, 108, bytes_of), 1);
  EXPECT_EQ(largest_chunk(1000, 1, 7, bytes_of), 1) << "the least, for the front door to refuse";
  EXPECT_EQ(largest_chunk(1000, 256, 8099, bytes_of), 768);
  EXPECT_EQ(largest_chunk(1000, 256, 100 + 8 * 512, bytes_of), 512);
  EXPECT_EQ(largest_chunk(200, 256, 1, bytes_of), 200);
  EXPECT_EQ(largest_chunk(0, 256, 1, bytes_of), 0);
}

// An operator's calls: what it asks for, and a run that gives all its output bytes.
struct Operator {
  std::string name;
  std::function<std::size_t(const Context&)> workspace;
  std::function<Bytes(const Context&)> run;
};

template <class... Tensors>
Bytes bytes_of(const Tensors&... tensors) {
  Bytes bytes;
  for (const Bytes& more : {tensors.bytes()...}) bytes.insert(bytes.end(), more.begin(), more.end());
  return bytes;
}
template <class T>
Bytes value_bytes(const T& value) {
  const auto* first = reinterpret_cast<const std::byte*>(&value);
  return Bytes(first, first + sizeof(value));
}
Bytes bytes_of(const AttentionResult& r) { return bytes_of(r.out, r.lse); }
Bytes bytes_of(const AttentionGradients& r) { return bytes_of(r.dq, r.dk, r.dv); }
Bytes bytes_of(const KlGradients& r) { return bytes_of(r.dq_idx, r.dk_idx); }

constexpr std::size_t kScratch = std::size_t{16} << 20;

/// Backward calls take what the forward left: that one without a limit, so that only theirs is asked about.
Context unlimited(Context context) {
  context.workspace_limit = 0;
  context.workspace_bytes = kScratch;
  return context;
}

std::vector<Operator> operators(const Problem& p) {
  using C = const Context&;
  std::vector<Operator> all;
  const auto add = [&](const char* name, auto workspace, auto run) { all.push_back({name, workspace, run}); };
  add(
      "select_blocks", [&](C c) { return select_blocks_workspace(c, p.select_params()); },
      [&](C c) { return bytes_of(run_select(c, p.select_params())); });
  add(
      "select_blocks_oracle", [&](C c) { return select_blocks_oracle_workspace(c, p.oracle_params()); },
      [&](C c) { return bytes_of(run_oracle(c, p.oracle_params())); });
  add(
      "sparse_attention", [&](C c) { return sparse_attention_workspace(c, p.sparse_params()); },
      [&](C c) { return bytes_of(run_sparse(c, p.sparse_params())); });
  add(
      "dense_attention", [&](C c) { return dense_attention_workspace(c, p.dense_params()); },
      [&](C c) { return bytes_of(run_dense(c, p.dense_params())); });
  add(
      "sparse_attention_backward", [&](C c) { return sparse_attention_backward_workspace(c, p.sparse_params()); },
      [&](C c) {
        const AttentionResult forward = run_sparse(unlimited(c), p.sparse_params());
        return bytes_of(run_sparse_backward(c, p.sparse_params(), forward, make_dout(p), nullptr));
      });
  add(
      "dense_attention_backward", [&](C c) { return dense_attention_backward_workspace(c, p.dense_params()); },
      [&](C c) {
        const AttentionResult forward = run_dense(unlimited(c), p.dense_params());
        return bytes_of(run_dense_backward(c, p.dense_params(), forward, make_dout(p), nullptr));
      });
  add(
      "index_kl", [&](C c) { return index_kl_workspace(c, p.kl_params(false)); },
      [&](C c) { return value_bytes(run_kl(c, p.kl_params(false)).value); });
  add(
      "index_kl_backward", [&](C c) { return index_kl_backward_workspace(c, p.kl_params(false)); },
      [&](C c) {
        KlResult forward = run_kl(unlimited(c), p.kl_params(false));
        return bytes_of(run_kl_backward(c, p.kl_params(false), forward, 1.0f));
      });
  add(
      "selection_recall", [&](C c) { return selection_recall_workspace(c, p.recall_params()); },
      [&](C c) { return value_bytes(selection_recall(c, p.recall_params())); });
  return all;
}

// Emulated: host memory is device memory.
class OperatorLimits : public ::testing::TestWithParam<DType> {
 protected:
  OperatorLimits() : scratch_(std::aligned_alloc(kWorkspaceAlignment, kScratch), &std::free) {}
  Context context(std::size_t limit) const {
    Context result;
    result.backend = Backend::kCuda;
    result.workspace_limit = limit;
    result.workspace = scratch_.get();
    result.workspace_bytes = kScratch;
    return result;
  }
  std::unique_ptr<void, void (*)(void*)> scratch_;
};
INSTANTIATE_TEST_SUITE_P(PlainAndFast, OperatorLimits, ::testing::Values(DType::kFloat32, DType::kBFloat16),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

TEST_P(OperatorLimits, TheErrorNamesTheLeastAndTheLeastWorks) {
  const Problem problem({{4, 2, 64, 64, 64, 64, 3}, {{9, 300}, {3, 70}}, GetParam(), GetParam(), Layout::kContiguous});
  bool works_in_chunks = false;
  for (const Operator& op : operators(problem)) {
    SCOPED_TRACE(op.name);
    const std::size_t wanted = op.workspace(context(0));
    EXPECT_EQ(op.workspace(context(wanted)), wanted);
    std::string message;
    try {
      op.workspace(context(1));
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      message = error.what();
    }
    EXPECT_EQ(message.find(op.name + ": workspace_limit: "), 0U) << message;
    std::smatch found;
    ASSERT_TRUE(std::regex_search(message, found, std::regex("at least ([0-9]+)"))) << message;
    const std::size_t least = std::stoul(found[1]);
    EXPECT_LE(least, wanted);
    works_in_chunks = works_in_chunks || least < wanted;
    EXPECT_EQ(op.workspace(context(least)), least);
    EXPECT_THROW(op.workspace(context(least - 1)), Error);
    EXPECT_THROW(op.run(context(least - 1)), Error);
    const Bytes whole = op.run(context(0));
    EXPECT_EQ(op.run(context(least)), whole) << "the least it can do with changes no bit";
    Context tight = context(least);
    tight.workspace_bytes = least;
    EXPECT_EQ(op.run(tight), whole);
  }
  if (GetParam() == DType::kBFloat16) {
    EXPECT_TRUE(works_in_chunks) << "the fast path of sparse attention, at least";
  }
}

TEST(WorkspaceLimit, PlansOfChunkedOperatorsStayInside) {
  // The paper's layer, a million tokens; pointers are not followed.
  const auto tensor = [](std::initializer_list<std::int64_t> shape) {
    return make_view(static_cast<const void*>(nullptr), DType::kBFloat16, shape);
  };
  constexpr std::int64_t kTokens = std::int64_t{1} << 20;
  const Batch batch =
      Batch::packed({static_cast<const std::int32_t*>(nullptr), 2}, {static_cast<const std::int32_t*>(nullptr), 2});
  SelectBlocksParams select;
  select.q_idx = tensor({kTokens, 4, 128}), select.k_idx = tensor({kTokens, 128});
  select.batch = batch;
  SparseAttentionParams attend;
  attend.q = tensor({kTokens, 64, 128}), attend.k = attend.v = tensor({kTokens, 4, 128});
  attend.blocks = make_view(static_cast<const std::int32_t*>(nullptr), {4, kTokens, 16});
  attend.batch = batch;
  Context context;
  context.backend = Backend::kCuda;
  std::size_t last_select = 0, last_attend = 0;
  for (const int shift : {27, 28, 29}) {
    context.workspace_limit = std::size_t{1} << shift;
    const std::size_t for_select = select_blocks_workspace(context, select);
    const std::size_t for_attend = sparse_attention_workspace(context, attend);
    EXPECT_LE(std::max(for_select, for_attend), context.workspace_limit);
    EXPECT_GE(for_select, last_select);
    EXPECT_GT(for_attend, last_attend) << "more memory, larger chunks";
    EXPECT_GT(for_attend, context.workspace_limit * 9 / 10) << "and no more of them than must be";
    last_select = for_select, last_attend = for_attend;
  }
}

}  // namespace
}  // namespace msa::testing
