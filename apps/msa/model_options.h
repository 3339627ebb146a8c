// SPDX-License-Identifier: Apache-2.0
// Options that several subcommands share: which model, in which type, with which attention. Tested in
// tests/integration/test_cli.py.
#pragma once

#include <CLI/CLI.hpp>

#include <cstdint>
#include <optional>
#include <string>

#include "src/model/decoder.h"

namespace msa::app {

/// --model, --dtype, --cache-dtype, and the blocks that are forced.
struct ModelOptions {
  std::string directory;
  std::string dtype = "float32";
  std::string cache_dtype = "model";
  std::optional<std::int64_t> local_blocks, init_blocks;  // absent: the model's own

  void add_to(CLI::App& command);
  at::ScalarType scalar_type() const { return dtype == "bfloat16" ? at::kBFloat16 : at::kFloat; }
  model::Decoder load() const;
};

/// --attention and --topk.
struct AttentionFlags {
  std::string mode = "sparse";
  std::int64_t topk = 0;  // 0: the model's own

  void add_to(CLI::App& command);
  model::AttentionOptions resolve() const;
};

/// The page size that suits a model: its block size, or 128 tokens where it has none.
std::int64_t page_size(const files::ModelConfig& config);

/// Pages for `tokens` tokens of one sequence; index keys only where the mode reads them.
cache::PagedCache make_cache(const model::Decoder& decoder, const model::AttentionOptions& attention,
                             std::int64_t tokens);

}  // namespace msa::app
