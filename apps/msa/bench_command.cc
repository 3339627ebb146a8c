// SPDX-License-Identifier: Apache-2.0
// `msa bench`: speed of each operator and of a layer's attention against torch and against our own dense attention, as
// fractions of the machine's measured peaks; a table, JSON, and a picture. Ctrl-C prints what there is. Tested in
// tests/integration/test_cli.py (that it runs and prints, never how fast).
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>

#include "apps/msa/bench_results.h"
#include "apps/msa/commands.h"
#include "apps/msa/interrupt.h"
#include "bench/op_bench.h"
#include "bench/plot.h"
#include "msa/error.h"

namespace msa::app {
namespace {

struct BenchFlags {
  bench::OpBenchOptions options;
  std::string geometry;
  std::string plot;
  std::string from;
  bool json = false;
};

void print_json(const bench::OpBenchOptions& options, const bench::OpBenchResult& result) {
  nlohmann::ordered_json json;
  json["machine"] = {{"threads", result.threads}, {"instruction_set", result.instruction_set}};
  for (const bench::Arithmetic arithmetic : bench::kArithmetics) {
    const double peak = result.peaks.of(arithmetic);
    json["machine"]["peak_gops"][bench::arithmetic_name(arithmetic)] =
        peak > 0 ? nlohmann::ordered_json(peak) : nlohmann::ordered_json(nullptr);
  }
  json["machine"]["read_gbytes"] = result.peaks.read_gbytes;
  json["torch"] = result.torch_version;
  json["interrupted"] = result.interrupted;
  json["shape"] = {{"query_heads", options.query_heads}, {"kv_heads", options.kv_heads},
                   {"head_dim", options.head_dim},       {"index_dim", options.index_dim},
                   {"block_size", options.block_size},   {"topk", options.topk},
                   {"queries", options.queries},         {"dtype", options.dtype}};
  json["rows"] = nlohmann::ordered_json::array();
  for (const bench::OpBenchRow& row : result.rows) {
    nlohmann::ordered_json entry = {{"section", row.section},
                                    {"name", row.name},
                                    {"context", row.context},
                                    {"queries", row.queries},
                                    {"measured", row.scaled_from == 0},
                                    {"threads", row.threads},
                                    {"runs", row.runs},
                                    {"seconds", row.seconds},
                                    {"seconds_per_query", row.seconds / static_cast<double>(row.queries)},
                                    {"gops", row.operations / row.seconds * 1e-9},
                                    {"gbytes_per_second", row.bytes / row.seconds * 1e-9},
                                    {"bytes", row.bytes}};
    if (row.scaled_from != 0) entry["scaled_from_context"] = row.scaled_from;
    if (!row.peak.empty()) {
      entry["peak"] = row.peak;
      entry["peak_fraction"] = row.peak_fraction;
      entry["bound"] = row.memory_bound ? "memory" : "compute";
    }
    entry["speedups"] = nlohmann::ordered_json::object();
    for (const bench::Speedup& speedup : row.speedups) entry["speedups"][speedup.peer] = speedup.factor;
    if (row.flop_ratio > 0) entry["flop_ratio"] = row.flop_ratio;
    json["rows"].push_back(std::move(entry));
  }
  fmt::print("{}\n", json.dump(2));
}

std::string format_seconds(double seconds) {
  if (seconds >= 1) return fmt::format("{:.2f} s ", seconds);
  return seconds >= 1e-3 ? fmt::format("{:.2f} ms", seconds * 1e3) : fmt::format("{:.1f} us", seconds * 1e6);
}

// A peer's name as the head of a column.
std::string format_peer(const std::string& peer) {
  const auto has = [&](const char* part) { return peer.find(part) != std::string::npos; };
  if (has("torch sdpa")) return has("bfloat16") ? "torch bf16" : "torch f32";
  return peer == "dense_attention" ? "own dense (FLOPs)" : peer;
}

std::string describe_section(const bench::OpBenchRow& row) {
  if (row.section == "top-k") return "Top-k alone (rows, blocks)";
  if (row.section == "decode") {
    return row.queries == 1 ? fmt::format("Decode, one token behind {}", row.context)
                            : fmt::format("Verification of {} tokens behind {}", row.queries, row.context);
  }
  const std::string rows = row.queries == row.context ? fmt::format("all of {} tokens", row.context)
                                                      : fmt::format("last {} of {} tokens", row.queries, row.context);
  if (row.section == "training") return "Training, " + rows;
  return (row.section == "threads" ? "One thread and all, " : "Prefill, ") + rows;
}

constexpr std::size_t kNameWidth = 44;

void print_section(const std::vector<const bench::OpBenchRow*>& rows) {
  std::vector<std::string> peers;
  for (const bench::OpBenchRow* row : rows) {
    for (const bench::Speedup& speedup : row->speedups) {
      const std::string peer = format_peer(speedup.peer);
      if (std::find(peers.begin(), peers.end(), peer) == peers.end()) peers.push_back(peer);
    }
  }
  fmt::print("\n{}\n", describe_section(*rows[0]));
  fmt::print("  {:<{}} {:>10} {:>8} {:>7}  {:<24}", "", kNameWidth, "time", "Gop/s", "GB/s", "of peak");
  for (const std::string& peer : peers) fmt::print("  {:>12}", "vs " + peer);
  fmt::print("\n");
  for (const bench::OpBenchRow* row : rows) {
    std::string name = row->name;
    if (row->scaled_from != 0) name += fmt::format(", from {}", row->scaled_from);
    if (row->section == "threads") name += row->threads == 1 ? ", 1 thread" : fmt::format(", {} threads", row->threads);
    const auto rate = [&](double amount) {
      return amount > 0 ? fmt::format("{:.{}f}", amount / row->seconds * 1e-9, amount / row->seconds < 1e10 ? 1 : 0)
                        : "";
    };
    std::string line = fmt::format(
        "  {:<{}} {:>10} {:>8} {:>7}  {:<24}", name, kNameWidth, format_seconds(row->seconds), rate(row->operations),
        rate(row->bytes), row->peak.empty() ? "" : fmt::format("{:>3.0f} % {}", row->peak_fraction * 100, row->peak));
    for (const std::string& peer : peers) {
      std::string cell;
      for (const bench::Speedup& speedup : row->speedups) {
        if (format_peer(speedup.peer) != peer) continue;
        cell = fmt::format("{:.{}f}x", speedup.factor, speedup.factor < 10 ? 2 : 1);
        if (speedup.peer == "dense_attention" && row->flop_ratio > 0)
          cell += fmt::format(" ({:.1f}x)", row->flop_ratio);
      }
      line += fmt::format("  {:>{}}", cell, std::max<std::size_t>(12, peer.size() + 3));
    }
    line.erase(line.find_last_not_of(' ') + 1);
    fmt::print("{}\n", line);
  }
}

void print_table(const bench::OpBenchOptions& o, const bench::OpBenchResult& result) {
  fmt::print("{} query / {} kv heads, head dim {}, index dim {}, block size {}, topk {}, {}\n", o.query_heads,
             o.kv_heads, o.head_dim, o.index_dim, o.block_size, o.topk, o.dtype);
  fmt::print("{} threads, instruction set {}, torch {}\n", result.threads, result.instruction_set,
             result.torch_version);
  fmt::print("measured peaks, Gop/s:");
  for (const bench::Arithmetic arithmetic : bench::kArithmetics) {
    const double peak = result.peaks.of(arithmetic);
    fmt::print("  {} {}", bench::arithmetic_name(arithmetic), peak > 0 ? fmt::format("{:.0f}", peak) : "none");
  }
  fmt::print(";  read {:.1f} GB/s\n", result.peaks.read_gbytes);
  for (std::size_t i = 0; i < result.rows.size();) {
    std::vector<const bench::OpBenchRow*> section;
    const bench::OpBenchRow& first = result.rows[i];
    while (i < result.rows.size() && result.rows[i].section == first.section &&
           (first.section == "top-k" ||
            (result.rows[i].context == first.context && result.rows[i].queries == first.queries))) {
      section.push_back(&result.rows[i++]);
    }
    print_section(section);
  }
  fmt::print(
      "\nof peak: the least time that the row's operations, or the bytes it must read, take at the measured peaks, "
      "over its time.\nvs: how many times faster than that peer in this run. FLOPs: operations of dense attention over "
      "those of MSA, whole pass.\nfrom N: not measured, but what N tokens took times the ratio of the pairs of a "
      "causal "
      "pass.\n");
}

// What --geometry stands for; single options given beside it win.
void apply_geometry(const CLI::App& command, BenchFlags& flags) {
  const bool small = flags.geometry == "smollm2";
  const auto set = [&](const char* option, std::int64_t& value, std::int64_t preset) {
    if (command.get_option(option)->count() == 0) value = preset;
  };
  bench::OpBenchOptions& o = flags.options;
  set("--query-heads", o.query_heads, small ? 9 : 64);
  set("--kv-heads", o.kv_heads, small ? 3 : 4);
  set("--head-dim", o.head_dim, small ? 64 : 128);
  set("--index-dim", o.index_dim, small ? 64 : 128);
  set("--block-size", o.block_size, small ? 64 : 128);
  set("--topk", o.topk, 16);
}

std::ofstream open_plot(const std::string& path) {
  std::ofstream plot(path);
  if (!plot) throw Error("bench: --plot: cannot write '" + path + "'");
  return plot;
}

void write_plot(std::ofstream& file, const bench::Plot& plot, const std::string& path) {
  file << bench::draw(plot);
  file.close();
  if (!file) throw Error("bench: --plot: could not write all of '" + path + "'");
  fmt::print(stderr, "wrote {}\n", path);
}

/// Draws results that are there already; times nothing.
void plot_results(const BenchFlags& flags) {
  const bench::Plot plot = read_plot(flags.from);
  bench::draw(plot);  // what cannot be drawn leaves no empty file
  std::ofstream file = open_plot(flags.plot);
  write_plot(file, plot, flags.plot);
}

void run_bench(const BenchFlags& flags) {
  const bench::OpBenchOptions& options = flags.options;
  std::ofstream plot;
  if (!flags.plot.empty()) {  // told now, not after minutes of timing
    const auto has = [&](const char* op) {
      return std::find(options.ops.begin(), options.ops.end(), op) != options.ops.end();
    };
    if (!has("all") && !has("layer")) throw Error("bench: --plot: needs the op layer, or all");
    plot = open_plot(flags.plot);
  }
  const InterruptGuard guard;
  bench::OpBenchHooks hooks;
  hooks.progress = [](const std::string& what) { fmt::print(stderr, "timing {}\n", what); };
  hooks.should_stop = InterruptGuard::requested;
  const bench::OpBenchResult result = bench::run_op_bench(options, hooks);
  flags.json ? print_json(options, result) : print_table(options, result);
  if (result.interrupted) {
    std::fflush(stdout);
    fmt::print(stderr, "bench: interrupted; the rows above are complete, others are missing\n");
    throw CLI::RuntimeError(kInterruptedStatus);
  }
  if (!flags.plot.empty()) {
    write_plot(plot, bench::prefill_plot(options, result), flags.plot);
  }
}

}  // namespace

void add_bench_command(CLI::App& app) {
  auto flags = std::make_shared<BenchFlags>();
  bench::OpBenchOptions* options = &flags->options;
  CLI::App* command = app.add_subcommand("bench", "speed of the operators against torch on this machine");
  std::vector<std::string> ops = bench::op_names();
  ops.push_back("all");
  command->add_option("op", options->ops, "what to time")->check(CLI::IsMember(ops))->capture_default_str();
  command->add_option("--context", options->contexts, "context lengths")->delimiter(',')->capture_default_str();
  command->add_option("--queries", options->queries, "query rows, the last of the context")->capture_default_str();
  command->add_option("--geometry", flags->geometry, "heads, dimensions and blocks of MiniMax-M3 or of SmolLM2-135M")
      ->check(CLI::IsMember({"m3", "smollm2"}));
  command->add_option("--query-heads", options->query_heads)->capture_default_str();
  command->add_option("--kv-heads", options->kv_heads)->capture_default_str();
  command->add_option("--head-dim", options->head_dim)->capture_default_str();
  command->add_option("--index-dim", options->index_dim)->capture_default_str();
  command->add_option("--block-size", options->block_size)->capture_default_str();
  command->add_option("--topk", options->topk)->capture_default_str();
  const CLI::IsMember is_dtype({"float32", "bfloat16", "float16"});
  command->add_option("--dtype", options->dtype, "storage of our tensors")->check(is_dtype)->capture_default_str();
  command->add_option("--torch-dtypes", options->torch_dtypes, "what torch's attention is timed in")
      ->delimiter(',')
      ->check(is_dtype)
      ->capture_default_str();
  command
      ->add_option("--train-whole", options->train_whole,
                   "training: contexts up to here as a whole, longer ones their last --queries tokens")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      ->add_option("--torch-whole", options->torch_whole,
                   "training as a whole: torch is timed up to here, and scaled from here for longer contexts")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--threads", options->threads, "0: all")->check(CLI::NonNegativeNumber)->capture_default_str();
  command->add_option("--repeats", options->repeats, "timed runs; the median counts")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_option("--budget", options->budget_seconds, "seconds after which a row is not repeated")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  CLI::Option* plot = command->add_option("--plot", flags->plot, "write a picture (SVG) of time against context");
  command
      ->add_option("--from", flags->from,
                   "time nothing: --plot what is in a JSON file of this command or of gpu_bench.py")
      ->needs(plot);
  command->add_flag("--json", flags->json, "print JSON");
  command->callback([flags, command] {
    if (!flags->from.empty()) return plot_results(*flags);
    if (!flags->geometry.empty()) apply_geometry(*command, *flags);
    run_bench(*flags);
  });
}

}  // namespace msa::app
