// SPDX-License-Identifier: Apache-2.0
// Fibers and their scheduler: see emulator.h. On x86-64 a switch saves the callee-saved registers and swaps stacks,
// some ten nanoseconds; elsewhere it is swapcontext. Under a sanitizer every switch is announced to it.
#include "tests/cuda/emulator/emulator.h"

#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "tests/cuda/emulator/async.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer) && !defined(__SANITIZE_THREAD__)
#define __SANITIZE_THREAD__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#if defined(__x86_64__)
// Saves the running context's stack pointer in *save and continues the one whose stack pointer is `load`.
extern "C" void msa_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl msa_emulator_switch
.type msa_emulator_switch, @function
msa_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msa_emulator_switch, .-msa_emulator_switch
)");
#endif

namespace msa::cuda::emulator {
namespace {

// Accumulators of a thread are a few hundred bytes; sanitizers put red zones around every local.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::size_t kStackBytes = 256 * 1024;
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif
constexpr std::size_t kSharedAlignment = 1024;  // of the 128-byte swizzle
constexpr unsigned kMaxThreads = 1024;

/// A context that can be switched to: a fiber's, or the scheduler's.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  std::size_t size = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* fiber = nullptr;
#endif
};

struct Fiber {
  Context context;
  std::unique_ptr<std::byte[]> stack;
  uint3 index;
  bool done = true;
  bool (*ready)(void*) = nullptr;  ///< null: can run
  void* ready_context = nullptr;
  const char* waits_for = "";
};

/// One meeting of lanes; lives until the last of them has read it.
struct Meeting {
  unsigned mask = 0, arrived = 0, read = 0;
  const char* what = "";
  std::uint64_t values[32];
};

struct NamedBarrier {
  unsigned expected = 0, arrived = 0;
  std::uint64_t generation = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  unsigned threads = 0, live = 0;
  std::vector<std::vector<std::unique_ptr<Meeting>>> meetings;  ///< a warp
  unsigned at_barrier = 0;
  std::uint64_t barrier_generation = 0;
  NamedBarrier named[16];
  std::unique_ptr<std::byte[]> shared_memory;
  std::byte* shared = nullptr;
  std::size_t shared_bytes = 0;
  const std::function<void()>* thread = nullptr;
  std::exception_ptr error;
  Context scheduler;
  Fiber* running = nullptr;
};

Block& block() {
  static Block instance;
  return instance;
}

void switch_context(Context& from, Context& to, bool leaves_for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaves_for_good ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.fiber, 0);
#endif
  (void)leaves_for_good;
#if defined(__x86_64__)
  msa_emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
  Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  b.scheduler.bottom = bottom;
  b.scheduler.size = size;
#endif
  try {
    (*b.thread)();
  } catch (...) {
    if (!b.error) b.error = std::current_exception();
  }
  b.running->done = true;
  --b.live;
  switch_context(b.running->context, b.scheduler, true);
}

void start_fiber(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new std::byte[kStackBytes]);
  fiber.done = false;
  fiber.ready = nullptr;
#if defined(__x86_64__)
  // As msa_emulator_switch leaves a stack: six registers, then where to return to. A function starts 8 off 16 bytes.
  auto top = reinterpret_cast<std::uintptr_t>(fiber.stack.get() + kStackBytes) / 16 * 16;
  auto* words = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 8; ++i) words[i] = nullptr;
  words[6] = reinterpret_cast<void*>(&fiber_main);
  fiber.context.stack_pointer = words;
#else
  getcontext(&fiber.context.context);
  fiber.context.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.context.uc_stack.ss_size = kStackBytes;
  fiber.context.context.uc_link = nullptr;
  makecontext(&fiber.context.context, &fiber_main, 0);
#endif
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStackBytes);
  fiber.context.bottom = fiber.stack.get();
  fiber.context.size = kStackBytes;
  fiber.context.fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  if (fiber.context.fiber == nullptr) fiber.context.fiber = __tsan_create_fiber(0);
#endif
}

void run_fiber(Fiber& fiber) {
  Block& b = block();
  b.running = &fiber;
  threadIdx = fiber.index;
  switch_context(b.scheduler, fiber.context, false);
  b.running = nullptr;
}

[[noreturn]] void throw_deadlock() {
  const Block& b = block();
  std::string text = "deadlock in block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", ";
  text += std::to_string(blockIdx.z) + "):";
  const char* last = nullptr;
  for (unsigned t = 0; t < b.threads; ++t) {
    const Fiber& fiber = b.fibers[t];
    const char* state = fiber.done ? "done" : fiber.waits_for;
    if (last != nullptr && std::string(state) == last) continue;  // the first thread of each run of equal ones
    text += " thread " + std::to_string(t) + " " + (fiber.done ? "" : "waits for ") + state + ";";
    last = state;
  }
  throw Fault(text);
}

void run_block() {
  Block& b = block();
  b.live = b.threads;
  b.at_barrier = 0;
  b.error = nullptr;
  for (auto& warp : b.meetings) warp.clear();
  for (NamedBarrier& barrier : b.named) barrier = {};
  std::memset(b.shared, 0xff, b.shared_bytes);
  reset_async(b.threads);
  for (unsigned t = 0; t < b.threads; ++t) {
    Fiber& fiber = b.fibers[t];
    fiber.index.x = t % blockDim.x;
    fiber.index.y = t / blockDim.x % blockDim.y;
    fiber.index.z = t / blockDim.x / blockDim.y;
    start_fiber(fiber);
  }
  const bool reverse = options().reverse_threads;
  while (b.live > 0) {
    bool moved = false;
    for (unsigned i = 0; i < b.threads; ++i) {
      Fiber& fiber = b.fibers[reverse ? b.threads - 1 - i : i];
      if (fiber.done || (fiber.ready != nullptr && !fiber.ready(fiber.ready_context))) continue;
      fiber.ready = nullptr;
      run_fiber(fiber);
      if (b.error) std::rethrow_exception(b.error);
      moved = true;
    }
    if (!moved && !complete_one_copy()) throw_deadlock();
  }
  check_async_done();
}

}  // namespace

Options& options() {
  static Options instance;
  return instance;
}

void wait_until(bool (*ready)(void*), void* context, const char* what) {
  Block& b = block();
  Fiber& fiber = *b.running;
  fiber.ready = ready;
  fiber.ready_context = context;
  fiber.waits_for = what;
  switch_context(fiber.context, b.scheduler, false);
}

unsigned thread_rank() { return static_cast<unsigned>(block().running - block().fibers.data()); }
unsigned block_threads() { return block().threads; }
std::byte* dynamic_shared() { return block().shared; }
std::size_t dynamic_shared_bytes() { return block().shared_bytes; }

void check_shared(const void* pointer, std::size_t bytes, const char* what) {
  const Block& b = block();
  const auto* at = static_cast<const std::byte*>(pointer);
  if (at >= b.shared && at + bytes <= b.shared + b.shared_bytes) return;
  throw Fault(std::string(what) + " outside dynamic shared memory: offset " + std::to_string(at - b.shared) + ", " +
              std::to_string(bytes) + " bytes of " + std::to_string(b.shared_bytes));
}

void meet(unsigned mask, const char* what, const std::uint64_t& value,
          const std::function<void(const std::uint64_t*)>& read) {
  const unsigned rank = thread_rank();
  const unsigned bit = 1u << rank % 32;
  if ((mask & bit) == 0) throw Fault(std::string(what) + " called by a lane outside its mask");
  auto& warp = block().meetings[rank / 32];
  Meeting* meeting = nullptr;
  for (auto& open : warp) {
    // Meetings under other masks may be open beside it: lanes of one half can be ahead of the other.
    if (open->mask == mask && open->arrived != mask && (open->arrived & bit) == 0) meeting = open.get();
  }
  if (meeting == nullptr) {
    warp.push_back(std::make_unique<Meeting>());
    meeting = warp.back().get();
    meeting->mask = mask;
    meeting->what = what;
  }
  if (std::strcmp(meeting->what, what) != 0) throw Fault(std::string(what) + " meets " + meeting->what);
  meeting->values[rank % 32] = value;
  meeting->arrived |= bit;
  wait_until([meeting] { return meeting->arrived == meeting->mask; }, what);
  read(meeting->values);
  meeting->read |= bit;
  if (meeting->read == meeting->mask) {
    std::erase_if(warp, [&](const auto& open) { return open.get() == meeting; });
  }
}

void block_barrier() {
  Block& b = block();
  const std::uint64_t generation = b.barrier_generation;
  ++b.at_barrier;
  // Threads that have returned do not count, as on the device; the last to return may be what the others wait for.
  const auto passed = [&b, generation] {
    if (b.barrier_generation != generation) return true;
    if (b.at_barrier < b.live) return false;
    b.at_barrier = 0;
    ++b.barrier_generation;
    return true;
  };
  wait_until(passed, "__syncthreads");
}

void named_barrier_arrive(unsigned id, unsigned threads) {
  if (id >= 16 || threads == 0 || threads % 32 != 0) throw Fault("named barrier: bad id or thread count");
  NamedBarrier& barrier = block().named[id];
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads) throw Fault("named barrier: two thread counts at once");
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

void named_barrier_sync(unsigned id, unsigned threads) {
  NamedBarrier& barrier = block().named[id % 16];
  const std::uint64_t generation = barrier.generation;
  named_barrier_arrive(id, threads);
  wait_until([&barrier, generation] { return barrier.generation != generation; }, "a named barrier");
}

void run_grid(dim3 grid, dim3 block_size, std::size_t shared_bytes, const std::function<void()>& thread) {
  Block& b = block();
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  if (threads == 0 || threads > kMaxThreads)
    throw Fault("launch: bad block of " + std::to_string(threads) + " threads");
  if (b.fibers.empty()) b.fibers.resize(kMaxThreads);
  b.threads = threads;
  b.meetings.resize(kMaxThreads / 32);
  b.shared_bytes = shared_bytes;
  b.shared_memory.reset(new std::byte[shared_bytes + kSharedAlignment]);
  const auto start = reinterpret_cast<std::uintptr_t>(b.shared_memory.get());
  b.shared = b.shared_memory.get() + ((kSharedAlignment - start % kSharedAlignment) % kSharedAlignment);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(b.shared_memory.get(), shared_bytes + kSharedAlignment);
  ASAN_UNPOISON_MEMORY_REGION(b.shared, shared_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  b.scheduler.fiber = __tsan_get_current_fiber();
#endif
  b.thread = &thread;
  gridDim = grid;
  blockDim = block_size;

  const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
  std::vector<std::size_t> order(blocks);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::mt19937_64 random(options().seed);
  if (options().block_order == BlockOrder::kDescending) std::reverse(order.begin(), order.end());
  if (options().block_order == BlockOrder::kShuffled) std::shuffle(order.begin(), order.end(), random);
  for (const std::size_t i : order) {
    blockIdx.x = static_cast<unsigned>(i % grid.x);
    blockIdx.y = static_cast<unsigned>(i / grid.x % grid.y);
    blockIdx.z = static_cast<unsigned>(i / grid.x / grid.y);
    run_block();
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(b.shared_memory.get(), shared_bytes + kSharedAlignment);
#endif
}

}  // namespace msa::cuda::emulator
