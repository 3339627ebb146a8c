// SPDX-License-Identifier: Apache-2.0
// Entry of the program `msa`: registers the subcommands, turns exceptions into messages and exit codes (1: failed, 2: bad
// usage). Tested in tests/integration/test_cli.py.
#include <cstdio>
#include <exception>

#include "apps/msa/commands.h"
#include "msa/context.h"

int main(int argc, char** argv) {
  CLI::App app("MiniMax Sparse Attention: convert, train, run and measure sparse-attention language models.", "msa");
  app.set_version_flag("--version", msa::version());
  app.require_subcommand(1);
  app.failure_message(CLI::FailureMessage::simple);
  app.footer("Run `msa SUBCOMMAND --help` for the options of one.");

  msa::app::add_convert_command(app);
  msa::app::add_train_command(app);
  msa::app::add_generate_command(app);
  msa::app::add_eval_command(app);
  msa::app::add_logits_command(app);
  msa::app::add_bench_command(app);
  msa::app::add_check_command(app);
  msa::app::add_info_command(app);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "msa: %s\n", error.what());
    return 1;
  }
  // A pipe closed early or a full disk shows only when the output is flushed.
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    std::perror("msa: standard output");
    return 1;
  }
  return 0;
}
