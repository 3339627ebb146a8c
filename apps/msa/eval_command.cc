// SPDX-License-Identifier: Apache-2.0
// `msa eval`: loss, perplexity, KL and recalls on held-out text, and retrieval tasks. With --json prints one object:
//   {"model", "context", "windows", "tokens",
//    "modes": {"sparse@1/8": {"loss", "perplexity", "loss_last1024", "perplexity_last1024", "window_losses": [],
//                             "seconds", "tokens_per_second", "attention_ms_per_token"}, ...},
//    "recall": {"block", "score", "kl" and, with --baseline, "block_untrained", "score_untrained", "kl_untrained"} of
//    the
//              last sparse mode,
//    "recalls": {"sparse@1/8": {"block", "score", "kl", "layer_block": [], "layer_score": [], "layer_kl": [],
//                               "untrained": {...}}, ...}}
// and with --tasks
//   {"model", "passkey": {"dense": {"2048": [hits, trials], ...}, ...},
//    "found": {"passkey": {"dense": {"2048": mean share of what had to be in the answer}}},
//    "tokens_per_second": {"prefill_dense", "decode_dense", ...}, "attention_ms_per_token": {"decode_dense", ...},
//    "trials": {"passkey": {"dense": [{"length", "depth", "key", "answers": [], "answer", "hit", "found"}, ...]}},
//    "seconds"}.
// --maps writes {"maps": [{"layer", "group", "block_size", "topk", "rows": [[share of the queries of a block that chose
// key block, ...], ...]}]}. Tested in tests/python/test_train.py.
#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "apps/msa/commands.h"
#include "apps/msa/model_options.h"
#include "apps/msa/training_text.h"
#include "msa/error.h"
#include "src/model/convert.h"
#include "src/model/evaluate.h"
#include "src/model/files/file_io.h"
#include "src/model/passkey.h"

namespace msa::app {
namespace {

using Json = nlohmann::ordered_json;

// The filler of the passkey task as it is usually posed. A small dense model finds keys in it at every length; in real
// text it often does not, and then the comparison of dense and sparse says nothing.
constexpr const char* kFiller =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ";

struct EvalFlags {
  ModelOptions model;
  std::string filler = "repeat", baseline, teacher = "mean", budget, maps, map_layers;
  std::vector<std::string> data, attention, tasks;
  std::int64_t context = 0, windows = 2, topk = 0, recall_rows = 256, trials = 10, chunk = 1024;
  std::vector<std::int64_t> lengths = {2048, 4096, 8192};
  std::uint64_t seed = 0;
  bool json = false;
};

// JSON has no NaN: what could not be measured is null.
Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

Json list(const std::vector<double>& values) {
  Json result = Json::array();
  for (const double value : values) result.push_back(number(value));
  return result;
}

Json describe(const model::Alignment& alignment) {
  return {{"block", number(alignment.block_recall)},
          {"score", number(alignment.score_recall)},
          {"kl", number(alignment.kl)},
          {"layer_block", list(alignment.layer_block_recall)},
          {"layer_score", list(alignment.layer_score_recall)},
          {"layer_kl", list(alignment.layer_kl)}};
}

// --attention names modes, each with or without a budget of its own; --topk or --budget is that of the others.
std::vector<model::EvaluationMode> resolve_modes(const EvalFlags& flags, const files::ModelConfig& config) {
  std::vector<std::string> names = flags.attention;
  if (names.empty()) {
    names = {"dense"};
    if (config.has_sparse_layers()) names.emplace_back("sparse");
  }
  std::vector<model::EvaluationMode> modes;
  for (const std::string& name : names) {
    model::EvaluationMode mode = model::parse_evaluation_mode(name);
    if (mode.attention != model::AttentionMode::kDense && !mode.topk && mode.budget == 0) {
      if (flags.topk > 0) mode.topk = flags.topk;
      if (!flags.budget.empty()) mode.budget = model::parse_budget(flags.budget);
    }
    modes.push_back(mode);
  }
  return modes;
}

void print_progress(const std::string& line) { fmt::print(stderr, "eval: {}\n", line); }

Json evaluate_text(const EvalFlags& flags, const model::Decoder& decoder, const TextSource& text) {
  print_progress("reading text");
  const model::Corpus corpus = open_corpus(flags.data);
  const files::ModelConfig& config = decoder.config();
  const std::int64_t context = flags.context > 0 ? flags.context : config.max_position_embeddings;
  const std::vector<model::Tokens> windows =
      corpus.windows(text.tools.encode, model::Split::kHeldOut, context, flags.windows, flags.seed, text.separator);
  if (static_cast<std::int64_t>(windows.size()) < flags.windows) {
    print_progress(
        fmt::format("the held-out text has {} windows of {} tokens, not {}", windows.size(), context, flags.windows));
  }
  std::optional<model::Decoder> baseline;
  if (!flags.baseline.empty()) baseline = model::Decoder::load(flags.baseline, flags.model.scalar_type());
  model::EvaluationOptions options;
  options.modes = resolve_modes(flags, config);
  options.recall_rows = flags.recall_rows;
  options.teacher = flags.teacher == "max" ? Teacher::kMax : Teacher::kMean;
  options.seed = flags.seed;
  options.baseline = baseline ? &*baseline : nullptr;
  options.progress = print_progress;
  if (!flags.maps.empty()) options.map_layers = model::parse_layers(flags.map_layers, config.num_hidden_layers);
  const model::Evaluation evaluation = model::evaluate(decoder, windows, options);

  Json report;
  report["model"] = flags.model.directory;
  report["context"] = context;
  report["windows"] = windows.size();
  report["tokens"] = context * static_cast<std::int64_t>(windows.size());
  for (const model::ModeResult& mode : evaluation.modes) {
    const auto tokens = static_cast<double>(mode.tokens);
    report["modes"][mode.name] = {
        {"loss", number(mode.loss)},
        {"perplexity", number(mode.perplexity)},
        {"loss_last1024", number(mode.last_loss)},
        {"perplexity_last1024", number(mode.last_perplexity)},
        {"window_losses", list(mode.window_losses)},
        {"seconds", mode.seconds.total},
        {"tokens_per_second", number(tokens / mode.seconds.total)},
        {"attention_ms_per_token", number(1e3 * (mode.seconds.attention + mode.seconds.selection) / tokens)}};
  }
  for (const model::RecallResult& recall : evaluation.recalls) {
    Json& entry = report["recalls"][recall.name];
    entry = describe(recall.alignment);
    report["recall"] = {{"block", entry["block"]}, {"score", entry["score"]}, {"kl", entry["kl"]}};
    if (recall.untrained) {
      entry["untrained"] = describe(*recall.untrained);
      for (const char* key : {"block", "score", "kl"}) {
        report["recall"][std::string(key) + "_untrained"] = entry["untrained"][key];
      }
    }
  }
  if (!flags.maps.empty()) {
    Json maps = Json::array();
    for (const model::SelectionMap& map : evaluation.maps) {
      Json rows = Json::array();
      for (const std::vector<double>& row : map.frequency) {
        Json values = Json::array();
        for (const double value : row) values.push_back(std::round(value * 1e4) / 1e4);
        rows.push_back(values);
      }
      maps.push_back({{"layer", map.layer},
                      {"group", map.group},
                      {"block_size", config.index_block_size},
                      {"topk", map.topk},
                      {"rows", rows}});
    }
    files::write_text_file(flags.maps, Json{{"maps", maps}}.dump());
  }
  return report;
}

// At least `length` tokens of what hides the keys: the sentences that the literature repeats, or held-out text.
model::Tokens make_filler(const EvalFlags& flags, std::int64_t length, const TextSource& text) {
  model::Tokens filler;
  if (flags.filler == "repeat") {
    const model::Tokens sentences = text.tools.encode(kFiller);
    while (static_cast<std::int64_t>(filler.size()) < length)
      filler.insert(filler.end(), sentences.begin(), sentences.end());
    return filler;
  }
  const model::Corpus corpus = open_corpus(flags.data);
  const std::int64_t window_length = std::min<std::int64_t>(length, 1024);
  for (const model::Tokens& window : corpus.windows(text.tools.encode, model::Split::kHeldOut, window_length,
                                                    length / window_length + 1, flags.seed, -1, true)) {
    filler.insert(filler.end(), window.begin(), window.end());
  }
  return filler;
}

Json evaluate_tasks(const EvalFlags& flags, const model::Decoder& decoder, const TextSource& text) {
  const files::ModelConfig& config = decoder.config();
  const std::int64_t longest = *std::max_element(flags.lengths.begin(), flags.lengths.end());
  const model::Tokens filler = make_filler(flags, longest, text);
  Json report;
  report["model"] = flags.model.directory;
  for (const std::string& name : flags.tasks) {
    const model::RetrievalTask task = model::parse_retrieval_task(name);
    const std::vector<model::Trial> trials =
        model::make_trials(task, text.tools, filler, flags.lengths, flags.trials, flags.seed);
    for (const model::EvaluationMode& mode : resolve_modes(flags, config)) {
      const auto start = std::chrono::steady_clock::now();
      model::TrialOptions options;
      options.attention = model::attention_options(mode, config, longest);
      options.chunk = flags.chunk;
      options.max_answer = model::answer_tokens(task);
      options.stop_tokens = files::stop_token_ids(config, files::load_generation_config(flags.model.directory));
      options.decode = [&](const model::Tokens& tokens) { return text.decode(tokens); };
      options.on_result = [&](const model::Trial& trial, const model::TrialResult& result) {
        std::string verdict = result.hit ? "found" : "missed";
        if (!result.hit && result.found > 0) verdict = fmt::format("{:.0f} % found", 100 * result.found);
        print_progress(fmt::format("{} {} {} tokens, depth {:.2f}: {} ({})", name, mode.name, trial.length, trial.depth,
                                   verdict, trial.key));
      };
      const model::TrialRun run = model::run_trials(decoder, trials, options);
      for (const auto& [length, tally] : run.tally) {
        report[name][mode.name][std::to_string(length)] = {tally.hits, tally.trials};
        report["found"][name][mode.name][std::to_string(length)] = tally.found / static_cast<double>(tally.trials);
      }
      report["tokens_per_second"]["prefill_" + mode.name] =
          number(static_cast<double>(run.computed_tokens) / run.prefill_seconds);
      report["tokens_per_second"]["decode_" + mode.name] =
          number(static_cast<double>(run.generated_tokens) / run.decode_seconds);
      report["attention_ms_per_token"]["decode_" + mode.name] =
          number(1e3 * run.decode_attention_seconds / static_cast<double>(run.decode_passes));
      report["prompt_tokens"][mode.name] = {{"total", run.prompt_tokens}, {"computed", run.computed_tokens}};
      Json& details = report["trials"][name][mode.name];
      for (std::size_t i = 0; i < trials.size(); ++i) {
        details.push_back({{"length", trials[i].length},
                           {"depth", trials[i].depth},
                           {"key", trials[i].key},
                           {"answers", trials[i].answers},
                           {"answer", run.results[i].answer},
                           {"hit", run.results[i].hit},
                           {"found", run.results[i].found}});
      }
      report["seconds"][mode.name] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  }
  return report;
}

void print_text(const Json& report) {
  const auto show = [](const Json& value) {
    return value.is_null() ? std::string("-") : fmt::format("{:.4f}", value.get<double>());
  };
  fmt::print("{} windows of {} tokens of held-out text\n", report["windows"].get<int>(), report["context"].get<int>());
  fmt::print("  {:<14} {:>10} {:>11} {:>18} {:>10}\n", "attention", "loss", "perplexity", "ppl of last 1024",
             "tokens/s");
  for (const auto& [name, mode] : report["modes"].items()) {
    fmt::print("  {:<14} {:>10} {:>11} {:>18} {:>10.1f}\n", name, show(mode["loss"]), show(mode["perplexity"]),
               show(mode["perplexity_last1024"]), mode["tokens_per_second"].get<double>());
  }
  if (!report.contains("recalls")) return;
  for (const auto& [name, recall] : report["recalls"].items()) {
    fmt::print("  {:<14} block recall {}, score recall {}, kl {}\n", name, show(recall["block"]), show(recall["score"]),
               show(recall["kl"]));
  }
}

void print_tasks(const Json& report, const std::vector<std::string>& tasks) {
  for (const std::string& task : tasks) {
    for (const auto& [mode, lengths] : report[task].items()) {
      std::string line = fmt::format("{:<17} {:<14}", task, mode);
      for (const auto& [length, tally] : lengths.items()) {
        line += fmt::format("  {}: {}/{}", length, tally[0].get<int>(), tally[1].get<int>());
        if (task == "variable-tracking")
          line += fmt::format(" ({:.2f})", report["found"][task][mode][length].get<double>());
      }
      fmt::print("{}\n", line);
    }
  }
}

void run_eval(const EvalFlags& flags) {
  const model::Decoder decoder = flags.model.load();
  const bool has_tokenizer = std::filesystem::exists(std::filesystem::path(flags.model.directory) / "tokenizer.json");
  const TextSource text =
      has_tokenizer ? TextSource::load(flags.model.directory) : TextSource::bytes(decoder.config().vocab_size);
  const Json report = flags.tasks.empty() ? evaluate_text(flags, decoder, text) : evaluate_tasks(flags, decoder, text);
  if (flags.json) {
    fmt::print("{}\n", report.dump());
  } else if (flags.tasks.empty()) {
    print_text(report);
  } else {
    print_tasks(report, flags.tasks);
  }
}

}  // namespace

void add_eval_command(CLI::App& app) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* command = app.add_subcommand("eval", "loss, perplexity, KL and recalls on held-out text; retrieval tasks");
  flags->model.add_to(*command);
  command->add_option("--data", flags->data,
                      "text files or directories; the held-out part is used (default: manuals here)");
  command->add_option("--context", flags->context, "tokens a window (default: the model's full context)")
      ->check(CLI::Range(2, 1 << 24));
  command->add_option("--windows", flags->windows, "windows")->check(CLI::PositiveNumber)->capture_default_str();
  command
      ->add_option(
          "--attention", flags->attention,
          "ways to attend: dense, sparse, window, oracle; @1/8 adds a budget (share of the context), @16 blocks")
      ->delimiter(',')
      ->check(check_with(model::parse_evaluation_mode, "MODE[@BUDGET]"));
  CLI::Option* topk = command->add_option("--topk", flags->topk, "blocks a query where --attention says nothing")
                          ->check(CLI::Range(1, 64));
  command->add_option("--budget", flags->budget, "the same as a share of the context, such as 1/8")
      ->check(check_with(model::parse_budget, "SHARE"))
      ->excludes(topk);
  command->add_option("--recall-rows", flags->recall_rows, "query rows a window for KL and recalls; 0: none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--baseline", flags->baseline, "checkpoint of the same base model whose index is measured beside")
      ->check(CLI::ExistingDirectory);
  command->add_option("--teacher", flags->teacher, "of the KL: mean or max")
      ->check(CLI::IsMember({"mean", "max"}))
      ->capture_default_str();
  command->add_option("--maps", flags->maps, "JSON file for selection maps of --map-layers");
  command->add_option("--map-layers", flags->map_layers, "layers to map, such as 0,7,15")
      ->default_str("0")
      ->default_val("0");
  command
      ->add_option("--tasks", flags->tasks,
                   "retrieval tasks in place of perplexity: passkey, multikey, variable-tracking")
      ->delimiter(',')
      ->check(CLI::IsMember({"passkey", "multikey", "variable-tracking"}));
  command->add_option("--lengths", flags->lengths, "document lengths of the tasks, tokens")
      ->delimiter(',')
      ->check(CLI::Range(64, 1 << 24))
      ->capture_default_str();
  command->add_option("--trials", flags->trials, "trials a length")->check(CLI::PositiveNumber)->capture_default_str();
  command
      ->add_option("--filler", flags->filler,
                   "what hides the keys: repeat (the usual repeated sentences) or corpus (held-out text of --data)")
      ->check(CLI::IsMember({"repeat", "corpus"}))
      ->capture_default_str();
  command->add_option("--chunk", flags->chunk, "prompt tokens a forward pass in the tasks")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--seed", flags->seed, "seed of windows, rows and keys")->capture_default_str();
  command->add_flag("--json", flags->json, "print JSON");
  command->callback([flags] { run_eval(*flags); });
}

}  // namespace msa::app
