// SPDX-License-Identifier: Apache-2.0
// See file_io.h.
#include "src/model/files/file_io.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "msa/error.h"
#include "src/model/files/quote.h"

namespace msa::files {
namespace {

[[noreturn]] void fail(const std::string& what, const std::filesystem::path& path, int error_number) {
  throw Error("cannot " + what + " " + quote(path.string()) + ": " + std::strerror(error_number));
}

/// Opens a regular file and reports its size. O_NONBLOCK: opening a pipe would otherwise wait for a writer.
int open_regular(const std::filesystem::path& path, std::size_t* size) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) fail("open", path, errno);
  struct stat status = {};
  if (::fstat(descriptor, &status) != 0) {
    const int error_number = errno;
    ::close(descriptor);
    fail("examine", path, error_number);
  }
  if (!S_ISREG(status.st_mode)) {
    ::close(descriptor);
    throw Error("cannot read " + quote(path.string()) + ": not a regular file");
  }
  *size = static_cast<std::size_t>(status.st_size);
  return descriptor;
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  const int descriptor = open_regular(path, &size_);
  if (size_ != 0) {  // mapping nothing is an error to the kernel, an empty file is not one to us
    void* const address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
    const int error_number = errno;
    ::close(descriptor);
    if (address == MAP_FAILED) fail("map", path, error_number);
    data_ = static_cast<const std::byte*>(address);
  } else {
    ::close(descriptor);
  }
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::string read_text_file(const std::filesystem::path& path, std::size_t max_bytes) {
  std::size_t size = 0;
  const int descriptor = open_regular(path, &size);
  std::string text;
  std::string problem;
  if (size > max_bytes) {
    problem = std::to_string(size) + " bytes, the limit is " + std::to_string(max_bytes);
  } else {
    text.resize(size);
    std::size_t filled = 0;
    while (filled < size && problem.empty()) {
      const ssize_t count = ::read(descriptor, text.data() + filled, size - filled);
      if (count > 0) {
        filled += static_cast<std::size_t>(count);
      } else if (count == 0) {
        problem = "it shrank while being read";
      } else if (errno != EINTR) {
        problem = std::strerror(errno);
      }
    }
  }
  ::close(descriptor);
  if (!problem.empty()) throw Error("cannot read " + quote(path.string()) + ": " + problem);
  return text;
}

AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)) {
  static std::atomic<unsigned> counter{0};
  do {  // O_EXCL: a name someone else holds is never taken over
    temporary_ = path_.string() + ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(counter++);
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (descriptor_ < 0 && errno == EEXIST);
  if (descriptor_ < 0) {
    temporary_.clear();
    fail("create a temporary file beside", path_, errno);
  }
}

AtomicFile::AtomicFile(AtomicFile&& other) noexcept
    : path_(std::move(other.path_)),
      temporary_(std::exchange(other.temporary_, {})),
      descriptor_(std::exchange(other.descriptor_, -1)) {}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  constexpr std::size_t kLargestWrite = std::size_t{1} << 30;  // the kernel takes less than 2 GiB a call
  while (!bytes.empty()) {
    const ssize_t count = ::write(descriptor_, bytes.data(), std::min(bytes.size(), kLargestWrite));
    if (count < 0) {
      if (errno == EINTR) continue;
      fail("write", path_, errno);
    }
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
}

void AtomicFile::write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }

void AtomicFile::finish() {
  if (descriptor_ < 0) return;
  const bool flushed = ::fsync(descriptor_) == 0;
  const int flush_error = errno;
  const bool closed = ::close(std::exchange(descriptor_, -1)) == 0;
  if (!flushed) fail("write", path_, flush_error);
  if (!closed) fail("write", path_, errno);
}

void AtomicFile::commit() {
  finish();
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("rename the finished file to", path_, errno);
  temporary_.clear();
  // The rename itself lasts only when the directory is on the device too. Some file systems refuse; the data is safe.
  const std::filesystem::path directory = path_.has_parent_path() ? path_.parent_path() : ".";
  const int descriptor = ::open(directory.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor >= 0) {
    ::fsync(descriptor);
    ::close(descriptor);
  }
}

void write_text_file(const std::filesystem::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

}  // namespace msa::files
