// SPDX-License-Identifier: Apache-2.0
// See tokenizer.h: reading tokenizer.json, then the pipeline.
#include "src/model/files/tokenizer.h"

#include <algorithm>
#include <array>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "msa/error.h"
#include "src/model/files/added_tokens.h"
#include "src/model/files/bpe.h"
#include "src/model/files/file_io.h"
#include "src/model/files/json.h"
#include "src/model/files/quote.h"
#include "src/model/files/regex.h"
#include "src/model/files/unicode_nfc.h"
#include "src/model/files/utf8.h"

namespace msa::files {
namespace {

constexpr std::size_t kMaxTokenizerBytes = 256'000'000;
constexpr std::size_t kMaxSettingsBytes = 16'000'000;
constexpr std::size_t kMaxSteps = 32;  // of a pre-tokenizer or a sequence of normalizers or post-processors
constexpr std::int64_t kMaxTokenId = (std::int64_t{1} << 24) - 1;

// The pattern of GPT-2, which ByteLevel applies when use_regex is on.
constexpr char kGpt2Pattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// What becomes of the matches of a pattern and the text between them.
enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct SplitStep {
  Regex pattern;
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  // the text between the matches is what the behavior is about
};

struct Span {
  std::size_t begin;
  std::size_t end;
  bool is_match;
};

/// GPT-2's alphabet: the printable bytes of Latin-1 stand for themselves, the others for U+0100 and on, in order.
std::array<std::uint32_t, 256> byte_alphabet() {
  std::array<std::uint32_t, 256> code_points = {};
  std::uint32_t next = 0x100;
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    code_points[byte] = printable ? byte : next++;
  }
  return code_points;
}

/// The bytes that a spelling in the alphabet stands for; nothing when some character is not of the alphabet.
std::optional<std::string> spelled_bytes(std::string_view spelling) {
  static const std::unordered_map<std::uint32_t, char> byte_of = [] {
    std::unordered_map<std::uint32_t, char> map;
    const auto alphabet = byte_alphabet();
    for (std::size_t byte = 0; byte < alphabet.size(); ++byte) map[alphabet[byte]] = static_cast<char>(byte);
    return map;
  }();
  std::string bytes;
  while (!spelling.empty()) {
    const Utf8Unit unit = read_utf8(spelling);
    const auto found = byte_of.find(unit.code_point);
    if (unit.kind != Utf8Kind::kValid || found == byte_of.end()) return std::nullopt;
    bytes += found->second;
    spelling.remove_prefix(unit.length);
  }
  return bytes;
}

struct Token {
  std::string bytes;
  bool special = false;
};

}  // namespace

struct TokenizerTables {
  BpeModel model;
  StringMap<TokenId> ids;                     // by spelling
  std::unordered_map<TokenId, Token> tokens;  // sparse: ids come from the file
  TokenId largest_id = -1;
  bool normalize_nfc = false;
  std::vector<SplitStep> splits;
  std::size_t byte_level_step = 0;     // pieces that reach this split step have reached ByteLevel
  bool add_prefix_space = false;       // and then get a space in front when they have none
  AddedTokenMatcher raw_added;         // looked for in the text as it is
  AddedTokenMatcher normalized_added;  // and in the normalized text
  std::vector<TokenId> prefix;         // of the post-processor
  std::vector<TokenId> suffix;
};

namespace {

/// Fills the tables from the document. Every refusal names the part it is about.
class Loader {
 public:
  Loader(const Json& document, const std::string& origin, TokenizerTables* tables);

 private:
  [[noreturn]] void fail(const std::string& part, const std::string& what) const {
    throw Error(origin_ + ": " + part + ": " + what);
  }
  std::string type_of(const Json& part, const std::string& name) const {
    if (!part.is_object()) fail(name, "must be an object");
    return read_string(part, "type", "", origin_ + ": " + name);
  }
  /// The parts of a Sequence, or the part itself.
  std::vector<const Json*> sequence_of(const Json& part, const std::string& name, const char* key) const;

  void load_vocabulary(const Json& model);
  void load_merges(const Json& model);
  void load_added_tokens(const Json& document);
  void load_normalizer(const Json* part);
  void load_pre_tokenizer(const Json* part);
  void load_split(const Json& part);
  void load_post_processor(const Json* part);
  void load_template(const Json& part);
  void load_decoder(const Json* part);

  const std::string& origin_;
  TokenizerTables& tables_;
};

std::vector<const Json*> Loader::sequence_of(const Json& part, const std::string& name, const char* key) const {
  if (type_of(part, name) != "Sequence") return {&part};
  const Json* const list = find_value(part, key);
  if (list == nullptr || !list->is_array() || list->size() > kMaxSteps) {
    fail(name, std::string("a Sequence needs a list ") + key + " of at most " + std::to_string(kMaxSteps));
  }
  std::vector<const Json*> parts;
  for (const Json& entry : *list) {
    for (const Json* const inner : sequence_of(entry, name, key)) parts.push_back(inner);
    if (parts.size() > kMaxSteps) fail(name, "more than " + std::to_string(kMaxSteps) + " parts");
  }
  return parts;
}

void Loader::load_vocabulary(const Json& model) {
  const Json* const vocab = find_value(model, "vocab");
  if (vocab == nullptr || !vocab->is_object() || vocab->empty()) fail("model.vocab", "must be an object with tokens");
  tables_.ids.reserve(vocab->size());
  tables_.tokens.reserve(vocab->size());
  for (const auto& [spelling, id] : vocab->items()) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() > std::uint64_t{kMaxTokenId}) {
      fail("model.vocab",
           "the id of " + quote(spelling) + " must be an integer from 0 to " + std::to_string(kMaxTokenId));
    }
    const auto token = id.get<TokenId>();
    std::optional<std::string> bytes = spelled_bytes(spelling);
    if (bytes && bytes->size() == 1) tables_.model.byte_tokens[static_cast<unsigned char>((*bytes)[0])] = token;
    if (!tables_.tokens.emplace(token, Token{bytes ? std::move(*bytes) : spelling}).second) {
      fail("model.vocab", "two tokens have id " + std::to_string(token));
    }
    tables_.ids.emplace(spelling, token);
    tables_.largest_id = std::max(tables_.largest_id, token);
  }
}

void Loader::load_merges(const Json& model) {
  const Json* const merges = find_value(model, "merges");
  if (merges == nullptr || !merges->is_array()) fail("model.merges", "must be a list");
  tables_.model.merges.reserve(merges->size());
  std::uint32_t rank = 0;
  std::string joined;
  for (const Json& merge : *merges) {
    std::string_view left;
    std::string_view right;
    if (merge.is_string()) {  // "a b", the older form
      const std::string_view text = merge.get_ref<const std::string&>();
      const std::size_t space = text.find(' ');
      if (space == std::string_view::npos || text.find(' ', space + 1) != std::string_view::npos) {
        fail("model.merges", quote(text) + " must be two tokens with one space between");
      }
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      left = merge[0].get_ref<const std::string&>();
      right = merge[1].get_ref<const std::string&>();
    } else {
      fail("model.merges", "each must be \"a b\" or [\"a\", \"b\"], not " + quote(merge.dump()));
    }
    const auto id = [&](std::string_view spelling) {
      const auto found = tables_.ids.find(spelling);
      if (found == tables_.ids.end()) fail("model.merges", "token " + quote(spelling) + " is not in the vocabulary");
      return found->second;
    };
    joined.assign(left).append(right);
    const TokenId left_id = id(left);
    const TokenId right_id = id(right);
    tables_.model.merges.insert(left_id, right_id, {rank++, id(joined)});
  }
}

void Loader::load_added_tokens(const Json& document) {
  const Json* const list = find_value(document, "added_tokens");
  if (list == nullptr) return;
  if (!list->is_array()) fail("added_tokens", "must be a list");
  std::unordered_set<std::string> seen;
  for (const Json& entry : *list) {
    if (!entry.is_object()) fail("added_tokens", "each must be an object");
    const std::string where = origin_ + ": added_tokens";
    AddedToken token;
    token.content = read_string(entry, "content", "", where);
    token.id = static_cast<TokenId>(read_int(entry, "id", -1, 0, kMaxTokenId, where));
    token.single_word = read_bool(entry, "single_word", false, where);
    token.left_strip = read_bool(entry, "lstrip", false, where);
    token.right_strip = read_bool(entry, "rstrip", false, where);
    token.special = read_bool(entry, "special", false, where);
    token.normalized = read_bool(entry, "normalized", !token.special, where);
    if (token.content.empty()) continue;  // the tokenizers package passes over them as well
    if (token.normalized && tables_.normalize_nfc) token.content = normalize_nfc(token.content);
    if (token.id < 0) fail("added_tokens", quote(token.content) + " has no id");
    if (!seen.insert(token.content).second) fail("added_tokens", quote(token.content) + " is listed twice");

    // A content that the vocabulary knows must agree with it; another takes an id of its own.
    if (const auto known = tables_.ids.find(token.content); known != tables_.ids.end()) {
      if (known->second != token.id) {
        fail("added_tokens", quote(token.content) + " has id " + std::to_string(token.id) + ", the vocabulary says " +
                                 std::to_string(known->second));
      }
    } else if (tables_.tokens.contains(token.id)) {
      fail("added_tokens", quote(token.content) + ": id " + std::to_string(token.id) + " belongs to another token");
    } else {
      std::optional<std::string> bytes = spelled_bytes(token.content);
      tables_.tokens.emplace(token.id, Token{bytes ? std::move(*bytes) : token.content});
      tables_.ids.emplace(token.content, token.id);
    }
    tables_.tokens[token.id].special = token.special;
    tables_.largest_id = std::max(tables_.largest_id, token.id);

    if (token.content.size() > kMaxAddedTokenBytes) {
      fail("added_tokens", quote(token.content) + " has more than " + std::to_string(kMaxAddedTokenBytes) + " bytes");
    }
    (token.normalized ? tables_.normalized_added : tables_.raw_added).add(token);
  }
}

void Loader::load_normalizer(const Json* part) {
  if (part == nullptr) return;
  for (const Json* const entry : sequence_of(*part, "normalizer", "normalizers")) {
    const std::string type = type_of(*entry, "normalizer");
    if (type != "NFC") fail("normalizer", "type " + quote(type) + " is not supported; null and NFC are");
    tables_.normalize_nfc = true;
  }
}

void Loader::load_split(const Json& part) {
  constexpr std::array<std::pair<const char*, SplitBehavior>, 5> kBehaviors = {
      {{"Removed", SplitBehavior::kRemoved},
       {"Isolated", SplitBehavior::kIsolated},
       {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
       {"MergedWithNext", SplitBehavior::kMergedWithNext},
       {"Contiguous", SplitBehavior::kContiguous}}};
  const std::string where = origin_ + ": pre_tokenizer Split";
  const std::string name = read_string(part, "behavior", "", where);
  const auto* const behavior = std::find_if(kBehaviors.begin(), kBehaviors.end(),
                                            [&](const auto& candidate) { return candidate.first == name; });
  if (behavior == kBehaviors.end()) fail("pre_tokenizer Split", "behavior " + quote(name) + " is not known");
  const Json* const pattern = find_value(part, "pattern");
  if (pattern == nullptr || !pattern->is_object()) fail("pre_tokenizer Split", "needs a pattern");
  const std::string regex = read_string(*pattern, "Regex", "", where);
  const std::string literal = read_string(*pattern, "String", "", where);
  if (regex.empty() == literal.empty()) fail("pre_tokenizer Split", "its pattern must be a Regex or a String");
  tables_.splits.push_back({literal.empty() ? Regex::compile(regex, where) : Regex::literal(literal, where),
                            behavior->second, read_bool(part, "invert", false, where)});
}

void Loader::load_pre_tokenizer(const Json* part) {
  if (part == nullptr) fail("pre_tokenizer", "is missing: not a byte-level tokenizer");
  const std::vector<const Json*> steps = sequence_of(*part, "pre_tokenizer", "pretokenizers");
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const Json& step = *steps[i];
    const std::string type = type_of(step, "pre_tokenizer");
    const std::string where = origin_ + ": pre_tokenizer " + type;
    const bool last = i + 1 == steps.size();
    if ((type == "ByteLevel") != last) fail("pre_tokenizer", "ByteLevel must be there, once and last");
    if (type == "ByteLevel") {
      tables_.add_prefix_space = read_bool(step, "add_prefix_space", true, where);
      tables_.byte_level_step = tables_.splits.size();
      if (read_bool(step, "use_regex", true, where)) tables_.splits.push_back({Regex::compile(kGpt2Pattern, where)});
    } else if (type == "Digits") {
      const bool individual = read_bool(step, "individual_digits", false, where);
      tables_.splits.push_back({Regex::compile(individual ? R"(\p{N})" : R"(\p{N}+)", where)});
    } else if (type == "Split") {
      load_split(step);
    } else {
      fail("pre_tokenizer", "type " + quote(type) + " is not supported; Split, Digits and ByteLevel are");
    }
  }
  if (steps.empty()) fail("pre_tokenizer", "is empty: not a byte-level tokenizer");
}

void Loader::load_template(const Json& part) {
  const std::string name = "post_processor TemplateProcessing";
  const Json* const single = find_value(part, "single");
  const Json* const specials = find_value(part, "special_tokens");
  if (single == nullptr || !single->is_array() || single->size() > 64) fail(name, "needs a list single");
  std::vector<TokenId> before;
  std::vector<TokenId> after;
  bool seen_text = false;
  for (const Json& item : *single) {
    if (const Json* const sequence = find_value(item, "Sequence")) {
      if (seen_text || read_string(*sequence, "id", "", origin_) != "A") fail(name, "single must hold the text A once");
      seen_text = true;
      continue;
    }
    const Json* const special = find_value(item, "SpecialToken");
    const std::string id = special == nullptr ? "" : read_string(*special, "id", "", origin_);
    const Json* const entry = specials == nullptr ? nullptr : find_value(*specials, id.c_str());
    const Json* const ids = entry == nullptr ? nullptr : find_value(*entry, "ids");
    if (ids == nullptr || !ids->is_array() || ids->size() > 64)
      fail(name, "special token " + quote(id) + " has no ids");
    for (const Json& value : *ids) {
      if (!value.is_number_unsigned() || value.get<std::uint64_t>() > std::uint64_t{kMaxTokenId}) {
        fail(name, "special token " + quote(id) + " has a broken id");
      }
      (seen_text ? after : before).push_back(value.get<TokenId>());
    }
  }
  if (!seen_text) fail(name, "single must hold the text A once");
  tables_.prefix.insert(tables_.prefix.begin(), before.begin(), before.end());
  tables_.suffix.insert(tables_.suffix.end(), after.begin(), after.end());
}

void Loader::load_post_processor(const Json* part) {
  if (part == nullptr) return;
  for (const Json* const entry : sequence_of(*part, "post_processor", "processors")) {
    const std::string type = type_of(*entry, "post_processor");
    if (type == "TemplateProcessing") {
      load_template(*entry);
    } else if (type != "ByteLevel") {  // ByteLevel only trims offsets
      fail("post_processor", "type " + quote(type) + " is not supported; TemplateProcessing and ByteLevel are");
    }
  }
}

void Loader::load_decoder(const Json* part) {
  if (part == nullptr) return;
  for (const Json* const entry : sequence_of(*part, "decoder", "decoders")) {
    const std::string type = type_of(*entry, "decoder");
    if (type != "ByteLevel") fail("decoder", "type " + quote(type) + " is not supported, only ByteLevel is");
  }
}

Loader::Loader(const Json& document, const std::string& origin, TokenizerTables* tables)
    : origin_(origin), tables_(*tables) {
  const Json* const model = find_value(document, "model");
  if (model == nullptr) fail("model", "is missing: not a tokenizer.json");
  // Files of an old writer leave the type out.
  const std::string type = type_of(*model, "model");
  if (type != "BPE" && !type.empty()) fail("model", "type " + quote(type) + " is not supported, only BPE is");
  const std::string where = origin + ": model";
  if (read_bool(*model, "byte_fallback", false, where)) fail("model.byte_fallback", "is not supported");
  if (read_number(*model, "dropout", 0.0, 0.0, 1.0, where) != 0.0) fail("model.dropout", "is not supported");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!read_string(*model, key, "", where).empty()) fail(std::string("model.") + key, "is not supported");
  }
  tables_.model.byte_tokens.fill(kNoToken);
  load_vocabulary(*model);
  load_merges(*model);
  if (const std::string unknown = read_string(*model, "unk_token", "", where); !unknown.empty()) {
    const auto found = tables_.ids.find(unknown);
    if (found == tables_.ids.end()) fail("model.unk_token", quote(unknown) + " is not in the vocabulary");
    tables_.model.unknown = found->second;
  }
  tables_.model.fuse_unknown = read_bool(*model, "fuse_unk", false, where);
  if (read_bool(*model, "ignore_merges", false, where)) {
    for (const auto& [spelling, id] : tables_.ids) {
      if (const std::optional<std::string> bytes = spelled_bytes(spelling))
        tables_.model.whole_pieces.emplace(*bytes, id);
    }
  }
  load_normalizer(find_value(document, "normalizer"));
  load_added_tokens(document);
  load_pre_tokenizer(find_value(document, "pre_tokenizer"));
  load_post_processor(find_value(document, "post_processor"));
  load_decoder(find_value(document, "decoder"));
}

/// The matches of the step's pattern and the text between, in order, after the step's behavior.
std::vector<Span> split_spans(std::string_view text, const SplitStep& step) {
  std::vector<Span> spans;
  std::size_t done = 0;
  step.pattern.for_each_match(text, [&](std::size_t begin, std::size_t end) {
    if (begin > done) spans.push_back({done, begin, step.invert});
    spans.push_back({begin, end, !step.invert});
    done = end;
  });
  if (done < text.size()) spans.push_back({done, text.size(), step.invert});

  std::vector<Span> result;
  switch (step.behavior) {
    case SplitBehavior::kIsolated: return spans;
    case SplitBehavior::kRemoved:
      for (const Span& span : spans) {
        if (!span.is_match) result.push_back(span);
      }
      return result;
    case SplitBehavior::kContiguous: {
      bool previous = false;
      for (const Span& span : spans) {
        if (span.is_match == previous && !result.empty()) {
          result.back().end = span.end;
        } else {
          result.push_back(span);
        }
        previous = span.is_match;
      }
      return result;
    }
    case SplitBehavior::kMergedWithPrevious: {
      bool previous = false;
      for (const Span& span : spans) {
        if (span.is_match && !previous && !result.empty()) {
          result.back().end = span.end;
        } else {
          result.push_back(span);
        }
        previous = span.is_match;
      }
      return result;
    }
    case SplitBehavior::kMergedWithNext: {
      bool next = false;
      for (auto span = spans.rbegin(); span != spans.rend(); ++span) {
        if (span->is_match && !next && !result.empty()) {
          result.back().begin = span->begin;
        } else {
          result.push_back(*span);
        }
        next = span->is_match;
      }
      std::reverse(result.begin(), result.end());
      return result;
    }
  }
  return spans;
}

/// One piece of normalized text through the split steps from `step` on, then BPE. Recursion is as deep as there are
/// steps.
void split_and_encode(const TokenizerTables& tables, std::string_view piece, std::size_t step, BpeEncoder* encoder,
                      std::vector<TokenId>* out) {
  if (piece.empty()) return;
  std::string prefixed;
  if (tables.add_prefix_space && step == tables.byte_level_step && piece.front() != ' ') {
    prefixed.append(" ").append(piece);
    piece = prefixed;
  }
  if (step == tables.splits.size()) return encoder->encode(piece, out);
  for (const Span& span : split_spans(piece, tables.splits[step])) {
    split_and_encode(tables, piece.substr(span.begin, span.end - span.begin), step + 1, encoder, out);
  }
}

}  // namespace

Tokenizer Tokenizer::parse(std::string_view tokenizer_json, const std::string& origin) {
  const Json document = parse_json(tokenizer_json, origin);
  if (!document.is_object()) throw Error(origin + ": must be a JSON object");
  auto tables = std::make_shared<TokenizerTables>();
  Loader(document, origin, tables.get());
  return Tokenizer(std::move(tables));
}

Tokenizer Tokenizer::load(const std::filesystem::path& path) {
  std::error_code ignored;
  const std::filesystem::path file = std::filesystem::is_directory(path, ignored) ? path / "tokenizer.json" : path;
  return parse(read_text_file(file, kMaxTokenizerBytes), quote(file.string()));
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, const EncodeOptions& options) const {
  const TokenizerTables& tables = *tables_;
  std::string repaired;
  if (!is_valid_utf8(text)) {
    repaired = repair_utf8(text);
    text = repaired;
  }
  std::vector<TokenId> out;
  if (options.add_special_tokens) out = tables.prefix;
  BpeEncoder encoder(tables.model);
  const bool ignore_special = !options.parse_special_tokens;
  const auto encode_normalized = [&](TokenId id, std::string_view piece) {
    if (id != kNoToken) return out.push_back(id);
    split_and_encode(tables, piece, 0, &encoder, &out);
  };
  const auto encode_raw = [&](TokenId id, std::string_view piece) {
    if (id != kNoToken) return out.push_back(id);
    const std::string normalized = tables.normalize_nfc ? normalize_nfc(piece) : std::string();
    tables.normalized_added.split(tables.normalize_nfc ? normalized : piece, ignore_special, encode_normalized);
  };
  tables.raw_added.split(text, ignore_special, encode_raw);
  if (options.add_special_tokens) out.insert(out.end(), tables.suffix.begin(), tables.suffix.end());
  return out;
}

std::string Tokenizer::decode(std::span<const std::int32_t> tokens, bool skip_special_tokens) const {
  std::string bytes;
  for (const TokenId token : tokens) {
    if (!skip_special_tokens || !is_special(token)) bytes += token_bytes(token);
  }
  return repair_utf8(bytes);
}

std::string_view Tokenizer::token_bytes(std::int32_t token) const {
  const auto found = tables_->tokens.find(token);
  return found == tables_->tokens.end() ? std::string_view() : found->second.bytes;
}

std::optional<std::int32_t> Tokenizer::find_token(std::string_view content) const {
  const auto found = tables_->ids.find(content);
  return found == tables_->ids.end() ? std::nullopt : std::optional(found->second);
}

bool Tokenizer::is_special(std::int32_t token) const {
  const auto found = tables_->tokens.find(token);
  return found != tables_->tokens.end() && found->second.special;
}

std::int32_t Tokenizer::vocab_size() const { return tables_->largest_id + 1; }

std::string StreamingDecoder::push(std::int32_t token) {
  if (!skip_special_tokens_ || !tokenizer_.is_special(token)) pending_ += tokenizer_.token_bytes(token);
  std::string out;
  drain_utf8(&pending_, false, &out);
  return out;
}

std::string StreamingDecoder::finish() {
  std::string out;
  drain_utf8(&pending_, true, &out);
  return out;
}

TokenizerSettings parse_tokenizer_settings(std::string_view text, const std::string& origin) {
  const Json document = parse_json(text, origin);
  if (!document.is_object()) throw Error(origin + ": must be a JSON object");
  TokenizerSettings settings;
  // A token is its content, or an object that has it; the latter is the form of added tokens.
  const auto read_token = [&](const char* key) {
    const Json* const value = find_value(document, key);
    if (value != nullptr && value->is_object()) return read_string(*value, "content", "", origin);
    return read_string(document, key, "", origin);
  };
  settings.bos_token = read_token("bos_token");
  settings.eos_token = read_token("eos_token");
  const Json* const chat = find_value(document, "chat_template");
  if (chat != nullptr && chat->is_array()) {  // several by name
    for (const Json& entry : *chat) {
      if (read_string(entry, "name", "", origin) != "default") continue;
      settings.chat_template = read_string(entry, "template", "", origin);
    }
  } else {
    settings.chat_template = read_string(document, "chat_template", "", origin);
  }
  return settings;
}

TokenizerSettings load_tokenizer_settings(const std::filesystem::path& directory) {
  TokenizerSettings settings;
  std::error_code ignored;
  const std::filesystem::path file = directory / "tokenizer_config.json";
  if (std::filesystem::exists(file, ignored)) {
    settings = parse_tokenizer_settings(read_text_file(file, kMaxSettingsBytes), quote(file.string()));
  }
  const std::filesystem::path chat = directory / "chat_template.jinja";
  if (std::filesystem::exists(chat, ignored)) settings.chat_template = read_text_file(chat, kMaxSettingsBytes);
  return settings;
}

}  // namespace msa::files
