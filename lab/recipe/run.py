# SPDX-License-Identifier: Apache-2.0
"""Runs the recipe's experiments and prints their tables. See README.md for what they showed.

python lab/recipe/run.py init       --model out/model
python lab/recipe/run.py train      --model out/model --layers 7,20,23
python lab/recipe/run.py rank       --model out/model
python lab/recipe/run.py perplexity --model out/model --context 4096
"""

import argparse
import os
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer

import corpus
import index as index_branch
import training
from model import Model, dense, recalls, sparse


class Bench:
    """The model, its tokenizer and cached layer inputs of windows."""

    def __init__(self, options):
        self.model = Model(options.model)
        self.tokenizer = Tokenizer.from_file(str(Path(options.model) / "tokenizer.json"))
        self.cache = Path(options.cache)
        self.cache.mkdir(parents=True, exist_ok=True)

    def inputs(self, name, ids):
        """Normalised inputs of every layer for a window, bf16 [L, T, hidden]; computed once."""
        path = self.cache / f"{name}.pt"
        if not path.exists():
            inputs, full = [], dense(self.model)

            def policy(layer, xs, *rest):
                inputs.append(xs.bfloat16())
                return full(layer, xs, *rest)

            self.model.forward(ids, policy)
            torch.save(torch.stack(inputs), path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        return torch.load(path, mmap=True)

    def ordinary(self, length, count, seed, **options):
        found = corpus.windows(self.tokenizer, length, count, seed, **options)
        split = "held" if options.get("evaluation") else "train"
        return [(self.inputs(f"{split}-{length}-{seed}-{i}", ids), 0) for i, (_, ids) in enumerate(found)]

    def retrieval(self, length, count, seed):
        rng = random.Random(seed)
        result = []
        for i, (_, filler) in enumerate(corpus.windows(self.tokenizer, length, count, seed)):
            ids, tail = corpus.retrieval_document(self.tokenizer, length, rng, filler)
            result.append((self.inputs(f"retrieval-{length}-{seed}-{i}", ids), tail))
        return result

    def closed_form(self, windows, **options):
        moments = 0
        for inputs, _ in windows:
            x = inputs.float()
            moments = moments + x.transpose(1, 2) @ x / (len(windows) * x.shape[1])
        return index_branch.closed_form_index(self.model, moments, **options)


def show_recalls(bench, name, index, layers, held):
    """One line: recalls on 4096-token documents and the last 1024 positions of an 8192-token one, at 1/8."""
    lines = []
    for topk, first_row, windows in ((8, None, held[0]), (16, 7168, held[1])):
        found = [
            training.measure(
                bench.model, layer, index.wq[layer], index.wk[layer], x[layer].float(), topk, 64, first_row
            )
            for layer in layers
            for x, _ in windows
        ]
        lines.append("block %.3f score %.3f" % tuple(torch.stack(found).mean(0)) if found else "-")
    print(f"{name:28s} 4096: {lines[0]}   8192, last 1024: {lines[1]}", flush=True)


def train(bench, index, layers, data, shares, **options):
    """shares: of the steps for each kind of window in `data` (a list of lists of windows)."""
    result = index_branch.Index(bench.model, list(index.wq), list(index.wk))
    weights = [share / len(kind) for kind, share in zip(data, shares) if share for _ in kind]
    for layer in layers:
        windows = [(x[layer].float(), tail) for kind, share in zip(data, shares) if share for x, tail in kind]
        result.wq[layer], result.wk[layer], losses = training.train_layer(
            bench.model, layer, index.wq[layer], index.wk[layer], windows, weights, **options
        )
        print(f"  layer {layer}: KL {sum(losses[:10]) / 10:.3f} -> {sum(losses[-20:]) / 20:.3f}", flush=True)
    return result


def show_perplexity(name, losses):
    print(
        f"{name:18s} all {losses.mean().exp():.4f}, last 1024 {losses[-1024:].mean().exp():.4f}", flush=True
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=("init", "train", "rank", "perplexity"))
    parser.add_argument("--model", default="out/model")
    parser.add_argument("--cache", default="out/recipe", help="where layer inputs are kept")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    model = bench.model
    layers = (
        range(model.layers)
        if options.layers == "all"
        else [int(layer) for layer in options.layers.split(",")]
    )

    short = bench.ordinary(2048, 16, seed=1)
    closed = bench.closed_form(short[:8])
    if options.experiment == "init":
        held = bench.ordinary(4096, 2, seed=7, evaluation=True, whole=True), []
        show_recalls(bench, "random", index_branch.random_index(model), layers, held)
        show_recalls(bench, "means", index_branch.mean_index(model), layers, held)
        for weighting in ("none", "mean", "sum"):
            index = bench.closed_form(short[:8], weighting=weighting)
            show_recalls(bench, f"closed form, {weighting}", index, layers, held)
        show_recalls(bench, "closed form, 2 D", bench.closed_form(short[:8], width=2), layers, held)
        return

    data = [short, bench.retrieval(2048, 12, seed=11), bench.ordinary(8192, 2, seed=5, whole=True)]
    recipe = (0.3, 0.5, 0.2)  # shares of the steps: ordinary, retrieval, long
    if options.experiment == "train":
        held = (
            bench.ordinary(4096, 2, seed=7, evaluation=True, whole=True),
            bench.ordinary(8192, 1, seed=9, evaluation=True, whole=True),
        )
        show_recalls(bench, "untrained", closed, layers, held)
        for name, shares, more in (
            ("ordinary", (1, 0, 0), {}),
            ("retrieval", (0.5, 0.5, 0), {}),
            ("retrieval, max teacher", (0.5, 0.5, 0), {"teacher": "max"}),
            ("retrieval, rate 1e-2", (0.5, 0.5, 0), {"rate": 1e-2}),
            ("retrieval, long windows", recipe, {}),
        ):
            show_recalls(bench, name, train(bench, closed, layers, data, shares, **more), layers, held)
    elif options.experiment == "rank":
        trained = train(bench, closed, layers, data, recipe, steps=100)
        fresh = bench.retrieval(2048, 4, seed=12)
        for layer in layers:
            row = [
                sum(
                    training.gain_of_oracle(
                        model, layer, index.wq[layer], index.wk[layer], x[layer].float(), tail, topk
                    )
                    for x, tail in fresh
                )
                / len(fresh)
                for index in (closed, trained)
                for topk in (4, 8, 16)
            ]
            figures = " ".join(f"{gain:.3f}" for gain in row)
            print(f"layer {layer:2d}  gain at k 4, 8, 16 untrained, then trained: {figures}", flush=True)
    else:
        _, ids = corpus.windows(bench.tokenizer, options.context, 1, seed=7, evaluation=True, whole=True)[0]
        trained = train(bench, closed, layers, data, recipe)
        topk = options.context // (8 * 64)
        base = model.losses(model.forward(ids, dense(model)), ids)
        show_perplexity("dense", base)
        for name, mode, index in (
            ("trained", "index", trained),
            ("untrained", "index", closed),
            ("oracle", "oracle", None),
            ("window", "window", None),
        ):
            stats = {}
            policy = sparse(model, 64, topk, index, mode, stats)
            extra = model.losses(model.forward(ids, policy), ids) - base
            show_perplexity(f"{name} / dense", extra)
            print("  block recall %.3f, score recall %.3f" % recalls(stats), flush=True)


if __name__ == "__main__":
    main()
