// SPDX-License-Identifier: Apache-2.0
// Learning-rate schedules: a linear warmup, then cosine, warmup-stable-decay, or constant. A pure function of the step,
// so that a resumed run needs nothing but the step. Tested in tests/unit/model_train.cc.
#pragma once

#include <cstdint>
#include <string>

namespace msa::model {

enum class Schedule {
  kCosine,    ///< half a cosine from 1 to min_factor
  kWsd,       ///< 1 until the last decay_share of the steps, then linear to min_factor
  kConstant,  ///< 1
};
/// "cosine", "wsd" or "constant"; throws msa::Error on anything else, naming the choices.
Schedule parse_schedule(const std::string& name);

struct ScheduleOptions {
  Schedule kind = Schedule::kCosine;
  std::int64_t total_steps = 0;
  std::int64_t warmup_steps = 0;
  double min_factor = 0.0;
  double decay_share = 0.2;
};

/// What the peak learning rate is multiplied by at `step` (0 <= step < total_steps). The first warmup step already
/// moves: it has 1 / warmup_steps. The last step of a decay has just not reached min_factor, which the step after it
/// would.
double schedule_factor(const ScheduleOptions& options, std::int64_t step);

}  // namespace msa::model
