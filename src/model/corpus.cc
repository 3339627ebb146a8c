// SPDX-License-Identifier: Apache-2.0
// See corpus.h.
#include "src/model/corpus.h"

#include <algorithm>
#include <fstream>
#include <set>
#include <system_error>

#include "msa/error.h"
#include "src/model/train_random.h"

namespace msa::model {
namespace {

namespace fs = std::filesystem;

// Long documents are split in units of this size, so that a corpus of one large file has a held-out part as well.
constexpr std::size_t kUnitBytes = 128 << 10;
constexpr std::size_t kMinDocumentBytes = 16;

std::uint64_t hash_name(std::string_view text) {  // FNV-1a, 64 bit
  std::uint64_t hash = 0xcbf29ce484222325U;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
  return hash ^ (hash >> 29);
}

// Length of the longest prefix that is UTF-8 text; npos when a byte no text has comes first. A character cut off by the
// end of the buffer is left out.
std::size_t text_prefix(std::string_view bytes) {
  std::size_t i = 0;
  while (i < bytes.size()) {
    const auto c = static_cast<unsigned char>(bytes[i]);
    std::size_t length = 1;
    if (c < 0x80) {
      if (c < 0x20 && c != '\n' && c != '\t' && c != '\r' && c != '\f') return std::string_view::npos;
    } else if (c >= 0xc2 && c < 0xe0) {
      length = 2;
    } else if (c >= 0xe0 && c < 0xf0) {
      length = 3;
    } else if (c >= 0xf0 && c < 0xf5) {
      length = 4;
    } else {
      return std::string_view::npos;
    }
    if (i + length > bytes.size()) return i;
    for (std::size_t j = 1; j < length; ++j) {
      if ((static_cast<unsigned char>(bytes[i + j]) & 0xc0) != 0x80) return std::string_view::npos;
    }
    i += length;
  }
  return i;
}

// A line that begins with '=' and a letter opens a block of documentation in Perl; "=cut" ends it.
std::string perl_documentation(std::string_view source) {
  std::string result;
  bool inside = false;
  while (!source.empty()) {
    const std::size_t end = std::min(source.find('\n'), source.size() - 1) + 1;
    const std::string_view line = source.substr(0, end);
    source.remove_prefix(end);
    if (line.starts_with("=cut")) {
      inside = false;
    } else if (line.size() > 1 && line[0] == '=' && line[1] >= 'a' && line[1] <= 'z') {
      inside = true;
    }
    if (inside) result.append(line);
  }
  return result;
}

// The file's text, empty when it is not text.
std::string read_text(const fs::path& path, std::size_t max_bytes) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return {};
  std::string bytes;
  constexpr std::size_t kSniff = 4096;
  bytes.resize(std::min(kSniff, max_bytes));
  file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  bytes.resize(static_cast<std::size_t>(file.gcount()));
  if (text_prefix(bytes) == std::string_view::npos) return {};
  if (bytes.size() == kSniff) {  // goes on
    std::string rest(max_bytes - kSniff, '\0');
    std::error_code error;
    const std::uintmax_t size = fs::file_size(path, error);
    if (!error && size < max_bytes) rest.resize(size > kSniff ? static_cast<std::size_t>(size) - kSniff : 0);
    file.read(rest.data(), static_cast<std::streamsize>(rest.size()));
    rest.resize(static_cast<std::size_t>(std::max<std::streamsize>(file.gcount(), 0)));
    bytes += rest;
  }
  const std::size_t length = text_prefix(bytes);
  if (length == std::string_view::npos) return {};
  bytes.resize(length);
  const std::string extension = path.extension().string();
  if (extension == ".pm" || extension == ".pl") return perl_documentation(bytes);
  return bytes;
}

bool is_hidden(const fs::path& path) {
  const std::string name = path.filename().string();
  return name.size() > 1 && name[0] == '.' && name != "..";
}

// Regular files under `root` in name order.
void list_files(const fs::path& root, const CorpusLimits& limits, std::vector<fs::path>& files) {
  std::error_code error;
  std::vector<fs::path> found;
  fs::recursive_directory_iterator it(root, fs::directory_options::skip_permission_denied, error);
  if (error) throw Error("corpus: cannot read directory " + root.string() + ": " + error.message());
  std::size_t seen = 0;
  for (const fs::recursive_directory_iterator end; it != end && seen < limits.max_files; ++seen) {
    const fs::directory_entry& entry = *it;
    if (is_hidden(entry.path())) {
      it.disable_recursion_pending();
    } else if (!entry.is_symlink(error) && entry.is_regular_file(error)) {
      found.push_back(entry.path());
    }
    it.increment(error);
    if (error) break;
  }
  std::sort(found.begin(), found.end());
  files.insert(files.end(), found.begin(), found.end());
}

std::size_t line_start_after(const std::string& text, std::size_t at) {
  if (at == 0) return 0;
  const std::size_t newline = text.find('\n', at - 1);
  if (newline != std::string::npos && newline + 1 < std::min(text.size(), at + 4096)) return newline + 1;
  while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) ++at;  // no line near: a character
  return std::min(at, text.size());
}

}  // namespace

void Corpus::add_document(const std::string& name, const std::string& text) {
  if (text.size() < kMinDocumentBytes) return;
  const std::string base = fs::path(name).filename().string();
  static const std::set<std::string> kCode = {".c",   ".cc",   ".cpp", ".cu",   ".go",  ".h",    ".hh",
                                              ".hpp", ".java", ".js",  ".json", ".lua", ".py",   ".rb",
                                              ".rs",  ".sh",   ".sql", ".ts",   ".xml", ".yaml", ".yml"};
  const bool is_code = kCode.contains(fs::path(name).extension().string());
  std::size_t begin = 0;
  for (std::size_t part = 0; begin < text.size(); ++part) {
    std::size_t end = text.size();
    if (end - begin > kUnitBytes + kUnitBytes / 2) end = line_start_after(text, begin + kUnitBytes);
    Unit unit;
    unit.name = base + "#" + std::to_string(part);
    unit.held_out = hash_name(unit.name) % kHeldOutOneIn == 0;
    unit.is_code = is_code;
    unit.text = text.substr(begin, end - begin);
    units_.push_back(std::move(unit));
    begin = end;
  }
}

// A small corpus may have all its units on one side: then the last one changes sides, and of a single unit the last
// eighth.
void Corpus::settle_split(const std::string& what) {
  if (units_.empty()) throw Error("corpus: no text found in " + what);
  origin_ = what;
  const auto is_held_out = [](const Unit& unit) { return unit.held_out; };
  const auto held_out = static_cast<std::size_t>(std::count_if(units_.begin(), units_.end(), is_held_out));
  if (held_out != 0 && held_out != units_.size()) return;
  if (units_.size() == 1) {
    Unit tail = units_[0];
    const std::size_t cut = line_start_after(tail.text, tail.text.size() - tail.text.size() / kHeldOutOneIn);
    tail.text = tail.text.substr(cut);
    units_[0].text.resize(cut);
    units_[0].held_out = false;
    tail.held_out = true;
    units_.push_back(std::move(tail));
  } else {
    units_.back().held_out = held_out == 0;
  }
}

Corpus Corpus::open(const std::vector<fs::path>& paths, const CorpusLimits& limits) {
  Corpus corpus;
  std::string what;
  std::size_t total = 0;
  for (const fs::path& path : paths) {
    what += (what.empty() ? "" : ", ") + path.string();
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (!fs::exists(status)) throw Error("corpus: " + path.string() + " does not exist");
    const std::size_t before = corpus.units_.size();
    if (fs::is_directory(status)) {
      std::vector<fs::path> files;
      list_files(path, limits, files);
      for (const fs::path& file : files) {
        if (total >= limits.max_bytes) break;
        const std::string text = read_text(file, limits.max_file_bytes);
        total += text.size();
        corpus.add_document(file.string(), text);
      }
    } else if (fs::is_regular_file(status)) {
      const std::string text = read_text(path, limits.max_bytes);
      total += text.size();
      corpus.add_document(path.string(), text);
    }
    if (corpus.units_.size() == before && total < limits.max_bytes) {
      throw Error("corpus: no text found in " + path.string() + " (text is UTF-8 without control bytes)");
    }
  }
  corpus.settle_split(what.empty() ? "an empty list of paths" : what);
  return corpus;
}

Corpus Corpus::open_default() {
  Corpus corpus;
  const auto children = [](const char* directory, const std::string& prefix) {
    std::vector<fs::path> result;
    std::error_code error;
    for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
      if (it->path().filename().string().starts_with(prefix) && !it->is_symlink(error)) result.push_back(it->path());
    }
    std::sort(result.begin(), result.end());
    return result;
  };
  std::vector<fs::path> roots;
  for (const fs::path& path : children("/usr/share", "cmake-")) roots.push_back(path / "Help");
  for (const fs::path& path : children("/usr/share/perl", "5.")) roots.push_back(path);
  for (const fs::path& path : children("/usr/lib", "python3.")) roots.push_back(path);
  const CorpusLimits limits;
  for (const fs::path& root : roots) {
    if (!fs::is_directory(root)) continue;
    std::vector<fs::path> files;
    list_files(root, limits, files);
    for (const fs::path& file : files) {
      const std::string name = file.string();
      const std::string extension = file.extension().string();
      if (extension != ".rst" && extension != ".pm" && extension != ".pod" && extension != ".py") continue;
      const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
      // tables of characters, tests and generated data are no text that anyone would read
      if (has("/Collate/") || has("/unicore/") || has("/encodings/") || has("/test") || has("pydoc_data") ||
          has("-packages/") || has("/lib2to3/")) {
        continue;
      }
      const std::string text = read_text(file, limits.max_file_bytes);
      if (text.size() >= 2048) corpus.add_document(name, text);  // stubs and indexes left out
    }
  }
  corpus.settle_split("/usr/share/cmake-*/Help, /usr/share/perl and /usr/lib/python3.* (name files of your own)");
  return corpus;
}

Corpus Corpus::from_texts(const std::vector<std::pair<std::string, std::string>>& documents) {
  Corpus corpus;
  for (const auto& [name, text] : documents) corpus.add_document(name, text);
  corpus.settle_split("the texts given");
  return corpus;
}

std::size_t Corpus::bytes(Split split) const {
  std::size_t total = 0;
  for (const Unit& unit : units_) {
    if (unit.held_out == (split == Split::kHeldOut)) total += unit.text.size();
  }
  return total;
}

std::vector<Tokens> Corpus::windows(const Encode& encode, Split split, std::int64_t length, std::int64_t count,
                                    std::uint64_t seed, std::int64_t separator, bool prose) const {
  if (length < 2 || count < 1) throw Error("corpus: windows need a length of at least 2 and a count of at least 1");
  struct Piece {
    const Unit* unit;
    std::size_t begin, end;
  };
  Random random(seed, 0x5eed, split == Split::kHeldOut ? 1 : 0);
  const std::size_t piece_bytes = static_cast<std::size_t>(length) * 4;
  const auto is_in = [&](const Unit& unit) {
    return unit.held_out == (split == Split::kHeldOut) && !unit.text.empty();
  };
  const bool without_code = prose && std::any_of(units_.begin(), units_.end(),
                                                 [&](const Unit& unit) { return is_in(unit) && !unit.is_code; });
  // rounds[r]: the r-th piece of every unit that has one
  std::vector<std::vector<Piece>> rounds;
  for (const Unit& unit : units_) {
    if (!is_in(unit) || (without_code && unit.is_code)) continue;
    std::vector<Piece> pieces;
    std::size_t begin = 0;
    while (begin < unit.text.size()) {
      std::size_t end = unit.text.size();
      if (end - begin > piece_bytes + piece_bytes / 2) end = line_start_after(unit.text, begin + piece_bytes);
      pieces.push_back({&unit, begin, end});
      begin = end;
    }
    random.shuffle(pieces);
    if (rounds.size() < pieces.size()) rounds.resize(pieces.size());
    for (std::size_t r = 0; r < pieces.size(); ++r) rounds[r].push_back(pieces[r]);
  }
  std::vector<Tokens> windows;
  Tokens pending;
  for (std::vector<Piece>& round : rounds) {
    random.shuffle(round);
    for (const Piece& piece : round) {
      const Tokens tokens = encode(std::string_view(piece.unit->text).substr(piece.begin, piece.end - piece.begin));
      pending.insert(pending.end(), tokens.begin(), tokens.end());
      if (separator >= 0) pending.push_back(separator);
      while (static_cast<std::int64_t>(pending.size()) >= length) {
        windows.emplace_back(pending.begin(), pending.begin() + length);
        pending.erase(pending.begin(), pending.begin() + length);
        if (static_cast<std::int64_t>(windows.size()) == count) return windows;
      }
    }
  }
  if (windows.empty()) {
    throw Error("corpus: the " + std::string(split == Split::kHeldOut ? "held-out" : "training") + " part of " +
                origin_ + " has " + std::to_string(pending.size()) + " tokens, fewer than one window of " +
                std::to_string(length));
  }
  return windows;
}

}  // namespace msa::model
