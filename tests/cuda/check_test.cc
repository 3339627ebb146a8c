// SPDX-License-Identifier: Apache-2.0
// The check of device arrays, run by the emulator: good ones pass, and every single broken rule raises the flag.
#include "src/cuda/check.cuh"

#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "msa/msa.h"

namespace msa::cuda {
namespace {

// Two sequences, 5 of 70 and 3 of 40 keys, one inert row; blocks of 16, two heads.
struct Arrays {
  std::vector<std::int32_t> cu_q = {0, 5, 8}, cu_k = {0, 70, 110}, lengths = {70, 40}, positions;
  std::vector<std::int32_t> table = {3, 0, 2, -1, 1, 4, -1, -1};  // pages of 32
  std::vector<std::int32_t> ids = std::vector<std::int32_t>(2 * 9 * 3, -1);
  bool paged = false;

  Arrays() {
    for (std::size_t row = 0; row < 18; ++row) ids[3 * row] = 0, ids[3 * row + 1] = 2;
  }
};

bool holds(const Arrays& arrays, unsigned blocks) {
  Batch batch = arrays.paged ? Batch::paged(arrays.cu_q, arrays.table, 4, arrays.lengths)
                             : Batch::packed(arrays.cu_q, arrays.cu_k);
  batch.query_positions = arrays.positions;
  Contents contents;
  contents.batch = &batch;
  contents.query_rows = 9;
  contents.key_rows = arrays.paged ? 5 : 110;
  contents.page = arrays.paged ? 32 : 0;
  contents.blocks = make_view(arrays.ids.data(), {2, 9, 3});
  contents.block_size = 16;
  std::int32_t broken = 0;
  launch(dim3(blocks), dim3(32), 0, nullptr, check_contents, check_arguments(contents, &broken), check_items(contents));
  return broken == 0;
}

TEST(CudaCheck, FindsEveryBrokenRule) {
  using Change = std::function<void(Arrays&)>;
  const std::vector<Change> good = {[](Arrays&) {}, [](Arrays& a) { a.paged = true; },
                                    [](Arrays& a) {
                                      a.positions = {0, 40, 41, 50, 69, 33, 34, 39, -5};
                                      a.ids.assign(54, -1);
                                    },
                                    [](Arrays& a) { a.ids[3 * 8] = 999; },  // an inert row's
                                    [](Arrays& a) { a.ids[1] = -1; }};
  const std::vector<Change> bad = {[](Arrays& a) { a.cu_q[0] = 1; },
                                   [](Arrays& a) {
                                     a.cu_q = {0, 8, 5};
                                   },
                                   [](Arrays& a) { a.cu_q[2] = 10; },
                                   [](Arrays& a) { a.cu_k[0] = -1; },
                                   [](Arrays& a) { a.cu_k[2] = 111; },
                                   [](Arrays& a) {
                                     a.cu_k = {0, 4, 110};
                                   },  // fewer keys than queries
                                   [](Arrays& a) { a.paged = true, a.lengths[0] = -1; },
                                   [](Arrays& a) { a.paged = true, a.lengths[0] = 129; },
                                   [](Arrays& a) { a.paged = true, a.table[1] = 5; },
                                   [](Arrays& a) { a.paged = true, a.table[2] = -1; },
                                   [](Arrays& a) { a.positions = {0, 40, 40, 50, 69, 33, 34, 39, 0}; },
                                   [](Arrays& a) { a.positions = {0, 40, 41, 50, 70, 33, 34, 39, 0}; },
                                   [](Arrays& a) { a.ids[1] = 5; },  // not visible: row 0 stands at 65 and sees 0 to 4
                                   [](Arrays& a) { a.ids[1] = 0; },  // twice
                                   [](Arrays& a) { a.ids[0] = -7; },
                                   [](Arrays& a) { a.ids[0] = 3; },   // descending
                                   [](Arrays& a) { a.ids[0] = -1; },  // a valid id behind -1
                                   [](Arrays& a) { a.ids[3 * 16 + 1] = 3; }};
  for (const unsigned blocks : {1u, 3u}) {
    for (std::size_t i = 0; i < good.size(); ++i) {
      Arrays arrays;
      good[i](arrays);
      EXPECT_TRUE(holds(arrays, blocks)) << "good " << i;
    }
    for (std::size_t i = 0; i < bad.size(); ++i) {
      Arrays arrays;
      bad[i](arrays);
      EXPECT_FALSE(holds(arrays, blocks)) << "bad " << i;
    }
  }
}

}  // namespace
}  // namespace msa::cuda
