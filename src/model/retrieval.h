// SPDX-License-Identifier: Apache-2.0
// Synthetic documents that must be answered from far back: lines of keys and values hidden in ordinary text, then
// questions and their answers. Ordinary text teaches the index little about the few heads that retrieve (their
// group-mean attention is diluted), these documents do. Their templates share no wording with the evaluation's
// (src/model/passkey.h). Tested in tests/unit/model_train.cc.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "src/model/corpus.h"
#include "src/model/files/chat_template.h"
#include "src/model/files/tokenizer.h"
#include "src/model/train_random.h"

namespace msa::model {

using files::ChatMessage;

/// What a document is made with, so that this code knows no tokenizer.
struct TextTools {
  Encode encode;          ///< ordinary text
  Encode encode_special;  ///< text whose special tokens count as such
  /// Renders a conversation; the flag asks for the opening of the assistant's turn at the end.
  std::function<std::string(const std::vector<ChatMessage>&, bool)> render_chat;
};

/// Of a checkpoint directory's tokenizer. Without a chat template that is understood, a conversation is plain
/// paragraphs.
TextTools make_text_tools(const files::Tokenizer& tokenizer, const std::string& directory);
/// Bytes as tokens, for models made from scratch without a tokenizer.
TextTools make_byte_tools();

/// A rendered conversation whose first user message begins with a long text: what comes before the text and after it.
struct ChatFrame {
  Tokens head, tail;
};
/// The first message must be the user's; `messages[0].content` is what follows the long text in that turn, `intro` what
/// comes before it. `answer_start` is appended after an opened assistant turn (empty: the conversation is complete).
ChatFrame frame_chat(const TextTools& tools, const std::string& intro, std::vector<ChatMessage> messages,
                     bool open_answer, const std::string& answer_start);

struct RetrievalDocument {
  Tokens tokens;                ///< exactly the length asked for
  std::int64_t tail_begin = 0;  ///< first row of the questions and answers
};

/// `filler`: tokens of ordinary text, at least `length`. Throws msa::Error when `length` leaves no room for one line
/// and its question.
RetrievalDocument make_retrieval_document(const TextTools& tools, const Tokens& filler, std::int64_t length,
                                          Random& random);

}  // namespace msa::model
