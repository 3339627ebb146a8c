// SPDX-License-Identifier: Apache-2.0
// Block selection by the CUDA kernels in the emulator: equal to the reference wherever arithmetic is exact, right
// within rounding elsewhere, the same bits whatever the schedule, chunk, layout and order of work; and its plan.
#include "src/cuda/select_blocks.h"

#include <gtest/gtest.h>

#include <limits>
#include <utility>

#include "src/cuda/screen_blocks.cu"
#include "src/cuda/select_blocks.cu"
#include "tests/cuda/select_support.h"
#include "tests/unit/support/problem.h"
#include "tests/unit/support/selection.h"
#include "tests/unit/support/targets.h"
#include "tests/unit/support/tolerance.h"

namespace msa::cuda {
namespace {

using namespace msa::testing;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr SelectSchedule kSchedules[] = {SelectSchedule::kFewRows, SelectSchedule::kManyRows};

const std::vector<Case> kCases = {
    make_case(1, 64, 64, 1, {{1, 1}, {1, 200}, {3, 64}, {2, 129}}, DType::kBFloat16),
    make_case(4, 128, 128, 2, {{1, 128}, {1, 641}, {2, 513}, {0, 300}, {16, 1030}}, DType::kBFloat16,
              Layout::kContiguous, 3),
    make_case(3, 128, 64, 3, {{90, 700}, {5, 5}, {30, 400}}, DType::kFloat16, Layout::kHeadsFirst, 1),
    make_case(5, 64, 128, 2, {{0, 0}, {60, 800}, {1, 1}, {7, 900}}, DType::kFloat16),
    make_case(2, 64, 64, 5, {{300, 1000}}, DType::kBFloat16, Layout::kHeadsFirst),
    make_case(70, 64, 64, 2, {{2, 400}}, DType::kBFloat16),
};

class CudaSelect : public ::testing::TestWithParam<std::size_t> {
 protected:
  const Case& c() const { return kCases[GetParam()]; }
};
INSTANTIATE_TEST_SUITE_P(Cases, CudaSelect, ::testing::Range(std::size_t{0}, kCases.size()));

TEST_P(CudaSelect, EqualsTheReferenceOnExactInputs) {
  Problem problem = aligned(c());
  Random random(3);
  problem.q_idx.fill_integers(random, 2);
  problem.k_idx.fill_integers(random, 2);
  std::size_t turn = GetParam();
  for (const auto& [local, init] : std::vector<std::pair<int, int>>{{1, 0}, {0, 0}, {2, 1}, {0, 3}}) {
    SCOPED_TRACE("local_blocks " + std::to_string(local) + ", init_blocks " + std::to_string(init));
    problem.local_blocks = local;
    problem.init_blocks = init;
    const Tensor expected = run_select(reference_context(), problem.select_params());
    for (const SelectSchedule schedule : kSchedules) {
      // Over the four choices, every schedule meets every kind of asynchrony and order.
      const emulator::WithOptions with(kOptions[turn++ % 3]);
      expect_same_bytes("blocks", run_cuda(problem.select_params(), schedule), expected);
    }
  }
}

TEST_P(CudaSelect, IsRightWithinRoundingAndTheSameOnEverySchedule) {
  const Problem problem = aligned(c());
  const Tensor blocks = run_cuda(problem.select_params(), SelectSchedule::kFewRows);
  expect_well_formed(problem, blocks);
  expect_selection_within_rounding(problem, blocks);
  expect_same_bytes("many rows", run_cuda(problem.select_params(), SelectSchedule::kManyRows, 1), blocks);
  for (std::int64_t page = problem.geometry.block_size; page <= 256; page += problem.geometry.block_size) {
    SCOPED_TRACE("page " + std::to_string(page));
    const AlignedPages paged(problem, page);
    for (const SelectSchedule schedule : kSchedules) {
      const emulator::WithOptions with(kOptions[2]);
      expect_same_bytes("paged", run_cuda(paged.select_params(), schedule, 2), blocks);
    }
  }
}

TEST_P(CudaSelect, Float8KeysSelectAsTheSameNumbersIn16Bits) {
  Problem problem = aligned(c());
  const Tensor narrow = copy_of(problem.k_idx.as(DType::kFloat8E4M3).view(), Layout::kContiguous);
  problem.k_idx = copy_of(narrow.as(c().index_dtype).view(), Layout::kContiguous);
  const AlignedPages paged(problem, 2 * problem.geometry.block_size);
  const Tensor narrow_pages = copy_of(paged.keys.as(DType::kFloat8E4M3).view(), Layout::kContiguous);
  std::size_t turn = GetParam();
  for (const int local : {1, 0}) {
    problem.local_blocks = local;
    for (const SelectSchedule schedule : kSchedules) {
      SCOPED_TRACE("schedule " + std::to_string(static_cast<int>(schedule)));
      const emulator::WithOptions with(kOptions[turn++ % 3]);
      SelectBlocksParams params = problem.select_params();
      const Tensor expected = run_cuda(params, schedule);
      params.k_idx = narrow.view();
      expect_same_bytes("packed", run_cuda(params, schedule), expected);
      params = paged.select_params();
      params.local_blocks = local;
      params.k_idx = narrow_pages.view();
      expect_same_bytes("paged", run_cuda(params, schedule), expected);
    }
  }
}

TEST(CudaSelectRules, ChunksOfQueriesDoNotShow) {
  const Problem problem = aligned(make_case(3, 64, 64, 3, {{100, 500}, {1, 300}, {40, 700}}, DType::kBFloat16));
  const SelectBlocksParams params = problem.select_params();
  const Tensor expected = run_cuda(params);
  for (const SelectSchedule schedule : kSchedules) {
    for (const std::int64_t queries : {19, 64}) {
      SelectPlan plan = plan_select(shape_of(params), schedule);
      plan.chunk_queries = queries;  // less than the plan has room for
      expect_same_bytes("blocks", run_planned(plan, params, 2), expected);
    }
  }
}

TEST(CudaSelectRules, ALongSpanIsCutAnywhere) {
  const Problem problem = aligned(make_case(2, 64, 64, 4, {{3, 3000}}, DType::kFloat16));
  const SelectBlocksParams params = problem.select_params();
  const Tensor expected = run_cuda(params);
  for (const SelectSchedule schedule : kSchedules) {
    for (const std::int64_t span : {4, 8, 12, 32}) {
      SelectPlan plan = plan_select(shape_of(params), schedule);
      plan.span_tiles = span;
      if (span >= plan_select(shape_of(params), schedule).span_tiles) {
        expect_same_bytes("blocks", run_planned(plan, params, 5), expected);
      }
    }
  }
}

TEST(CudaSelectRules, SampledQueriesSelectAsInTheWhole) {
  const Problem problem = aligned(make_case(2, 128, 64, 2, {{130, 420}, {20, 300}}, DType::kBFloat16));
  const Tensor whole = run_cuda(problem.select_params());
  const std::vector<std::int64_t> rows = {0, 1, 64, 100, 129, 130, 149};
  const Problem sampled = problem.sample(rows);
  const Tensor q_idx = copy_of(sampled.q_idx.view(), Layout::kContiguous);
  const Tensor k_idx = copy_of(sampled.k_idx.view(), Layout::kContiguous);
  SelectBlocksParams params = sampled.select_params();
  params.q_idx = q_idx.view();
  params.k_idx = k_idx.view();
  for (const SelectSchedule schedule : kSchedules) {
    const Tensor blocks = run_cuda(params, schedule);
    for (std::int64_t group = 0; group < 2; ++group) {
      for (std::size_t i = 0; i < rows.size(); ++i) {
        EXPECT_EQ(row_of(blocks, group, static_cast<std::int64_t>(i)), row_of(whole, group, rows[i])) << rows[i];
      }
    }
  }
}

void expect_as_reference(Problem& problem) {
  for (const int local : {1, 0}) {
    problem.local_blocks = local;
    const Tensor expected = run_select(reference_context(), problem.select_params());
    for (const SelectSchedule schedule : kSchedules) {
      expect_same_bytes("blocks", run_cuda(problem.select_params(), schedule), expected);
    }
  }
}

TEST(CudaSelectRules, NanAndInfinityInEveryPosition) {
  // Every column of a tile of scores: the lanes of a quad, the registers of a lane.
  for (std::size_t at = 0; at < 128; at += at < 8 ? 1 : 15) {
    SCOPED_TRACE("token " + std::to_string(at));
    std::vector<double> tokens(5 * 128, 1.0);
    for (std::size_t j = 0; j < 128; ++j) tokens[j] = tokens[256 + j] = tokens[384 + j] = kNaN;
    tokens[at] = -3;        // block 0: one number
    tokens[128 + at] = 7;   // block 1: the best, behind and before ones
    tokens[256 + at] = -4;  // block 2: a lower number; block 3: none
    for (const std::int64_t topk : {2, 3}) {
      Problem problem = with_scores(tokens, 128, topk);
      expect_as_reference(problem);
    }
  }
}

TEST(CudaSelectRules, InvisibleKeysNeverMatter) {
  // Each query is the first to see one more NaN-free token; what is behind it is NaN or the highest score of all.
  for (const double hidden : {kNaN, 1e30, kInfinity}) {
    std::vector<double> tokens(400, 0.0);
    for (std::size_t j = 0; j < 400; ++j) tokens[j] = static_cast<double>((j * 37) % 101);
    Problem problem = with_scores(tokens, 64, 2, 140);
    for (std::int64_t position = 300; position < 400; ++position) problem.k_idx.set(hidden, position, 0);
    expect_as_reference(problem);
  }
}

TEST(CudaSelectRules, TiesZerosAndOrders) {
  std::vector<double> rising, falling, equal, zeros;
  for (int j = 0; j < 64 * 20; ++j) {
    rising.push_back(j / 64);
    falling.push_back(-j / 64);
    equal.push_back(2);
    zeros.push_back(j % 3 == 0 ? -0.0 : 0.0);
  }
  for (const auto& tokens : {rising, falling, equal, zeros}) {
    for (const std::int64_t topk : {1, 4, 19}) {
      Problem problem = with_scores(tokens, 64, topk, 2);
      expect_as_reference(problem);
    }
  }
}

TEST(CudaSelectRules, MissingPagesAreNeverAddressed) {
  const Problem problem = aligned(make_case(2, 64, 64, 2, {{3, 700}, {1, 400}}, DType::kBFloat16));
  AlignedPages paged(problem, 128);
  paged.pages.page_table[1] = -1;
  paged.pages.page_table[2] = 1 << 30;
  paged.pages.page_table[4] = -5;
  for (const SelectSchedule schedule : kSchedules)
    expect_well_formed(problem, run_cuda(paged.select_params(), schedule));
}

TEST(CudaSelectRules, NothingToSelect) {
  const Problem none = aligned(make_case(2, 64, 64, 3, {{0, 0}, {0, 7}}, DType::kBFloat16, Layout::kContiguous, 3));
  const Tensor blocks = run_cuda(none.select_params());
  for (const double id : blocks.values()) EXPECT_EQ(id, -1);
  const Problem empty = aligned(make_case(2, 64, 64, 3, {{0, 0}}, DType::kBFloat16));
  EXPECT_EQ(run_cuda(empty.select_params()).elements(), 0);
}

TEST(CudaSelectRules, TakesWhatTheKernelsCanRead) {
  const Problem problem = aligned(make_case(2, 64, 64, 2, {{3, 200}}, DType::kBFloat16));
  const SelectBlocksParams params = problem.select_params();
  EXPECT_TRUE(takes_select(params));
  const auto refuses = [&](const std::function<void(SelectBlocksParams&)>& change) {
    SelectBlocksParams changed = params;
    change(changed);
    EXPECT_FALSE(takes_select(changed));
  };
  refuses([](auto& p) { p.q_idx.dtype = DType::kFloat32; });
  refuses([](auto& p) { p.k_idx.dtype = DType::kFloat16; });
  SelectBlocksParams narrow = params;
  narrow.k_idx.dtype = DType::kFloat8E4M3;
  EXPECT_TRUE(takes_select(narrow));
  narrow.k_idx.strides[0] += 8;
  EXPECT_FALSE(takes_select(narrow)) << "rows of float8 that are not 16-byte aligned";
  refuses([](auto& p) { p.q_idx.shape[2] = 96; });
  refuses([](auto& p) { p.block_size = 32; });
  refuses([](auto& p) { p.block_size = 256; });
  refuses([](auto& p) { p.q_idx.data += 2; });
  refuses([](auto& p) { p.k_idx.data += 8; });
  refuses([](auto& p) { p.k_idx.strides[0] += 4; });
  refuses([](auto& p) { p.q_idx.strides[0] += 1; });
  refuses([](auto& p) { p.k_idx.strides[0] = 0; });  // an expanded tensor, which the copy engine has no map for
}

SelectShape shape_with(std::int64_t queries, std::int64_t sequences, std::int64_t keys) {
  return {.query_rows = queries, .groups = 4, .sequences = sequences, .max_keys = keys, .block_size = 128};
}

TEST(CudaSelectPlan, ChoosesTheScheduleByTheRowsOfASequence) {
  EXPECT_EQ(plan_select(shape_with(1, 1, 1 << 20)).schedule, SelectSchedule::kFewRows);
  EXPECT_EQ(plan_select(shape_with(16, 1, 1 << 20)).schedule, SelectSchedule::kFewRows);
  EXPECT_EQ(plan_select(shape_with(64, 1, 1 << 20)).schedule, SelectSchedule::kManyRows);
  EXPECT_EQ(plan_select(shape_with(64, 64, 1 << 20)).schedule, SelectSchedule::kFewRows);
}

TEST(CudaSelectPlan, MemoryIsBoundedHoweverLongTheContext) {
  for (const std::int64_t keys : {0, 1, 127, 128, 129, 1 << 15, 1 << 20, 1 << 24}) {
    for (const std::int64_t queries : {0, 1, 5, 300, 1 << 15, 1 << 20}) {
      for (const std::int64_t sequences : {1, 7, 600}) {
        const SelectPlan plan =
            plan_select(shape_with(queries, sequences, keys), SelectSchedule::kAuto, core::ScreenSwitch::kNever);
        SCOPED_TRACE(std::to_string(keys) + " keys, " + std::to_string(queries) + " queries");
        EXPECT_EQ(plan.chunk_queries == 0, queries == 0);
        EXPECT_LE(plan.chunk_queries, queries);
        EXPECT_GE(plan.maxima_stride * 128, keys);
        EXPECT_EQ(plan.maxima_stride % 8, 0);
        EXPECT_GE(plan.most_tiles * plan.tile_rows, plan.chunk_queries * 4);
        EXPECT_EQ(plan.maxima % 256, 0u);
        EXPECT_GE(plan.bytes - plan.maxima,
                  static_cast<std::size_t>(plan.chunk_queries * 4 * plan.maxima_stride) * sizeof(float));
        const auto floor = std::max<std::int64_t>(kSelectMaximaBytes, 256 * 4 * plan.maxima_stride * 4);
        EXPECT_LE(plan.bytes - plan.maxima, static_cast<std::size_t>(floor) + 256);
        EXPECT_LE(plan.maxima, std::size_t{160} << 20) << "lists";
      }
    }
  }
}

TEST(CudaSelectPlan, Float8KeysAreWidenedOnceForManyRows) {
  SelectShape shape = shape_with(1 << 12, 1, 1 << 20);
  EXPECT_FALSE(plan_select(shape).widens);
  shape.narrow_keys = 1 << 20;
  EXPECT_TRUE(plan_select(shape).widens);
  EXPECT_FALSE(plan_select(shape, SelectSchedule::kFewRows).widens) << "read once";
  shape.narrow_keys = std::int64_t{1} << 30;
  EXPECT_FALSE(plan_select(shape).widens) << "a pool of pages far larger than what a call reads";
  EXPECT_EQ(plan_select(shape).schedule, SelectSchedule::kFewRows);
}

TEST(CudaSelectPlan, RespectsItsLimit) {
  const SelectShape shape = shape_with(1 << 20, 1, 1 << 20);
  const std::size_t limits[] = {std::size_t{1} << 26, std::size_t{1} << 27, std::size_t{1} << 28, 0};
  // More memory buys screening first, which may leave a chunk no larger than without; then it buys larger chunks.
  std::pair<bool, std::int64_t> last{false, 0};
  std::int64_t last_unscreened = 0;
  for (const std::size_t limit : limits) {
    SCOPED_TRACE(limit);
    const SelectPlan plan = plan_select(shape, SelectSchedule::kAuto, core::ScreenSwitch::kAuto, limit);
    EXPECT_LE(plan.bytes, limit == 0 ? std::size_t{1} << 30 : limit);
    EXPECT_EQ(plan.chunk_queries % kSelectChunkStep, 0);
    EXPECT_GT(std::pair(plan.screen.use, plan.chunk_queries), last);
    last = {plan.screen.use, plan.chunk_queries};
    const SelectPlan unscreened = plan_select(shape, SelectSchedule::kAuto, core::ScreenSwitch::kNever, limit);
    EXPECT_GT(unscreened.chunk_queries, last_unscreened);
    last_unscreened = unscreened.chunk_queries;
  }
  EXPECT_TRUE(last.first);
  EXPECT_EQ(plan_select(shape, SelectSchedule::kAuto, core::ScreenSwitch::kAuto, 4096).chunk_queries, kSelectChunkStep)
      << "the least";
}

TEST(CudaSelectPlan, DecodingSpreadsOneSequenceOverTheProcessors) {
  EXPECT_EQ(plan_select(shape_with(1, 1, 1 << 17)).span_tiles, 4);
  EXPECT_EQ(plan_select(shape_with(1, 1, 1 << 20)).span_tiles, 8);
  EXPECT_EQ(plan_select(shape_with(1 << 12, 1, 1 << 20)).span_tiles, kSelectManySpan);
}

}  // namespace
}  // namespace msa::cuda
