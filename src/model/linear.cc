// SPDX-License-Identifier: Apache-2.0
// See linear.h. The loops are plain and left to the compiler to vectorise: what they wait for is memory. On x86-64 they
// exist twice, for the baseline and for AVX2, whose wider loads keep up better; both give the same bits.
#include "src/model/linear.h"

#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "src/core/threads.h"

namespace msa::model {
namespace {

// Independent sums of a dot product: four AVX2 registers, enough to cover the latency of one addition (4 cycles).
constexpr std::int64_t kLanes = 32;
// Weights are asked for this far ahead, because rows of a thousand values are too short for hardware prefetchers to get
// far: at 10 GB/s a core and 100 ns of latency, 1 KiB is on its way; twice that leaves room.
constexpr std::int64_t kAheadBytes = 2048;
// Weights a thread gets at least; fewer are read in the time that waking a thread takes.
constexpr std::int64_t kGrainWeights = 1 << 15;

inline float widen(float value) { return value; }
inline float widen(c10::BFloat16 value) { return std::bit_cast<float>(static_cast<std::uint32_t>(value.x) << 16); }

// sums[r] = <w, x_r> over n values, rows of x behind each other. The order of the additions depends on n alone.
template <int kRows, class Weight>
[[gnu::always_inline]] inline void dot_rows(const Weight* w, const float* x, std::int64_t n, float* sums) {
  float lanes[kRows][kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch(reinterpret_cast<const char*>(w + i) + kAheadBytes);
    for (int r = 0; r < kRows; ++r) {
      for (std::int64_t l = 0; l < kLanes; ++l) lanes[r][l] += widen(w[i + l]) * x[r * n + i + l];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (std::int64_t l = 0; l < half; ++l) lanes[r][l] += lanes[r][l + half];
    }
    sums[r] = lanes[r][0];
    for (std::int64_t j = i; j < n; ++j) sums[r] += widen(w[j]) * x[r * n + j];
  }
}

// Outputs [begin, end) of one layer; y [rows, out].
template <class Weight>
struct Job {
  const Weight* weight;
  const Weight* bias;
  Weight* y;
  const float* x;
  std::int64_t rows, in, out;
};

template <int kRows, class Weight>
[[gnu::always_inline]] inline void run_rows(const Job<Weight>& job, std::int64_t begin, std::int64_t end) {
  for (std::int64_t o = begin; o < end; ++o) {
    float sums[kRows];
    dot_rows<kRows>(job.weight + o * job.in, job.x, job.in, sums);
    for (int r = 0; r < kRows; ++r) {
      const float bias = job.bias != nullptr ? widen(job.bias[o]) : 0.0F;
      job.y[r * job.out + o] = static_cast<Weight>(sums[r] + bias);
    }
  }
}

template <class Weight>
[[gnu::always_inline]] inline void run_any(const Job<Weight>& job, std::int64_t begin, std::int64_t end) {
  static_assert(kFewRows == 4);
  if (job.rows == 1) run_rows<1>(job, begin, end);
  if (job.rows == 2) run_rows<2>(job, begin, end);
  if (job.rows == 3) run_rows<3>(job, begin, end);
  if (job.rows == 4) run_rows<4>(job, begin, end);
}

template <class Weight>
void run_baseline(const Job<Weight>& job, std::int64_t begin, std::int64_t end) {
  run_any(job, begin, end);
}

#ifdef __x86_64__
template <class Weight>
[[gnu::target("avx2")]] void run_avx2(const Job<Weight>& job, std::int64_t begin, std::int64_t end) {
  run_any(job, begin, end);
}
#endif

template <class Weight>
auto choose_kernel() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2")) return &run_avx2<Weight>;
#endif
  return &run_baseline<Weight>;
}

template <class Weight>
void apply_to_few_rows(const at::Tensor& x, std::span<const Linear* const> layers, std::span<at::Tensor> outputs) {
  const at::Tensor wide = x.to(at::kFloat).contiguous();
  std::vector<Job<Weight>> jobs;
  std::vector<std::int64_t> ends;  // of each job in the outputs of all, one behind the other
  for (std::size_t i = 0; i < layers.size(); ++i) {
    if (layers[i] == nullptr) continue;
    const at::Tensor& weight = *layers[i]->weight;
    outputs[i] = at::empty({x.size(0), weight.size(0)}, x.options());
    const Weight* const bias = layers[i]->bias == nullptr ? nullptr : layers[i]->bias->const_data_ptr<Weight>();
    jobs.push_back({weight.const_data_ptr<Weight>(), bias, outputs[i].mutable_data_ptr<Weight>(),
                    wide.const_data_ptr<float>(), x.size(0), x.size(1), weight.size(0)});
    ends.push_back(weight.size(0) + (ends.empty() ? 0 : ends.back()));
  }
  static const auto kernel = choose_kernel<Weight>();
  const std::int64_t grain = std::max<std::int64_t>(1, kGrainWeights / std::max<std::int64_t>(1, x.size(1)));
  for_parts(ends.empty() ? 0 : ends.back(), grain, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t first = 0;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      const std::int64_t from = std::max(begin, first), to = std::min(end, ends[i]);
      if (from < to) kernel(jobs[i], from - first, to - first);
      first = ends[i];
    }
  });
}

bool is_plain(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type && tensor.device().is_cpu() && tensor.is_contiguous();
}

bool takes_few_rows(const at::Tensor& x, std::span<const Linear* const> layers) {
  const at::ScalarType type = x.scalar_type();
  if (x.dim() != 2 || x.size(0) < 1 || x.size(0) > kFewRows || !x.device().is_cpu() || wants_grad({&x})) return false;
  if (type != at::kFloat && type != at::kBFloat16) return false;
  return std::all_of(layers.begin(), layers.end(), [&](const Linear* layer) {
    return layer == nullptr ||
           (is_plain(*layer->weight, type) && layer->weight->size(1) == x.size(1) && !wants_grad({layer->weight}) &&
            (layer->bias == nullptr || (is_plain(*layer->bias, type) && !wants_grad({layer->bias}))));
  });
}

}  // namespace

bool wants_grad(std::initializer_list<const at::Tensor*> tensors) {
  return c10::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor* tensor) {
           return tensor->defined() && tensor->requires_grad();
         });
}

void for_parts(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& body) {
  const std::int64_t parts = (count + grain - 1) / grain;
  core::parallel_for(at::get_num_threads(), parts,
                     [&](std::int64_t part, int) { body(part * grain, std::min(count, (part + 1) * grain)); });
}

at::Tensor Linear::operator()(const at::Tensor& x) const {
  const std::array<const Linear*, 1> layers = {this};
  return apply_layers(x, layers)[0];
}

void apply_layers(const at::Tensor& x, std::span<const Linear* const> layers, std::span<at::Tensor> outputs) {
  if (takes_few_rows(x, layers)) {
    if (x.scalar_type() == at::kFloat) {
      apply_to_few_rows<float>(x, layers, outputs);
    } else {
      apply_to_few_rows<c10::BFloat16>(x, layers, outputs);
    }
    return;
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    if (layers[i] == nullptr) continue;
    outputs[i] = layers[i]->bias != nullptr ? at::linear(x, *layers[i]->weight, *layers[i]->bias)
                                            : at::linear(x, *layers[i]->weight);
  }
}

}  // namespace msa::model
