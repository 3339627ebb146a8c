// SPDX-License-Identifier: Apache-2.0
// Options that several subcommands share. Tested in tests/integration/test_cli.py.
#include "apps/msa/model_options.h"

#include <algorithm>

#include "msa/select_blocks.h"

namespace msa::app {

void ModelOptions::add_to(CLI::App& command) {
  command.add_option("--model", directory, "Hugging Face directory: config.json, *.safetensors, tokenizer.json")
      ->required()
      ->check(CLI::ExistingDirectory);
  command
      .add_option("--dtype", dtype,
                  "Type of weights, activations and cache; bfloat16 takes half the memory, and decode, which reads "
                  "every weight for every token, is faster")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->capture_default_str();
  command
      .add_option("--cache-dtype", cache_dtype,
                  "Type of the paged cache (text that is generated, logits, retrieval tasks): that of the model, or "
                  "float8_e4m3, a quarter of float32's memory")
      ->check(CLI::IsMember({"model", "float8_e4m3"}))
      ->capture_default_str();
  command
      .add_option("--local-blocks", local_blocks,
                  "Last blocks that are always taken, in place of the model's own number")
      ->check(CLI::Range(std::int64_t{0}, kMaxTopk));
  command
      .add_option("--init-blocks", init_blocks,
                  "First blocks that are always taken, in place of the model's own number")
      ->check(CLI::Range(std::int64_t{0}, kMaxTopk));
}

model::Decoder ModelOptions::load() const {
  model::Decoder decoder = model::Decoder::load(directory, scalar_type());
  if (cache_dtype == "float8_e4m3") decoder.use_float8_cache();
  files::ModelConfig& config = decoder.mutable_config();
  config.index_local_blocks = local_blocks.value_or(config.index_local_blocks);
  config.index_init_blocks = init_blocks.value_or(config.index_init_blocks);
  return decoder;
}

void AttentionFlags::add_to(CLI::App& command) {
  command
      .add_option(
          "--attention", mode,
          "How sparse layers attend: by their index branch, to everything, to the first block and the most recent "
          "ones, or to the blocks of largest true attention mass")
      ->check(CLI::IsMember({"sparse", "dense", "window", "oracle"}))
      ->capture_default_str();
  command.add_option("--topk", topk, "Blocks a query attends to, in place of the model's own")
      ->check(CLI::Range(std::int64_t{1}, kMaxTopk));
}

model::AttentionOptions AttentionFlags::resolve() const {
  model::AttentionOptions options;
  options.mode = model::parse_attention_mode(mode);
  if (topk > 0) options.topk = topk;
  return options;
}

std::int64_t page_size(const files::ModelConfig& config) {
  return config.index_block_size > 0 ? config.index_block_size : 128;
}

cache::PagedCache make_cache(const model::Decoder& decoder, const model::AttentionOptions& attention,
                             std::int64_t tokens) {
  const std::int64_t page = page_size(decoder.config());
  const bool with_index_keys = attention.mode == model::AttentionMode::kSparse;
  return {decoder.cache_shape(page, with_index_keys),
          cache::PagedCache::pages_for(std::max<std::int64_t>(tokens, 1), page)};
}

}  // namespace msa::app
