// SPDX-License-Identifier: Apache-2.0
// `msa bench`: speed of each operator and of a layer's attention against torch, as fractions of the measured peaks. Tested
// in tests/integration/test_cli.py (that it runs and prints, never how fast).
#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "apps/msa/commands.h"
#include "bench/op_bench.h"

namespace msa::app {
namespace {

void print_json(const bench::OpBenchOptions& options, const bench::OpBenchResult& result) {
  nlohmann::ordered_json json;
  json["machine"] = {{"threads", result.threads},
                     {"instruction_set", result.instruction_set},
                     {"fma_gflops", result.fma_gflops},
                     {"read_gbytes", result.read_gbytes}};
  json["torch"] = result.torch_version;
  json["shape"] = {{"query_heads", options.query_heads}, {"kv_heads", options.kv_heads},
                   {"head_dim", options.head_dim},       {"index_dim", options.index_dim},
                   {"block_size", options.block_size},   {"topk", options.topk},
                   {"queries", options.queries},         {"dtype", options.dtype}};
  for (const bench::OpBenchRow& row : result.rows) {
    json["rows"].push_back({{"name", row.name},
                            {"context", row.context},
                            {"seconds", row.seconds},
                            {"gflops", row.flops / row.seconds * 1e-9},
                            {"peak_fraction", row.peak_fraction},
                            {"bound", row.memory_bound ? "memory" : "compute"},
                            {"speedup", row.speedup > 0 ? nlohmann::ordered_json(row.speedup) : nullptr}});
  }
  fmt::print("{}\n", json.dump(2));
}

void print_table(const bench::OpBenchOptions& o, const bench::OpBenchResult& result) {
  fmt::print("{} query / {} kv heads, head dim {}, block size {}, topk {}, last {} queries, {}\n", o.query_heads,
             o.kv_heads, o.head_dim, o.block_size, o.topk, o.queries, o.dtype);
  fmt::print("{} threads, {}: peak {:.0f} GFLOP/s float32 multiply-add, {:.1f} GB/s read; torch {}\n", result.threads,
             result.instruction_set, result.fma_gflops, result.read_gbytes, result.torch_version);
  std::int64_t context = -1;
  for (const bench::OpBenchRow& row : result.rows) {
    if (row.context != context) {
      context = row.context;
      fmt::print("\ncontext {:<30} {:>10}  {:>9}  {:>14}  {:>8}\n", context, "ms", "GFLOP/s", "of peak", "vs torch");
    }
    fmt::print("  {:<36} {:>10.2f}  {:>9.1f}  {:>4.0f} % {:<7}  {:>8}\n", row.name, row.seconds * 1e3,
               row.flops / row.seconds * 1e-9, row.peak_fraction * 100, row.memory_bound ? "memory" : "compute",
               row.speedup > 0 ? fmt::format("{:.2f}x", row.speedup) : "");
  }
}

}  // namespace

void add_bench_command(CLI::App& app) {
  auto options = std::make_shared<bench::OpBenchOptions>();
  auto json = std::make_shared<bool>(false);
  CLI::App* command = app.add_subcommand("bench", "speed of the operators against torch on this machine");
  std::vector<std::string> ops = bench::op_names();
  ops.push_back("all");
  command->add_option("op", options->op, "what to time")->check(CLI::IsMember(ops))->capture_default_str();
  command->add_option("--context", options->contexts, "context lengths")->delimiter(',')->capture_default_str();
  command->add_option("--queries", options->queries, "query rows, the last of the context")->capture_default_str();
  command->add_option("--query-heads", options->query_heads)->capture_default_str();
  command->add_option("--kv-heads", options->kv_heads)->capture_default_str();
  command->add_option("--head-dim", options->head_dim)->capture_default_str();
  command->add_option("--index-dim", options->index_dim)->capture_default_str();
  command->add_option("--block-size", options->block_size)->capture_default_str();
  command->add_option("--topk", options->topk)->capture_default_str();
  command->add_option("--dtype", options->dtype)
      ->check(CLI::IsMember({"float32", "bfloat16", "float16"}))
      ->capture_default_str();
  command->add_option("--threads", options->threads, "0: all")->check(CLI::NonNegativeNumber)->capture_default_str();
  command->add_option("--repeats", options->repeats, "timed runs; the median counts")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_flag("--json", *json, "print JSON");
  command->callback([options, json] {
    const auto progress = [](const std::string& what) { fmt::print(stderr, "timing {}\n", what); };
    const bench::OpBenchResult result = bench::run_op_bench(*options, progress);
    *json ? print_json(*options, result) : print_table(*options, result);
  });
}

}  // namespace msa::app
