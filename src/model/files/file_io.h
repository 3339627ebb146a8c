// SPDX-License-Identifier: Apache-2.0
// Files as this layer uses them: read through a read-only mapping, written to a temporary neighbour that takes the
// final name only when every byte is on disk. A crash or a full disk leaves the old file as it was and no debris.
// POSIX. Tested in tests/unit/files_io_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace msa::files {

/// A whole regular file, mapped read-only; unmapped when destroyed. The file must not shrink while mapped (the kernel
/// would raise SIGBUS): checkpoints are replaced by rename, which keeps the old contents alive.
class MappedFile {
 public:
  /// Throws msa::Error when the file cannot be opened, is not a regular file, or cannot be mapped.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// The contents of a regular file of at most `max_bytes`. Throws msa::Error.
std::string read_text_file(const std::filesystem::path& path, std::size_t max_bytes);

/// Writes `path` through a temporary file in the same directory. Nothing is visible under the final name before
/// commit(); without commit() the destructor removes the temporary file.
class AtomicFile {
 public:
  /// Throws msa::Error when the temporary file cannot be created.
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&&) = delete;
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Appends. Throws msa::Error naming the file and the cause (a full disk, a quota).
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  /// Flushes the contents to the device and closes; only commit() may follow. Implied by commit().
  void finish();
  /// Gives the file its final name and flushes the directory.
  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_;  // empty once renamed
  int descriptor_ = -1;
};

/// AtomicFile, write, commit.
void write_text_file(const std::filesystem::path& path, std::string_view text);

}  // namespace msa::files
