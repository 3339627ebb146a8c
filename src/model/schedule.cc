// SPDX-License-Identifier: Apache-2.0
// See schedule.h.
#include "src/model/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "msa/error.h"

namespace msa::model {

Schedule parse_schedule(const std::string& name) {
  if (name == "cosine") return Schedule::kCosine;
  if (name == "wsd") return Schedule::kWsd;
  if (name == "constant") return Schedule::kConstant;
  throw Error("schedule '" + name + "': not one of cosine, wsd, constant");
}

double schedule_factor(const ScheduleOptions& options, std::int64_t step) {
  if (step < options.warmup_steps) {
    return static_cast<double>(step + 1) / static_cast<double>(options.warmup_steps);
  }
  const auto total = static_cast<double>(options.total_steps);
  const auto at = static_cast<double>(step);
  switch (options.kind) {
    case Schedule::kConstant: return 1.0;
    case Schedule::kCosine: {
      const double span = std::max(1.0, total - static_cast<double>(options.warmup_steps));
      const double share = std::clamp((at - static_cast<double>(options.warmup_steps)) / span, 0.0, 1.0);
      return options.min_factor + (1.0 - options.min_factor) * 0.5 * (1.0 + std::cos(std::numbers::pi * share));
    }
    case Schedule::kWsd: {
      const double decay = std::max(1.0, std::round(total * options.decay_share));
      const double share = std::clamp((at - (total - decay)) / decay, 0.0, 1.0);
      return 1.0 + (options.min_factor - 1.0) * share;
    }
  }
  throw Error("schedule: unknown kind");
}

}  // namespace msa::model
