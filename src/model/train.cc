// SPDX-License-Identifier: Apache-2.0
// See train.h.
#include "src/model/train.h"

#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <utility>

#include "bindings/torch/ops.h"
#include "msa/error.h"
#include "msa/select_blocks.h"
#include "src/model/files/json.h"
#include "src/model/files/safetensors.h"
#include "src/model/numbers.h"
#include "src/model/stopwatch.h"
#include "src/model/train_random.h"

namespace msa::model {
namespace {

namespace fs = std::filesystem;

// Streams of random numbers (train_random.h), one for each use.
constexpr std::uint64_t kOrderStream = 1, kRowStream = 2, kPoolStream = 3, kDocumentStream = 4;
// Rows of logits differentiated at a time: 512 x 49152 float32 values and their gradient are 200 MiB.
constexpr std::int64_t kLogitRows = 512;
// Tokens kept for a run whose backbone is trained; more steps than they last for go over them again in another order.
constexpr std::int64_t kMaxTokens = std::int64_t{1} << 26;
constexpr std::int64_t kPoolFactor = 4;  // rows whose queries are kept, over the rows of one step

std::vector<std::int64_t> index_layers(const Decoder& decoder) {
  std::vector<std::int64_t> layers;
  for (std::int64_t layer = 0; layer < decoder.config().num_hidden_layers; ++layer) {
    if (decoder.has_index_branch(layer)) layers.push_back(layer);
  }
  return layers;
}

struct TokenWindow {
  Tokens tokens;
  std::int64_t tail_begin = -1;  // of a retrieval document
};

// What a frozen backbone's index layers see of one window.
struct CachedWindow {
  struct Layer {
    at::Tensor x;  // [T, hidden]
    at::Tensor k;  // [T, kv_heads, head_dim]
    at::Tensor q;  // [pool, query_heads, head_dim]
  };
  std::vector<std::int32_t> pool;  // positions of q, ascending
  std::vector<Layer> layers;       // parallel to the run's index layers
  std::int64_t tokens = 0;
};

// Kept in bfloat16: rounding the inputs moves the KL far less than the choice of rows does, and halves the memory.
constexpr at::ScalarType kCacheType = at::kBFloat16;

class Run {
 public:
  Run(Decoder& decoder, const Corpus& corpus, const TextTools& tools, std::int64_t separator,
      const TrainOptions& options, const TrainHooks& hooks)
      : decoder_(decoder),
        corpus_(corpus),
        tools_(tools),
        separator_(separator),
        options_(options),
        hooks_(hooks),
        layers_(without_index() ? std::vector<std::int64_t>() : index_layers(decoder)) {
    for (const TrainStage& stage : options.stages) total_steps_ += stage.steps;
  }

  TrainResult execute();

 private:
  void check() const;
  void choose_parameters();
  std::map<std::string, std::string> fingerprint() const;
  void load_state();
  void save_state() const;
  void prepare_data();
  std::int64_t window_bytes(std::int64_t tokens) const;
  std::vector<TokenWindow> make_windows(std::int64_t count) const;
  AttentionOptions attention(bool sparse) const;
  CachedWindow capture(const TokenWindow& window, const std::vector<std::int32_t>& pool,
                       const AttentionOptions& how) const;
  std::vector<std::int32_t> choose_pool(const TokenWindow& window, std::size_t id) const;
  bool enter_stage(std::size_t stage);  // false: asked to stop
  std::size_t window_at(std::int64_t draw, std::size_t windows) const;
  const CachedWindow& cached_window(std::int64_t draw) const;
  std::size_t stage_of(std::int64_t step) const;
  void frozen_gradients(bool sparse, StepRecord& record);
  void full_gradients(bool sparse, StepRecord& record);
  double backpropagate_language(const at::Tensor& hidden, const at::Tensor& rows, const at::Tensor& targets,
                                double scale, at::Tensor& gradient) const;
  void probe(bool sparse, StepRecord& record) const;
  std::int64_t topk_of(std::int64_t layer) const {
    return decoder_.config().index_topk_blocks.at(static_cast<std::size_t>(layer));
  }
  std::int64_t probe_topk() const;
  bool without_index() const { return options_.attention != AttentionMode::kSparse; }
  const char* stage_name(bool sparse) const {
    return sparse || without_index() ? attention_mode_name(attention(sparse).mode) : "warmup";
  }
  bool should_stop() const { return hooks_.should_stop && hooks_.should_stop(); }
  void progress(const std::string& text) const {
    if (hooks_.on_progress) hooks_.on_progress(text);
  }

  Decoder& decoder_;
  const Corpus& corpus_;
  const TextTools& tools_;
  const std::int64_t separator_;
  const TrainOptions& options_;
  const TrainHooks& hooks_;
  const std::vector<std::int64_t> layers_;
  std::int64_t total_steps_ = 0;
  std::int64_t step_ = 0;
  std::unique_ptr<AdamW> optimizer_;
  std::vector<TokenWindow> windows_, long_windows_;
  std::vector<CachedWindow> cache_, long_cache_;
  std::vector<Tokens> probe_windows_;
  std::vector<CachedWindow> probe_cache_;
  // Frozen sparse stage: the index parameters with which the windows were run, so that a resumed run can run them
  // again.
  std::size_t snapshot_stage_ = 0;
  NamedTensors snapshot_;
};

void Run::check() const {
  const auto fail = [](const std::string& what) { return Error("train: " + what); };
  if (options_.stages.empty() || total_steps_ < 1) throw fail("no steps to take");
  for (const TrainStage& stage : options_.stages) {
    if (stage.steps < 0) throw fail("a stage has a negative number of steps");
  }
  if (options_.batch < 1 || options_.accumulate < 1) throw fail("batch and accumulate must be at least 1");
  if (options_.context < 2) throw fail("context must be at least 2 tokens");
  if (options_.attention == AttentionMode::kOracle) throw fail("attention oracle cannot be trained with");
  if (options_.freeze_backbone && without_index()) {
    throw fail("without an index branch a frozen backbone leaves nothing to train");
  }
  if (options_.freeze_backbone &&
      (options_.rows < 1 || options_.cache_windows < 1 || options_.sparse_cache_windows < 1)) {
    throw fail("rows, cache_windows and sparse_cache_windows must be at least 1");
  }
  if (!without_index() && layers_.empty()) {
    throw fail("the model has no index branch: convert it first, or train it dense (--attention dense)");
  }
  if (without_index() && decoder_.config().index_value_dim > 0) {
    throw fail("the model has an index value head (index_value_dim), which a run without an index branch cannot have");
  }
  if (options_.attention == AttentionMode::kWindow && !decoder_.config().has_sparse_layers()) {
    throw fail("attention window needs sparse layers (layer_types), which say the budget");
  }
  if (!(options_.retrieval_share >= 0 && options_.retrieval_share <= 1))
    throw fail("retrieval_share must be in [0, 1]");
}

// Options that shape the curve: a resumed run must have the same.
std::map<std::string, std::string> Run::fingerprint() const {
  std::map<std::string, std::string> result;
  const auto number = [](double value) {
    char text[40];
    std::snprintf(text, sizeof text, "%.17g", value);
    return std::string(text);
  };
  std::string stages;
  for (const TrainStage& stage : options_.stages) {
    if (!stages.empty()) stages += ",";
    stages.append(stage.sparse ? "sparse:" : "warmup:").append(std::to_string(stage.steps));
  }
  result["stages"] = stages;
  result["freeze_backbone"] = std::to_string(options_.freeze_backbone);
  result["attention"] = attention_mode_name(options_.attention);
  result["detach_index"] = std::to_string(options_.detach_index);
  result["lambda"] = number(options_.lambda);
  result["learning_rate"] = number(options_.learning_rate);
  result["index_learning_rate"] = number(options_.index_learning_rate);
  result["schedule"] = std::to_string(static_cast<int>(options_.schedule));
  result["warmup_steps"] = std::to_string(options_.warmup_steps);
  result["min_factor"] = number(options_.min_factor);
  result["clip"] = number(options_.clip);
  result["weight_decay"] = number(options_.adamw.weight_decay);
  result["betas"] = number(options_.adamw.beta1) + "," + number(options_.adamw.beta2);
  result["batch"] = std::to_string(options_.batch);
  result["accumulate"] = std::to_string(options_.accumulate);
  result["context"] = std::to_string(options_.context);
  result["seed"] = std::to_string(options_.seed);
  result["index_value_dim"] = std::to_string(decoder_.config().index_value_dim);
  result["attention_sink"] = std::to_string(decoder_.config().attention_sink);
  result["local_blocks"] = std::to_string(decoder_.config().index_local_blocks);
  result["init_blocks"] = std::to_string(decoder_.config().index_init_blocks);
  result["teacher"] = options_.teacher == Teacher::kMax ? "max" : "mean";
  result["retrieval_share"] = number(options_.retrieval_share);
  if (options_.freeze_backbone) {
    result["rows"] = std::to_string(options_.rows);
    result["cache_windows"] = std::to_string(options_.cache_windows);
    result["long_windows"] = std::to_string(options_.long_windows);
    result["long_context"] = std::to_string(options_.long_context);
    result["long_share"] = number(options_.long_share);
    result["sparse_cache_windows"] = std::to_string(options_.sparse_cache_windows);
    result["cache_bytes"] = std::to_string(options_.cache_bytes);
  }
  result["training_text_bytes"] = std::to_string(corpus_.bytes(Split::kTrain));
  return result;
}

void Run::choose_parameters() {
  NamedTensors trained;
  for (auto& [name, parameter] : decoder_.named_parameters()) {
    const bool is_index = Decoder::is_index_parameter(name);
    const bool wanted = options_.freeze_backbone ? is_index : !(without_index() && is_index);
    parameter.requires_grad_(wanted);
    if (wanted) trained.emplace_back(name, parameter);
  }
  optimizer_ = std::make_unique<AdamW>(std::move(trained), options_.adamw);
}

void Run::load_state() {
  const fs::path path = options_.out / kTrainingStateFile;
  if (options_.out.empty() || !options_.resume || !fs::exists(path)) return;
  const files::SafetensorsFile file = files::SafetensorsFile::open(path);
  const auto value = [&](const std::string& key) {
    const auto entry = file.metadata().find(key);
    if (entry == file.metadata().end()) throw Error(path.string() + ": no training state ('" + key + "' is missing)");
    return entry->second;
  };
  for (const auto& [key, now] : fingerprint()) {
    const std::string then = value(key);
    if (then != now) {
      throw Error("train: " + options_.out.string() + " holds a run with " + key + " " + then + ", now " + now +
                  "; use the same options to go on, or --no-resume to start over");
    }
  }
  step_ = std::stoll(value("step"));
  if (step_ < 0 || step_ > total_steps_)
    throw Error(path.string() + ": step " + std::to_string(step_) + " is out of range");
  const auto tensor = [&](const std::string& name) {
    const files::TensorInfo* info = file.find(name);
    if (info == nullptr) return at::Tensor();
    if (info->dtype != files::DType::kF32 && info->dtype != files::DType::kI64) {
      throw Error(path.string() + ": " + name + " is neither F32 nor I64");
    }
    at::Tensor result = at::empty(info->shape, info->dtype == files::DType::kF32 ? at::kFloat : at::kLong);
    const auto bytes = file.bytes(*info);
    std::copy(bytes.begin(), bytes.end(), static_cast<std::byte*>(result.mutable_data_ptr()));
    return result;
  };
  optimizer_->load_state(tensor);
  snapshot_stage_ = static_cast<std::size_t>(std::stoull(value("snapshot_stage")));
  for (const auto& [name, parameter] : decoder_.named_parameters()) {
    at::Tensor copy = tensor(name + "#stage");
    if (!copy.defined()) continue;
    if (copy.sizes() != parameter.sizes()) throw Error(path.string() + ": " + name + "#stage has another shape");
    snapshot_.emplace_back(name, std::move(copy));
  }
}

void Run::save_state() const {
  if (options_.out.empty()) return;
  fs::create_directories(options_.out);
  files::Metadata metadata;
  for (const auto& [key, text] : fingerprint()) metadata[key] = text;
  metadata["step"] = std::to_string(step_);
  metadata["snapshot_stage"] = std::to_string(snapshot_stage_);
  std::vector<files::TensorSpec> specs;
  std::vector<at::Tensor> tensors;
  const auto put = [&](const std::string& name, const at::Tensor& tensor) {
    files::TensorSpec spec;
    spec.name = name;
    spec.dtype = tensor.scalar_type() == at::kLong ? files::DType::kI64 : files::DType::kF32;
    spec.shape = tensor.sizes().vec();
    specs.push_back(spec);
    tensors.push_back(tensor.contiguous());
  };
  for (const auto& [name, tensor] : optimizer_->state()) put(name, tensor);
  for (const auto& [name, tensor] : snapshot_) put(name + "#stage", tensor);
  files::write_safetensors(
      options_.out / kTrainingStateFile, specs,
      [&](std::size_t i) -> std::span<const std::byte> {
        return {static_cast<const std::byte*>(tensors[i].const_data_ptr()), tensors[i].nbytes()};
      },
      metadata);
}

std::vector<TokenWindow> Run::make_windows(std::int64_t count) const {
  std::vector<Tokens> texts =
      corpus_.windows(tools_.encode, Split::kTrain, options_.context, count, options_.seed, separator_);
  std::vector<TokenWindow> windows;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    // the share is spread evenly: window i is synthetic when i * share passes a whole number
    const double before = std::floor(static_cast<double>(i) * options_.retrieval_share);
    const double after = std::floor(static_cast<double>(i + 1) * options_.retrieval_share);
    if (after > before) {
      Random random(options_.seed, kDocumentStream, i);
      RetrievalDocument document = make_retrieval_document(tools_, texts[i], options_.context, random);
      windows.push_back({std::move(document.tokens), document.tail_begin});
    } else {
      windows.push_back({std::move(texts[i]), -1});
    }
  }
  return windows;
}

AttentionOptions Run::attention(bool sparse) const {
  AttentionOptions options;
  options.mode = sparse ? options_.attention : AttentionMode::kDense;
  return options;
}

std::int64_t Run::probe_topk() const {
  const double blocks = std::round(options_.probe_budget * static_cast<double>(options_.context) /
                                   static_cast<double>(decoder_.config().index_block_size));
  return static_cast<std::int64_t>(std::clamp(blocks, 1.0, static_cast<double>(kMaxTopk)));
}

CachedWindow Run::capture(const TokenWindow& window, const std::vector<std::int32_t>& pool,
                          const AttentionOptions& how) const {
  const at::NoGradGuard no_grad;
  CachedWindow cached;
  cached.pool = pool;
  cached.tokens = static_cast<std::int64_t>(window.tokens.size());
  const at::Tensor rows = at::tensor(pool, at::kLong);
  ForwardOptions forward;
  forward.attention = how;
  forward.observer = [&](const LayerView& view) {
    if (!decoder_.has_index_branch(view.layer)) return;
    cached.layers.push_back(
        {view.x.to(kCacheType), view.k.to(kCacheType), view.q.index_select(0, rows).to(kCacheType)});
  };
  (void)decoder_.forward(at::tensor(window.tokens, at::kLong), int32_tensor({0, cached.tokens}), forward);
  return cached;
}

// Rows whose queries are kept. Of a retrieval document seven in ten come from its questions and answers, however few
// rows these have.
std::vector<std::int32_t> Run::choose_pool(const TokenWindow& window, std::size_t id) const {
  const auto length = static_cast<std::int64_t>(window.tokens.size());
  Random random(options_.seed, kPoolStream, id);
  const std::int64_t wanted = std::min(length, options_.rows * kPoolFactor);
  if (window.tail_begin < 0) return random.sample(length, wanted);
  const std::int64_t tail = length - window.tail_begin;
  const std::vector<std::int32_t> from_tail = random.sample(tail, wanted * 7 / 10);
  const std::int64_t others = std::max<std::int64_t>(1, static_cast<std::int64_t>(from_tail.size()) * 3 / 7);
  std::vector<std::int32_t> pool = random.sample(window.tail_begin, others);
  for (const std::int32_t row : from_tail) pool.push_back(row + static_cast<std::int32_t>(window.tail_begin));
  return pool;
}

// Bytes of one window's activations in the cache.
std::int64_t Run::window_bytes(std::int64_t tokens) const {
  const files::ModelConfig& config = decoder_.config();
  const std::int64_t pool = std::min(tokens, options_.rows * kPoolFactor);
  return static_cast<std::int64_t>(c10::elementSize(kCacheType) * layers_.size()) *
         (tokens * (config.hidden_size + config.num_key_value_heads * config.head_dim) +
          pool * config.num_attention_heads * config.head_dim);
}

void Run::prepare_data() {
  const std::int64_t per_step = options_.batch * options_.accumulate;
  std::int64_t count = std::min(total_steps_ * per_step, std::max<std::int64_t>(1, kMaxTokens / options_.context));
  if (options_.freeze_backbone) {
    const auto allowed = static_cast<std::int64_t>(options_.cache_bytes);
    std::int64_t left = allowed;
    if (options_.long_windows > 0) {
      left -= options_.long_windows * window_bytes(options_.long_context);
      const std::vector<Tokens> texts = corpus_.windows(tools_.encode, Split::kTrain, options_.long_context,
                                                        options_.long_windows, options_.seed + 1, separator_);
      for (const Tokens& text : texts) long_windows_.push_back({text, -1});
    }
    const std::int64_t bytes = window_bytes(options_.context);
    const std::int64_t fitting = left / bytes;
    if (fitting < 1) {
      throw Error("train: the activations of a window of " + std::to_string(options_.context) + " tokens take " +
                  std::to_string(bytes >> 20) + " MiB; " + std::to_string(std::max<std::int64_t>(left, 0) >> 20) +
                  " of " + std::to_string(allowed >> 20) + " MiB are left for them");
    }
    count = std::min(options_.cache_windows, fitting);
    if (count < options_.cache_windows) {
      progress("keeping " + std::to_string(count) + " windows instead of " + std::to_string(options_.cache_windows) +
               ": " + std::to_string(bytes >> 20) + " MiB each, " + std::to_string(left >> 20) + " MiB allowed");
    }
  }
  windows_ = make_windows(count);
  if (options_.probe_every > 0 && options_.probe_windows > 0) {
    probe_windows_ = corpus_.windows(tools_.encode, Split::kHeldOut, options_.context, options_.probe_windows,
                                     options_.seed, separator_);
    if (options_.freeze_backbone) {
      for (std::size_t i = 0; i < probe_windows_.size(); ++i) {
        Random random(options_.seed, kPoolStream, ~static_cast<std::uint64_t>(i));
        const std::vector<std::int32_t> rows = random.sample(options_.context, options_.probe_rows);
        progress("running held-out window " + std::to_string(i + 1) + " of " + std::to_string(probe_windows_.size()));
        probe_cache_.push_back(capture({probe_windows_[i], -1}, rows, attention(false)));
      }
    }
  }
}

bool Run::enter_stage(std::size_t stage) {
  if (!options_.freeze_backbone) return true;
  const bool sparse = options_.stages[stage].sparse;
  NamedTensors current;  // the index parameters of a run resumed inside a sparse stage, put back after the windows ran
  const at::NoGradGuard no_grad;
  if (sparse) {
    if (snapshot_.empty() || snapshot_stage_ != stage) {
      snapshot_.clear();
      snapshot_stage_ = stage;
      for (const auto& [name, parameter] : decoder_.named_parameters()) {
        if (Decoder::is_index_parameter(name))
          snapshot_.emplace_back(name, parameter.detach().to(at::kFloat, false, true));
      }
    } else {
      for (const auto& [name, value] : snapshot_) {
        at::Tensor& parameter = decoder_.parameter(name);
        current.emplace_back(name, parameter.detach().clone());
        parameter.copy_(value);
      }
    }
  } else {
    snapshot_.clear();
  }
  cache_.clear();
  long_cache_.clear();
  const std::size_t count =
      sparse ? std::min(windows_.size(), static_cast<std::size_t>(options_.sparse_cache_windows)) : windows_.size();
  const std::size_t long_count = sparse ? std::min<std::size_t>(long_windows_.size(), 1) : long_windows_.size();
  bool complete = true;
  for (std::size_t i = 0; i < count + long_count && complete; ++i) {
    progress(std::string("running window ") + std::to_string(i + 1) + " of " + std::to_string(count + long_count) +
             (sparse ? " (sparse)" : " (dense)"));
    const TokenWindow& window = i < count ? windows_[i] : long_windows_[i - count];
    CachedWindow cached =
        capture(window, choose_pool(window, i < count ? i : windows_.size() + i - count), attention(sparse));
    (i < count ? cache_ : long_cache_).push_back(std::move(cached));
    complete = !should_stop();
  }
  for (const auto& [name, value] : current) decoder_.parameter(name).copy_(value);
  return complete;
}

// Windows are visited in epochs, each in its own order.
std::size_t Run::window_at(std::int64_t draw, std::size_t windows) const {
  const auto count = static_cast<std::int64_t>(windows);
  std::vector<std::int32_t> order(windows);
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(i);
  Random(options_.seed, kOrderStream, static_cast<std::uint64_t>(draw / count)).shuffle(order);
  return static_cast<std::size_t>(order[static_cast<std::size_t>(draw % count)]);
}

// Every now and then a long window, as often as its share says, in turn; the other draws visit the rest in epochs.
const CachedWindow& Run::cached_window(std::int64_t draw) const {
  if (long_cache_.empty()) return cache_[window_at(draw, cache_.size())];
  const auto before = static_cast<std::int64_t>(std::floor(static_cast<double>(draw) * options_.long_share));
  const auto after = static_cast<std::int64_t>(std::floor(static_cast<double>(draw + 1) * options_.long_share));
  if (after > before) return long_cache_[static_cast<std::size_t>(before) % long_cache_.size()];
  return cache_[window_at(draw - before, cache_.size())];
}

std::size_t Run::stage_of(std::int64_t step) const {
  std::int64_t end = 0;
  for (std::size_t stage = 0; stage < options_.stages.size(); ++stage) {
    end += options_.stages[stage].steps;
    if (step < end) return stage;
  }
  return options_.stages.size() - 1;
}

void Run::frozen_gradients(bool sparse, StepRecord& record) {
  const files::ModelConfig& config = decoder_.config();
  const std::int64_t per_step = options_.batch * options_.accumulate;
  const char* teacher = options_.teacher == Teacher::kMax ? "max" : "mean";
  record.layer_kl.assign(static_cast<std::size_t>(config.num_hidden_layers), kNan);
  for (const std::int64_t layer : layers_) record.layer_kl[static_cast<std::size_t>(layer)] = 0;
  for (std::int64_t j = 0; j < per_step; ++j) {
    const std::int64_t draw = step_ * per_step + j;
    const CachedWindow& window = cached_window(draw);
    Random random(options_.seed, kRowStream, static_cast<std::uint64_t>(draw));
    const std::vector<std::int32_t> chosen =
        random.sample(static_cast<std::int64_t>(window.pool.size()), options_.rows);
    std::vector<std::int32_t> positions;
    for (const std::int32_t i : chosen) positions.push_back(window.pool[static_cast<std::size_t>(i)]);
    const at::Tensor pool_rows = at::tensor(chosen, at::kLong);
    const at::Tensor rows = at::tensor(positions, at::kInt);
    const at::Tensor row_positions = rows.to(at::kLong);
    const at::Tensor all_positions = at::arange(window.tokens, at::kLong);
    const at::Tensor cu_q = int32_tensor({0, rows.size(0)});
    const at::Tensor cu_k = int32_tensor({0, window.tokens});
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const CachedWindow::Layer& seen = window.layers[l];
      const std::int64_t layer = layers_[l];
      const at::Tensor x = seen.x.to(decoder_.parameter("model.embed_tokens.weight").scalar_type());
      const at::Tensor q_idx = decoder_.index_queries(layer, x.index_select(0, row_positions), row_positions);
      const at::Tensor k_idx = decoder_.index_keys(layer, x, all_positions);
      std::optional<at::Tensor> blocks;
      if (sparse && config.layer_types[static_cast<std::size_t>(layer)] == files::AttentionType::kSparse) {
        blocks = torch_ops::select_blocks(q_idx.detach(), k_idx.detach(), cu_q, cu_k, config.index_block_size,
                                          topk_of(layer), config.index_local_blocks, config.index_init_blocks, rows);
      }
      const at::Tensor kl =
          torch_ops::index_kl(q_idx, k_idx, seen.q.index_select(0, pool_rows), seen.k, blocks, cu_q, cu_k,
                              config.index_block_size, std::nullopt, std::nullopt, teacher, rows);
      (kl * (options_.lambda / static_cast<double>(per_step))).backward();
      record.layer_kl[static_cast<std::size_t>(layer)] += kl.item<double>() / static_cast<double>(per_step);
    }
    record.tokens += window.tokens;
  }
  for (const double kl : record.layer_kl) record.loss += std::isnan(kl) ? 0 : options_.lambda * kl;
  record.lm_loss = kNan;
}

// The language-model loss of `rows` and, in `gradient` ([T, hidden]), its gradient times `scale`; logits exist for a
// few rows at a time, and the head's own gradient is accumulated on the way.
double Run::backpropagate_language(const at::Tensor& hidden, const at::Tensor& rows, const at::Tensor& targets,
                                   double scale, at::Tensor& gradient) const {
  at::Tensor leaf = hidden.detach();
  leaf.requires_grad_(true);
  const std::int64_t count = rows.size(0);
  double sum = 0;
  for (std::int64_t begin = 0; begin < count; begin += kLogitRows) {
    const std::int64_t part = std::min(kLogitRows, count - begin);
    const at::Tensor logits = decoder_.logits(leaf.index_select(0, rows.narrow(0, begin, part)));
    const at::Tensor loss = at::cross_entropy_loss(logits, targets.narrow(0, begin, part), {}, at::Reduction::Sum) /
                            static_cast<double>(count);
    (loss * scale).backward();
    sum += loss.item<double>();
  }
  gradient = leaf.grad();
  return sum;
}

void Run::full_gradients(bool sparse, StepRecord& record) {
  const files::ModelConfig& config = decoder_.config();
  const double share = 1.0 / static_cast<double>(options_.accumulate);
  record.lm_loss = 0;
  record.layer_kl.assign(static_cast<std::size_t>(config.num_hidden_layers), kNan);
  for (std::int64_t a = 0; a < options_.accumulate; ++a) {
    Tokens tokens;
    std::vector<std::int64_t> rows;
    std::vector<std::int32_t> cu_seqlens = {0};
    for (std::int64_t b = 0; b < options_.batch; ++b) {
      const Tokens& window =
          windows_[window_at((step_ * options_.accumulate + a) * options_.batch + b, windows_.size())].tokens;
      for (std::size_t i = 0; i + 1 < window.size(); ++i) rows.push_back(static_cast<std::int64_t>(tokens.size() + i));
      tokens.insert(tokens.end(), window.begin(), window.end());
      cu_seqlens.push_back(static_cast<std::int32_t>(tokens.size()));
    }
    const at::Tensor ids = at::tensor(tokens, at::kLong);
    const at::Tensor row_ids = at::tensor(rows, at::kLong);
    ForwardOptions forward;
    forward.attention = attention(sparse);
    forward.with_kl = !without_index();
    forward.detach_index = options_.detach_index;
    forward.teacher = options_.teacher;
    const ForwardResult result = decoder_.forward(ids, at::tensor(cu_seqlens, at::kInt), forward);
    at::Tensor gradient;
    const double loss =
        backpropagate_language(result.hidden, row_ids, ids.index_select(0, row_ids + 1), share, gradient);
    // One backward through the model for both terms: this product has exactly `gradient` as its gradient.
    at::Tensor total = (result.hidden * gradient).sum();
    if (!without_index()) total = total + result.kl_sum * (options_.lambda * share);
    total.backward();
    record.lm_loss += loss * share;
    record.loss += loss * share;
    for (std::size_t l = 0; l < result.layer_kl.size(); ++l) {
      if (std::isnan(result.layer_kl[l])) continue;
      double& kl = record.layer_kl[l];
      kl = (std::isnan(kl) ? 0 : kl) + result.layer_kl[l] * share;
      record.loss += options_.lambda * share * result.layer_kl[l];
    }
    record.tokens += ids.size(0);
  }
}

void Run::probe(bool sparse, StepRecord& record) const {
  const at::NoGradGuard no_grad;
  record.probed = true;
  record.held_out_lm_loss = kNan;
  AlignmentMeter meter(decoder_.config().num_hidden_layers);
  if (options_.freeze_backbone) {
    const at::ScalarType dtype = decoder_.parameter("model.embed_tokens.weight").scalar_type();
    for (const CachedWindow& window : probe_cache_) {
      const at::Tensor rows = at::tensor(window.pool, at::kInt);
      for (std::size_t l = 0; l < layers_.size(); ++l) {
        const CachedWindow::Layer& seen = window.layers[l];
        meter.add(layers_[l], measure_alignment(decoder_, layers_[l], seen.x.to(dtype), seen.q, seen.k, rows,
                                                probe_topk(), options_.teacher));
      }
    }
  } else {
    double sum = 0;
    for (std::size_t i = 0; i < probe_windows_.size(); ++i) {
      const Tokens& window = probe_windows_[i];
      Random random(options_.seed, kPoolStream, ~static_cast<std::uint64_t>(i));
      const at::Tensor rows = at::tensor(random.sample(options_.context, options_.probe_rows), at::kInt);
      ForwardOptions forward;
      forward.attention = attention(sparse);
      forward.observer = [&](const LayerView& view) {
        if (without_index() || !decoder_.has_index_branch(view.layer)) return;
        meter.add(view.layer,
                  measure_alignment(decoder_, view.layer, view.x, view.q.index_select(0, rows.to(at::kLong)), view.k,
                                    rows, probe_topk(), options_.teacher));
      };
      const at::Tensor ids = at::tensor(window, at::kLong);
      const at::Tensor hidden = decoder_.forward(ids, int32_tensor({0, ids.size(0)}), forward).hidden;
      sum += token_losses(decoder_, hidden, ids).to(at::kDouble).mean().item<double>();
    }
    record.held_out_lm_loss = sum / static_cast<double>(probe_windows_.size());
  }
  record.held_out = meter.result();
}

TrainResult Run::execute() {
  check();
  choose_parameters();
  load_state();
  if (hooks_.on_start) hooks_.on_start(step_);
  TrainResult result;
  result.finished = true;
  if (step_ < total_steps_) prepare_data();
  const ScheduleOptions schedule{options_.schedule, total_steps_, options_.warmup_steps, options_.min_factor, 0.2};
  if (step_ == 0 && !probe_windows_.empty() && hooks_.on_step) {
    StepRecord before;
    before.stage = stage_name(options_.stages[stage_of(0)].sparse);
    before.loss = before.lm_loss = before.kl = kNan;
    probe(options_.stages[stage_of(0)].sparse, before);
    before.kl = before.held_out.kl;
    hooks_.on_step(before);
  }
  std::optional<std::size_t> stage;
  while (step_ < total_steps_) {
    if (stage != stage_of(step_)) {
      stage = stage_of(step_);
      if (!enter_stage(*stage)) {
        save_state();
        result.finished = false;
        break;
      }
    }
    const bool sparse = options_.stages[*stage].sparse;
    const Stopwatch stopwatch;
    StepRecord record;
    record.stage = stage_name(sparse);
    const double factor = schedule_factor(schedule, step_);
    record.learning_rate = options_.freeze_backbone ? 0 : options_.learning_rate * factor;
    record.index_learning_rate = without_index() ? 0 : options_.index_learning_rate * factor;
    optimizer_->zero_grad();
    if (options_.freeze_backbone) {
      frozen_gradients(sparse, record);
    } else {
      full_gradients(sparse, record);
    }
    record.kl = mean_of(record.layer_kl);
    if (!std::isfinite(record.loss)) {
      throw Error("train: the loss of step " + std::to_string(step_ + 1) + " is not finite; lower the learning rate");
    }
    // The index branches of a frozen model are independent of each other: so is their clipping.
    const auto layer_of = [](const std::string& name) { return name.substr(0, name.find(".self_attn.")); };
    record.gradient_norm = options_.freeze_backbone ? optimizer_->clip_gradients(options_.clip, layer_of)
                                                    : optimizer_->clip_gradients(options_.clip);
    optimizer_->step([&](const std::string& name) {
      return Decoder::is_index_parameter(name) ? record.index_learning_rate : record.learning_rate;
    });
    ++step_;
    record.step = step_;
    record.seconds = stopwatch.seconds();
    const bool last = step_ == total_steps_;
    if (!probe_windows_.empty() && (step_ % options_.probe_every == 0 || last)) probe(sparse, record);
    if (hooks_.on_step) hooks_.on_step(record);
    const bool stop = should_stop() && !last;
    const bool due = options_.save_every > 0 && step_ % options_.save_every == 0;
    if (stop || due || last || stage != stage_of(step_)) save_state();
    if (stop) {
      result.finished = false;
      break;
    }
  }
  optimizer_->zero_grad();
  for (auto& [name, parameter] : decoder_.named_parameters()) parameter.requires_grad_(false);
  result.steps = step_;
  return result;
}

}  // namespace

TrainResult train(Decoder& decoder, const Corpus& corpus, const TextTools& tools, std::int64_t separator,
                  const TrainOptions& options, const TrainHooks& hooks) {
  return Run(decoder, corpus, tools, separator, options, hooks).execute();
}

std::string to_json_line(const StepRecord& record) {
  // A NaN or an infinity becomes null: JSON has neither.
  const auto number = [](double value) { return std::isfinite(value) ? files::Json(value) : files::Json(nullptr); };
  const auto list = [&](const std::vector<double>& values) {
    files::Json result = files::Json::array();
    for (const double value : values) result.push_back(number(value));
    return result;
  };
  files::Json json;
  json["step"] = record.step;
  json["stage"] = record.stage;
  json["loss"] = number(record.loss);
  json["lm_loss"] = number(record.lm_loss);
  json["kl"] = number(record.kl);
  json["layer_kl"] = list(record.layer_kl);
  json["lr"] = number(record.learning_rate);
  json["index_lr"] = number(record.index_learning_rate);
  json["gradient_norm"] = number(record.gradient_norm);
  json["tokens"] = record.tokens;
  json["seconds"] = number(record.seconds);
  json["block_recall"] = record.probed ? number(record.held_out.block_recall) : files::Json(nullptr);
  json["score_recall"] = record.probed ? number(record.held_out.score_recall) : files::Json(nullptr);
  if (record.probed) {
    json["held_out_lm_loss"] = number(record.held_out_lm_loss);
    json["held_out_kl"] = number(record.held_out.kl);
    json["layer_held_out_kl"] = list(record.held_out.layer_kl);
    json["layer_block_recall"] = list(record.held_out.layer_block_recall);
    json["layer_score_recall"] = list(record.held_out.layer_score_recall);
  }
  return json.dump();
}

}  // namespace msa::model
