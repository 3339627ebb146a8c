// SPDX-License-Identifier: Apache-2.0
// Training and evaluation text: files and directories become documents, documents become windows of tokens. What is
// held out for evaluation depends only on a document's name and place, never on the order of the file system or the
// seed, so runs with different seeds or windows never train on what another evaluates. Tested in
// tests/unit/model_train.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace msa::model {

using Tokens = std::vector<std::int64_t>;
/// Text -> tokens, without special tokens of its own.
using Encode = std::function<Tokens(std::string_view)>;

enum class Split { kTrain, kHeldOut };

struct CorpusLimits {
  std::size_t max_files = 100'000;        ///< directory entries looked at
  std::size_t max_file_bytes = 16 << 20;  ///< of a file this much is read
  std::size_t max_bytes = 256 << 20;      ///< text kept; directories beyond it are cut, in name order
};

class Corpus {
 public:
  /// Reads text files and, recursively, directories (hidden entries and links inside are skipped; a file counts as text
  /// when it is UTF-8 without control bytes). Of Perl modules the documentation is kept. Throws msa::Error naming the
  /// path that does not exist or holds no text.
  static Corpus open(const std::vector<std::filesystem::path>& paths, const CorpusLimits& limits = {});
  /// Text that every machine able to build this program has: the manuals of CMake and Perl and the library of Python,
  /// where Debian puts them. Throws msa::Error when none of it is there.
  static Corpus open_default();
  /// From texts at hand: (name, text).
  static Corpus from_texts(const std::vector<std::pair<std::string, std::string>>& documents);

  /// Bytes of text of a split.
  std::size_t bytes(Split split) const;

  /// Up to `count` windows of exactly `length` tokens. A window is one or more pieces of documents, whole lines of
  /// about 4 * length bytes each, every piece followed by `separator` (none when negative). Pieces are drawn in a
  /// random order that visits every document before a second piece of one, and no text is used twice: a small corpus
  /// gives fewer windows than asked for. With `prose`, program text is left out where there is other text. Encodes what
  /// is needed and no more. Throws msa::Error when there is not even one window.
  std::vector<Tokens> windows(const Encode& encode, Split split, std::int64_t length, std::int64_t count,
                              std::uint64_t seed, std::int64_t separator, bool prose = false) const;

 private:
  struct Unit {  // at most kUnitBytes of one document; the grain of the split
    std::string name;
    std::string text;
    bool held_out = false;
    bool is_code = false;
  };
  void add_document(const std::string& name, const std::string& text);
  void settle_split(const std::string& what);

  std::vector<Unit> units_;
  std::string origin_;  // for messages
};

/// One unit in this many is held out.
inline constexpr std::uint64_t kHeldOutOneIn = 8;

}  // namespace msa::model
