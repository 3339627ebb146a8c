// SPDX-License-Identifier: Apache-2.0
// Text generation on the paged cache: the prompt goes through the decoder in chunks (sparse prefill), then one token at
// a time (sparse decode). A session keeps its cache, so that a prompt that begins like the last conversation runs only
// what is new. Tested in tests/unit/model_generate.cc and tests/integration.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/cache/paged_cache.h"
#include "src/model/decoder.h"
#include "src/model/train_random.h"

namespace msa::model {

struct SamplingOptions {
  double temperature = 0.0;  ///< 0: greedy, the lowest id among equals; else logits are divided by it
  double top_p = 1.0;        ///< sample from the fewest tokens whose probabilities reach this sum
  std::uint64_t seed = 0;
};

/// Draws tokens from logits; the same on every machine for the same seed and logits. Throws msa::Error on options out
/// of range (temperature < 0 or not finite; top_p outside (0, 1]).
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);
  /// Throws msa::Error when a logit is NaN or +inf, or all are -inf. O(vocab), O(vocab log vocab) with top_p < 1.
  std::int32_t sample(std::span<const float> logits);

 private:
  SamplingOptions options_;
  Random random_;
};

struct GenerateOptions {
  AttentionOptions attention;
  SamplingOptions sampling;
  std::int64_t max_tokens = 256;          ///< new tokens at most; fewer when the context is full
  std::int64_t chunk = 512;               ///< prompt tokens a pass; bounds the memory of a prefill
  std::vector<std::int64_t> stop_tokens;  ///< end the text; not part of it
  /// Asked before every pass, in the prompt too: true ends the generation with what there is. Optional.
  std::function<bool()> should_stop;
  std::function<void(std::int64_t)> on_prefill;  ///< optional: prompt tokens in the cache, after each chunk
};

enum class StopReason {
  kStopToken,
  kMaxTokens,
  kContextFull,
  kCallback,     ///< the token callback returned false
  kInterrupted,  ///< should_stop returned true
};
/// "stop_token", "max_tokens", "context_full", "callback", "interrupt".
const char* stop_reason_name(StopReason reason);

struct GenerateStats {
  std::int64_t prompt_tokens = 0;
  std::int64_t reused_tokens = 0;     ///< of the prompt, found in the cache
  std::int64_t prefill_tokens = 0;    ///< of the prompt, run: all others unless interrupted
  std::int64_t generated_tokens = 0;  ///< a stop token counts
  ForwardSeconds prefill, decode;     ///< total: with the output head and sampling
  std::int64_t decode_steps = 0;      ///< forwards after the prefill; the first token needs none
  StopReason stop = StopReason::kMaxTokens;

  double prefill_tokens_per_second() const;  ///< 0 when nothing ran
  double decode_tokens_per_second() const;
};

struct Generation {
  std::vector<std::int32_t> tokens;  ///< new ones, without the stop token
  GenerateStats stats;
};

/// Called with each new token, stop tokens excepted; false ends the generation.
using TokenCallback = std::function<bool(std::int32_t token)>;

/// One conversation. Not thread safe. The decoder must outlive it.
class Session {
 public:
  /// Reserves a cache of `context` tokens (at most; the model's max_position_embeddings bounds it).
  Session(const Decoder& decoder, std::int64_t context);

  /// Continues `prompt`. Tokens that begin both the prompt and what this session ran last, with the same attention
  /// options, are not run again. Throws msa::Error when the prompt is empty or does not leave room for a token in the
  /// context, on a token outside the vocabulary, or on options out of range; the session stays usable.
  Generation generate(std::span<const std::int32_t> prompt, const GenerateOptions& options,
                      const TokenCallback& callback = {});

  std::int64_t context() const { return context_; }

 private:
  at::Tensor run(std::span<const std::int32_t> tokens, const ForwardOptions& options, ForwardSeconds* seconds);

  const Decoder* decoder_;
  std::int64_t context_;
  cache::PagedCache cache_;
  cache::SequenceId sequence_;
  std::vector<std::int32_t> history_;  // tokens in the cache
  AttentionOptions history_attention_;
};

}  // namespace msa::model
