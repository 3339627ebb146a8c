// SPDX-License-Identifier: Apache-2.0
// Plans and starts the backward of sparse and dense attention on the instruction set in use, and builds the reverse index
// that the key pass needs; how the passes work: attention_backward-inl.h.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/attention_backward-inl.h"
// clang-format off: every set is compiled by this include, the last one by the next.
#include "src/cpu/targets.h"
#include "src/cpu/attention_backward-inl.h"
// clang-format on

#if HWY_ONCE

#include <algorithm>
#include <cstring>
#include <vector>

#include "src/core/buffer.h"
#include "src/core/threads.h"
#include "src/cpu/instruction_set.h"
#include "src/cpu/operators.h"
#include "src/cpu/run_plan.h"
#include "src/cpu/topk.h"
#include "src/cpu/zero_rows.h"

namespace msa::cpu {

HWY_EXPORT(run_query_pass);
HWY_EXPORT(run_key_pass);
HWY_EXPORT(add_splits);

namespace {

// For some kv heads and every sequence, the queries that chose each block, ascending: a counting sort of `blocks`.
class ReverseIndex {
 public:
  ReverseIndex(const BackwardProblem& problem, const AttentionShape& shape, std::int64_t heads)
      : problem_(problem), shape_(shape), sequences_(problem.batch->sequences()) {
    first_block_.push_back(0);
    for (std::int64_t s = 0; s < sequences_; ++s) {
      const std::int64_t keys = core::get_sequence(*problem.batch, s).keys;
      first_block_.push_back(first_block_.back() + (keys + shape.block_size - 1) / shape.block_size + 1);
    }
    if (is_dense()) return;
    ids_ = core::Buffer<std::int32_t>(static_cast<std::size_t>(heads * shape.queries.total * shape.topk));
    ends_ = core::Buffer<std::int64_t>(static_cast<std::size_t>(heads * first_block_.back()));
  }

  /// Fills slot `slot` (of `heads`) with kv head `kv_head`.
  void build(int threads, std::int64_t first_head, std::int64_t heads) {
    if (is_dense()) return;
    core::parallel_for(threads, heads * sequences_, [&](std::int64_t task, int) {
      build_sequence(first_head + task / sequences_, task / sequences_, task % sequences_);
    });
  }

  std::int64_t block_count(std::int64_t s) const {
    return first_block_[static_cast<std::size_t>(s) + 1] - first_block_[static_cast<std::size_t>(s)] - 1;
  }

  /// The list of a block and how long it is.
  QueryList list(std::int64_t slot, std::int64_t s, std::int64_t block, std::int64_t& count) const {
    const core::Sequence sequence = core::get_sequence(*problem_.batch, s);
    QueryList list;
    if (is_dense()) {
      std::int64_t low = 0;
      std::int64_t high = sequence.queries;  // the first query at or behind the block's begin, by bisection
      while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (core::query_position(*problem_.batch, sequence, middle) < block * shape_.block_size) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      list.first = low;
      count = sequence.queries - low;
      return list;
    }
    const std::int64_t* ends = ends_of(slot, s);
    list.ids = ids_of(slot, sequence) + ends[block];
    count = ends[block + 1] - ends[block];
    return list;
  }

 private:
  bool is_dense() const { return problem_.blocks.empty(); }
  const std::int64_t* ends_of(std::int64_t slot, std::int64_t s) const {
    return ends_.data() + slot * first_block_.back() + first_block_[static_cast<std::size_t>(s)];
  }
  const std::int32_t* ids_of(std::int64_t slot, const core::Sequence& sequence) const {
    return ids_.data() + (slot * shape_.queries.total + sequence.query_begin) * shape_.topk;
  }

  void build_sequence(std::int64_t kv_head, std::int64_t slot, std::int64_t s) {
    const core::Sequence sequence = core::get_sequence(*problem_.batch, s);
    auto* begins = const_cast<std::int64_t*>(ends_of(slot, s));
    auto* ids = const_cast<std::int32_t*>(ids_of(slot, sequence));
    const std::int64_t blocks = block_count(s);
    const auto for_each_pair = [&](const auto& body) {
      for (std::int64_t i = 0; i < sequence.queries; ++i) {
        const std::int32_t* row = block_row(problem_.blocks, kv_head, sequence.query_begin + i);
        for (std::int64_t c = 0; c < shape_.topk && row[c] >= 0; ++c) body(static_cast<std::int32_t>(i), row[c]);
      }
    };
    // begins[b + 1] counts block b, then holds where its list goes on; when all is placed that is where it ends, and so
    // where the next one begins.
    std::fill(begins, begins + blocks + 1, 0);
    for_each_pair([&](std::int32_t, std::int32_t block) { ++begins[block + 1]; });
    std::int64_t sum = 0;
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t count = begins[b + 1];
      begins[b + 1] = sum;
      sum += count;
    }
    for_each_pair([&](std::int32_t query, std::int32_t block) { ids[begins[block + 1]++] = query; });
  }

  const BackwardProblem& problem_;
  const AttentionShape& shape_;
  std::int64_t sequences_;
  std::vector<std::int64_t> first_block_;  // of each sequence, one slot more than it has blocks
  core::Buffer<std::int32_t> ids_;
  core::Buffer<std::int64_t> ends_;
};

void run_key_passes(const BackwardProblem& problem, const AttentionShape& shape, const BackwardPlan& plan,
                    const RowTerms* terms) {
  const KeyPassLayout layout = lay_out_key_pass(shape);
  const std::int64_t split_queries = backward_split_queries(shape);
  const std::size_t sum_floats =
      static_cast<std::size_t>(shape.block_size * (shape.head_dim + shape.value_dim));
  const auto run = HWY_DYNAMIC_DISPATCH(run_key_pass);
  const auto add = HWY_DYNAMIC_DISPATCH(add_splits);
  ReverseIndex index(problem, shape, plan.heads_at_once);
  core::Buffer<float> scratch(plan.key_worker_bytes / sizeof(float) * static_cast<std::size_t>(plan.key_workers));
  for (std::int64_t first_head = 0; first_head < shape.kv_heads; first_head += plan.heads_at_once) {
    const std::int64_t heads = std::min(plan.heads_at_once, shape.kv_heads - first_head);
    index.build(plan.key_workers, first_head, heads);
    std::vector<KeyTask> tasks;
    std::vector<std::int64_t> shared;  // first tasks of the blocks that have several
    std::int64_t shared_tasks = 0;
    for (std::int64_t slot = 0; slot < heads; ++slot) {
      for (std::int64_t s = 0; s < problem.batch->sequences(); ++s) {
        for (std::int64_t block = 0; block < index.block_count(s); ++block) {
          KeyTask task;
          task.sequence = static_cast<std::int32_t>(s);
          task.kv_head = static_cast<std::int32_t>(first_head + slot);
          task.block = block;
          std::int64_t count = 0;
          index.list(slot, s, block, count);
          if (!plan.share_splits || count <= split_queries) {
            task.end = count;
            tasks.push_back(task);
            continue;
          }
          shared.push_back(static_cast<std::int64_t>(tasks.size()));
          for (; task.begin < count; task.begin = task.end) {
            task.end = std::min(count, task.begin + split_queries);
            tasks.push_back(task);
            ++shared_tasks;
          }
        }
      }
    }
    core::Buffer<float> sums(sum_floats * static_cast<std::size_t>(shared_tasks));
    float* next_sum = sums.data();
    std::vector<std::int64_t> shared_counts;
    for (const std::int64_t first : shared) {
      std::size_t i = static_cast<std::size_t>(first);
      do {
        tasks[i++].sum = next_sum;
        next_sum += sum_floats;
      } while (i < tasks.size() && tasks[i].begin != 0);
      shared_counts.push_back(static_cast<std::int64_t>(i) - first);
    }
    core::parallel_for(plan.key_workers, static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i, int worker) {
      const KeyTask& task = tasks[static_cast<std::size_t>(i)];
      std::int64_t count = 0;
      const QueryList list = index.list(task.kv_head - first_head, task.sequence, task.block, count);
      run(problem, shape, layout, task, list, terms,
          scratch.data() + plan.key_worker_bytes / sizeof(float) * static_cast<std::size_t>(worker));
    });
    core::parallel_for(plan.key_workers, static_cast<std::int64_t>(shared.size()), [&](std::int64_t i, int) {
      const auto at = static_cast<std::size_t>(i);
      add(problem, shape, tasks.data() + shared[at], shared_counts[at]);
    });
  }
}

void run_backward(const char* op, const Context& context, const BackwardProblem& problem, std::int64_t block_size) {
  ensure_instruction_set();
  const Batch& batch = *problem.batch;
  BackwardShape shape;
  shape.attention.queries = count_queries(batch);
  shape.attention.kv_heads = problem.k.size(1);
  shape.attention.group_size = problem.q.size(1) / shape.attention.kv_heads;
  shape.attention.head_dim = problem.q.size(2);
  shape.attention.value_dim = problem.v.size(2);
  shape.attention.block_size = block_size;
  shape.attention.topk = problem.blocks.empty() ? 0 : problem.blocks.size(2);
  shape.sequences = batch.sequences();
  for (std::int64_t s = 0; s < shape.sequences; ++s) {
    shape.blocks += (core::get_sequence(batch, s).keys + block_size - 1) / block_size;
  }
  shape.row_blocks = count_blocks(batch, block_size);
  if (shape.attention.topk > 0) shape.row_blocks = std::min(shape.row_blocks, shape.attention.topk);
  const BackwardPlan plan =
      plan_attention_backward(op, shape, core::resolve_threads(context.threads), context.workspace_limit);

  zero_rows(problem.grads.dq, shape.attention.queries.total);
  zero_rows(problem.grads.dk, batch.cu_seqlens_k.back());
  zero_rows(problem.grads.dv, batch.cu_seqlens_k.back());
  core::Buffer<RowTerms> terms(static_cast<std::size_t>(shape.attention.queries.total * problem.q.size(1)));
  const QueryPassLayout layout = lay_out_query_pass(shape, plan.query_pass.chunk, plan.keep_tiles);
  const auto run = HWY_DYNAMIC_DISPATCH(run_query_pass);
  run_plan(plan.query_pass, batch, shape.attention.kv_heads,
           [&](const QueryChunk& chunk, std::int64_t kv_head, float* scratch) {
             run(problem, shape.attention, layout, chunk, kv_head, scratch, terms.data());
           });
  run_key_passes(problem, shape.attention, plan, terms.data());
}

}  // namespace

void sparse_attention_backward(const Context& context, const SparseAttentionParams& params,
                               const AttentionSaved& saved, const AttentionGrads& grads) {
  run_backward("sparse_attention_backward", context,
               {params.q, params.k, params.v, params.blocks, &params.batch, static_cast<float>(*params.scale), saved,
                grads},
               params.block_size);
}

void dense_attention_backward(const Context& context, const DenseAttentionParams& params, const AttentionSaved& saved,
                              const AttentionGrads& grads) {
  run_backward("dense_attention_backward", context,
               {params.q, params.k, params.v, ConstTensorView(), &params.batch, static_cast<float>(*params.scale),
                saved, grads},
               kDenseBlock);
}

}  // namespace msa::cpu

#endif  // HWY_ONCE
