// SPDX-License-Identifier: Apache-2.0
// `msa check`: conformance of a backend with the reference on this machine. Exits 1 when a check fails, and when the
// backend cannot run here. Tested in tests/integration/test_cli.py.
#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "apps/msa/commands.h"
#include "msa/error.h"
#include "msa/msa.h"
#include "src/conformance/conformance.h"

namespace msa::app {
namespace {

struct CheckOptions {
  std::string backend = "cpu";
  int threads = 0;
  bool json = false;
  bool all_sets = false;
};

/// What the checks run on: the program's instruction sets in turn, or the current device. Throws when that is nothing.
std::vector<std::string> list_machines(const CheckOptions& options, Backend backend) {
  if (backend == Backend::kCuda) {
    const CudaInfo cuda = cuda_info();
    if (!cuda.usable) throw Error("check: backend cuda: " + cuda.why_not + "; nothing was checked");
    return {cuda.device};
  }
  return options.all_sets ? supported_instruction_sets() : std::vector<std::string>{active_instruction_set()};
}

void print_table(const std::string& title, const std::vector<conformance::CheckResult>& results) {
  fmt::print("{:<28} {:>8} {:>8}   {}\n", title, "passed", "failed", "worst error / allowed");
  for (const conformance::OpSummary& s : conformance::summarize(results)) {
    fmt::print("  {:<26} {:>8} {:>8}   {:.2f}\n", s.op, s.passed, s.failed, s.worst);
  }
  for (const conformance::CheckResult& result : results) {
    if (!result.passed) {
      fmt::print("  FAILED {} ({}): error {:.3g}, allowed {:.3g}\n", result.op, result.geometry, result.error,
                 result.allowed);
    }
  }
}

void run_check(const CheckOptions& options) {
  Context context;
  context.backend = parse_backend(options.backend);
  context.threads = options.threads;
  const bool on_device = context.backend == Backend::kCuda;
  nlohmann::ordered_json json;
  std::int64_t failed = 0;
  std::int64_t total = 0;
  for (const std::string& machine : list_machines(options, context.backend)) {
    if (!on_device) force_instruction_set(machine);
    const auto progress = [&](const std::string& what) { fmt::print(stderr, "checking {}: {}\n", machine, what); };
    const std::vector<conformance::CheckResult> results =
        conformance::run_conformance(context, conformance::all_geometries(), progress);
    for (const conformance::CheckResult& result : results) {
      failed += result.passed ? 0 : 1;
      ++total;
      json["checks"].push_back({{on_device ? "device" : "instruction_set", machine},
                                {"op", result.op},
                                {"geometry", result.geometry},
                                {"error", result.error},
                                {"allowed", result.allowed},
                                {"passed", result.passed}});
    }
    if (!options.json) print_table(options.backend + " on " + machine, results);
  }
  if (options.json) {
    json["backend"] = options.backend;
    json["passed"] = total - failed;
    json["failed"] = failed;
    fmt::print("{}\n", json.dump(2));
  } else {
    fmt::print("\n{} passed, {} failed\n", total - failed, failed);
  }
  if (failed > 0) {
    throw Error(fmt::format("check: {} of {} checks failed on backend {}", failed, total, options.backend));
  }
}

}  // namespace

void add_check_command(CLI::App& app) {
  auto options = std::make_shared<CheckOptions>();
  CLI::App* command = app.add_subcommand("check", "hold a backend against the float64 reference on this machine");
  command->add_option("--backend", options->backend, "backend to check")
      ->check(CLI::IsMember({"auto", "cpu", "cuda", "reference"}))
      ->capture_default_str();
  command->add_option("--threads", options->threads, "0: all")->check(CLI::NonNegativeNumber)->capture_default_str();
  command->add_flag("--all-instruction-sets", options->all_sets,
                    "check every instruction set of this machine (backend cpu)");
  command->add_flag("--json", options->json, "print JSON");
  command->callback([options] { run_check(*options); });
}

}  // namespace msa::app
