// SPDX-License-Identifier: Apache-2.0
// See utf8.h.
#include "src/model/files/utf8.h"

namespace msa::files {
namespace {

constexpr std::uint32_t kReplacement = 0xfffd;

}  // namespace

Utf8Unit read_utf8(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned lead = byte(0);
  if (lead < 0x80) return {Utf8Kind::kValid, lead, 1};
  if (lead < 0xc2 || lead > 0xf4) return {Utf8Kind::kInvalid, 0, 1};
  const std::size_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  // The second byte's range excludes overlong forms, surrogates and what lies beyond U+10FFFF (Unicode table 3-7).
  unsigned low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  unsigned high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  std::uint32_t code_point = lead & (0xffu >> (length + 1));
  for (std::size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {Utf8Kind::kIncomplete, 0, i};
    if (byte(i) < low || byte(i) > high) return {Utf8Kind::kInvalid, 0, i};
    code_point = code_point << 6 | (byte(i) & 0x3fu);
    low = 0x80;
    high = 0xbf;
  }
  return {Utf8Kind::kValid, code_point, length};
}

void append_utf8(std::uint32_t code_point, std::string* out) {
  const auto put = [&](std::uint32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xc0 | code_point >> 6);
    put(0x80 | (code_point & 0x3f));
  } else if (code_point < 0x10000) {
    put(0xe0 | code_point >> 12);
    put(0x80 | (code_point >> 6 & 0x3f));
    put(0x80 | (code_point & 0x3f));
  } else {
    put(0xf0 | code_point >> 18);
    put(0x80 | (code_point >> 12 & 0x3f));
    put(0x80 | (code_point >> 6 & 0x3f));
    put(0x80 | (code_point & 0x3f));
  }
}

bool is_valid_utf8(std::string_view text) {
  while (!text.empty()) {
    const Utf8Unit unit = read_utf8(text);
    if (unit.kind != Utf8Kind::kValid) return false;
    text.remove_prefix(unit.length);
  }
  return true;
}

std::string repair_utf8(std::string_view text) {
  std::string pending(text);
  std::string out;
  drain_utf8(&pending, true, &out);
  return out;
}

void drain_utf8(std::string* pending, bool last, std::string* out) {
  std::string_view rest = *pending;
  while (!rest.empty()) {
    const Utf8Unit unit = read_utf8(rest);
    if (unit.kind == Utf8Kind::kIncomplete && !last) break;
    if (unit.kind == Utf8Kind::kValid) {
      out->append(rest.substr(0, unit.length));
    } else {
      append_utf8(kReplacement, out);
    }
    rest.remove_prefix(unit.length);
  }
  pending->erase(0, pending->size() - rest.size());
}

}  // namespace msa::files
