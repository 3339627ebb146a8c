// SPDX-License-Identifier: Apache-2.0
// `msa logits`: what a model predicts after every token of a given sequence, for comparison with other implementations.
// Tested in tests/python/test_decoder.py.
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "apps/msa/commands.h"
#include "apps/msa/model_options.h"
#include "msa/error.h"
#include "src/model/files/file_io.h"
#include "src/model/files/safetensors.h"

namespace msa::app {
namespace {

struct LogitsOptions {
  ModelOptions model;
  AttentionFlags attention;
  std::string tokens;
  std::string out;
  std::int64_t chunk = 512;
};

constexpr std::size_t kMaxTokenFileBytes = std::size_t{1} << 28;

std::vector<std::int64_t> read_tokens(const std::string& path) {
  const std::string text = files::read_text_file(path, kMaxTokenFileBytes);
  std::vector<std::int64_t> tokens;
  const char* at = text.data();
  const char* const end = at + text.size();
  const auto is_space = [](char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; };
  while (true) {
    at = std::find_if_not(at, end, is_space);
    if (at == end) break;
    const char* const word_end = std::find_if(at, end, is_space);
    std::int64_t value = 0;
    const auto [stop, failure] = std::from_chars(at, word_end, value);
    if (failure != std::errc() || stop != word_end) {
      throw Error("tokens file " + path + ": entry " + std::to_string(tokens.size()) + " is not an integer");
    }
    tokens.push_back(value);
    at = word_end;
  }
  if (tokens.empty()) throw Error("tokens file " + path + ": holds no token");
  return tokens;
}

void run_logits(const LogitsOptions& options) {
  const c10::NoGradGuard no_grad;
  const model::Decoder decoder = options.model.load();
  std::vector<std::int64_t> ids = read_tokens(options.tokens);
  const auto count = static_cast<std::int64_t>(ids.size());
  const at::Tensor tokens = at::from_blob(ids.data(), {count}, at::kLong);
  at::Tensor logits = at::empty({count, decoder.config().vocab_size}, at::kFloat);
  model::ForwardOptions forward;
  forward.attention = options.attention.resolve();
  if (options.chunk == 0) {
    const at::Tensor bounds = at::tensor({0, static_cast<int>(count)}, at::kInt);
    logits.copy_(decoder.logits(decoder.forward(tokens, bounds, forward).hidden));
  } else {
    cache::PagedCache cache = make_cache(decoder, forward.attention, count);
    const cache::SequenceId sequence = cache.create_sequence();
    for (std::int64_t begin = 0; begin < count; begin += options.chunk) {
      const std::int64_t rows = std::min(options.chunk, count - begin);
      const at::Tensor hidden = decoder.forward_cached(tokens.narrow(0, begin, rows), cache, sequence, forward).hidden;
      logits.narrow(0, begin, rows).copy_(decoder.logits(hidden));
    }
  }
  files::TensorSpec spec;
  spec.name = "logits";
  spec.dtype = files::DType::kF32;
  spec.shape = logits.sizes().vec();
  files::write_safetensors(options.out, std::span(&spec, 1), [&](std::size_t) {
    return std::span<const std::byte>(static_cast<const std::byte*>(logits.const_data_ptr()), logits.nbytes());
  });
}

}  // namespace

void add_logits_command(CLI::App& app) {
  CLI::App* const command = app.add_subcommand("logits", "Write the logits after every token of a sequence");
  const auto options = std::make_shared<LogitsOptions>();
  options->model.add_to(*command);
  options->attention.add_to(*command);
  command->add_option("--tokens", options->tokens, "Text file of token ids, separated by white space")
      ->required()
      ->check(CLI::ExistingFile);
  command->add_option("--out", options->out, "Safetensors file to write: tensor `logits`, float32 [tokens, vocabulary]")
      ->required();
  command->add_option("--chunk", options->chunk, "Tokens a pass over the paged cache; 0: all at once, without a cache")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->callback([options] { run_logits(*options); });
}

}  // namespace msa::app
