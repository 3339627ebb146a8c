// SPDX-License-Identifier: Apache-2.0
// The one place that starts threads: every task once, worker ids in range, exceptions carried out.
#include "src/core/threads.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "msa/error.h"

namespace msa::core {
namespace {

TEST(Threads, ResolveAtLeastOne) {
  EXPECT_GE(resolve_threads(0), 1);
  EXPECT_GE(resolve_threads(-3), 1);
  EXPECT_EQ(resolve_threads(5), 5);
}

TEST(Threads, EveryTaskRunsOnceOnAValidWorker) {
  for (const int threads : {1, 2, 3, 7, 16}) {
    for (const std::int64_t tasks : {0, 1, 2, 6, 7, 8, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
      std::atomic<int> bad_workers{0};
      parallel_for(threads, tasks, [&](std::int64_t task, int worker) {
        runs[static_cast<std::size_t>(task)].fetch_add(1);
        if (worker < 0 || worker >= threads) bad_workers.fetch_add(1);
      });
      for (const auto& count : runs) ASSERT_EQ(count.load(), 1) << threads << " threads, " << tasks << " tasks";
      EXPECT_EQ(bad_workers.load(), 0);
    }
  }
}

TEST(Threads, AWorkerRunsOneTaskAtATime) {
  // Workspace is handed out by worker id, so two tasks must never hold the same one.
  std::vector<std::atomic<int>> busy(7);
  std::atomic<int> clashes{0};
  parallel_for(7, 500, [&](std::int64_t, int worker) {
    if (busy[static_cast<std::size_t>(worker)].fetch_add(1) != 0) clashes.fetch_add(1);
    busy[static_cast<std::size_t>(worker)].fetch_sub(1);
  });
  EXPECT_EQ(clashes.load(), 0);
}

TEST(Threads, NegativeCountsOfTasksDoNothing) {
  parallel_for(2, -1, [](std::int64_t, int) { FAIL(); });
}

TEST(Threads, TheFirstExceptionIsRethrown) {
  for (const int threads : {1, 2, 7}) {
    std::atomic<int> runs{0};
    try {
      parallel_for(threads, 100, [&](std::int64_t task, int) {
        runs.fetch_add(1);
        if (task == 3) throw Error("task 3");
      });
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()), "task 3");
    }
    EXPECT_GE(runs.load(), 4);
  }
}

TEST(Threads, AnyExceptionTypeComesOut) {
  EXPECT_THROW(parallel_for(3, 10, [](std::int64_t, int) { throw std::out_of_range("x"); }), std::out_of_range);
}

TEST(Threads, NestedCallsFinish) {
  std::atomic<int> runs{0};
  parallel_for(2, 4, [&](std::int64_t, int) { parallel_for(2, 5, [&](std::int64_t, int) { runs.fetch_add(1); }); });
  EXPECT_EQ(runs.load(), 20);
}

}  // namespace
}  // namespace msa::core
