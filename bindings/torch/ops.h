// SPDX-License-Identifier: Apache-2.0
// The torch operators msa::*, as C++ functions on at::Tensor. A call goes through torch's dispatcher, so autograd, fake
// tensors and tracing see it exactly as they see torch.ops.msa.* from Python. Tested in tests/python/test_ops*.py.
//
// Common rules. Batches are packed: tokens of all sequences one after the other, cu_seqlens_q and cu_seqlens_k int32
// [B+1] starting at 0. Floating tensors are float32, bfloat16 or float16 (q, k, v alike; q_idx and k_idx alike, but
// they may differ from q), on the CPU or all on one GPU, with any strides. Integer tensors are int32. Rows after the
// last sequence are inert. Bad input throws c10::Error (RuntimeError in Python) and names the argument. Threads:
// at::get_num_threads(). The environment variable MSA_BACKEND (auto, reference, cpu) picks the implementation for
// tensors on the CPU, for debugging. On a GPU (docs/cuda.md) the work goes to torch's current stream.
//
// query_positions, where given, is int32 [Tq]: the position of every query in its sequence, strictly ascending within a
// sequence, in place of the default "the last Lq positions". It lets a call take any sample of a sequence's rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace msa::torch_ops {

/// q_idx [Tq, kv_heads, index_dim], k_idx [Tk, index_dim] -> int32 [kv_heads, Tq, topk], ids ascending, -1 in the tail.
/// Not differentiable.
at::Tensor select_blocks(const at::Tensor& q_idx, const at::Tensor& k_idx, const at::Tensor& cu_seqlens_q,
                         const at::Tensor& cu_seqlens_k, int64_t block_size, int64_t topk, int64_t local_blocks = 1,
                         int64_t init_blocks = 0, const std::optional<at::Tensor>& query_positions = std::nullopt);

/// scores float32 [rows, blocks] -> int32 [rows, topk], the ids of each row's topk highest scores as select_blocks
/// orders them, nothing forced. Not differentiable.
at::Tensor topk_blocks(const at::Tensor& scores, int64_t topk);

/// q [Tq, query_heads, head_dim], k [Tk, kv_heads, head_dim] -> as select_blocks, by true attention mass. One dense
/// score pass. Not differentiable.
at::Tensor select_blocks_oracle(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cu_seqlens_q,
                                const at::Tensor& cu_seqlens_k, int64_t block_size, int64_t topk,
                                int64_t local_blocks = 1, int64_t init_blocks = 0,
                                std::optional<double> scale = std::nullopt,
                                const std::optional<at::Tensor>& query_positions = std::nullopt);

/// q [Tq, query_heads, head_dim], k [Tk, kv_heads, head_dim], v [Tk, kv_heads, value_dim], blocks int32
/// [kv_heads, Tq, topk] -> (out [Tq, query_heads, value_dim], lse float32 [Tq, query_heads]). Both outputs are
/// differentiable in q, k and v. scale defaults to 1/sqrt(head_dim).
std::tuple<at::Tensor, at::Tensor> sparse_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                    const at::Tensor& blocks, const at::Tensor& cu_seqlens_q,
                                                    const at::Tensor& cu_seqlens_k, int64_t block_size,
                                                    std::optional<double> scale = std::nullopt,
                                                    const std::optional<at::Tensor>& query_positions = std::nullopt);

/// The same over the whole visible prefix.
std::tuple<at::Tensor, at::Tensor> dense_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                   const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                                   std::optional<double> scale = std::nullopt,
                                                   const std::optional<at::Tensor>& query_positions = std::nullopt);

/// The KL alignment loss, float32 scalar, over the selected blocks, or the whole prefix when blocks is absent.
/// Differentiable in q_idx and k_idx only. teacher: "mean" (the paper's) or "max" over the heads of a group.
at::Tensor index_kl(const at::Tensor& q_idx, const at::Tensor& k_idx, const at::Tensor& q, const at::Tensor& k,
                    const std::optional<at::Tensor>& blocks, const at::Tensor& cu_seqlens_q,
                    const at::Tensor& cu_seqlens_k, int64_t block_size,
                    std::optional<double> index_scale = std::nullopt, std::optional<double> scale = std::nullopt,
                    std::string_view teacher = "mean", const std::optional<at::Tensor>& query_positions = std::nullopt);

/// (block_recall, score_recall), float32 scalars; NaN when no row sees more than topk blocks. Not differentiable.
std::tuple<at::Tensor, at::Tensor> selection_recall(const at::Tensor& q, const at::Tensor& k, const at::Tensor& blocks,
                                                    const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                                    int64_t block_size, std::optional<double> scale = std::nullopt,
                                                    const std::optional<at::Tensor>& query_positions = std::nullopt);

// The paged forms: keys lie in pages ([pages, page, ...] in place of [Tk, ...]); page_table int32 [B, max_pages] lists
// each sequence's pages, -1 behind them, and seqlens_k int32 [B] counts its keys. They equal the packed forms bit for
// bit and have no backward: asking for one throws.

at::Tensor select_blocks_paged(const at::Tensor& q_idx, const at::Tensor& k_idx_pages, const at::Tensor& cu_seqlens_q,
                               const at::Tensor& page_table, const at::Tensor& seqlens_k, int64_t block_size,
                               int64_t topk, int64_t local_blocks = 1, int64_t init_blocks = 0,
                               const std::optional<at::Tensor>& query_positions = std::nullopt);

at::Tensor select_blocks_oracle_paged(const at::Tensor& q, const at::Tensor& k_pages, const at::Tensor& cu_seqlens_q,
                                      const at::Tensor& page_table, const at::Tensor& seqlens_k, int64_t block_size,
                                      int64_t topk, int64_t local_blocks = 1, int64_t init_blocks = 0,
                                      std::optional<double> scale = std::nullopt,
                                      const std::optional<at::Tensor>& query_positions = std::nullopt);

std::tuple<at::Tensor, at::Tensor> sparse_attention_paged(
    const at::Tensor& q, const at::Tensor& k_pages, const at::Tensor& v_pages, const at::Tensor& blocks,
    const at::Tensor& cu_seqlens_q, const at::Tensor& page_table, const at::Tensor& seqlens_k, int64_t block_size,
    std::optional<double> scale = std::nullopt, const std::optional<at::Tensor>& query_positions = std::nullopt);

std::tuple<at::Tensor, at::Tensor> dense_attention_paged(
    const at::Tensor& q, const at::Tensor& k_pages, const at::Tensor& v_pages, const at::Tensor& cu_seqlens_q,
    const at::Tensor& page_table, const at::Tensor& seqlens_k, std::optional<double> scale = std::nullopt,
    const std::optional<at::Tensor>& query_positions = std::nullopt);

// What autograd calls on the way back. Gradients have the shape and dtype of their inputs, contiguous. dout and dlse
// may be absent, which means zero. Not differentiable again.

std::tuple<at::Tensor, at::Tensor, at::Tensor> sparse_attention_backward(
    const std::optional<at::Tensor>& dout, const std::optional<at::Tensor>& dlse, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& blocks, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, int64_t block_size, std::optional<double> scale,
    const std::optional<at::Tensor>& query_positions);

std::tuple<at::Tensor, at::Tensor, at::Tensor> dense_attention_backward(
    const std::optional<at::Tensor>& dout, const std::optional<at::Tensor>& dlse, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, std::optional<double> scale,
    const std::optional<at::Tensor>& query_positions);

/// index_kl with what its backward needs: (kl, lse_main [Tq, query_heads], lse_index [Tq, kv_heads],
/// teacher_norm [Tq, kv_heads]), all float32.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> index_kl_forward(
    const at::Tensor& q_idx, const at::Tensor& k_idx, const at::Tensor& q, const at::Tensor& k,
    const std::optional<at::Tensor>& blocks, const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
    int64_t block_size, std::optional<double> index_scale, std::optional<double> scale, std::string_view teacher,
    const std::optional<at::Tensor>& query_positions);

/// Gradients of grad_output (float32 scalar) * index_kl in q_idx and k_idx.
std::tuple<at::Tensor, at::Tensor> index_kl_backward(
    const at::Tensor& grad_output, const at::Tensor& q_idx, const at::Tensor& k_idx, const at::Tensor& q,
    const at::Tensor& k, const std::optional<at::Tensor>& blocks, const at::Tensor& lse_main,
    const at::Tensor& lse_index, const at::Tensor& teacher_norm, const at::Tensor& cu_seqlens_q,
    const at::Tensor& cu_seqlens_k, int64_t block_size, std::optional<double> index_scale, std::optional<double> scale,
    std::string_view teacher, const std::optional<at::Tensor>& query_positions);

}  // namespace msa::torch_ops
