// SPDX-License-Identifier: Apache-2.0
// `msa convert`: a dense GQA checkpoint becomes an MSA checkpoint. With --json prints one object:
//   {"out", "unchanged", "layers": [sparse layer ids], "block_size", "topk": [one a layer], "index_dim", "init",
//   "seconds",
//    "calibration_tokens" and, with --calibrate, "ranking": [{"layer", "gain", "head"}, ...]}
// Tested in tests/python/test_train.py.
#include <fmt/format.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>

#include "apps/msa/commands.h"
#include "apps/msa/training_text.h"
#include "msa/error.h"
#include "src/model/calibrate.h"
#include "src/model/convert.h"
#include "src/model/files/file_io.h"

namespace msa::app {
namespace {

namespace fs = std::filesystem;

struct ConvertFlags {
  std::string from, out, layers = "all", init = "closed-form";
  model::ConvertOptions options;
  std::vector<std::string> calibration_data;
  std::int64_t calibration_windows = 8;
  std::int64_t calibration_context = 1024;
  bool calibrate = false;
  bool keep_budget = false;
  std::int64_t boost_layers = 2;
  std::int64_t boost_topk = 48;
  std::int64_t rank_documents = 4;
  std::int64_t rank_context = 2048;
  bool force = false;
  bool json = false;
};

// What a conversion was made of, kept in the result, so that the same command again has nothing to do.
constexpr const char* kRecord = "msa_conversion.json";

nlohmann::ordered_json describe(const ConvertFlags& flags, const files::ModelConfig& base) {
  nlohmann::ordered_json record;
  record["from"] = fs::weakly_canonical(flags.from).string();
  record["layers"] = model::parse_layers(flags.layers, base.num_hidden_layers);
  record["block_size"] = flags.options.block_size;
  record["topk"] = flags.options.topk;
  record["index_dim"] = flags.options.index_dim == 0 ? base.head_dim : flags.options.index_dim;
  record["init"] = flags.init;
  record["seed"] = flags.options.seed;
  record["calibration_data"] = flags.calibration_data;
  record["calibration_windows"] = flags.calibration_windows;
  record["calibration_context"] = flags.calibration_context;
  if (flags.calibrate) {
    record["calibrate"] = {{"boost_layers", flags.boost_layers},
                           {"boost_topk", flags.boost_topk},
                           {"keep_budget", flags.keep_budget},
                           {"rank_documents", flags.rank_documents},
                           {"rank_context", flags.rank_context}};
  }
  return record;
}

bool was_converted(const fs::path& out, const nlohmann::ordered_json& record) {
  if (!fs::exists(out / kRecord) || !fs::exists(out / "config.json")) return false;
  constexpr std::size_t kMaxBytes = 1 << 20;
  return nlohmann::ordered_json::parse(files::read_text_file(out / kRecord, kMaxBytes), nullptr, false) == record;
}

std::vector<model::RetrievalDocument> make_documents(const ConvertFlags& flags, const model::Corpus& corpus,
                                                     const TextSource& text) {
  std::vector<model::RetrievalDocument> documents;
  const std::vector<model::Tokens> fillers =
      corpus.windows(text.tools.encode, model::Split::kTrain, flags.rank_context, flags.rank_documents,
                     flags.options.seed + 1, text.separator);
  for (std::size_t i = 0; i < fillers.size(); ++i) {
    model::Random random(flags.options.seed, 0xca1b, i);
    documents.push_back(model::make_retrieval_document(text.tools, fillers[i], flags.rank_context, random));
  }
  return documents;
}

void run_convert(ConvertFlags flags) {
  const auto start = std::chrono::steady_clock::now();
  const files::ModelConfig base = files::load_model_config(flags.from);
  const nlohmann::ordered_json record = describe(flags, base);
  nlohmann::ordered_json report;
  report["out"] = flags.out;
  report["unchanged"] = was_converted(flags.out, record);
  std::int64_t calibration_tokens = 0;
  if (!report["unchanged"].get<bool>()) {
    if (fs::exists(flags.out) && !flags.force) {
      throw Error("convert: " + flags.out + " exists; name another directory, or --force to replace it");
    }
    flags.options.initialization = model::parse_initialization(flags.init);
    flags.options.layers = model::parse_layers(flags.layers, base.num_hidden_layers);
    const bool closed_form = flags.options.initialization == model::Initialization::kClosedForm;
    std::vector<model::Tokens> windows;
    std::vector<model::RetrievalDocument> documents;
    if (closed_form || flags.calibrate) {
      const TextSource text = TextSource::load(flags.from);
      fmt::print(stderr, "convert: reading calibration text\n");
      const model::Corpus corpus = open_corpus(flags.calibration_data);
      if (closed_form) {
        windows = corpus.windows(text.tools.encode, model::Split::kTrain, flags.calibration_context,
                                 flags.calibration_windows, flags.options.seed, text.separator);
      }
      if (flags.calibrate) documents = make_documents(flags, corpus, text);
    }
    for (const model::Tokens& window : windows) calibration_tokens += static_cast<std::int64_t>(window.size());
    model::Decoder decoder = model::Decoder::load(flags.from);
    fmt::print(stderr, "convert: initialising {} layers ({}{})\n", flags.options.layers.size(), flags.init,
               calibration_tokens > 0 ? fmt::format(", {} tokens of calibration text", calibration_tokens) : "");
    model::add_index(decoder, flags.options, windows);
    if (flags.calibrate) {
      fmt::print(stderr, "convert: ranking layers on {} retrieval documents\n", documents.size());
      const std::vector<model::LayerGain> ranking = model::rank_layers(decoder, documents, {});
      model::spend_budget(decoder.mutable_config(), ranking, flags.boost_layers, flags.boost_topk, flags.keep_budget);
      report["ranking"] = nlohmann::ordered_json::array();
      for (const model::LayerGain& layer : ranking) {
        report["ranking"].push_back({{"layer", layer.layer}, {"gain", layer.gain}, {"head", layer.head}});
      }
    }
    model::write_converted(decoder, flags.from, flags.out, record.dump(2) + "\n", flags.force);
  }
  const files::ModelConfig config = files::load_model_config(flags.out);
  report["layers"] = record["layers"];
  report["block_size"] = config.index_block_size;
  report["topk"] = config.index_topk_blocks;
  report["index_dim"] = config.index_head_dim;
  report["init"] = flags.init;
  report["calibration_tokens"] = calibration_tokens;
  report["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (flags.json) {
    fmt::print("{}\n", report.dump());
  } else if (report["unchanged"].get<bool>()) {
    fmt::print("{} is this conversion already\n", flags.out);
  } else {
    fmt::print("wrote {}: {} sparse layers, block size {}, index dimension {}, {:.1f} s\n", flags.out,
               record["layers"].size(), config.index_block_size, config.index_head_dim,
               report["seconds"].get<double>());
  }
}

}  // namespace

void add_convert_command(CLI::App& app) {
  auto flags = std::make_shared<ConvertFlags>();
  CLI::App* command = app.add_subcommand("convert", "give a dense GQA checkpoint an index branch");
  command->add_option("--from", flags->from, "dense checkpoint: a Hugging Face directory")
      ->required()
      ->check(CLI::ExistingDirectory);
  command->add_option("--out", flags->out, "directory to write")->required();
  command->add_option("--block-size", flags->options.block_size, "tokens a block")->capture_default_str();
  command->add_option("--topk", flags->options.topk, "blocks a query")->capture_default_str()->check(CLI::Range(1, 64));
  command->add_option("--index-dim", flags->options.index_dim,
                      "dimension of index queries and keys (default: head dim)");
  command->add_option("--layers", flags->layers, "layers that become sparse: all, or a list such as 0,3,8-11")
      ->capture_default_str();
  command->add_option("--init", flags->init, "first weights: closed-form, mean or random")
      ->capture_default_str()
      ->check(CLI::IsMember({"closed-form", "mean", "random"}));
  command->add_option("--calibration-data", flags->calibration_data,
                      "text files or directories for the closed form (default: manuals on this machine)");
  command->add_option("--calibration-windows", flags->calibration_windows, "windows of calibration text")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--calibration-context", flags->calibration_context, "tokens of each")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 20));
  command->add_flag(
      "--calibrate", flags->calibrate,
      "rank the layers by what true-mass blocks would gain on retrieval documents, and give the first more");
  command->add_option("--boost-layers", flags->boost_layers, "with --calibrate: layers that get more")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--boost-topk", flags->boost_topk, "with --calibrate: their blocks a query; 0: full attention")
      ->capture_default_str()
      ->check(CLI::Range(0, 64));
  command->add_flag("--keep-budget", flags->keep_budget, "with --calibrate: take the blocks from the other layers");
  command->add_option("--rank-documents", flags->rank_documents, "with --calibrate: retrieval documents to rank on")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--rank-context", flags->rank_context, "tokens of each")
      ->capture_default_str()
      ->check(CLI::Range(128, 1 << 20));
  command->add_option("--seed", flags->options.seed, "seed of what is random")->capture_default_str();
  command->add_flag("--force", flags->force, "replace --out when it exists");
  command->add_flag("--json", flags->json, "print JSON");
  command->callback([flags] { run_convert(*flags); });
}

}  // namespace msa::app
