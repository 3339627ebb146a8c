# SPDX-License-Identifier: Apache-2.0
"""Bad input raises RuntimeError and names the argument; nothing is computed."""

import msa
import ops_support as support
import pytest
import torch
from ops_support import Shape, make_inputs

SHAPE = Shape(((10, 40), (20, 20)))


def arguments(op):
    """Good keyword arguments of an operator."""
    inputs = make_inputs(SHAPE)
    pages = support.to_pages((inputs.k, inputs.v, inputs.k_idx), inputs.cu_seqlens_k, 16)
    available = {
        **{name: getattr(inputs, name) for name in ("q", "k", "v", "q_idx", "k_idx", "cu_seqlens_q", "cu_seqlens_k")},
        **dict(zip(("k_pages", "v_pages", "k_idx_pages"), pages.tensors)),
        "page_table": pages.page_table,
        "seqlens_k": pages.seqlens_k,
        "blocks": msa.select_blocks(inputs.q_idx, inputs.k_idx, *inputs.cu, 16, 2),
        "block_size": 16,
        "topk": 2,
        "scores": torch.randn(5, 9),
    }
    where = "cu_seqlens_q page_table seqlens_k" if op.endswith("_paged") else "cu_seqlens_q cu_seqlens_k"
    where = "" if op == "topk_blocks" else where
    names = {
        "select_blocks": "q_idx k_idx block_size topk",
        "topk_blocks": "scores topk",
        "select_blocks_oracle": "q k block_size topk",
        "sparse_attention": "q k v blocks block_size",
        "dense_attention": "q k v",
        "index_kl": "q_idx k_idx q k blocks block_size",
        "selection_recall": "q k blocks block_size",
        "select_blocks_paged": "q_idx k_idx_pages block_size topk",
        "select_blocks_oracle_paged": "q k_pages block_size topk",
        "sparse_attention_paged": "q k_pages v_pages blocks block_size",
        "dense_attention_paged": "q k_pages v_pages",
    }[op]
    return {name: available[name] for name in f"{names} {where}".split()}


OPS = [name for name in msa.__all__ if hasattr(torch.ops.msa, name) and not name.startswith(("version", "cuda", "check"))]
BATCHED = [op for op in OPS if op != "topk_blocks"]  # rows of scores know no sequences


def check_refused(op, argument, value, named=None):
    good = arguments(op)
    getattr(msa, op)(**good)
    with pytest.raises(RuntimeError, match=rf"^{op}: {named or argument}: "):
        getattr(msa, op)(**{**good, argument: value})


def tensors_of(op):
    return [name for name, value in arguments(op).items() if isinstance(value, torch.Tensor)]


FLOATS = ("q", "k", "v", "q_idx", "k_idx", "k_pages", "v_pages", "k_idx_pages", "scores")


@pytest.mark.parametrize("op,argument", [(op, name) for op in OPS for name in tensors_of(op)])
def test_wrong_dtype_and_rank(op, argument):
    good = arguments(op)[argument]
    wrong_type = torch.float64 if argument in FLOATS else torch.int64
    check_refused(op, argument, good.to(wrong_type))
    check_refused(op, argument, good[None])
    check_refused(op, argument, good.to(torch.float32 if argument not in FLOATS else torch.int32))


@pytest.mark.skipif(torch.ops.msa.cuda_is_built(), reason="this build has the CUDA backend")
def test_operators_refuse_cuda_by_name():
    """No GPU is needed to see it: the kernel that a CUDA tensor would meet is called directly."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for op in OPS:
        overload = getattr(torch.ops.msa, op).default
        with pytest.raises(RuntimeError, match=f"{op}: backend: cuda is not in this build"):
            overload.redispatch(cuda, **arguments(op))


@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("_paged")])
def test_tensors_on_two_devices(op):
    good = arguments(op)
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for name in tensors_of(op):
        with pytest.raises(RuntimeError, match=f"^{op}: {name}: is on meta"):
            getattr(torch.ops.msa, op).default.redispatch(cpu, **{**good, name: good[name].to("meta")})


@pytest.mark.parametrize("op", BATCHED)
@pytest.mark.parametrize(
    "entries",
    [[], [1, 10, 30], [0, 20, 10], [0, 10, 1000], [0, 10, 2**31 - 1], [0, -5, 30], [-(2**31), 10, 30]],
    ids=str,
)
def test_cu_seqlens(op, entries):
    bad = torch.tensor(entries, dtype=torch.int32)
    check_refused(op, "cu_seqlens_q", bad, named="(cu_seqlens_[qk]|seqlens_k|page_table)")
    if not op.endswith("_paged"):
        check_refused(op, "cu_seqlens_k", bad, named="cu_seqlens_[qk]")


@pytest.mark.parametrize("op", [op for op in OPS if "cu_seqlens_k" in arguments(op)])
def test_more_queries_than_keys(op):
    check_refused(op, "cu_seqlens_k", torch.tensor([0, 9, 60], dtype=torch.int32), named="cu_seqlens_q")


@pytest.mark.parametrize("op", [op for op in OPS if "topk" in arguments(op)])
@pytest.mark.parametrize("topk", [0, -1, 65, 2**40])
def test_topk(op, topk):
    check_refused(op, "topk", topk)


@pytest.mark.parametrize("op", [op for op in OPS if "block_size" in arguments(op)])
@pytest.mark.parametrize("block_size", [0, -16, 8, 24, 512, 2**40])
def test_block_size(op, block_size):
    check_refused(op, "block_size", block_size)


@pytest.mark.parametrize("op", [op for op in OPS if op.startswith("select_blocks")])
@pytest.mark.parametrize("argument", ["local_blocks", "init_blocks"])
def test_forced_blocks(op, argument):
    check_refused(op, argument, -1)


@pytest.mark.parametrize("op", [op for op in OPS if "q" in arguments(op)])
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale(op, scale):
    check_refused(op, "scale", scale)


def test_index_scale_and_teacher():
    check_refused("index_kl", "index_scale", float("-inf"))
    check_refused("index_kl", "teacher", "median")


@pytest.mark.parametrize("op", [op for op in OPS if "blocks" in arguments(op)])
@pytest.mark.parametrize("ids", [[3, -1], [1, 0], [0, 0], [-1, 0], [-2, -1], [0, 2**31 - 1], [0, 3]], ids=str)
def test_block_ids(op, ids):
    blocks = arguments(op)["blocks"].clone()
    blocks[1, 7] = torch.tensor(ids, dtype=torch.int32)  # stands at position 37 and sees blocks 0, 1, 2
    check_refused(op, "blocks", blocks)


@pytest.mark.parametrize("op", [op for op in OPS if "blocks" in arguments(op)])
def test_blocks_shape(op):
    good = arguments(op)["blocks"]
    check_refused(op, "blocks", good.transpose(0, 1))  # [T, H, k] is not [H, T, k]
    check_refused(op, "blocks", good[:1])
    check_refused(op, "blocks", good[:, :0])
    check_refused(op, "blocks", good[..., :0])
    check_refused(op, "blocks", torch.full((2, 30, 65), -1, dtype=torch.int32))


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith("_paged")])
def test_pages(op):
    table = arguments(op)["page_table"]
    for bad_id in (-1, -2, 10**6):
        bad = table.clone()
        bad[0, 1] = bad_id
        check_refused(op, "page_table", bad)
    check_refused(op, "page_table", table[:1])
    check_refused(op, "page_table", table[:, :1])
    check_refused(op, "page_table", table.reshape(1, -1))
    for lengths in ([40], [40, 20, 1], [40, -1], [40, 2**31 - 1], [40, 1000]):
        check_refused(
            op, "seqlens_k", torch.tensor(lengths, dtype=torch.int32), named="(seqlens_k|page_table)"
        )
    check_refused(op, "seqlens_k", torch.tensor([9, 20], dtype=torch.int32), named="cu_seqlens_q")


@pytest.mark.parametrize("op", ["select_blocks_paged", "sparse_attention_paged", "select_blocks_oracle_paged"])
def test_page_size_that_no_block_divides(op):
    good = arguments(op)
    keys = "k_idx_pages" if "k_idx_pages" in good else "k_pages"
    changed = {name: good[name][:, :8] for name in (keys, "v_pages") if name in good}
    with pytest.raises(RuntimeError, match=rf"^{op}: {keys}: .*page size 8"):
        getattr(msa, op)(**{**good, **changed})


def test_shapes_that_disagree():
    inputs = make_inputs(SHAPE)
    check_refused("select_blocks", "k_idx", inputs.k_idx[:, :8])
    check_refused("select_blocks", "k_idx", torch.zeros(60, 32))
    check_refused("select_blocks", "k_idx", inputs.k_idx[:59], named="cu_seqlens_k")
    check_refused("select_blocks", "k_idx", inputs.k_idx.bfloat16())
    check_refused("dense_attention", "k", inputs.k[:, :, :16])
    check_refused("dense_attention", "k", inputs.k.half())
    check_refused("dense_attention", "v", inputs.v.half())
    check_refused("dense_attention", "v", inputs.v[:, :1])
    check_refused("dense_attention", "v", inputs.v[:50])
    check_refused("dense_attention", "v", torch.zeros(60, 2, 8))
    check_refused("dense_attention", "v", torch.zeros(1, 1, 1).expand(60, 2, 2**50))
    check_refused("dense_attention", "q", inputs.q[:, :3])
    check_refused("dense_attention", "q", inputs.q[:29], named="cu_seqlens_q")
    check_refused("index_kl", "q_idx", inputs.q_idx[:, :1])
    check_refused("index_kl", "q_idx", inputs.q_idx[:29])
    check_refused("index_kl", "k_idx", inputs.k_idx[:59])


@pytest.mark.parametrize("op", BATCHED)
@pytest.mark.parametrize("change", ["repeated", "negative", "beyond the keys", "too few", "int64", "rank 2"])
def test_query_positions(op, change):
    positions = torch.cat((torch.arange(10), torch.arange(20))).int()
    good = arguments(op)
    getattr(msa, op)(**{**good, "query_positions": positions}) if "blocks" not in good else None
    if change == "repeated":
        positions[3] = positions[2]
    elif change == "negative":
        positions[0] = -1
    elif change == "beyond the keys":
        positions[29] = 20
    elif change == "too few":
        positions = positions[:-1]
    elif change == "int64":
        positions = positions.long()
    else:
        positions = positions[None]
    check_refused(op, "query_positions", positions)


def test_missing_and_surplus_arguments():
    good = arguments("dense_attention")
    with pytest.raises(RuntimeError, match="cu_seqlens_k"):
        torch.ops.msa.dense_attention(*list(good.values())[:-1])
    with pytest.raises(RuntimeError, match="teacher"):
        torch.ops.msa.dense_attention(**good, teacher="mean")
