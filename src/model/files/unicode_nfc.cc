// SPDX-License-Identifier: Apache-2.0
// See unicode_nfc.h: the algorithm of Unicode 3.11 - decompose, order, compose.
#include "src/model/files/unicode_nfc.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <tuple>
#include <vector>

#include "src/model/files/utf8.h"

namespace msa::files {
namespace {

struct Decomposition {
  std::uint32_t code_point;
  std::uint32_t first;
  std::uint32_t second;
  bool composes;
};
struct CombiningRange {
  std::uint32_t first;
  std::uint32_t last;
  std::uint8_t combining_class;
};
#include "src/model/files/unicode_nfc_tables.inc"

// Hangul syllables are a product of 19 leads, 21 vowels and 28 tails (Unicode 3.12).
constexpr std::uint32_t kSyllableBase = 0xac00, kLeadBase = 0x1100, kVowelBase = 0x1161, kTailBase = 0x11a7;
constexpr std::uint32_t kLeads = 19, kVowels = 21, kTails = 28, kSyllables = kLeads * kVowels * kTails;

std::uint8_t combining_class(std::uint32_t code_point) {
  const auto* const range =
      std::lower_bound(std::begin(kCombiningRanges), std::end(kCombiningRanges), code_point,
                       [](const CombiningRange& candidate, std::uint32_t value) { return candidate.last < value; });
  return range != std::end(kCombiningRanges) && range->first <= code_point ? range->combining_class : 0;
}

void decompose(std::uint32_t code_point, std::u32string* out) {
  if (code_point - kSyllableBase < kSyllables) {
    const std::uint32_t index = code_point - kSyllableBase;
    out->push_back(kLeadBase + index / (kVowels * kTails));
    out->push_back(kVowelBase + index % (kVowels * kTails) / kTails);
    if (index % kTails != 0) out->push_back(kTailBase + index % kTails);
    return;
  }
  const auto* const row = std::lower_bound(
      std::begin(kDecompositions), std::end(kDecompositions), code_point,
      [](const Decomposition& candidate, std::uint32_t value) { return candidate.code_point < value; });
  if (row == std::end(kDecompositions) || row->code_point != code_point) {
    out->push_back(code_point);
    return;
  }
  decompose(row->first, out);  // at most four levels deep in the tables
  if (row->second != 0) out->push_back(row->second);
}

using Pair = std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>;  // first, second, composed

std::vector<Pair> sorted_pairs() {
  std::vector<Pair> pairs;
  for (const Decomposition& row : kDecompositions) {
    if (row.composes) pairs.emplace_back(row.first, row.second, row.code_point);
  }
  std::sort(pairs.begin(), pairs.end());
  return pairs;
}

/// The composed form of the two, or 0.
std::uint32_t compose(std::uint32_t first, std::uint32_t second) {
  if (first - kLeadBase < kLeads && second - kVowelBase < kVowels) {
    return kSyllableBase + ((first - kLeadBase) * kVowels + (second - kVowelBase)) * kTails;
  }
  if (first - kSyllableBase < kSyllables && (first - kSyllableBase) % kTails == 0 && second - kTailBase < kTails &&
      second != kTailBase) {
    return first + (second - kTailBase);
  }
  static const std::vector<Pair> pairs = sorted_pairs();
  const auto found = std::lower_bound(pairs.begin(), pairs.end(), Pair(first, second, 0));
  if (found == pairs.end() || std::get<0>(*found) != first || std::get<1>(*found) != second) return 0;
  return std::get<2>(*found);
}

}  // namespace

std::string normalize_nfc(std::string_view text) {
  // U+0300, the first combining mark, starts with byte 0xcc; everything below is its own normal form.
  const auto composed_already = [](char c) { return static_cast<unsigned char>(c) < 0xcc; };
  if (std::all_of(text.begin(), text.end(), composed_already)) return std::string(text);

  std::u32string points;
  for (std::string_view rest = text; !rest.empty();) {
    const Utf8Unit unit = read_utf8(rest);
    decompose(unit.code_point, &points);
    rest.remove_prefix(unit.length);
  }
  std::vector<std::uint8_t> classes(points.size());
  std::transform(points.begin(), points.end(), classes.begin(), combining_class);

  // Each run of marks (class above 0) is put in order of class, equal classes staying as they stand.
  for (std::size_t begin = 0; begin < points.size(); ++begin) {
    std::size_t end = begin;
    while (end < points.size() && classes[end] != 0) ++end;
    if (end - begin > 1) {
      std::vector<std::pair<std::uint8_t, char32_t>> run;
      for (std::size_t i = begin; i < end; ++i) run.emplace_back(classes[i], points[i]);
      std::stable_sort(run.begin(), run.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
      for (std::size_t i = begin; i < end; ++i) std::tie(classes[i], points[i]) = run[i - begin];
    }
    begin = end;
  }

  // A mark joins the last starter unless a mark between them has the same or a higher class (it is blocked).
  std::u32string composed;
  std::size_t starter = points.size();  // index into composed; points.size(): none yet
  int last_class = 0;
  for (std::size_t i = 0; i < points.size(); ++i) {
    const bool adjacent = starter < points.size() && composed.size() == starter + 1;
    if (starter < points.size() && (adjacent || last_class < classes[i])) {
      if (const std::uint32_t joined = compose(composed[starter], points[i]); joined != 0) {
        composed[starter] = joined;
        continue;
      }
    }
    if (classes[i] == 0) starter = composed.size();
    last_class = classes[i];
    composed.push_back(points[i]);
  }
  std::string out;
  for (const char32_t code_point : composed) append_utf8(code_point, &out);
  return out;
}

}  // namespace msa::files
