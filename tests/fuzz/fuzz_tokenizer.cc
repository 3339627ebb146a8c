// SPDX-License-Identifier: Apache-2.0
// Any text as tokenizer.json: a msa::Error, or a tokenizer that encodes a text of many kinds and streams it back as
// decode does.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "msa/error.h"
#include "src/model/files/chat_template.h"
#include "src/model/files/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const msa::files::Tokenizer tokenizer = msa::files::Tokenizer::parse(text, "fuzzed");
    const std::string sample =
        "It's  12 na\xc3\xafve\n\n <|im_end|>e\xcc\x81\xf0\x9f\x98\x80\xff " + std::string(64, 'a');
    const auto tokens = tokenizer.encode(sample);
    msa::files::StreamingDecoder decoder(tokenizer, false);
    std::string streamed;
    for (const std::int32_t token : tokens) streamed += decoder.push(token);
    if (streamed + decoder.finish() != tokenizer.decode(tokens)) std::abort();
    msa::files::ChatTemplate::detect(tokenizer, {});
  } catch (const msa::Error&) {
  }
  return 0;
}
