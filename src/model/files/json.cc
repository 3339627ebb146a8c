// SPDX-License-Identifier: Apache-2.0
// See json.h. A SAX handler that builds the document itself, so that every limit is checked before memory is taken.
#include "src/model/files/json.h"

#include <cmath>
#include <limits>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "msa/error.h"
#include "src/model/files/quote.h"

namespace msa::files {
namespace {

class BoundedBuilder : public nlohmann::json_sax<Json> {
 public:
  BoundedBuilder(const std::string& origin, const JsonLimits& limits) : origin_(origin), limits_(limits) {}

  bool null() override { return add(Json(nullptr)) != nullptr; }
  bool boolean(bool value) override { return add(Json(value)) != nullptr; }
  bool number_integer(number_integer_t value) override { return add(Json(value)) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return add(Json(value)) != nullptr; }
  bool number_float(number_float_t value, const string_t&) override {
    if (!std::isfinite(value)) throw Error(origin_ + ": a number is out of range");
    return add(Json(value)) != nullptr;
  }
  bool string(string_t& value) override { return add(Json(std::move(value))) != nullptr; }
  bool binary(binary_t&) override { return false; }  // JSON text has none

  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& name) override {
    Level& level = levels_.back();
    if (!level.keys.insert(name).second) throw Error(origin_ + ": duplicate key " + quote(name));
    level.next_key = std::move(name);
    return true;
  }

  bool parse_error(std::size_t position, const std::string& near, const nlohmann::json::exception&) override {
    throw Error(origin_ + ": not valid JSON at byte " + std::to_string(position) + ", near " + quote(near));
  }

  Json take() { return std::move(root_); }

 private:
  struct Level {
    Json* container;
    std::unordered_set<std::string> keys;  // of this object so far: lookups in an ordered object would be linear
    std::string next_key;
  };

  // Objects are appended to directly: ordered_map's own insertion searches linearly for a duplicate, which `key` has
  // ruled out already; a vocabulary of 100k entries would take 10^10 steps otherwise.
  Json* add(Json&& value) {
    if (++values_ > limits_.max_values) {
      throw Error(origin_ + ": more than " + std::to_string(limits_.max_values) + " JSON values");
    }
    if (levels_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Level& level = levels_.back();
    if (level.container->is_array()) {
      level.container->get_ref<Json::array_t&>().push_back(std::move(value));
      return &level.container->back();
    }
    auto& members = level.container->get_ref<Json::object_t&>();
    static_cast<Json::object_t::Container&>(members).emplace_back(std::move(level.next_key), std::move(value));
    return &static_cast<Json::object_t::Container&>(members).back().second;
  }

  bool open(Json&& container) {
    if (static_cast<int>(levels_.size()) >= limits_.max_depth) {
      throw Error(origin_ + ": JSON nested deeper than " + std::to_string(limits_.max_depth));
    }
    Json* const added = add(std::move(container));
    levels_.push_back(Level{added, {}, {}});
    return true;
  }

  bool close() {
    levels_.pop_back();
    return true;
  }

  const std::string& origin_;
  JsonLimits limits_;
  Json root_;
  std::vector<Level> levels_;
  std::size_t values_ = 0;
};

}  // namespace

Json parse_json(std::string_view text, const std::string& origin, const JsonLimits& limits) {
  BoundedBuilder builder(origin, limits);
  if (!Json::sax_parse(text.begin(), text.end(), &builder)) throw Error(origin + ": not valid JSON");
  return builder.take();
}

const Json* find_value(const Json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

std::string key_error(const std::string& origin, std::string_view key, const std::string& what) {
  return origin + ": key " + quote(key) + " " + what;
}

std::int64_t read_int(const Json& object, const char* key, std::int64_t fallback, std::int64_t low, std::int64_t high,
                      const std::string& origin) {
  const Json* const value = find_value(object, key);
  if (value == nullptr) return fallback;
  const std::string rule = "must be an integer from " + std::to_string(low) + " to " + std::to_string(high) + ", not " +
                           quote(value->dump());
  if (!value->is_number_integer()) throw Error(key_error(origin, key, rule));
  const bool too_large = value->is_number_unsigned() &&
                         value->get<std::uint64_t>() > std::uint64_t{std::numeric_limits<std::int64_t>::max()};
  if (too_large || value->get<std::int64_t>() < low || value->get<std::int64_t>() > high) {
    throw Error(key_error(origin, key, rule));
  }
  return value->get<std::int64_t>();
}

double read_number(const Json& object, const char* key, double fallback, double low, double high,
                   const std::string& origin) {
  const Json* const value = find_value(object, key);
  if (value == nullptr) return fallback;
  const double number = value->is_number() ? value->get<double>() : std::numeric_limits<double>::quiet_NaN();
  if (!(number >= low && number <= high)) {
    throw Error(key_error(
        origin, key,
        "must be a number from " + Json(low).dump() + " to " + Json(high).dump() + ", not " + quote(value->dump())));
  }
  return number;
}

bool read_bool(const Json& object, const char* key, bool fallback, const std::string& origin) {
  const Json* const value = find_value(object, key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) throw Error(key_error(origin, key, "must be true or false, not " + quote(value->dump())));
  return value->get<bool>();
}

std::string read_string(const Json& object, const char* key, const std::string& fallback, const std::string& origin) {
  const Json* const value = find_value(object, key);
  if (value == nullptr) return fallback;
  if (!value->is_string()) throw Error(key_error(origin, key, "must be a string, not " + quote(value->dump())));
  return value->get<std::string>();
}

}  // namespace msa::files
