// SPDX-License-Identifier: Apache-2.0
// JSON from files that nobody vouches for. The parser underneath builds whatever it is given; here nesting (whose
// destruction recurses), the number of values (each costs far more memory than its text) and duplicate keys (two
// readers would disagree on the file's meaning) are refused while parsing. Internal to src/model/files.
// Tested in tests/unit/files_json_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace msa::files {

/// Object keys keep the order of the file, so that a configuration read and written again differs in what was changed
/// and nowhere else.
using Json = nlohmann::ordered_json;

struct JsonLimits {
  int max_depth = 64;                   // a real checkpoint's files stay below 10
  std::size_t max_values = 16'000'000;  // a vocabulary of 1M entries with its merges has 4M
};

/// Parses one JSON document in UTF-8. `origin` names the document in errors. Throws msa::Error on a syntax error (with
/// the position), a number out of range, a duplicate key, or a limit passed. O(text) time, memory bounded by
/// max_values.
Json parse_json(std::string_view text, const std::string& origin, const JsonLimits& limits = {});

/// The value of `key` in the object `object`, or nullptr when it is absent or null.
const Json* find_value(const Json& object, const char* key);

/// Typed values of a key, absent (or null) giving `fallback`. `origin` names the document. Throw msa::Error naming the
/// key when the type is another or the value is outside [low, high].
std::int64_t read_int(const Json& object, const char* key, std::int64_t fallback, std::int64_t low, std::int64_t high,
                      const std::string& origin);
double read_number(const Json& object, const char* key, double fallback, double low, double high,
                   const std::string& origin);
bool read_bool(const Json& object, const char* key, bool fallback, const std::string& origin);
std::string read_string(const Json& object, const char* key, const std::string& fallback, const std::string& origin);

/// "config.json: key 'x' " + what: the way every reader here words a complaint about a key.
std::string key_error(const std::string& origin, std::string_view key, const std::string& what);

}  // namespace msa::files
