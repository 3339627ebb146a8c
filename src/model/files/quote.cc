// SPDX-License-Identifier: Apache-2.0
// See quote.h.
#include "src/model/files/quote.h"

#include <cstddef>

namespace msa::files {

std::string quote(std::string_view text) {
  constexpr std::size_t kMaxShown = 240;  // whole paths, but not a hostile file
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "'";
  for (const char c : text.substr(0, kMaxShown)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte >= 0x7f) {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    } else {
      out += c;
    }
  }
  out += text.size() > kMaxShown ? "...'" : "'";
  return out;
}

}  // namespace msa::files
