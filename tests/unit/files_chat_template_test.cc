// SPDX-License-Identifier: Apache-2.0
// Chat layouts: detection, default system prompts out of template texts, and the markup itself.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "src/model/files/chat_template.h"
#include "tests/unit/files_support.h"

namespace msa::files {
namespace {

Tokenizer with_tokens(const std::vector<std::string>& tokens) {
  std::string added;
  int id = 10;
  for (const std::string& token : tokens) {
    if (!added.empty()) added += ',';
    added += R"({"id":)";
    added += std::to_string(id++);
    added += R"(,"content":")";
    added += token;
    added += R"(","special":true})";
  }
  return Tokenizer::parse(
      "{\"added_tokens\":[" + added + R"(],"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false},
    "model":{"type":"BPE","vocab":{"a":0},"merges":[]}})",
      "t");
}

const std::vector<std::string> kChatMlTokens = {"<|im_start|>", "<|im_end|>"};
const std::vector<std::string> kLlamaTokens = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                                               "<|eot_id|>"};

ChatTemplate chatml(const std::string& jinja) {
  return ChatTemplate::detect(with_tokens(kChatMlTokens), {.bos_token = "", .eos_token = "", .chat_template = jinja});
}

// The first lines of SmolLM2's and Qwen2's templates; the newline stands as itself or as an escape.
const std::string kSmol =
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}";
const std::string kQwen2 =
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}";
const std::string kQwen3 =
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- "
    "endif %}";

TEST(ChatTemplate, FindsDefaultSystemPrompts) {
  EXPECT_EQ(chatml(kSmol).default_system_prompt(),
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face");
  EXPECT_EQ(chatml(kQwen2).default_system_prompt(), "You are a helpful assistant.");
  EXPECT_EQ(chatml(kQwen3).default_system_prompt(), "");
  EXPECT_EQ(chatml("").default_system_prompt(), "");
}

TEST(ChatTemplate, RendersChatMl) {
  const std::vector<ChatMessage> user = {{"user", " hi\n"}};
  EXPECT_EQ(chatml(kQwen2).render_chat(user, true),
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n hi\n<|im_end|>\n"
            "<|im_start|>assistant\n");
  const std::vector<ChatMessage> full = {{"system", "s"}, {"user", "u"}, {"assistant", "a"}};
  EXPECT_EQ(chatml(kQwen2).render_chat(full, false),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n");
  EXPECT_EQ(chatml(kQwen3).render_chat(user, false), "<|im_start|>user\n hi\n<|im_end|>\n");
  EXPECT_EQ(chatml("").end_of_message(), 11);
}

TEST(ChatTemplate, RendersLlama3) {
  const Tokenizer tokenizer = with_tokens(kLlamaTokens);
  const ChatTemplate llama = ChatTemplate::detect(tokenizer, {});
  const std::vector<ChatMessage> messages = {{"system", "s"}, {"user", " u \n"}};
  EXPECT_EQ(llama.render_chat(messages, true),
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nu<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n");
  EXPECT_EQ(llama.end_of_message(), 13);
  const std::vector<ChatMessage> one = {{"user", "a"}};
  EXPECT_EQ(llama.encode_chat(tokenizer, one, false).front(), 10);
}

TEST(ChatTemplate, RefusesWhatItDoesNotKnow) {
  EXPECT_ERROR(ChatTemplate::detect(with_tokens({"<s>"}), {}), "no chat template");
  EXPECT_ERROR(chatml("{{ '[INST]' }}"), "--no-chat");
  const std::vector<ChatMessage> tool = {{"tool", "x"}};
  EXPECT_ERROR(chatml("").render_chat(tool, true), "role 'tool'");
  const std::vector<ChatMessage> late = {{"user", "x"}, {"system", "y"}};
  EXPECT_ERROR(chatml("").render_chat(late, true), "role 'system'");
}

}  // namespace
}  // namespace msa::files
