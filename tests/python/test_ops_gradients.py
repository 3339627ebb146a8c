# SPDX-License-Identifier: Apache-2.0
"""Gradients against autograd through the naive formulations, on every backend."""

import msa
import ops_support as support
import pytest
import torch
from ops_support import SHAPES, Shape, make_inputs

shapes = pytest.mark.parametrize("name", SHAPES)
dtypes = pytest.mark.parametrize("dtype", support.DTYPES, ids=str)


def leaves(*tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def connected_grads(value, tensors):
    """Gradients; zeros, too, where the naive formulation of an empty batch never touched a tensor."""
    return torch.autograd.grad(value + 0 * sum(t.sum() for t in tensors), tensors)


def attention_grads(function, tensors, args, dout, dlse, dtype):
    """Gradients in q, k, v of <out, dout> + <lse, dlse>, rows without keys left out."""
    q, k, v = leaves(*tensors, dtype=dtype)
    out, lse = function(q, k, v, *args)
    lse = lse.masked_fill(lse.isneginf(), 0)
    loss = (lse * dlse).sum() if dlse is not None else 0
    if dout is not None:
        loss = loss + (out * dout.to(out.dtype)).sum()
    return connected_grads(loss, (q, k, v))


@shapes
@dtypes
@pytest.mark.parametrize("op", ["sparse", "dense"])
@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_attention_gradients(name, dtype, op, through, backend):
    inputs = make_inputs(SHAPES[name], dtype, seed=11)
    generator = torch.Generator().manual_seed(12)
    shape = inputs.shape
    dout = torch.randn(inputs.q.shape[0], shape.query_heads, shape.value_dim, generator=generator).to(dtype)
    dlse = torch.randn(inputs.q.shape[:2], generator=generator)
    dout = dout if through != "lse" else None
    dlse = dlse if through != "out" else None
    if op == "sparse":
        function, args = msa.sparse_attention, (support.random_blocks(inputs), *inputs.cu, shape.block_size)
        naive_args = (*inputs.cu, *args[:1], shape.block_size)
    else:
        function, args = msa.dense_attention, inputs.cu
        naive_args = args
    tensors = (inputs.q, inputs.k, inputs.v)
    actual = attention_grads(function, tensors, args, dout, dlse, None)
    truth = attention_grads(support.naive_attention, tensors, naive_args, dout, dlse, torch.float64)
    naive = attention_grads(support.naive_attention, tensors, naive_args, dout, dlse, None)
    for what, got, expected, yardstick in zip(("dq", "dk", "dv"), actual, truth, naive):
        assert got.dtype == dtype
        support.assert_within_rule(got, expected, yardstick, dtype, what)


@shapes
@dtypes
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("teacher", ["mean", "max"])
def test_index_kl_gradients(name, dtype, stage, teacher, backend):
    inputs = make_inputs(SHAPES[name], dtype, seed=13)
    blocks = support.random_blocks(inputs) if stage == "sparse" else None
    # The loss is a mean over all rows. Scaled back up, no gradient lies among fp16's subnormals, where an error relative
    # to the largest value says nothing.
    rows = max(1, inputs.q.shape[0] * inputs.shape.kv_heads)

    def grads(function, dtype=None):
        q_idx, k_idx, q, k = leaves(inputs.q_idx, inputs.k_idx, inputs.q, inputs.k, dtype=dtype)
        kl = function(q_idx, k_idx, q, k, blocks, *inputs.cu, inputs.block_size, teacher=teacher)
        if kl.requires_grad:
            assert torch.autograd.grad(kl, (q, k), allow_unused=True, retain_graph=True) == (None, None)
        return connected_grads(kl * rows, (q_idx, k_idx))

    actual, truth, naive = grads(msa.index_kl), grads(support.naive_index_kl, torch.float64), grads(support.naive_index_kl)
    for what, got, expected, yardstick in zip(("dq_idx", "dk_idx"), actual, truth, naive):
        assert got.dtype == dtype
        support.assert_within_rule(got, expected, yardstick, dtype, what)


def test_index_kl_gradient_in_its_own_dtype(backend):
    """A float32 index branch beside a bfloat16 main branch gets float32 gradients."""
    inputs = make_inputs(SHAPES["around_a_block"], torch.bfloat16)
    q_idx, k_idx = leaves(inputs.q_idx, inputs.k_idx, dtype=torch.float32)
    kl = msa.index_kl(q_idx, k_idx, inputs.q, inputs.k, None, *inputs.cu, 16, 0.4)
    actual = torch.autograd.grad(kl, (q_idx, k_idx))
    wide_q, wide_k = leaves(inputs.q_idx, inputs.k_idx, dtype=torch.float64)
    kl = support.naive_index_kl(wide_q, wide_k, inputs.q.double(), inputs.k.double(), None, *inputs.cu, 16, 0.4)
    for got, expected in zip(actual, torch.autograd.grad(kl, (wide_q, wide_k))):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_merging_partial_results_uses_the_gradient_of_lse(backend):
    """Attention over two halves of the selection, merged by lse, equals attention over all of it, gradients included."""
    inputs = make_inputs(Shape(((64, 64), (30, 90)), topk=4, group_size=3))
    blocks = msa.select_blocks(inputs.q_idx, inputs.k_idx, *inputs.cu, 16, 4)
    parts = [torch.full_like(blocks, -1) for _ in range(2)]
    parts[0][..., :2], parts[1][..., :2] = blocks[..., :2], blocks[..., 2:]
    weight = torch.randn(*inputs.q.shape[:2], 32, generator=torch.Generator().manual_seed(2))

    def whole(q, k, v):
        return msa.sparse_attention(q, k, v, blocks, *inputs.cu, 16)[0]

    def merged(q, k, v):
        (out_a, lse_a), (out_b, lse_b) = (msa.sparse_attention(q, k, v, p, *inputs.cu, 16) for p in parts)
        lse_b = lse_b.masked_fill(lse_b.isneginf(), -1e30)
        lse = torch.logaddexp(lse_a, lse_b)
        return out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]

    results = []
    for function in (whole, merged):
        q, k, v = leaves(inputs.q, inputs.k, inputs.v)
        out = function(q, k, v)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_gradient_for_one_input_only(wanted):
    inputs = make_inputs(SHAPES["around_a_block"])
    blocks = support.random_blocks(inputs)
    tensors = {name: getattr(inputs, name).clone() for name in "qkv"}
    tensors[wanted].requires_grad_()
    everything = leaves(inputs.q, inputs.k, inputs.v)
    for op, args in ((msa.sparse_attention, (blocks, *inputs.cu, 16)), (msa.dense_attention, inputs.cu)):
        (alone,) = torch.autograd.grad(op(**tensors, **name_args(op, args))[0].sum(), tensors[wanted])
        together = torch.autograd.grad(op(*everything, *args)[0].sum(), everything)
        assert torch.equal(alone, together["qkv".index(wanted)])


def name_args(op, args):
    names = ("blocks", "cu_seqlens_q", "cu_seqlens_k", "block_size")
    return dict(zip(names if op is msa.sparse_attention else names[1:3], args))


def test_gradient_of_the_output_may_have_any_strides():
    inputs = make_inputs(SHAPES["unequal_dims"])
    dout = torch.randn(inputs.q.shape[0], 7, 80, generator=torch.Generator().manual_seed(4))
    results = []
    for grad in (dout, dout.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        q, k, v = leaves(inputs.q, inputs.k, inputs.v)
        out, _ = msa.dense_attention(q, k, v, *inputs.cu)
        results.append(torch.autograd.grad(out, (q, k, v), grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    q, k, v = leaves(inputs.q, inputs.k, inputs.v)
    out, _ = msa.dense_attention(q, k, v, *inputs.cu)
    out.sum().backward()  # an expanded gradient, all strides 0
    assert q.grad.isfinite().all()


def test_index_kl_gradient_is_linear_in_its_own():
    inputs = make_inputs(SHAPES["around_a_block"])
    q_idx, k_idx = leaves(inputs.q_idx, inputs.k_idx)
    kl = msa.index_kl(q_idx, k_idx, inputs.q, inputs.k, None, *inputs.cu, 16)
    once = torch.autograd.grad(kl, (q_idx, k_idx), retain_graph=True)
    thrice = torch.autograd.grad(kl * 3, (q_idx, k_idx))
    for a, b in zip(once, thrice):
        torch.testing.assert_close(a * 3, b)


@pytest.mark.parametrize("op", ["sparse", "dense", "index_kl"])
def test_double_backward_is_refused_by_name(op):
    inputs = make_inputs(SHAPES["around_a_block"])
    q, k, v, q_idx, k_idx = leaves(inputs.q, inputs.k, inputs.v, inputs.q_idx, inputs.k_idx)
    if op == "sparse":
        value, leaf = msa.sparse_attention(q, k, v, support.random_blocks(inputs), *inputs.cu, 16)[0].sum(), q
    elif op == "dense":
        value, leaf = msa.dense_attention(q, k, v, *inputs.cu)[0].sum(), q
    else:
        value, leaf = msa.index_kl(q_idx, k_idx, q, k, None, *inputs.cu, 16), q_idx
    (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}.*backward.*not implemented"):
        grad.sum().backward()


def test_selections_and_recalls_carry_no_gradient():
    inputs = make_inputs(SHAPES["around_a_block"])
    q, k, q_idx, k_idx = leaves(inputs.q, inputs.k, inputs.q_idx, inputs.k_idx)
    blocks = msa.select_blocks(q_idx, k_idx, *inputs.cu, 16, 2)
    results = (blocks, msa.select_blocks_oracle(q, k, *inputs.cu, 16, 2), *msa.selection_recall(q, k, blocks, *inputs.cu, 16))
    assert not any(r.requires_grad for r in results)


@pytest.mark.parametrize("op", ["sparse_attention_paged", "dense_attention_paged"])
def test_paged_gradient_is_refused_by_name(op):
    inputs = make_inputs(SHAPES["around_a_block"])
    pages = support.to_pages((inputs.k, inputs.v), inputs.cu_seqlens_k, 16)
    q = inputs.q.requires_grad_()
    blocks = (support.random_blocks(inputs),) if op.startswith("sparse") else ()
    block_size = (16,) if blocks else ()
    out, _ = getattr(msa, op)(
        q, *pages.tensors, *blocks, inputs.cu_seqlens_q, pages.page_table, pages.seqlens_k, *block_size
    )
    with pytest.raises(RuntimeError, match=f"{op} is not implemented"):
        out.sum().backward()
