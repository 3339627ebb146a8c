// SPDX-License-Identifier: Apache-2.0
// Entry of the program `msa`: registers the subcommands, turns exceptions into messages and exit codes (1: failed, 2:
// bad usage, 130: interrupted). Tested in tests/integration/test_cli.py.
#include <cstdio>
#include <exception>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "apps/msa/commands.h"
#include "msa/context.h"

namespace {

// A model's forward frees and takes back buffers of many megabytes all the time. By default glibc returns each to the
// system and every page of the next one faults in anew, which costs as much as the arithmetic on some virtual machines:
// keep them.
void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

}  // namespace

int main(int argc, char** argv) {
  keep_freed_memory();
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

  int status = 0;
  try {
    app.parse(argc, argv);
  } catch (const CLI::RuntimeError& error) {  // the subcommand has said all there is to say but how it ended
    status = error.get_exit_code();
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
  return status;
}
