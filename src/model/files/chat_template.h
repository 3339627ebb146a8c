// SPDX-License-Identifier: Apache-2.0
// Chat templates without a Jinja engine: the two layouts that nearly all chat models use, ChatML and Llama 3's headers,
// told apart by the tokenizer's special tokens, with the default system prompt taken from the template's text. Tools,
// dates and thinking blocks of richer templates are left out. Tested in tests/unit/files_chat_template_test.cc.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "src/model/files/tokenizer.h"

namespace msa::files {

struct ChatMessage {
  std::string role;  // "system" (first only), "user" or "assistant"
  std::string content;
};

enum class ChatLayout { kChatMl, kLlama3 };

class ChatTemplate {
 public:
  /// The layout that the tokenizer's special tokens and the template's text agree on. Throws msa::Error when it is
  /// neither of the two; the message says that a prompt can be given without a chat template (--no-chat).
  static ChatTemplate detect(const Tokenizer& tokenizer, const TokenizerSettings& settings);

  /// The conversation as text with its markup; with add_generation_prompt, up to where the assistant speaks. Encode it
  /// with add_special_tokens off: a beginning token, where the layout has one, is in the text. Content is put in as it
  /// is: markup inside it acts as markup, as in the transformers package. Throws msa::Error on an unknown role.
  std::string render_chat(std::span<const ChatMessage> messages, bool add_generation_prompt) const;
  /// render_chat, encoded.
  std::vector<std::int32_t> encode_chat(const Tokenizer& tokenizer, std::span<const ChatMessage> messages,
                                        bool add_generation_prompt) const;

  ChatLayout layout() const { return layout_; }
  /// What stands in for a missing system message; empty: nothing does.
  const std::string& default_system_prompt() const { return default_system_prompt_; }
  /// The token that ends a message, and so a generation.
  std::int32_t end_of_message() const { return end_of_message_; }

 private:
  ChatLayout layout_ = ChatLayout::kChatMl;
  std::string default_system_prompt_;
  std::string beginning_;  // Llama 3's <|begin_of_text|>
  std::int32_t end_of_message_ = -1;
};

}  // namespace msa::files
