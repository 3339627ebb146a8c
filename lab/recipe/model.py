# SPDX-License-Identifier: Apache-2.0
"""A Llama decoder in plain PyTorch; a policy chooses the attention of each layer.

It emulates: scores of all visible keys are computed and masked, in chunks of query rows; speed is not the
point.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

CHUNK = 512


class Model:
    def __init__(self, directory):
        directory = Path(directory)
        c = json.loads((directory / "config.json").read_text())
        self.layers = c["num_hidden_layers"]
        self.heads, self.kv = c["num_attention_heads"], c["num_key_value_heads"]
        self.d, self.hidden, self.eps = c["head_dim"], c["hidden_size"], c["rms_norm_eps"]
        self.group = self.heads // self.kv
        self.w = load_file(directory / "model.safetensors")
        self.frequencies = c["rope_theta"] ** (-torch.arange(0, self.d, 2).float() / self.d)

    def weight(self, layer, name):
        return self.w[f"model.layers.{layer}.{name}.weight"]

    def rope_tables(self, start, count):
        angles = torch.arange(start, start + count).float()[:, None] * self.frequencies[None]
        return torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

    def norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight

    def qkv(self, layer, x):
        """x [T, hidden] (normalised) -> q [H, T, D], k [Hkv, T, D], v [Hkv, T, D], before RoPE."""
        q = (x @ self.weight(layer, "self_attn.q_proj").T).view(-1, self.heads, self.d).transpose(0, 1)
        k = (x @ self.weight(layer, "self_attn.k_proj").T).view(-1, self.kv, self.d).transpose(0, 1)
        v = (x @ self.weight(layer, "self_attn.v_proj").T).view(-1, self.kv, self.d).transpose(0, 1)
        return q, k, v

    @torch.no_grad()
    def forward(self, tokens, policy, cache=None):
        """Last hidden states (normalised) [T, hidden]. policy(layer, x, q, k, v, start) -> out [H, T, D].

        cache: list of (k, v, x) a layer of the tokens before, extended in place.
        """
        start = 0 if not cache else cache[0][0].shape[1]
        h = self.w["model.embed_tokens.weight"][torch.as_tensor(tokens)]
        cos, sin = self.rope_tables(start, len(h))
        for layer in range(self.layers):
            x = self.norm(h, self.weight(layer, "input_layernorm"))
            q, k, v = self.qkv(layer, x)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            xs = x
            if cache is not None:
                if len(cache) <= layer:
                    cache.append((k, v, x))
                else:
                    k, v, xs = (torch.cat([a, b], -2) for a, b in zip(cache[layer], (k, v, x)))
                    cache[layer] = (k, v, xs)
            out = policy(layer, xs, q, k, v, start)
            h = h + out.transpose(0, 1).reshape(len(h), -1) @ self.weight(layer, "self_attn.o_proj").T
            x = self.norm(h, self.weight(layer, "post_attention_layernorm"))
            gate = F.silu(x @ self.weight(layer, "mlp.gate_proj").T) * (
                x @ self.weight(layer, "mlp.up_proj").T
            )
            h = h + gate @ self.weight(layer, "mlp.down_proj").T
        return self.norm(h, self.w["model.norm.weight"])

    @torch.no_grad()
    def losses(self, hidden, tokens):
        """Negative log-likelihood of each next token, [T - 1]."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        tokens = torch.as_tensor(tokens)
        parts = []
        for i in range(0, len(tokens) - 1, CHUNK):
            rows = hidden[i : min(i + CHUNK, len(tokens) - 1)]
            parts.append(F.cross_entropy(rows @ head.T, tokens[i + 1 : i + 1 + len(rows)], reduction="none"))
        return torch.cat(parts)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def dense(model):
    """The policy of full attention."""

    def policy(layer, xs, q, k, v, start):
        if start == 0:
            return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[
                0
            ]
        mask = torch.arange(start, start + q.shape[1])[:, None] >= torch.arange(k.shape[1])
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)[0]

    return policy


def pick(block_scores, visible, topk, init=0):
    """Boolean choice of blocks, always the local one. block_scores [..., rows, blocks]."""
    blocks = block_scores.shape[-1]
    ids = torch.arange(blocks)
    last = visible[:, None]
    scores = block_scores.masked_fill(ids >= last, -math.inf)
    scores = scores.masked_fill(ids == last - 1, math.inf).masked_fill((ids < init) & (ids < last), 1e30)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, scores.topk(min(topk, blocks), -1).indices, True)
    return chosen & (ids < last)


def sparse(model, block, topk, index=None, mode="index", stats=None):
    """The policy of block-sparse attention.

    topk: a number, or a list with one a layer (0: a dense layer). mode: "index", "oracle" (true attention
    mass) or "window" (the first block and the last ones). stats: a dict that `recalls` sums up.
    """
    fallback = dense(model)

    def policy(layer, xs, q, k, v, start):
        budget = topk[layer] if isinstance(topk, (list, tuple)) else topk
        if budget == 0:
            return fallback(layer, xs, q, k, v, start)
        if mode == "index":
            q_idx, k_idx = index.project(layer, xs, start)
        outs = []
        for begin in range(0, q.shape[1], CHUNK):
            rows = torch.arange(start + begin, start + min(begin + CHUNK, q.shape[1]))
            seen = int(rows[-1]) + 1
            blocks = -(-seen // block)
            pad = blocks * block - seen
            future = torch.arange(seen) > rows[:, None]
            visible = rows // block + 1
            scores = q[:, begin : begin + len(rows)].reshape(model.kv, -1, model.d) @ k[:, :seen].transpose(
                1, 2
            )
            scores = scores.view(model.kv, model.group, len(rows), seen) * model.d**-0.5
            p = scores.masked_fill_(future, -math.inf).softmax(-1)
            if mode == "oracle" or stats is not None:
                mass = (
                    F.pad(p, (0, pad)).view(model.kv, model.group, len(rows), blocks, block).sum(-1).mean(1)
                )
            if mode == "index":
                s = (q_idx[:, begin : begin + len(rows)] @ k_idx[:seen].T).masked_fill_(future, -math.inf)
                s = F.pad(s, (0, pad), value=-math.inf).view(model.kv, len(rows), blocks, block).amax(-1)
                chosen = pick(s, visible, budget)
            elif mode == "oracle":
                chosen = pick(mass, visible, budget)
            else:
                chosen = pick(
                    torch.arange(blocks).float().expand(model.kv, len(rows), blocks), visible, budget, init=1
                )
            some = visible > budget
            if stats is not None and some.any():
                best = pick(mass, visible, budget)
                both = (best & chosen)[:, some]
                block_recall = both.sum(-1).float() / budget
                score_recall = (mass[:, some] * both).sum(-1) / (mass * best)[:, some].sum(-1)
                stats.setdefault(layer, []).append(
                    (block_recall.sum(1), score_recall.sum(1), int(some.sum()))
                )
            keep = chosen.repeat_interleave(block, -1)[..., :seen]
            p = p.masked_fill_(~keep[:, None], 0)
            p /= p.sum(-1, keepdim=True)
            outs.append((p.view(model.kv, -1, seen) @ v[:, :seen]).view(model.heads, len(rows), model.d))
        return torch.cat(outs, 1)

    return policy


def recalls(stats):
    """Mean block and score recall over layers, groups and rows with more visible blocks than the budget."""
    means = [
        [sum(part[i] for part in parts) / sum(part[2] for part in parts) for i in (0, 1)]
        for parts in stats.values()
    ]
    return tuple(torch.stack([mean[i] for mean in means]).mean().item() for i in (0, 1))
