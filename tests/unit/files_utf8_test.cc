// SPDX-License-Identifier: Apache-2.0
// UTF-8 repair and normalization: the boundary sequences of Unicode table 3-7, and NFC's order, blocking and Hangul.
#include <gtest/gtest.h>

#include <string>

#include "src/model/files/unicode_nfc.h"
#include "src/model/files/utf8.h"

namespace msa::files {
namespace {

const std::string kBad = "\xef\xbf\xbd";  // U+FFFD

TEST(Utf8, KeepsWhatIsValid) {
  for (const char* text : {"", "a", "\x7f", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xee\x80\x80",
                           "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"}) {
    EXPECT_TRUE(is_valid_utf8(text));
    EXPECT_EQ(repair_utf8(text), text);
  }
  EXPECT_TRUE(is_valid_utf8(std::string(1, '\0')));
}

TEST(Utf8, ReplacesEachMaximalBrokenPart) {
  EXPECT_EQ(repair_utf8("\x80"), kBad);
  EXPECT_EQ(repair_utf8("\xc0\x80"), kBad + kBad);  // overlong
  EXPECT_EQ(repair_utf8("\xe0\x9f\xbf"), kBad + kBad + kBad);
  EXPECT_EQ(repair_utf8("\xed\xa0\x80"), kBad + kBad + kBad);  // a surrogate
  EXPECT_EQ(repair_utf8("\xf4\x90\x80\x80"), kBad + kBad + kBad + kBad);
  EXPECT_EQ(repair_utf8("\xff"), kBad);
  EXPECT_EQ(repair_utf8("\xe2\x82"), kBad);  // cut short: one sequence, one replacement
  EXPECT_EQ(repair_utf8("\xf0\x9f\x98"
                        "a"),
            kBad + "a");
  EXPECT_EQ(repair_utf8("\xe2\x82\xe2\x82\xac"), kBad + "\xe2\x82\xac");
}

TEST(Utf8, DrainHoldsAnIncompleteTail) {
  std::string pending = "a\xe2\x82";
  std::string out;
  drain_utf8(&pending, false, &out);
  EXPECT_EQ(out, "a");
  pending += "\xac!";
  drain_utf8(&pending, false, &out);
  EXPECT_EQ(out, "a\xe2\x82\xac!");
  pending = "\xf0\x9f";
  drain_utf8(&pending, true, &out);
  EXPECT_EQ(out, "a\xe2\x82\xac!" + kBad);
  EXPECT_TRUE(pending.empty());
}

TEST(UnicodeNfc, ComposesOrdersAndBlocks) {
  EXPECT_EQ(normalize_nfc("plain \xc3\xa9"), "plain \xc3\xa9");
  EXPECT_EQ(normalize_nfc("e\xcc\x81"), "\xc3\xa9");                  // e + acute
  EXPECT_EQ(normalize_nfc("e\xcc\x81\xcc\xa7"), "\xc8\xa9\xcc\x81");  // cedilla sorts first, joins, acute stays
  EXPECT_EQ(normalize_nfc("\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8"), "\xea\xb0\x81");  // Hangul L V T
  EXPECT_EQ(normalize_nfc("\xe2\x84\xab"), "\xc3\x85");                              // Angstrom sign: a singleton
  EXPECT_EQ(normalize_nfc("\xe0\xa5\x98"), "\xe0\xa4\x95\xe0\xa4\xbc");              // a composition exclusion
  EXPECT_EQ(normalize_nfc("\xcc\x81"
                          "e"),
            "\xcc\x81"
            "e");  // a mark without a base
}

}  // namespace
}  // namespace msa::files
