// SPDX-License-Identifier: Apache-2.0
// The emulator's asynchronous operations, as its scheduler and its instructions (ptx.h) see them.
#pragma once

namespace msa::cuda::emulator {

/// Forgets everything in flight; a block of `threads` threads starts.
void reset_async(unsigned threads);
/// Does one copy that is in flight. False: there is none.
bool complete_one_copy();
/// Throws Fault when the block ended with something in flight that could still write to its memory.
void check_async_done();

}  // namespace msa::cuda::emulator
