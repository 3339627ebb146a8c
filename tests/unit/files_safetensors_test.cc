// SPDX-License-Identifier: Apache-2.0
// Safetensors: every rule of the format broken once, checkpoints with shards, and the writer's promises.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "src/model/files/safetensors.h"
#include "tests/unit/files_support.h"

namespace msa::files {
namespace {

std::string file_of(const std::string& header, const std::string& data) {
  std::string length(8, '\0');
  const std::uint64_t size = header.size();
  std::memcpy(length.data(), &size, 8);  // little endian, as every machine this runs on
  return length + header + data;
}

SafetensorsHeader parse(const std::string& file) {
  return parse_safetensors(std::as_bytes(std::span(file.data(), file.size())), "t");
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

TEST(Safetensors, ReadsWhatIsValid) {
  const std::string header = "{" + entry("b", "BF16", "[3]", "[16,22]") + "," + entry("a", "F32", "[2,2]", "[0,16]") +
                             "," + entry("empty", "I64", "[0,5]", "[16,16]") + "," +
                             entry("scalar", "F8_E5M2", "[]", "[22,23]") + ",\"__metadata__\":{\"format\":\"pt\"}}  ";
  const SafetensorsHeader parsed = parse(file_of(header, std::string(23, 'x')));
  ASSERT_EQ(parsed.tensors.size(), 4u);
  EXPECT_EQ(parsed.tensors[0].name, "a");  // by place
  EXPECT_EQ(parsed.tensors[0].begin, 8 + header.size());
  EXPECT_EQ(parsed.tensors[1].name, "empty");
  EXPECT_EQ(parsed.tensors[2].shape, std::vector<std::int64_t>{3});
  EXPECT_TRUE(parsed.tensors[3].shape.empty());
  EXPECT_EQ(parsed.metadata.at("format"), "pt");
  EXPECT_TRUE(parse(file_of("{}", "")).tensors.empty());
}

TEST(Safetensors, RefusesBrokenHeaders) {
  EXPECT_ERROR(parse("short"), "too short");
  EXPECT_ERROR(parse(std::string(8, '\xff')), "header length 18446744073709551615");
  EXPECT_ERROR(parse(file_of("{}", "").replace(0, 1, "\x03")), "header length 3");
  EXPECT_ERROR(parse(file_of("", "")), "must start with '{'");
  EXPECT_ERROR(parse(file_of(" {}", "")), "must start with '{'");
  EXPECT_ERROR(parse(file_of("{\"a\":", "")), "not valid JSON");
  EXPECT_ERROR(parse(file_of("{\"a\":3}", "")), "must be an object");
  EXPECT_ERROR(parse(file_of("{\"a\":{\"dtype\":[[[[1]]]]}}", "")), "nested deeper");
  EXPECT_ERROR(parse(file_of("{\"__metadata__\":{\"a\":1}}", "")), "must be a string");
}

TEST(Safetensors, RefusesBrokenTensors) {
  const auto one = [&](const std::string& dtype, const std::string& shape, const std::string& offsets,
                       std::size_t data_bytes) {
    return parse(file_of("{" + entry("w", dtype, shape, offsets) + "}", std::string(data_bytes, 'x')));
  };
  EXPECT_NO_THROW(one("F32", "[2]", "[0,8]", 8));
  EXPECT_ERROR(one("F4", "[2]", "[0,8]", 8), "tensor 'w': dtype 'F4' is not supported");
  EXPECT_ERROR(one("F32", "[-1]", "[0,8]", 8), "non-negative");
  EXPECT_ERROR(one("F32", "[2.0]", "[0,8]", 8), "non-negative");
  EXPECT_ERROR(one("F32", "2", "[0,8]", 8), "shape must be an array");
  EXPECT_ERROR(one("F32", "[3]", "[0,8]", 8), "take 12 bytes, data_offsets cover 8");
  EXPECT_ERROR(one("F32", "[3]", "[0,12]", 8), "the file holds 8 bytes");
  EXPECT_ERROR(one("F32", "[2]", "[8,0]", 8), "data_offsets must be [begin, end]");
  EXPECT_ERROR(one("F32", "[2]", "[0]", 8), "data_offsets must be [begin, end]");
  EXPECT_ERROR(one("F32", "[4294967296,4294967296]", "[0,8]", 8), "overflows");
  EXPECT_ERROR(one("F32", "[4611686018427387904]", "[0,8]", 8), "overflows");
  EXPECT_ERROR(one("F32", "[18446744073709551615]", "[0,8]", 8), "non-negative");
  EXPECT_ERROR(one("F32", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2]", "[0,8]", 8),
               "33 entries");
  EXPECT_ERROR(one("F32", "[2]", "[0,8]", 9), "1 bytes at the end belong to no tensor");
}

TEST(Safetensors, RefusesOverlapHoleAndDuplicates) {
  const auto two = [&](const std::string& first, const std::string& second, std::size_t bytes) {
    return parse(file_of("{" + first + "," + second + "}", std::string(bytes, 'x')));
  };
  EXPECT_ERROR(two(entry("a", "U8", "[4]", "[0,4]"), entry("b", "U8", "[4]", "[3,7]"), 7), "inside");
  EXPECT_ERROR(two(entry("a", "U8", "[4]", "[0,4]"), entry("b", "U8", "[4]", "[0,4]"), 4), "inside");
  EXPECT_ERROR(two(entry("a", "U8", "[4]", "[0,4]"), entry("b", "U8", "[4]", "[5,9]"), 9), "a hole");
  EXPECT_ERROR(two(entry("a", "U8", "[4]", "[1,5]"), entry("b", "U8", "[4]", "[5,9]"), 9), "a hole");
  EXPECT_ERROR(two(entry("a", "U8", "[4]", "[0,4]"), entry("a", "U8", "[4]", "[4,8]"), 8), "duplicate key 'a'");
}

// Values that say which tensor and which byte they are.
std::vector<std::byte> bytes_of(const TensorSpec& tensor) {
  std::vector<std::byte> bytes(tensor.byte_count());
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7 + tensor.name.size());
  return bytes;
}

void write_all(const std::filesystem::path& directory, const std::vector<TensorSpec>& tensors, std::uint64_t shard) {
  std::vector<std::byte> buffer;
  const TensorSource source = [&](std::size_t i) {
    buffer = bytes_of(tensors[i]);
    return std::span<const std::byte>(buffer);
  };
  write_checkpoint(directory, tensors, source, {}, shard);
}

const std::vector<TensorSpec> kTensors = {{"a", DType::kF32, {5, 3}},
                                          {"bb", DType::kBf16, {7}},
                                          {"ccc", DType::kI64, {}},
                                          {"dddd", DType::kBool, {0, 9}},
                                          {"eeeee", DType::kF8E4M3, {11}}};

TEST(Checkpoint, RoundTripsWithAndWithoutShards) {
  for (const std::uint64_t shard : {std::uint64_t{1}, std::uint64_t{64}, std::uint64_t{74}, kDefaultShardBytes}) {
    const TemporaryDirectory directory;
    write_all(directory.path(), kTensors, shard);
    const CheckpointReader reader = CheckpointReader::open(directory.path());
    EXPECT_EQ(reader.names(), (std::vector<std::string>{"a", "bb", "ccc", "dddd", "eeeee"}));
    EXPECT_EQ(reader.total_bytes(), 60u + 14 + 8 + 0 + 11);
    for (const TensorSpec& tensor : kTensors) {
      EXPECT_EQ(reader.get(tensor.name).shape, tensor.shape);
      EXPECT_EQ(reader.get(tensor.name).dtype, tensor.dtype);
      const auto bytes = reader.bytes(tensor.name);
      EXPECT_EQ(std::vector<std::byte>(bytes.begin(), bytes.end()), bytes_of(tensor));
    }
    EXPECT_EQ(reader.shards().size() == 1, shard == kDefaultShardBytes);
    EXPECT_EQ(reader.shards()[0].metadata().at("format"), "pt");
    EXPECT_EQ(reader.find("none"), nullptr);
    EXPECT_ERROR(reader.get("none"), "no tensor named 'none'");
  }
}

TEST(Checkpoint, RewritingRemovesTheOtherForm) {
  const TemporaryDirectory directory;
  for (const std::uint64_t shard : {std::uint64_t{1}, kDefaultShardBytes, std::uint64_t{64}}) {
    write_all(directory.path(), kTensors, shard);
    const CheckpointReader reader = CheckpointReader::open(directory.path());
    const std::size_t index_files = reader.shards().size() == 1 ? 0 : 1;
    EXPECT_EQ(directory.entry_count(), reader.shards().size() + index_files);
  }
}

TEST(Checkpoint, WriterRefusesAndLeavesNothing) {
  const TemporaryDirectory directory;
  const std::vector<std::byte> four(4);
  const TensorSource source = [&](std::size_t) { return std::span<const std::byte>(four); };
  const auto write = [&](std::vector<TensorSpec> tensors) { write_checkpoint(directory.path(), tensors, source); };
  EXPECT_ERROR(write({{"a", DType::kF32, {1}}, {"a", DType::kF32, {1}}}), "duplicate tensor name 'a'");
  EXPECT_ERROR(write({{"a", DType::kF32, {1}}, {"b", DType::kF32, {2}}}), "was given 4 bytes");
  EXPECT_ERROR(write({{"__metadata__", DType::kF32, {1}}}), "cannot name a tensor");
  EXPECT_ERROR(write({{"\xff", DType::kF32, {1}}}), "not valid UTF-8");
  EXPECT_ERROR(write({{"a", DType::kF32, {-1}}}), "negative");
  EXPECT_EQ(directory.entry_count(), 0u);
}

TEST(Checkpoint, IndexMustStayInsideAndAgree) {
  const TemporaryDirectory directory;
  EXPECT_ERROR(CheckpointReader::open(directory.path()), "holds neither");
  write_all(directory.path(), {{"a", DType::kF32, {2}}}, kDefaultShardBytes);
  std::filesystem::rename(directory.path() / "model.safetensors", directory.path() / "part.safetensors");
  const auto open_with = [&](const std::string& tensor, const std::string& shard) {
    put_file(directory.path() / "model.safetensors.index.json", "{\"weight_map\":{\"" + tensor + "\":" + shard + "}}");
    return CheckpointReader::open(directory.path());
  };
  EXPECT_NO_THROW(open_with("a", "\"part.safetensors\""));
  EXPECT_ERROR(open_with("b", "\"part.safetensors\""), "tensor 'b' is not in its shard 'part.safetensors'");
  EXPECT_ERROR(open_with("a", "\"gone.safetensors\""), "No such file");
  EXPECT_ERROR(open_with("a", "3"), "must be a string");
  for (const char* name :
       {"\"\"", "\".\"", "\"..\"", "\"../x\"", "\"/etc/passwd\"", "\"a/b\"", "\"a\\\\b\"", "\"x\\u0000\""}) {
    EXPECT_ERROR(open_with("a", name), "plain file name");
  }
  put_file(directory.path() / "model.safetensors.index.json", "{}");
  EXPECT_ERROR(CheckpointReader::open(directory.path()), "weight_map");
}

}  // namespace
}  // namespace msa::files
