// SPDX-License-Identifier: Apache-2.0
// What every generic kernel shares: where a query row stands, which tokens it sees and in which order, key tiles in
// shared memory, dot products, and sums over a warp. Everything a row adds up is added in an order that its own visible
// tokens decide: tiles of kWarp tokens of its support, ascending. Tested through the operators in tests/cuda.
#pragma once

#include "src/cuda/batch.cuh"
#include "src/cuda/generic/tensors.h"

namespace msa::cuda::generic {

// ---- elements -------------------------------------------------------------------------------------------------------

/// The switch is over a kernel parameter: the same way for all threads, and next to the load it costs nothing.
__device__ inline float load_element(const std::byte* data, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::kBFloat16: return to_float(reinterpret_cast<const BFloat16*>(data)[index]);
    case DType::kFloat16: return to_float(reinterpret_cast<const Float16*>(data)[index]);
    case DType::kFloat8E4M3: return to_float(reinterpret_cast<const Float8E4M3*>(data)[index]);
    default: return reinterpret_cast<const float*>(data)[index];
  }
}

__device__ inline void store_element(std::byte* data, DType dtype, std::int64_t index, float value) {
  switch (dtype) {
    case DType::kBFloat16: reinterpret_cast<BFloat16*>(data)[index] = from_float<BFloat16>(value); return;
    case DType::kFloat16: reinterpret_cast<Float16*>(data)[index] = from_float<Float16>(value); return;
    default: reinterpret_cast<float*>(data)[index] = value;
  }
}

__device__ inline int element_bytes(DType dtype) {
  if (dtype == DType::kFloat8E4M3) return 1;
  return dtype == DType::kFloat32 ? 4 : 2;
}

__device__ inline std::byte* row_of(const Rows& tensor, std::int64_t row, std::int64_t head) {
  return tensor.data + (row * tensor.row_stride + head * tensor.head_stride) * element_bytes(tensor.dtype);
}

/// Element [row, head] of a float32 tensor [rows, heads].
__device__ inline float& element_of(const Rows& tensor, std::int64_t row, std::int64_t head) {
  return reinterpret_cast<float*>(tensor.data)[row * tensor.row_stride + head];
}

// ---- threads --------------------------------------------------------------------------------------------------------

__device__ inline int thread_in_block() { return static_cast<int>(threadIdx.x); }
__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }

/// a * b, rounded on its own: a score that the compiler fused with the subtraction of its maximum would be another
/// number than the one whose maximum was taken, and exp of the difference could be anything when scores are huge.
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }

/// Shared memory of the block, as floats.
__device__ inline float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

// ---- the batch ------------------------------------------------------------------------------------------------------

__device__ inline BatchView view_of(const BatchPointers& pointers) {
  BatchView view;
  view.cu_seqlens_q = pointers.cu_seqlens_q;
  view.cu_seqlens_k = pointers.cu_seqlens_k;
  view.page_table = pointers.page_table;
  view.seqlens_k = pointers.seqlens_k;
  view.query_positions = pointers.query_positions;
  view.sequences = pointers.sequences;
  view.max_pages = pointers.max_pages;
  return view;
}

/// Position of row `row` of sequence s, which is also its last visible token; -1 when its numbers are not usable.
__device__ inline int query_position(const BatchView& batch, int s, std::int64_t row) {
  const int keys = batch.keys(s);
  const int position = batch.query_positions != nullptr ? batch.query_positions[row]
                                                        : keys - (batch.cu_seqlens_q[s + 1] - static_cast<int>(row));
  return position < keys ? position : -1;
}

/// Null when the page table names no page of the buffer: the token then counts as zeros, and nothing is read.
__device__ inline const std::byte* key_row(const Keys& keys, const BatchView& batch, int s, int token, int head) {
  std::int64_t offset = head * keys.head_stride;
  if (keys.page > 0) {
    const std::int64_t page = batch.page_table[std::int64_t{s} * batch.max_pages + token / keys.page];
    if (page < 0 || page >= keys.rows) return nullptr;
    offset += page * keys.page_stride + token % keys.page * keys.token_stride;
  } else {
    offset += (batch.cu_seqlens_k[s] + static_cast<std::int64_t>(token)) * keys.token_stride;
  }
  return keys.data + offset * element_bytes(keys.dtype);
}

// ---- what a row sees ------------------------------------------------------------------------------------------------

/// Walks over a row's valid ids: ascending, visible. Whatever else stands in the row counts as absent, so that no id
/// can lead to memory that is not the row's; only -1 can stand there when the ids were checked. Stops when body returns
/// false.
template <class Body>
__device__ inline void for_each_block(const BlockIds& blocks, std::int64_t group, std::int64_t row, int position,
                                      const Body& body) {
  const std::int32_t* ids = blocks.data + group * blocks.head_stride + row * blocks.row_stride;
  const int visible = position / blocks.block_size + 1;
  int last = -1;
  for (int slot = 0; slot < blocks.topk; ++slot) {
    const int id = ids[slot];
    if (id <= last || id >= visible) continue;
    last = id;
    if (!body(id)) return;
  }
}

/// The tokens a (query, group) row attends to, ascending: token(0) .. token(count - 1).
class Support {
 public:
  /// To be called by all threads of the block. `shared` holds kMaxTopk + 1 ints, and stays the support's.
  __device__ Support(const BlockIds& blocks, std::int64_t group, std::int64_t row, int position, int* shared)
      : ids_(shared), block_size_(blocks.block_size), is_dense_(blocks.data == nullptr) {
    if (is_dense_) {
      count_ = position + 1;
      return;
    }
    if (position < 0) return;
    if (threadIdx.x == 0) {
      int count = 0;
      for_each_block(blocks, group, row, position, [&](int id) {
        shared[1 + count++] = id;
        return true;
      });
      shared[0] = count;
    }
    __syncthreads();
    ids_ = shared + 1;
    const int selected = shared[0];
    if (selected == 0) return;
    // Only the local block can be partly visible, and it is the last.
    const int in_last = position + 1 - ids_[selected - 1] * block_size_;
    count_ = (selected - 1) * block_size_ + (in_last < block_size_ ? in_last : block_size_);
  }
  __device__ int count() const { return count_; }
  __device__ int token(int i) const { return is_dense_ ? i : ids_[i / block_size_] * block_size_ + i % block_size_; }

 private:
  const int* ids_;
  int block_size_;
  bool is_dense_;
  int count_ = 0;
};

// ---- tiles in shared memory -----------------------------------------------------------------------------------------

/// One row into shared memory, by one warp.
__device__ inline void load_row(float* to, const std::byte* row, DType dtype, int dim) {
  for (int d = lane_of_thread(); d < dim; d += kWarp) to[d] = load_element(row, dtype, d);
}

/// `count` key rows into shared memory, dim + 1 floats apart, by all warps of the block; row i is token_of(i). A warp
/// takes a row, so that loads are coalesced. The caller puts __syncthreads() around it.
template <class TokenOf>
__device__ inline void load_key_tile(float* tile, const Keys& keys, const BatchView& batch, int sequence, int head,
                                     int count, const TokenOf& token_of) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int i = warp_of_thread(); i < count; i += warps) {
    const std::byte* row = key_row(keys, batch, sequence, token_of(i), head);
    float* to = tile + i * (keys.dim + 1);
    for (int d = lane_of_thread(); d < keys.dim; d += kWarp) to[d] = row ? load_element(row, keys.dtype, d) : 0.0f;
  }
}

/// One thread, elements in order, fused: the same bits wherever a score is computed.
__device__ inline float dot(const float* a, const float* b, int dim) {
  float sum = 0;
  for (int d = 0; d < dim; ++d) sum = fmaf(a[d], b[d], sum);
  return sum;
}

// ---- walking over the visitors of a key tile ------------------------------------------------------------------------

/// A tile of keys of one sequence: tokens [begin, begin + count).
struct KeyTile {
  int sequence = 0;
  int begin = 0;
  int count = 0;
};

/// Tile number `slot` of the slots that key_tile_slots() counts; count 0 for the slots nobody needs.
__device__ inline KeyTile find_key_tile(const BatchView& batch, std::int64_t slot, int tile) {
  int low = 0;
  int high = batch.sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.cu_seqlens_k[middle] / tile + middle <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  KeyTile found;
  if (batch.sequences == 0) return found;
  found.sequence = low;
  found.begin = static_cast<int>(slot - batch.cu_seqlens_k[low] / tile - low) * tile;
  const int left = batch.keys(low) - found.begin;
  found.count = left < 0 ? 0 : (left < tile ? left : tile);
  return found;
}

/// Shared memory of for_each_visitors.
struct VisitorList {
  int count[kKeyWarps];
  int rows[kKeyWarps * kWarp];
};

/// Calls body(list, n) for the query rows that see a token of the tile and have its block selected (or see it at all,
/// when `blocks` is absent), ascending, in portions of at most kKeyWarps * kWarp. All threads of the block call it and
/// reach body together. Rows are tested, a thread each, and packed in order: no index, no atomics.
template <class Body>
__device__ inline void for_each_visitors(const BatchView& batch, const BlockIds& blocks, const KeyTile& tile, int group,
                                         VisitorList& list, const Body& body) {
  constexpr int kPortion = kKeyWarps * kWarp;
  const int end = batch.cu_seqlens_q[tile.sequence + 1];
  int first = batch.cu_seqlens_q[tile.sequence];
  if (batch.query_positions == nullptr) {  // rows that stand before the tile see none of it
    const int prefix = batch.keys(tile.sequence) - (end - first);
    if (prefix < tile.begin) first += tile.begin - prefix;
  }
  for (int base = first; base < end; base += kPortion) {
    const int row = base + thread_in_block();
    bool visits = false;
    if (row < end) {
      const int position = query_position(batch, tile.sequence, row);
      visits = position >= tile.begin;
      if (visits && blocks.data != nullptr) {
        const int block = tile.begin / blocks.block_size;
        visits = false;
        for_each_block(blocks, group, row, position, [&](int id) {
          visits = id == block;
          return id < block;
        });
      }
    }
    const std::uint32_t votes = __ballot_sync(0xffffffffu, visits);
    __syncthreads();  // the last portion has been read
    if (lane_of_thread() == 0) list.count[warp_of_thread()] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane_of_thread()) - 1u));
    int total = 0;
    for (int w = 0; w < kKeyWarps; ++w) {
      if (w < warp_of_thread()) before += list.count[w];
      total += list.count[w];
    }
    if (visits) list.rows[before] = row;
    __syncthreads();
    if (total > 0) body(list.rows, total);
  }
}

/// Zeros in the key rows behind the last sequence, which belong to no tile. One block of threads a (row, head).
struct ZeroTailArgs {
  Rows tensor;
  BatchPointers batch;
};
template <class = void>  // a template only so that several files may include it
__global__ void zero_tail(ZeroTailArgs args) {
  const std::int64_t row = blockIdx.x;
  if (row < args.batch.cu_seqlens_k[args.batch.sequences]) return;  // a tile's
  std::byte* to = row_of(args.tensor, row, blockIdx.y);
  for (int d = thread_in_block(); d < args.tensor.dim; d += static_cast<int>(blockDim.x))
    store_element(to, args.tensor.dtype, d, 0.0f);
}

/// Starts a kernel; under the emulator, runs it.
template <class Args>
void start(void* stream, void (*kernel)(Args), const LaunchShape& shape, const Args& args) {
  launch(dim3(static_cast<unsigned>(shape.grid_x), static_cast<unsigned>(shape.grid_y)),
         dim3(static_cast<unsigned>(shape.threads)), shape.shared_bytes, stream, kernel, args);
}

}  // namespace msa::cuda::generic
