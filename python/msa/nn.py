# SPDX-License-Identifier: Apache-2.0
"""An attention layer made of the operators, to drop into a PyTorch model. Tested in tests/python/test_ops_nn.py.

The layer trains in two stages. `warmup`: the main branch attends to everything, and the index branch learns from it by the
KL over the whole prefix. `sparse`: the index branch chooses topk blocks, the main branch attends to those only, and the KL
runs over them. The model's loss is its own plus lambda times the sum of the layers' KL. Parameter names are those of
converted checkpoints (`q_proj`, ..., `indexer.q_proj`, ...).
"""

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from msa import ops

STAGES = ("warmup", "sparse")


class SparseAttentionOutput(NamedTuple):
    """What `SparseAttention` returns."""

    output: Tensor  #: shaped like the input
    kl: Optional[Tensor]  #: float32 scalar, differentiable in the index branch; None where it was not asked for
    recall: Optional[Tuple[Tensor, Tensor]]  #: (block recall, score recall) of the selection; None likewise


def apply_rope(x: Tensor, positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Rotates the first 2 * len(inverse_frequencies) dimensions of x [T, ..., dim], dimension i paired with
    i + len(inverse_frequencies), by positions [T]; in float32, returned in the dtype of x."""
    half = inverse_frequencies.numel()
    angles = torch.outer(positions.to(torch.float32), inverse_frequencies)
    angles = angles.view(angles.shape[0], *([1] * (x.dim() - 2)), half)
    cos, sin = angles.cos(), angles.sin()
    left, right, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


class Indexer(nn.Module):
    """The index branch: one query head a group, one key head shared by all groups; with `value_dim`, one value head too."""

    def __init__(
        self, hidden_size: int, kv_heads: int, index_dim: int, norm: bool, norm_eps: float, value_dim: int = 0, **factory
    ):
        super().__init__()
        self.kv_heads, self.index_dim = kv_heads, index_dim
        self.q_proj = nn.Linear(hidden_size, kv_heads * index_dim, bias=False, **factory)
        self.k_proj = nn.Linear(hidden_size, index_dim, bias=False, **factory)
        self.q_norm = nn.RMSNorm(index_dim, eps=norm_eps, **factory) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(index_dim, eps=norm_eps, **factory) if norm else nn.Identity()
        if value_dim > 0:
            self.v_proj = nn.Linear(hidden_size, value_dim, bias=False, **factory)
            self.o_proj = nn.Linear(kv_heads * value_dim, hidden_size, bias=False, **factory)

    def forward(self, x: Tensor, positions: Tensor, inverse_frequencies: Tensor) -> Tuple[Tensor, Tensor]:
        """x [T, hidden_size] -> (q_idx [T, kv_heads, index_dim], k_idx [T, index_dim])."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.kv_heads, self.index_dim)))
        k = self.k_norm(self.k_proj(x))
        return apply_rope(q, positions, inverse_frequencies), apply_rope(k, positions, inverse_frequencies)


class SparseAttention(nn.Module):
    """One MSA layer: projections, rotary embedding, index branch, attention.

    Args:
        hidden_size: width of the input and the output.
        query_heads, kv_heads: query_heads is a multiple of kv_heads.
        head_dim: of q and k; hidden_size / query_heads when None. A multiple of 16 up to 256, as value_dim and index_dim.
        value_dim: of v; head_dim when None.
        index_dim: of the index branch; head_dim when None.
        block_size: keys a block, a power of two from 16 to 256.
        topk: blocks a query, 1 to 64; may be changed at any time.
        local_blocks, init_blocks: last and first blocks that are always taken; they count against topk.
        rotary_dim: dimensions rotated, even; head_dim when None, 0 for none. Main and index branch share it.
        rope_theta: base of the rotary frequencies.
        qk_norm, index_norm: RMSNorm a head on q and k, and on the index branch's, before the rotation.
        bias: of the q, k and v projections.
        stage: "warmup" or "sparse"; may be changed at any time (`layer.stage = "sparse"`).
        teacher: "mean" (the paper's) or "max": see `msa.index_kl`.
        detach_index_input: cut the gradient from the index branch to the input. Off is an ablation.
        index_value_dim: ablation: values of the index branch, one head of this dimension; its own attention over the same
            tokens is projected and added to the output. 0: none. A multiple of 16 up to 256.
        attention_sink: ablation: a learned logit a query head (`sinks`) in the softmax's denominator.

    Parameters may be float32, bfloat16 or float16; under autocast everything runs in the autocast dtype.

    >>> layer = SparseAttention(64, query_heads=4, kv_heads=2, block_size=16, topk=2)
    >>> output, kl, recall = layer(torch.randn(1, 48, 64), with_recall=True)
    >>> output.shape, kl.requires_grad, len(recall)
    (torch.Size([1, 48, 64]), True, 2)
    """

    def __init__(
        self,
        hidden_size: int,
        query_heads: int,
        kv_heads: int,
        head_dim: Optional[int] = None,
        *,
        value_dim: Optional[int] = None,
        index_dim: Optional[int] = None,
        block_size: int = 128,
        topk: int = 16,
        local_blocks: int = 1,
        init_blocks: int = 0,
        rotary_dim: Optional[int] = None,
        rope_theta: float = 10000.0,
        qk_norm: bool = False,
        index_norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
        stage: str = "sparse",
        teacher: str = "mean",
        detach_index_input: bool = True,
        index_value_dim: int = 0,
        attention_sink: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if query_heads < 1 or kv_heads < 1 or query_heads % kv_heads != 0:
            raise ValueError(f"query_heads = {query_heads} must be a positive multiple of kv_heads = {kv_heads}")
        if head_dim is None:
            if hidden_size % query_heads != 0:
                raise ValueError(f"hidden_size = {hidden_size} is no multiple of query_heads = {query_heads}; give head_dim")
            head_dim = hidden_size // query_heads
        value_dim = head_dim if value_dim is None else value_dim
        index_dim = head_dim if index_dim is None else index_dim
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        for name, dim in (("head_dim", head_dim), ("value_dim", value_dim), ("index_dim", index_dim)):
            if dim < 16 or dim > 256 or dim % 16 != 0:
                raise ValueError(f"{name} = {dim} must be a multiple of 16 from 16 to 256")
        if index_value_dim < 0 or index_value_dim > 256 or index_value_dim % 16 != 0:
            raise ValueError(f"index_value_dim = {index_value_dim} must be 0 or a multiple of 16 up to 256")
        if rotary_dim < 0 or rotary_dim % 2 != 0 or rotary_dim > min(head_dim, index_dim):
            raise ValueError(
                f"rotary_dim = {rotary_dim} must be even, and at most head_dim = {head_dim} and index_dim = {index_dim}"
            )
        if teacher not in ("mean", "max"):
            raise ValueError(f'teacher = "{teacher}" must be "mean" or "max"')
        factory = {"device": device, "dtype": dtype}
        self.hidden_size, self.query_heads, self.kv_heads = hidden_size, query_heads, kv_heads
        self.head_dim, self.value_dim, self.index_dim = head_dim, value_dim, index_dim
        self.block_size, self.topk = block_size, topk
        self.local_blocks, self.init_blocks = local_blocks, init_blocks
        self.teacher, self.detach_index_input = teacher, detach_index_input
        self.index_value_dim = index_value_dim
        self.stage = self._checked_stage(stage)
        self.q_proj = nn.Linear(hidden_size, query_heads * head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(hidden_size, kv_heads * value_dim, bias=bias, **factory)
        self.o_proj = nn.Linear(query_heads * value_dim, hidden_size, bias=False, **factory)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps, **factory) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps, **factory) if qk_norm else nn.Identity()
        self.indexer = Indexer(hidden_size, kv_heads, index_dim, index_norm, norm_eps, index_value_dim, **factory)
        self.sinks = nn.Parameter(torch.zeros(query_heads, **factory)) if attention_sink else None
        self._rotary_dim, self._rope_theta = rotary_dim, rope_theta

    @staticmethod
    def _checked_stage(stage: str) -> str:
        if stage not in STAGES:
            raise ValueError(f'stage = "{stage}" must be "warmup" or "sparse"')
        return stage

    def extra_repr(self) -> str:
        return (
            f"query_heads={self.query_heads}, kv_heads={self.kv_heads}, block_size={self.block_size}, "
            f"topk={self.topk}, stage={self.stage}"
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: Optional[Tensor], cu_seqlens: Tensor) -> Tuple[Tensor, Tensor]:
        if blocks is None:
            return ops.dense_attention(q, k, v, cu_seqlens, cu_seqlens)
        return ops.sparse_attention(q, k, v, blocks, cu_seqlens, cu_seqlens, self.block_size)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Optional[Tensor] = None,
        *,
        stage: Optional[str] = None,
        topk: Optional[int] = None,
        with_kl: Optional[bool] = None,
        with_recall: bool = False,
    ) -> SparseAttentionOutput:
        """Causal self-attention over whole sequences.

        Args:
            x: [B, L, hidden_size], or packed [T, hidden_size]. The layer's normalised input.
            cu_seqlens: int32 [S+1] for packed x: where its sequences begin; one sequence when None.
            stage, topk: in place of the layer's own, for this call.
            with_kl: compute the KL; as `self.training` when None.
            with_recall: compute the recalls, which cost a pass of dense scores.
        """
        stage = self.stage if stage is None else self._checked_stage(stage)
        topk = self.topk if topk is None else topk
        with_kl = self.training if with_kl is None else with_kl
        if x.dim() not in (2, 3) or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be [B, L, {self.hidden_size}] or [T, {self.hidden_size}]")
        if x.dim() == 3:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens is for packed x [T, hidden_size]; x has a batch dimension")
            cu_seqlens = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]
        elif cu_seqlens is None:
            cu_seqlens = torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[0]
        tokens = x.reshape(-1, self.hidden_size)

        # A token's position in its sequence; padding behind the last sequence counts on, and nobody looks at it.
        rows = torch.arange(tokens.shape[0], dtype=torch.int32, device=x.device)
        positions = rows - cu_seqlens[torch.searchsorted(cu_seqlens, rows, right=True) - 1]
        exponents = torch.arange(0, self._rotary_dim, 2, dtype=torch.float32, device=x.device) / max(self._rotary_dim, 1)
        inverse_frequencies = self._rope_theta**-exponents

        v = self.v_proj(tokens).unflatten(-1, (self.kv_heads, self.value_dim))
        q = self.q_norm(self.q_proj(tokens).unflatten(-1, (self.query_heads, self.head_dim)))
        k = self.k_norm(self.k_proj(tokens).unflatten(-1, (self.kv_heads, self.head_dim)))
        q = apply_rope(q, positions, inverse_frequencies).to(v.dtype)
        k = apply_rope(k, positions, inverse_frequencies).to(v.dtype)

        blocks = q_idx = k_idx = kl = recall = None
        index_input = tokens.detach() if self.detach_index_input else tokens
        if stage == "sparse" or with_kl or with_recall or self.index_value_dim > 0:
            q_idx, k_idx = self.indexer(index_input, positions, inverse_frequencies)
        if stage == "sparse" or with_recall:
            blocks = ops.select_blocks(
                q_idx, k_idx, cu_seqlens, cu_seqlens, self.block_size, topk, self.local_blocks, self.init_blocks
            )
        support = blocks if stage == "sparse" else None
        attended, lse = self._attend(q, k, v, support, cu_seqlens)
        if self.sinks is not None:
            attended = attended * torch.sigmoid(lse - self.sinks.float()).unsqueeze(-1).to(attended.dtype)
        if with_kl:
            kl = ops.index_kl(
                q_idx, k_idx, q, k, support, cu_seqlens, cu_seqlens, self.block_size, teacher=self.teacher
            )
        if with_recall:
            recall = ops.selection_recall(q, k, blocks, cu_seqlens, cu_seqlens, self.block_size)
        output = self.o_proj(attended.flatten(-2))
        if self.index_value_dim > 0:
            # Every group has blocks of its own, so the one key head is shown to each of them.
            shown = (-1, 1 if support is None else self.kv_heads, -1)
            v_idx = self.indexer.v_proj(index_input)
            q_idx, k_idx = q_idx.to(v_idx.dtype), k_idx.to(v_idx.dtype)
            of_index, _ = self._attend(
                q_idx, k_idx.unsqueeze(1).expand(shown), v_idx.unsqueeze(1).expand(shown), support, cu_seqlens
            )
            output = output + self.indexer.o_proj(of_index.flatten(-2))
        output = output.view(x.shape)
        return SparseAttentionOutput(output, kl, recall)
