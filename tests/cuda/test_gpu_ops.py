# SPDX-License-Identifier: Apache-2.0
"""The operators on a GPU against the float64 reference on the host, on the same inputs: boundary-rich batches, the geometries
of the fast path, every storage type, pages, chosen positions; bitwise independence of packing, chunking and pages; repeated
runs; poisoned outputs; autograd; graphs; streams.

`-m reduced` picks the small set that runs under compute-sanitizer.
"""

import math

import msa
import ops_support as support
import pytest
import torch
from ops_support import SHAPES, Shape, make_inputs

reduced = pytest.mark.reduced
DTYPES = support.DTYPES
# The fast path: head_dim = value_dim and index_dim 64 or 128, blocks of 64 or 128, group sizes that fill a tile of rows or
# not, prefixes, a decode beside a prefill.
FAST = {
    "paper": Shape(((70, 700), (1, 1300), (4, 260)), 2, 16, 128, 128, 128, 128, 4),
    "small_heads": Shape(((33, 33), (129, 515)), 4, 4, 64, 64, 64, 64, 3),
    "no_groups": Shape(((65, 400),), 3, 1, 128, 128, 64, 64, 5, init_blocks=1),
    "odd_groups": Shape(((130, 130), (2, 641)), 2, 7, 64, 64, 128, 128, 2, local_blocks=2),
    "many_blocks": Shape(((3, 4500), (1, 64)), 1, 8, 128, 128, 128, 64, 64),
    "wide_groups": Shape(((20, 260),), 1, 64, 64, 64, 64, 64, 2),
    "padding": Shape(((9, 200), (0, 77), (5, 5)), 2, 4, 128, 128, 128, 128, 3, query_padding=3, key_padding=5),
}
ALL = {**SHAPES, **FAST}
shapes = pytest.mark.parametrize("name", ALL)
fast_shapes = pytest.mark.parametrize("name", FAST)
narrow = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def select(inputs, gpu=True, positions=None):
    shape = inputs.shape
    move = on_gpu if gpu else lambda value: value
    return msa.select_blocks(
        move(inputs.q_idx), move(inputs.k_idx), *map(move, inputs.cu), shape.block_size, shape.topk, shape.local_blocks,
        shape.init_blocks, query_positions=move(positions),
    )


def attend(inputs, blocks, gpu=True):
    move = on_gpu if gpu else lambda value: value
    return msa.sparse_attention(
        move(inputs.q), move(inputs.k), move(inputs.v), move(blocks), *map(move, inputs.cu), inputs.shape.block_size
    )


def hold(actual, truth, naive, dtype, what):
    support.assert_within_rule(actual.cpu(), truth, naive, dtype, what)


def yardstick(inputs, blocks=None):
    """(out, lse) naively in float64 and in the storage type."""
    arguments = (*inputs.cu, blocks, inputs.shape.block_size)
    wide = [t.double() for t in (inputs.q, inputs.k, inputs.v)]
    return support.naive_attention(*wide, *arguments), support.naive_attention(inputs.q, inputs.k, inputs.v, *arguments)


def same_bits(left, right):
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


@reduced
@shapes
@dtypes
def test_select_blocks_on_exact_scores(name, dtype):
    """Small integers: every way of summing gives the same scores, so the ids must be the reference's."""
    inputs = make_inputs(ALL[name], dtype, integers=True)
    assert torch.equal(select(inputs).cpu(), select(inputs, gpu=False))


@fast_shapes
@narrow
def test_select_blocks_on_random_scores(name, dtype):
    """Where scores differ by less than rounding the order may differ: the chosen blocks' scores may not."""
    inputs = make_inputs(FAST[name], dtype)
    chosen, expected = select(inputs).cpu(), select(inputs, gpu=False)
    rows = support.naive_block_scores(inputs)
    for head, row, scores in rows:
        left = [b for b in chosen[head, row].tolist() if b >= 0]
        right = [b for b in expected[head, row].tolist() if b >= 0]
        assert len(left) == len(right) and left == sorted(set(left))
        for a, b in zip(sorted(scores[i] for i in left), sorted(scores[i] for i in right)):
            assert math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4), (head, row)


@reduced
@pytest.mark.parametrize("name", ("paper", "small_heads", "many_blocks"))
@narrow
def test_float8_index_keys_select_as_the_same_numbers_in_16_bits(name, dtype):
    inputs = make_inputs(FAST[name], dtype)
    patterns = torch.arange(256, dtype=torch.uint8)  # subnormals and both NaN among them
    inputs.k_idx.view(-1)[: 3 * 256] = patterns.view(torch.float8_e4m3fn).to(dtype).repeat(3)
    narrow_keys = inputs.k_idx.to(torch.float8_e4m3fn)
    inputs.k_idx.copy_(narrow_keys.to(dtype))
    expected = select(inputs)
    inputs.k_idx = narrow_keys
    assert torch.equal(select(inputs), expected)


SCREENED = {  # rows enough for the kernels that screen: 256 a sequence
    "paper": Shape(((300, 5000), (260, 2600)), 4, 16, 128, 128, 128, 128, 4),
    "small": Shape(((600, 4000),), 3, 3, 64, 64, 64, 64, 16, init_blocks=1),
    "wide_topk": Shape(((130, 9000),), 2, 4, 128, 128, 128, 64, 64, local_blocks=2),
}


def spoil_nothing(inputs):
    pass


def spoil_channel(inputs):
    inputs.k_idx[:, 5] *= 3000


def spoil_bias(inputs):
    inputs.k_idx += 100


def spoil_ties(inputs):
    inputs.k_idx.copy_(inputs.k_idx.sign())
    inputs.q_idx.copy_(inputs.q_idx.sign())


def spoil_range(inputs):
    inputs.k_idx[::3] *= 2.0**-50
    inputs.k_idx[1::97] *= 2.0**12


def spoil_values(inputs):
    inputs.k_idx[::101] = math.nan
    inputs.k_idx[7::300, 3] = math.inf
    inputs.k_idx[1000:1300] = 0
    inputs.q_idx[::17, :, 9] = -math.inf
    inputs.q_idx[5::40] = 0


@reduced
@pytest.mark.parametrize("spoil", (spoil_nothing, spoil_channel, spoil_bias, spoil_ties, spoil_range, spoil_values))
@pytest.mark.parametrize("name", SCREENED)
@narrow
def test_screening_changes_no_bit(name, dtype, spoil, monkeypatch):
    inputs = make_inputs(SCREENED[name], dtype)
    spoil(inputs)
    monkeypatch.setenv("MSA_SCREEN", "0")
    plain = select(inputs)
    monkeypatch.setenv("MSA_SCREEN", "1")
    assert torch.equal(select(inputs), plain)


@reduced
@pytest.mark.parametrize("rows,blocks,topk", [(0, 5, 2), (3, 0, 2), (4, 3, 8), (40, 33, 16), (17, 700, 64), (5, 4099, 32)])
def test_topk_blocks(rows, blocks, topk):
    scores = torch.randint(-3, 4, (rows, blocks), generator=torch.Generator().manual_seed(2)).float()
    scores[scores == 3] = math.nan
    assert torch.equal(msa.topk_blocks(scores.cuda(), topk).cpu(), msa.topk_blocks(scores, topk))
    strided = scores.t().contiguous().t()
    assert torch.equal(msa.topk_blocks(strided.cuda(), topk).cpu(), msa.topk_blocks(scores, topk))


@reduced
@shapes
@dtypes
def test_sparse_attention(name, dtype):
    inputs = make_inputs(ALL[name], dtype)
    blocks = support.random_blocks(inputs)
    out, lse = attend(inputs, blocks)
    (truth, truth_lse), (naive, naive_lse) = yardstick(inputs, blocks)
    hold(out, truth, naive, dtype, "out")
    hold(lse, truth_lse, naive_lse, dtype, "lse")


@pytest.mark.parametrize("value_dim", [16, 64, 256])
def test_sparse_attention_of_other_value_dims(value_dim):
    inputs = make_inputs(Shape(((20, 300),), 2, 4, 128, value_dim, 64, 128, 3), torch.bfloat16)
    blocks = support.random_blocks(inputs)
    (truth, _), (naive, _) = yardstick(inputs, blocks)
    hold(attend(inputs, blocks)[0], truth, naive, torch.bfloat16, "out")


@reduced
@shapes
@dtypes
def test_dense_attention(name, dtype):
    inputs = make_inputs(ALL[name], dtype)
    out, lse = msa.dense_attention(*map(on_gpu, (inputs.q, inputs.k, inputs.v, *inputs.cu)))
    (truth, truth_lse), (naive, naive_lse) = yardstick(inputs)
    hold(out, truth, naive, dtype, "out")
    hold(lse, truth_lse, naive_lse, dtype, "lse")


def gradients(function, inputs, names, seed=5):
    """Of a random weighting of all outputs, on the host and on the GPU."""
    results = []
    for move in (lambda value: value, on_gpu):
        leaves = [move(getattr(inputs, name)).detach().clone().requires_grad_() for name in names]
        outputs = function(*leaves, move)
        generator = torch.Generator().manual_seed(seed)
        loss = 0
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            weights = torch.randn(output.shape, generator=generator)
            finite = torch.where(output.isfinite(), output.float(), torch.zeros_like(output, dtype=torch.float32))
            loss = loss + (finite * move(weights)).sum()
        results.append(torch.autograd.grad(loss, leaves))
    return results


@reduced
@shapes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_attention_gradients(name, dtype, sparse):
    inputs = make_inputs(ALL[name], dtype)
    blocks = support.random_blocks(inputs)

    def forward(q, k, v, move):
        cu = [move(t) for t in inputs.cu]
        if not sparse:
            return msa.dense_attention(q, k, v, *cu)
        return msa.sparse_attention(q, k, v, move(blocks), *cu, inputs.shape.block_size)

    host, gpu = gradients(forward, inputs, ("q", "k", "v"))
    for what, expected, actual in zip(("dq", "dk", "dv"), host, gpu):
        assert actual.dtype == dtype
        largest = max(expected.float().abs().max().item(), 1e-6) if expected.numel() else 1
        error = (actual.cpu().float() - expected.float()).abs().max().item() if expected.numel() else 0
        assert error <= (1e-4 if dtype == torch.float32 else 3e-2) * largest, f"{what}: {error} of {largest}"


@reduced
@shapes
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "warmup"])
@pytest.mark.parametrize("teacher", ["mean", "max"])
def test_index_kl(name, dense, teacher):
    inputs = make_inputs(ALL[name])
    blocks = None if dense else support.random_blocks(inputs)

    def forward(q_idx, k_idx, move):
        return msa.index_kl(
            q_idx, k_idx, move(inputs.q), move(inputs.k), None if blocks is None else move(blocks),
            *map(move, inputs.cu), inputs.shape.block_size, teacher=teacher,
        )

    values = [forward(move(inputs.q_idx), move(inputs.k_idx), move).cpu() for move in (lambda value: value, on_gpu)]
    assert torch.allclose(values[1], values[0], rtol=1e-4, atol=1e-6)
    host, gpu = gradients(forward, inputs, ("q_idx", "k_idx"))
    for expected, actual in zip(host, gpu):
        largest = max(expected.abs().max().item(), 1e-7) if expected.numel() else 1
        assert (actual.cpu() - expected).abs().le(2e-4 * largest).all()


@reduced
@fast_shapes
@pytest.mark.parametrize("dtype,teacher", [(torch.bfloat16, "mean"), (torch.float16, "max")], ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "warmup"])
def test_index_kl_of_narrow_types(name, dtype, dense, teacher):
    """The fast kernels, value and gradients by the tolerance rule; and the same bits once more."""
    inputs = make_inputs(FAST[name], dtype)
    blocks = None if dense else support.random_blocks(inputs)
    queries = sum(lq for lq, _ in inputs.shape.lengths)

    def run(kl, move, kind):
        leaves = [move(t.to(kind)).requires_grad_() for t in (inputs.q_idx, inputs.k_idx)]
        main = [move(t.to(kind)) for t in (inputs.q, inputs.k)]
        value = kl(
            *leaves, *main, None if dense else move(blocks), *map(move, inputs.cu), inputs.shape.block_size, teacher=teacher
        )
        return [value[None], *torch.autograd.grad(value * queries, leaves)]  # a sum keeps gradients within float16

    truth = run(support.naive_index_kl, lambda t: t, torch.float64)
    naive = run(support.naive_index_kl, lambda t: t, dtype)
    actual = run(msa.index_kl, on_gpu, dtype)
    for what, *results in zip(("value", "dq_idx", "dk_idx"), actual, truth, naive):
        hold(*results, dtype, what)
    assert all(same_bits(a, b) for a, b in zip(run(msa.index_kl, on_gpu, dtype), actual))


@reduced
@shapes
def test_oracle_and_recall(name):
    inputs = make_inputs(ALL[name], seed=3)
    shape = inputs.shape
    arguments = (inputs.q, inputs.k, *inputs.cu, shape.block_size, shape.topk)
    blocks = msa.select_blocks_oracle(*map(on_gpu, arguments)).cpu()
    expected = msa.select_blocks_oracle(*arguments)
    assert (blocks != expected).float().mean().item() <= 0.01 if blocks.numel() else True
    chosen = support.random_blocks(inputs)
    cu_and_size = (*inputs.cu, shape.block_size)
    host = msa.selection_recall(inputs.q, inputs.k, chosen, *cu_and_size)
    gpu = msa.selection_recall(*map(on_gpu, (inputs.q, inputs.k, chosen, *cu_and_size)))
    for expected, actual in zip(host, gpu):
        assert torch.allclose(actual.cpu(), expected, rtol=1e-3, atol=1e-3, equal_nan=True)


@reduced
@fast_shapes
@narrow
def test_pages_equal_packed_bitwise(name, dtype):
    inputs = make_inputs(FAST[name], dtype)
    shape = inputs.shape
    blocks, (out, lse) = select(inputs), attend(inputs, support.random_blocks(inputs))
    for page in (shape.block_size, 2 * shape.block_size):
        pages = support.to_pages([inputs.k, inputs.v, inputs.k_idx], inputs.cu[1], page)
        k, v, k_idx = map(on_gpu, pages.tensors)
        where = (inputs.cu[0].cuda(), pages.page_table.cuda(), pages.seqlens_k.cuda())
        paged = msa.select_blocks_paged(
            inputs.q_idx.cuda(), k_idx, *where, shape.block_size, shape.topk, shape.local_blocks, shape.init_blocks
        )
        assert torch.equal(paged, blocks)
        paged_out, paged_lse = msa.sparse_attention_paged(
            inputs.q.cuda(), k, v, support.random_blocks(inputs).cuda(), *where, shape.block_size
        )
        assert same_bits(paged_out, out) and same_bits(paged_lse, lse)


@reduced
@fast_shapes
@narrow
@pytest.mark.parametrize("page", [16, 48, 128, 512])
def test_dense_pages_equal_packed_bitwise(name, dtype, page):
    inputs = make_inputs(FAST[name], dtype)
    out, lse = msa.dense_attention(*map(on_gpu, (inputs.q, inputs.k, inputs.v, *inputs.cu)))
    pages = support.to_pages([inputs.k, inputs.v], inputs.cu[1], page)
    where = (inputs.cu[0].cuda(), pages.page_table.cuda(), pages.seqlens_k.cuda())
    paged_out, paged_lse = msa.dense_attention_paged(inputs.q.cuda(), *map(on_gpu, pages.tensors), *where)
    assert same_bits(paged_out, out) and same_bits(paged_lse, lse)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_dense_tokens_have_the_bits_of_a_prefill(stored, head_dim):
    """Two positions a tile, so that a prefill has its thousand tiles and merges spans in the kernel; a token alone has spans
    as items."""
    inputs = make_inputs(Shape(((600, 13000), (3, 4097), (1, 4096)), 4, 64, head_dim, head_dim, 64, 64, 1), torch.bfloat16)
    q, k, v = (t.cuda() for t in (inputs.q, inputs.k, inputs.v))
    k, v = k.to(stored), v.to(stored)
    out, lse = msa.dense_attention(q, k, v, *map(on_gpu, inputs.cu))
    for row, first, keys in ((0, 0, 12401), (300, 0, 12701), (599, 0, 13000), (602, 13000, 4097), (603, 17097, 4096)):
        cu = [torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (1, keys)]
        seen = slice(first, first + keys)
        alone_out, alone_lse = msa.dense_attention(q[row : row + 1], k[seen], v[seen], *cu)
        assert same_bits(alone_out[0], out[row]) and same_bits(alone_lse[0], lse[row]), row


@narrow
def test_dense_float8_equals_widened_bitwise(dtype):
    for shape in FAST.values():
        inputs = make_inputs(shape, dtype)
        cu = [t.cuda() for t in inputs.cu]
        k, v = (t.nan_to_num().to(torch.float8_e4m3fn).cuda() for t in (inputs.k, inputs.v))
        out, lse = msa.dense_attention(inputs.q.cuda(), k, v, *cu)
        wide_out, wide_lse = msa.dense_attention(inputs.q.cuda(), k.to(dtype), v.to(dtype), *cu)
        assert same_bits(out, wide_out) and same_bits(lse, wide_lse)


@fast_shapes
@narrow
def test_results_do_not_depend_on_the_batch(name, dtype):
    """Every sequence alone, and its last token alone, give the bits of the whole batch: prefill equals decode."""
    inputs = make_inputs(FAST[name], dtype)
    shape = inputs.shape
    given = support.random_blocks(inputs)
    blocks, (out, lse) = select(inputs), attend(inputs, given)
    dense = msa.dense_attention(*map(on_gpu, (inputs.q, inputs.k, inputs.v, *inputs.cu)))[0]
    cu_q, cu_k = (t.tolist() for t in inputs.cu)
    for s in range(len(cu_q) - 1):
        for first in {cu_q[s], max(cu_q[s], cu_q[s + 1] - 1)}:
            rows, keys = slice(first, cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
            if rows.start >= rows.stop:
                continue
            cu = [torch.tensor([0, part.stop - part.start], dtype=torch.int32).cuda() for part in (rows, keys)]
            q, k, v = (t.cuda() for t in (inputs.q[rows], inputs.k[keys], inputs.v[keys]))
            alone = msa.select_blocks(
                inputs.q_idx[rows].cuda(), inputs.k_idx[keys].cuda(), *cu, shape.block_size, shape.topk,
                shape.local_blocks, shape.init_blocks,
            )
            assert torch.equal(alone, blocks[:, rows])
            alone_out, alone_lse = msa.sparse_attention(q, k, v, given[:, rows].cuda(), *cu, shape.block_size)
            assert same_bits(alone_out, out[rows]) and same_bits(alone_lse, lse[rows])
            assert same_bits(msa.dense_attention(q, k, v, *cu)[0], dense[rows])


@pytest.mark.parametrize("group_size", [16, 7, 4])
@pytest.mark.parametrize("is_shared", [True, False], ids=["stripes", "random"])
def test_orders_of_the_sparse_forward_agree(is_shared, group_size):
    """A prefill, whose tiles go query by query where neighbours share their blocks and block by block elsewhere, has the bits
    of the same queries a few at a time."""
    inputs = make_inputs(Shape(((1024, 1500),), 2, group_size, 128, 128, 128, 128, 4), torch.bfloat16)
    blocks = support.random_blocks(inputs)
    if is_shared:  # every query of 64 takes what the first of them does, and its own local block
        own = ((torch.arange(1024) + 476) // 128)[None, :, None].expand(2, 1024, 1).int()
        chosen = blocks[:, torch.arange(1024) // 64 * 64, :3]
        none = 1 << 20
        blocks = torch.cat([torch.where((chosen >= 0) & (chosen < own), chosen, none), own], 2).sort(-1).values
        blocks = torch.where(blocks == none, -1, blocks)
    out, lse = attend(inputs, blocks)
    (truth, truth_lse), (naive, naive_lse) = yardstick(inputs, blocks)
    hold(out, truth, naive, torch.bfloat16, "out")
    hold(lse, truth_lse, naive_lse, torch.bfloat16, "lse")
    k, v = inputs.k.cuda(), inputs.v.cuda()
    for begin in range(0, 1024, 48):
        rows = slice(begin, min(begin + 48, 1024))
        keys = 476 + rows.stop
        cu = [torch.tensor([0, n], dtype=torch.int32).cuda() for n in (rows.stop - begin, keys)]
        part = msa.sparse_attention(inputs.q[rows].cuda(), k[:keys], v[:keys], blocks[:, rows].cuda(), *cu, 128)
        assert same_bits(part[0], out[rows]) and same_bits(part[1], lse[rows])


@narrow
def test_values_that_are_not_finite(dtype):
    """They reach the rows that see them, as what they are, and no others."""
    inputs = make_inputs(Shape(((300, 300),), 1, 6, 64, 64, 64, 64, 3), dtype)
    blocks = support.random_blocks(inputs)
    inputs.v[60, 0, 7], inputs.v[20, 0, 40], inputs.v[150, 0, 40], inputs.v[90, 0, 41] = math.nan, math.inf, -math.inf, math.inf
    out = attend(inputs, blocks)[0].cpu().double()
    truth = msa.sparse_attention(*(t.float() for t in (inputs.q, inputs.k, inputs.v)), blocks, *inputs.cu, 64)[0].double()
    assert torch.equal(out.isnan(), truth.isnan()) and torch.equal(out.isinf(), truth.isinf())
    assert torch.allclose(out, truth, rtol=5e-2, atol=5e-2, equal_nan=True)


@fast_shapes
@narrow
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_gradients_do_not_depend_on_the_batch(name, dtype, sparse):
    """Every sequence alone gives the bits that it has in the batch."""
    inputs = make_inputs(FAST[name], dtype)
    given = support.random_blocks(inputs)
    weights = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(4)).to(dtype).cuda()

    def grads(rows, keys, cu):
        leaves = [t.cuda().requires_grad_() for t in (inputs.q[rows], inputs.k[keys], inputs.v[keys])]
        if sparse:
            out, _ = msa.sparse_attention(*leaves, given[:, rows].cuda(), *cu, inputs.shape.block_size)
        else:
            out, _ = msa.dense_attention(*leaves, *cu)
        return torch.autograd.grad(out, leaves, weights[rows])

    whole = grads(slice(None), slice(None), [t.cuda() for t in inputs.cu])
    cu_q, cu_k = (t.tolist() for t in inputs.cu)
    for s in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        cu = [torch.tensor([0, part.stop - part.start], dtype=torch.int32).cuda() for part in (rows, keys)]
        for alone, all_of, part in zip(grads(rows, keys, cu), whole, (rows, keys, keys)):
            assert same_bits(alone, all_of[part])


@fast_shapes
def test_repeated_runs_are_bitwise_equal(name):
    inputs = make_inputs(FAST[name], torch.bfloat16)
    given = support.random_blocks(inputs).cuda()
    tensors = [t.cuda().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    cu = [t.cuda() for t in inputs.cu]
    first = None
    for _ in range(5):
        out, lse = msa.sparse_attention(*tensors, given, *cu, inputs.shape.block_size)
        result = [out, lse, select(inputs), *torch.autograd.grad(out.float().square().sum(), tensors)]
        first = first or result
        assert all(same_bits(a, b) for a, b in zip(result, first))


def test_every_output_is_written():
    """Freed memory full of NaN is what the next outputs and workspaces are made of."""
    inputs = make_inputs(FAST["padding"], torch.bfloat16)
    blocks = support.random_blocks(inputs)
    clean = [t.clone() for t in attend(inputs, blocks)]
    for fill in (math.nan, -1.0):
        poison = [torch.full((1 << size,), fill, device="cuda") for size in range(8, 24)]
        del poison
        assert all(same_bits(a, b) for a, b in zip(attend(inputs, blocks), clean))
        poison = [torch.full((1 << size,), fill, device="cuda") for size in range(8, 24)]
        del poison
        assert torch.equal(select(inputs).cpu()[..., -1:, :], torch.full_like(select(inputs).cpu()[..., -1:, :], -1))


def test_positions():
    inputs = make_inputs(Shape(((6, 700), (3, 300)), 2, 4, 128, 128, 128, 128, 3), torch.bfloat16, integers=True)
    positions = torch.tensor([0, 5, 127, 128, 300, 699, 1, 2, 299], dtype=torch.int32)
    assert torch.equal(select(inputs, positions=positions).cpu(), select(inputs, gpu=False, positions=positions))


def test_float8_keys_equal_widened_keys():
    inputs = make_inputs(FAST["paper"], torch.bfloat16)
    blocks = support.random_blocks(inputs).cuda()
    k, v = (t.to(torch.float8_e4m3fn).cuda() for t in (inputs.k, inputs.v))
    cu = [t.cuda() for t in inputs.cu]
    out, _ = msa.sparse_attention(inputs.q.cuda(), k, v, blocks, *cu, 128)
    wide, _ = msa.sparse_attention(inputs.q.cuda(), k.bfloat16(), v.bfloat16(), blocks, *cu, 128)
    assert torch.allclose(out.float(), wide.float(), rtol=2e-2, atol=2e-2)


def test_graphs_and_streams():
    """A captured step replayed on new inputs gives the bits of the plain call; so does another stream."""
    inputs = make_inputs(FAST["paper"], torch.bfloat16)
    other = make_inputs(FAST["paper"], torch.bfloat16, seed=9)
    shape, cu = inputs.shape, [t.cuda() for t in inputs.cu]
    static = {name: getattr(inputs, name).cuda() for name in ("q", "k", "v", "q_idx", "k_idx")}

    def step():
        blocks = msa.select_blocks(static["q_idx"], static["k_idx"], *cu, shape.block_size, shape.topk)
        return msa.sparse_attention(static["q"], static["k"], static["v"], blocks, *cu, shape.block_size)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = step()[0].clone()
    torch.cuda.current_stream().wait_stream(side)
    assert same_bits(on_side, step()[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = step()
    for name, tensor in static.items():
        tensor.copy_(getattr(other, name))
    graph.replay()
    replayed = out.clone()
    assert same_bits(replayed, step()[0])
