// SPDX-License-Identifier: Apache-2.0
// Training, both routes of the paper (SPEC section 5): from scratch or from a converted dense checkpoint, in stages:
// warmup (full attention, KL over the whole prefix) and sparse (selected blocks).
//
// Frozen backbone: nothing flows back through the model, so each window runs forward once; what the index sees of each
// layer (its input x and keys, and the queries of a pool of rows) is kept, and a step is the KL gradient of some rows
// of one window, layer by layer. Trained backbone: language-model loss + lambda * sum of KL through autograd; an index
// value head and attention sinks (ablations) learn from the language-model loss, so they move and are frozen with the
// backbone.
//
// A step is a pure function of the weights, the optimizer's state and the step number (random numbers come from
// (seed, stream, step)), so a run that is stopped and resumed gives the same curve bit for bit with the same number of
// threads. Tested in tests/unit/model_train.cc and tests/python/test_train.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "src/model/corpus.h"
#include "src/model/decoder.h"
#include "src/model/evaluate.h"
#include "src/model/optimizer.h"
#include "src/model/retrieval.h"
#include "src/model/schedule.h"

namespace msa::model {

struct TrainStage {
  bool sparse = false;  ///< false: warmup
  std::int64_t steps = 0;
};

struct TrainOptions {
  std::vector<TrainStage> stages;
  bool freeze_backbone = false;
  /// kDense and kWindow train without index branch and KL, to compare with: full attention, or in sparse stages the
  /// first block and the most recent ones at the same budget.
  AttentionMode attention = AttentionMode::kSparse;
  bool detach_index = true;  ///< false: the KL reaches the backbone (ablation)
  double lambda = 1.0;
  double learning_rate = 1e-3;            ///< of the backbone
  double index_learning_rate = 1e-3;      ///< of the index branch
  Schedule schedule = Schedule::kCosine;  ///< over all steps of all stages
  std::int64_t warmup_steps = 0;
  double min_factor = 0.0;  ///< of the peak learning rates, at the end
  double clip = 1.0;        ///< of the gradient's norm, with a frozen backbone of each layer's; 0: none
  AdamWOptions adamw;
  std::int64_t batch = 1;       ///< windows a micro-batch
  std::int64_t accumulate = 1;  ///< micro-batches a step
  std::int64_t context = 2048;
  std::uint64_t seed = 0;
  Teacher teacher = Teacher::kMean;
  double retrieval_share = 0.0;  ///< of the windows, synthetic retrieval documents

  // Frozen backbone.
  std::int64_t rows = 128;          ///< query rows a window and step
  std::int64_t cache_windows = 28;  ///< windows whose activations are kept
  std::int64_t long_windows = 0;  ///< windows of long_context tokens beside them, one long document each where possible
  std::int64_t long_context = 8192;
  double long_share = 0.2;                         ///< of the draws, when there are long windows
  std::int64_t sparse_cache_windows = 8;           ///< of them run again by a sparse stage, and used in it
  std::size_t cache_bytes = std::size_t{4} << 30;  ///< bound of all of it: fewer windows when they would not fit

  // What is watched on held-out windows.
  std::int64_t probe_every = 20;  ///< steps; 0: never
  std::int64_t probe_windows = 1;
  std::int64_t probe_rows = 256;
  double probe_budget = 0.125;  ///< recalls at this share of the context

  std::int64_t save_every = 0;  ///< steps between checkpoints; a stage's end and a stop make one anyway
  std::filesystem::path out;    ///< training_state.safetensors lives here; empty: nothing is kept
  bool resume = true;
};

struct StepRecord {
  std::int64_t step = 0;  ///< 1 after the first; 0: the state before training, probed (kl is the held-out one)
  std::string stage;      ///< "warmup", "sparse", and of runs without an index branch "dense", "window"
  double loss = 0;        ///< what was minimised
  double lm_loss = 0;     ///< NaN with a frozen backbone
  double kl = 0;          ///< mean over layers; NaN without an index branch
  std::vector<double> layer_kl;
  double learning_rate = 0, index_learning_rate = 0, gradient_norm = 0;
  std::int64_t tokens = 0;      ///< this step's
  double seconds = 0;           ///< this step's
  bool probed = false;          ///< the fields below are set
  double held_out_lm_loss = 0;  ///< NaN with a frozen backbone
  Alignment held_out;
};

struct TrainHooks {
  std::function<void(const StepRecord&)> on_step;
  std::function<void(const std::string&)> on_progress;  ///< lines of text between steps: caching, saving
  /// Called once with the number of steps already taken (0: a new run) before the first step.
  std::function<void(std::int64_t)> on_start;
  std::function<bool()> should_stop;  ///< asked after every step
};

struct TrainResult {
  std::int64_t steps = 0;  ///< taken in total
  bool finished = false;   ///< false: stopped by should_stop
};

/// Trains `decoder` in place. `separator` goes between documents (none when negative). The random numbers, the windows
/// and the options that shape the curve are those of the first start: resuming with others throws msa::Error naming the
/// first that differs. Throws msa::Error when the loss or a gradient stops being finite, and when there is no text for
/// a window.
TrainResult train(Decoder& decoder, const Corpus& corpus, const TextTools& tools, std::int64_t separator,
                  const TrainOptions& options, const TrainHooks& hooks);

/// One JSON object, one line, for the log: numbers that are not finite become null.
std::string to_json_line(const StepRecord& record);

inline constexpr const char* kTrainingStateFile = "training_state.safetensors";

}  // namespace msa::model
