# SPDX-License-Identifier: Apache-2.0
"""Trains one sparse attention layer to look things up: a few seconds, nothing but torch and msa.

A sequence is a list of (key, value) tokens followed by questions, each a key seen before; the answer is its value. The
layer must attend to the block that holds the key. Warmup runs full attention and lets the index branch learn from it by
the KL; the sparse stage attends to 3 of up to 8 blocks. Tested in tests/python/test_ops_nn.py.

    python examples/train_layer.py
"""

import time

import torch
from msa.nn import SparseAttention

KEYS, PAIRS, QUESTIONS, HIDDEN = 128, 112, 16, 64
STAGES = (("warmup", 60), ("sparse", 40))


class Lookup(torch.nn.Module):
    """Embedding of (key, value) tokens, one layer, a classifier over the values."""

    def __init__(self):
        super().__init__()
        self.keys = torch.nn.Embedding(KEYS, HIDDEN)
        self.values = torch.nn.Embedding(17, HIDDEN)  # 16 values, and 16 for "question"
        self.norm = torch.nn.RMSNorm(HIDDEN)
        self.layer = SparseAttention(HIDDEN, query_heads=2, kv_heads=1, block_size=16, topk=3, rotary_dim=0)
        self.head = torch.nn.Linear(HIDDEN, 16)
        with torch.no_grad():  # equal keys attract from the start, which saves thousands of steps
            key = self.layer.k_proj.weight
            self.layer.q_proj.weight.copy_(4 * key.repeat(self.layer.query_heads // self.layer.kv_heads, 1))

    def forward(self, keys, values, **options):
        x = self.norm(self.keys(keys) + self.values(values))
        attention = self.layer(x, **options)
        return self.head(attention.output), attention


def make_batch(generator, sequences=4):
    keys = torch.stack([torch.randperm(KEYS, generator=generator)[:PAIRS] for _ in range(sequences)])
    values = torch.randint(16, keys.shape, generator=generator)
    asked = torch.randint(PAIRS, (sequences, QUESTIONS), generator=generator)
    answers = values.gather(1, asked)
    keys = torch.cat((keys, keys.gather(1, asked)), dim=1)
    values = torch.cat((values, torch.full_like(asked, 16)), dim=1)
    return keys, values, answers


def main():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Lookup()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    start = time.monotonic()
    for stage, steps in STAGES:
        model.layer.stage = stage
        for step in range(steps + 1):
            keys, values, answers = make_batch(generator)
            report = step % 20 == 0
            logits, attention = model(keys, values, with_recall=report)
            task = torch.nn.functional.cross_entropy(logits[:, PAIRS:].flatten(0, 1), answers.flatten())
            loss = task + attention.kl  # lambda = 1; the KL reaches the index branch only
            if report:
                block, score = (r.item() for r in attention.recall)
                print(
                    f"{stage:6}  step {step:3}  loss {task.item():6.3f}  kl {attention.kl.item():7.4f}  "
                    f"block recall {block:.3f}  score recall {score:.3f}",
                    flush=True,
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"{time.monotonic() - start:.1f} seconds")


if __name__ == "__main__":
    main()
