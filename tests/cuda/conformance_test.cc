// SPDX-License-Identifier: Apache-2.0
// `msa check --backend cuda` without a GPU: the checks themselves, tensors staged through DeviceBuffer, on the emulated
// backend: that they pass there and cover every operator, and that nothing of the host's memory reaches a call.
#include "src/conformance/conformance.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "src/conformance/staging.h"

namespace msa::conformance {
namespace {

Context emulated() {
  Context context;
  context.backend = Backend::kCuda;
  return context;
}

void expect_passed(const std::vector<CheckResult>& results) {
  for (const CheckResult& result : results) {
    EXPECT_TRUE(result.passed) << result.op << " (" << result.geometry << "): error " << result.error << ", allowed "
                               << result.allowed;
  }
}

TEST(Conformance, TheEmulatedDevicePasses) {
  // One geometry of the fast path (in 16-bit types), one of the plain kernels.
  int geometries = 0;
  const auto results = run_conformance(emulated(), {{2, 1, 64, 64, 64, 64, 2}, {3, 3, 16, 32, 16, 16, 3}},
                                       [&](auto&&) { ++geometries; });
  expect_passed(results);
  EXPECT_EQ(geometries, 1 + 2 * 3);
  std::set<std::string> ops;
  for (const CheckResult& result : results) ops.insert(result.op);
  for (const char* op : {"topk_blocks", "select_blocks", "select_blocks_oracle", "sparse_attention.out",
                         "sparse_attention.dk", "dense_attention.lse", "dense_attention.dv", "index_kl(blocks)",
                         "index_kl(prefix).dk_idx", "selection_recall.score", "bits: run again",
                         "bits: each sequence alone", "bits: prefill in chunks", "bits: keys in pages"}) {
    EXPECT_TRUE(ops.count(op) == 1) << op;
  }
  std::int64_t summed = 0;
  for (const OpSummary& summary : summarize(results)) summed += summary.passed + summary.failed;
  EXPECT_EQ(summed, static_cast<std::int64_t>(results.size()));
}

TEST(Conformance, StagedTensorsAreCopies) {
  const std::vector<float> host = {1, 2, 3};
  std::vector<float> written(3, 0);
  Staging staging(emulated());
  const ConstTensorView in = staging.input(make_view(host.data(), {3}));
  const TensorView out = staging.output(make_view(written.data(), {3}));
  EXPECT_NE(static_cast<const void*>(in.data), host.data());
  const auto* values = reinterpret_cast<const float*>(in.data);
  auto* results = reinterpret_cast<float*>(out.data);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(values[i], host[static_cast<std::size_t>(i)]);
    EXPECT_TRUE(std::isnan(results[i])) << "outputs start poisoned";
    results[i] = values[i] * 2;
  }
  EXPECT_EQ(written[0], 0);
  staging.fetch();
  EXPECT_EQ(written, (std::vector<float>{2, 4, 6}));
  const Context context = staging.with_workspace(512);
  EXPECT_EQ(context.workspace_bytes, 512U);
  EXPECT_EQ(static_cast<const unsigned char*>(context.workspace)[511], 0xff);
}

}  // namespace
}  // namespace msa::conformance
