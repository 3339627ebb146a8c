// SPDX-License-Identifier: Apache-2.0
// Mapping and atomic writing: what is not a file, what goes wrong half way, and what is left behind.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <string>
#include <utility>

#include "src/model/files/file_io.h"
#include "tests/unit/files_support.h"

namespace msa::files {
namespace {

/// Files written by this process stop at `bytes`, as on a full disk, while this lives.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    previous_handler_ = ::signal(SIGXFSZ, SIG_IGN);
    ::getrlimit(RLIMIT_FSIZE, &previous_);
    const rlimit limit = {bytes, previous_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &previous_);
    ::signal(SIGXFSZ, previous_handler_);
  }

 private:
  rlimit previous_ = {};
  void (*previous_handler_)(int) = nullptr;
};

TEST(MappedFile, MapsAndMoves) {
  const TemporaryDirectory directory;
  put_file(directory.path() / "f", "hello");
  put_file(directory.path() / "empty", "");
  MappedFile file(directory.path() / "f");
  ASSERT_EQ(file.bytes().size(), 5u);
  EXPECT_EQ(static_cast<char>(file.bytes()[4]), 'o');
  EXPECT_TRUE(MappedFile(directory.path() / "empty").bytes().empty());
  const MappedFile moved = std::move(file);
  EXPECT_EQ(moved.bytes().size(), 5u);
}

TEST(MappedFile, RefusesWhatIsNoFile) {
  const TemporaryDirectory directory;
  EXPECT_ERROR(MappedFile(directory.path()), "not a regular file");
  EXPECT_ERROR(MappedFile(directory.path() / "none"), "No such file");
  ASSERT_EQ(::mkfifo((directory.path() / "pipe").c_str(), 0600), 0);
  EXPECT_ERROR(MappedFile(directory.path() / "pipe"), "not a regular file");  // and does not wait for a writer
  EXPECT_ERROR(read_text_file(directory.path() / "pipe", 10), "not a regular file");
}

TEST(ReadTextFile, BoundsSize) {
  const TemporaryDirectory directory;
  put_file(directory.path() / "f", "12345");
  EXPECT_EQ(read_text_file(directory.path() / "f", 5), "12345");
  EXPECT_ERROR(read_text_file(directory.path() / "f", 4), "the limit is 4");
}

TEST(AtomicFile, ReplacesOnlyOnCommit) {
  const TemporaryDirectory directory;
  const auto path = directory.path() / "f";
  put_file(path, "old");
  {
    AtomicFile file(path);
    file.write("new");
    EXPECT_EQ(read_text_file(path, 100), "old");
  }
  EXPECT_EQ(read_text_file(path, 100), "old");
  EXPECT_EQ(directory.entry_count(), 1u);
  write_text_file(path, "new");
  EXPECT_EQ(read_text_file(path, 100), "new");
  EXPECT_EQ(directory.entry_count(), 1u);
}

TEST(AtomicFile, FullDiskLeavesTheOldFile) {
  const TemporaryDirectory directory;
  const auto path = directory.path() / "weights";
  put_file(path, "old");
  const FileSizeLimit limit(4096);
  EXPECT_ERROR(write_text_file(path, std::string(10'000, 'x')), "cannot write '" + path.string() + "'");
  EXPECT_EQ(read_text_file(path, 100), "old");
  EXPECT_EQ(directory.entry_count(), 1u);
}

TEST(AtomicFile, NamesAMissingDirectory) {
  EXPECT_ERROR(AtomicFile("/nonexistent/directory/f"), "/nonexistent/directory/f");
}

}  // namespace
}  // namespace msa::files
