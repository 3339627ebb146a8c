// SPDX-License-Identifier: Apache-2.0
// What a warpgroup of dense attention does with an item: for 64 query rows and one tile of keys after the other
// S = Q K^T, the softmax so far and O += P V; the merge of spans; and the way out. A thread holds two rows' share of S
// and O (attention_tile.cuh). Tested in tests/cuda/dense_attention_test.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/cuda/attention_combine.cuh"
#include "src/cuda/attention_tile.cuh"
#include "src/cuda/dense_memory.cuh"
#include "src/cuda/finite_values.cuh"

namespace msa::cuda {

/// The softmax of a thread's two rows over the keys of a span so far: exponents are base 2.
struct RowState {
  float top[2] = {-infinity(), -infinity()};
  float sum[2] = {0, 0};  ///< of 2^(exponent - top)
};

/// Kinds of values that are not finite: bit 2 j + e is for column 8 j + 2 (lane % 4) + e.
struct ValueKinds {
  std::uint32_t nan = 0, plus = 0, minus = 0;

  __device__ void note(float x, int bit) {
    nan |= static_cast<std::uint32_t>(x != x) << bit;
    plus |= static_cast<std::uint32_t>(x == infinity()) << bit;
    minus |= static_cast<std::uint32_t>(x == -infinity()) << bit;
  }
  /// Those that any of the lanes of the same columns noted.
  __device__ void share() {
    for (int distance = 4; distance < kWarpSize; distance *= 2) {
      nan |= __shfl_xor_sync(kFullMask, nan, distance);
      plus |= __shfl_xor_sync(kFullMask, plus, distance);
      minus |= __shfl_xor_sync(kFullMask, minus, distance);
    }
  }
  /// A sum over such values: NaN wins, and inf - inf is NaN.
  __device__ float correct(float o, int bit) const {
    const bool is_plus = plus >> bit & 1, is_minus = minus >> bit & 1;
    if ((nan >> bit & 1) || (is_plus && is_minus)) return quiet_nan();
    return is_plus ? infinity() : is_minus ? -infinity() : o;
  }
};

/// A consumer thread and its item.
template <class T, int D, bool kWidens>
struct DenseConsumer {
  static constexpr int kKeys = static_cast<int>(kDenseTileKeys);
  using Memory = DenseMemory<D, kWidens>;

  const DenseArguments<T, kWidens>& a;
  const DenseRings<D, kWidens>& rings;
  std::byte* memory;
  std::uint32_t thread, lane, warp;  ///< of the consumers; warp 0 to 7 has rows 16 * warp ..
  DenseItem item{};
  std::int32_t* has_removed = nullptr;  ///< this item's: values were taken out
  bool has_swept = false;               ///< *has_removed says so
  bool is_idle = false;                 ///< no row of the warpgroup is one
  std::int32_t visible[2] = {0, 0};     ///< keys that a row sees

  // The item
  // ------------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ std::int32_t row_of(int half) const {
    return static_cast<std::int32_t>(warp * 16 + lane / 4) + 8 * half;
  }
  __device__ __forceinline__ std::int32_t rows() const { return item.count * a.group_size; }
  __device__ __forceinline__ std::int32_t query_of(std::int32_t row) const {
    return item.first_query + row / a.group_size;
  }
  __device__ __forceinline__ std::int32_t head_of(std::int32_t row) const {
    return item.kv_head * a.group_size + row % a.group_size;
  }
  /// Whether some row sees only a part of the tile that begins at `key`.
  __device__ __forceinline__ bool is_partial(std::int32_t key) const { return key + kKeys > item.whole; }

  __device__ __forceinline__ void begin(std::uint32_t taken) {
    item = *rings.item;
    has_removed = reinterpret_cast<std::int32_t*>(memory + Memory::kHasRemoved) + taken % 2;
    has_swept = false;
    is_idle = static_cast<std::int32_t>(warp / 4 * 64) >= rows();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      visible[h] = 0;
      if (row_of(h) >= rows() || item.sequence < 0) continue;
      const std::int32_t query = query_of(row_of(h));
      const std::int32_t position =
          a.batch.query_positions != nullptr ? a.batch.query_positions[query] : query + item.offset;
      visible[h] = max_of(0, min_of(position + 1, item.end));
    }
  }

  // A span
  // ------------------------------------------------------------------------------------------------------------

  /// The queries are free once the last tile's scores are there.
  __device__ __forceinline__ void release_keys(std::int32_t key, std::uint32_t number) const {
    rings.keys.release(number);
    if (key + kKeys >= item.end && lane == 0) ptx::arrive(rings.queries_free);
  }

  /// Waits for a tile of values, and takes out what is not finite where some row sees only a part of it: 0 * NaN is
  /// NaN. All consumers call it for the same tiles.
  __device__ __forceinline__ const std::byte* wait_values(std::int32_t key, std::uint32_t number) {
    rings.values.wait_full(number);
    std::byte* values = rings.values.tile(number);
    if (!is_partial(key)) return values;
    if (!has_swept) {
      if (thread == 0) *has_removed = 0;
      ptx::named_sync(1, kDenseConsumers);
      has_swept = true;
    }
    zero_non_finite<T, D, kKeys>(values, thread, kDenseConsumers,
                                 [&](std::uint32_t, std::int32_t, T) { *has_removed = 1; });
    ptx::fence_proxy_async();
    ptx::named_sync(1, kDenseConsumers);
    return values;
  }

  /// Takes a tile's scores into the softmax: s becomes 2^(exponent - top). Returns what earlier sums are to be
  /// multiplied by.
  __device__ __forceinline__ float2 take_scores(float (&s)[kKeys / 2], std::int32_t key, RowState& state) const {
    if (a.sign != 1.0f) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] *= a.sign;
    }
    if (is_partial(key)) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        if (key + fragment_column(i, lane) >= visible[fragment_half(i)]) s[i] = -infinity();
      }
    }
    float top[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) top[fragment_half(i)] = fmaxf(top[fragment_half(i)], s[i]);
    float factor[2], base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float raised = fmaxf(state.top[h], __fmul_rn(row_max(top[h]), a.scale_log2));
      base[h] = raised == -infinity() ? 0.0f : raised;  // nothing but -inf so far: -inf - -inf is NaN
      factor[h] = ptx::exp2_fast(state.top[h] - base[h]);
      state.top[h] = raised;
      state.sum[h] = __fmul_rn(state.sum[h], factor[h]);
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const int h = fragment_half(i);
      s[i] = ptx::exp2_fast(__fmaf_rn(s[i], a.scale_log2, -base[h]));
      state.sum[h] += s[i];
    }
    return make_float2(factor[0], factor[1]);
  }

  static __device__ __forceinline__ void pack(std::uint32_t (&p)[kKeys / 16][4], const float (&s)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) p[i / 8][i / 2 % 4] = pack_two<T>(s[i], s[i + 1]);
  }

  /// A multiplication by 1 changes nothing: it is left out where no row of the warp has a new maximum.
  static __device__ __forceinline__ void rescale(float (&o)[D / 2], const float2& factor) {
    if (__any_sync(kFullMask, factor.x != 1.0f || factor.y != 1.0f) == 0) return;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= fragment_half(i) == 0 ? factor.x : factor.y;
  }

  /// O and softmax of the keys [begin, end), begin < end; `number` is that of their first tile, and then of the next
  /// one. S of a tile is issued before O of the last, so that a softmax is taken while O's product runs.
  __device__ __forceinline__ void attend_span(float (&o)[D / 2], RowState& state, std::int32_t begin, std::int32_t end,
                                              std::uint32_t& number) {
    float s[kKeys / 2];
    std::uint32_t p[kKeys / 16][4];
    const std::byte* queries = rings.queries + warp / 4 * 64 * 128;
    rings.keys.wait_full(number);
    start_scores<T, D, kKeys>(s, queries, Memory::kQueryColumn, rings.keys.tile(number));
    ptx::wgmma_wait<0>();
    ptx::fence_registers(s);
    release_keys(begin, number);
    take_scores(s, begin, state);
    pack(p, s);
    for (std::int32_t key = begin + kKeys; key < end; key += kKeys, ++number) {
      rings.keys.wait_full(number + 1);
      start_scores<T, D, kKeys>(s, queries, Memory::kQueryColumn, rings.keys.tile(number + 1));
      const std::byte* values = wait_values(key - kKeys, number);
      start_outputs<T, D, kKeys>(o, p, values, key - kKeys > begin);
      ptx::wgmma_wait<1>();
      ptx::fence_registers(s);
      release_keys(key, number + 1);
      const float2 factor = take_scores(s, key, state);
      finish_before_here(fminf(state.sum[0], state.sum[1]));
      ptx::wgmma_wait<0>();
      ptx::fence_registers(o);
      rings.values.release(number);
      rescale(o, factor);
      pack(p, s);
    }
    const std::int32_t last = begin + (end - 1 - begin) / kKeys * kKeys;
    const std::byte* values = wait_values(last, number);
    start_outputs<T, D, kKeys>(o, p, values, last > begin);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(o);
    rings.values.release(number++);
#pragma unroll
    for (int h = 0; h < 2; ++h) state.sum[h] = row_sum(state.sum[h]);
  }

  /// Waits and releases as attend_span does, and sweeps values for the other warpgroup.
  __device__ __forceinline__ void skip_span(std::int32_t begin, std::int32_t end, std::uint32_t& number) {
    for (std::int32_t key = begin; key < end; key += kKeys, ++number) {
      rings.keys.wait_full(number);
      release_keys(key, number);
      wait_values(key, number);
      rings.values.release(number);
    }
  }

  // Values that are not finite
  // ------------------------------------------------------------------------------------------------------------

  /// Notes the kinds of every `step`-th of the values [begin, end), as they are in device memory.
  __device__ __forceinline__ void read_kinds(ValueKinds& kinds, std::int32_t begin, std::int32_t end,
                                             std::int32_t step) const {
    for (std::int32_t key = begin; key < end; key += step) {
      const std::int64_t token = a.v.token(a.batch, item.sequence, key);
      if (token < 0 || token >= a.tokens) continue;  // what is no page of the tensor is 0
      const auto* row = a.v.row(a.batch, item.sequence, key, item.kv_head) + lane % 4 * 2;
      for (int j = 0; j < D / 8; ++j) {
        kinds.note(to_float(row[8 * j]), 2 * j);
        kinds.note(to_float(row[8 * j + 1]), 2 * j + 1);
      }
    }
  }

  /// What o is where values that are not finite came in: some were taken out, and a probability too small for its
  /// type, times inf, is NaN. Which kinds a row sees tells its sum; they are read once more, where there are any.
  __device__ __forceinline__ void settle_non_finite(float (&o)[D / 2], const RowState& state, std::int32_t begin,
                                                    std::int32_t end) const {
    bool is_odd = false;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      const int h = fragment_half(i);
      const bool counts = visible[h] > begin && state.sum[h] == state.sum[h];  // else NaN came from the scores
      is_odd = is_odd || (counts && !(fabsf(o[i]) < infinity()));
    }
    is_odd = __any_sync(kFullMask, is_odd) != 0;
    if (!is_odd && !(has_swept && *has_removed != 0)) return;
    // In tiles that were not swept they would show.
    const std::int32_t from = is_odd ? begin : max_of(begin, item.whole / kKeys * kKeys);
    const std::int32_t all = max_of(from, min_of(end, item.whole));  // keys below it every row sees
    ValueKinds common;
    read_kinds(common, from + static_cast<std::int32_t>(lane / 4), all, kWarpSize / 4);
    common.share();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      ValueKinds kinds = common;
      read_kinds(kinds, all, min_of(end, visible[h]), 1);
      if (state.sum[h] != state.sum[h]) continue;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) {
        if (fragment_half(i) == h) o[i] = kinds.correct(o[i], 2 * (i / 4) + i % 2);
      }
    }
  }

  // Spans into rows
  // ------------------------------------------------------------------------------------------------------------

  /// This thread's part of the sum of the spans before, as vectors: 16 bytes a lane.
  __device__ __forceinline__ float4& total(int i) const {
    return reinterpret_cast<float4*>(memory + Memory::kTotals + warp * Memory::kWarpTotals)[i / 4 * 32 + lane];
  }

  /// o becomes a row of its span, and `state` its log-sum.
  static __device__ __forceinline__ float2 normalise(float (&o)[D / 2], const RowState& state) {
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) inverse[h] = state.sum[h] == 0.0f ? 0.0f : 1.0f / state.sum[h];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = __fmul_rn(o[i], inverse[fragment_half(i)]);
    return make_float2(state.top[0] + log2f(state.sum[0]), state.top[1] + log2f(state.sum[1]));
  }

  /// o becomes the sum of all spans so far.
  __device__ __forceinline__ void merge_span(float (&o)[D / 2], const float2& lse2, RunningWeights (&weights)[2],
                                             bool is_first) const {
    float weight[2], factor[2];
    weights[0].add(lse2.x, weight[0], factor[0]);
    weights[1].add(lse2.y, weight[1], factor[1]);
#pragma unroll
    for (int i = 0; i < D / 2; i += 4) {
      if (i % 16 == 0) __syncwarp();  // or all are loaded at once, into registers that there are not
      const float4 before = is_first ? make_float4(0, 0, 0, 0) : total(i);
      o[i] = merge(before.x, factor[0], weight[0], o[i]);
      o[i + 1] = merge(before.y, factor[0], weight[0], o[i + 1]);
      o[i + 2] = merge(before.z, factor[1], weight[1], o[i + 2]);
      o[i + 3] = merge(before.w, factor[1], weight[1], o[i + 3]);
    }
  }
  __device__ __forceinline__ void keep(const float (&o)[D / 2]) const {
#pragma unroll
    for (int i = 0; i < D / 2; i += 4) total(i) = make_float4(o[i], o[i + 1], o[i + 2], o[i + 3]);
  }

  /// A span to the workspace, for merge_spans.
  __device__ __forceinline__ void store_partial(const float (&o)[D / 2], const float2& lse2) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int32_t row = row_of(h);
      if (row >= rows()) continue;
      const std::int64_t in_chunk = query_of(row) - a.first_query;
      const std::int64_t at =
          (in_chunk * a.kv_heads * a.group_size + head_of(row)) * a.max_spans + item.first_key / a.span_keys;
      if (lane % 4 == 0) a.lse2[at] = h == 0 ? lse2.x : lse2.y;
#pragma unroll
      for (int i = 2 * h; i < D / 2; i += 4) {
        *reinterpret_cast<float2*>(a.partial + at * D + fragment_column(i, lane)) = make_float2(o[i], o[i + 1]);
      }
    }
  }

  __device__ __forceinline__ void store_out(const float (&o)[D / 2], const RunningWeights (&weights)[2]) const {
    const float inverse[2] = {weights[0].inverse(), weights[1].inverse()};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int32_t row = row_of(h);
      if (lane % 4 == 0 && row < rows()) *a.lse.at(query_of(row), head_of(row)) = weights[h].lse();
    }
    if (a.out_is_aligned) {
      T* targets[4];
#pragma unroll
      for (std::int32_t i = 0; i < 4; ++i) {
        const std::int32_t row = static_cast<std::int32_t>(warp * 16) + copied_row(i, lane);
        targets[i] = row < rows() ? a.out.at(query_of(row), head_of(row)) : nullptr;
      }
      store_rows<T, D>(o, inverse, memory + Memory::kTotals + warp * Memory::kWarpTotals, targets);
      __syncwarp();
      return;
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      const std::int32_t row = row_of(fragment_half(i));
      if (row >= rows()) continue;
      a.out.at(query_of(row), head_of(row))[fragment_column(i, lane)] = from_float<T>(o[i] * inverse[fragment_half(i)]);
    }
  }

  /// All spans of the item. A row that sees no key is 0, its log-sum -inf.
  __device__ __forceinline__ void attend_item(std::uint32_t& number) {
    float o[D / 2] = {};
    RunningWeights weights[2];
    for (std::int32_t begin = item.first_key; begin < item.end; begin += a.span_keys) {
      const std::int32_t end = item.end - begin < a.span_keys ? item.end : begin + a.span_keys;
      RowState state;
      attend_span(o, state, begin, end, number);
      settle_non_finite(o, state, begin, end);
      const float2 lse2 = normalise(o, state);
      if (a.partial != nullptr) {
        store_partial(o, lse2);
        return;
      }
      merge_span(o, lse2, weights, begin == item.first_key);
      if (end < item.end) keep(o);
    }
    store_out(o, weights);
  }
};

}  // namespace msa::cuda
