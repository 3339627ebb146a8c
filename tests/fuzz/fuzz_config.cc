// SPDX-License-Identifier: Apache-2.0
// Any text as config.json: a msa::Error, or a configuration that writes itself back and reads as the same again. The
// other small files are read from the same text.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "msa/error.h"
#include "src/model/files/config.h"
#include "src/model/files/tokenizer.h"

namespace {

template <class Function>
void tolerate_errors(const Function& function) {
  try {
    function();
  } catch (const msa::Error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  tolerate_errors([&] { msa::files::parse_generation_config(text, "fuzzed"); });
  tolerate_errors([&] { msa::files::parse_tokenizer_settings(text, "fuzzed"); });
  tolerate_errors([&] {
    const msa::files::ModelConfig config = msa::files::parse_model_config(text, "fuzzed");
    const std::string written = msa::files::to_json(config);  // what was read can be written
    if (msa::files::to_json(msa::files::parse_model_config(written, "written")) != written) std::abort();
  });
  return 0;
}
