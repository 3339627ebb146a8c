// SPDX-License-Identifier: Apache-2.0
// How fast one and two threads move what sparse attention moves, by where it lies: a chunk's sums read and written in
// runs of 8 KiB (a query's, anywhere in the chunk), and the rows of keys and values (256 bytes of every 1 KiB).
// docs/attention.md sets its bound by these. Usage: memory_patterns
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "src/core/buffer.h"

namespace {

constexpr std::size_t kTotal = std::size_t{1} << 29;  // bytes a measurement moves
constexpr std::size_t kLine = 64;
constexpr std::size_t kRun = 8192;
constexpr std::size_t kRow = 256, kStride = 1024;

// Sixteen floats, a cache line: one register where the machine has such.
using Line = float __attribute__((vector_size(kLine)));
Line& line_at(std::byte* at) { return *reinterpret_cast<Line*>(at); }

enum class Pattern { kRunsReadAndWritten, kRowsRead };

using Memory = msa::core::Buffer<std::byte>;

// Returns bytes a second.
double move(Pattern pattern, Memory& memory) {
  std::mt19937 random(1);
  Line sum = {};
  std::size_t moved = 0;
  const auto start = std::chrono::steady_clock::now();
  while (moved < kTotal) {
    if (pattern == Pattern::kRunsReadAndWritten) {
      std::byte* run = memory.data() + random() % (memory.size() / kRun) * kRun;
      for (std::size_t i = 0; i < kRun; i += kLine) line_at(run + i) += 1;
      moved += kRun;
      continue;
    }
    for (std::size_t head = 0; head < kStride; head += kRow) {
      for (std::size_t row = head; row < memory.size(); row += kStride) {
        for (std::size_t i = 0; i < kRow; i += kLine) sum += line_at(memory.data() + row + i);
      }
    }
    moved += memory.size();
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  memory.data()[0] = static_cast<std::byte>(sum[0] > 0 ? 1 : 2);  // so that the reads are not left out
  return static_cast<double>(moved) / seconds.count();
}

double move_on(int threads, Pattern pattern, std::size_t bytes) {
  std::vector<Memory> memory;
  for (int t = 0; t < threads; ++t) memory.emplace_back(bytes);
  for (Memory& m : memory) std::fill(m.data(), m.data() + bytes, std::byte{0});
  std::vector<double> rates(memory.size());
  std::vector<std::thread> workers;
  std::atomic<int> ready{0};
  for (std::size_t t = 0; t < memory.size(); ++t) {
    workers.emplace_back([&, t] {
      for (++ready; ready < threads;) {
      }
      rates[t] = move(pattern, memory[t]);
    });
  }
  double sum = 0;
  for (std::size_t t = 0; t < workers.size(); ++t) {
    workers[t].join();
    sum += rates[t];
  }
  return sum;
}

}  // namespace

int main() {
  std::printf("GB/s of one thread, two threads; a working set each\n%10s %24s %24s\n", "MiB", "runs, read and written",
              "rows, read");
  for (const std::size_t mib : {1, 3, 6, 16, 64, 256}) {
    std::printf("%10zu", mib);
    for (const Pattern pattern : {Pattern::kRunsReadAndWritten, Pattern::kRowsRead}) {
      std::printf("%14.1f", move_on(1, pattern, mib << 20) * 1e-9);
      std::printf("%10.1f", move_on(2, pattern, mib << 20) * 1e-9);
    }
    std::printf("\n");
  }
  return 0;
}
