// SPDX-License-Identifier: Apache-2.0
// Any bytes as a safetensors file: a msa::Error, or tensors that lie inside the file and are as long as they claim.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "msa/error.h"
#include "src/model/files/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto file = std::as_bytes(std::span(data, size));
  try {
    const msa::files::SafetensorsHeader header = msa::files::parse_safetensors(file, "fuzzed");
    for (const msa::files::TensorInfo& tensor : header.tensors) {
      const bool inside = tensor.begin <= tensor.end && tensor.end <= size;
      if (!inside || tensor.end - tensor.begin != tensor.byte_count()) std::abort();
    }
  } catch (const msa::Error&) {
  }
  return 0;
}
