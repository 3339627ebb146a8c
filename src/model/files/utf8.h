// SPDX-License-Identifier: Apache-2.0
// UTF-8 as the tokenizer needs it: decode, encode, and repair. Broken input becomes U+FFFD, one for each maximal
// subpart of a sequence (Unicode 3.9, what browsers, Python and Rust do). Tested in tests/unit/files_utf8_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace msa::files {

/// What stands at the start of a text. kIncomplete: the text ends inside a sequence that is well formed so far.
enum class Utf8Kind { kValid, kInvalid, kIncomplete };
struct Utf8Unit {
  Utf8Kind kind = Utf8Kind::kInvalid;
  std::uint32_t code_point = 0;  // when valid
  std::size_t length = 0;        // bytes; of the maximal subpart when not valid
};

/// `text` must not be empty.
Utf8Unit read_utf8(std::string_view text);
void append_utf8(std::uint32_t code_point, std::string* out);
bool is_valid_utf8(std::string_view text);
/// A valid text; equal to `text` when that is valid.
std::string repair_utf8(std::string_view text);

/// Moves the decided part of `pending` to `out`, repaired; an incomplete sequence at the end stays, unless `last`.
void drain_utf8(std::string* pending, bool last, std::string* out);

}  // namespace msa::files
