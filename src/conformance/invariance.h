// SPDX-License-Identifier: Apache-2.0
// What must not change a bit (SPEC section 6): running again, the other sequences of the batch, cutting a prefill into
// chunks, keys in pages. Checks of conformance.h.
#pragma once

#include <string>
#include <vector>

#include "msa/context.h"
#include "src/conformance/conformance.h"
#include "src/conformance/naive.h"
#include "src/conformance/run_operators.h"

namespace msa::conformance {

/// Adds one result a property, its error the number of values that differ. `in` has blocks.
void check_invariance(const Context& context, const NaiveInputs& in, const std::string& name,
                      std::vector<CheckResult>& results);

}  // namespace msa::conformance
