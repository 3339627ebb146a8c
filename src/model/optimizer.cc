// SPDX-License-Identifier: Apache-2.0
// See optimizer.h.
#include "src/model/optimizer.h"

#include <c10/core/GradMode.h>

#include <cmath>
#include <map>

#include "msa/error.h"

namespace msa::model {

AdamW::AdamW(NamedTensors parameters, const AdamWOptions& options) : options_(options) {
  const at::NoGradGuard no_grad;
  slots_.reserve(parameters.size());
  for (auto& [name, parameter] : parameters) {
    Slot slot;
    slot.name = name;
    slot.parameter = parameter;
    slot.master = parameter.scalar_type() == at::kFloat ? parameter.detach() : parameter.detach().to(at::kFloat);
    slot.mean = at::zeros_like(slot.master);
    slot.square = at::zeros_like(slot.master);
    slot.steps = at::zeros({}, at::kLong);
    slots_.push_back(std::move(slot));
  }
}

void AdamW::zero_grad() {
  for (Slot& slot : slots_) slot.parameter.mutable_grad() = at::Tensor();
}

double AdamW::clip_gradients(double clip, const std::function<std::string(const std::string&)>& group) {
  const at::NoGradGuard no_grad;
  std::map<std::string, double> squares;
  double total = 0;
  const auto group_of = [&](const Slot& slot) { return group ? group(slot.name) : std::string(); };
  for (const Slot& slot : slots_) {
    if (!slot.parameter.grad().defined()) continue;
    const double norm = slot.parameter.grad().to(at::kFloat).norm().item<double>();
    if (!std::isfinite(norm)) {
      throw Error("training: the gradient of " + slot.name + " is not finite; lower the learning rate");
    }
    squares[group_of(slot)] += norm * norm;
    total += norm * norm;
  }
  for (Slot& slot : slots_) {
    if (!slot.parameter.grad().defined() || clip <= 0) continue;
    const double norm = std::sqrt(squares[group_of(slot)]);
    if (norm > clip) slot.parameter.mutable_grad().mul_(clip / norm);
  }
  return std::sqrt(total);
}

void AdamW::step(const std::function<double(const std::string&)>& learning_rate) {
  const at::NoGradGuard no_grad;
  for (Slot& slot : slots_) {
    if (!slot.parameter.grad().defined()) continue;
    const at::Tensor gradient = slot.parameter.grad().to(at::kFloat);
    const std::int64_t steps = slot.steps.item<std::int64_t>() + 1;
    slot.steps.fill_(steps);
    const double rate = learning_rate(slot.name);
    if (options_.weight_decay != 0 && slot.master.dim() >= 2) slot.master.mul_(1 - rate * options_.weight_decay);
    slot.mean.mul_(options_.beta1).add_(gradient, 1 - options_.beta1);
    slot.square.mul_(options_.beta2).addcmul_(gradient, gradient, 1 - options_.beta2);
    const double mean_correction = 1 - std::pow(options_.beta1, static_cast<double>(steps));
    const double square_correction = 1 - std::pow(options_.beta2, static_cast<double>(steps));
    const at::Tensor denominator = slot.square.sqrt().div_(std::sqrt(square_correction)).add_(options_.epsilon);
    slot.master.addcdiv_(slot.mean, denominator, -rate / mean_correction);
    if (slot.parameter.scalar_type() != at::kFloat) slot.parameter.copy_(slot.master);
  }
}

NamedTensors AdamW::state() const {
  NamedTensors state;
  state.reserve(slots_.size() * 4);
  for (const Slot& slot : slots_) {
    state.emplace_back(slot.name, slot.master);
    state.emplace_back(slot.name + "#m", slot.mean);
    state.emplace_back(slot.name + "#v", slot.square);
    state.emplace_back(slot.name + "#steps", slot.steps);
  }
  return state;
}

void AdamW::load_state(const std::function<at::Tensor(const std::string&)>& tensor) {
  const at::NoGradGuard no_grad;
  const auto take = [&](at::Tensor& target, const std::string& name) {
    const at::Tensor source = tensor(name);
    if (!source.defined()) throw Error("training state: " + name + " is missing");
    if (source.sizes() != target.sizes())
      throw Error("training state: " + name + " has another shape than the model's");
    target.copy_(source);
  };
  for (Slot& slot : slots_) {
    take(slot.master, slot.name);
    take(slot.mean, slot.name + "#m");
    take(slot.square, slot.name + "#v");
    take(slot.steps, slot.name + "#steps");
    if (slot.parameter.scalar_type() != at::kFloat) slot.parameter.copy_(slot.master);
  }
}

}  // namespace msa::model
