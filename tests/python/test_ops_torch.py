# SPDX-License-Identifier: Apache-2.0
"""The operators as citizens of torch: opcheck, torch.compile, export, autocast, meta tensors."""

import msa
import ops_support as support
import pytest
import torch
from ops_support import SHAPES, Shape, make_inputs

PACKED = ("select_blocks", "select_blocks_oracle", "sparse_attention", "dense_attention", "index_kl", "selection_recall",
          "topk_blocks")
PAGED = ("select_blocks_paged", "select_blocks_oracle_paged", "sparse_attention_paged", "dense_attention_paged")


def packed_arguments(op, inputs, differentiable=()):
    """Positional and keyword arguments of a packed operator; the named tensors are leaves that require gradients."""
    tensors = {name: getattr(inputs, name).clone() for name in ("q", "k", "v", "q_idx", "k_idx")}
    for name in differentiable:
        tensors[name].requires_grad_()
    q, k, v, q_idx, k_idx = tensors.values()
    shape, blocks = inputs.shape, support.random_blocks(inputs)
    size = shape.block_size
    return {
        "select_blocks": (q_idx, k_idx, *inputs.cu, size, shape.topk, shape.local_blocks, shape.init_blocks),
        "select_blocks_oracle": (q, k, *inputs.cu, size, shape.topk),
        "sparse_attention": (q, k, v, blocks, *inputs.cu, size),
        "dense_attention": (q, k, v, *inputs.cu),
        "index_kl": (q_idx, k_idx, q, k, blocks, *inputs.cu, size),
        "selection_recall": (q, k, blocks, *inputs.cu, size),
        "topk_blocks": (q[:, 0].float(), shape.topk),
    }[op]


def paged_arguments(op, inputs):
    pages = support.to_pages((inputs.k, inputs.v, inputs.k_idx), inputs.cu_seqlens_k, inputs.block_size)
    k, v, k_idx = (t.nan_to_num(0) for t in pages.tensors)  # opcheck compares copies, and NaN is unequal to itself
    where = (inputs.cu_seqlens_q, pages.page_table, pages.seqlens_k)
    size, topk = inputs.block_size, inputs.shape.topk
    return {
        "select_blocks_paged": (inputs.q_idx, k_idx, *where, size, topk),
        "select_blocks_oracle_paged": (inputs.q, k, *where, size, topk),
        "sparse_attention_paged": (inputs.q, k, v, support.random_blocks(inputs), *where, size),
        "dense_attention_paged": (inputs.q, k, v, *where),
    }[op]


# opcheck compares traced and eager outputs, for which a NaN is no equal of a NaN: every recall here has a row to count.
OPCHECK_SHAPES = {
    "decode": Shape(((1, 60),), group_size=1, topk=2),
    "several": Shape(((15, 15), (16, 40), (17, 17)), group_size=3, topk=2),
    "unequal_dims": Shape(((20, 70),), kv_heads=1, group_size=7, head_dim=48, value_dim=80, index_dim=64, topk=2),
}


@pytest.mark.parametrize(
    "name,dtype,differentiable",
    [
        ("decode", torch.float32, "q k v q_idx k_idx"),
        ("several", torch.bfloat16, ""),
        ("several", torch.float16, "k k_idx"),
        ("unequal_dims", torch.float32, "q k v q_idx k_idx"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", PACKED)
def test_opcheck(op, name, dtype, differentiable):
    arguments = packed_arguments(op, make_inputs(OPCHECK_SHAPES[name], dtype), differentiable.split())
    torch.library.opcheck(getattr(torch.ops.msa, op).default, arguments)


@pytest.mark.parametrize("op", PAGED)
def test_opcheck_paged(op):
    arguments = paged_arguments(op, make_inputs(OPCHECK_SHAPES["several"]))
    torch.library.opcheck(getattr(torch.ops.msa, op).default, arguments)


@pytest.mark.parametrize("keywords", [{"query_positions": True}, {"scale": 0.2}])
@pytest.mark.parametrize("op", ["sparse_attention", "dense_attention", "index_kl", "selection_recall"])
def test_opcheck_keywords(op, keywords):
    inputs = make_inputs(Shape(((3, 40), (2, 20)), topk=1))
    if "query_positions" in keywords:
        keywords = {"query_positions": torch.tensor([2, 30, 39, 0, 19], dtype=torch.int32)}
    arguments = packed_arguments(op, inputs, ("q", "k_idx"))
    if op != "dense_attention":  # every row has block 0
        position = 4 if op == "index_kl" else 3 if op == "sparse_attention" else 2
        first = torch.full_like(arguments[position], -1)
        first[..., 0] = 0
        arguments = (*arguments[:position], first, *arguments[position + 1 :])
    if op == "index_kl":
        keywords = {**keywords, "teacher": "max"}
    torch.library.opcheck(getattr(torch.ops.msa, op).default, arguments, keywords)


def test_opcheck_backward_operators():
    inputs = make_inputs(OPCHECK_SHAPES["several"])
    blocks = msa.select_blocks(inputs.q_idx, inputs.k_idx, *inputs.cu, 16, 2)
    q, k, v = inputs.q, inputs.k, inputs.v
    for selected in ((blocks,), ()):
        op = torch.ops.msa.sparse_attention if selected else torch.ops.msa.dense_attention
        backward = torch.ops.msa.sparse_attention_backward if selected else torch.ops.msa.dense_attention_backward
        block_size = (16,) if selected else ()
        out, lse = op(q, k, v, *selected, *inputs.cu, *block_size)
        tail = (q, k, v, *selected, out, lse, *inputs.cu, *block_size, None, None)
        for gradients in ((out, lse), (None, lse), (out, None), (None, None)):
            torch.library.opcheck(backward.default, (*gradients, *tail))
    head = (inputs.q_idx, inputs.k_idx, q, k, blocks)
    tail = (*inputs.cu, 16, None, None, "mean", None)
    torch.library.opcheck(torch.ops.msa._index_kl_forward.default, (*head, *tail))
    _, *saved = torch.ops.msa._index_kl_forward(*head, *tail)
    torch.library.opcheck(torch.ops.msa._index_kl_backward.default, (torch.tensor(2.0), *head, *saved, *tail))


def layer(q, k, v, q_idx, k_idx, cu_q, cu_k):
    """What a layer does in the sparse stage."""
    blocks = msa.select_blocks(q_idx, k_idx, cu_q, cu_k, 16, 2)
    out, lse = msa.sparse_attention(q * 1.5, k, v, blocks, cu_q, cu_k, 16)
    dense, _ = msa.dense_attention(q, k, v, cu_q, cu_k)
    kl = msa.index_kl(q_idx, k_idx, q, k, blocks, cu_q, cu_k, 16, teacher="max")
    recall = msa.selection_recall(q, k, blocks, cu_q, cu_k, 16)[1]
    return (out * dense).sum() + lse.sum() + 10 * kl, recall


def run_layer(function, inputs):
    tensors = [getattr(inputs, name).clone().requires_grad_() for name in ("q", "k", "v", "q_idx", "k_idx")]
    loss, recall = function(*tensors, *inputs.cu)
    return (loss, recall, *torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_backward(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in (((40, 40), (16, 30)), ((23, 50),), ((40, 60), (1, 9), (33, 33))):
        inputs = make_inputs(Shape(lengths, group_size=3), seed=len(lengths))
        for expected, got in zip(run_layer(layer, inputs), run_layer(compiled, inputs)):
            torch.testing.assert_close(got, expected)


def test_dynamic_shapes_compile_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (40, 57, 90):
        run_layer(compiled, make_inputs(Shape(((tokens, tokens + 8), (20, 20)), group_size=2)))
    assert counter.frame_count == 1


def test_compile_paged():
    torch._dynamo.reset()
    inputs = make_inputs(OPCHECK_SHAPES["several"])

    def decode(q, q_idx, k_idx, k, v, cu, table, seqlens):
        blocks = msa.select_blocks_paged(q_idx, k_idx, cu, table, seqlens, 16, 2)
        return msa.sparse_attention_paged(q, k, v, blocks, cu, table, seqlens, 16)

    pages = support.to_pages((inputs.k_idx, inputs.k, inputs.v), inputs.cu_seqlens_k, 16)
    arguments = (inputs.q, inputs.q_idx, *pages.tensors, inputs.cu_seqlens_q, pages.page_table, pages.seqlens_k)
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager", dynamic=True)
    for expected, got in zip(decode(*arguments), compiled(*arguments)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("op", PACKED)
def test_meta_tensors_give_the_real_shapes(op):
    arguments = packed_arguments(op, make_inputs(SHAPES["unequal_dims"], torch.bfloat16))
    function = getattr(msa, op)
    real = function(*arguments)
    meta = function(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
    for a, b in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (real, meta))):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) and b.is_meta


def test_autocast_leaves_dtypes_alone():
    inputs = make_inputs(SHAPES["around_a_block"])
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = msa.dense_attention(inputs.q, inputs.k, inputs.v, *inputs.cu)
    assert out.dtype == torch.float32
    assert torch.equal(out, msa.dense_attention(inputs.q, inputs.k, inputs.v, *inputs.cu)[0])


def test_inference_mode():
    inputs = make_inputs(SHAPES["around_a_block"])
    with torch.inference_mode():
        out, _ = msa.dense_attention(inputs.q.requires_grad_(), inputs.k, inputs.v, *inputs.cu)
    assert not out.requires_grad


@pytest.mark.parametrize("op", PACKED)
def test_arguments_by_keyword(op):
    """The signatures users rely on: every argument by its name, in the documented order."""
    names = {
        "select_blocks": "q_idx k_idx cu_seqlens_q cu_seqlens_k block_size topk local_blocks init_blocks",
        "select_blocks_oracle": "q k cu_seqlens_q cu_seqlens_k block_size topk",
        "sparse_attention": "q k v blocks cu_seqlens_q cu_seqlens_k block_size",
        "dense_attention": "q k v cu_seqlens_q cu_seqlens_k",
        "index_kl": "q_idx k_idx q k blocks cu_seqlens_q cu_seqlens_k block_size",
        "selection_recall": "q k blocks cu_seqlens_q cu_seqlens_k block_size",
        "topk_blocks": "scores topk",
    }[op].split()
    arguments = packed_arguments(op, make_inputs(OPCHECK_SHAPES["several"]))
    results = []
    for function in (getattr(torch.ops.msa, op), getattr(msa, op)):
        results += [function(*arguments), function(**dict(zip(names, arguments)))]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)


def test_backend_is_read_from_the_environment(monkeypatch):
    inputs = make_inputs(SHAPES["around_a_block"])
    monkeypatch.setenv("MSA_BACKEND", "abacus")
    with pytest.raises(RuntimeError, match="abacus"):
        msa.dense_attention(inputs.q, inputs.k, inputs.v, *inputs.cu)
