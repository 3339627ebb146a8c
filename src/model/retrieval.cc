// SPDX-License-Identifier: Apache-2.0
// See retrieval.h.
#include "src/model/retrieval.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <string_view>

#include "msa/error.h"

namespace msa::model {
namespace {

constexpr std::array<const char*, 96> kWords = {
    "amber",  "anchor", "apple",   "arrow",   "autumn",  "badger",  "bamboo",  "basket", "beacon",  "birch",  "blossom",
    "bottle", "breeze", "bridge",  "bronze",  "butter",  "cabin",   "candle",  "canyon", "carpet",  "castle", "cedar",
    "cherry", "clover", "cobalt",  "comet",   "copper",  "coral",   "cotton",  "crane",  "crystal", "dagger", "daisy",
    "delta",  "desert", "dragon",  "eagle",   "ember",   "falcon",  "feather", "fennel", "fiddle",  "finch",  "flint",
    "forest", "garnet", "ginger",  "glacier", "granite", "hammer",  "harbor",  "hazel",  "heron",   "honey",  "indigo",
    "island", "ivory",  "jasmine", "jungle",  "kettle",  "lantern", "lemon",   "lilac",  "lotus",   "magnet", "maple",
    "marble", "meadow", "mirror",  "mosaic",  "nectar",  "needle",  "nickel",  "oasis",  "olive",   "orchid", "otter",
    "oyster", "paddle", "panther", "pebble",  "pepper",  "pigeon",  "pine",    "planet", "plum",    "pocket", "quartz",
    "quill",  "rabbit", "raven",   "ribbon",  "river",   "rocket",  "saddle",  "saffron"};

struct Template {
  const char* statement;  // {k} and {v} are filled in
  const char* question;
  const char* answer;
};

constexpr std::array<Template, 6> kTemplates = {{
    {"The locker number of {k} is {v}.", "Which locker number does {k} have?", "The locker number of {k} is {v}."},
    {"Invoice {k}: total {v}.", "What was the total of invoice {k}?", "Invoice {k}: total {v}."},
    {"{k} lives at extension {v}.", "Which extension do I dial for {k}?", "{k} lives at extension {v}."},
    {"config.{k} = {v}", "Which value does config.{k} have?", "config.{k} = {v}"},
    {"Note: shipment {k} carries the label {v}.", "What label is on shipment {k}?",
     "Shipment {k} carries the label {v}."},
    {"The registered plate of the {k} van reads {v}.", "What does the plate of the {k} van read?", "It reads {v}."},
}};

template <std::size_t N>
std::string pick(const std::array<const char*, N>& values, Random& random) {
  return values[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(N)))];
}

std::string fill(std::string text, const std::string& key, const std::string& value) {
  for (const auto& [mark, replacement] : {std::pair{std::string("{k}"), key}, std::pair{std::string("{v}"), value}}) {
    const std::size_t at = text.find(mark);
    if (at != std::string::npos) text.replace(at, mark.size(), replacement);
  }
  return text;
}

std::string make_value(Random& random) {
  const auto between = [&](std::int64_t low, std::int64_t high) { return low + random.below(high - low); };
  switch (random.below(4)) {
    case 0: {
      std::int64_t high = 1'000;
      for (std::int64_t digits = between(1, 5); digits > 0; --digits) high *= 10;
      return std::to_string(between(1000, high));
    }
    case 1: {
      constexpr std::string_view kLetters = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789";
      std::string value;
      for (std::int64_t n = between(5, 9); n > 0; --n) {
        value += kLetters[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(kLetters.size())))];
      }
      return value;
    }
    case 2: {
      const std::string first = pick(kWords, random);  // in two statements: operands of + have no fixed order
      const std::string second = pick(kWords, random);
      return first + "-" + second + "-" + std::to_string(between(10, 999));
    }
    default: {
      const std::string first = std::to_string(between(10, 99));
      const std::string second = std::to_string(between(100, 999));
      return first + "-" + second + "-" + std::to_string(between(10, 99));
    }
  }
}

std::string render_plainly(const std::vector<ChatMessage>& messages, bool open) {
  std::string text;
  for (const ChatMessage& message : messages) text += message.role + ": " + message.content + "\n\n";
  if (open) text += "assistant: ";
  return text;
}

}  // namespace

TextTools make_text_tools(const files::Tokenizer& tokenizer, const std::string& directory) {
  TextTools tools;
  const auto encode_with = [tokenizer](bool special) {
    return [tokenizer, special](std::string_view text) {
      const std::vector<std::int32_t> ids =
          tokenizer.encode(text, {.add_special_tokens = false, .parse_special_tokens = special});
      return Tokens(ids.begin(), ids.end());
    };
  };
  tools.encode = encode_with(false);
  tools.encode_special = encode_with(true);
  tools.render_chat = render_plainly;
  const files::TokenizerSettings settings = files::load_tokenizer_settings(directory);
  if (settings.chat_template.empty()) return tools;
  try {
    const files::ChatTemplate chat = files::ChatTemplate::detect(tokenizer, settings);
    tools.render_chat = [chat](const std::vector<ChatMessage>& messages, bool open) {
      return chat.render_chat(messages, open);
    };
  } catch (const Error&) {  // a template of another layout: the paragraphs above do
  }
  return tools;
}

TextTools make_byte_tools() {
  TextTools tools;
  tools.encode = [](std::string_view text) {
    Tokens tokens;
    tokens.reserve(text.size());
    for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
    return tokens;
  };
  tools.encode_special = tools.encode;
  tools.render_chat = render_plainly;
  return tools;
}

ChatFrame frame_chat(const TextTools& tools, const std::string& intro, std::vector<ChatMessage> messages,
                     bool open_answer, const std::string& answer_start) {
  // A mark no template or message contains; the rendered text is cut there.
  static const std::string kMark = "\x02LONG TEXT\x03";
  if (messages.empty() || messages.front().role != "user") throw Error("chat: the first message must be the user's");
  messages.front().content = intro + kMark + messages.front().content;
  const std::string text = tools.render_chat(messages, open_answer) + answer_start;
  const std::size_t at = text.find(kMark);
  if (at == std::string::npos) throw Error("chat: the template drops or changes the user's message");
  ChatFrame frame;
  frame.head = tools.encode_special(std::string_view(text).substr(0, at));
  frame.tail = tools.encode_special(std::string_view(text).substr(at + kMark.size()));
  return frame;
}

RetrievalDocument make_retrieval_document(const TextTools& tools, const Tokens& filler, std::int64_t length,
                                          Random& random) {
  if (static_cast<std::int64_t>(filler.size()) < length)
    throw Error("retrieval document: filler shorter than the document");
  const Template& form =
      kTemplates[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(kTemplates.size())))];
  std::vector<std::pair<std::string, std::string>> pairs;
  for (std::int64_t n = std::int64_t{1} << random.below(4); n > 0; --n) {
    std::string key = pick(kWords, random);
    if (random.below(2) == 1) key.append(" ").append(pick(kWords, random));
    const bool taken = std::any_of(pairs.begin(), pairs.end(), [&](const auto& pair) { return pair.first == key; });
    const std::string value = make_value(random);
    if (!taken) pairs.emplace_back(key, value);
  }
  for (std::size_t lines = pairs.size(); lines >= 1; lines /= 2) {  // fewer, where the document is too short
    std::vector<std::size_t> order(lines);
    for (std::size_t i = 0; i < lines; ++i) order[i] = i;
    random.shuffle(order);
    std::vector<ChatMessage> messages;
    for (std::size_t i = 0; i < std::min<std::size_t>(lines, 4); ++i) {
      const auto& [key, value] = pairs[order[i]];
      const std::string question = fill(form.question, key, value);
      messages.push_back({"user", i == 0 ? std::string("\n\n").append(question) : question});
      messages.push_back({"assistant", fill(form.answer, key, value)});
    }
    const ChatFrame frame = frame_chat(tools, "", std::move(messages), false, "");
    std::vector<Tokens> statements;
    std::size_t used = frame.head.size() + frame.tail.size();
    for (std::size_t i = 0; i < lines; ++i) {
      const std::string statement = fill(form.statement, pairs[i].first, pairs[i].second);
      statements.push_back(tools.encode(std::string("\n").append(statement).append("\n")));
      used += statements.back().size();
    }
    const std::int64_t room = length - static_cast<std::int64_t>(used);
    if (room < length / 4) continue;
    std::vector<std::int64_t> cuts(lines);
    for (std::int64_t& cut : cuts) cut = random.below(room + 1);
    std::sort(cuts.begin(), cuts.end());
    RetrievalDocument document;
    document.tokens = frame.head;
    std::int64_t last = 0;
    for (std::size_t i = 0; i < lines; ++i) {
      document.tokens.insert(document.tokens.end(), filler.begin() + last, filler.begin() + cuts[i]);
      document.tokens.insert(document.tokens.end(), statements[i].begin(), statements[i].end());
      last = cuts[i];
    }
    document.tokens.insert(document.tokens.end(), filler.begin() + last, filler.begin() + room);
    document.tail_begin = static_cast<std::int64_t>(document.tokens.size());
    document.tokens.insert(document.tokens.end(), frame.tail.begin(), frame.tail.end());
    return document;
  }
  throw Error("retrieval document: " + std::to_string(length) + " tokens leave no room for a line and its question");
}

}  // namespace msa::model
