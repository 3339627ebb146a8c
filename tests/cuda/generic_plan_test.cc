// SPDX-License-Identifier: Apache-2.0
// Plans of the generic CUDA path: grids cover the work whatever the lengths are, workspace and shared memory are what
// the page says and what a device has, and nothing but shapes is read.
#include <gtest/gtest.h>

#include <vector>

#include "src/cuda/generic/attention.h"
#include "src/cuda/generic/block_mass.h"
#include "src/cuda/generic/index_kl.h"
#include "src/cuda/generic/select_blocks.h"

namespace msa::cuda::generic {
namespace {

constexpr std::size_t kSharedLimit = 227 * 1024;  // of a block of threads on compute capability 9.0

// Pointers that nobody may follow.
template <class T>
T* nowhere() {
  return reinterpret_cast<T*>(std::uintptr_t{64});
}
ConstTensorView input(DType dtype, std::initializer_list<std::int64_t> shape) {
  return make_view(static_cast<const void*>(nowhere<std::byte>()), dtype, shape);
}
TensorView output(DType dtype, std::initializer_list<std::int64_t> shape) {
  return make_view(static_cast<void*>(nowhere<std::byte>()), dtype, shape);
}
Batch packed_nowhere(std::size_t sequences) {
  return Batch::packed({nowhere<const std::int32_t>(), sequences + 1}, {nowhere<const std::int32_t>(), sequences + 1});
}

TEST(GenericPlan, KeyTilesHaveSlotsWhateverTheLengths) {
  for (const int tile : {16, 32}) {
    for (const std::vector<int>& lengths :
         {std::vector<int>{0}, {1}, {31, 33}, {15, 17, 1, 0, 0, 64}, {0, 0, 5}, {32, 32, 32}, {100, 1, 1, 1, 1, 1}}) {
      int begin = 0;
      for (std::size_t s = 0; s < lengths.size(); ++s) {
        const int end = begin + lengths[s];
        const auto at = static_cast<int>(s);
        const int first = begin / tile + at;
        const int behind = end / tile + at + 1;
        EXPECT_GE(behind - first, (lengths[s] + tile - 1) / tile) << "tile " << tile << " sequence " << s;
        begin = end;
        if (s + 1 == lengths.size()) {
          EXPECT_EQ(behind, key_tile_slots(end, static_cast<std::int64_t>(lengths.size()), tile));
        }
      }
    }
  }
}

TEST(GenericPlan, GridsFollowShapes) {
  SparseAttentionParams params;
  params.q = input(DType::kBFloat16, {1000, 14, 64});
  params.k = input(DType::kBFloat16, {3000, 2, 64});
  params.v = input(DType::kBFloat16, {3000, 2, 80});
  params.blocks = input(DType::kInt32, {2, 1000, 5});
  params.block_size = 16;
  params.scale = 0.125;
  params.batch = packed_nowhere(3);
  const AttendPlan forward =
      plan_attention(params, output(DType::kBFloat16, {1000, 14, 80}), output(DType::kFloat32, {1000, 14}));
  EXPECT_EQ(forward.shape.grid_x, 1000);
  EXPECT_EQ(forward.shape.grid_y, 2 * 2) << "7 heads a group, 4 warps";
  EXPECT_EQ(forward.shape.threads, 128);
  EXPECT_EQ(forward.args.blocks.key_tile, 16);
  EXPECT_EQ(attention_backward_workspace(params), 1000u * 14 * 4);
  const AttendBackwardPlan backward = plan_attention_backward(params, {}, nowhere<void>(), {});
  EXPECT_EQ(backward.keys.grid_x, 3000 / 16 + 3);
  EXPECT_EQ(backward.keys.grid_y, 2);
  params.blocks = {};
  EXPECT_EQ(plan_attention_backward(params, {}, nowhere<void>(), {}).keys.grid_x, 3000 / 32 + 3);
}

TEST(GenericPlan, NoRowsIsNoLaunch) {
  SelectBlocksParams params;
  params.q_idx = input(DType::kFloat32, {0, 3, 16});
  params.k_idx = input(DType::kFloat32, {0, 16});
  params.batch = packed_nowhere(1);
  EXPECT_EQ(plan_select_blocks(params, output(DType::kInt32, {3, 0, 16})).shape.grid_x, 0);
}

TEST(GenericPlan, TheWidestGeometryFitsADevice) {
  SparseAttentionParams attention;
  attention.q = input(DType::kFloat32, {10, 256, 256});
  attention.k = input(DType::kFloat32, {10, 2, 256});
  attention.v = input(DType::kFloat32, {10, 2, 256});
  attention.block_size = 256;
  attention.scale = 1;
  attention.batch = packed_nowhere(1);
  EXPECT_LE(plan_attention(attention, {}, {}).shape.shared_bytes, kSharedLimit);
  const AttendBackwardPlan backward = plan_attention_backward(attention, {}, nowhere<void>(), {});
  EXPECT_LE(backward.queries.shared_bytes, kSharedLimit);
  EXPECT_LE(backward.keys.shared_bytes, kSharedLimit);
  IndexKlParams kl;
  kl.q = attention.q;
  kl.k = attention.k;
  kl.q_idx = input(DType::kFloat32, {10, 2, 256});
  kl.k_idx = input(DType::kFloat32, {10, 256});
  kl.scale = kl.index_scale = 1;
  kl.batch = attention.batch;
  EXPECT_LE(plan_index_kl(kl, {}, nowhere<void>(), nowhere<float>()).rows.shared_bytes, kSharedLimit);
  EXPECT_LE(plan_index_kl_backward(kl, {}, nowhere<float>(), {}, {}).keys.shared_bytes, kSharedLimit);
  EXPECT_EQ(index_kl_workspace(kl), 10u * 2 * 8);
}

TEST(GenericPlan, WorkspaceDoesNotGrowWithKeys) {
  OracleBlocksParams oracle;
  oracle.q = input(DType::kBFloat16, {100, 8, 64});
  SelectionRecallParams recall;
  recall.q = oracle.q;
  recall.blocks = input(DType::kInt32, {2, 100, 16});
  for (const std::int64_t keys : {std::int64_t{1000}, std::int64_t{1} << 30}) {
    oracle.k = recall.k = input(DType::kBFloat16, {keys, 2, 64});
    EXPECT_EQ(select_blocks_oracle_workspace(oracle), 3328u) << "100 * 8 * 4, in pieces of 256";
    EXPECT_EQ(selection_recall_workspace(recall), 3328u + 100 * 2 * 24);
  }
}

}  // namespace
}  // namespace msa::cuda::generic
