// SPDX-License-Identifier: Apache-2.0
// What launches want to know of the current device.
#pragma once

#include <cstdint>

namespace msa::cuda {

std::int64_t multiprocessor_count();

}  // namespace msa::cuda
