// SPDX-License-Identifier: Apache-2.0
// See training_text.h.
#include "apps/msa/training_text.h"

#include <filesystem>

#include "msa/error.h"
#include "src/model/files/config.h"

namespace msa::app {

model::Corpus open_corpus(const std::vector<std::string>& paths) {
  if (paths.empty()) return model::Corpus::open_default();
  return model::Corpus::open({paths.begin(), paths.end()});
}

TextSource TextSource::load(const std::string& directory) {
  TextSource source;
  source.tokenizer = files::Tokenizer::load(directory);
  source.tools = model::make_text_tools(*source.tokenizer, directory);
  // What pre-training put between documents; where no such token exists, the end-of-sequence token.
  for (const char* name : {"<|endoftext|>", "<|end_of_text|>", "</s>"}) {
    if (const auto token = source.tokenizer->find_token(name)) {
      source.separator = *token;
      return source;
    }
  }
  const files::ModelConfig config = files::load_model_config(directory);
  if (!config.eos_token_ids.empty()) source.separator = config.eos_token_ids.front();
  return source;
}

TextSource TextSource::bytes(std::int64_t vocab_size) {
  if (vocab_size < 257) {
    throw Error("without a tokenizer bytes are tokens, and vocab_size " + std::to_string(vocab_size) +
                " must be at least 257; name a tokenizer with --tokenizer");
  }
  TextSource source;
  source.tools = model::make_byte_tools();
  source.separator = 256;
  return source;
}

std::string TextSource::decode(const model::Tokens& tokens) const {
  if (tokenizer) {
    const std::vector<std::int32_t> ids(tokens.begin(), tokens.end());
    return tokenizer->decode(ids, true);
  }
  std::string text;
  for (const std::int64_t token : tokens) {
    if (token < 256) text += static_cast<char>(token);
  }
  return text;
}

}  // namespace msa::app
