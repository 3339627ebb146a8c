// SPDX-License-Identifier: Apache-2.0
// Any bytes as text for a tokenizer of the Qwen kind (NFC, a regular expression, byte-level BPE with all 256 bytes):
// never an error, and decoding gives the text back in normal form, which encodes to the same tokens.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "src/model/files/tokenizer.h"
#include "src/model/files/unicode_nfc.h"
#include "src/model/files/utf8.h"

namespace {

msa::files::Tokenizer make_tokenizer() {
  // GPT-2's alphabet, then a few merges that overlap.
  std::string vocab;
  std::uint32_t beyond = 0x100;
  int id = 0;
  const auto add = [&](const std::string& spelling) {
    vocab += std::string(id == 0 ? "\"" : ",\"") + spelling + "\":" + std::to_string(id);
    ++id;
  };
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    std::string spelling = byte == '"' || byte == '\\' ? "\\" : "";
    msa::files::append_utf8(printable ? byte : beyond++, &spelling);
    add(spelling);
  }
  std::string merges;
  const std::string space = "\xc4\xa0";
  for (const auto& [left, right] : {std::pair<std::string, std::string>{"a", "a"},
                                    {"aa", "aa"},
                                    {"a", "b"},
                                    {"aa", "ab"},
                                    {space, space},
                                    {space, "a"},
                                    {"1", "2"}}) {
    add(left + right);
    merges += std::string(merges.empty() ? "" : ",") + "[\"" + left + "\",\"" + right + "\"]";
  }
  const std::string pattern =
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+)";
  return msa::files::Tokenizer::parse(
      R"({"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":")" +
          pattern +
          R"("},"behavior":"Isolated"},{"type":"ByteLevel","add_prefix_space":false,"use_regex":false}]},"model":{"type":"BPE","vocab":{)" +
          vocab + R"(},"merges":[)" + merges + "]}}",
      "built in");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const msa::files::Tokenizer tokenizer = make_tokenizer();
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto tokens = tokenizer.encode(text);
  const std::string decoded = tokenizer.decode(tokens);
  if (decoded != msa::files::normalize_nfc(msa::files::repair_utf8(text))) std::abort();
  if (tokenizer.encode(decoded) != tokens) std::abort();
  return 0;
}
