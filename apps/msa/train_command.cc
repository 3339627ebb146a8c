// SPDX-License-Identifier: Apache-2.0
// `msa train`: both training routes. Writes the model to --out when it ends (or is stopped), training_state.safetensors
// beside it, and a log, one JSON object a line:
//   {"step", "stage", "loss", "lm_loss", "kl", "layer_kl": [], "lr", "index_lr", "gradient_norm", "tokens", "seconds",
//    "block_recall", "score_recall"} and, on steps where held-out text was looked at (the first line, step 0, among
//    them),
//   {"held_out_lm_loss", "held_out_kl", "layer_held_out_kl": [], "layer_block_recall": [], "layer_score_recall": []}.
// Values that do not exist are null. With --json prints {"out", "log", "steps", "finished", "seconds", "last": the last
// probed line, "first": the first}. Tested in tests/python/test_train.py.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>

#include "apps/msa/commands.h"
#include "apps/msa/interrupt.h"
#include "apps/msa/training_text.h"
#include "msa/error.h"
#include "src/model/convert.h"
#include "src/model/files/file_io.h"
#include "src/model/train.h"

namespace msa::app {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct TrainFlags {
  std::string model, config, tokenizer, out, log;
  std::vector<std::string> data;
  std::vector<std::string> stages = {"warmup"};
  std::vector<std::int64_t> steps;
  std::string schedule = "cosine", dtype = "fp32", teacher = "mean", attention = "sparse";
  std::int64_t cache_mib = 4096;
  std::optional<double> index_learning_rate;
  std::optional<std::int64_t> warmup_steps;
  std::optional<std::int64_t> index_value_dim;  // 0: head_dim
  std::optional<std::int64_t> local_blocks, init_blocks;
  bool attention_sink = false;
  bool no_detach = false;
  bool json = false;
  model::TrainOptions options;

  TrainFlags() { options.min_factor = 0.05; }
};

// Lines of a log up to a step: what a resumed run keeps of it.
std::string kept_lines(const fs::path& log, std::int64_t steps, Json& first, Json& last) {
  std::ifstream file(log);
  std::string kept;
  for (std::string line; std::getline(file, line);) {
    const Json record = Json::parse(line, nullptr, false);
    if (record.is_discarded() || record.value("step", steps + 1) > steps) break;
    kept += line + "\n";
    if (record.contains("held_out_kl")) {
      if (first.is_null()) first = record;
      last = record;
    }
  }
  return kept;
}

// Prints a line when something was measured, and otherwise every few seconds.
class Progress {
 public:
  explicit Progress(std::int64_t total) : total_(total) {}

  void step(const model::StepRecord& record) {
    if (record.step > 0) {
      seconds_ += record.seconds;
      ++steps_;
    }
    const auto now = std::chrono::steady_clock::now();
    if (!record.probed && now - printed_ < std::chrono::seconds(5)) return;
    printed_ = now;
    std::string line = fmt::format("step {}/{} {}", record.step, total_, record.stage);
    if (!std::isnan(record.lm_loss)) line += fmt::format("  loss {:.4f}", record.lm_loss);
    if (!std::isnan(record.kl)) line += fmt::format("  kl {:.4f}", record.kl);
    if (record.probed) {
      if (!std::isnan(record.held_out_lm_loss)) line += fmt::format("  held-out loss {:.4f}", record.held_out_lm_loss);
      if (!std::isnan(record.held_out.kl)) line += fmt::format("  held-out kl {:.4f}", record.held_out.kl);
      if (!std::isnan(record.held_out.block_recall)) {
        line += fmt::format("  block recall {:.3f}  score recall {:.3f}", record.held_out.block_recall,
                            record.held_out.score_recall);
      }
    }
    if (steps_ > 0) {
      const double each = seconds_ / static_cast<double>(steps_);
      line += fmt::format("  {:.2f} s/step, {:.0f} s left", each, each * static_cast<double>(total_ - record.step));
    }
    fmt::print(stderr, "train: {}\n", line);
  }

 private:
  std::int64_t total_;
  std::int64_t steps_ = 0;
  double seconds_ = 0;
  std::chrono::steady_clock::time_point printed_{};
};

model::Decoder make_decoder(const TrainFlags& flags) {
  const at::ScalarType dtype = flags.dtype == "bf16" ? at::kBFloat16 : at::kFloat;
  const auto value_dim = [&](const files::ModelConfig& config) {
    return flags.index_value_dim.value_or(0) > 0 ? *flags.index_value_dim : config.head_dim;
  };
  const auto force_blocks = [&](files::ModelConfig& config) {
    config.index_local_blocks = flags.local_blocks.value_or(config.index_local_blocks);
    config.index_init_blocks = flags.init_blocks.value_or(config.index_init_blocks);
  };
  if (flags.model.empty()) {
    files::ModelConfig config = files::load_model_config(flags.config);
    if (flags.index_value_dim) config.index_value_dim = value_dim(config);
    if (flags.attention_sink) config.attention_sink = true;
    force_blocks(config);
    return model::Decoder::create(config, flags.options.seed, dtype);
  }
  model::Decoder decoder = model::Decoder::load(flags.model, dtype);
  if (flags.index_value_dim) decoder.add_index_values(value_dim(decoder.config()), flags.options.seed);
  if (flags.attention_sink) decoder.add_attention_sinks();
  force_blocks(decoder.mutable_config());
  return decoder;
}

TextSource make_text(const TrainFlags& flags, const files::ModelConfig& config) {
  if (!flags.tokenizer.empty()) return TextSource::load(flags.tokenizer);
  if (!flags.model.empty() && fs::exists(fs::path(flags.model) / "tokenizer.json"))
    return TextSource::load(flags.model);
  return TextSource::bytes(config.vocab_size);
}

void run_train(TrainFlags flags) {
  const auto start = std::chrono::steady_clock::now();
  model::TrainOptions& options = flags.options;
  if (flags.steps.empty()) {
    for (const std::string& stage : flags.stages) flags.steps.push_back(stage == "sparse" ? 40 : 200);
  }
  if (flags.steps.size() != flags.stages.size()) {
    throw CLI::ValidationError("--steps",
                               fmt::format("{} numbers for {} stages", flags.steps.size(), flags.stages.size()));
  }
  std::int64_t total = 0;
  for (std::size_t i = 0; i < flags.stages.size(); ++i) {
    options.stages.push_back({flags.stages[i] == "sparse", flags.steps[i]});
    total += flags.steps[i];
  }
  options.schedule = model::parse_schedule(flags.schedule);
  options.teacher = flags.teacher == "max" ? Teacher::kMax : Teacher::kMean;
  options.attention = model::parse_attention_mode(flags.attention);
  options.detach_index = !flags.no_detach;
  options.index_learning_rate =
      flags.index_learning_rate.value_or(options.freeze_backbone ? 3e-3 : options.learning_rate);
  options.warmup_steps = flags.warmup_steps.value_or(total / 20);
  options.cache_bytes = static_cast<std::size_t>(flags.cache_mib) << 20;
  options.out = flags.out;
  const fs::path log_path = flags.log.empty() ? fs::path(flags.out) / "train.jsonl" : fs::path(flags.log);

  model::Decoder decoder = make_decoder(flags);
  const TextSource text = make_text(flags, decoder.config());
  fmt::print(stderr, "train: reading text\n");
  const model::Corpus corpus = open_corpus(flags.data);
  fs::create_directories(flags.out);

  Json first, last;
  std::ofstream log;
  bool went_on = true;
  Progress progress(total);
  model::TrainHooks hooks;
  hooks.on_start = [&](std::int64_t done) {
    if (!log_path.parent_path().empty()) fs::create_directories(log_path.parent_path());
    files::write_text_file(log_path, done > 0 ? kept_lines(log_path, done, first, last) : std::string());
    log.open(log_path, std::ios::app);
    if (!log) throw Error("train: cannot write " + log_path.string());
    went_on = done < total;
    if (done > 0) fmt::print(stderr, "train: resuming after step {} of {}\n", done, total);
  };
  hooks.on_step = [&](const model::StepRecord& record) {
    const std::string line = model::to_json_line(record);
    log << line << '\n' << std::flush;
    if (!log) throw Error("train: cannot write " + log_path.string());
    if (record.probed) {
      last = Json::parse(line);
      if (first.is_null()) first = last;
    }
    progress.step(record);
  };
  hooks.on_progress = [](const std::string& line) { fmt::print(stderr, "train: {}\n", line); };
  hooks.should_stop = InterruptGuard::requested;
  model::TrainResult result;
  {
    const InterruptGuard guard;
    result = model::train(decoder, corpus, text.tools, text.separator, options, hooks);
    if (went_on || !fs::exists(fs::path(flags.out) / "config.json")) {
      decoder.save(flags.out);
      const std::string companions = !flags.tokenizer.empty() ? flags.tokenizer : flags.model;
      if (!companions.empty() && !fs::equivalent(companions, flags.out)) model::copy_companions(companions, flags.out);
    }
  }
  if (!result.finished) {
    fmt::print(stderr, "train: stopped after step {} of {}; the same command goes on from there\n", result.steps,
               total);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (flags.json) {
    Json report;
    report["out"] = flags.out;
    report["log"] = log_path.string();
    report["steps"] = result.steps;
    report["finished"] = result.finished;
    report["seconds"] = seconds;
    report["first"] = first;
    report["last"] = last;
    fmt::print("{}\n", report.dump());
  } else {
    fmt::print("{} after {} of {} steps, {:.1f} s: {}\n", result.finished ? "finished" : "stopped", result.steps, total,
               seconds, flags.out);
  }
}

}  // namespace

void add_train_command(CLI::App& app) {
  auto flags = std::make_shared<TrainFlags>();
  model::TrainOptions& options = flags->options;
  CLI::App* command =
      app.add_subcommand("train", "train the index branch, or the whole model; resumes what it finds in --out");
  command->add_option("--model", flags->model, "checkpoint to train (converted, or dense with --attention dense)")
      ->check(CLI::ExistingDirectory);
  command->add_option("--config", flags->config, "config.json of a model to train from scratch, in place of --model")
      ->check(CLI::ExistingPath)
      ->excludes("--model");
  command
      ->add_option("--tokenizer", flags->tokenizer,
                   "directory with tokenizer.json (default: --model's; without any, bytes are tokens)")
      ->check(CLI::ExistingDirectory);
  command->add_option("--data", flags->data, "text files or directories (default: manuals on this machine)");
  command->add_option("--out", flags->out, "directory for the model, the training state and the log")->required();
  command->add_option("--log", flags->log, "log file, JSON lines (default: OUT/train.jsonl)");
  command->add_option("--stage", flags->stages, "stages in order: warmup (full attention), sparse (selected blocks)")
      ->delimiter(',')
      ->check(CLI::IsMember({"warmup", "sparse"}))
      ->capture_default_str();
  command->add_option("--steps", flags->steps, "steps of each stage (default: 200 of warmup, 40 of sparse)")
      ->delimiter(',')
      ->check(CLI::NonNegativeNumber);
  command->add_flag("--freeze-backbone", options.freeze_backbone,
                    "train the index branch only; no backward through the model");
  command
      ->add_option("--attention", flags->attention,
                   "dense, window: train without index and KL, to compare with; window is the first block and the "
                   "most recent ones in sparse stages")
      ->check(CLI::IsMember({"sparse", "dense", "window"}))
      ->capture_default_str();
  command->add_option("--lambda", options.lambda, "weight of the KL")->capture_default_str();
  command->add_option("--lr", options.learning_rate, "peak learning rate of the backbone")->capture_default_str();
  command->add_option("--index-lr", flags->index_learning_rate,
                      "peak learning rate of the index branch (default: --lr, with a frozen "
                      "backbone 3e-3)");
  command->add_option("--schedule", flags->schedule, "of the learning rates, over all stages: cosine, wsd or constant")
      ->check(CLI::IsMember({"cosine", "wsd", "constant"}))
      ->capture_default_str();
  command
      ->add_option("--warmup-steps", flags->warmup_steps,
                   "steps of linear rise of the learning rates (default: a twentieth of all)")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--min-lr", options.min_factor, "final learning rates, as a share of the peak")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command->add_option("--weight-decay", options.adamw.weight_decay, "decoupled weight decay")->capture_default_str();
  command->add_option("--clip", options.clip, "largest norm of the gradient; 0: no clipping")->capture_default_str();
  command->add_option("--batch", options.batch, "windows a micro-batch")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--accumulate", options.accumulate, "micro-batches a step")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--context", options.context, "tokens a window")
      ->check(CLI::Range(2, 1 << 24))
      ->capture_default_str();
  command->add_option("--dtype", flags->dtype, "storage of the parameters in the forward; masters are fp32")
      ->check(CLI::IsMember({"fp32", "bf16"}))
      ->capture_default_str();
  command->add_option("--seed", options.seed, "seed of windows, rows and fresh weights")->capture_default_str();
  command->add_option("--teacher", flags->teacher, "over a group's heads: mean (the paper's) or max, renormalised")
      ->check(CLI::IsMember({"mean", "max"}))
      ->capture_default_str();
  command
      ->add_option("--retrieval-share", options.retrieval_share,
                   "share of windows that are synthetic retrieval documents")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command->add_option("--rows", options.rows, "frozen backbone: query rows a window and step")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--cache-windows", options.cache_windows, "frozen backbone: windows whose activations are kept")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option("--long-windows", options.long_windows,
                   "frozen backbone: windows of --long-context tokens beside them")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--long-context", options.long_context, "tokens of a long window")
      ->check(CLI::Range(2, 1 << 24))
      ->capture_default_str();
  command->add_option("--long-share", options.long_share, "share of the steps that go to long windows")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command
      ->add_option("--sparse-cache-windows", options.sparse_cache_windows,
                   "frozen backbone: of them run again by a sparse stage")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--cache-mib", flags->cache_mib, "frozen backbone: memory bound of the kept activations")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--probe-every", options.probe_every, "steps between looks at held-out text; 0: none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--probe-windows", options.probe_windows, "held-out windows")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--probe-rows", options.probe_rows, "query rows of each")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option("--save-every", options.save_every,
                   "steps between checkpoints; one is made when a stage ends or is stopped anyway")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_flag("--resume,!--no-resume", options.resume, "go on with the run in --out (default), or start over")
      ->capture_default_str();
  command->add_flag("--no-detach", flags->no_detach, "ablation: let the KL reach the backbone");
  command
      ->add_option(
          "--index-value-head", flags->index_value_dim,
          "ablation: give the index branch values of this dimension (default: head dim), attended to and added")
      ->expected(0, 1)
      ->default_str("0")
      ->check(CLI::Range(0, 256));
  command->add_flag("--attention-sink", flags->attention_sink,
                    "ablation: a learned logit a query head in the softmax's denominator");
  command
      ->add_option("--local-blocks", flags->local_blocks, "last blocks that are always taken, in place of the model's")
      ->check(CLI::Range(0, 64));
  command
      ->add_option("--init-blocks", flags->init_blocks, "first blocks that are always taken, in place of the model's")
      ->check(CLI::Range(0, 64));
  command->add_flag("--json", flags->json, "print JSON");
  command->callback([flags] {
    if (flags->model.empty() == flags->config.empty()) {
      throw CLI::RequiredError("train: exactly one of --model and --config");
    }
    const bool learns_from_text = flags->index_value_dim || flags->attention_sink;
    if (learns_from_text && flags->options.freeze_backbone) {
      throw CLI::ValidationError(flags->attention_sink ? "--attention-sink" : "--index-value-head",
                                 "is learned with the language-model loss, which --freeze-backbone does without");
    }
    if (flags->index_value_dim && flags->attention != "sparse") {
      throw CLI::ValidationError("--index-value-head",
                                 "needs the index branch, which --attention " + flags->attention + " does without");
    }
    run_train(*flags);
  });
}

}  // namespace msa::app
