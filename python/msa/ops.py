# SPDX-License-Identifier: Apache-2.0
"""The operators, documented. Each function is `torch.ops.msa.<name>` and nothing more, so that autograd, `torch.compile`
and `torch.export` see a single operator.

Rules they share:

- Batches are packed: tokens of all sequences lie one after the other. `cu_seqlens_q` and `cu_seqlens_k` are int32 [B+1],
  starting at 0. Sequence s has Lq = cu_seqlens_q[s+1] - cu_seqlens_q[s] queries, which are the last Lq of its Lk keys:
  query i stands at position Lk - Lq + i and sees the keys 0 to there. Prefill, chunked prefill and decode are the same
  call. Rows behind the last sequence are padding: ids -1, output 0, lse -inf, no gradient.
- Blocks are anchored at the start of their sequence: block b covers its positions [b*block_size, (b+1)*block_size).
- query_heads is a multiple G of kv_heads; query heads r*G to r*G+G-1 form group r.
- dtypes: float32, bfloat16 or float16 with fp32 accumulation; q, k and v alike; q_idx and k_idx alike, possibly another
  dtype than q's. In the forward of select_blocks, sparse_attention and dense_attention (packed and paged) keys, values and index
  keys may be torch.float8_e4m3fn beside wider queries: the result is bit for bit that of the widened tensors. Integer tensors are int32. Strides are free (a last dimension that is not contiguous is copied).
  Under autocast the operators run in the dtypes they are given.
- Limits: block_size a power of two from 16 to 256, topk from 1 to 64, head dimensions multiples of 16 up to 256.
- Devices: CPU, or a Hopper GPU in a build with CUDA (docs/cuda.md): all tensors of a call on one device. The work goes to
  torch's current stream; `check_device_data` says when the host waits. Threads on the CPU: `torch.get_num_threads()`;
  results do not depend on it, bit for bit, nor on how the tokens are packed or chunked.
- Bad input raises RuntimeError "op: argument: what it was; the rule", before anything is computed.
- `query_positions`, int32 [Tq], puts each query at a position of its own choice (rising strictly within a sequence, below
  Lk) in place of the last Lq positions: a call can take a sample of a sequence's rows.
- The environment variable MSA_BACKEND (`auto`, `reference`, `cpu`) picks the implementation for tensors on the
  CPU, to compare results: `reference` is scalar double-precision code, slow and simple.

In the notes on cost, Lk is what a row sees and G the group size.
"""

import re
from typing import Callable, Optional, Tuple

import torch
from torch import Tensor


def version() -> str:
    """Version of the loaded library, "major.minor.patch"."""
    return torch.ops.msa.version()


def cuda_is_built() -> bool:
    """Whether the loaded library has the CUDA backend; `msa info` also says whether this machine can run it."""
    return torch.ops.msa.cuda_is_built()


def check_device_data(enabled: Optional[bool] = None) -> bool:
    """Whether operators on a GPU check what lies in its memory: sequence bounds, page tables, positions and block ids.

    That costs a small kernel and makes the host wait for it, so switch it off once a program is known to pass good ones:
    the host then never waits, and ids out of range are treated as absent. While a graph is captured nothing is checked.
    The environment variable MSA_CHECK_DEVICE_DATA=0 switches it off from the start.

    Args:
        enabled: the new setting, for the whole process; None leaves it.

    Returns:
        the setting until now.
    """
    return torch.ops.msa.check_device_data(enabled)


def select_blocks(
    q_idx: Tensor,
    k_idx: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    topk: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    *,
    query_positions: Optional[Tensor] = None,
) -> Tensor:
    """Picks the key blocks each query and group attends to, by index scores.

    A block scores the maximum of <q_idx, k_idx> over its visible tokens. The `local_blocks` last visible blocks and the
    `init_blocks` first ones are taken first and count against `topk`; the best others follow, ties to the lower id; a NaN
    token score counts below every number. A row with at most `topk` visible blocks takes them all.

    Args:
        q_idx: [Tq, kv_heads, index_dim], one index query a group.
        k_idx: [Tk, index_dim], shared by the groups.

    Returns:
        int32 [kv_heads, Tq, topk]: ids ascending, packed to the left, -1 behind them. Not differentiable.

    Costs index_dim * Lk multiply-adds a row; no exponential, no [queries, keys] tensor.

    >>> cu = torch.tensor([0, 64], dtype=torch.int32)
    >>> k_idx = torch.zeros(64, 16)
    >>> k_idx[20] = 1.0                                       # block 1 of 16 tokens stands out
    >>> select_blocks(torch.ones(64, 1, 16), k_idx, cu, cu, block_size=16, topk=2)[0, 63]
    tensor([1, 3], dtype=torch.int32)
    """
    return torch.ops.msa.select_blocks(
        q_idx,
        k_idx,
        cu_seqlens_q,
        cu_seqlens_k,
        block_size,
        topk,
        local_blocks,
        init_blocks,
        query_positions=query_positions,
    )


def topk_blocks(scores: Tensor, topk: int) -> Tensor:
    """The ids of each row's `topk` highest scores: the last step of a selection, alone.

    Equal scores go to the lower id, -0 equals +0, and NaN ranks below every number. No block is forced; `select_blocks`
    computes the scores and adds that.

    Args:
        scores: float32 [rows, blocks].

    Returns:
        int32 [rows, topk]: ids ascending, packed to the left, -1 behind them in a row of fewer than topk blocks. Not
        differentiable.

    Reads a row twice while it lies in the cache; no exponential, no sort.

    >>> topk_blocks(torch.tensor([[3.0, 9.0, 9.0, 1.0, 9.0]]), topk=2)
    tensor([[1, 2]], dtype=torch.int32)
    """
    return torch.ops.msa.topk_blocks(scores, topk)


def select_blocks_oracle(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    topk: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    scale: Optional[float] = None,
    *,
    query_positions: Optional[Tensor] = None,
) -> Tensor:
    """The selection that the main branch itself would make: blocks ranked by attention probability mass (full causal
    softmax, averaged over the group's heads). The upper bound of what an index can do; costs dense scores.

    Args:
        q: [Tq, query_heads, head_dim].
        k: [Tk, kv_heads, head_dim].
        scale: of the scores; 1/sqrt(head_dim) when None.

    Returns:
        int32 [kv_heads, Tq, topk], as `select_blocks` returns it. Not differentiable.

    Costs G * head_dim * Lk multiply-adds a row.
    """
    return torch.ops.msa.select_blocks_oracle(
        q,
        k,
        cu_seqlens_q,
        cu_seqlens_k,
        block_size,
        topk,
        local_blocks,
        init_blocks,
        scale,
        query_positions=query_positions,
    )


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    scale: Optional[float] = None,
    *,
    query_positions: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """Exact causal softmax attention over each row's selected blocks.

    Args:
        q: [Tq, query_heads, head_dim].
        k: [Tk, kv_heads, head_dim].
        v: [Tk, kv_heads, value_dim].
        blocks: int32 [kv_heads, Tq, topk] as `select_blocks` returns it: unique, ascending, visible ids, -1 behind them;
            anything else raises.
        scale: of the scores; 1/sqrt(head_dim) when None.

    Returns:
        (out [Tq, query_heads, value_dim] in q's dtype, lse float32 [Tq, query_heads], natural log). Both are
        differentiable in q, k and v, so partial results can be merged by their lse. A row without blocks gives out 0
        and lse -inf.

    Costs topk * block_size * (head_dim + value_dim) multiply-adds a head and row, about 2.5 times that on the way back.

    >>> cu = torch.tensor([0, 40], dtype=torch.int32)
    >>> q, k, v = torch.randn(40, 4, 16), torch.randn(40, 2, 16), torch.randn(40, 2, 16)
    >>> blocks = select_blocks(torch.randn(40, 2, 16), torch.randn(40, 16), cu, cu, 16, topk=3)
    >>> out, lse = sparse_attention(q, k, v, blocks, cu, cu, 16)
    >>> torch.allclose(out, dense_attention(q, k, v, cu, cu)[0], atol=1e-5)   # 3 blocks hold all 40 keys
    True
    """
    return torch.ops.msa.sparse_attention(
        q, k, v, blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, query_positions=query_positions
    )


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: Optional[float] = None,
    *,
    query_positions: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """Exact causal softmax attention over the whole visible prefix.

    Args:
        q: [Tq, query_heads, head_dim].
        k: [Tk, kv_heads, head_dim].
        v: [Tk, kv_heads, value_dim].
        scale: of the scores; 1/sqrt(head_dim) when None.

    Returns:
        (out [Tq, query_heads, value_dim] in q's dtype, lse float32 [Tq, query_heads], natural log). Both are
        differentiable in q, k and v.

    Costs Lk * (head_dim + value_dim) multiply-adds a head and row; memory does not grow with Lk.

    >>> cu = torch.tensor([0, 3], dtype=torch.int32)
    >>> v = torch.arange(3.0)[:, None, None].expand(3, 1, 16)
    >>> out, lse = dense_attention(torch.zeros(3, 1, 16), torch.zeros(3, 1, 16), v, cu, cu)
    >>> out[:, 0, 0]                                          # equal scores: the mean of what is seen
    tensor([0.0000, 0.5000, 1.0000])
    """
    return torch.ops.msa.dense_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, query_positions=query_positions)


def index_kl(
    q_idx: Tensor,
    k_idx: Tensor,
    q: Tensor,
    k: Tensor,
    blocks: Optional[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    index_scale: Optional[float] = None,
    scale: Optional[float] = None,
    *,
    teacher: str = "mean",
    query_positions: Optional[Tensor] = None,
) -> Tensor:
    """KL(P || Q) that aligns the index branch with the main branch; add lambda times it to the model's loss.

    P is the main branch's attention, averaged over a group's heads and detached; Q is the softmax of the index scores.
    Both live on the visible tokens of the row's selected blocks, or on the whole prefix when `blocks` is None (warmup).

    Args:
        q_idx: [Tq, kv_heads, index_dim].
        k_idx: [Tk, index_dim].
        q: [Tq, query_heads, head_dim].
        k: [Tk, kv_heads, head_dim].
        blocks: int32 [kv_heads, Tq, topk], or None.
        index_scale: of the index scores; 1/sqrt(index_dim) when None.
        scale: of the main scores; 1/sqrt(head_dim) when None.
        teacher: "mean" of the heads' probabilities, or "max" over the heads, renormalised, which keeps a single
            retrieval head of a group visible.

    Returns:
        float32 scalar, the mean over all queries and groups (rows without blocks add 0 and count); 0 for no queries.
        Differentiable in q_idx and k_idx only.

    Costs G * head_dim + index_dim multiply-adds a row and key of the support, twice; no [queries, keys] tensor.

    >>> cu = torch.tensor([0, 32], dtype=torch.int32)
    >>> q, k = torch.zeros(32, 2, 16), torch.zeros(32, 1, 16)
    >>> q_idx = torch.zeros(32, 1, 16, requires_grad=True)
    >>> kl = index_kl(q_idx, torch.randn(32, 16), q, k, None, cu, cu, 16)
    >>> round(kl.item(), 6)                                   # two uniform distributions
    0.0
    """
    return torch.ops.msa.index_kl(
        q_idx,
        k_idx,
        q,
        k,
        blocks,
        cu_seqlens_q,
        cu_seqlens_k,
        block_size,
        index_scale,
        scale,
        teacher=teacher,
        query_positions=query_positions,
    )


def selection_recall(
    q: Tensor,
    k: Tensor,
    blocks: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    scale: Optional[float] = None,
    *,
    query_positions: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """How well a selection matches the true one, which is the top-k by attention mass with the local block included.

    Args:
        q: [Tq, query_heads, head_dim].
        k: [Tk, kv_heads, head_dim].
        blocks: int32 [kv_heads, Tq, topk].
        scale: of the scores; 1/sqrt(head_dim) when None.

    Returns:
        (block_recall, score_recall), float32 scalars: the share of the true blocks that were selected, and of their
        mass. Means over the rows that see more than topk blocks; NaN when there is none. Not differentiable.

    Costs a pass of dense scores, G * head_dim * Lk multiply-adds a row.

    >>> cu = torch.tensor([0, 64], dtype=torch.int32)
    >>> q, k = torch.randn(64, 2, 16), torch.randn(64, 1, 16)
    >>> blocks = select_blocks_oracle(q, k, cu, cu, 16, topk=2)
    >>> selection_recall(q, k, blocks, cu, cu, 16)
    (tensor(1.), tensor(1.))
    """
    return torch.ops.msa.selection_recall(
        q, k, blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, query_positions=query_positions
    )


# ---- The paged forms ----

_PAGED_ARGUMENTS = """
        page_table: int32 [B, max_pages]: the pages of each sequence in order, -1 (never read) behind them. A page is
            block_size tokens or a multiple of it; dense attention takes any size.
        seqlens_k: int32 [B], the keys of each sequence.
"""


def _paged_form_of(packed: Callable) -> Callable:
    """Documents an operator on paged keys with the words of the packed one: [pages, page, ...] stands for [Tk, ...], and there
    is no way back. An example of its own comes last."""

    def document(function: Callable) -> Callable:
        text = (packed.__doc__ or "").split("    >>>")[0]  # that example is of packed keys
        text = re.sub(r"(\w+): \[Tk, ", r"\1_pages: [pages, page, ", text)
        text = re.sub(r"\s[^.]*[Dd]ifferentiable[^.]*\.", "", text)
        text = text.replace("\n\n    Returns:", _PAGED_ARGUMENTS + "\n    Returns:")
        function.__doc__ = (
            f"`{packed.__name__}` on keys that lie in pages; equal to it bit for bit. It has no backward: asking for a gradient\n"
            f"    raises.\n\n    {text.rstrip()}\n\n    {function.__doc__ or ''}"
        )
        return function

    return document


@_paged_form_of(select_blocks)
def select_blocks_paged(
    q_idx: Tensor,
    k_idx_pages: Tensor,
    cu_seqlens_q: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    block_size: int,
    topk: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    *,
    query_positions: Optional[Tensor] = None,
) -> Tensor:
    """>>> cu = torch.tensor([0, 32], dtype=torch.int32)
    >>> q_idx, k_idx = torch.randn(32, 2, 16), torch.randn(32, 16)
    >>> table, seqlens_k = torch.tensor([[0, 1, -1]], dtype=torch.int32), torch.tensor([32], dtype=torch.int32)
    >>> paged = select_blocks_paged(q_idx, k_idx.view(2, 16, 16), cu, table, seqlens_k, 16, topk=1)
    >>> torch.equal(paged, select_blocks(q_idx, k_idx, cu, cu, 16, topk=1))
    True
    """
    return torch.ops.msa.select_blocks_paged(
        q_idx,
        k_idx_pages,
        cu_seqlens_q,
        page_table,
        seqlens_k,
        block_size,
        topk,
        local_blocks,
        init_blocks,
        query_positions=query_positions,
    )


@_paged_form_of(select_blocks_oracle)
def select_blocks_oracle_paged(
    q: Tensor,
    k_pages: Tensor,
    cu_seqlens_q: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    block_size: int,
    topk: int,
    local_blocks: int = 1,
    init_blocks: int = 0,
    scale: Optional[float] = None,
    *,
    query_positions: Optional[Tensor] = None,
) -> Tensor:
    return torch.ops.msa.select_blocks_oracle_paged(
        q,
        k_pages,
        cu_seqlens_q,
        page_table,
        seqlens_k,
        block_size,
        topk,
        local_blocks,
        init_blocks,
        scale,
        query_positions=query_positions,
    )


@_paged_form_of(sparse_attention)
def sparse_attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    blocks: Tensor,
    cu_seqlens_q: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    block_size: int,
    scale: Optional[float] = None,
    *,
    query_positions: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    return torch.ops.msa.sparse_attention_paged(
        q,
        k_pages,
        v_pages,
        blocks,
        cu_seqlens_q,
        page_table,
        seqlens_k,
        block_size,
        scale,
        query_positions=query_positions,
    )


@_paged_form_of(dense_attention)
def dense_attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    cu_seqlens_q: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    scale: Optional[float] = None,
    *,
    query_positions: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    return torch.ops.msa.dense_attention_paged(
        q, k_pages, v_pages, cu_seqlens_q, page_table, seqlens_k, scale, query_positions=query_positions
    )
