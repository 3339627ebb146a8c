// SPDX-License-Identifier: Apache-2.0
// See bench_results.h.
#include "apps/msa/bench_results.h"

#include <fmt/format.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "msa/error.h"

namespace msa::app {
namespace {

using nlohmann::json;

std::string describe(const json& shape) {
  return fmt::format("{} query / {} kv heads, head dimension {}, {} blocks of {}; {}",
                     shape.at("query_heads").get<int>(), shape.at("kv_heads").get<int>(),
                     shape.at("head_dim").get<int>(), shape.at("topk").get<int>(), shape.at("block_size").get<int>(),
                     shape.at("dtype").get<std::string>());
}

// bench/gpu_bench.py: the last rows of each context, torch's fastest backend.
bench::Plot from_gpu(const json& report) {
  bench::Plot plot;
  long long queries = 0;
  for (const json& row : report.at("rows")) {
    if (row.at("part") != "prefill") continue;
    const json& seconds = row.at("seconds");
    const double context = row.at("keys").get<double>();
    const double msa = seconds.at("select").get<double>() + seconds.at("attend").get<double>();
    queries = row.at("queries").get<long long>();
    plot.points.push_back({bench::Curve::kTorchBFloat16, context, seconds.at("dense").get<double>()});
    plot.points.push_back({bench::Curve::kMsa, context, msa});
  }
  plot.title = fmt::format("Attention of the last {} tokens against the context", queries);
  plot.subtitle = describe(report.at("geometry")) + "; " + report.at("machine").at("in_words").get<std::string>();
  return plot;
}

// `msa bench --json`.
bench::Plot from_bench(const json& report) {
  const json& shape = report.at("shape");
  bench::OpBenchOptions options;
  shape.at("query_heads").get_to(options.query_heads);
  shape.at("kv_heads").get_to(options.kv_heads);
  shape.at("head_dim").get_to(options.head_dim);
  shape.at("topk").get_to(options.topk);
  shape.at("block_size").get_to(options.block_size);
  shape.at("queries").get_to(options.queries);
  shape.at("dtype").get_to(options.dtype);
  bench::OpBenchResult result;
  report.at("machine").at("threads").get_to(result.threads);
  report.at("machine").at("instruction_set").get_to(result.instruction_set);
  for (const json& row : report.at("rows")) {
    bench::OpBenchRow& read = result.rows.emplace_back();
    row.at("section").get_to(read.section);
    row.at("name").get_to(read.name);
    row.at("context").get_to(read.context);
    row.at("seconds").get_to(read.seconds);
  }
  return bench::prefill_plot(options, result);
}

}  // namespace

bench::Plot read_plot(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw Error("bench: --from: cannot read '" + path + "'");
  try {
    const json report = json::parse(file);
    return report.contains("geometry") ? from_gpu(report) : from_bench(report);
  } catch (const json::exception& error) {
    throw Error(fmt::format("bench: --from: '{}' is no result of msa bench --json or bench/gpu_bench.py: {}", path,
                            error.what()));
  }
}

}  // namespace msa::app
