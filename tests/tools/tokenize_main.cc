// SPDX-License-Identifier: Apache-2.0
// The tokenizer as a filter, so that a Python test can hold it against the tokenizers package: tests/python/
// test_tokenizer.py. Reads the text, or the ids, from standard input.
//   msa_tokenize_tool encode TOKENIZER_JSON [--no-parse-special] [--no-add-special]   ids, one a line
//   msa_tokenize_tool decode TOKENIZER_JSON [--skip-special] [--stream]               text
//   msa_tokenize_tool nfc                                                            the text in form NFC
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "src/model/files/tokenizer.h"
#include "src/model/files/unicode_nfc.h"

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const auto has = [&](const std::string& flag) {
    for (const std::string& argument : arguments) {
      if (argument == flag) return true;
    }
    return false;
  };
  std::ios::sync_with_stdio(false);
  const std::string input((std::istreambuf_iterator<char>(std::cin)), {});
  try {
    if (arguments.size() == 1 && arguments[0] == "nfc") {
      std::cout << msa::files::normalize_nfc(input);
      return 0;
    }
    if (arguments.size() < 2 || (arguments[0] != "encode" && arguments[0] != "decode")) {
      std::cerr << "usage: msa_tokenize_tool encode|decode TOKENIZER_JSON [options]\n";
      return 2;
    }
    const msa::files::Tokenizer tokenizer = msa::files::Tokenizer::load(arguments[1]);
    if (arguments[0] == "encode") {
      const msa::files::EncodeOptions options{.add_special_tokens = !has("--no-add-special"),
                                              .parse_special_tokens = !has("--no-parse-special")};
      for (const std::int32_t id : tokenizer.encode(input, options)) std::cout << id << '\n';
      return 0;
    }
    std::vector<std::int32_t> ids;
    for (std::size_t at = 0; at < input.size();) {
      std::size_t used = 0;
      ids.push_back(std::stoi(input.substr(at, 16), &used));
      at = input.find_first_not_of(" \n", at + used);
    }
    if (!has("--stream")) {
      std::cout << tokenizer.decode(ids, has("--skip-special"));
      return 0;
    }
    msa::files::StreamingDecoder decoder(tokenizer, has("--skip-special"));
    for (const std::int32_t id : ids) std::cout << decoder.push(id);
    std::cout << decoder.finish();
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
