// SPDX-License-Identifier: Apache-2.0
// See regex.h: the translation, then the search with its step budget.
#include "src/model/files/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "msa/error.h"
#include "src/model/files/quote.h"

namespace msa::files {
namespace {

constexpr std::size_t kMaxPatternBytes = 16384;
// A search starts with few steps allowed and is retried with four times as many, so that what an expensive match costs
// is known to within that factor and can be charged to the text's budget. Ordinary patterns stay below the first limit
// unless one match spans thousands of characters.
constexpr std::uint32_t kFirstStepLimit = 20'000;
constexpr std::uint64_t kBudgetBase = 20'000'000;
constexpr std::uint64_t kBudgetPerByte = 256;
constexpr std::uint32_t kHeapKibibytes = 256 * 1024;

// Unicode's White_Space: Oniguruma's \s. PCRE2 would add U+180E.
constexpr char kSpace[] =
    "\\x09-\\x0d\\x20\\x85\\xa0\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}";
constexpr char kNotSpace[] =
    "\\x00-\\x08\\x0e-\\x1f\\x21-\\x84\\x86-\\x9f\\xa1-\\x{167f}\\x{1681}-\\x{1fff}\\x{200b}-\\x{2027}"
    "\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{10ffff}";
// Oniguruma's \w. PCRE2 would leave out marks and connectors other than the underscore.
constexpr char kWord[] = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}";
constexpr char kHexDigit[] = "0-9a-fA-F";

struct Translator {
  std::string_view in;
  const std::string& origin;
  std::string out;
  std::size_t at = 0;
  bool in_class = false;

  [[noreturn]] void refuse(const std::string& what) const {
    throw Error(origin + ": pattern " + quote(in) + ": " + what + " is not supported");
  }
  char peek(std::size_t ahead) const { return at + ahead < in.size() ? in[at + ahead] : '\0'; }

  void copy(std::size_t count) {
    out.append(in.substr(at, count));
    at += count;
  }

  /// A class such as \s, standing alone or inside brackets.
  void put_class(const char* positive, const char* negative, bool negated) {
    at += 2;
    if (in_class) {
      if (negated && negative == nullptr) refuse("a negated class inside brackets");
      out += negated ? negative : positive;
    } else {
      out += std::string(negated ? "[^" : "[") + positive + "]";
    }
  }

  void escape() {
    switch (peek(1)) {
      case 's': return put_class(kSpace, kNotSpace, false);
      case 'S': return put_class(kSpace, kNotSpace, true);
      case 'w': return put_class(kWord, nullptr, false);
      case 'W': return put_class(kWord, nullptr, true);
      case 'h': return put_class(kHexDigit, nullptr, false);
      case 'H': return put_class(kHexDigit, nullptr, true);
      case 'b':
      case 'B':
        if (!in_class) refuse("a word boundary");
        return copy(2);
      case 'C':
      case 'Q': refuse(std::string("\\") + peek(1));
      default:
        // \p{...}, \x{...}: their braces are no repetition.
        if (peek(2) == '{') {
          const std::size_t close = in.find('}', at);
          if (close == std::string_view::npos) refuse("an unclosed brace");
          return copy(close + 1 - at);
        }
        return copy(2);
    }
  }

  void repetition() {
    std::size_t end = at + 1;
    bool comma = false;
    while (end < in.size() && ((in[end] >= '0' && in[end] <= '9') || (in[end] == ',' && !comma))) {
      comma = comma || in[end] == ',';
      ++end;
    }
    if (end == in.size() || in[end] != '}' || end == at + 1) return copy(1);  // a plain brace
    if (end + 1 < in.size() && in[end + 1] == '+') refuse("'+' behind a counted repetition");
    if (peek(1) == ',') {  // {,n}
      out += "{0";
      ++at;
    }
    copy(end + 1 - at);
  }

  void group() {
    if (peek(1) == '*') refuse("a verb");
    if (peek(1) == '?') {
      for (std::size_t i = 2; peek(i) == '-' || (peek(i) >= 'a' && peek(i) <= 'z'); ++i) {
        if (peek(i) == 'm' || peek(i) == 's') refuse("a line-mode flag");
      }
    }
    copy(1);
  }

  std::string run() {
    while (at < in.size()) {
      const char c = in[at];
      if (c == '\\') {
        if (at + 1 == in.size()) refuse("a trailing backslash");
        escape();
      } else if (in_class) {
        if (c == '[' && peek(1) == ':') {
          const std::size_t close = in.find(":]", at);
          if (close == std::string_view::npos) refuse("an unclosed class name");
          copy(close + 2 - at);
          continue;
        }
        if (c == '[') refuse("a class inside a class");
        if (c == '&' && peek(1) == '&') refuse("an intersection of classes");
        in_class = c != ']';
        copy(1);
      } else if (c == '[') {
        in_class = true;
        copy(1);
        if (peek(0) == '^') copy(1);
        if (peek(0) == ']') refuse("']' at the start of a class");
      } else if (c == '{') {
        repetition();
      } else if (c == '(') {
        group();
      } else {
        copy(1);
      }
    }
    return std::move(out);
  }
};

std::string error_text(int code) {
  PCRE2_UCHAR buffer[256] = {};
  pcre2_get_error_message(code, buffer, sizeof buffer);
  return reinterpret_cast<const char*>(buffer);
}

template <auto Free>
struct Deleter {
  template <class T>
  void operator()(T* object) const {
    Free(object);
  }
};
using Code = std::unique_ptr<pcre2_code, Deleter<pcre2_code_free>>;
using CompileContext = std::unique_ptr<pcre2_compile_context, Deleter<pcre2_compile_context_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Deleter<pcre2_match_context_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Deleter<pcre2_match_data_free>>;

/// One text being searched: PCRE2's scratch and what is left of the step budget.
class Search {
 public:
  Search(const pcre2_code* code, std::string_view text, const std::string& origin)
      : code_(code),
        text_(text),
        origin_(origin),
        data_(pcre2_match_data_create(1, nullptr)),
        context_(pcre2_match_context_create(nullptr)),
        budget_(kBudgetBase + kBudgetPerByte * text.size()) {
    if (!data_ || !context_) throw Error(origin + ": out of memory");
    pcre2_set_heap_limit(context_.get(), kHeapKibibytes);
  }

  /// The first match at or after `start`. `text` has been checked once; checking it in each call would be quadratic.
  bool find(std::size_t start, std::uint32_t options, std::size_t* begin, std::size_t* end) {
    options |= PCRE2_NO_UTF_CHECK;
    std::uint32_t limit = kFirstStepLimit;
    for (;;) {
      pcre2_set_match_limit(context_.get(), limit);
      const int status = pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(text_.data()), text_.size(), start, options,
                                     data_.get(), context_.get());
      if (status == PCRE2_ERROR_NOMATCH) return false;
      if (status >= 0) break;
      if (status == PCRE2_ERROR_JIT_STACKLIMIT) {
        options |= PCRE2_NO_JIT;  // the interpreter keeps its stack on the heap
      } else if (status != PCRE2_ERROR_MATCHLIMIT) {
        throw Error(origin_ + ": searching failed: " + error_text(status));
      }
      if (budget_ < limit) throw Error(origin_ + ": the pattern needs too many steps on this text");
      budget_ -= limit;
      limit = static_cast<std::uint32_t>(std::min<std::uint64_t>(std::uint64_t{limit} * 4, 1u << 31));
    }
    const PCRE2_SIZE* const offsets = pcre2_get_ovector_pointer(data_.get());
    // \K can leave the match's start behind its end or before the search's.
    if (offsets[0] > offsets[1] || offsets[0] < start) throw Error(origin_ + ": the pattern moves its match's start");
    *begin = offsets[0];
    *end = offsets[1];
    return true;
  }

 private:
  const pcre2_code* code_;
  std::string_view text_;
  const std::string& origin_;
  MatchData data_;
  MatchContext context_;
  std::uint64_t budget_;
};

std::size_t next_character(std::string_view text, std::size_t position) {
  do ++position;
  while (position < text.size() && (static_cast<unsigned char>(text[position]) & 0xc0) == 0x80);
  return position;
}

}  // namespace

struct Regex::State {
  Code code;
  std::string origin;
};

Regex Regex::compile(std::string_view pattern, const std::string& origin) {
  if (pattern.size() > kMaxPatternBytes) {
    throw Error(origin + ": a pattern of " + std::to_string(pattern.size()) + " bytes; the limit is " +
                std::to_string(kMaxPatternBytes));
  }
  return compile_pcre(Translator{pattern, origin, {}}.run(), origin);
}

Regex Regex::literal(std::string_view text, const std::string& origin) {
  std::string pattern;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const bool plain =
        byte >= 0x80 || (byte >= '0' && byte <= '9') || (byte >= 'a' && byte <= 'z') || (byte >= 'A' && byte <= 'Z');
    if (!plain) pattern += '\\';
    pattern += c;
  }
  if (pattern.size() > kMaxPatternBytes) throw Error(origin + ": a pattern of too many bytes");
  return compile_pcre(pattern, origin);
}

Regex Regex::compile_pcre(const std::string& pattern, const std::string& origin) {
  const CompileContext context(pcre2_compile_context_create(nullptr));
  if (!context) throw Error(origin + ": out of memory");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int code = 0;
  PCRE2_SIZE position = 0;
  // MULTILINE: Ruby's ^ and $ stand at every line.
  Code compiled(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &code, &position,
                              context.get()));
  if (!compiled) throw Error(origin + ": pattern " + quote(pattern) + ": " + error_text(code));
  // Without a just-in-time compiler the interpreter runs: same matches, slower.
  static_cast<void>(pcre2_jit_compile(compiled.get(), PCRE2_JIT_COMPLETE));
  return Regex(std::make_shared<State>(State{std::move(compiled), origin}));
}

void Regex::for_each_match(std::string_view text, const Visit& visit) const {
  Search search(state_->code.get(), text, state_->origin);
  std::size_t position = 0;
  std::size_t last_end = std::string_view::npos;
  std::size_t begin = 0;
  std::size_t end = 0;
  while (position <= text.size() && search.find(position, 0, &begin, &end)) {
    if (begin == end && end == last_end) {
      position = next_character(text, position);
      continue;
    }
    visit(begin, end);
    position = last_end = end;
  }
}

bool Regex::matches_at(std::string_view text, std::size_t position) const {
  std::size_t begin = 0;
  std::size_t end = 0;
  return Search(state_->code.get(), text, state_->origin).find(position, PCRE2_ANCHORED, &begin, &end);
}

}  // namespace msa::files
