// SPDX-License-Identifier: Apache-2.0
// See chat_template.h.
#include "src/model/files/chat_template.h"

#include <string_view>

#include "msa/error.h"
#include "src/model/files/quote.h"

namespace msa::files {
namespace {

constexpr char kChatMlStart[] = "<|im_start|>";
constexpr char kChatMlEnd[] = "<|im_end|>";
constexpr char kLlamaBegin[] = "<|begin_of_text|>";
constexpr char kLlamaHeaderStart[] = "<|start_header_id|>";
constexpr char kLlamaHeaderEnd[] = "<|end_header_id|>";
constexpr char kLlamaEnd[] = "<|eot_id|>";

/// Jinja string escapes that templates use.
std::string unescape(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 1 < text.size()) {
      ++i;
      out += text[i] == 'n' ? '\n' : text[i] == 't' ? '\t' : text[i];
    } else {
      out += text[i];
    }
  }
  return out;
}

/// ChatML templates write a default system message as one literal: '<|im_start|>system\nYou are ...<|im_end|>\n'. A
/// template that passes the user's own has a quote right behind the newline instead.
std::string find_default_system_prompt(std::string_view jinja) {
  const std::string opening = std::string(kChatMlStart) + "system";
  for (std::size_t at = jinja.find(opening); at != std::string_view::npos; at = jinja.find(opening, at + 1)) {
    std::string_view rest = jinja.substr(at + opening.size());
    const std::size_t newline = rest.starts_with("\\n") ? 2 : rest.starts_with("\n") ? 1 : 0;
    if (newline == 0) continue;
    rest.remove_prefix(newline);
    const std::string_view literal = rest.substr(0, rest.find(kChatMlEnd));
    const bool closed = literal.size() < rest.size();
    const bool joined = literal.find("' +") != std::string_view::npos ||
                        literal.find("\" +") != std::string_view::npos ||
                        literal.find("{{") != std::string_view::npos || literal.find("}}") != std::string_view::npos;
    if (closed && !joined && !literal.empty()) return unescape(literal);
  }
  return "";
}

std::string_view trim(std::string_view text) {
  constexpr char kSpace[] = " \t\n\r\f\v";
  const std::size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) + 1 - begin);
}

}  // namespace

ChatTemplate ChatTemplate::detect(const Tokenizer& tokenizer, const TokenizerSettings& settings) {
  const std::string& jinja = settings.chat_template;
  // Without a template's text the special tokens alone decide.
  const auto uses = [&](const char* marker) {
    return tokenizer.find_token(marker) && (jinja.empty() || jinja.find(marker) != std::string::npos);
  };
  ChatTemplate result;
  if (uses(kChatMlStart) && tokenizer.find_token(kChatMlEnd)) {
    result.layout_ = ChatLayout::kChatMl;
    result.default_system_prompt_ = find_default_system_prompt(jinja);
    result.end_of_message_ = *tokenizer.find_token(kChatMlEnd);
    return result;
  }
  if (uses(kLlamaHeaderStart) && uses(kLlamaHeaderEnd) && tokenizer.find_token(kLlamaEnd)) {
    result.layout_ = ChatLayout::kLlama3;
    if (tokenizer.find_token(kLlamaBegin)) result.beginning_ = kLlamaBegin;
    result.end_of_message_ = *tokenizer.find_token(kLlamaEnd);
    return result;
  }
  throw Error(jinja.empty()
                  ? "this model has no chat template; give the prompt as plain text (--no-chat)"
                  : "this model's chat template is neither ChatML nor Llama 3's; give the prompt as plain text "
                    "with its markup (--no-chat)");
}

std::string ChatTemplate::render_chat(std::span<const ChatMessage> messages, bool add_generation_prompt) const {
  const bool chatml = layout_ == ChatLayout::kChatMl;
  std::string out = beginning_;
  const auto open = [&](std::string_view role) {
    if (chatml) {
      out.append(kChatMlStart).append(role).append("\n");
    } else {
      out.append(kLlamaHeaderStart).append(role).append(kLlamaHeaderEnd).append("\n\n");
    }
  };
  const auto add = [&](std::string_view role, std::string_view content) {
    open(role);
    out.append(chatml ? content : trim(content)).append(chatml ? kChatMlEnd : kLlamaEnd);
    if (chatml) out.append("\n");
  };
  if (!default_system_prompt_.empty() && !messages.empty() && messages.front().role != "system") {
    add("system", default_system_prompt_);
  }
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role != "user" && role != "assistant" && !(role == "system" && i == 0)) {
      throw Error("chat: message " + std::to_string(i) + " has role " + quote(role) +
                  "; user, assistant and, first, system are known");
    }
    add(role, messages[i].content);
  }
  if (add_generation_prompt) open("assistant");
  return out;
}

std::vector<std::int32_t> ChatTemplate::encode_chat(const Tokenizer& tokenizer, std::span<const ChatMessage> messages,
                                                    bool add_generation_prompt) const {
  return tokenizer.encode(render_chat(messages, add_generation_prompt), {.add_special_tokens = false});
}

}  // namespace msa::files
