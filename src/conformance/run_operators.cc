// SPDX-License-Identifier: Apache-2.0
// See run_operators.h.
#include "src/conformance/run_operators.h"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "msa/msa.h"
#include "src/conformance/staging.h"
#include "src/core/float_convert.h"

namespace msa::conformance {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// A buffer in the storage type. Outputs start as NaN.
class Storage {
 public:
  Storage(DType dtype, std::size_t count) : dtype_(dtype), bytes_(count * dtype_size(dtype), std::byte{0xff}) {}
  Storage(DType dtype, const std::vector<float>& values) : Storage(dtype, values.size()) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      core::store_element(bytes_.data(), dtype, static_cast<std::int64_t>(i), values[i]);
    }
  }
  TensorView view(std::initializer_list<std::int64_t> shape) { return make_view(bytes_.data(), dtype_, shape); }
  std::vector<float> floats() const {
    std::vector<float> values(bytes_.size() / dtype_size(dtype_));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = core::load_element(bytes_.data(), dtype_, static_cast<std::int64_t>(i));
    }
    return values;
  }

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

// How the keys lie: packed, or every sequence's pages in the pool from its end, with a page of NaN in front of each.
class KeyLayout {
 public:
  KeyLayout(const NaiveInputs& in, std::int64_t page) : in_(in), page_(page) {
    if (page == 0) return;
    for (std::size_t s = 0; s + 1 < in.cu_seqlens_k.size(); ++s) {
      seqlens_.push_back(in.cu_seqlens_k[s + 1] - in.cu_seqlens_k[s]);
      max_pages_ = std::max(max_pages_, (seqlens_.back() + page - 1) / page);
    }
    table_.assign(at(static_cast<std::int64_t>(seqlens_.size()) * max_pages_), -1);
    for (std::size_t s = 0; s < seqlens_.size(); ++s) {
      const std::int64_t used = (seqlens_[s] + page - 1) / page;
      pages_ += 1 + used;
      for (std::int64_t i = 0; i < used; ++i) {
        table_[s * at(max_pages_) + at(i)] = static_cast<std::int32_t>(pages_ - 1 - i);
      }
    }
  }

  Batch batch() const {
    if (page_ == 0) return Batch::packed(in_.cu_seqlens_q, in_.cu_seqlens_k);
    return Batch::paged(in_.cu_seqlens_q, table_, max_pages_, seqlens_);
  }
  // Rows [keys, width] in the order of this layout.
  std::vector<float> place(const std::vector<float>& rows, std::int64_t width) const {
    if (page_ == 0) return rows;
    std::vector<float> placed(at(pages_ * page_ * width), std::numeric_limits<float>::quiet_NaN());
    for (std::size_t s = 0; s < seqlens_.size(); ++s) {
      for (std::int64_t j = 0; j < seqlens_[s]; ++j) {
        const std::int64_t to = table_[s * at(max_pages_) + at(j / page_)] * page_ + j % page_;
        std::copy_n(rows.begin() + (in_.cu_seqlens_k[s] + j) * width, width, placed.begin() + to * width);
      }
    }
    return placed;
  }
  TensorView view(Storage& storage, std::int64_t heads, std::int64_t dim) const {
    return page_ == 0 ? storage.view({in_.keys(), heads, dim}) : storage.view({pages_, page_, heads, dim});
  }
  TensorView view(Storage& storage, std::int64_t dim) const {
    return page_ == 0 ? storage.view({in_.keys(), dim}) : storage.view({pages_, page_, dim});
  }

 private:
  const NaiveInputs& in_;
  std::int64_t page_, pages_ = 0, max_pages_ = 0;
  std::vector<std::int32_t> table_, seqlens_;
};

// The tensors of one set of inputs, staged for a backend, and the calls on them.
class Run {
 public:
  Run(const Context& context, const NaiveInputs& in, std::int64_t page)
      : context_(context),
        in_(in),
        layout_(in, page),
        staging_(context),
        q_(in.dtype, in.q),
        k_(in.dtype, layout_.place(in.k, in.kv_heads * in.head_dim)),
        v_(in.dtype, layout_.place(in.v, in.kv_heads * in.value_dim)),
        q_idx_(in.dtype, in.q_idx),
        k_idx_(in.dtype, layout_.place(in.k_idx, in.index_dim)) {
    batch_ = staging_.input(layout_.batch());
    q_view_ = staging_.input(q_.view({in.queries(), in.query_heads, in.head_dim}));
    k_view_ = staging_.input(layout_.view(k_, in.kv_heads, in.head_dim));
    v_view_ = staging_.input(layout_.view(v_, in.kv_heads, in.value_dim));
    q_idx_view_ = staging_.input(q_idx_.view({in.queries(), in.kv_heads, in.index_dim}));
    k_idx_view_ = staging_.input(layout_.view(k_idx_, in.index_dim));
    if (!in.blocks.empty()) {
      blocks_ = staging_.input(make_view(in.blocks.data(), {in.kv_heads, in.queries(), in.topk}));
    }
  }

  std::vector<std::int32_t> select() {
    SelectBlocksParams params;
    params.q_idx = q_idx_view_, params.k_idx = k_idx_view_, params.batch = batch_;
    params.block_size = in_.block_size, params.topk = in_.topk;
    return ids([&](const TensorView& blocks) {
      select_blocks(staging_.with_workspace(select_blocks_workspace(context_, params)), params, blocks);
    });
  }

  std::vector<std::int32_t> select_by_mass() {
    OracleBlocksParams params;
    params.q = q_view_, params.k = k_view_, params.batch = batch_;
    params.block_size = in_.block_size, params.topk = in_.topk;
    return ids([&](const TensorView& blocks) {
      select_blocks_oracle(staging_.with_workspace(select_blocks_oracle_workspace(context_, params)), params, blocks);
    });
  }

  SelectionRecall recall() {
    SelectionRecallParams params;
    params.q = q_view_, params.k = k_view_, params.blocks = blocks_;
    params.batch = batch_;
    params.block_size = in_.block_size;
    return selection_recall(staging_.with_workspace(selection_recall_workspace(context_, params)), params);
  }

  Outputs attend(bool sparse, bool with_gradients) {
    const std::int64_t tq = in_.queries(), tk = in_.keys();
    const DType dtype = in_.dtype;
    Storage out(dtype, in_.dout.size()), lse(DType::kFloat32, in_.dlse.size()), dout(dtype, in_.dout);
    Storage dlse(DType::kFloat32, in_.dlse);
    Storage dq(dtype, in_.q.size()), dk(dtype, in_.k.size()), dv(dtype, in_.v.size());
    const TensorView out_view = staging_.output(out.view({tq, in_.query_heads, in_.value_dim}));
    const TensorView lse_view = staging_.output(lse.view({tq, in_.query_heads}));
    AttentionSaved saved{out_view, lse_view, {}, {}};
    AttentionGrads grads;
    if (with_gradients) {
      saved.dout = staging_.input(dout.view({tq, in_.query_heads, in_.value_dim}));
      saved.dlse = staging_.input(dlse.view({tq, in_.query_heads}));
      grads.dq = staging_.output(dq.view({tq, in_.query_heads, in_.head_dim}));
      grads.dk = staging_.output(dk.view({tk, in_.kv_heads, in_.head_dim}));
      grads.dv = staging_.output(dv.view({tk, in_.kv_heads, in_.value_dim}));
    }
    if (sparse) {
      SparseAttentionParams params;
      params.q = q_view_, params.k = k_view_, params.v = v_view_, params.blocks = blocks_;
      params.batch = batch_;
      params.block_size = in_.block_size;
      sparse_attention(staging_.with_workspace(sparse_attention_workspace(context_, params)), params, out_view,
                       lse_view);
      if (with_gradients) {
        sparse_attention_backward(staging_.with_workspace(sparse_attention_backward_workspace(context_, params)),
                                  params, saved, grads);
      }
    } else {
      DenseAttentionParams params;
      params.q = q_view_, params.k = k_view_, params.v = v_view_;
      params.batch = batch_;
      dense_attention(staging_.with_workspace(dense_attention_workspace(context_, params)), params, out_view, lse_view);
      if (with_gradients) {
        dense_attention_backward(staging_.with_workspace(dense_attention_backward_workspace(context_, params)), params,
                                 saved, grads);
      }
    }
    Outputs result;
    align(sparse, with_gradients, result);  // fetches
    result.out = out.floats(), result.lse = lse.floats();
    if (with_gradients) result.dq = dq.floats(), result.dk = dk.floats(), result.dv = dv.floats();
    return result;
  }

 private:
  // The KL loss and the recalls; everything staged so far comes back.
  void align(bool sparse, bool with_gradients, Outputs& result) {
    const std::int64_t tq = in_.queries(), tk = in_.keys();
    Storage lse_main(DType::kFloat32, at(tq * in_.query_heads)), lse_index(DType::kFloat32, at(tq * in_.kv_heads));
    Storage norm(DType::kFloat32, at(tq * in_.kv_heads));
    Storage dq_idx(in_.dtype, in_.q_idx.size()), dk_idx(in_.dtype, in_.k_idx.size());
    const IndexKlSaved saved{staging_.output(lse_main.view({tq, in_.query_heads})),
                             staging_.output(lse_index.view({tq, in_.kv_heads})),
                             staging_.output(norm.view({tq, in_.kv_heads}))};
    IndexKlParams params;
    params.q = q_view_, params.k = k_view_, params.q_idx = q_idx_view_, params.k_idx = k_idx_view_;
    if (sparse) params.blocks = blocks_;
    params.batch = batch_;
    params.block_size = in_.block_size;
    result.kl = index_kl(staging_.with_workspace(index_kl_workspace(context_, params)), params, saved);
    if (with_gradients) {
      index_kl_backward(staging_.with_workspace(index_kl_backward_workspace(context_, params)), params, saved, 1.0f,
                        staging_.output(dq_idx.view({tq, in_.kv_heads, in_.index_dim})),
                        staging_.output(dk_idx.view({tk, in_.index_dim})));
    }
    result.recall = recall();
    staging_.fetch();
    result.lse_main = lse_main.floats(), result.lse_index = lse_index.floats();
    if (with_gradients) result.dq_idx = dq_idx.floats(), result.dk_idx = dk_idx.floats();
  }

  template <class Call>
  std::vector<std::int32_t> ids(const Call& call) {
    std::vector<std::int32_t> blocks(at(in_.kv_heads * in_.queries() * in_.topk), -7);
    call(staging_.output(make_view(blocks.data(), {in_.kv_heads, in_.queries(), in_.topk})));
    staging_.fetch();
    return blocks;
  }

  const Context& context_;
  const NaiveInputs& in_;
  KeyLayout layout_;
  Staging staging_;
  Storage q_, k_, v_, q_idx_, k_idx_;
  Batch batch_;
  ConstTensorView q_view_, k_view_, v_view_, q_idx_view_, k_idx_view_, blocks_;
};

}  // namespace

Outputs run_attention(const Context& context, const NaiveInputs& in, bool sparse, std::int64_t page) {
  return Run(context, in, page).attend(sparse, page == 0);
}

SelectionRecall run_recall(const Context& context, const NaiveInputs& in) { return Run(context, in, 0).recall(); }

std::vector<std::int32_t> run_select(const Context& context, const NaiveInputs& in, std::int64_t page) {
  return Run(context, in, page).select();
}

std::vector<std::int32_t> run_oracle(const Context& context, const NaiveInputs& in, std::int64_t page) {
  return Run(context, in, page).select_by_mass();
}

std::vector<std::int32_t> run_topk(const Context& context, const std::vector<float>& scores, std::int64_t blocks,
                                   std::int64_t topk) {
  const std::int64_t rows = static_cast<std::int64_t>(scores.size()) / blocks;
  std::vector<std::int32_t> ids(at(rows * topk), -7);
  Staging staging(context);
  TopkBlocksParams params;
  params.scores = staging.input(make_view(scores.data(), {rows, blocks}));
  params.topk = topk;
  const TensorView out = staging.output(make_view(ids.data(), {rows, topk}));
  topk_blocks(staging.with_workspace(topk_blocks_workspace(context, params)), params, out);
  staging.fetch();
  return ids;
}

}  // namespace msa::conformance
