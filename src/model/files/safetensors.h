// SPDX-License-Identifier: Apache-2.0
// Safetensors files and Hugging Face checkpoint directories, read by mapping and written atomically. A file is 8 bytes
// of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes back to back; everything
// the header claims is checked against the file before a tensor is handed out, so that no later access can leave the
// mapping. Tested in tests/unit/files_safetensors_test.cc, tests/python/test_safetensors.py, tests/fuzz/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace msa::files {

/// Storage types of the format with a whole number of bytes an element. Which of them a model can compute in is the
/// model layer's business.
enum class DType { kBool, kU8, kI8, kF8E4M3, kF8E5M2, kU16, kI16, kF16, kBf16, kU32, kI32, kF32, kU64, kI64, kF64 };

/// Bytes an element.
std::size_t dtype_size(DType dtype);
/// The name in a safetensors header: "BF16".
const char* dtype_name(DType dtype);
std::optional<DType> parse_dtype(std::string_view name);

/// What a tensor is, without its data. Row-major; a scalar has an empty shape; a dimension may be 0.
struct TensorSpec {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;

  /// Throws msa::Error when a dimension is negative or the product overflows 63 bits.
  std::int64_t element_count() const;
  std::uint64_t byte_count() const;
};

struct TensorInfo : TensorSpec {
  std::uint64_t begin = 0;  // first byte, counted from the start of the file
  std::uint64_t end = 0;    // one past the last
};

using Metadata = std::map<std::string, std::string>;

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // in the order of their data
  Metadata metadata;                // the __metadata__ entry
};

inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit

/// Checks a whole file in memory against the format: header length within the file and kMaxHeaderBytes; valid JSON
/// without duplicate names; known dtypes; shapes whose product does not overflow; offsets of exactly that many bytes,
/// inside the file; data without overlap, hole or tail (the format's rule). Throws msa::Error naming `origin`.
SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& origin);

/// One mapped file. Cheap to move; spans it hands out live as long as it does.
class SafetensorsFile {
 public:
  /// Throws msa::Error as parse_safetensors, or when the file cannot be mapped.
  static SafetensorsFile open(const std::filesystem::path& path);

  /// The tensor of that name, or nullptr. The pointer lives as long as this object.
  const TensorInfo* find(std::string_view name) const;
  /// The same, a missing name being an msa::Error.
  const TensorInfo& get(std::string_view name) const;
  /// The bytes of a tensor of this file. Alignment is what the writer left: copy before treating them as numbers.
  std::span<const std::byte> bytes(const TensorInfo& tensor) const;
  const std::vector<TensorInfo>& tensors() const;
  std::vector<std::string> names() const;  // sorted
  const Metadata& metadata() const;
  const std::filesystem::path& path() const;

 private:
  struct State;
  explicit SafetensorsFile(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

/// The tensors of a Hugging Face directory: `model.safetensors`, or else the shards of `model.safetensors.index.json`.
class CheckpointReader {
 public:
  /// Throws msa::Error when neither file exists, when a shard is missing, broken, or named by anything but a plain file
  /// name (no path may leave the directory), or when a shard lacks a tensor the index places there. A tensor that a
  /// shard holds but the index does not mention is not part of the checkpoint.
  static CheckpointReader open(const std::filesystem::path& directory);

  const TensorInfo* find(std::string_view name) const;
  const TensorInfo& get(std::string_view name) const;
  std::span<const std::byte> bytes(std::string_view name) const;
  std::vector<std::string> names() const;  // sorted
  std::uint64_t total_bytes() const;
  const std::filesystem::path& directory() const { return directory_; }
  const std::vector<SafetensorsFile>& shards() const { return shards_; }

 private:
  std::filesystem::path directory_;
  std::vector<SafetensorsFile> shards_;
  std::map<std::string, std::size_t, std::less<>> shard_of_;
};

/// Gives the bytes of tensor `index` of the list being written; asked once for each, in order. The span is used before
/// the next call, so one buffer can serve all.
using TensorSource = std::function<std::span<const std::byte>(std::size_t index)>;

/// Writes one file, data in the order of `tensors`, header padded with spaces so that data starts at a multiple of 8.
/// Atomic: the old file, if any, stays until the new one is complete. Throws msa::Error on a duplicate or reserved
/// name, on bytes of the wrong length, and on a failed write (naming the file), leaving nothing behind.
void write_safetensors(const std::filesystem::path& path, std::span<const TensorSpec> tensors,
                       const TensorSource& source, const Metadata& metadata = {});

inline constexpr std::uint64_t kDefaultShardBytes = 5'000'000'000;

/// Writes a checkpoint into an existing directory: `model.safetensors` when all fits in one shard, else
/// `model-0000i-of-0000n.safetensors` and the index. No shard takes its name before all are on disk; files of an
/// earlier checkpoint in the directory that would contradict the new one are removed last. metadata gains
/// {"format": "pt"}, which the transformers package asks for. Throws as write_safetensors.
void write_checkpoint(const std::filesystem::path& directory, std::span<const TensorSpec> tensors,
                      const TensorSource& source, const Metadata& metadata = {},
                      std::uint64_t max_shard_bytes = kDefaultShardBytes);

}  // namespace msa::files
