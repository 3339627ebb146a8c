// SPDX-License-Identifier: Apache-2.0
// See safetensors.h: header checks, the checkpoint directory, the writers.
#include "src/model/files/safetensors.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "msa/error.h"
#include "src/model/files/file_io.h"
#include "src/model/files/json.h"
#include "src/model/files/quote.h"

namespace msa::files {
namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::size_t kHeaderAlignment = 8;  // of the data behind the header; an 8-byte element is the widest
constexpr std::size_t kMaxRank = 32;
constexpr std::size_t kMaxIndexBytes = 256'000'000;
constexpr char kMetadataKey[] = "__metadata__";
constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";

struct DTypeRow {
  DType dtype;
  const char* name;
  std::size_t size;
};
constexpr std::array<DTypeRow, 15> kDTypes = {{{DType::kBool, "BOOL", 1},
                                               {DType::kU8, "U8", 1},
                                               {DType::kI8, "I8", 1},
                                               {DType::kF8E4M3, "F8_E4M3", 1},
                                               {DType::kF8E5M2, "F8_E5M2", 1},
                                               {DType::kU16, "U16", 2},
                                               {DType::kI16, "I16", 2},
                                               {DType::kF16, "F16", 2},
                                               {DType::kBf16, "BF16", 2},
                                               {DType::kU32, "U32", 4},
                                               {DType::kI32, "I32", 4},
                                               {DType::kF32, "F32", 4},
                                               {DType::kU64, "U64", 8},
                                               {DType::kI64, "I64", 8},
                                               {DType::kF64, "F64", 8}}};

const DTypeRow& dtype_row(DType dtype) {
  const auto index = static_cast<std::size_t>(dtype);
  if (index >= kDTypes.size()) throw Error("unknown dtype number " + std::to_string(index));
  return kDTypes[index];
}

std::uint64_t read_length(std::span<const std::byte> file) {
  std::uint64_t length = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;) length = length << 8 | std::to_integer<std::uint64_t>(file[i]);
  return length;
}

/// An array of non-negative integers.
std::vector<std::int64_t> read_integers(const Json& entry, const char* key, const std::string& where) {
  const Json* const values = find_value(entry, key);
  if (values == nullptr || !values->is_array()) throw Error(where + ": " + key + " must be an array");
  if (values->size() > kMaxRank) {
    throw Error(where + ": " + key + " has " + std::to_string(values->size()) + " entries, the limit is " +
                std::to_string(kMaxRank));
  }
  std::vector<std::int64_t> result;
  for (const Json& value : *values) {
    if (!value.is_number_unsigned() ||
        value.get<std::uint64_t>() > std::uint64_t{std::numeric_limits<std::int64_t>::max()}) {
      throw Error(where + ": " + key + " must hold non-negative integers, not " + quote(value.dump()));
    }
    result.push_back(value.get<std::int64_t>());
  }
  return result;
}

TensorInfo read_tensor(const std::string& name, const Json& entry, std::uint64_t data_begin, std::uint64_t data_bytes,
                       const std::string& origin) {
  const std::string where = origin + ": tensor " + quote(name);
  if (!entry.is_object()) throw Error(where + ": its entry must be an object");
  TensorInfo tensor;
  tensor.name = name;
  const std::string dtype = read_string(entry, "dtype", "", where);
  const std::optional<DType> known = parse_dtype(dtype);
  if (!known) throw Error(where + ": dtype " + quote(dtype) + " is not supported");
  tensor.dtype = *known;
  tensor.shape = read_integers(entry, "shape", where);
  const std::vector<std::int64_t> offsets = read_integers(entry, "data_offsets", where);
  if (offsets.size() != 2 || offsets[0] > offsets[1]) throw Error(where + ": data_offsets must be [begin, end]");
  if (static_cast<std::uint64_t>(offsets[1]) > data_bytes) {
    throw Error(where + ": data_offsets end at " + std::to_string(offsets[1]) + ", the file holds " +
                std::to_string(data_bytes) + " bytes of data");
  }
  std::uint64_t expected = 0;
  try {
    expected = tensor.byte_count();
  } catch (const Error& error) {
    throw Error(origin + ": " + error.what());
  }
  if (static_cast<std::uint64_t>(offsets[1] - offsets[0]) != expected) {
    throw Error(where + ": its shape and dtype take " + std::to_string(expected) + " bytes, data_offsets cover " +
                std::to_string(offsets[1] - offsets[0]));
  }
  tensor.begin = data_begin + static_cast<std::uint64_t>(offsets[0]);
  tensor.end = data_begin + static_cast<std::uint64_t>(offsets[1]);
  return tensor;
}

Metadata read_metadata(const Json& entry, const std::string& origin) {
  if (!entry.is_object()) throw Error(origin + ": __metadata__ must be an object");
  Metadata metadata;
  for (const auto& [key, value] : entry.items()) {
    if (!value.is_string()) throw Error(origin + ": __metadata__ entry " + quote(key) + " must be a string");
    metadata[key] = value.get<std::string>();
  }
  return metadata;
}

/// The 8 length bytes and the padded JSON header.
std::string build_header(std::span<const TensorSpec> tensors, const Metadata& metadata, const std::string& origin) {
  Json header = Json::object();
  if (!metadata.empty()) header[kMetadataKey] = metadata;
  auto& members = static_cast<Json::object_t::Container&>(header.get_ref<Json::object_t&>());
  std::set<std::string_view> names;
  std::uint64_t offset = 0;
  for (const TensorSpec& tensor : tensors) {
    if (tensor.name == kMetadataKey || tensor.name.empty()) {
      throw Error(origin + ": " + quote(tensor.name) + " cannot name a tensor");
    }
    if (!names.insert(tensor.name).second) throw Error(origin + ": duplicate tensor name " + quote(tensor.name));
    const std::uint64_t end = offset + tensor.byte_count();
    Json entry = {{"dtype", dtype_name(tensor.dtype)}, {"shape", tensor.shape}, {"data_offsets", {offset, end}}};
    members.emplace_back(tensor.name, std::move(entry));  // names are known to differ: no linear search
    offset = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    throw Error(origin + ": a tensor name or metadata entry is not valid UTF-8");
  }
  while ((kLengthBytes + text.size()) % kHeaderAlignment != 0) text += ' ';
  if (text.size() > kMaxHeaderBytes) throw Error(origin + ": the header would pass the format's limit of 100 MB");
  std::string out;
  for (std::size_t i = 0; i < kLengthBytes; ++i) out += static_cast<char>(text.size() >> (8 * i) & 0xff);
  return out + text;
}

/// A complete file under its temporary name.
AtomicFile write_unnamed(const std::filesystem::path& path, std::span<const TensorSpec> tensors, std::size_t first,
                         const TensorSource& source, const Metadata& metadata) {
  const std::string origin = quote(path.string());
  const std::string header = build_header(tensors, metadata, origin);
  AtomicFile file(path);
  file.write(header);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::span<const std::byte> bytes = source(first + i);
    if (bytes.size() != tensors[i].byte_count()) {
      throw Error(origin + ": tensor " + quote(tensors[i].name) + " was given " + std::to_string(bytes.size()) +
                  " bytes, its shape and dtype take " + std::to_string(tensors[i].byte_count()));
    }
    file.write(bytes);
  }
  file.finish();
  return file;
}

std::string shard_name(std::size_t index, std::size_t count) {
  char name[64];
  std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", index + 1, count);
  return name;
}

bool is_shard_name(const std::string& name) {
  std::size_t index = 0;
  std::size_t count = 0;
  return std::sscanf(name.c_str(), "model-%zu-of-%zu.safetensors", &index, &count) == 2 && index >= 1 &&
         name == shard_name(index - 1, count);
}

/// A shard's name as the index gives it must stay inside the directory on every system.
void check_plain_name(const std::string& name, const std::string& origin) {
  if (name.empty() || name == "." || name == ".." || name.find_first_of("/\\") != std::string::npos ||
      name.find('\0') != std::string::npos) {
    throw Error(origin + ": shard " + quote(name) + " must be a plain file name inside the directory");
  }
}

}  // namespace

std::size_t dtype_size(DType dtype) { return dtype_row(dtype).size; }

const char* dtype_name(DType dtype) { return dtype_row(dtype).name; }

std::optional<DType> parse_dtype(std::string_view name) {
  for (const DTypeRow& row : kDTypes) {
    if (name == row.name) return row.dtype;
  }
  return std::nullopt;
}

std::int64_t TensorSpec::element_count() const {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(count, extent, &count)) {
      throw Error("tensor " + quote(name) + ": its shape is negative or overflows");
    }
  }
  return count;
}

std::uint64_t TensorSpec::byte_count() const {
  std::int64_t bytes = 0;
  if (__builtin_mul_overflow(element_count(), static_cast<std::int64_t>(dtype_size(dtype)), &bytes)) {
    throw Error("tensor " + quote(name) + ": its size overflows");
  }
  return static_cast<std::uint64_t>(bytes);
}

SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& origin) {
  if (file.size() < kLengthBytes) throw Error(origin + ": too short for a safetensors file");
  const std::uint64_t length = read_length(file);
  if (length > kMaxHeaderBytes || length > file.size() - kLengthBytes) {
    throw Error(origin + ": header length " + std::to_string(length) + " passes the file's end or the limit of " +
                std::to_string(kMaxHeaderBytes) + "; not a safetensors file, or cut short");
  }
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kLengthBytes, length);
  if (text.empty() || text.front() != '{') throw Error(origin + ": the header must start with '{'");
  const Json header = parse_json(text, origin, {.max_depth = 4, .max_values = 8'000'000});

  SafetensorsHeader result;
  const std::uint64_t data_begin = kLengthBytes + length;
  const std::uint64_t data_bytes = file.size() - data_begin;
  for (const auto& [name, entry] : header.items()) {
    if (name == kMetadataKey) {
      result.metadata = read_metadata(entry, origin);
    } else {
      result.tensors.push_back(read_tensor(name, entry, data_begin, data_bytes, origin));
    }
  }
  std::sort(result.tensors.begin(), result.tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::uint64_t expected = data_begin;
  for (const TensorInfo& tensor : result.tensors) {
    if (tensor.begin != expected) {
      throw Error(origin + ": tensor " + quote(tensor.name) + " starts at data byte " +
                  std::to_string(tensor.begin - data_begin) +
                  (tensor.begin < expected ? ", inside" : ", behind a hole after") + " the data that ends at " +
                  std::to_string(expected - data_begin));
    }
    expected = tensor.end;
  }
  if (expected != file.size()) {
    throw Error(origin + ": " + std::to_string(file.size() - expected) + " bytes at the end belong to no tensor");
  }
  return result;
}

struct SafetensorsFile::State {
  std::filesystem::path path;
  MappedFile file;
  SafetensorsHeader header;
  std::unordered_map<std::string_view, const TensorInfo*> by_name;  // views into header
};

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  MappedFile file(path);
  SafetensorsHeader header = parse_safetensors(file.bytes(), quote(path.string()));
  auto state = std::make_shared<State>(State{path, std::move(file), std::move(header), {}});
  for (const TensorInfo& tensor : state->header.tensors) state->by_name.emplace(tensor.name, &tensor);
  return SafetensorsFile(std::move(state));
}

const TensorInfo* SafetensorsFile::find(std::string_view name) const {
  const auto found = state_->by_name.find(name);
  return found == state_->by_name.end() ? nullptr : found->second;
}

const TensorInfo& SafetensorsFile::get(std::string_view name) const {
  const TensorInfo* const tensor = find(name);
  if (tensor == nullptr) throw Error(quote(path().string()) + ": no tensor named " + quote(name));
  return *tensor;
}

std::span<const std::byte> SafetensorsFile::bytes(const TensorInfo& tensor) const {
  const std::span<const std::byte> file = state_->file.bytes();
  if (tensor.begin > tensor.end || tensor.end > file.size()) {
    throw Error(quote(path().string()) + ": tensor " + quote(tensor.name) + " is not of this file");
  }
  return file.subspan(tensor.begin, tensor.end - tensor.begin);
}

const std::vector<TensorInfo>& SafetensorsFile::tensors() const { return state_->header.tensors; }

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> names;
  for (const TensorInfo& tensor : tensors()) names.push_back(tensor.name);
  std::sort(names.begin(), names.end());
  return names;
}

const Metadata& SafetensorsFile::metadata() const { return state_->header.metadata; }

const std::filesystem::path& SafetensorsFile::path() const { return state_->path; }

CheckpointReader CheckpointReader::open(const std::filesystem::path& directory) {
  CheckpointReader reader;
  reader.directory_ = directory;
  std::error_code ignored;
  if (std::filesystem::exists(directory / kSingleFile, ignored)) {
    reader.shards_.push_back(SafetensorsFile::open(directory / kSingleFile));
    for (const TensorInfo& tensor : reader.shards_[0].tensors()) reader.shard_of_[tensor.name] = 0;
    return reader;
  }
  const std::filesystem::path index_path = directory / kIndexFile;
  if (!std::filesystem::exists(index_path, ignored)) {
    throw Error(quote(directory.string()) + " holds neither " + kSingleFile + " nor " + kIndexFile);
  }
  const std::string origin = quote(index_path.string());
  const Json index = parse_json(read_text_file(index_path, kMaxIndexBytes), origin);
  const Json* const weight_map = find_value(index, "weight_map");
  if (weight_map == nullptr || !weight_map->is_object())
    throw Error(key_error(origin, "weight_map", "must be an object"));
  std::map<std::string, std::size_t> shard_by_file;
  for (const auto& [tensor, file] : weight_map->items()) {
    if (!file.is_string()) throw Error(origin + ": the shard of tensor " + quote(tensor) + " must be a string");
    const auto& name = file.get_ref<const std::string&>();
    auto found = shard_by_file.find(name);
    if (found == shard_by_file.end()) {
      check_plain_name(name, origin);
      reader.shards_.push_back(SafetensorsFile::open(directory / name));
      found = shard_by_file.emplace(name, reader.shards_.size() - 1).first;
    }
    if (reader.shards_[found->second].find(tensor) == nullptr) {
      throw Error(origin + ": tensor " + quote(tensor) + " is not in its shard " + quote(name));
    }
    reader.shard_of_[tensor] = found->second;
  }
  return reader;
}

const TensorInfo* CheckpointReader::find(std::string_view name) const {
  const auto found = shard_of_.find(name);
  return found == shard_of_.end() ? nullptr : shards_[found->second].find(name);
}

const TensorInfo& CheckpointReader::get(std::string_view name) const {
  const TensorInfo* const tensor = find(name);
  if (tensor == nullptr) throw Error("checkpoint " + quote(directory_.string()) + ": no tensor named " + quote(name));
  return *tensor;
}

std::span<const std::byte> CheckpointReader::bytes(std::string_view name) const {
  const TensorInfo& tensor = get(name);
  return shards_[shard_of_.find(name)->second].bytes(tensor);
}

std::vector<std::string> CheckpointReader::names() const {
  std::vector<std::string> names;
  for (const auto& [name, shard] : shard_of_) names.push_back(name);
  return names;
}

std::uint64_t CheckpointReader::total_bytes() const {
  std::uint64_t total = 0;
  for (const auto& [name, shard] : shard_of_) {
    const TensorInfo* const tensor = shards_[shard].find(name);
    total += tensor->end - tensor->begin;
  }
  return total;
}

void write_safetensors(const std::filesystem::path& path, std::span<const TensorSpec> tensors,
                       const TensorSource& source, const Metadata& metadata) {
  write_unnamed(path, tensors, 0, source, metadata).commit();
}

void write_checkpoint(const std::filesystem::path& directory, std::span<const TensorSpec> tensors,
                      const TensorSource& source, const Metadata& metadata, std::uint64_t max_shard_bytes) {
  Metadata full_metadata = metadata;
  full_metadata.emplace("format", "pt");

  // A tensor larger than a shard gets one of its own.
  std::vector<std::size_t> first_of_shard = {0};
  std::set<std::string_view> names;
  std::uint64_t shard_bytes = 0;
  std::uint64_t total_bytes = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!names.insert(tensors[i].name).second) {
      throw Error("checkpoint " + quote(directory.string()) + ": duplicate tensor name " + quote(tensors[i].name));
    }
    const std::uint64_t bytes = tensors[i].byte_count();
    if (i != first_of_shard.back() && bytes > max_shard_bytes - std::min(shard_bytes, max_shard_bytes)) {
      first_of_shard.push_back(i);
      shard_bytes = 0;
    }
    shard_bytes += bytes;
    total_bytes += bytes;
  }
  const std::size_t shard_count = first_of_shard.size();
  first_of_shard.push_back(tensors.size());

  std::vector<AtomicFile> files;
  std::set<std::string> kept;
  Json weight_map = Json::object();
  for (std::size_t shard = 0; shard < shard_count; ++shard) {
    const std::string name = shard_count == 1 ? kSingleFile : shard_name(shard, shard_count);
    const std::size_t first = first_of_shard[shard];
    const std::span<const TensorSpec> part = tensors.subspan(first, first_of_shard[shard + 1] - first);
    files.push_back(write_unnamed(directory / name, part, first, source, full_metadata));
    kept.insert(name);
    auto& members = static_cast<Json::object_t::Container&>(weight_map.get_ref<Json::object_t&>());
    for (const TensorSpec& tensor : part) members.emplace_back(tensor.name, name);
  }
  if (shard_count > 1) {
    const Json index = {{"metadata", {{"total_size", total_bytes}}}, {"weight_map", std::move(weight_map)}};
    AtomicFile file(directory / kIndexFile);
    file.write(index.dump(2) + "\n");
    file.finish();
    files.push_back(std::move(file));
    kept.insert(kIndexFile);
  }
  for (AtomicFile& file : files) file.commit();

  // The index was renamed last and a reader prefers the single file, so between one form and the other the directory
  // reads as the old checkpoint or the new at every moment; only shards over shards of the same count have a window.
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    const bool ours = name == kSingleFile || name == kIndexFile || is_shard_name(name);
    if (ours && !kept.contains(name)) std::filesystem::remove(entry.path());
  }
}

}  // namespace msa::files
