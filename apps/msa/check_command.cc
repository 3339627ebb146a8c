// SPDX-License-Identifier: Apache-2.0
// `msa check`: conformance of a backend with the reference on this machine. Exits 1 when a check fails. Tested in
// tests/integration/test_cli.py.
#include <fmt/format.h>

#include <cstdio>
#include <map>
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

struct Summary {
  std::int64_t passed = 0;
  std::int64_t failed = 0;
  double worst = 0;  // error over what is allowed
};

void run_check(const CheckOptions& options) {
  Context context;
  context.backend = parse_backend(options.backend);
  context.threads = options.threads;
  std::vector<std::string> sets = {active_instruction_set()};
  if (options.all_sets) sets = supported_instruction_sets();
  nlohmann::ordered_json json;
  std::int64_t failed = 0;
  std::int64_t total = 0;
  for (const std::string& set : sets) {
    force_instruction_set(set);
    const auto progress = [&](const std::string& geometry) { fmt::print(stderr, "checking {}: {}\n", set, geometry); };
    const std::vector<conformance::CheckResult> results = conformance::run_conformance(context, progress);
    std::map<std::string, Summary> by_op;
    for (const conformance::CheckResult& result : results) {
      Summary& summary = by_op[result.op];
      ++(result.passed ? summary.passed : summary.failed);
      if (result.allowed > 0) summary.worst = std::max(summary.worst, result.error / result.allowed);
      failed += result.passed ? 0 : 1;
      ++total;
      if (options.json) {
        json["checks"].push_back({{"instruction_set", set},
                                  {"op", result.op},
                                  {"geometry", result.geometry},
                                  {"error", result.error},
                                  {"allowed", result.allowed},
                                  {"passed", result.passed}});
      }
    }
    if (options.json) continue;
    fmt::print("{:<28} {:>8} {:>8}   {}\n", options.backend + " on " + set, "passed", "failed",
               "worst error / allowed");
    for (const auto& [op, s] : by_op) fmt::print("  {:<26} {:>8} {:>8}   {:.2f}\n", op, s.passed, s.failed, s.worst);
    for (const conformance::CheckResult& result : results) {
      if (!result.passed) {
        fmt::print("  FAILED {} ({}): error {:.3g}, allowed {:.3g}\n", result.op, result.geometry, result.error,
                   result.allowed);
      }
    }
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
      ->check(CLI::IsMember({"auto", "cpu", "reference"}))
      ->capture_default_str();
  command->add_option("--threads", options->threads, "0: all")->check(CLI::NonNegativeNumber)->capture_default_str();
  command->add_flag("--all-instruction-sets", options->all_sets, "check every instruction set of this machine");
  command->add_flag("--json", options->json, "print JSON");
  command->callback([options] { run_check(*options); });
}

}  // namespace msa::app
