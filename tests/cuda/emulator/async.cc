// SPDX-License-Identifier: Apache-2.0
// See async.h.
#include "tests/cuda/emulator/async.h"

#include <cstring>
#include <deque>
#include <random>
#include <vector>

#include "src/core/float_convert.h"
#include "src/cuda/device.cuh"

namespace msa::cuda::emulator {
namespace {

struct Copy {
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
  std::uint32_t bytes = 0, zeros = 0;  ///< zeros behind the bytes
  void run() const {
    if (bytes > 0) std::memcpy(to, from, bytes);
    std::memset(to + bytes, 0, zeros);
  }
};

/// What is in flight for one thread, oldest first.
struct ThreadState {
  std::deque<std::vector<Copy>> copies{1};  ///< groups; the last is open
  std::deque<std::vector<Copy>> stores{1};
  std::uint64_t products = 0;  ///< issued
  std::uint64_t waits = 0;     ///< for products
};

/// One matrix product of a warp, and the registers its lanes gave.
struct WarpProduct {
  Product product;
  unsigned lanes = 0;
  bool done = false;
  void* d[32];
  const std::uint32_t* a[32];
};
struct WarpState {
  std::deque<WarpProduct> products;  ///< oldest first
  std::uint64_t first = 0;           ///< number of products.front()
  std::deque<std::uint64_t> groups;  ///< number behind the last product of each committed group
  std::uint64_t waits = 0;
};

/// A copy of the copy engine, or an arrival that waits for a thread's copies.
struct InFlight {
  std::vector<Copy> copies;
  std::uint64_t* barrier = nullptr;
  std::uint32_t bytes = 0;  ///< that land at the barrier
  int thread = -1;          ///< >= 0: finish this thread's copies, then arrive
  std::size_t groups = 0;
};

struct Async {
  std::vector<ThreadState> threads;
  std::vector<WarpState> warps;
  std::deque<InFlight> in_flight;
  std::mt19937_64 random;
};
Async& state() {
  static Async instance;
  return instance;
}
ThreadState& this_thread() { return state().threads[thread_rank()]; }

void run_all(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) copy.run();
  copies.clear();
}

// A barrier word: arrivals a phase (20 bits), arrivals missing (20 bits), bytes missing (23 bits, signed), parity.
struct Barrier {
  std::uint32_t arrivals, missing;
  std::int32_t bytes;
  std::uint32_t parity;
};
constexpr std::int32_t kByteBias = 1 << 22;

Barrier read_barrier(const std::uint64_t* word, const char* what) {
  check_shared(word, 8, what);
  if (*word == ~std::uint64_t{0}) throw Fault(std::string(what) + " on a barrier that was not initialised");
  const std::uint64_t w = *word;
  return {static_cast<std::uint32_t>(w & 0xfffff), static_cast<std::uint32_t>(w >> 20 & 0xfffff),
          static_cast<std::int32_t>(w >> 40 & 0x7fffff) - kByteBias, static_cast<std::uint32_t>(w >> 63)};
}
void write_barrier(std::uint64_t* word, Barrier b) {
  if (b.missing == 0 && b.bytes == 0) {
    b.missing = b.arrivals;
    b.parity ^= 1;
  }
  *word = std::uint64_t{b.arrivals} | std::uint64_t{b.missing} << 20 |
          std::uint64_t{static_cast<std::uint32_t>(b.bytes + kByteBias)} << 40 | std::uint64_t{b.parity} << 63;
}
void land_bytes(std::uint64_t* word, std::uint32_t bytes) {
  Barrier b = read_barrier(word, "a copy's completion");
  b.bytes -= static_cast<std::int32_t>(bytes);
  write_barrier(word, b);
}

void finish(InFlight& copy) {
  if (copy.thread < 0) {
    run_all(copy.copies);
    land_bytes(copy.barrier, copy.bytes);
    return;
  }
  for (auto& group : state().threads[static_cast<std::size_t>(copy.thread)].copies) run_all(group);
  barrier_arrive(copy.barrier, 0);
}

void start(InFlight copy) {
  if (options().late_async) {
    state().in_flight.push_back(std::move(copy));
  } else {
    finish(copy);
  }
}

void check_aligned(const void* pointer, std::size_t alignment, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0) return;
  throw Fault(std::string(what) + ": not " + std::to_string(alignment) + "-byte aligned");
}

// Matrix products
// ------------------------------------------------------------------------------------------------------

bool is_one_byte(ProductType type) { return type == ProductType::kFloat8 || type == ProductType::kInt8; }

float decode(ProductType type, const std::byte* at) {
  if (type == ProductType::kInt8) return static_cast<float>(static_cast<std::int8_t>(*at));
  if (type == ProductType::kFloat8) return core::f8_to_float(static_cast<std::uint8_t>(*at));
  std::uint16_t bits = 0;
  std::memcpy(&bits, at, 2);
  return type == ProductType::kBFloat16 ? core::bf16_to_float(bits) : core::f16_to_float(bits);
}

/// An operand in shared memory as its descriptor says: element (outer, inner), inner along K.
class Operand {
 public:
  Operand(std::uint64_t descriptor, bool outer_major, ProductType type)
      : start_(static_cast<std::uint32_t>(descriptor & 0x3fff) << 4),
        leading_(static_cast<std::uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride_(static_cast<std::uint32_t>(descriptor >> 32 & 0x3fff) << 4),
        swizzle_(static_cast<Swizzle>(descriptor >> 62)),
        outer_major_(outer_major),
        type_(type),
        element_(is_one_byte(type) ? 1 : 2) {
    if ((descriptor >> 49 & 7) != 0) throw Fault("wgmma: a descriptor with a base offset is not emulated");
    width_ = swizzle_ == Swizzle::k128 ? 128 : swizzle_ == Swizzle::k64 ? 64 : swizzle_ == Swizzle::k32 ? 32 : 16;
    // The rows that a swizzle permutes among must be those of one group of eight.
    if (swizzle_ != Swizzle::kNone && (start_ / width_) % 8 != 0) throw Fault("wgmma: start inside a group of rows");
  }

  std::uint32_t address(std::uint32_t outer, std::uint32_t k) const {
    std::uint32_t offset = 0;
    if (swizzle_ == Swizzle::kNone) {
      const std::uint32_t per_brick = 16 / element_;
      offset = outer_major_
                   ? outer / per_brick * stride_ + outer % per_brick * element_ + k / 8 * leading_ + k % 8 * 16
                   : outer / 8 * stride_ + outer % 8 * 16 + k / per_brick * leading_ + k % per_brick * element_;
      return start_ + offset;
    }
    if (outer_major_) {
      const std::uint32_t per_row = width_ / element_;
      offset = outer / per_row * leading_ + outer % per_row * element_ + k / 8 * stride_ + k % 8 * width_;
    } else {
      offset = outer / 8 * stride_ + outer % 8 * width_ + k * element_;
      if (start_ % width_ + k * element_ >= width_) throw Fault("wgmma: K runs over the swizzle's row");
    }
    return swizzled(start_ + offset, swizzle_);
  }
  float at(std::uint32_t outer, std::uint32_t k) const {
    const std::byte* pointer = dynamic_shared() + address(outer, k);
    check_shared(pointer, element_, "wgmma");
    return decode(type_, pointer);
  }

 private:
  std::uint32_t start_, leading_, stride_;
  Swizzle swizzle_;
  bool outer_major_;
  ProductType type_;
  std::uint32_t element_, width_ = 0;
};

void run_product(WarpProduct& op, unsigned warp) {
  constexpr int kRows = 16;
  const Product& p = op.product;
  const int depth = is_one_byte(p.type) ? 32 : 16;
  const int columns = p.columns;
  float a[kRows][32];
  static std::vector<float> b, d;
  b.resize(static_cast<std::size_t>(depth * columns));
  d.assign(static_cast<std::size_t>(kRows * columns), 0.0f);

  if (op.a[0] != nullptr) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < 2; ++i) {
          const auto bits = static_cast<std::uint16_t>(op.a[lane][r] >> (16 * i));
          std::byte bytes[2];
          std::memcpy(bytes, &bits, 2);
          a[lane / 4 + 8 * (r % 2)][2 * (lane % 4) + 8 * (r / 2) + i] = decode(p.type, bytes);
        }
      }
    }
  } else {
    const Operand operand(p.a, p.outer_a, p.type);
    for (int row = 0; row < kRows; ++row) {
      for (int k = 0; k < depth; ++k) {
        a[row][k] = operand.at(warp % 4 * 16 + static_cast<unsigned>(row), static_cast<unsigned>(k));
      }
    }
  }
  const Operand operand(p.b, p.outer_b, p.type);
  for (int k = 0; k < depth; ++k) {
    for (int n = 0; n < columns; ++n) {
      b[static_cast<std::size_t>(k * columns + n)] = operand.at(static_cast<unsigned>(n), static_cast<unsigned>(k));
    }
  }

  const auto each = [&](auto body) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < columns / 2; ++i) {
        const int row = lane / 4 + 8 * (i / 2 % 2);
        const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        body(static_cast<std::byte*>(op.d[lane]) + 4 * i, d[static_cast<std::size_t>(row * columns + column)]);
      }
    }
  };
  // Integers are summed as floats, which hold them exactly: no more than 2^14 a product, and 2^10 products at most.
  const bool in_integers = p.type == ProductType::kInt8;
  const auto take = [in_integers](std::byte* mine, float& sum) {
    std::int32_t whole = 0;
    std::memcpy(in_integers ? static_cast<void*>(&whole) : &sum, mine, 4);
    if (in_integers) sum = static_cast<float>(whole);
  };
  const auto give = [in_integers](std::byte* mine, float& sum) {
    const auto whole = static_cast<std::int32_t>(in_integers ? sum : 0.0f);
    std::memcpy(mine, in_integers ? static_cast<const void*>(&whole) : &sum, 4);
  };
  if (p.accumulate) each(take);
  for (int row = 0; row < kRows; ++row) {
    float* sums = d.data() + row * columns;
    for (int k = 0; k < depth; ++k) {
      const float x = a[row][k];
      const float* y = b.data() + k * columns;
      for (int n = 0; n < columns; ++n) sums[n] += x * y[n];
    }
  }
  each(give);
  op.done = true;
}

}  // namespace

void reset_async(unsigned threads) {
  Async& s = state();
  s.threads.assign(threads, ThreadState{});
  s.warps.assign((threads + 31) / 32, WarpState{});
  s.in_flight.clear();
  s.random.seed(options().seed);
}

bool complete_one_copy() {
  auto& in_flight = state().in_flight;
  if (in_flight.empty()) return false;
  // The copy engine promises no order.
  const auto pick = static_cast<std::ptrdiff_t>(state().random() % in_flight.size());
  InFlight copy = std::move(in_flight[static_cast<std::size_t>(pick)]);
  in_flight.erase(in_flight.begin() + pick);
  finish(copy);
  return true;
}

void check_async_done() {
  if (!state().in_flight.empty()) throw Fault("the block ended before a copy into its shared memory did");
  for (const ThreadState& thread : state().threads) {
    for (const auto& group : thread.stores) {
      if (!group.empty()) throw Fault("the block ended before a bulk store had read its shared memory");
    }
  }
  for (const WarpState& warp : state().warps) {
    if (!warp.products.empty()) throw Fault("the block ended without a wait for a matrix product");
  }
}

void barrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  check_shared(barrier, 8, "barrier_init");
  check_aligned(barrier, 8, "barrier_init");
  if (arrivals == 0 || arrivals >= 1u << 20) throw Fault("barrier_init: bad number of arrivals");
  write_barrier(barrier, {arrivals, arrivals, 0, 0});
}

void barrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  Barrier b = read_barrier(barrier, "expect_bytes");
  b.bytes += static_cast<std::int32_t>(bytes);
  if (b.bytes >= 1 << 20) throw Fault("expect_bytes: more than 2^20 - 1 bytes in a phase");
  write_barrier(barrier, b);
}

void barrier_arrive(std::uint64_t* barrier, std::uint32_t expected_bytes) {
  if (expected_bytes > 0) barrier_expect(barrier, expected_bytes);
  Barrier b = read_barrier(barrier, "arrive");
  if (b.missing == 0) throw Fault("arrive: more arrivals than the barrier was initialised with");
  --b.missing;
  write_barrier(barrier, b);
}

void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  read_barrier(barrier, "wait");
  wait_until([barrier, parity] { return read_barrier(barrier, "wait").parity != parity; },
             "a barrier in shared memory");
}

void thread_copy(void* shared, const void* global, std::uint32_t valid) {
  check_shared(shared, 16, "copy_16");
  check_aligned(shared, 16, "copy_16");
  if (valid > 16) throw Fault("copy_16: more than 16 bytes");
  if (valid > 0) check_aligned(global, 16, "copy_16");
  const Copy copy{static_cast<std::byte*>(shared), static_cast<const std::byte*>(global), valid, 16 - valid};
  if (options().late_async) {
    this_thread().copies.back().push_back(copy);
  } else {
    copy.run();
  }
}
void thread_copy_commit() { this_thread().copies.emplace_back(); }
void thread_copy_wait(unsigned pending) {
  auto& groups = this_thread().copies;
  while (groups.size() > 1 + pending) {
    run_all(groups.front());
    groups.pop_front();
  }
}
void thread_copy_arrive(std::uint64_t* barrier) {
  read_barrier(barrier, "copy_arrive");
  InFlight arrival;
  arrival.barrier = barrier;
  arrival.thread = static_cast<int>(thread_rank());
  start(std::move(arrival));
}

void bulk_load(void* shared, const void* global, std::uint32_t bytes, std::uint64_t* barrier) {
  check_shared(shared, bytes, "bulk_load");
  check_aligned(shared, 16, "bulk_load");
  check_aligned(global, 16, "bulk_load");
  if (bytes % 16 != 0) throw Fault("bulk_load: bytes no multiple of 16");
  read_barrier(barrier, "bulk_load");
  InFlight copy;
  copy.copies.push_back({static_cast<std::byte*>(shared), static_cast<const std::byte*>(global), bytes, 0});
  copy.barrier = barrier;
  copy.bytes = bytes;
  start(std::move(copy));
}

void bulk_store(void* global, const void* shared, std::uint32_t bytes) {
  check_shared(shared, bytes, "bulk_store");
  check_aligned(shared, 16, "bulk_store");
  check_aligned(global, 16, "bulk_store");
  if (bytes % 16 != 0) throw Fault("bulk_store: bytes no multiple of 16");
  this_thread().stores.back().push_back(
      {static_cast<std::byte*>(global), static_cast<const std::byte*>(shared), bytes, 0});
}
void bulk_commit() {
  auto& groups = this_thread().stores;
  if (!options().late_async) run_all(groups.back());
  groups.emplace_back();
}
void bulk_wait_read(unsigned pending) {
  auto& groups = this_thread().stores;
  while (groups.size() > 1 + pending) {
    run_all(groups.front());
    groups.pop_front();
  }
}

void tensor_load(void* shared, const TensorMap& map, std::uint64_t* barrier, std::initializer_list<std::int32_t> at) {
  const TensorMapSpec& spec = map.spec;
  if (static_cast<int>(at.size()) != spec.rank) throw Fault("tensor_load: coordinates of another rank");
  check_aligned(shared, 128, "tensor_load");
  read_barrier(barrier, "tensor_load");
  const auto element = static_cast<std::uint32_t>(spec.element_bytes);
  const std::uint32_t row_bytes = spec.box[0] * element;
  std::uint32_t rows = 1;
  for (int d = 1; d < spec.rank; ++d) rows *= spec.box[d];
  check_shared(shared, std::size_t{rows} * row_bytes, "tensor_load");

  InFlight copy;
  copy.barrier = barrier;
  copy.bytes = rows * row_bytes;
  const auto start_offset = static_cast<std::uint32_t>(static_cast<std::byte*>(shared) - dynamic_shared());
  for (std::uint32_t row = 0; row < rows; ++row) {
    bool inside = true;
    const auto* from = static_cast<const std::byte*>(spec.data);
    std::uint32_t rest = row;
    for (int d = 1; d < spec.rank; ++d) {
      const std::int64_t c = std::int64_t{at.begin()[d]} + rest % spec.box[d];
      rest /= spec.box[d];
      inside = inside && c >= 0 && c < static_cast<std::int64_t>(spec.extents[d]);
      from += c * static_cast<std::int64_t>(spec.strides[d]);
    }
    for (std::uint32_t chunk = 0; chunk < row_bytes / 16; ++chunk) {
      const std::int64_t c0 = std::int64_t{at.begin()[0]} + chunk * 16 / element;
      const std::int64_t left = (static_cast<std::int64_t>(spec.extents[0]) - c0) * element;
      if (c0 < 0) throw Fault("tensor_load: a negative contiguous coordinate is not emulated");
      const std::uint32_t bytes = !inside || left <= 0 ? 0 : left < 16 ? static_cast<std::uint32_t>(left) : 16;
      std::byte* to = dynamic_shared() + swizzled(start_offset + row * row_bytes + chunk * 16, spec.swizzle);
      copy.copies.push_back({to, from + c0 * element, bytes, 16 - bytes});
    }
  }
  start(std::move(copy));
}

void product_issue(const Product& product, void* d, const std::uint32_t* a) {
  const unsigned rank = thread_rank();
  WarpState& warp = state().warps[rank / 32];
  const std::uint64_t number = this_thread().products++;
  if (number < warp.first) throw Fault("wgmma: the lanes of a warp do not agree");
  while (warp.products.size() <= number - warp.first) warp.products.emplace_back();
  WarpProduct& op = warp.products[number - warp.first];
  if (op.lanes == 0) op.product = product;
  if (!(op.product == product)) throw Fault("wgmma: the lanes of a warp give different operands");
  op.d[rank % 32] = d;
  op.a[rank % 32] = a;
  if (++op.lanes == 32 && !options().late_async) run_product(op, rank / 32);
}

void product_commit() {
  if (thread_rank() % 32 == 0) state().warps[thread_rank() / 32].groups.push_back(this_thread().products);
}

void product_wait(unsigned pending) {
  const unsigned rank = thread_rank();
  const std::uint64_t number = ++this_thread().waits;
  const auto finish_groups = [&](const std::uint64_t*) {
    // The first lane out of the meeting does it for all; what it finds, every lane has issued and committed.
    WarpState& warp = state().warps[rank / 32];
    if (warp.waits == number) return;
    warp.waits = number;
    while (warp.groups.size() > pending) {
      for (; warp.first < warp.groups.front(); ++warp.first) {
        WarpProduct& op = warp.products.front();
        if (op.lanes != 32) throw Fault("wgmma: not every lane of a warp takes part");
        if (!op.done) run_product(op, rank / 32);
        warp.products.pop_front();
      }
      warp.groups.pop_front();
    }
  };
  meet(0xffffffffu, "wgmma_wait", pending, finish_groups);
}

}  // namespace msa::cuda::emulator
