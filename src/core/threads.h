// SPDX-License-Identifier: Apache-2.0
// The one place that starts threads. Uses OpenMP, the runtime that libtorch has in the process anyway, so that two
// pools never fight for the cores; a std::thread build (MSA_STD_THREADS) exists for ThreadSanitizer, which cannot see
// into libgomp. Tested in tests/unit/threads_test.cc.
#pragma once

#include <cstdint>
#include <functional>

namespace msa::core {

/// Threads that `requested` stands for: itself, or one for each hardware thread when 0. At least 1.
int resolve_threads(int requested);

/// Calls body(task, worker) once for every task in [0, tasks), tasks handed out in order to whichever of up to
/// `threads` workers is free; worker is in [0, threads). What a task computes must not depend on its worker. The first
/// exception thrown by a task is rethrown here after the others have stopped.
void parallel_for(int threads, std::int64_t tasks, const std::function<void(std::int64_t task, int worker)>& body);

}  // namespace msa::core
