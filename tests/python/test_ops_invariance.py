# SPDX-License-Identifier: Apache-2.0
"""What must not change a bit: pages in place of packed keys, threads, packing, chunking."""

import msa
import ops_support as support
import pytest
import torch
from ops_support import SHAPES, Shape, make_inputs


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(inputs, blocks=None):
    """All packed operators and gradients of one batch."""
    shape = inputs.shape
    q, k, v, q_idx, k_idx = (getattr(inputs, n).clone().requires_grad_() for n in ("q", "k", "v", "q_idx", "k_idx"))
    selected = msa.select_blocks(q_idx, k_idx, *inputs.cu, shape.block_size, shape.topk)
    oracle = msa.select_blocks_oracle(q, k, *inputs.cu, shape.block_size, shape.topk)
    sparse, sparse_lse = msa.sparse_attention(q, k, v, selected, *inputs.cu, shape.block_size)
    dense, dense_lse = msa.dense_attention(q, k, v, *inputs.cu)
    # KL as a sum over rows: the mean would tie a sequence to its batch.
    rows = max(1, int(inputs.cu_seqlens_q[-1])) * shape.kv_heads
    results = {"blocks": selected, "oracle": oracle, "sparse": sparse, "dense": dense}
    results |= {"sparse_lse": sparse_lse, "dense_lse": dense_lse}
    for name, value, leaves in (
        ("sparse", sparse, (q, k, v)),
        ("dense", dense, (q, k, v)),
        ("kl", msa.index_kl(q_idx, k_idx, q, k, selected, *inputs.cu, shape.block_size) * rows, (q_idx, k_idx)),
        ("warmup_kl", msa.index_kl(q_idx, k_idx, q, k, None, *inputs.cu, shape.block_size) * rows, (q_idx, k_idx)),
    ):
        for leaf, grad in zip("qkv", torch.autograd.grad(value.square().sum() if "kl" not in name else value, leaves)):
            results[f"{name} d{leaf}"] = grad
        if "kl" in name:
            results[name] = value
    return results


def assert_same(expected, got, names=None):
    for name in names or expected:
        assert torch.equal(expected[name], got[name]), name


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_count(name, dtype, threads):
    inputs = make_inputs(SHAPES[name], dtype)
    threads(1)
    alone = everything(inputs)
    for count in (2, 3):
        threads(count)
        assert_same(alone, everything(inputs))


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_packing(dtype):
    """A sequence computes the same alone as between others."""
    shape = Shape(((30, 30), (17, 80), (1, 50)), group_size=3)
    packed = make_inputs(shape, dtype)
    together = everything(packed)
    for s, (lq, lk) in enumerate(shape.lengths):
        rows_q = slice(int(packed.cu_seqlens_q[s]), int(packed.cu_seqlens_q[s + 1]))
        rows_k = slice(int(packed.cu_seqlens_k[s]), int(packed.cu_seqlens_k[s + 1]))
        single = support.Inputs(
            Shape(((lq, lk),), group_size=3),
            packed.q[rows_q], packed.k[rows_k], packed.v[rows_k], packed.q_idx[rows_q], packed.k_idx[rows_k],
            support.cumulative([lq]), support.cumulative([lk]),
        )
        alone = everything(single)
        for name in alone:
            if "kl" in name:  # the mean runs over the batch: its gradients are scaled by the batch's size
                continue
            if name in ("blocks", "oracle"):
                assert torch.equal(alone[name], together[name][:, rows_q]), name
            else:
                rows = rows_k if name.endswith(("dk", "dv")) else rows_q
                assert torch.equal(alone[name], together[name][rows]), name


@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
def test_chunked_prefill(chunk):
    inputs = make_inputs(Shape(((100, 100),), group_size=2))
    whole = everything(inputs)
    for begin in range(0, 100, chunk):
        end = min(begin + chunk, 100)
        part = support.Inputs(
            Shape(((end - begin, end),), group_size=2),
            inputs.q[begin:end], inputs.k[:end], inputs.v[:end], inputs.q_idx[begin:end], inputs.k_idx[:end],
            support.cumulative([end - begin]), support.cumulative([end]),
        )
        got = everything(part)
        assert torch.equal(got["blocks"], whole["blocks"][:, begin:end])
        for name in ("sparse", "dense", "sparse_lse", "dense_lse", "sparse dq", "dense dq"):
            assert torch.equal(got[name], whole[name][begin:end]), name


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize("blocks_per_page", [1, 2])
def test_paged_equals_packed(name, dtype, blocks_per_page, backend):
    inputs = make_inputs(SHAPES[name], dtype)
    size, topk = inputs.block_size, inputs.shape.topk
    pages = support.to_pages((inputs.k, inputs.v, inputs.k_idx), inputs.cu_seqlens_k, size * blocks_per_page)
    k, v, k_idx = pages.tensors
    where = (inputs.cu_seqlens_q, pages.page_table, pages.seqlens_k)
    blocks = msa.select_blocks(inputs.q_idx, inputs.k_idx, *inputs.cu, size, topk)
    assert torch.equal(msa.select_blocks_paged(inputs.q_idx, k_idx, *where, size, topk), blocks)
    assert torch.equal(
        msa.select_blocks_oracle_paged(inputs.q, k, *where, size, topk),
        msa.select_blocks_oracle(inputs.q, inputs.k, *inputs.cu, size, topk),
    )
    packed = msa.sparse_attention(inputs.q, inputs.k, inputs.v, blocks, *inputs.cu, size)
    paged = msa.sparse_attention_paged(inputs.q, k, v, blocks, *where, size)
    assert all(torch.equal(a, b) for a, b in zip(packed, paged))
    packed = msa.dense_attention(inputs.q, inputs.k, inputs.v, *inputs.cu)
    paged = msa.dense_attention_paged(inputs.q, k, v, *where)
    assert all(torch.equal(a, b) for a, b in zip(packed, paged))


def test_paged_positions():
    inputs = make_inputs(Shape(((3, 100), (2, 50))))
    positions = torch.tensor([5, 60, 99, 0, 20], dtype=torch.int32)
    pages = support.to_pages((inputs.k, inputs.v, inputs.k_idx), inputs.cu_seqlens_k, 16)
    k, v, k_idx = pages.tensors
    where, at = (inputs.cu_seqlens_q, pages.page_table, pages.seqlens_k), {"query_positions": positions}
    blocks = msa.select_blocks(inputs.q_idx, inputs.k_idx, *inputs.cu, 16, 2, **at)
    assert torch.equal(msa.select_blocks_paged(inputs.q_idx, k_idx, *where, 16, 2, **at), blocks)
    for packed, paged in (
        (
            msa.sparse_attention(inputs.q, inputs.k, inputs.v, blocks, *inputs.cu, 16, **at),
            msa.sparse_attention_paged(inputs.q, k, v, blocks, *where, 16, **at),
        ),
        (
            msa.dense_attention(inputs.q, inputs.k, inputs.v, *inputs.cu, **at),
            msa.dense_attention_paged(inputs.q, k, v, *where, **at),
        ),
    ):
        assert all(torch.equal(a, b) for a, b in zip(packed, paged))


def test_blocks_start_at_the_sequence_not_at_the_buffer():
    """Tokens in front of a sequence move none of its block boundaries."""
    inputs = make_inputs(Shape(((50, 50),)), integers=True)
    cu = torch.tensor([0, 7, 57], dtype=torch.int32)
    shifted_q, shifted_k = (torch.cat((t[:7], t)) for t in (inputs.q_idx, inputs.k_idx))
    shifted = msa.select_blocks(shifted_q, shifted_k, cu, cu, 16, 2)
    assert torch.equal(shifted[:, 7:], msa.select_blocks(inputs.q_idx, inputs.k_idx, *inputs.cu, 16, 2))
