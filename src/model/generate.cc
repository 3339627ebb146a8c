// SPDX-License-Identifier: Apache-2.0
// Sampling, and the loop around the decoder. Tested in tests/unit/model_generate.cc.
#include "src/model/generate.h"

#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "msa/error.h"
#include "src/model/stopwatch.h"

namespace msa::model {
namespace {

// The page is the block, which every operator takes; a model without blocks gets the size that most have.
std::int64_t cache_page(const files::ModelConfig& config) {
  return config.index_block_size > 0 ? config.index_block_size : 128;
}

std::int64_t bounded_context(const Decoder& decoder, std::int64_t context) {
  if (context < 1) throw Error("session: context is " + std::to_string(context) + " tokens; it must be at least 1");
  return std::min(context, decoder.config().max_position_embeddings);
}

cache::PagedCache make_cache(const Decoder& decoder, std::int64_t context) {
  const std::int64_t page = cache_page(decoder.config());
  return {decoder.cache_shape(page), cache::PagedCache::pages_for(context, page)};
}

bool same_attention(const AttentionOptions& a, const AttentionOptions& b) {
  return a.mode == b.mode && a.topk == b.topk && a.layer_topk == b.layer_topk;
}

double rate(std::int64_t tokens, double seconds) {
  return tokens > 0 && seconds > 0 ? static_cast<double>(tokens) / seconds : 0;
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options) : options_(options), random_(options.seed) {
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature)) {
    throw Error("sampling: temperature is " + std::to_string(options.temperature) + "; it must be 0 or more");
  }
  if (!(options.top_p > 0) || options.top_p > 1) {
    throw Error("sampling: top_p is " + std::to_string(options.top_p) + "; it must be above 0 and at most 1");
  }
}

std::int32_t Sampler::sample(std::span<const float> logits) {
  const auto broken = [](float logit) { return std::isnan(logit) || logit == std::numeric_limits<float>::infinity(); };
  const auto best = std::max_element(logits.begin(), logits.end());  // the first of equals
  if (best == logits.end() || std::any_of(logits.begin(), logits.end(), broken) || std::isinf(*best)) {
    throw Error("sampling: the model's logits are not finite");
  }
  if (options_.temperature == 0) return static_cast<std::int32_t>(best - logits.begin());

  std::vector<double> weights(logits.size());
  std::transform(logits.begin(), logits.end(), weights.begin(), [&](float logit) {
    return std::exp((static_cast<double>(logit) - static_cast<double>(*best)) / options_.temperature);
  });
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<std::int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  double kept = total;
  if (options_.top_p < 1) {
    // Likeliest first; equal ones by id, so that the order depends on nothing else.
    std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      const double wa = weights[static_cast<std::size_t>(a)], wb = weights[static_cast<std::size_t>(b)];
      return wa != wb ? wa > wb : a < b;
    });
    kept = 0;
    std::size_t count = 0;
    while (count < order.size() && (count == 0 || kept < options_.top_p * total)) {
      kept += weights[static_cast<std::size_t>(order[count++])];
    }
    order.resize(count);
  }
  double left = random_.uniform() * kept;
  std::int32_t drawn = static_cast<std::int32_t>(best - logits.begin());  // rounding may leave nothing below
  for (const std::int32_t token : order) {
    const double weight = weights[static_cast<std::size_t>(token)];
    if (weight == 0) continue;
    drawn = token;
    if (left < weight) break;
    left -= weight;
  }
  return drawn;
}

const char* stop_reason_name(StopReason reason) {
  switch (reason) {
    case StopReason::kStopToken: return "stop_token";
    case StopReason::kMaxTokens: return "max_tokens";
    case StopReason::kContextFull: return "context_full";
    case StopReason::kCallback: return "callback";
    case StopReason::kInterrupted: return "interrupt";
  }
  return "unknown";
}

double GenerateStats::prefill_tokens_per_second() const { return rate(prefill_tokens, prefill.total); }
double GenerateStats::decode_tokens_per_second() const { return rate(decode_steps, decode.total); }

Session::Session(const Decoder& decoder, std::int64_t context)
    : decoder_(&decoder),
      context_(bounded_context(decoder, context)),
      cache_(make_cache(decoder, context_)),
      sequence_(cache_.create_sequence()) {}

// Runs tokens at the end of the cache; returns the logits after the last one.
at::Tensor Session::run(std::span<const std::int32_t> tokens, const ForwardOptions& options, ForwardSeconds* seconds) {
  at::Tensor ids = at::empty({static_cast<std::int64_t>(tokens.size())}, at::kLong);
  std::copy(tokens.begin(), tokens.end(), ids.mutable_data_ptr<std::int64_t>());
  const ForwardResult result = decoder_->forward_cached(ids, cache_, sequence_, options);
  history_.insert(history_.end(), tokens.begin(), tokens.end());
  seconds->selection += result.seconds.selection;
  seconds->attention += result.seconds.attention;
  return result.hidden.narrow(0, ids.numel() - 1, 1);
}

Generation Session::generate(std::span<const std::int32_t> prompt, const GenerateOptions& options,
                             const TokenCallback& callback) {
  const c10::NoGradGuard no_grad;
  const auto length = static_cast<std::int64_t>(prompt.size());
  if (length == 0) throw Error("generate: the prompt is empty");
  if (length >= context_) {
    throw Error("generate: the prompt has " + std::to_string(length) + " tokens; the context of " +
                std::to_string(context_) + " tokens must hold it and at least one more");
  }
  if (options.max_tokens < 1) {
    throw Error("generate: max_tokens is " + std::to_string(options.max_tokens) + "; it must be at least 1");
  }
  if (options.chunk < 1) throw Error("generate: chunk is " + std::to_string(options.chunk) + "; it must be at least 1");
  Sampler sampler(options.sampling);
  Generation generation;
  GenerateStats& stats = generation.stats;
  ForwardOptions forward;
  forward.attention = options.attention;

  // What another kind of attention left in the cache is not what this one would have.
  std::size_t reused = 0;
  if (same_attention(history_attention_, options.attention)) {
    const auto [in_prompt, in_history] = std::mismatch(prompt.begin(), prompt.end(), history_.begin(), history_.end());
    reused =
        std::min(static_cast<std::size_t>(in_prompt - prompt.begin()), prompt.size() - 1);  // the last one must run
  }
  cache_.crop(sequence_, static_cast<std::int64_t>(reused));
  history_.resize(reused);
  history_attention_ = options.attention;
  stats.prompt_tokens = length;
  stats.reused_tokens = static_cast<std::int64_t>(reused);

  const auto interrupted = [&] { return options.should_stop && options.should_stop(); };
  const Stopwatch prefill;
  at::Tensor hidden;
  for (std::size_t begin = reused; begin < prompt.size();) {
    if (interrupted()) {
      stats.stop = StopReason::kInterrupted;
      stats.prefill.total = prefill.seconds();
      return generation;
    }
    const std::size_t rows = std::min(static_cast<std::size_t>(options.chunk), prompt.size() - begin);
    hidden = run(prompt.subspan(begin, rows), forward, &stats.prefill);
    begin += rows;
    stats.prefill_tokens += static_cast<std::int64_t>(rows);
    if (options.on_prefill) options.on_prefill(static_cast<std::int64_t>(begin));
  }
  const auto next_token = [&] {
    const at::Tensor logits = decoder_->logits(hidden);
    return sampler.sample({logits.const_data_ptr<float>(), static_cast<std::size_t>(logits.numel())});
  };
  std::int32_t token = next_token();
  stats.prefill.total = prefill.seconds();

  const Stopwatch decode;
  while (true) {
    ++stats.generated_tokens;
    if (std::find(options.stop_tokens.begin(), options.stop_tokens.end(), token) != options.stop_tokens.end()) {
      stats.stop = StopReason::kStopToken;
      break;
    }
    generation.tokens.push_back(token);
    if (callback && !callback(token)) {
      stats.stop = StopReason::kCallback;
      break;
    }
    if (stats.generated_tokens == options.max_tokens) {
      stats.stop = StopReason::kMaxTokens;
      break;
    }
    if (static_cast<std::int64_t>(history_.size()) + 1 >= context_) {
      stats.stop = StopReason::kContextFull;
      break;
    }
    if (interrupted()) {
      stats.stop = StopReason::kInterrupted;
      break;
    }
    hidden = run({&token, 1}, forward, &stats.decode);
    ++stats.decode_steps;
    token = next_token();
  }
  stats.decode.total = decode.seconds();
  return generation;
}

}  // namespace msa::model
