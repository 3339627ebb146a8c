// SPDX-License-Identifier: Apache-2.0
// Times the operators, and the attention of a whole layer, against their peers on the same inputs in the same process:
// torch's scaled_dot_product_attention and topk, and our own dense attention. `msa bench` prints what this returns;
// docs/benchmarks.md says how to read it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bench/peaks.h"

namespace msa::bench {

struct OpBenchOptions {
  std::vector<std::string> ops = {"all"};  ///< of op_names(), or "all"
  std::vector<std::int64_t> contexts = {8192, 32768};
  std::int64_t queries = 512;  ///< the last tokens of the context
  std::int64_t query_heads = 64, kv_heads = 4, head_dim = 128, index_dim = 128;
  std::int64_t block_size = 128, topk = 16;
  std::string dtype = "bfloat16";                                   ///< storage of our q, k, v and index
  std::vector<std::string> torch_dtypes = {"bfloat16", "float32"};  ///< torch's attention is timed in each
  /// Contexts up to here are trained on as a whole, longer ones on their last `queries` tokens.
  std::int64_t train_whole = 32768;
  /// Of these, torch is timed on contexts up to here; for longer ones its time on this many tokens is scaled.
  std::int64_t torch_whole = 8192;
  int threads = 0;
  int repeats = 5;
  double budget_seconds = 10;  ///< no further repeat of a row that has taken this long
};

/// "select_blocks", "topk_blocks", "sparse_attention", "dense_attention", "layer", "decode", "backward", "index_kl",
/// "threads".
const std::vector<std::string>& op_names();

/// This row's speed over a peer's, both timed in this run.
struct Speedup {
  std::string peer;  ///< name of the peer's row, or what it is
  double factor = 0;
};

/// One timed thing.
struct OpBenchRow {
  std::string section;  ///< "prefill", "decode", "training", "top-k", "threads": rows that belong together
  std::string name;     ///< "select_blocks", "torch sdpa bfloat16", ...
  std::int64_t context = 0;
  std::int64_t queries = 0;
  int threads = 0;
  int runs = 0;  ///< of which seconds is the median
  double seconds = 0;
  std::int64_t scaled_from = 0;  ///< context whose time was scaled by the pairs of a causal pass; 0: measured
  double operations = 0;         ///< of the algorithm; a multiplication and an addition are two
  double bytes = 0;              ///< that must be read from memory
  std::string peak;              ///< what peak_fraction refers to: "int8 AMX + bf16 AMX", "read"; empty: nothing
  double peak_fraction = 0;      ///< least time at the peaks / seconds
  bool memory_bound = false;     ///< the least time is that of reading
  std::vector<Speedup> speedups;
  double flop_ratio =
      0;  ///< operations of dense attention / of MSA over a whole pass (cost formula of the paper); 0: no matter
};

struct OpBenchResult {
  Peaks peaks;
  int threads = 0;
  std::string instruction_set;
  std::string torch_version;
  bool interrupted = false;  ///< rows are missing
  std::vector<OpBenchRow> rows;
};

/// The first row of that section, name and context, or null.
const OpBenchRow* find_row(const OpBenchResult& result, const std::string& section, const std::string& name,
                           std::int64_t context);

struct OpBenchHooks {
  std::function<void(const std::string&)> progress;  ///< hears what is being timed
  std::function<bool()> should_stop;                 ///< asked between runs; the rows so far are returned
};

/// Throws msa::Error on options that make no sense.
OpBenchResult run_op_bench(const OpBenchOptions& options, const OpBenchHooks& hooks);

}  // namespace msa::bench
