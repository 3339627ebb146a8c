// SPDX-License-Identifier: Apache-2.0
// The bounded JSON parser and the quoting of hostile names.
#include <gtest/gtest.h>

#include <string>

#include "src/model/files/json.h"
#include "src/model/files/quote.h"
#include "tests/unit/files_support.h"

namespace msa::files {
namespace {

TEST(Quote, EscapesAndCuts) {
  EXPECT_EQ(quote("abc"), "'abc'");
  EXPECT_EQ(quote(std::string("a\n\0\x7f\xff", 5)), "'a\\x0a\\x00\\x7f\\xff'");
  EXPECT_EQ(quote(std::string(240, 'a')), "'" + std::string(240, 'a') + "'");
  EXPECT_EQ(quote(std::string(241, 'a')), "'" + std::string(240, 'a') + "...'");
}

TEST(Json, KeepsOrderAndValues) {
  const std::string text = R"({"z":1,"a":[true,null,-2,3.5,"x"],"m":{"k":18446744073709551615}})";
  EXPECT_EQ(parse_json(text, "t").dump(), text);
  EXPECT_EQ(parse_json(" 7 ", "t").dump(), "7");
}

TEST(Json, RefusesWhatIsNotJson) {
  for (const char* text : {"", "{", "{\"a\":}", "[1,]", "nul", "{\"a\":1}x", "\"\xff\"", "[1e999]", "\"\\ud800\""}) {
    EXPECT_THROW(parse_json(text, "t"), Error) << text;
  }
  EXPECT_ERROR(parse_json("{\"a\" 1}", "file.json"), "file.json: not valid JSON at byte");
}

TEST(Json, RefusesDuplicateKeys) {
  EXPECT_ERROR(parse_json(R"({"a":1,"b":2,"a":3})", "t"), "duplicate key 'a'");
  EXPECT_NO_THROW(parse_json(R"({"a":{"a":1},"b":[{"a":1},{"a":2}]})", "t"));
}

TEST(Json, BoundsDepthAndCount) {
  const auto nested = [](std::size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_NO_THROW(parse_json(nested(64), "t"));
  EXPECT_ERROR(parse_json(nested(65), "t"), "nested deeper than 64");
  EXPECT_ERROR(parse_json(std::string(10'000'000, '['), "t"), "nested deeper");
  EXPECT_NO_THROW(parse_json("[1,2,3]", "t", {.max_values = 4}));
  EXPECT_ERROR(parse_json("[1,2,3,4]", "t", {.max_values = 4}), "more than 4 JSON values");
}

TEST(Json, ReadsTypedValues) {
  const Json object = parse_json(R"({"i":5,"big":18446744073709551615,"n":null,"x":1.5,"b":true,"s":"t"})", "t");
  EXPECT_EQ(read_int(object, "i", 1, 0, 5, "t"), 5);
  EXPECT_EQ(read_int(object, "n", 7, 0, 5, "t"), 7);
  EXPECT_EQ(read_int(object, "missing", 7, 0, 5, "t"), 7);
  EXPECT_ERROR(read_int(object, "i", 1, 0, 4, "t"), "key 'i' must be an integer from 0 to 4, not '5'");
  EXPECT_ERROR(read_int(object, "big", 1, 0, 4, "t"), "key 'big'");
  EXPECT_ERROR(read_int(object, "x", 1, 0, 4, "t"), "key 'x'");
  EXPECT_ERROR(read_number(object, "s", 1, 0, 4, "t"), "key 's'");
  EXPECT_EQ(read_number(object, "i", 1, 0, 5, "t"), 5.0);
  EXPECT_ERROR(read_bool(object, "i", true, "t"), "key 'i'");
  EXPECT_ERROR(read_string(object, "b", "", "t"), "key 'b'");
}

}  // namespace
}  // namespace msa::files
