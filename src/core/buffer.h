// SPDX-License-Identifier: Apache-2.0
// Aligned scratch memory. A kernel asks once, for what its plan says; running out is a msa::Error that names the size.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <string>

#include "msa/error.h"

namespace msa::core {

inline constexpr std::size_t kCacheLine = 64;  // also the widest vector, AVX-512

/// `count` uninitialised elements of a trivial type, aligned to a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t count) : count_(count) {
    if (count == 0) return;
    const std::size_t bytes = (count * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
    data_.reset(static_cast<T*>(std::aligned_alloc(kCacheLine, bytes)));
    if (!data_) throw Error("out of memory: could not allocate " + std::to_string(bytes) + " bytes of workspace");
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) { return data_.get()[i]; }
  const T& operator[](std::size_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<T, Free> data_;
  std::size_t count_ = 0;
};

}  // namespace msa::core
