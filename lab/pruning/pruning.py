# SPDX-License-Identifier: Apache-2.0
"""How many key blocks an exact bound of their scores could leave out of a selection, before any key is read.

A block may be skipped when an upper bound of its largest score is below the topk-th best score of the row. Every bound here
holds for all keys of a block and costs a few dot products a block; the threshold is the true one, so the figures are the most
that any order of visiting could gain. Keys: those of a converted model, or normal random numbers.

    .venv/bin/python lab/pruning/pruning.py --model out/msa
    .venv/bin/python lab/pruning/pruning.py --random
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipe"))
ROWS = 256  # the last queries of the context


def ball(q, keys):
    """<q, centre> + |q| radius; keys [blocks, size, dim], q [rows, dim] -> [rows, blocks]."""
    centre = keys.mean(1)
    radius = (keys - centre[:, None]).norm(dim=-1).amax(-1)
    return q @ centre.T + q.norm(dim=-1, keepdim=True) * radius


def box(q, keys):
    """The best corner of the keys' bounding box: each dimension at its smallest or largest."""
    low, high = keys.amin(1), keys.amax(1)
    return q.clamp(min=0) @ high.T + q.clamp(max=0) @ low.T


def split(bound, parts):
    """The largest bound of `parts` pieces of a block."""

    def of_pieces(q, keys):
        blocks, size, dim = keys.shape
        return bound(q, keys.reshape(blocks * parts, size // parts, dim)).view(len(q), blocks, parts).amax(-1)

    return of_pieces


def leading(share):
    """Exact in the `share` of dimensions where keys vary most (their own principal axes), the rest by Cauchy-Schwarz."""

    def bound(q, keys):
        blocks, size, dim = keys.shape
        flat = keys.reshape(-1, dim)
        axes = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)
        q, flat = q @ axes, flat @ axes
        kept = int(dim * share)
        rest = flat[:, kept:].norm(dim=-1).view(blocks, size).amax(-1)
        known = (q[:, :kept] @ flat[:, :kept].T).view(len(q), blocks, size).amax(-1)
        return known + q[:, kept:].norm(dim=-1, keepdim=True) * rest

    return bound


BOUNDS = {
    "ball of the block": ball,
    "box of the block": box,
    "balls of its quarters": split(ball, 4),
    "boxes of its quarters": split(box, 4),
    "a quarter of the dimensions, rest by norm": leading(1 / 4),
    "half of the dimensions, rest by norm": leading(1 / 2),
}


def pruned(q, keys, block, topk):
    """Share of the blocks that each bound leaves out; q [rows, dim], keys [tokens, dim], all visible."""
    keys = keys[: len(keys) // block * block].view(-1, block, keys.shape[-1])
    scores = (q @ keys.reshape(-1, keys.shape[-1]).T).view(len(q), len(keys), block).amax(-1)
    threshold = scores.topk(topk, -1).values[:, -1:]
    slack = 1e-4 * scores.abs().amax(-1, keepdim=True)  # of float arithmetic
    shares = {}
    for name, bound in BOUNDS.items():
        upper = bound(q, keys)
        assert (upper + slack >= scores).all(), name
        shares[name] = (upper < threshold).float().mean().item()
    return shares


def of_random(context, block, topk, dim):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(ROWS, dim, generator=generator)
    return [pruned(q, torch.randn(context, dim, generator=generator), block, topk)]


def of_model(directory, context, topk):
    import corpus
    from model import Model, dense, rotate
    from tokenizers import Tokenizer

    config = json.loads((Path(directory) / "config.json").read_text())
    block, dim, groups = config["index_block_size"], config["index_head_dim"], config["index_n_heads"]
    model = Model(directory)
    tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    found = corpus.windows(tokenizer, context, 1, seed=0, evaluation=True)
    window = found[0][1] if isinstance(found[0], tuple) else found[0]
    cos, sin = model.rope_tables(0, context)
    attend, shares = dense(model), []

    def policy(layer, x, q, k, v, start):
        q_idx = (x[-ROWS:] @ model.weight(layer, "self_attn.indexer.q_proj").T).view(ROWS, groups, dim).transpose(0, 1)
        k_idx = rotate(x @ model.weight(layer, "self_attn.indexer.k_proj").T, cos, sin)
        q_idx = rotate(q_idx, cos[-ROWS:], sin[-ROWS:])
        for group in range(groups):
            shares.append(pruned(q_idx[group], k_idx[:-ROWS], block, topk))
        print(f"layer {layer + 1} of {model.layers}", file=sys.stderr, flush=True)
        return attend(layer, x, q, k, v, start)

    model.forward(window, policy)
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a converted model; out/msa of the main job")
    parser.add_argument("--random", action="store_true", help="normal random keys, blocks of 128, 128 dimensions")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--topk", type=int, default=16)
    options = parser.parse_args()
    if not options.model and not options.random:
        parser.error("one of --model and --random is needed")
    runs = []
    if options.random:
        runs.append(("random keys", of_random(options.context, 128, options.topk, 128)))
    if options.model:
        runs.append((options.model, of_model(options.model, options.context, options.topk)))
    for name, shares in runs:
        print(f"{name}, {options.context} tokens, topk {options.topk}: blocks left out, mean (least, most) of layers and groups")
        for bound in BOUNDS:
            values = [share[bound] for share in shares]
            print(f"  {bound:44s} {sum(values) / len(values):6.1%}  ({min(values):.1%}, {max(values):.1%})")


if __name__ == "__main__":
    main()
