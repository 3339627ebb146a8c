// SPDX-License-Identifier: Apache-2.0
// See added_tokens.h.
#include "src/model/files/added_tokens.h"

#include <algorithm>

#include "src/model/files/regex.h"
#include "src/model/files/utf8.h"

namespace msa::files {
namespace {

bool is_white_space(std::uint32_t c) {
  return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

bool is_word_at(std::string_view text, std::size_t position) {
  static const Regex word = Regex::compile("[\\w\\x{200c}\\x{200d}]", "word characters");
  return word.matches_at(text, position);
}

/// Start of the character that ends at `end` > 0.
std::size_t previous_character(std::string_view text, std::size_t end) {
  do --end;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80);
  return end;
}

}  // namespace

void AddedTokenMatcher::add(const AddedToken& token) {
  std::uint32_t node = 0;
  for (const char c : token.content) {
    const std::uint64_t edge = std::uint64_t{node} << 8 | static_cast<unsigned char>(c);
    const auto [place, inserted] = edges_.emplace(edge, static_cast<std::uint32_t>(token_at_.size()));
    if (inserted) token_at_.push_back(-1);
    node = place->second;
  }
  starts_.set(static_cast<unsigned char>(token.content[0]));
  if (token_at_[node] < 0) token_at_[node] = static_cast<std::int32_t>(tokens_.size());
  tokens_.push_back(token);
}

std::int32_t AddedTokenMatcher::longest_at(std::string_view text, std::size_t position, std::size_t* length) const {
  std::int32_t best = -1;
  std::uint32_t node = 0;
  for (std::size_t i = position; i < text.size(); ++i) {
    const auto edge = edges_.find(std::uint64_t{node} << 8 | static_cast<unsigned char>(text[i]));
    if (edge == edges_.end()) break;
    node = edge->second;
    if (token_at_[node] >= 0) {
      best = token_at_[node];
      *length = i + 1 - position;
    }
  }
  return best;
}

void AddedTokenMatcher::split(std::string_view text, bool ignore_special, const Visit& visit) const {
  std::size_t done = 0;
  for (std::size_t position = 0; position < text.size();) {
    std::size_t length = 0;
    const std::int32_t index =
        starts_.test(static_cast<unsigned char>(text[position])) ? longest_at(text, position, &length) : -1;
    if (index < 0) {
      ++position;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<std::size_t>(index)];
    std::size_t begin = position;
    std::size_t end = position + length;
    position = end;  // whether the match is kept or not
    if (ignore_special && token.special) continue;
    if (token.single_word) {
      const bool word_before = begin > 0 && is_word_at(text, previous_character(text, begin));
      const bool word_after = end < text.size() && is_word_at(text, end);
      if (word_before || word_after) continue;
    }
    if (token.left_strip) {
      while (begin > done) {
        const std::size_t previous = previous_character(text, begin);
        if (previous < done || !is_white_space(read_utf8(text.substr(previous)).code_point)) break;
        begin = previous;
      }
    }
    if (token.right_strip) {
      while (end < text.size()) {
        const Utf8Unit unit = read_utf8(text.substr(end));
        if (!is_white_space(unit.code_point)) break;
        end += unit.length;
      }
    }
    if (begin > done) visit(kNoToken, text.substr(done, begin - done));
    visit(token.id, text.substr(begin, end - begin));
    done = end;
  }
  if (done < text.size()) visit(kNoToken, text.substr(done));
}

}  // namespace msa::files
