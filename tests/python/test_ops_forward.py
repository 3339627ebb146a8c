# SPDX-License-Identifier: Apache-2.0
"""The operators' values against naive formulations in plain torch, on every backend."""

import math

import msa
import ops_support as support
import pytest
import torch
from ops_support import SHAPES, Shape, make_inputs

shapes = pytest.mark.parametrize("name", SHAPES)
dtypes = pytest.mark.parametrize("dtype", support.DTYPES, ids=str)


def truth_and_naive(function, *tensors, **kwargs):
    """The naive formulation in float64 and in the tensors' own dtype."""
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]
    return function(*wide, **kwargs), function(*tensors, **kwargs)


@shapes
@dtypes
def test_select_blocks_equals_naive_on_exact_scores(name, dtype, backend):
    inputs = make_inputs(SHAPES[name], dtype, integers=True)
    shape = inputs.shape
    blocks = msa.select_blocks(
        inputs.q_idx, inputs.k_idx, *inputs.cu, shape.block_size, shape.topk, shape.local_blocks, shape.init_blocks
    )
    assert blocks.dtype == torch.int32 and blocks.is_contiguous()
    assert torch.equal(blocks, support.to_blocks(inputs, support.naive_block_scores(inputs)))


@pytest.mark.parametrize("local_blocks,init_blocks", [(1, 0), (0, 0), (2, 3), (5, 5), (3, 1), (100, 0), (0, 100)])
def test_select_blocks_forced(local_blocks, init_blocks, backend):
    inputs = make_inputs(Shape(((40, 150),), topk=3, local_blocks=local_blocks, init_blocks=init_blocks), integers=True)
    blocks = msa.select_blocks(inputs.q_idx, inputs.k_idx, *inputs.cu, 16, 3, local_blocks, init_blocks)
    assert torch.equal(blocks, support.to_blocks(inputs, support.naive_block_scores(inputs)))


def test_select_blocks_nan_ranks_last(backend):
    cu = torch.tensor([0, 80], dtype=torch.int32)
    q_idx = torch.ones(80, 1, 16)
    k_idx = torch.zeros(80, 16)
    k_idx[:16] = math.nan  # block 0 wholly
    k_idx[16:31] = math.nan  # block 1 but for one token, which scores -16
    k_idx[31] = -1
    k_idx[32:48] = -math.inf
    blocks = msa.select_blocks(q_idx, k_idx, cu, cu, 16, 3)
    assert blocks[0, 79].tolist() == [1, 3, 4]
    blocks = msa.select_blocks(q_idx, k_idx, cu, cu, 16, 4)
    assert blocks[0, 79].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("rows,blocks,topk", [(0, 5, 2), (3, 0, 2), (4, 3, 8), (5, 8, 8), (40, 33, 16), (17, 700, 64)])
def test_topk_blocks(rows, blocks, topk, backend):
    scores = torch.randint(-3, 4, (rows, blocks), generator=torch.Generator().manual_seed(2)).float()
    scores[scores == 3] = math.nan
    expected = torch.full((rows, topk), -1, dtype=torch.int32)
    for row, values in enumerate(scores.tolist()):
        best = sorted(range(blocks), key=lambda b: (math.isnan(values[b]), 0 if math.isnan(values[b]) else -values[b], b))
        chosen = sorted(best[:topk])
        expected[row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    ids = msa.topk_blocks(scores, topk)
    assert ids.is_contiguous() and torch.equal(ids, expected)
    assert torch.equal(msa.topk_blocks(scores.t().contiguous().t(), topk), expected)  # columns strided
    assert torch.equal(msa.topk_blocks(torch.cat([scores, scores], 1)[:, :blocks], topk), expected)  # rows with gaps


@shapes
def test_select_blocks_oracle_equals_naive(name, backend):
    inputs = make_inputs(SHAPES[name], seed=3)
    shape = inputs.shape
    blocks = msa.select_blocks_oracle(
        inputs.q, inputs.k, *inputs.cu, shape.block_size, shape.topk, shape.local_blocks, shape.init_blocks
    )
    assert torch.equal(blocks, support.to_blocks(inputs, support.naive_block_mass(inputs)))


@shapes
@dtypes
def test_dense_attention(name, dtype, backend):
    inputs = make_inputs(SHAPES[name], dtype)
    out, lse = msa.dense_attention(inputs.q, inputs.k, inputs.v, *inputs.cu)
    truth, naive = truth_and_naive(support.naive_attention, inputs.q, inputs.k, inputs.v, *inputs.cu)
    assert out.dtype == dtype and lse.dtype == torch.float32
    support.assert_within_rule(out, truth[0], naive[0], dtype, "out")
    support.assert_within_rule(lse, truth[1], naive[1], dtype, "lse")


@shapes
@dtypes
@pytest.mark.parametrize("selection", ["index", "random"])
def test_sparse_attention(name, dtype, selection, backend):
    inputs = make_inputs(SHAPES[name], dtype)
    shape = inputs.shape
    if selection == "index":
        blocks = msa.select_blocks(inputs.q_idx, inputs.k_idx, *inputs.cu, shape.block_size, shape.topk)
    else:
        blocks = support.random_blocks(inputs)
    out, lse = msa.sparse_attention(inputs.q, inputs.k, inputs.v, blocks, *inputs.cu, shape.block_size)
    truth, naive = truth_and_naive(
        support.naive_attention, inputs.q, inputs.k, inputs.v, *inputs.cu, blocks, shape.block_size
    )
    assert out.dtype == dtype and lse.dtype == torch.float32
    support.assert_within_rule(out, truth[0], naive[0], dtype, "out")
    support.assert_within_rule(lse, truth[1], naive[1], dtype, "lse")


def test_scale_argument(backend):
    inputs = make_inputs(SHAPES["unequal_dims"])
    blocks = support.random_blocks(inputs)
    for op, args in (
        (msa.sparse_attention, (blocks, *inputs.cu, inputs.block_size)),
        (msa.dense_attention, inputs.cu),
    ):
        scaled = op(inputs.q * 4, inputs.k, inputs.v, *args, 0.25 / math.sqrt(inputs.shape.head_dim))
        plain = op(inputs.q, inputs.k, inputs.v, *args)
        torch.testing.assert_close(scaled, plain)


@shapes
@dtypes
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("teacher", ["mean", "max"])
def test_index_kl(name, dtype, stage, teacher, backend):
    results = []
    for seed in range(6):  # one number has no rms, and may be right by luck: the rule is for the values of several batches
        inputs = make_inputs(SHAPES[name], dtype, seed)
        blocks = support.random_blocks(inputs) if stage == "sparse" else None
        arguments = (inputs.q_idx, inputs.k_idx, inputs.q, inputs.k, blocks, *inputs.cu, inputs.block_size)
        kl = msa.index_kl(*arguments, teacher=teacher)
        assert kl.dtype == torch.float32 and kl.dim() == 0
        results.append((kl, *truth_and_naive(support.naive_index_kl, *arguments, teacher=teacher)))
    support.assert_within_rule(*(torch.stack(values) for values in zip(*results)), dtype, "kl")


def test_index_kl_scales_and_mixed_dtypes(backend):
    inputs = make_inputs(SHAPES["around_a_block"], torch.bfloat16)
    arguments = (inputs.q_idx.float(), inputs.k_idx.float(), inputs.q, inputs.k, None, *inputs.cu, 16, 0.7, 0.3)
    kl = msa.index_kl(*arguments)
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    torch.testing.assert_close(kl.double(), support.naive_index_kl(*wide), rtol=1e-5, atol=1e-6)


@shapes
@dtypes
def test_selection_recall(name, dtype, backend):
    inputs = make_inputs(SHAPES[name], dtype, seed=5)
    blocks = support.random_blocks(inputs)
    recalls = msa.selection_recall(inputs.q, inputs.k, blocks, *inputs.cu, inputs.block_size)
    expected = torch.tensor(support.naive_recall(inputs, blocks))
    assert all(r.dtype == torch.float32 and r.dim() == 0 for r in recalls)
    torch.testing.assert_close(torch.stack(recalls), expected, equal_nan=True)


def test_query_positions(backend):
    """A sample of a sequence's rows gives what those rows give in the whole call."""
    shape = Shape(((100, 100), (60, 60)), group_size=3)
    inputs = make_inputs(shape)
    rows = torch.tensor([0, 3, 47, 48, 99, 100, 131, 159])
    positions = torch.tensor([0, 3, 47, 48, 99, 0, 31, 59], dtype=torch.int32)
    cu_rows = torch.tensor([0, 5, 8], dtype=torch.int32)
    cu = inputs.cu_seqlens_k
    where = {"query_positions": positions}
    blocks = msa.select_blocks(inputs.q_idx, inputs.k_idx, cu, cu, 16, 3)
    sample = msa.select_blocks(inputs.q_idx[rows], inputs.k_idx, cu_rows, cu, 16, 3, **where)
    assert torch.equal(sample, blocks[:, rows])
    oracle = msa.select_blocks_oracle(inputs.q, inputs.k, cu, cu, 16, 3)
    assert torch.equal(msa.select_blocks_oracle(inputs.q[rows], inputs.k, cu_rows, cu, 16, 3, **where), oracle[:, rows])
    for whole, part in (
        (
            msa.sparse_attention(inputs.q, inputs.k, inputs.v, blocks, cu, cu, 16),
            msa.sparse_attention(inputs.q[rows], inputs.k, inputs.v, sample, cu_rows, cu, 16, **where),
        ),
        (
            msa.dense_attention(inputs.q, inputs.k, inputs.v, cu, cu),
            msa.dense_attention(inputs.q[rows], inputs.k, inputs.v, cu_rows, cu, **where),
        ),
    ):
        assert torch.equal(whole[0][rows], part[0]) and torch.equal(whole[1][rows], part[1])
    for selected in (None, sample):
        arguments = (inputs.q_idx[rows], inputs.k_idx, inputs.q[rows], inputs.k, selected, cu_rows, cu, 16)
        torch.testing.assert_close(
            msa.index_kl(*arguments, **where), support.naive_index_kl(*arguments, positions=positions)
        )
    sampled = support.Inputs(
        shape, inputs.q[rows], inputs.k, inputs.v, inputs.q_idx[rows], inputs.k_idx, cu_rows, inputs.cu_seqlens_k
    )
    recalls = msa.selection_recall(inputs.q[rows], inputs.k, sample, cu_rows, cu, 16, **where)
    expected = torch.tensor(support.naive_recall(sampled, sample, positions))
    torch.testing.assert_close(torch.stack(recalls), expected)


def test_query_positions_with_padding_rows():
    inputs = make_inputs(Shape(((40, 40),)))
    positions = torch.tensor([5, 30, 0, 0], dtype=torch.int32)  # two rows, two of padding
    cu_rows = torch.tensor([0, 2], dtype=torch.int32)
    out, lse = msa.dense_attention(
        inputs.q[:4], inputs.k, inputs.v, cu_rows, inputs.cu_seqlens_k, query_positions=positions
    )
    assert out[2:].abs().max() == 0 and lse[2:].isneginf().all()


@pytest.mark.parametrize("layout", ["fused", "heads_first", "dim_first", "expanded"])
def test_strides(layout, backend):
    """Any strides give the results of contiguous tensors, bit for bit, gradients included."""
    inputs = make_inputs(Shape(((30, 50), (20, 20)), group_size=2))
    blocks = support.random_blocks(inputs)

    def rearrange(t):
        if layout == "fused":  # a slice of a wider buffer
            return torch.cat((t, t), dim=1)[:, : t.shape[1]]
        if layout == "heads_first":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "dim_first":  # last dimension not contiguous
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        return t[:, :1].expand_as(t)

    tensors = [rearrange(t) for t in (inputs.q, inputs.k, inputs.v, inputs.q_idx)]
    assert not any(t.is_contiguous() for t in tensors)
    results = []
    for chosen in (tensors, [t.contiguous() for t in tensors]):
        q, k, v, q_idx = (t.detach().requires_grad_() for t in chosen)
        k_idx = rearrange(inputs.k_idx[:, None])[:, 0].detach().requires_grad_()
        shuffled = blocks.transpose(0, 2).contiguous().transpose(0, 2)
        out, lse = msa.sparse_attention(q, k, v, shuffled, *inputs.cu, 16)
        kl = msa.index_kl(q_idx, k_idx, q, k, shuffled, *inputs.cu, 16)
        selected = msa.select_blocks(q_idx, k_idx, *inputs.cu, 16, 3)
        grads = torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum() + kl, (q, k, v, q_idx, k_idx))
        results.append((out, lse, kl, selected, *grads))
    for strided, contiguous in zip(*results):
        assert torch.equal(strided, contiguous)


def test_padding_rows_are_inert(backend):
    shape = Shape(((5, 40), (7, 7)), query_padding=6, key_padding=5)
    inputs = make_inputs(shape)
    rows_q, rows_k = int(inputs.cu_seqlens_q[-1]), int(inputs.cu_seqlens_k[-1])
    poisoned = {}
    for name in ("q", "k", "v", "q_idx", "k_idx"):
        tensor = getattr(inputs, name).clone()
        tensor[rows_q if name.startswith("q") else rows_k :] = math.nan
        poisoned[name] = tensor.requires_grad_()
    q, k, v, q_idx, k_idx = poisoned.values()
    blocks = msa.select_blocks(q_idx, k_idx, *inputs.cu, 16, 2)
    assert (blocks[:, rows_q:] == -1).all() and (blocks[:, :rows_q, 0] >= 0).all()
    garbage = blocks.clone()
    garbage[:, rows_q:] = 12345  # ids of padding rows are not read
    for out, lse in (
        msa.sparse_attention(q, k, v, garbage, *inputs.cu, 16),
        msa.dense_attention(q, k, v, *inputs.cu),
    ):
        assert out[rows_q:].abs().max() == 0 and lse[rows_q:].isneginf().all()
        assert out.isfinite().all() and lse[:rows_q].isfinite().all()
        grads = torch.autograd.grad(out.sum() + lse[:rows_q].sum(), (q, k, v))
        for grad, rows in zip(grads, (rows_q, rows_k, rows_k)):
            assert grad.isfinite().all() and grad[rows:].abs().max() == 0
    for selected in (None, garbage):
        kl = msa.index_kl(q_idx, k_idx, q, k, selected, *inputs.cu, 16)
        grads = torch.autograd.grad(kl, (q_idx, k_idx))
        assert kl.isfinite()
        for grad, rows in zip(grads, (rows_q, rows_k)):
            assert grad.isfinite().all() and grad[rows:].abs().max() == 0
    assert msa.selection_recall(q, k, garbage, *inputs.cu, 16)[0].isfinite()


def test_unseen_nan_does_not_reach_a_row(backend):
    cu = torch.tensor([0, 64], dtype=torch.int32)
    inputs = make_inputs(Shape(((64, 64),)))
    blocks = torch.zeros(2, 64, 1, dtype=torch.int32)  # everyone looks at block 0 only
    clean = msa.sparse_attention(inputs.q, inputs.k, inputs.v, blocks, cu, cu, 16)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[16:], v[16:] = math.nan, math.nan
    assert all(torch.equal(a, b) for a, b in zip(clean, msa.sparse_attention(inputs.q, k, v, blocks, cu, cu, 16)))
    k, v = inputs.k.clone(), inputs.v.clone()
    k[40:], v[40:] = math.nan, math.nan
    clean = msa.dense_attention(inputs.q, inputs.k, inputs.v, cu, cu)
    dirty = msa.dense_attention(inputs.q, k, v, cu, cu)
    assert all(torch.equal(a[:40], b[:40]) for a, b in zip(clean, dirty))


def test_no_queries():
    inputs = make_inputs(SHAPES["no_tokens"])
    assert msa.index_kl(inputs.q_idx, inputs.k_idx, inputs.q, inputs.k, None, *inputs.cu, 16).item() == 0
    blocks = msa.select_blocks(inputs.q_idx, inputs.k_idx, *inputs.cu, 16, 3)
    assert blocks.shape == (2, 0, 3)
    recalls = msa.selection_recall(inputs.q, inputs.k, blocks, *inputs.cu, 16)
    assert all(r.isnan() for r in recalls)
    no_sequences = torch.zeros(1, dtype=torch.int32)
    out, lse = msa.dense_attention(inputs.q, inputs.k, inputs.v, no_sequences, no_sequences)
    assert out.shape == (0, 4, 32) and lse.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float8_keys_are_the_numbers_they_are(dtype):
    torch.manual_seed(0)
    cu_q, cu_k = torch.tensor([0, 5, 40], dtype=torch.int32), torch.tensor([0, 70, 110], dtype=torch.int32)
    q, q_idx = torch.randn(40, 6, 32, dtype=dtype), torch.randn(40, 2, 16, dtype=dtype)
    k, v, k_idx = (torch.randn(110, *shape).to(torch.float8_e4m3fn) for shape in [(2, 32), (2, 32), (16,)])
    blocks = msa.select_blocks(q_idx, k_idx, cu_q, cu_k, 16, 3)
    assert torch.equal(blocks, msa.select_blocks(q_idx, k_idx.to(dtype), cu_q, cu_k, 16, 3))
    for op in (lambda k, v: msa.sparse_attention(q, k, v, blocks, cu_q, cu_k, 16), lambda k, v: msa.dense_attention(q, k, v, cu_q, cu_k)):
        for narrow, wide in zip(op(k, v), op(k.to(dtype), v.to(dtype))):
            assert torch.equal(narrow, wide)
    with pytest.raises(RuntimeError, match="q: .*must be float32"):
        msa.sparse_attention(q.to(torch.float8_e4m3fn), k, v, blocks, cu_q, cu_k, 16)
    with pytest.raises(RuntimeError, match="k_idx"):
        msa.index_kl(q_idx, k_idx, q, k.to(dtype), blocks, cu_q, cu_k, 16)
