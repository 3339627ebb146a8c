// SPDX-License-Identifier: Apache-2.0
// Options that the subcommands which read text share: where it is, and how a checkpoint turns it into tokens. Tested in
// tests/python/test_train.py.
#pragma once

#include <CLI/CLI.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "src/model/corpus.h"
#include "src/model/files/tokenizer.h"
#include "src/model/retrieval.h"

namespace msa::app {

/// Paths of text; none: the default corpus.
model::Corpus open_corpus(const std::vector<std::string>& paths);

/// A checkpoint's tokenizer and what goes between documents.
struct TextSource {
  model::TextTools tools;
  std::int64_t separator = -1;
  std::optional<files::Tokenizer> tokenizer;  ///< absent: bytes are tokens

  /// From the directory's tokenizer.json.
  static TextSource load(const std::string& directory);
  /// Bytes as tokens 0..255, documents separated by token 256: for models without a tokenizer, of at least 257 tokens.
  static TextSource bytes(std::int64_t vocab_size);

  std::string decode(const model::Tokens& tokens) const;
};

/// A CLI11 check from a function that throws msa::Error on bad text, so that bad text is bad usage (exit 2).
template <class Parse>
CLI::Validator check_with(Parse parse, const std::string& name) {
  return CLI::Validator(
      [parse](std::string& text) -> std::string {
        try {
          parse(text);
        } catch (const std::exception& error) {
          return error.what();
        }
        return "";
      },
      name);
}

}  // namespace msa::app
