// SPDX-License-Identifier: Apache-2.0
// The subcommands of `msa`. Each file <name>_command.cc adds one: options, a callback that calls the library, and the
// printing of what it returns. Figures go to stdout (a table, or JSON with --json), progress to stderr. Bad usage exits
// with 2 (CLI11 errors), failures with 1 (msa::Error, reported by main).
#pragma once

#include <CLI/CLI.hpp>

namespace msa::app {

void add_convert_command(CLI::App& app);
void add_train_command(CLI::App& app);
void add_generate_command(CLI::App& app);
void add_eval_command(CLI::App& app);
void add_logits_command(CLI::App& app);
void add_bench_command(CLI::App& app);
void add_check_command(CLI::App& app);
void add_info_command(CLI::App& app);

}  // namespace msa::app
