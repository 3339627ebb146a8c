// SPDX-License-Identifier: Apache-2.0
// Oniguruma's dialect on PCRE2: the classes that differ, what is refused, and the bound on steps.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "src/model/files/regex.h"
#include "tests/unit/files_support.h"

namespace msa::files {
namespace {

std::vector<std::string> matches(const std::string& pattern, const std::string& text) {
  std::vector<std::string> found;
  Regex::compile(pattern, "t").for_each_match(text, [&](std::size_t begin, std::size_t end) {
    found.push_back(text.substr(begin, end - begin));
  });
  return found;
}
using Strings = std::vector<std::string>;

TEST(Regex, SpaceIsUnicodeWhiteSpace) {
  const std::string vowel_separator = "\xe1\xa0\x8e";  // U+180E: a space to PCRE2, not to Unicode
  EXPECT_EQ(matches(R"(\s+)",
                    "a \t\xc2\x85\xe3\x80\x80"
                    "b"),
            (Strings{" \t\xc2\x85\xe3\x80\x80"}));
  EXPECT_EQ(matches(R"(\s)", vowel_separator), Strings{});
  EXPECT_EQ(matches(R"([^\s])", vowel_separator), Strings{vowel_separator});
  EXPECT_EQ(matches(R"([\S])", " " + vowel_separator), Strings{vowel_separator});
  EXPECT_EQ(matches(R"(\S)", " " + vowel_separator), Strings{vowel_separator});
}

TEST(Regex, WordsHoldMarksAndConnectors) {
  EXPECT_EQ(matches(R"(\w+)",
                    "e\xcc\x81_\xe2\x80\xbf"
                    "1-x"),
            (Strings{"e\xcc\x81_\xe2\x80\xbf"
                     "1",
                     "x"}));
  EXPECT_EQ(matches(R"(\h+)", "fade g"), Strings{"fade"});
  EXPECT_EQ(matches("a{,2}b", "aab"), Strings{"aab"});
}

TEST(Regex, EmptyMatchesAdvance) {
  EXPECT_EQ(matches("a*", "baac"), (Strings{"", "aa", ""}));
  EXPECT_EQ(matches("", "\xc3\xa9x"), (Strings{"", "", ""}));
  EXPECT_EQ(matches("x", ""), Strings{});
}

TEST(Regex, RefusesWhatWouldDiffer) {
  for (const char* pattern : {"(", "[a", "\\", "a{2}+", "[a[bc]]", "[a&&b]", "(?m:.)", "(?s).", R"(\bx)", R"(\C)",
                              R"(\Qx)", "(*UTF)x", "[]a]", R"([\W])", R"(\p{L)"}) {
    EXPECT_THROW(Regex::compile(pattern, "t"), Error) << pattern;
  }
  EXPECT_ERROR(Regex::compile(std::string(20'000, 'a'), "tok"), "tok: a pattern of 20000 bytes");
  EXPECT_NO_THROW(Regex::compile(R"([[:alpha:]\[\]]+?\p{L}++(?i:x)|\x{41})", "t"));
  EXPECT_EQ(matches(R"(^b$)", "a\nb\nc"), Strings{"b"});
}

TEST(Regex, LiteralsMeanThemselves) {
  const std::string text = "a.(b)*[\\^$\xc3\xa9";
  std::size_t count = 0;
  Regex::literal(text, "t").for_each_match("x" + text + text, [&](std::size_t, std::size_t) { ++count; });
  EXPECT_EQ(count, 2u);
}

TEST(Regex, StepsAreBounded) {
  EXPECT_ERROR(matches("(?:a+)+[!?]", std::string(200, 'a')), "too many steps");
  // A run longer than the first limit is retried, not refused.
  EXPECT_EQ(matches(R"(\s*[\r\n]+|\s+)", std::string(1'000'000, ' ')).size(), 1u);
  EXPECT_EQ(matches("(?:a|b)+", std::string(1'000'000, 'a')).size(), 1u);
}

}  // namespace
}  // namespace msa::files
