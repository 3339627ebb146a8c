// SPDX-License-Identifier: Apache-2.0
// The file layer as a filter, so that Python tests can hold it against the tokenizers and safetensors packages:
// tests/python/test_tokenizer.py, tests/python/test_safetensors.py. Text or ids come from standard input.
//   msa_tokenize_tool encode TOKENIZER_JSON [--no-parse-special] [--no-add-special]   ids, one a line
//   msa_tokenize_tool decode TOKENIZER_JSON [--skip-special] [--stream]               text
//   msa_tokenize_tool nfc                                                            the text in form NFC
//   msa_tokenize_tool copy FROM_DIR TO_DIR MAX_SHARD_BYTES                            a checkpoint, read and written
#include <cstdint>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "src/model/files/safetensors.h"
#include "src/model/files/tokenizer.h"
#include "src/model/files/unicode_nfc.h"

namespace {

void copy_checkpoint(const std::string& from, const std::string& to, std::uint64_t max_shard_bytes) {
  const msa::files::CheckpointReader reader = msa::files::CheckpointReader::open(from);
  std::vector<msa::files::TensorSpec> tensors;
  for (const std::string& name : reader.names()) tensors.push_back(reader.get(name));
  msa::files::write_checkpoint(
      to, tensors, [&](std::size_t i) { return reader.bytes(tensors[i].name); }, {}, max_shard_bytes);
}

}  // namespace

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
    if (arguments.size() == 4 && arguments[0] == "copy") {
      copy_checkpoint(arguments[1], arguments[2], std::stoull(arguments[3]));
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
