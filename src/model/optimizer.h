// SPDX-License-Identifier: Apache-2.0
// AdamW with decoupled weight decay (Loshchilov, Hutter 2019). Parameters may be stored in bfloat16: the optimizer then
// keeps float32 masters, updates those and rounds them back, so that updates smaller than a bfloat16 step are not lost.
// All of its state is tensors with names, for checkpoints. Tested in tests/unit/model_train.cc against a scalar AdamW.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace msa::model {

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.0;  ///< applied to tensors of two or more dimensions; norms and biases are left alone
};

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

class AdamW {
 public:
  /// `parameters` are leaves that require gradients; updated in place by step().
  AdamW(NamedTensors parameters, const AdamWOptions& options);

  /// Sets every gradient to undefined, so that a parameter a step never reached is told from one with gradient 0.
  void zero_grad();
  /// Scales gradients down to a Euclidean norm of at most `clip` (0: leaves them), over all parameters or over each
  /// group of those that `group` gives the same name; returns the norm over all, before. Throws msa::Error naming a
  /// parameter whose gradient is not finite.
  double clip_gradients(double clip, const std::function<std::string(const std::string&)>& group = {});
  /// One update with a learning rate a parameter (asked by name). Parameters without a gradient stay, moments and all.
  void step(const std::function<double(const std::string&)>& learning_rate);

  /// "NAME" (the master values), "NAME#m", "NAME#v", "NAME#steps"; shares memory with the optimizer.
  NamedTensors state() const;
  /// Takes over a state() of the same parameters: masters, and from them the parameters. Throws msa::Error naming a
  /// tensor that is missing or has another shape.
  void load_state(const std::function<at::Tensor(const std::string&)>& tensor);

 private:
  struct Slot {
    std::string name;
    at::Tensor parameter, master, mean, square;
    at::Tensor steps;  // int64 scalar
  };
  std::vector<Slot> slots_;
  AdamWOptions options_;
};

}  // namespace msa::model
