// SPDX-License-Identifier: Apache-2.0
// See passkey.h.
#include "src/model/passkey.h"

#include <c10/core/GradMode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <numeric>

#include "msa/error.h"
#include "src/model/stopwatch.h"
#include "src/model/train_random.h"

namespace msa::model {
namespace {

constexpr const char* kIntro =
    "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
    "about it.\n\n";

constexpr std::int64_t kAnswerTokens = 8;
// Of a chain: five names of five letters with a comma each, in bytes at worst.
constexpr std::int64_t kChainNames = 5;
constexpr std::int64_t kNameLetters = 5;
constexpr std::int64_t kChainAnswerTokens = 40;
constexpr std::uint64_t kKeyStream = 0x9a55, kChainStream = 0xc4a1;

std::string make_key(std::uint64_t seed, std::uint64_t index) {
  return std::to_string(10000 + Random(seed, kKeyStream, index).below(90000));
}

void append(Tokens& to, const Tokens& from, std::int64_t begin, std::int64_t end) {
  to.insert(to.end(), from.begin() + begin, from.begin() + end);
}

// Where the keys of every length stand, as tokens of filler before them. A place that a longer length has is taken over
// when it is as near to an even depth as half a step: then the two trials share everything up to the shorter one's end.
std::map<std::int64_t, std::vector<std::int64_t>> choose_places(const std::map<std::int64_t, std::int64_t>& rooms,
                                                                std::int64_t trials) {
  std::map<std::int64_t, std::vector<std::int64_t>> places;
  std::vector<std::int64_t> known;
  for (auto it = rooms.rbegin(); it != rooms.rend(); ++it) {  // longest first
    const auto& [length, room] = *it;
    std::vector<std::int64_t>& chosen = places[length];
    const double step = static_cast<double>(room) / static_cast<double>(trials);
    for (std::int64_t i = 0; i < trials; ++i) {
      const double wanted = (static_cast<double>(i) + 0.5) * step;
      std::int64_t place = std::llround(wanted);
      double nearest = step * 0.5 + 1;
      for (const std::int64_t candidate : known) {
        const double distance = std::abs(static_cast<double>(candidate) - wanted);
        if (distance < nearest && candidate <= room &&
            std::find(chosen.begin(), chosen.end(), candidate) == chosen.end()) {
          nearest = distance;
          place = candidate;
        }
      }
      chosen.push_back(place);
    }
    known.insert(known.end(), chosen.begin(), chosen.end());
  }
  return places;
}

std::vector<Trial> make_passkey_trials(const TextTools& tools, const Tokens& filler,
                                       const std::vector<std::int64_t>& lengths, std::int64_t trials,
                                       std::uint64_t seed) {
  const ChatFrame frame = frame_chat(tools, kIntro,
                                     {{"user",
                                       "\n\nEnd of the document.\n\nWhat is the pass key that I told you to remember? "
                                       "Answer with the five digits only."}},
                                     true, "The pass key is");
  const auto needle = [&](const std::string& key) {
    return tools.encode("\nThe pass key is " + key + ". Remember it. " + key + " is the pass key.\n");
  };
  // All keys are of equal length in most tokenizers; the room is that of the longest seen.
  const auto fixed = static_cast<std::int64_t>(frame.head.size() + frame.tail.size()) + kAnswerTokens;
  std::map<std::int64_t, std::int64_t> rooms;
  for (const std::int64_t length : lengths) {
    rooms[length] = length - fixed - static_cast<std::int64_t>(needle("73519").size());
    if (rooms[length] < length / 4) {
      throw Error("passkey: a document of " + std::to_string(length) + " tokens leaves no room for text");
    }
  }
  std::vector<Trial> result;
  for (const auto& [length, places] : choose_places(rooms, trials)) {
    for (const std::int64_t place : places) {
      Trial trial;
      trial.length = length;
      trial.key = make_key(seed, static_cast<std::uint64_t>(place));
      trial.answers = {trial.key};
      const Tokens line = needle(trial.key);
      const std::int64_t room = length - fixed - static_cast<std::int64_t>(line.size());
      trial.depth = static_cast<double>(place) / static_cast<double>(room);
      trial.prompt = frame.head;
      append(trial.prompt, filler, 0, std::min(place, room));
      append(trial.prompt, line, 0, static_cast<std::int64_t>(line.size()));
      append(trial.prompt, filler, std::min(place, room), room);
      append(trial.prompt, frame.tail, 0, static_cast<std::int64_t>(frame.tail.size()));
      result.push_back(std::move(trial));
    }
  }
  return result;
}

// Four named keys a document at fixed depths; trial i asks document i / 4 for its key i % 4.
std::vector<Trial> make_multikey_trials(const TextTools& tools, const Tokens& filler,
                                        const std::vector<std::int64_t>& lengths, std::int64_t trials,
                                        std::uint64_t seed) {
  constexpr std::array<const char*, 4> kOwners = {"Anna", "Boris", "Clara", "David"};
  std::vector<Trial> result;
  for (const std::int64_t length : lengths) {
    for (std::int64_t i = 0; i < trials; ++i) {
      const std::int64_t document = i / 4;
      const auto asked = static_cast<std::size_t>(i % 4);
      const std::string owner = kOwners[asked];
      const ChatFrame frame =
          frame_chat(tools, kIntro,
                     {{"user", "\n\nEnd of the document.\n\nWhat is the pass key of " + owner +
                                   " that I told you to remember? Answer with the five digits only."}},
                     true, "The pass key of " + owner + " is");
      std::vector<Tokens> lines;
      std::int64_t used = static_cast<std::int64_t>(frame.head.size() + frame.tail.size()) + kAnswerTokens;
      Trial trial;
      trial.length = length;
      for (std::size_t j = 0; j < kOwners.size(); ++j) {
        const std::string key = make_key(seed + 1, static_cast<std::uint64_t>(document * 4) + j);
        if (j == asked) trial.key = key, trial.answers = {key};
        const std::string name = kOwners[j];
        lines.push_back(tools.encode("\nThe pass key of " + name + " is " + key + ". Remember it. " + key +
                                     " is the pass key of " + name + ".\n"));
        used += static_cast<std::int64_t>(lines.back().size());
      }
      const std::int64_t room = length - used;
      if (room < length / 4)
        throw Error("multikey: a document of " + std::to_string(length) + " tokens leaves no room for text");
      trial.prompt = frame.head;
      const std::int64_t shift =
          document * 97 % std::max<std::int64_t>(1, room / 8);  // documents differ in their places
      std::int64_t last = 0;
      for (std::size_t j = 0; j < lines.size(); ++j) {
        const std::int64_t place = (2 * static_cast<std::int64_t>(j) + 1) * room / 8 - shift;
        append(trial.prompt, filler, last, place);
        append(trial.prompt, lines[j], 0, static_cast<std::int64_t>(lines[j].size()));
        last = place;
        if (j == asked) trial.depth = static_cast<double>(place) / static_cast<double>(room);
      }
      append(trial.prompt, filler, last, room);
      append(trial.prompt, frame.tail, 0, static_cast<std::int64_t>(frame.tail.size()));
      result.push_back(std::move(trial));
    }
  }
  return result;
}

// One chain a document, its links in order, each at a random place of its fifth of the text.
std::vector<Trial> make_variable_trials(const TextTools& tools, const Tokens& filler,
                                        const std::vector<std::int64_t>& lengths, std::int64_t trials,
                                        std::uint64_t seed) {
  std::vector<Trial> result;
  for (const std::int64_t length : lengths) {
    for (std::int64_t i = 0; i < trials; ++i) {
      Random random(seed, kChainStream, static_cast<std::uint64_t>(i));  // a trial's chain is the same at every length
      Trial trial;
      trial.length = length;
      trial.key = std::to_string(10000 + random.below(90000));
      while (static_cast<std::int64_t>(trial.answers.size()) < kChainNames) {
        std::string name;
        for (std::int64_t letter = 0; letter < kNameLetters; ++letter)
          name += static_cast<char>('A' + random.below(26));
        if (std::find(trial.answers.begin(), trial.answers.end(), name) == trial.answers.end()) {
          trial.answers.push_back(name);
        }
      }
      const ChatFrame frame =
          frame_chat(tools, "Memorize and track the chain of variable assignment hidden in the following text.\n\n",
                     {{"user", "\n\nQuestion: Find all variables that are assigned the value " + trial.key +
                                   " in the text above."}},
                     true,
                     "According to the chain of variable assignment in the text above, " + std::to_string(kChainNames) +
                         " variables are assigned the value " + trial.key + ", they are:");
      std::vector<Tokens> links;
      auto used = static_cast<std::int64_t>(frame.head.size() + frame.tail.size()) + kChainAnswerTokens;
      std::string value = trial.key;
      for (const std::string& name : trial.answers) {
        std::string link = "\nVAR " + name;
        link += " = " + value + "\n";
        links.push_back(tools.encode(link));
        used += static_cast<std::int64_t>(links.back().size());
        value = "VAR " + name;
      }
      const std::int64_t room = length - used;
      if (room < length / 4) {
        throw Error("variable-tracking: a document of " + std::to_string(length) + " tokens leaves no room for text");
      }
      trial.prompt = frame.head;
      std::int64_t last = 0;
      for (std::int64_t j = 0; j < kChainNames; ++j) {
        const std::int64_t begin = j * room / kChainNames, end = (j + 1) * room / kChainNames;
        const std::int64_t place =
            begin + static_cast<std::int64_t>(random.uniform() * static_cast<double>(end - begin));
        if (j == 0) trial.depth = static_cast<double>(place) / static_cast<double>(room);
        append(trial.prompt, filler, last, place);
        const Tokens& link = links[static_cast<std::size_t>(j)];
        append(trial.prompt, link, 0, static_cast<std::int64_t>(link.size()));
        last = place;
      }
      append(trial.prompt, filler, last, room);
      append(trial.prompt, frame.tail, 0, static_cast<std::int64_t>(frame.tail.size()));
      result.push_back(std::move(trial));
    }
  }
  return result;
}

std::int64_t shared_prefix(const Tokens& a, const Tokens& b) {
  const auto [end, other] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  (void)other;
  return end - a.begin();
}

}  // namespace

RetrievalTask parse_retrieval_task(const std::string& name) {
  if (name == "passkey") return RetrievalTask::kPasskey;
  if (name == "multikey") return RetrievalTask::kMultikey;
  if (name == "variable-tracking") return RetrievalTask::kVariableTracking;
  throw Error("task '" + name + "': not one of passkey, multikey, variable-tracking");
}

const char* retrieval_task_name(RetrievalTask task) {
  switch (task) {
    case RetrievalTask::kPasskey: return "passkey";
    case RetrievalTask::kMultikey: return "multikey";
    case RetrievalTask::kVariableTracking: return "variable-tracking";
  }
  return "unknown";
}

std::int64_t answer_tokens(RetrievalTask task) {
  return task == RetrievalTask::kVariableTracking ? kChainAnswerTokens : kAnswerTokens;
}

std::vector<Trial> make_trials(RetrievalTask task, const TextTools& tools, const Tokens& filler,
                               std::vector<std::int64_t> lengths, std::int64_t trials, std::uint64_t seed) {
  std::sort(lengths.begin(), lengths.end());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  if (lengths.empty() || lengths.front() < 1 || trials < 1) throw Error("retrieval task: needs lengths and trials");
  if (static_cast<std::int64_t>(filler.size()) < lengths.back()) {
    throw Error("retrieval task: " + std::to_string(filler.size()) + " tokens of filler for documents of " +
                std::to_string(lengths.back()));
  }
  const auto make = task == RetrievalTask::kPasskey    ? make_passkey_trials
                    : task == RetrievalTask::kMultikey ? make_multikey_trials
                                                       : make_variable_trials;
  return make(tools, filler, lengths, trials, seed);
}

TrialRun run_trials(const Decoder& decoder, const std::vector<Trial>& trials, const TrialOptions& options) {
  const at::NoGradGuard no_grad;
  TrialRun run;
  run.results.resize(trials.size());
  if (trials.empty()) return run;
  std::vector<std::size_t> order(trials.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return trials[a].prompt < trials[b].prompt; });
  std::int64_t longest = 0;
  for (const Trial& trial : trials) longest = std::max(longest, static_cast<std::int64_t>(trial.prompt.size()));
  const files::ModelConfig& config = decoder.config();
  const std::int64_t page = config.index_block_size > 0 ? config.index_block_size : 128;
  cache::PagedCache cache(decoder.cache_shape(page, options.attention.mode == AttentionMode::kSparse),
                          cache::PagedCache::pages_for(longest + options.max_answer + 1, page));
  const cache::SequenceId sequence = cache.create_sequence();
  ForwardOptions forward;
  forward.attention = options.attention;
  const Tokens* previous = nullptr;
  for (const std::size_t id : order) {
    const Trial& trial = trials[id];
    const auto length = static_cast<std::int64_t>(trial.prompt.size());
    // the last prompt token is always run: its hidden state is what the answer starts from
    const std::int64_t kept = previous == nullptr ? 0 : std::min(shared_prefix(*previous, trial.prompt), length - 1);
    cache.crop(sequence, kept);
    const at::Tensor prompt = at::tensor(trial.prompt, at::kLong);
    const Stopwatch prefill;
    at::Tensor last_hidden;
    for (std::int64_t begin = kept; begin < length; begin += options.chunk) {
      const std::int64_t rows = std::min(options.chunk, length - begin);
      const at::Tensor hidden = decoder.forward_cached(prompt.narrow(0, begin, rows), cache, sequence, forward).hidden;
      last_hidden = hidden.narrow(0, rows - 1, 1);
    }
    run.prefill_seconds += prefill.seconds();
    run.prompt_tokens += length;
    run.computed_tokens += length - kept;
    const Stopwatch decode;
    Tokens answer;
    while (static_cast<std::int64_t>(answer.size()) < options.max_answer) {
      const std::int64_t token = decoder.logits(last_hidden).argmax(-1).item<std::int64_t>();
      if (std::find(options.stop_tokens.begin(), options.stop_tokens.end(), token) != options.stop_tokens.end()) break;
      answer.push_back(token);
      if (static_cast<std::int64_t>(answer.size()) == options.max_answer) break;
      const ForwardResult pass = decoder.forward_cached(at::tensor({token}, at::kLong), cache, sequence, forward);
      last_hidden = pass.hidden;
      ++run.decode_passes;
      run.decode_attention_seconds += pass.seconds.selection + pass.seconds.attention;
    }
    run.decode_seconds += decode.seconds();
    run.generated_tokens += static_cast<std::int64_t>(answer.size());
    TrialResult& result = run.results[id];
    result.answer = options.decode(answer);
    const auto found = std::count_if(trial.answers.begin(), trial.answers.end(), [&](const std::string& wanted) {
      return result.answer.find(wanted) != std::string::npos;
    });
    result.hit = found == std::ssize(trial.answers);
    result.found = static_cast<double>(found) / static_cast<double>(trial.answers.size());
    TrialRun::Tally& tally = run.tally[trial.length];
    tally.hits += result.hit ? 1 : 0;
    ++tally.trials;
    tally.found += result.found;
    if (options.on_result) options.on_result(trial, result);
    previous = &trial.prompt;
  }
  return run;
}

}  // namespace msa::model
