// SPDX-License-Identifier: Apache-2.0
// Added tokens ("<|im_end|>"): strings that become one token wherever they stand in a text, before anything else looks
// at it. Found by the longest match at the leftmost place, with the options of the tokenizers package.
// Tested in tests/unit/files_tokenizer_test.cc and tests/python/test_tokenizer.py.
#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "src/model/files/bpe.h"

namespace msa::files {

struct AddedToken {
  std::string content;  // in normal form when `normalized`
  TokenId id = kNoToken;
  bool single_word = false;  // only between non-word characters
  bool left_strip = false;   // swallows white space before it
  bool right_strip = false;  // and after it
  bool normalized = false;   // looked for in the normalized text
  bool special = false;      // markup: left out when decoding for a reader
};

inline constexpr std::size_t kMaxAddedTokenBytes = 512;  // bounds the time a text can be made to take

class AddedTokenMatcher {
 public:
  /// Content of 1 to kMaxAddedTokenBytes bytes; of two tokens with one content the first is found.
  void add(const AddedToken& token);
  bool empty() const { return tokens_.empty(); }

  /// Walks `text` in order: visit(kNoToken, piece) for text between tokens, visit(id, piece) for a token. With
  /// `ignore_special`, special tokens are plain text. O(text * longest token) at worst.
  using Visit = std::function<void(TokenId id, std::string_view piece)>;
  void split(std::string_view text, bool ignore_special, const Visit& visit) const;

 private:
  /// The longest token that starts at `position`: its index, or -1, and its length.
  std::int32_t longest_at(std::string_view text, std::size_t position, std::size_t* length) const;

  std::vector<AddedToken> tokens_;
  std::unordered_map<std::uint64_t, std::uint32_t> edges_;  // node << 8 | byte -> node; the root is 0
  std::vector<std::int32_t> token_at_ = {-1};               // a node's token, or -1
  std::bitset<256> starts_;                                 // first bytes: most positions end here
};

}  // namespace msa::files
