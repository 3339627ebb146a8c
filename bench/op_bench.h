// SPDX-License-Identifier: Apache-2.0
// Times the operators, and the attention of a whole layer, against torch's scaled_dot_product_attention on the same inputs
// in the same process. `msa bench` prints what this returns.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace msa::bench {

struct OpBenchOptions {
  std::string op = "all";  ///< one of op_names(), or "all"
  std::vector<std::int64_t> contexts = {8192, 32768};
  std::int64_t queries = 512;  ///< the last tokens of the context
  std::int64_t query_heads = 64, kv_heads = 4, head_dim = 128, index_dim = 128;
  std::int64_t block_size = 128, topk = 16;
  std::string dtype = "float32";  ///< storage of q, k, v and of the peer's
  int threads = 0;
  int repeats = 5;
};

/// "select_blocks", "sparse_attention", "dense_attention", "backward", "index_kl", "decode".
const std::vector<std::string>& op_names();

/// One timed thing.
struct OpBenchRow {
  std::string name;            ///< "select_blocks", "torch sdpa", ...
  std::int64_t context = 0;
  double seconds = 0;          ///< median
  double flops = 0;            ///< of the algorithm
  double bytes = 0;            ///< that must be read from memory
  double peak_fraction = 0;    ///< of the FMA peak, or of the read bandwidth where memory_bound
  bool memory_bound = false;
  double speedup = 0;          ///< peer's time / this time; 0 where there is no peer
};

struct OpBenchResult {
  double fma_gflops = 0;
  double read_gbytes = 0;
  int threads = 0;
  std::string instruction_set;
  std::string torch_version;
  std::vector<OpBenchRow> rows;
};

/// `progress` hears what is being timed.
OpBenchResult run_op_bench(const OpBenchOptions& options, const std::function<void(const std::string&)>& progress);

}  // namespace msa::bench
