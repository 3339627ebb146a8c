// SPDX-License-Identifier: Apache-2.0
// tokenizer.json of byte-level BPE models (GPT-2, Llama 3, Qwen, SmolLM, MiniMax): text to token ids and back, equal to
// the `tokenizers` package. A text passes added tokens, normalizer, pre-tokenizer and BPE, as that package orders them;
// parts this code does not know are refused by name when loading. Tested in tests/unit/files_tokenizer_test.cc,
// tests/python/test_tokenizer.py (against the package), tests/fuzz/.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace msa::files {

struct TokenizerTables;  // what a tokenizer.json turns into: tokenizer.cc

struct EncodeOptions {
  /// Add what the post-processor adds around a text (a beginning-of-sequence token, in models that have one).
  bool add_special_tokens = true;
  /// Read "<|im_end|>" in the text as the token. Off: as the characters, for text that must not act as markup.
  bool parse_special_tokens = true;
};

/// Immutable; copies share the tables; every method may be called from several threads.
class Tokenizer {
 public:
  /// From tokenizer.json, or the directory that holds it. Throws msa::Error naming the file and the part.
  static Tokenizer load(const std::filesystem::path& path);
  static Tokenizer parse(std::string_view tokenizer_json, const std::string& origin);

  /// Token ids of `text`. Bytes that are not UTF-8 count as U+FFFD, one for each maximal broken sequence, as Python's
  /// errors="replace" has it. O(n log n) for ordinary patterns; throws msa::Error when the tokenizer's pattern needs
  /// too many steps on the text. Memory O(n).
  std::vector<std::int32_t> encode(std::string_view text, const EncodeOptions& options = {}) const;

  /// Text of the tokens, always valid UTF-8: broken sequences become U+FFFD. An id without a token adds nothing (models
  /// pad their vocabulary).
  std::string decode(std::span<const std::int32_t> tokens, bool skip_special_tokens = false) const;

  /// The raw bytes of a token, perhaps part of a character; empty for an id without a token. Lives as long as the
  /// tokenizer.
  std::string_view token_bytes(std::int32_t token) const;
  /// The token whose spelling in tokenizer.json is `content`: "<|im_end|>", or "Ġthe".
  std::optional<std::int32_t> find_token(std::string_view content) const;
  bool is_special(std::int32_t token) const;
  /// One more than the largest id.
  std::int32_t vocab_size() const;

 private:
  explicit Tokenizer(std::shared_ptr<const TokenizerTables> tables) : tables_(std::move(tables)) {}
  std::shared_ptr<const TokenizerTables> tables_;
};

/// Decodes a stream token by token: what push and finish return, joined, is decode() of all tokens; a character is
/// held back until its last byte has come.
class StreamingDecoder {
 public:
  explicit StreamingDecoder(Tokenizer tokenizer, bool skip_special_tokens = true)
      : tokenizer_(std::move(tokenizer)), skip_special_tokens_(skip_special_tokens) {}
  std::string push(std::int32_t token);
  /// What is left; the decoder is then as new.
  std::string finish();

 private:
  Tokenizer tokenizer_;
  bool skip_special_tokens_;
  std::string pending_;
};

/// What tokenizer_config.json says beside tokenizer.json.
struct TokenizerSettings {
  std::string bos_token;  // empty: none
  std::string eos_token;
  std::string chat_template;  // Jinja text; from chat_template.jinja when that file is there; empty: none
};

TokenizerSettings parse_tokenizer_settings(std::string_view text, const std::string& origin);
/// From the directory's tokenizer_config.json and chat_template.jinja, either of which may be missing. Throws
/// msa::Error on a broken file.
TokenizerSettings load_tokenizer_settings(const std::filesystem::path& directory);

}  // namespace msa::files
