// SPDX-License-Identifier: Apache-2.0
// Retrieval tasks in the style of RULER: a five-digit pass key hidden at some depth of a long document (passkey), or several
// named ones of which one is asked for (multikey). The documents of one length share their text before the key, and the
// shorter documents are beginnings of the longer ones, so that most of what a trial reads is in the cache already: trials
// are run in the order of their tokens, and between two of them the cache is cropped to what they share. Tested in
// tests/unit/model_train.cc.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "src/model/corpus.h"
#include "src/model/decoder.h"
#include "src/model/retrieval.h"

namespace msa::model {

enum class RetrievalTask { kPasskey, kMultikey };
/// "passkey" or "multikey"; throws msa::Error on anything else, naming the choices.
RetrievalTask parse_retrieval_task(const std::string& name);
const char* retrieval_task_name(RetrievalTask task);

struct Trial {
  std::int64_t length = 0;  ///< tokens of the prompt and room for the answer
  double depth = 0;         ///< where the key stands, 0: at the beginning, 1: at the end
  std::string key;
  Tokens prompt;
};

/// `trials` trials of each length, keys at even depths. `filler`: tokens of ordinary text, at least the largest length.
/// Throws msa::Error when a length leaves no room for the question.
std::vector<Trial> make_trials(RetrievalTask task, const TextTools& tools, const Tokens& filler,
                               std::vector<std::int64_t> lengths, std::int64_t trials, std::uint64_t seed);

struct TrialResult {
  std::string answer;
  bool hit = false;  ///< the key occurs in the answer
};

struct TrialRun {
  std::vector<TrialResult> results;       ///< parallel to the trials
  std::int64_t prompt_tokens = 0;         ///< of all prompts
  std::int64_t computed_tokens = 0;       ///< of them run through the model; the others were in the cache
  std::int64_t generated_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;
  /// hits and trials by length
  std::map<std::int64_t, std::pair<std::int64_t, std::int64_t>> tally;
};

struct TrialOptions {
  AttentionOptions attention;
  std::int64_t chunk = 1024;     ///< prompt tokens a forward
  std::int64_t max_answer = 8;   ///< tokens generated, greedily
  std::vector<std::int64_t> stop_tokens;
  std::function<std::string(const Tokens&)> decode;
  std::function<void(const Trial&, const TrialResult&)> on_result;  ///< optional
};

TrialRun run_trials(const Decoder& decoder, const std::vector<Trial>& trials, const TrialOptions& options);

/// Room left for the answer at the end of a trial's length.
inline constexpr std::int64_t kAnswerTokens = 8;

}  // namespace msa::model
