// SPDX-License-Identifier: Apache-2.0
// See invariance.h.
#include "src/conformance/invariance.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace msa::conformance {
namespace {

std::ptrdiff_t at(std::int64_t i) { return static_cast<std::ptrdiff_t>(i); }

template <class T>
std::vector<T> rows_of(const std::vector<T>& all, std::int64_t begin, std::int64_t end, std::int64_t width) {
  if (all.empty()) return {};
  return {all.begin() + at(begin * width), all.begin() + at(end * width)};
}

// Rows [begin, end) of int32 [heads, rows, topk].
std::vector<std::int32_t> ids_of(const NaiveInputs& in, const std::vector<std::int32_t>& ids, std::int64_t begin,
                                 std::int64_t end) {
  std::vector<std::int32_t> part;
  for (std::int64_t head = 0; head < in.kv_heads; ++head) {
    const std::int64_t first = head * in.queries();
    part.insert(part.end(), ids.begin() + at((first + begin) * in.topk), ids.begin() + at((first + end) * in.topk));
  }
  return part;
}

// Query rows [begin, end) of one sequence, with its keys from the first to the last that they see.
struct Part {
  std::int64_t begin, end, key_begin, key_end;
  bool is_whole;  ///< the whole sequence: gradients of keys are comparable
};

NaiveInputs take(const NaiveInputs& in, const Part& part) {
  NaiveInputs result = in;
  result.cu_seqlens_q = {0, static_cast<std::int32_t>(part.end - part.begin)};
  result.cu_seqlens_k = {0, static_cast<std::int32_t>(part.key_end - part.key_begin)};
  const auto queries = [&](const std::vector<float>& all, std::int64_t width) {
    return rows_of(all, part.begin, part.end, width);
  };
  const auto keys = [&](const std::vector<float>& all, std::int64_t width) {
    return rows_of(all, part.key_begin, part.key_end, width);
  };
  result.q = queries(in.q, in.query_heads * in.head_dim);
  result.dout = queries(in.dout, in.query_heads * in.value_dim);
  result.dlse = queries(in.dlse, in.query_heads);
  result.q_idx = queries(in.q_idx, in.kv_heads * in.index_dim);
  result.k = keys(in.k, in.kv_heads * in.head_dim);
  result.v = keys(in.v, in.kv_heads * in.value_dim);
  result.k_idx = keys(in.k_idx, in.index_dim);
  result.blocks = ids_of(in, in.blocks, part.begin, part.end);
  return result;
}

template <class T>
double differing(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size()) return static_cast<double>(std::max(a.size(), b.size()));
  double count = 0;
  for (std::size_t i = 0; i < a.size(); ++i) count += std::memcmp(&a[i], &b[i], sizeof(T)) == 0 ? 0 : 1;
  return count;
}

class Invariance {
 public:
  Invariance(const Context& context, const NaiveInputs& in) : context_(context), in_(in) {
    blocks_ = run_select(context, in);
    for (const bool sparse : {false, true}) whole_[sparse] = run_attention(context, in, sparse);
  }

  double repeated() const {
    double count = differing(run_select(context_, in_), blocks_);
    for (const bool sparse : {false, true}) {
      const Outputs again = run_attention(context_, in_, sparse);
      const Outputs& first = whole_[sparse];
      count += differing_forward(again, first) + differing(again.dq, first.dq) + differing(again.dk, first.dk) +
               differing(again.dv, first.dv) + differing(again.dq_idx, first.dq_idx) +
               differing(again.dk_idx, first.dk_idx);
    }
    return count;
  }

  double in_pages(std::int64_t page) const {
    double count = differing(run_select(context_, in_, page), blocks_);
    for (const bool sparse : {false, true}) {
      count += differing_forward(run_attention(context_, in_, sparse, page), whole_[sparse]);
    }
    return count;
  }

  // Each sequence alone, or each in two chunks.
  double in_parts(bool chunks) const {
    double count = 0;
    for (const Part& part : parts(chunks)) {
      const NaiveInputs alone = take(in_, part);
      count += differing(run_select(context_, alone), ids_of(in_, blocks_, part.begin, part.end));
      for (const bool sparse : {false, true}) {
        count += differing_part(part, run_attention(context_, alone, sparse), whole_[sparse]);
      }
    }
    return count;
  }

 private:
  std::vector<Part> parts(bool chunks) const {
    std::vector<Part> parts;
    for (std::size_t s = 0; s + 1 < in_.cu_seqlens_q.size(); ++s) {
      const std::int64_t begin = in_.cu_seqlens_q[s], end = in_.cu_seqlens_q[s + 1];
      const std::int64_t first = in_.cu_seqlens_k[s], last = in_.cu_seqlens_k[s + 1];
      const std::int64_t middle = (begin + end) / 2;
      if (!chunks && begin < end) parts.push_back({begin, end, first, last, true});
      if (chunks && begin < middle) {
        parts.push_back({begin, middle, first, last - (end - middle), false});
        parts.push_back({middle, end, first, last, false});
      }
    }
    return parts;
  }

  // All of the forward; the KL is a mean over the batch, so its sums are compared where the batch is the same only.
  static double differing_forward(const Outputs& a, const Outputs& b) {
    return differing(a.out, b.out) + differing(a.lse, b.lse) + differing(a.lse_main, b.lse_main) +
           differing(a.lse_index, b.lse_index) + differing(std::vector{a.kl}, std::vector{b.kl});
  }

  double differing_part(const Part& part, const Outputs& actual, const Outputs& whole) const {
    const auto queries = [&](const std::vector<float>& all, std::int64_t width) {
      return rows_of(all, part.begin, part.end, width);
    };
    const auto keys = [&](const std::vector<float>& all, std::int64_t width) {
      return rows_of(all, part.key_begin, part.key_end, width);
    };
    double count = differing(actual.out, queries(whole.out, in_.query_heads * in_.value_dim)) +
                   differing(actual.lse, queries(whole.lse, in_.query_heads)) +
                   differing(actual.dq, queries(whole.dq, in_.query_heads * in_.head_dim)) +
                   differing(actual.lse_main, queries(whole.lse_main, in_.query_heads)) +
                   differing(actual.lse_index, queries(whole.lse_index, in_.kv_heads));
    if (part.is_whole) {
      count += differing(actual.dk, keys(whole.dk, in_.kv_heads * in_.head_dim)) +
               differing(actual.dv, keys(whole.dv, in_.kv_heads * in_.value_dim));
    }
    return count;
  }

  const Context& context_;
  const NaiveInputs& in_;
  std::vector<std::int32_t> blocks_;
  Outputs whole_[2];
};

}  // namespace

void check_invariance(const Context& context, const NaiveInputs& in, const std::string& name,
                      std::vector<CheckResult>& results) {
  const Invariance invariance(context, in);
  const auto add = [&](const char* what, double count) { results.push_back({what, name, count, 0, count == 0}); };
  add("bits: run again", invariance.repeated());
  add("bits: each sequence alone", invariance.in_parts(false));
  add("bits: prefill in chunks", invariance.in_parts(true));
  add("bits: keys in pages", invariance.in_pages(in.block_size));
}

}  // namespace msa::conformance
