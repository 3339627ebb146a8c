// SPDX-License-Identifier: Apache-2.0
// Byte-level byte pair encoding: a piece of text starts as its bytes, and the adjacent pair of lowest rank is merged
// until none is left. Pieces reach this code already split; see tokenizer.h. A heap of candidate pairs over a linked
// list makes a piece of n bytes O(n log n). Tested in tests/unit/files_tokenizer_test.cc,
// tests/python/test_tokenizer.py.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace msa::files {

using TokenId = std::int32_t;
inline constexpr TokenId kNoToken = -1;

/// Lets maps keyed by std::string be searched by a view, without a copy.
struct StringHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};
template <class Value>
using StringMap = std::unordered_map<std::string, Value, StringHash, std::equal_to<>>;

/// (left token, right token) -> rank and merged token, by open addressing: the one look-up of the inner loop.
class MergeTable {
 public:
  struct Merge {
    std::uint32_t rank = 0;
    TokenId merged = kNoToken;
  };
  /// Room for `count` merges.
  void reserve(std::size_t count);
  /// A repeated pair takes the later rank.
  void insert(TokenId left, TokenId right, Merge merge);
  const Merge* find(TokenId left, TokenId right) const;

 private:
  struct Slot {
    std::uint64_t key = kEmpty;
    Merge merge;
  };
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};
  std::size_t slot_of(std::uint64_t key) const;
  std::vector<Slot> slots_;  // a power of two, at most half full
};

struct BpeModel {
  std::array<TokenId, 256> byte_tokens;  // kNoToken: the vocabulary lacks the byte
  MergeTable merges;
  StringMap<TokenId> whole_pieces;  // filled when ignore_merges: pieces that are tokens as they stand
  std::optional<TokenId> unknown;   // stands for bytes the vocabulary lacks; without it they are dropped
  bool fuse_unknown = false;        // one unknown for a run of such bytes
};

/// Encodes pieces of one text, keeping scratch and a bounded memory of short pieces between them.
class BpeEncoder {
 public:
  explicit BpeEncoder(const BpeModel& model) : model_(model) {}
  /// Appends the tokens of one piece.
  void encode(std::string_view piece, std::vector<TokenId>* out);

 private:
  struct Symbol {
    TokenId token;  // kNoToken: merged into its left neighbour
    std::int32_t previous;
    std::int32_t next;  // -1: none
  };
  struct Candidate {
    std::uint32_t rank;
    std::int32_t position;
    TokenId merged;
  };
  void load(std::string_view piece);
  void propose(std::int32_t left);
  void merge_all();

  const BpeModel& model_;
  std::vector<Symbol> symbols_;
  std::vector<Candidate> heap_;
  StringMap<std::vector<TokenId>> cache_;
};

}  // namespace msa::files
