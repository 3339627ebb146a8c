// SPDX-License-Identifier: Apache-2.0
// `msa generate`: streams a continuation of a prompt, or the answer of a chat model. Text goes to stdout as it comes,
// figures and the progress of a long prompt to stderr; with --json both go to stdout as one object at the end. Ctrl-C
// ends the text, prints what there is and exits with 130. Tested in tests/python/test_generate.py and
// tests/integration/test_main_job.py.
#include <chrono>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "apps/msa/commands.h"
#include "apps/msa/interrupt.h"
#include "apps/msa/model_options.h"
#include "msa/error.h"
#include "src/model/files/chat_template.h"
#include "src/model/files/file_io.h"
#include "src/model/files/tokenizer.h"
#include "src/model/generate.h"

namespace msa::app {
namespace {

struct GenerateFlags {
  ModelOptions model;
  AttentionFlags attention;
  std::string prompt, prompt_file, system;
  bool chat = false, no_chat = false;  // neither: as the model was made
  std::int64_t max_tokens = 256;
  std::int64_t chunk = 512;
  double temperature = 0.0;
  double top_p = 1.0;
  std::uint64_t seed = 0;
  bool json = false;
};

constexpr std::size_t kMaxPromptBytes = std::size_t{1} << 26;

// A prompt that takes longer than this is told of, as often.
constexpr std::chrono::seconds kProgressEvery(1);

struct Prompt {
  std::vector<std::int32_t> tokens;
  std::vector<std::int64_t> stop_tokens;
};

Prompt encode_prompt(const GenerateFlags& flags, const files::Tokenizer& tokenizer, const files::ModelConfig& config) {
  const std::string text =
      flags.prompt_file.empty() ? flags.prompt : files::read_text_file(flags.prompt_file, kMaxPromptBytes);
  Prompt prompt;
  prompt.stop_tokens = files::stop_token_ids(config, files::load_generation_config(flags.model.directory));
  const files::TokenizerSettings settings = files::load_tokenizer_settings(flags.model.directory);
  const bool is_chat = flags.chat || (!flags.no_chat && !settings.chat_template.empty());
  if (!is_chat) {
    prompt.tokens = tokenizer.encode(text);
    return prompt;
  }
  const files::ChatTemplate chat = files::ChatTemplate::detect(tokenizer, settings);
  std::vector<files::ChatMessage> messages;
  if (!flags.system.empty()) messages.push_back({"system", flags.system});
  messages.push_back({"user", text});
  prompt.tokens = chat.encode_chat(tokenizer, messages, /*add_generation_prompt=*/true);
  prompt.stop_tokens.push_back(chat.end_of_message());
  return prompt;
}

nlohmann::ordered_json describe(const model::GenerateStats& stats, const std::string& attention) {
  return {{"attention", attention},
          {"prompt_tokens", stats.prompt_tokens},
          {"generated_tokens", stats.generated_tokens},
          {"stop", model::stop_reason_name(stats.stop)},
          {"prefill_seconds", stats.prefill.total},
          {"prefill_selection_seconds", stats.prefill.selection},
          {"prefill_attention_seconds", stats.prefill.attention},
          {"prefill_tokens_per_second", stats.prefill_tokens_per_second()},
          {"decode_seconds", stats.decode.total},
          {"decode_selection_seconds", stats.decode.selection},
          {"decode_attention_seconds", stats.decode.attention},
          {"decode_tokens_per_second", stats.decode_tokens_per_second()}};
}

void print_stats(const model::GenerateStats& stats, const std::string& attention) {
  const auto line = [](const char* name, std::int64_t tokens, double rate, const model::ForwardSeconds& seconds) {
    std::fprintf(stderr, "%s: %lld tokens, %.1f tokens/s, %.2f s (selection %.2f s, attention %.2f s)\n", name,
                 static_cast<long long>(tokens), rate, seconds.total, seconds.selection, seconds.attention);
  };
  line("prefill", stats.prefill_tokens, stats.prefill_tokens_per_second(), stats.prefill);
  line("decode ", stats.decode_steps, stats.decode_tokens_per_second(), stats.decode);
  std::fprintf(stderr, "%s attention; stopped by %s\n", attention.c_str(), model::stop_reason_name(stats.stop));
}

void run_generate(const GenerateFlags& flags) {
  const files::Tokenizer tokenizer = files::Tokenizer::load(flags.model.directory);
  const model::Decoder decoder = flags.model.load();
  const Prompt prompt = encode_prompt(flags, tokenizer, decoder.config());

  model::GenerateOptions options;
  options.attention = flags.attention.resolve();
  options.sampling = {flags.temperature, flags.top_p, flags.seed};
  options.max_tokens = flags.max_tokens;
  options.chunk = flags.chunk;
  options.stop_tokens = prompt.stop_tokens;

  model::Session session(decoder, static_cast<std::int64_t>(prompt.tokens.size()) + flags.max_tokens);
  files::StreamingDecoder stream(tokenizer);
  std::string text;
  const auto emit = [&](const std::string& piece) {
    if (flags.json) {
      text += piece;
    } else {
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
    }
  };
  auto told = std::chrono::steady_clock::now();
  options.on_prefill = [&](std::int64_t tokens) {
    const auto now = std::chrono::steady_clock::now();
    if (now - told < kProgressEvery) return;
    told = now;
    std::fprintf(stderr, "generate: %lld of %zu prompt tokens\n", static_cast<long long>(tokens), prompt.tokens.size());
  };
  options.should_stop = InterruptGuard::requested;
  const InterruptGuard guard;
  const model::Generation generation = session.generate(prompt.tokens, options, [&](std::int32_t token) {
    emit(stream.push(token));
    return true;
  });
  emit(stream.finish());
  if (flags.json) {
    nlohmann::ordered_json report = describe(generation.stats, flags.attention.mode);
    report["text"] = text;
    report["tokens"] = generation.tokens;
    std::printf("%s\n", report.dump(2).c_str());
  } else {
    std::printf("\n");
    std::fflush(stdout);
    print_stats(generation.stats, flags.attention.mode);
  }
  if (generation.stats.stop == model::StopReason::kInterrupted) throw CLI::RuntimeError(kInterruptedStatus);
}

}  // namespace

void add_generate_command(CLI::App& app) {
  CLI::App* const command = app.add_subcommand("generate", "Continue a prompt, or answer it");
  const auto flags = std::make_shared<GenerateFlags>();
  flags->model.add_to(*command);
  CLI::Option_group* const source = command->add_option_group("Prompt");
  source->add_option("--prompt", flags->prompt, "The prompt");
  source->add_option("--prompt-file", flags->prompt_file, "File that holds the prompt")->check(CLI::ExistingFile);
  source->require_option(1);
  flags->attention.add_to(*command);
  CLI::Option* const chat = command->add_flag(
      "--chat", flags->chat, "Put the prompt into the model's chat template; the default where the model has one");
  command->add_flag("--no-chat", flags->no_chat, "Take the prompt as it is")->excludes(chat);
  command->add_option("--system", flags->system, "System message of the chat, in place of the model's own");
  command->add_option("--max-tokens", flags->max_tokens, "New tokens at most")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 30))
      ->capture_default_str();
  command->add_option("--temperature", flags->temperature, "0: always the likeliest token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  command->add_option("--top-p", flags->top_p, "Sample from the fewest tokens whose probabilities reach this sum")
      ->check(CLI::Range(1e-6, 1.0))
      ->capture_default_str();
  command->add_option("--seed", flags->seed, "Of the sampling")->capture_default_str();
  command->add_option("--chunk", flags->chunk, "Prompt tokens a pass")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 20))
      ->capture_default_str();
  command->add_flag("--json", flags->json, "Print text, token ids and figures as JSON at the end");
  command->callback([flags] { run_generate(*flags); });
}

}  // namespace msa::app
