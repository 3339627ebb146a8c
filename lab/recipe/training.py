# SPDX-License-Identifier: Apache-2.0
"""KL training of one layer's index on cached layer inputs, and what is measured of it on held-out windows."""

import math
import random

import torch
import torch.nn.functional as F

from index import Index
from model import pick, rotate


def queries_and_keys(model, layer, x, rows):
    """x [T, hidden] -> rotated q of the rows [H, n, D] and k of all tokens [Hkv, T, D]."""
    cos, sin = model.rope_tables(0, len(x))
    q, _, _ = model.qkv(layer, x[rows])
    _, k, _ = model.qkv(layer, x)
    return rotate(q, cos[rows], sin[rows]), rotate(k, cos, sin)


def head_probabilities(model, q, k, rows):
    """Softmax over the visible prefix, [Hkv, G, n, T]."""
    scores = (q.reshape(model.kv, -1, model.d) @ k.transpose(1, 2)) * model.d**-0.5
    scores = scores.view(model.kv, model.group, len(rows), -1)
    return scores.masked_fill_(torch.arange(k.shape[1]) > rows[:, None], -math.inf).softmax(-1)


def teacher_probabilities(model, q, k, rows, kind):
    """What a group's index should attend to [Hkv, n, T]: the heads' mean, or their maximum, renormalised."""
    p = head_probabilities(model, q, k, rows)
    if kind == "mean":
        return p.mean(1)
    p = p.amax(1)
    return p / p.sum(-1, keepdim=True)


def kl_of_rows(model, x, rows, wq, wk, teacher):
    """Mean over rows and groups of KL(teacher, index)."""
    cos, sin = model.rope_tables(0, len(x))
    q_idx = (x[rows] @ wq.T).view(len(rows), model.kv, -1).transpose(0, 1)
    q_idx, k_idx = rotate(q_idx, cos[rows], sin[rows]), rotate(x @ wk.T, cos, sin)
    logits = (q_idx @ k_idx.T) * wk.shape[0] ** -0.5
    logits = logits.masked_fill(torch.arange(len(x)) > rows[:, None], -math.inf)
    log_q = logits.log_softmax(-1).masked_fill(teacher == 0, 0)
    return (teacher * (teacher.clamp_min(1e-30).log() - log_q)).sum(-1).mean()


def train_layer(
    model, layer, wq, wk, windows, shares, steps=200, rate=3e-3, rows_a_step=96, teacher="mean", seed=0
):
    """AdamW on one layer's index. Returns wq, wk and the losses.

    windows: list of (x [T, hidden], first tail row or 0); shares: their probabilities. Seven rows in ten of a
    window with a tail (a retrieval document) come from the tail.
    """
    rng = random.Random(seed * 1000 + layer)
    generator = torch.Generator().manual_seed(seed * 1000 + layer)
    wq, wk = wq.clone().requires_grad_(), wk.clone().requires_grad_()
    optimizer = torch.optim.AdamW([wq, wk], lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(steps):
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * cosine * min(1, (step + 1) / (0.05 * steps))
        x, tail = rng.choices(windows, shares)[0]
        from_tail = int(0.7 * rows_a_step) if tail else 0
        rows = torch.cat(
            [
                torch.randint(tail, len(x), (from_tail,), generator=generator),
                torch.randint(0, len(x), (rows_a_step - from_tail,), generator=generator),
            ]
        ).unique()
        with torch.no_grad():
            target = teacher_probabilities(model, *queries_and_keys(model, layer, x, rows), rows, teacher)
        loss = kl_of_rows(model, x, rows, wq, wk, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([wq, wk], 1.0)
        optimizer.step()
        losses.append(loss.item())
    return wq.detach(), wk.detach(), losses


def block_scores(model, layer, x, rows, wq, wk, block):
    """The index's scores of blocks [Hkv, n, blocks]."""
    q_idx, k_idx = Index(model, {layer: wq}, {layer: wk}).project(layer, x)
    scores = (q_idx[:, rows] @ k_idx.T).masked_fill_(torch.arange(len(x)) > rows[:, None], -math.inf)
    pad = -len(x) % block
    return F.pad(scores, (0, pad), value=-math.inf).view(model.kv, len(rows), -1, block).amax(-1)


def block_masses(model, p, block):
    """Attention mass of blocks by head, [Hkv, G, n, blocks]."""
    return F.pad(p, (0, -p.shape[-1] % block)).view(*p.shape[:-1], -1, block).sum(-1)


@torch.no_grad()
def measure(model, layer, wq, wk, x, topk, block=64, first_row=None, count=256, seed=1):
    """(block recall, score recall) on random rows from `first_row` (default: the first that has a choice)."""
    first_row = block * topk if first_row is None else first_row
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randperm(len(x) - first_row, generator=generator)[:count] + first_row).sort().values
    p = head_probabilities(model, *queries_and_keys(model, layer, x, rows), rows)
    mass, visible = block_masses(model, p, block).mean(1), rows // block + 1
    best = pick(mass, visible, topk)
    both = best & pick(block_scores(model, layer, x, rows, wq, wk, block), visible, topk)
    score = (mass * both).sum(-1) / (mass * best).sum(-1)
    return torch.stack([(both.sum(-1).float() / topk).mean(), score.mean()])


@torch.no_grad()
def gain_of_oracle(model, layer, wq, wk, x, tail, topk, block=64):
    """Mass that true-mass blocks keep and the index does not, of the head that gains most."""
    rows = torch.arange(tail, len(x))
    p = head_probabilities(model, *queries_and_keys(model, layer, x, rows), rows)
    mass, visible = block_masses(model, p, block), rows // block + 1
    chosen = pick(block_scores(model, layer, x, rows, wq, wk, block), visible, topk)
    best = pick(mass.mean(1), visible, topk)
    kept, possible = ((mass * blocks[:, None]).sum(-1) for blocks in (chosen, best))
    return (possible - kept).clamp_min(0).mean(-1).max().item()
