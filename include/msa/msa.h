// SPDX-License-Identifier: Apache-2.0
// Everything, in one include.
#pragma once

#include "msa/attention.h"      // IWYU pragma: export
#include "msa/batch.h"          // IWYU pragma: export
#include "msa/context.h"        // IWYU pragma: export
#include "msa/cuda.h"           // IWYU pragma: export
#include "msa/error.h"          // IWYU pragma: export
#include "msa/index_kl.h"       // IWYU pragma: export
#include "msa/select_blocks.h"  // IWYU pragma: export
#include "msa/tensor.h"         // IWYU pragma: export
#include "msa/topk.h"           // IWYU pragma: export
