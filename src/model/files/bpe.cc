// SPDX-License-Identifier: Apache-2.0
// See bpe.h.
#include "src/model/files/bpe.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "msa/error.h"

namespace msa::files {
namespace {

constexpr std::size_t kMaxCachedPieces = 1 << 15;  // with the length below: some 5 MB at most
constexpr std::size_t kMaxCachedBytes = 48;        // longer pieces seldom come twice

std::uint64_t pair_key(TokenId left, TokenId right) {
  return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
}

// The heap's top has the lowest rank, and is the leftmost of equals.
constexpr auto kWorse = [](const auto& a, const auto& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
};

}  // namespace

void MergeTable::reserve(std::size_t count) { slots_.assign(std::bit_ceil(std::max<std::size_t>(count, 8) * 2), {}); }

std::size_t MergeTable::slot_of(std::uint64_t key) const {
  const std::size_t mask = slots_.size() - 1;
  // Fibonacci hashing: the product's high bits depend on every bit of the key.
  std::size_t slot = (key * 0x9e3779b97f4a7c15u) >> 20 & mask;
  while (slots_[slot].key != kEmpty && slots_[slot].key != key) slot = (slot + 1) & mask;
  return slot;
}

void MergeTable::insert(TokenId left, TokenId right, Merge merge) {
  const std::uint64_t key = pair_key(left, right);
  slots_[slot_of(key)] = {key, merge};
}

const MergeTable::Merge* MergeTable::find(TokenId left, TokenId right) const {
  const Slot& slot = slots_[slot_of(pair_key(left, right))];
  return slot.key == kEmpty ? nullptr : &slot.merge;
}

void BpeEncoder::encode(std::string_view piece, std::vector<TokenId>* out) {
  if (piece.empty()) return;
  if (const auto whole = model_.whole_pieces.find(piece); whole != model_.whole_pieces.end()) {
    out->push_back(whole->second);
    return;
  }
  const bool cacheable = piece.size() <= kMaxCachedBytes;
  if (cacheable) {
    if (const auto known = cache_.find(piece); known != cache_.end()) {
      out->insert(out->end(), known->second.begin(), known->second.end());
      return;
    }
  }
  if (piece.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
    throw Error("tokenizer: a piece of 2 GiB or more without a place to split it");
  }
  load(piece);
  merge_all();
  const std::size_t first = out->size();
  for (const Symbol& symbol : symbols_) {
    if (symbol.token != kNoToken) out->push_back(symbol.token);
  }
  if (cacheable && cache_.size() < kMaxCachedPieces) {
    cache_.emplace(piece, std::vector<TokenId>(out->begin() + static_cast<std::ptrdiff_t>(first), out->end()));
  }
}

void BpeEncoder::load(std::string_view piece) {
  symbols_.clear();
  heap_.clear();
  bool in_unknown = false;
  for (const char c : piece) {
    TokenId token = model_.byte_tokens[static_cast<unsigned char>(c)];
    const bool unknown = token == kNoToken;
    if (unknown) {
      if (!model_.unknown || (in_unknown && model_.fuse_unknown)) continue;
      token = *model_.unknown;
    }
    in_unknown = unknown;
    const auto index = static_cast<std::int32_t>(symbols_.size());
    symbols_.push_back({token, index - 1, index + 1});
  }
  if (!symbols_.empty()) symbols_.back().next = -1;
}

/// Puts the pair that starts at `left` into the heap when there is a merge for it.
void BpeEncoder::propose(std::int32_t left) {
  if (left < 0 || symbols_[static_cast<std::size_t>(left)].next < 0) return;
  const Symbol& symbol = symbols_[static_cast<std::size_t>(left)];
  const MergeTable::Merge* const merge =
      model_.merges.find(symbol.token, symbols_[static_cast<std::size_t>(symbol.next)].token);
  if (merge == nullptr) return;
  heap_.push_back({merge->rank, left, merge->merged});
  std::push_heap(heap_.begin(), heap_.end(), kWorse);
}

void BpeEncoder::merge_all() {
  for (std::size_t i = 0; i < symbols_.size(); ++i) propose(static_cast<std::int32_t>(i));
  while (!heap_.empty()) {
    std::pop_heap(heap_.begin(), heap_.end(), kWorse);
    const Candidate candidate = heap_.back();
    heap_.pop_back();
    Symbol& left = symbols_[static_cast<std::size_t>(candidate.position)];
    if (left.token == kNoToken || left.next < 0) continue;
    Symbol& right = symbols_[static_cast<std::size_t>(left.next)];
    // The pair may have changed since it was proposed. Compared by result, as the tokenizers package does it: a
    // changed pair with the same result keeps the place in the order that the old one had.
    const MergeTable::Merge* const merge = model_.merges.find(left.token, right.token);
    if (merge == nullptr || merge->merged != candidate.merged) continue;
    left.token = candidate.merged;
    right.token = kNoToken;
    left.next = right.next;
    if (left.next >= 0) symbols_[static_cast<std::size_t>(left.next)].previous = candidate.position;
    propose(left.previous);
    propose(candidate.position);
  }
}

}  // namespace msa::files
