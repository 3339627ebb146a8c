// SPDX-License-Identifier: Apache-2.0
// Unicode normalization form C, which some tokenizers (Qwen's) apply before anything else: combining marks that have a
// composed form are composed, others sorted into canonical order. Tables are generated from the Unicode database by
// generate_nfc_tables.py. Tested in tests/python/test_tokenizer.py on every code point, and
// tests/unit/files_utf8_test.cc.
#pragma once

#include <string>
#include <string_view>

namespace msa::files {

/// `text` must be valid UTF-8. Text below U+0300 is returned as it is after one scan; else O(n log n).
std::string normalize_nfc(std::string_view text);

}  // namespace msa::files
