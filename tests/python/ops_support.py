# SPDX-License-Identifier: Apache-2.0
"""What the operator tests share: batches rich in boundaries, naive formulations in plain torch that autograd can follow,
and the tolerance rule. A naive formulation computes in the dtype of its inputs, so that it serves in float64 as the truth
and in the storage dtype as the yardstick of the rule.
"""

import dataclasses
import math
from typing import List, Optional, Tuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch: (Lq, Lk) of every sequence, padding rows behind the last one, and the geometry."""

    lengths: Tuple[Tuple[int, int], ...]
    kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 32
    value_dim: int = 32
    index_dim: int = 16
    block_size: int = 16
    topk: int = 3
    local_blocks: int = 1
    init_blocks: int = 0
    query_padding: int = 0
    key_padding: int = 0

    @property
    def query_heads(self):
        return self.kv_heads * self.group_size


SHAPES = {
    "one_token": Shape(((1, 1),), group_size=1),
    "around_a_block": Shape(((15, 15), (16, 16), (17, 17), (1, 1)), group_size=3),
    "prefix_and_padding": Shape(
        ((5, 70), (0, 33), (1, 40), (0, 0), (16, 16), (3, 129)),
        kv_heads=3,
        group_size=1,
        query_padding=4,
        key_padding=7,
    ),
    "unequal_dims": Shape(
        ((70, 200), (33, 33)), kv_heads=1, group_size=7, head_dim=48, value_dim=80, index_dim=64, block_size=32, topk=4,
        local_blocks=2, init_blocks=1,
    ),
    "all_visible": Shape(((40, 40), (9, 25)), group_size=4, topk=8),
    "one_block": Shape(((60, 90),), topk=1, group_size=2, head_dim=16, value_dim=16),
    "no_forced_block": Shape(((50, 100), (2, 80)), kv_heads=1, group_size=5, local_blocks=0, topk=2),
    "no_queries": Shape(((0, 20), (0, 0))),
    "no_tokens": Shape(((0, 0),)),
    "wide": Shape(((20, 300),), kv_heads=1, group_size=16, head_dim=128, value_dim=128, index_dim=128, block_size=128),
}


@dataclasses.dataclass
class Inputs:
    shape: Shape
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_idx: torch.Tensor
    k_idx: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor

    @property
    def cu(self):
        return self.cu_seqlens_q, self.cu_seqlens_k

    @property
    def block_size(self):
        return self.shape.block_size


def cumulative(lengths) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(list(lengths)).cumsum(0).tolist()], dtype=torch.int32)


def make_inputs(shape: Shape, dtype=torch.float32, seed=0, integers=False) -> Inputs:
    """Random tensors; `integers` makes every value a small whole number, whose scores are exact in fp32 and often tie."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        if integers:
            return torch.randint(-2, 3, size, generator=generator).to(dtype)
        return torch.randn(*size, generator=generator).to(dtype)

    rows_q = sum(lq for lq, _ in shape.lengths) + shape.query_padding
    rows_k = sum(lk for _, lk in shape.lengths) + shape.key_padding
    return Inputs(
        shape,
        q=random(rows_q, shape.query_heads, shape.head_dim),
        k=random(rows_k, shape.kv_heads, shape.head_dim),
        v=random(rows_k, shape.kv_heads, shape.value_dim),
        q_idx=random(rows_q, shape.kv_heads, shape.index_dim),
        k_idx=random(rows_k, shape.index_dim),
        cu_seqlens_q=cumulative(lq for lq, _ in shape.lengths),
        cu_seqlens_k=cumulative(lk for _, lk in shape.lengths),
    )


def sequences(cu_seqlens_q, cu_seqlens_k, positions=None):
    """(rows of the queries, rows of the keys, position of each query) of every sequence."""
    cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(cu_q) - 1):
        rows_q, rows_k = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        queries, keys = cu_q[s + 1] - cu_q[s], cu_k[s + 1] - cu_k[s]
        yield rows_q, rows_k, torch.arange(keys - queries, keys) if positions is None else positions[rows_q].long()


def support_mask(position: torch.Tensor, keys: int, blocks: Optional[torch.Tensor], block_size: int) -> torch.Tensor:
    """[kv_heads or 1, Lq, Lk]: the visible keys of each row, those of its blocks [kv_heads, Lq, topk] if given."""
    key = torch.arange(keys)
    mask = (key[None, :] <= position[:, None])[None]
    if blocks is not None:
        mask = mask & (blocks[..., None] == (key // block_size)).any(dim=-2)
    return mask


def naive_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, blocks=None, block_size=1, scale=None, positions=None):
    """(out, lse in at least float32), every score materialised."""
    group_size = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    outs = torch.zeros(q.shape[0], q.shape[1], v.shape[-1], dtype=q.dtype)
    lses = torch.full(q.shape[:2], -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows_q, rows_k, position in sequences(cu_seqlens_q, cu_seqlens_k, positions):
        if position.numel() == 0:
            continue
        keys = rows_k.stop - rows_k.start
        selected = None if blocks is None else blocks[:, rows_q]
        mask = support_mask(position, keys, selected, block_size).repeat_interleave(
            1 if blocks is None else group_size, dim=0
        )
        heads_k = k[rows_k].repeat_interleave(group_size, dim=1)
        heads_v = v[rows_k].repeat_interleave(group_size, dim=1)
        scores = torch.matmul(q[rows_q].transpose(0, 1), heads_k.permute(1, 2, 0)) * scale  # [Hq, Lq, Lk]
        # A row without keys must not meet a softmax: its gradient would be NaN.
        empty = ~mask.any(dim=-1, keepdim=True).expand(scores.shape[0], -1, 1)
        scores = scores.masked_fill(~(mask | empty), -math.inf)
        out = torch.matmul(torch.softmax(scores, dim=-1), heads_v.transpose(0, 1))
        lse = torch.logsumexp(scores.to(lses.dtype), dim=-1)
        outs = outs.index_copy(0, torch.arange(rows_q.start, rows_q.stop), out.masked_fill(empty, 0).transpose(0, 1))
        lses = lses.index_copy(
            0, torch.arange(rows_q.start, rows_q.stop), lse.masked_fill(empty[..., 0], -math.inf).transpose(0, 1)
        )
    return outs, lses


def naive_index_kl(
    q_idx, k_idx, q, k, blocks, cu_seqlens_q, cu_seqlens_k, block_size, index_scale=None, scale=None, teacher="mean",
    positions=None,
):
    kv_heads, group_size = k.shape[1], q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    index_scale = 1 / math.sqrt(q_idx.shape[-1]) if index_scale is None else index_scale
    total = torch.zeros((), dtype=torch.promote_types(q_idx.dtype, torch.float32))
    queries = int(cu_seqlens_q[-1])
    for rows_q, rows_k, position in sequences(cu_seqlens_q, cu_seqlens_k, positions):
        if position.numel() == 0:
            continue
        keys = rows_k.stop - rows_k.start
        selected = None if blocks is None else blocks[:, rows_q]
        mask = support_mask(position, keys, selected, block_size).expand(kv_heads, -1, -1)
        heads_k = k[rows_k].repeat_interleave(group_size, dim=1)
        scores = torch.matmul(q[rows_q].transpose(0, 1), heads_k.permute(1, 2, 0)) * scale
        scores = scores.unflatten(0, (kv_heads, group_size)).masked_fill(~mask[:, None], -math.inf)
        heads = torch.softmax(scores, dim=-1).detach()
        probabilities = heads.mean(dim=1) if teacher == "mean" else heads.amax(dim=1)
        probabilities = torch.where(mask, probabilities, torch.zeros_like(probabilities)).to(total.dtype)  # drops NaN rows
        if teacher == "max":
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        logits = torch.matmul(q_idx[rows_q].transpose(0, 1), k_idx[rows_k].t()) * index_scale
        logits = logits.to(total.dtype)
        empty = ~mask.any(dim=-1, keepdim=True)
        student = torch.log_softmax(logits.masked_fill(~(mask | empty), -math.inf), dim=-1)
        student = torch.where(mask, student, torch.zeros_like(student))
        total = total + (torch.xlogy(probabilities, probabilities) - probabilities * student).sum()
    return total / max(queries * kv_heads, 1)


def choose(block_scores: List[float], topk: int, local_blocks: int, init_blocks: int) -> List[int]:
    """The selection rule on the scores of one row's visible blocks."""
    visible = len(block_scores)
    forced = list(range(visible - 1, max(visible - 1 - local_blocks, -1), -1)) + list(range(min(init_blocks, visible)))
    order = list(dict.fromkeys(forced)) + sorted(range(visible), key=lambda b: (-block_scores[b], b))
    return sorted(list(dict.fromkeys(order))[:topk])


def per_block(values: torch.Tensor, position: int, block_size: int, pool) -> List[float]:
    """pool (max or sum) of values [Lk] over the visible tokens of each visible block."""
    visible = values[: position + 1].tolist()
    return [pool(visible[b : b + block_size]) for b in range(0, position + 1, block_size)]


def naive_block_scores(inputs: Inputs, positions=None):
    """(kv head, row, list of each visible block's index score) of every row, in float64."""
    for rows_q, rows_k, position in sequences(*inputs.cu, positions):
        scores = torch.einsum("qhd,kd->hqk", inputs.q_idx[rows_q].double(), inputs.k_idx[rows_k].double())
        for head in range(inputs.shape.kv_heads):
            for i, p in enumerate(position.tolist()):
                yield head, rows_q.start + i, per_block(scores[head, i], p, inputs.block_size, max)


def naive_block_mass(inputs: Inputs, positions=None):
    """(kv head, row, list of each visible block's true attention mass) of every row, in float64."""
    shape = inputs.shape
    for rows_q, rows_k, position in sequences(*inputs.cu, positions):
        q = inputs.q[rows_q].double().unflatten(1, (shape.kv_heads, shape.group_size))
        scores = torch.einsum("qhgd,khd->hgqk", q, inputs.k[rows_k].double()) / math.sqrt(shape.head_dim)
        mask = support_mask(position, rows_k.stop - rows_k.start, None, 1)
        mass = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1).mean(dim=1)
        for head in range(shape.kv_heads):
            for i, p in enumerate(position.tolist()):
                yield head, rows_q.start + i, per_block(mass[head, i], p, shape.block_size, sum)


def to_blocks(inputs: Inputs, scored_rows) -> torch.Tensor:
    """int32 [kv_heads, Tq, topk]: the choice of every scored row."""
    shape = inputs.shape
    blocks = torch.full((shape.kv_heads, inputs.q.shape[0], shape.topk), -1, dtype=torch.int32)
    for head, row, scores in scored_rows:
        chosen = choose(scores, shape.topk, shape.local_blocks, shape.init_blocks)
        blocks[head, row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return blocks


def naive_recall(inputs: Inputs, blocks: torch.Tensor, positions=None):
    """(block recall, score recall), NaN where no row counts."""
    topk = blocks.shape[-1]
    block_recalls, score_recalls = [], []
    for head, row, mass in naive_block_mass(inputs, positions):
        if len(mass) <= topk:
            continue
        best = choose(mass, topk, 1, 0)
        hit = set(best) & set(blocks[head, row].tolist())
        block_recalls.append(len(hit) / len(best))
        score_recalls.append(sum(mass[b] for b in hit) / sum(mass[b] for b in best))
    if not block_recalls:
        return math.nan, math.nan
    return sum(block_recalls) / len(block_recalls), sum(score_recalls) / len(score_recalls)


def assert_within_rule(actual, truth, naive, storage, what=""):
    """The tolerance rule: against the float64 truth, the largest and the rms error are at most twice those of a naive
    computation in the storage dtype, plus one rounding of that dtype at the largest value. Infinities must agree."""
    assert actual.shape == truth.shape, what
    if actual.numel() == 0:
        return
    actual, truth, naive = (t.detach().double() for t in (actual, truth, naive))
    finite = truth.isfinite()
    assert torch.equal(actual.masked_fill(finite, 0), truth.masked_fill(finite, 0)), f"{what}: infinities differ"
    errors = (actual - truth).masked_fill(~finite, 0)
    naive_errors = (naive - truth).masked_fill(~finite, 0)
    rounding = torch.finfo(storage).eps / 2 * truth.masked_fill(~finite, 0).abs().max().item()
    for name, measure in (("largest", lambda e: e.abs().max().item()), ("rms", lambda e: e.square().mean().sqrt().item())):
        error, bound = measure(errors), 2 * measure(naive_errors) + rounding
        assert error <= bound, f"{what}: {name} error {error:.3e} above {bound:.3e}"


def random_blocks(inputs: Inputs, seed=1) -> torch.Tensor:
    """A well-formed selection that no score made: some rows short, some empty, the local block often missing."""
    shape = inputs.shape
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.full((shape.kv_heads, inputs.q.shape[0], shape.topk), -1, dtype=torch.int32)
    for rows_q, _, position in sequences(*inputs.cu):
        for i, p in enumerate(position.tolist()):
            visible = p // shape.block_size + 1
            for head in range(shape.kv_heads):
                count = int(torch.randint(0, min(visible, shape.topk) + 1, (), generator=generator))
                ids = torch.randperm(visible, generator=generator)[:count].sort().values
                blocks[head, rows_q.start + i, :count] = ids.to(torch.int32)
    return blocks


@dataclasses.dataclass
class Pages:
    """Key-side tensors scattered over pages; pages that no sequence owns hold NaN."""

    tensors: List[torch.Tensor]
    page_table: torch.Tensor
    seqlens_k: torch.Tensor


def to_pages(tensors, cu_seqlens_k, page: int, seed=0) -> Pages:
    cu = cu_seqlens_k.tolist()
    lengths = [cu[s + 1] - cu[s] for s in range(len(cu) - 1)]
    counts = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(lengths), max(counts, default=0) + 2), -1, dtype=torch.int32)
    paged = [torch.full((len(order), page, *t.shape[1:]), math.nan, dtype=t.dtype) for t in tensors]
    for s, count in enumerate(counts):
        for i in range(count):
            table[s, i] = page_id = order.pop()
            for source, target in zip(tensors, paged):
                rows = source[cu[s] + i * page : min(cu[s] + (i + 1) * page, cu[s + 1])]
                target[page_id, : rows.shape[0]] = rows
    return Pages(paged, table, torch.tensor(lengths, dtype=torch.int32))
