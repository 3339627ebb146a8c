// SPDX-License-Identifier: Apache-2.0
// Plans and starts select_blocks on the instruction set in use; how it works: select_blocks-inl.h and screen-inl.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/few_rows-inl.h"
// clang-format off: every set is compiled by this include, the last one by the next.
#include "src/cpu/targets.h"
#include "src/cpu/few_rows-inl.h"
// clang-format on

#if HWY_ONCE

#include <algorithm>
#include <numeric>
#include <vector>

#include "src/core/buffer.h"
#include "src/core/threads.h"
#include "src/cpu/bf16_dot.h"
#include "src/cpu/few_rows.h"
#include "src/cpu/instruction_set.h"
#include "src/cpu/operators.h"
#include "src/cpu/screen.h"
#include "src/cpu/select_blocks_plan.h"
#include "src/cpu/select_choices.h"

namespace msa::cpu {
namespace {

HWY_EXPORT(select_chunk);
HWY_EXPORT(select_chunk_screened);
HWY_EXPORT(measure_keys);
HWY_EXPORT(measure_query);
HWY_EXPORT(quantise_blocks);
HWY_EXPORT(score_span);
HWY_EXPORT(select_scored_row);
HWY_EXPORT(screen_span);
HWY_EXPORT(mark_doubtful);
HWY_EXPORT(select_screened_row);

// Screening quantises the keys and leaves some of the blocks to be scored: below these it does not pay
// (docs/select-blocks.md).
constexpr std::int64_t kLeastBlocksPerSlot = 6;
constexpr std::int64_t kLeastRows = 128;

class Selection {
 public:
  Selection(const Context& context, const SelectBlocksParams& params, const TensorView& blocks)
      : context_(context),
        params_(params),
        blocks_(blocks),
        threads_(core::resolve_threads(context.threads)),
        screening_(active_screening()),
        is_many_(static_cast<std::size_t>(params.batch.sequences()), true) {
    shape_.kv_heads = params.q_idx.size(1);
    shape_.index_dim = params.q_idx.size(2);
    shape_.block_size = params.block_size;
    shape_.topk = params.topk;
    screen_.dot = active_screen_dot(screening_);
  }

  void run() {
    select_few();
    select_many();
  }

 private:
  Choices choices_of(std::int64_t s) const { return {params_, core::get_sequence(params_.batch, s)}; }
  /// Blocks that some query of the sequence chooses from lie in [begin, end).
  static std::int64_t end_of(const Choices& choices) {
    const std::int64_t queries = choices.sequence().queries;
    return queries == 0 ? 0 : std::max(choices.begin(), choices.end(queries - 1));
  }

  struct Few {
    std::int64_t sequence = 0;
    std::int64_t rows = 0;
    std::int64_t begin = 0;
    std::int64_t blocks = 0;
    std::int64_t whole_end = 0;  // blocks below are seen whole by all rows; screened: the others are not
    bool is_screened = false;
    std::int64_t looked = 0;      // blocks after which the screening is given up if it decides too little; 0: never
    float* scores = nullptr;      // [rows, stride()]
    float* magnitudes = nullptr;  // [stride()]
    std::uint8_t* doubtful = nullptr;  // [stride()]

    std::int64_t stride() const { return (blocks + 15) / 16 * 16; }  // whole vectors
    std::int64_t score_floats() const { return (rows + (is_screened ? 2 : 0)) * stride(); }
    float* row(std::int64_t r) const { return scores + r * stride(); }
  };

  /// A sequence as its few rows see it.
  Few describe_few(std::int64_t s, const FewRowsScreen& screen) const {
    const Choices choices = choices_of(s);
    Few few;
    few.sequence = s;
    few.rows = choices.sequence().queries * shape_.kv_heads;
    few.begin = choices.begin();
    few.blocks = std::max<std::int64_t>(0, end_of(choices) - choices.begin());
    if (screen.block_max == nullptr || few.rows == 0) return few;
    few.whole_end = (choices.position(0) + 1) / shape_.block_size;
    const std::int64_t whole = few.whole_end - few.begin;
    if (screening_ != Screening::kAuto) {
      few.is_screened = whole > 0;
      return few;
    }
    // Enough blocks that a look at some of them pays, and of those enough that the best stand out.
    constexpr std::int64_t kLookedPerSlot = 4;
    const std::int64_t looked = std::max(kLookedPerSlot * params_.topk, whole / 8);
    few.is_screened = screen_.dot.is_fast && whole >= 2 * looked;
    few.looked = few.is_screened ? looked : 0;
    return few;
  }
  /// How few rows are screened: where there are bf16 products, and both sides are numbers of bf16.
  FewRowsScreen few_rows_screen() const {
    const bool fits = params_.q_idx.dtype == DType::kBFloat16 &&
                      (params_.k_idx.dtype == DType::kBFloat16 || params_.k_idx.dtype == DType::kFloat8E4M3);
    if (!fits || !screen_.dot.is_bf16() || screening_ == Screening::kNever) return {};
    FewRowsScreen screen;
    screen.block_max = screen_.dot.bf16;
    screen.needs_amx_tiles = screen_.dot.needs_amx_tiles;
    screen.dim = padded_inner(shape_.index_dim);
    return screen;
  }

  /// Sequences with few rows: a pass that scores blocks, a span of them a task, and one that ranks. When blocks are
  /// screened, what that leaves in doubt is scored in between.
  void select_few() {
    const FewRowsScreen screen = few_rows_screen();
    shape_.screens_few = screen.block_max != nullptr;
    std::vector<Few> few;
    std::int64_t largest = 0;
    std::int64_t all = 0;
    for (std::int64_t s = 0; s < params_.batch.sequences(); ++s) {
      const Few one = describe_few(s, screen);
      if (one.rows == 0 || one.rows > kFewRows) continue;
      few.push_back(one);
      largest = std::max(largest, one.score_floats());
      all += one.score_floats();
    }
    if (few.empty()) return;
    const SpanPlan plan = plan_spans(shape_, largest, all, threads_, context_.workspace_limit);
    if (plan.score_floats < largest) return;  // not in this workspace: chunks
    for (const Few& f : few) is_many_[static_cast<std::size_t>(f.sequence)] = false;

    const SpanLayout layout = lay_out_span(shape_);
    const std::size_t worker_floats = plan.worker_bytes / sizeof(float);
    core::Buffer<float> scratch(worker_floats * static_cast<std::size_t>(plan.workers));
    core::Buffer<float> scores(static_cast<std::size_t>(plan.score_floats));
    const auto scratch_of = [&](int worker) {
      return scratch.data() + worker_floats * static_cast<std::size_t>(worker);
    };
    const auto best_of = [&](int worker) { return reinterpret_cast<std::int32_t*>(scratch_of(worker) + layout.best); };
    const std::int64_t span = std::max<std::int64_t>(1, kSpanKeys / shape_.block_size);
    const auto score = HWY_DYNAMIC_DISPATCH(score_span);
    const auto score_cheaply = HWY_DYNAMIC_DISPATCH(screen_span);
    const auto mark = HWY_DYNAMIC_DISPATCH(mark_doubtful);
    const auto select = HWY_DYNAMIC_DISPATCH(select_scored_row);
    const auto select_screened = HWY_DYNAMIC_DISPATCH(select_screened_row);
    struct Task {
      Few* few = nullptr;
      std::int64_t first = 0;  // block, or row
    };
    for (std::size_t at = 0; at < few.size();) {
      // As many sequences as the scores have room for.
      std::vector<Task> looks;
      std::vector<Task> spans;
      std::vector<Task> rows;
      std::vector<Task> screened_rows;
      std::int64_t ranked = 0;
      for (std::int64_t used = 0; at < few.size() && used + few[at].score_floats() <= plan.score_floats; ++at) {
        Few& f = few[at];
        f.scores = scores.data() + used;
        if (f.is_screened) {
          f.magnitudes = f.scores + f.rows * f.stride();
          f.doubtful = reinterpret_cast<std::uint8_t*>(f.magnitudes + f.stride());
          std::fill(f.doubtful, f.doubtful + f.stride(), std::uint8_t{0});
        }
        used += f.score_floats();
        ranked += f.rows * f.blocks;
        for (std::int64_t b = 0; b < f.blocks; b += span) {
          (b < f.looked ? looks : spans).push_back({&f, f.begin + b});
        }
        for (std::int64_t r = 0; r < f.rows; ++r) rows.push_back({&f, r});
      }
      const auto run_spans = [&](const std::vector<Task>& tasks) {
        core::parallel_for(plan.workers, static_cast<std::int64_t>(tasks.size()), [&](std::int64_t task, int worker) {
          const auto& [f, first] = tasks[static_cast<std::size_t>(task)];
          const std::int64_t last = std::min(first + span, f->begin + f->blocks);
          if (f->is_screened) {
            score_cheaply(params_, layout, screen, f->sequence, first, last, f->whole_end, scratch_of(worker),
                          f->scores, f->stride(), f->magnitudes);
          } else {
            score(params_, layout, f->sequence, first, last, scratch_of(worker), f->scores, f->stride());
          }
        });
      };
      run_spans(looks);
      std::vector<Few*> looked;
      for (const Task& task : looks) {
        if (task.first == task.few->begin) looked.push_back(task.few);
      }
      core::parallel_for(plan.workers, static_cast<std::int64_t>(looked.size()), [&](std::int64_t task, int worker) {
        Few& f = *looked[static_cast<std::size_t>(task)];
        for (std::int64_t r = 0; r < f.rows; ++r) {
          mark(params_, f.sequence, r, f.looked, f.row(r), f.magnitudes, best_of(worker), f.doubtful);
        }
        f.is_screened = 4 * std::accumulate(f.doubtful, f.doubtful + f.looked, std::int64_t{0}) <= f.looked;
        std::fill(f.doubtful, f.doubtful + f.stride(), std::uint8_t{0});
      });
      for (const Task& task : looks) {
        if (!task.few->is_screened) spans.push_back(task);
      }
      run_spans(spans);
      for (const Task& task : rows) {
        if (task.few->is_screened) screened_rows.push_back(task);
      }
      // Ranking is short work: a thread for it must find more than it costs to start.
      constexpr std::int64_t kScoresPerThread = 1 << 15;
      const auto workers = static_cast<int>(std::clamp<std::int64_t>(ranked / kScoresPerThread, 1, plan.workers));
      if (!screened_rows.empty()) {
        core::parallel_for(
            workers, static_cast<std::int64_t>(screened_rows.size()), [&](std::int64_t task, int worker) {
              const auto& [f, row] = screened_rows[static_cast<std::size_t>(task)];
              mark(params_, f->sequence, row, f->blocks, f->row(row), f->magnitudes, best_of(worker), f->doubtful);
            });
        std::vector<Task> doubts;
        Few* last = nullptr;
        for (const Task& task : screened_rows) {
          if (task.few == last) continue;
          last = task.few;
          for (std::int64_t b = 0; b < last->blocks; ++b) {
            if (last->doubtful[b] != 0) doubts.push_back({last, last->begin + b});
          }
        }
        constexpr std::int64_t kDoubtsPerThread = 4;  // some 10 microseconds
        const auto count = static_cast<std::int64_t>(doubts.size());
        core::parallel_for(static_cast<int>(std::clamp<std::int64_t>(count / kDoubtsPerThread, 1, plan.workers)), count,
                           [&](std::int64_t task, int worker) {
                             const auto& [f, b] = doubts[static_cast<std::size_t>(task)];
                             score(params_, layout, f->sequence, b, b + 1, scratch_of(worker), f->scores, f->stride());
                             f->magnitudes[b - f->begin] = kExactScore;
                           });
      }
      core::parallel_for(workers, static_cast<std::int64_t>(rows.size()), [&](std::int64_t task, int worker) {
        const auto& [f, row] = rows[static_cast<std::size_t>(task)];
        if (f->is_screened) {
          select_screened(params_, f->sequence, row, f->row(row), f->magnitudes, best_of(worker), blocks_);
        } else {
          select(params_, f->sequence, row, f->row(row), best_of(worker), blocks_);
        }
      });
    }
  }

  bool should_screen(std::int64_t rows, std::int64_t candidates) const {
    if (candidates <= 0) return false;
    if (screening_ == Screening::kAlways || screening_ == Screening::kAlwaysBf16) return true;
    return screening_ == Screening::kAuto && screen_.dot.is_fast && rows >= kLeastRows &&
           candidates >= kLeastBlocksPerSlot * params_.topk;
  }
  /// Whole blocks that are candidates of a sequence to be screened; 0: it is not.
  std::int64_t count_screened(std::int64_t s) const {
    if (!is_many_[static_cast<std::size_t>(s)]) return 0;
    const Choices choices = choices_of(s);
    const std::int64_t queries = choices.sequence().queries;
    if (!should_screen(queries * shape_.kv_heads, end_of(choices) - choices.begin())) return 0;
    // The last block may be there in part.
    return std::min(end_of(choices), (choices.position(queries - 1) + 1) / shape_.block_size) - choices.begin();
  }

  /// Whether bf16 keys lie as they are screened: row behind row (apart they would share few sets of a cache), and on
  /// cache lines, which the rows of a tile would otherwise straddle at half the speed.
  bool can_screen_in_place() const {
    constexpr std::int64_t kLine = 64;
    const ConstTensorView& keys = params_.k_idx;
    if (!screen_.dot.is_bf16() || keys.dtype != DType::kBFloat16 || screen_.dim != shape_.index_dim) return false;
    const std::int64_t page_bytes = params_.batch.is_paged ? keys.stride(0) * 2 : 0;
    return core::KeyRows(keys, params_.batch).token_stride_bytes() == screen_.row_bytes() && page_bytes % kLine == 0 &&
           reinterpret_cast<std::uintptr_t>(keys.data) % kLine == 0;
  }

  /// Sequences with many rows: a chunk of queries a task.
  void select_many() {
    for (std::int64_t s = 0; s < params_.batch.sequences(); ++s) {
      if (!is_many_[static_cast<std::size_t>(s)]) continue;
      const Choices choices = choices_of(s);
      shape_.queries.total += choices.sequence().queries;
      shape_.queries.longest = std::max(shape_.queries.longest, choices.sequence().queries);
      shape_.screen_blocks += count_screened(s);
    }
    if (shape_.queries.total == 0) return;
    if (shape_.screen_blocks != 0) {
      const std::int64_t multiple = screen_.dot.dim_multiple();
      screen_.dim = (shape_.index_dim + multiple - 1) / multiple * multiple;
      screen_.is_in_place = can_screen_in_place();
      shape_.screen_bytes = screen_.row_bytes();
      shape_.is_screened_in_place = screen_.is_in_place;
    }
    const SelectionPlan plan = plan_selection("select_blocks", shape_, threads_, context_.workspace_limit);
    const SelectionLayout layout = lay_out_selection(shape_, plan.chunk);
    const std::size_t worker_floats = plan.worker_bytes / sizeof(float);
    core::Buffer<float> scratch(worker_floats * static_cast<std::size_t>(plan.workers));
    const auto scratch_of = [&](int worker) {
      return scratch.data() + worker_floats * static_cast<std::size_t>(worker);
    };
    std::vector<QueryChunk> chunks = cut_queries(params_.batch, plan.chunk);
    std::erase_if(chunks, [&](const QueryChunk& c) { return !is_many_[static_cast<std::size_t>(c.sequence)]; });

    core::Buffer<std::byte> shared_keys(static_cast<std::size_t>(
        screen_.is_in_place ? 0 : plan.shared_blocks * shape_.block_size * screen_.row_bytes()));
    core::Buffer<BlockBounds> shared_bounds(static_cast<std::size_t>(plan.shared_blocks));
    if (screen_.dim != 0 && !screen_.dot.is_bf16()) balance_channels(scratch_of(0) + layout.keys);
    const std::vector<SharedBlocks> shared =
        share_blocks(plan, layout, scratch_of, shared_keys.data(), shared_bounds.data());
    const auto select = HWY_DYNAMIC_DISPATCH(select_chunk);
    const auto select_screened = HWY_DYNAMIC_DISPATCH(select_chunk_screened);
    core::parallel_for(plan.workers, static_cast<std::int64_t>(chunks.size()), [&](std::int64_t task, int worker) {
      const QueryChunk& chunk = chunks[static_cast<std::size_t>(task)];
      const Choices choices = choices_of(chunk.sequence);
      const std::int64_t rows = choices.sequence().queries * shape_.kv_heads;
      if (should_screen(rows, choices.end(chunk.end - 1) - choices.begin())) {
        select_screened(params_, layout, screen_, shared[static_cast<std::size_t>(chunk.sequence)], chunk,
                        scratch_of(worker), blocks_);
      } else {
        select(params_, layout, chunk, scratch_of(worker), blocks_);
      }
    });
  }

  /// Balances queries and keys by a sample of both: it decides how tight the bounds are, not whether they hold.
  void balance_channels(float* rows) {
    constexpr std::int64_t kSample = 16;  // blocks, and queries: a fraction of a millisecond
    alignas(64) float queries[kMaxHeadDim] = {};
    alignas(64) float keys[kMaxHeadDim] = {};
    const auto measure_block = HWY_DYNAMIC_DISPATCH(measure_keys);
    const auto measure_row = HWY_DYNAMIC_DISPATCH(measure_query);
    const std::int64_t stride = (shape_.screen_blocks + kSample - 1) / kSample;
    std::int64_t next = 0;  // block to sample, counted over the sequences
    std::int64_t before = 0;
    for (std::int64_t s = 0; s < params_.batch.sequences(); ++s) {
      const std::int64_t count = count_screened(s);
      const Choices choices = choices_of(s);
      const core::Sequence& sequence = choices.sequence();
      for (; next < before + count; next += stride) {
        measure_block(params_, s, choices.begin() + next - before, rows, keys);
        measure_row(params_, sequence.query_begin + (next - before) * sequence.queries / count, queries);
      }
      before += count;
    }
    screen_.balance.set(queries, keys, shape_.index_dim);
  }

  /// Quantises as many candidate blocks as the plan shares, all threads at it; what each sequence got.
  template <class ScratchOf>
  std::vector<SharedBlocks> share_blocks(const SelectionPlan& plan, const SelectionLayout& layout,
                                         const ScratchOf& scratch_of, std::byte* keys, BlockBounds* bounds) const {
    std::vector<SharedBlocks> shared(is_many_.size());
    if (plan.shared_blocks == 0) return shared;
    struct Task {
      std::int64_t sequence = 0;
      std::int64_t first = 0;
      std::int64_t last = 0;
      std::int64_t at = 0;  // where in shared memory
    };
    std::vector<Task> tasks;
    const std::int64_t span = std::max<std::int64_t>(1, kSpanKeys / shape_.block_size);
    const std::int64_t block_bytes = screen_.is_in_place ? 0 : shape_.block_size * screen_.row_bytes();
    std::int64_t used = 0;
    for (std::int64_t s = 0; s < params_.batch.sequences(); ++s) {
      const Choices choices = choices_of(s);
      const std::int64_t count = std::min(count_screened(s), plan.shared_blocks - used);
      if (count <= 0) continue;
      shared[static_cast<std::size_t>(s)] = {screen_.is_in_place ? nullptr : keys + used * block_bytes, bounds + used,
                                             choices.begin(), count};
      for (std::int64_t b = 0; b < count; b += span) {
        tasks.push_back({s, choices.begin() + b, choices.begin() + std::min(count, b + span), used + b});
      }
      used += count;
    }
    const auto quantise = HWY_DYNAMIC_DISPATCH(quantise_blocks);
    core::parallel_for(plan.workers, static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i, int worker) {
      const Task& task = tasks[static_cast<std::size_t>(i)];
      quantise(params_, task.sequence, task.first, task.last, screen_, scratch_of(worker) + layout.keys,
               keys + task.at * block_bytes, bounds + task.at);
    });
    return shared;
  }

  const Context& context_;
  const SelectBlocksParams& params_;
  const TensorView& blocks_;
  int threads_;
  Screening screening_;
  std::vector<char> is_many_;
  SelectionShape shape_;
  ScreenSetup screen_;
};

}  // namespace

void select_blocks(const Context& context, const SelectBlocksParams& params, const TensorView& blocks) {
  ensure_instruction_set();
  clear_padding_rows(blocks, core::total_queries(params.batch));
  Selection(context, params, blocks).run();
}

}  // namespace msa::cpu

#endif  // HWY_ONCE
