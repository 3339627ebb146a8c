// SPDX-License-Identifier: Apache-2.0
// Retrieval tasks in the style of RULER: a five-digit pass key hidden at some depth of a long document (passkey),
// several named ones of which one is asked for (multikey), or a chain of assignments scattered over the document, VAR A
// = 12345, VAR B = VAR A and so on, whose names are asked for by the value (variable-tracking). The documents of one
// length share their text before the key, and the shorter documents are beginnings of the longer ones, so that most of
// what a trial reads is in the cache already: trials are run in the order of their tokens, and between two of them the
// cache is cropped to what they share. Tested in tests/unit/model_train.cc.
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

enum class RetrievalTask { kPasskey, kMultikey, kVariableTracking };
/// "passkey", "multikey" or "variable-tracking"; throws msa::Error on anything else, naming the choices.
RetrievalTask parse_retrieval_task(const std::string& name);
const char* retrieval_task_name(RetrievalTask task);
/// Room for the answer at the end of a trial's length, and tokens that are generated.
std::int64_t answer_tokens(RetrievalTask task);

struct Trial {
  std::int64_t length = 0;  ///< tokens of the prompt and room for the answer
  double depth = 0;         ///< where the key (the chain's first link) stands, 0: at the beginning, 1: at the end
  std::string key;          ///< what is hidden; the value that a chain of variables has
  std::vector<std::string> answers;  ///< what must occur in the answer: the key, or every name of the chain
  Tokens prompt;
};

/// `trials` trials of each length, keys at even depths. `filler`: tokens of ordinary text, at least the largest length.
/// Throws msa::Error when a length leaves no room for the question.
std::vector<Trial> make_trials(RetrievalTask task, const TextTools& tools, const Tokens& filler,
                               std::vector<std::int64_t> lengths, std::int64_t trials, std::uint64_t seed);

struct TrialResult {
  std::string answer;
  bool hit = false;  ///< all answers occur in it
  double found = 0;  ///< the share of them that do
};

struct TrialRun {
  std::vector<TrialResult> results;  ///< parallel to the trials
  std::int64_t prompt_tokens = 0;    ///< of all prompts
  std::int64_t computed_tokens = 0;  ///< of them run through the model; the others were in the cache
  std::int64_t generated_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;
  std::int64_t decode_passes = 0;       ///< forward passes of one token
  double decode_attention_seconds = 0;  ///< selection and attention in them
  struct Tally {
    std::int64_t hits = 0, trials = 0;
    double found = 0;  ///< sum of the shares found
  };
  std::map<std::int64_t, Tally> tally;  ///< by length
};

struct TrialOptions {
  AttentionOptions attention;
  std::int64_t chunk = 1024;    ///< prompt tokens a forward
  std::int64_t max_answer = 8;  ///< tokens generated, greedily: see answer_tokens
  std::vector<std::int64_t> stop_tokens;
  std::function<std::string(const Tokens&)> decode;
  std::function<void(const Trial&, const TrialResult&)> on_result;  ///< optional
};

TrialRun run_trials(const Decoder& decoder, const std::vector<Trial>& trials, const TrialOptions& options);
}  // namespace msa::model
