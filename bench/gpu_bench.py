# SPDX-License-Identifier: Apache-2.0
"""The speed goals of the CUDA backend: every operator against torch's own on the same GPU, in one run.

    python bench/gpu_bench.py --json out/gpu/bench.json [--seconds 150] [--only decode]
    python bench/gpu_bench.py --dry-run         every row on the CPU at sizes that mean nothing: does the script run to its end?
    msa bench --from out/gpu/bench.json --plot time.svg

Geometry: 64 query and 4 kv heads, dimension 128, blocks of 128, topk 16, bfloat16. Times are medians of CUDA events around
single calls, after a warm-up, with the L2 cache swept before each; decoding is a replayed graph. torch's peer is the fastest of
its scaled_dot_product_attention backends and of the ways to ask them (class Dense). Rows say their operations a second and what
share of the peaks that is, which the same run measures. A row that would take too long, or more memory than there is, is left
out with the reason; its goal then has no figure. A row that fails otherwise is kept with its error, the rows behind it follow if
the device still answers, and the exit status is 1. Tested in tests/integration/test_gpu_tools.py.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))
import msa  # noqa: E402

K = 1024
SLOWEST_CALL = 6.0  # seconds that a single call of ours may take


class TooSlow(Exception):
    pass


class DeviceLost(Exception):
    """An error that every later call on the device would report again: the address of another kernel's mistake, say."""


class Setting:
    """Where it runs and how large things are: the goals' geometry on a GPU, or a 256th of the tokens on the CPU."""

    def __init__(self, dry):
        self.dry = dry
        self.device = "cpu" if dry else "cuda"
        self.query_heads, self.kv_heads, self.dim, self.block, self.topk = (4, 2, 32, 16, 4) if dry else (64, 4, 128, 128, 16)
        self.shrink = 256 if dry else 1
        self.clock = HostClock() if dry else Clock()
        if dry:
            self.backends = (SDPBackend.MATH,)
        else:
            self.backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)

    def is_lost(self):
        """Whether the device answers nothing but an earlier error."""
        if self.dry:
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def tokens(self, count):
        return count // self.shrink

    def bounds(self, *lengths):
        return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=self.device)

    def inputs(self, queries, keys, requires_grad=False):
        """q, k, v, q_idx, k_idx."""
        heads, groups, dim = self.query_heads, self.kv_heads, self.dim
        shapes = ((queries, heads, dim), (keys, groups, dim), (keys, groups, dim), (queries, groups, dim), (keys, dim))
        make = {"device": self.device, "dtype": torch.bfloat16}
        return [torch.randn(*shape, **make).requires_grad_(requires_grad) for shape in shapes]

    def flops(self, queries, keys):
        """Of the last `queries` rows of `keys`: index scores, attention to selected blocks, dense attention."""
        pairs = queries * keys - queries * (queries - 1) / 2
        selected = queries * min(self.topk * self.block, keys)
        wide = self.query_heads * self.dim
        return {"select": 2 * pairs * self.kv_heads * self.dim, "attend": 4 * selected * wide, "dense": 4 * pairs * wide}

    def flop_ratio(self, keys):
        """Of a pass over the whole context: 2 Hq D N^2 / (Hkv Di N^2 + 4 Hq D N k Bk)."""
        wide = self.query_heads * self.dim
        return 2 * wide * keys / (self.kv_heads * self.dim * keys + 4 * wide * self.topk * self.block)


class Clock:
    """Median seconds of a call on the GPU, its inputs out of the cache."""

    def __init__(self):
        self.sweep = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # several times the L2

    def once(self, call):
        self.sweep.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def __call__(self, call, repeats=10, budget=2.0, beat=math.inf):
        """A warm-up, then runs until `budget` seconds are spent. A warm-up that is not near `beat` counts as it is."""
        warm = self.once(call)
        if warm > 1.5 * beat:
            return warm
        times, start = [], time.monotonic()
        while len(times) < repeats and (not times or time.monotonic() - start < budget):
            times.append(self.once(call))
        return statistics.median(times)

    def replay(self, call, repeats=20):
        """The same as a graph: no time of the host in it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self(graph.replay, repeats)


class HostClock(Clock):
    """For dry runs: one call each."""

    def __init__(self):
        pass

    def once(self, call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def __call__(self, call, repeats=1, budget=0.0, beat=math.inf):
        return self.once(call)

    def replay(self, call, repeats=1):
        return self.once(call)


class Dense:
    """torch's dense attention on [rows, heads, dim] tensors, causal with the queries last, asked in every way a user might:

    - query heads that share keys by enable_gqa, or groups as a batch whose heads share keys by a stride of 0; one query also as
      one head a group with more queries, so that keys are read once a group;
    - fewer queries than keys: the mask aligned to the lower right where the backend knows it, else the keys before the first
      query without a mask and the rest with one. Merging the two is left out, in torch's favour.
    """

    def __init__(self, setting, q, k, v, backward=False):
        self.setting, self.backward = setting, backward
        self.queries, self.keys = q.shape[0], k.shape[0]
        self.leaves = [t.detach().transpose(0, 1)[None].contiguous().requires_grad_(backward) for t in (q, k, v)]

    def forms(self):
        q, k, v = self.leaves
        groups, size = k.shape[1], q.shape[1] // k.shape[1]
        yield q, k, v
        shared = [t[0][:, None].expand(-1, size, -1, -1) for t in (k, v)]
        yield q.view(groups, size, *q.shape[2:]), *shared
        if self.queries == 1:
            yield q.view(1, groups, size, q.shape[-1]), k, v

    def attend(self, q, k, v, **options):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)

    def masked(self, backend, q, k, v):
        if self.queries in (1, self.keys):
            return self.attend(q, k, v, is_causal=self.queries > 1)
        if backend != SDPBackend.CUDNN_ATTENTION:
            return self.attend(q, k, v, attn_mask=causal_lower_right(self.queries, self.keys))
        first = self.keys - self.queries  # given the mask, it would want it as a tensor of [queries, keys]
        self.attend(q, k[:, :, :first], v[:, :, :first])
        return self.attend(q, k[:, :, first:], v[:, :, first:], is_causal=True)

    def run(self, backend, form):
        out = self.masked(backend, *form)
        if self.backward:
            torch.autograd.grad(out, self.leaves, out.detach())

    def fastest(self):
        """Seconds and the backend's name."""
        best, which, refusal = math.inf, "none", None
        for backend in self.setting.backends:
            for form in self.forms():
                try:
                    with sdpa_kernel(backend):
                        seconds = self.setting.clock(lambda: self.run(backend, form), repeats=5, beat=best)  # noqa: B023
                except RuntimeError as error:  # the backend does not take it so
                    refusal = error if not isinstance(refusal, torch.OutOfMemoryError) else refusal
                    continue
                if seconds < best:
                    best, which = seconds, backend.name
        if which == "none":
            if isinstance(refusal, torch.OutOfMemoryError):
                raise refusal
            raise RuntimeError("no backend of scaled_dot_product_attention takes these tensors") from refusal
        return best, which


def guard(setting, step_of, cost_of, small, large):
    """Runs a step at a small size first: a kernel that would take minutes at the large one cannot be interrupted. `cost_of`: of
    so many tokens, in any unit."""
    small = min(small, large)
    step = step_of(small)
    step()
    predicted = setting.clock.once(step) * cost_of(large) / cost_of(small)
    if predicted > SLOWEST_CALL and not setting.dry:
        raise TooSlow(f"a call would take about {predicted:.0f} s, judged by {small} tokens; the limit is {SLOWEST_CALL:.0f} s")


def random_blocks(setting, queries, keys, realistic):
    """Ids [kv_heads, queries, topk]. Independent: each row's own choice among what it sees, the local block always in it.
    Realistic: sink, the two local blocks, and stripes that 256 neighbouring rows share."""
    position = torch.arange(keys - queries, keys, device=setting.device)
    last = (position // setting.block)[None]
    draws = setting.topk * 4
    if realistic:
        runs = torch.rand(setting.kv_heads, (queries + 255) // 256, draws, device=setting.device)
        chances = runs.repeat_interleave(256, 1)[:, :queries]
    else:
        chances = torch.rand(setting.kv_heads, queries, draws, device=setting.device)
    ids = (chances * (last + 1)[..., None]).to(torch.int32)
    ids[..., 0] = last
    if realistic:
        ids[..., 1] = (last - 1).clamp_min(0)
        ids[..., 2] = 0
    # Ascending and unique: the forced ones, then the first in a random order of what is left once repetitions are gone.
    order = ids.sort(-1).values
    fresh = torch.ones_like(order, dtype=torch.bool)
    fresh[..., 1:] = order[..., 1:] != order[..., :-1]
    forced = order == last[..., None]
    if realistic:
        forced |= (order == 0) | (order == (last - 1)[..., None])
    # What a row takes: by itself, or mostly as the 64 rows around it do.
    taste = torch.rand(order.shape, device=setting.device)
    if realistic:
        common = torch.rand(setting.kv_heads, (queries + 63) // 64, draws, device=setting.device)
        taste = 0.85 * common.repeat_interleave(64, 1)[:, :queries] + 0.15 * taste
    rank = torch.where(fresh, torch.where(forced, -1.0, taste), 2.0)
    taken = rank.argsort(-1)[..., : setting.topk]
    none = 1 << 30
    picked = torch.where(rank.gather(-1, taken) < 2, order.gather(-1, taken), none).to(torch.int32).sort(-1).values
    return torch.where(picked == none, -1, picked).contiguous()


def union_of_neighbours(setting, blocks):
    """Blocks that eight neighbouring rows select among them, over what one of them does: 1 when they agree, 8 at most."""
    tiles = blocks[:, : blocks.shape[1] // 8 * 8].reshape(setting.kv_heads, -1, 8 * setting.topk).sort(-1).values
    fresh = tiles >= 0
    own = fresh.sum().item()
    fresh[..., 1:] &= tiles[..., 1:] != tiles[..., :-1]
    return 8 * fresh.sum().item() / own


def selected_pairs(setting, blocks, tokens):
    """Of a query and a key it attends to, whole sequences; half of a local block is not seen."""
    return (blocks >= 0).sum().item() / setting.kv_heads * setting.block - tokens * setting.block / 2


def selection_of(s, queries, count, prepare=lambda k_idx: k_idx):
    """Selection for the last `queries` rows of `count` keys, or for all of fewer."""
    _, _, _, q_idx, k_idx = s.inputs(min(count, queries), count)
    k_idx, cu = prepare(k_idx), (s.bounds(q_idx.shape[0]), s.bounds(count))
    return lambda: msa.select_blocks(q_idx, k_idx, *cu, s.block, s.topk)


def attention_of(s, queries, count, realistic=False):
    """Attention of the same rows to random blocks; its tensors and blocks beside it."""
    q, k, v, _, _ = s.inputs(min(count, queries), count)
    blocks, cu = random_blocks(s, q.shape[0], count, realistic), (s.bounds(q.shape[0]), s.bounds(count))

    def step():
        return msa.sparse_attention(q, k, v, blocks, *cu, s.block)

    step.tensors, step.blocks = (q, k, v), blocks
    return step


def prefill_row(s, report, part, queries, keys, goal):
    shape = {"queries": s.tokens(queries), "keys": s.tokens(keys)}

    def row():
        for name, step_of in (("select", selection_of), ("attend", attention_of)):
            guard(s, lambda count: step_of(s, shape["queries"], count),  # noqa: B023: called at once
                  lambda count: s.flops(min(count, shape["queries"]), count)[name],  # noqa: B023
                  s.tokens(16 * K), shape["keys"])
        q, k, v, q_idx, k_idx = s.inputs(**shape)
        cu = (s.bounds(shape["queries"]), s.bounds(shape["keys"]))
        blocks = msa.select_blocks(q_idx, k_idx, *cu, s.block, s.topk)
        seconds = {"select": s.clock(lambda: msa.select_blocks(q_idx, k_idx, *cu, s.block, s.topk))}
        seconds["attend"] = s.clock(lambda: msa.sparse_attention(q, k, v, blocks, *cu, s.block))
        seconds["dense"], which = Dense(s, q, k, v).fastest()
        speedup = seconds["dense"] / (seconds["select"] + seconds["attend"])
        return {"seconds": seconds, "flops": s.flops(**shape), "speedup": speedup, "dense_backend": which,
                "flop_ratio_of_the_whole": s.flop_ratio(shape["keys"])}

    report.add(part, shape, row, ("speedup", goal))


def bench_prefill(s, report):
    """The last 32K rows of a context stand for the whole: selection and sparse attention against dense attention."""
    for keys, goal in ((1024 * K, 28.4), (512 * K, 25.6), (256 * K, 21.3), (128 * K, 16.0), (64 * K, 10.7)):
        prefill_row(s, report, "prefill", 32 * K, keys, goal)


def bench_whole(s, report):
    prefill_row(s, report, "prefill_whole", 128 * K, 128 * K, 16.0)


def bench_decode(s, report):
    """One token of one sequence, as a replayed graph."""
    for keys, goal in ((s.tokens(1024 * K), 14.0), (s.tokens(128 * K), None)):

        def row(keys=keys):
            q, k, v, q_idx, k_idx = s.inputs(1, keys)
            cu = (s.bounds(1), s.bounds(keys))

            def step():
                chosen = msa.select_blocks(q_idx, k_idx, *cu, s.block, s.topk)
                return msa.sparse_attention(q, k, v, chosen, *cu, s.block)

            seconds = {"msa": s.clock.replay(step)}
            seconds["dense"], which = Dense(s, q, k, v).fastest()
            wide = 2 * s.kv_heads * s.dim * 2  # bytes of a token's keys and values
            traffic = {"msa": keys * s.dim * 2 + s.topk * s.block * wide, "dense": keys * wide}
            return {"seconds": seconds, "traffic": traffic, "speedup": seconds["dense"] / seconds["msa"], "dense_backend": which}

        report.add("decode", {"queries": 1, "keys": keys}, row, goal and ("speedup", goal))


def bench_topk(s, report):
    """Rows of SPEC section 10; torch.topk sorted or not, whichever is faster."""
    for rows, blocks, topk, goal in (
        (128 * K, 1024, 16, 8.0), (128 * K, 2048, 32, 5.0), (512 * K, 4096, 16, 8.0), (512 * K, 8192, 32, 5.0),
    ):

        def row(rows=s.tokens(rows), blocks=blocks, topk=topk):
            scores = torch.randn(rows, blocks, device=s.device)
            seconds = {"topk": s.clock(lambda: msa.topk_blocks(scores, topk))}
            seconds["torch"] = min(s.clock(lambda: torch.topk(scores, topk, sorted=order)) for order in (False, True))
            return {"seconds": seconds, "traffic": {"topk": scores.nbytes + rows * topk * 4},
                    "speedup": seconds["torch"] / seconds["topk"]}

        report.add("topk", {"rows": s.tokens(rows), "blocks": blocks, "topk": topk}, row, ("speedup", goal))


def bench_sparse_forward(s, report):
    tokens = s.tokens(128 * K)
    for kind, goal in (("independent", 400.0), ("realistic", 500.0)):

        def row(kind=kind):
            def step_of(count):
                return attention_of(s, count, count, kind == "realistic")

            guard(s, step_of, lambda count: s.flops(count, count)["attend"], s.tokens(16 * K), tokens)
            step = step_of(tokens)
            flops = {"attend": 4 * selected_pairs(s, step.blocks, tokens) * s.query_heads * s.dim}
            return {"seconds": {"attend": s.clock(step)}, "flops": flops, "union": union_of_neighbours(s, step.blocks)}

        report.add("sparse_forward", {"queries": tokens, "keys": tokens, "kind": kind}, row, ("TFLOP/s", goal))


@contextlib.contextmanager
def screening(value):
    """MSA_SCREEN for as long as it lasts; None leaves the choice to the call."""
    if value is not None:
        os.environ["MSA_SCREEN"] = value
    try:
        yield
    finally:
        os.environ.pop("MSA_SCREEN", None)


def bench_index(s, report):
    """Scores, block maxima and top-k of the last 32K rows of 1M keys: every block scored exactly, screened first (the same
    ids), and from keys in float8. Operations are those of all scores, however few of them were computed exactly."""
    queries, keys = s.tokens(32 * K), s.tokens(1024 * K)
    kinds = (("exact", torch.bfloat16, "0", 600.0), ("screened", torch.bfloat16, "1", 1000.0),
             ("float8 keys", torch.float8_e4m3fn, None, None))
    ids = {}
    for kind, dtype, switch, goal in kinds:

        def step_of(count, dtype=dtype):
            torch.manual_seed(1)
            return selection_of(s, queries, count, lambda k_idx: k_idx.to(dtype))

        def row(kind=kind, switch=switch, step_of=step_of):
            with screening(switch):
                guard(s, step_of, lambda count: s.flops(min(count, queries), count)["select"], s.tokens(16 * K), keys)
                step = step_of(keys)
                ids[kind] = step()
                if kind == "screened" and "exact" in ids and not torch.equal(ids["exact"], ids["screened"]):
                    raise RuntimeError("screening changed the selection")
                return {"seconds": {"select": s.clock(step)}, "flops": {"select": s.flops(queries, keys)["select"]}}

        report.add("index", {"queries": queries, "keys": keys, "kind": kind}, row, goal and ("TFLOP/s", goal))


def bench_screening(s, report):
    """8K rows: screening off, forced, and as a call decides, on normal keys and on ones that it does not help (a part common
    to all of them is 100 times their differences)."""
    queries = s.tokens(8 * K)
    for keys in (s.tokens(128 * K), s.tokens(1024 * K)):
        for kind in ("normal", "biased"):

            def row(keys=keys, kind=kind):
                bias = 100 * (torch.arange(s.dim, device=s.device) % 3) * (kind == "biased")

                def step_of(count):
                    return selection_of(s, queries, count, lambda k_idx: k_idx + bias.to(k_idx.dtype))

                step, seconds = step_of(keys), {}
                for name, switch in (("exact", "0"), ("screened", "1"), ("chosen", None)):
                    with screening(switch):
                        guard(s, step_of, lambda count: s.flops(min(count, queries), count)["select"], s.tokens(16 * K), keys)
                        seconds[name] = s.clock(step)
                return {"seconds": seconds, "flops": dict.fromkeys(seconds, s.flops(queries, keys)["select"])}

            report.add("screening", {"queries": queries, "keys": keys, "kind": kind}, row)


def bench_index_scan(s, report):
    """Selection of decoding and verification, as a replayed graph: bound by reading the index keys once."""
    for keys in (s.tokens(128 * K), s.tokens(1024 * K)):
        for queries in (1, 16):

            def row(keys=keys, queries=queries):
                _, _, _, q_idx, k_idx = s.inputs(queries, keys)
                cu = (s.bounds(queries), s.bounds(keys))
                seconds, traffic = {}, {}
                for name, stored in (("bf16", k_idx), ("float8", k_idx.to(torch.float8_e4m3fn))):
                    seconds[name] = s.clock.replay(lambda: msa.select_blocks(q_idx, stored, *cu, s.block, s.topk))  # noqa: B023
                    traffic[name] = stored.nbytes
                return {"seconds": seconds, "traffic": traffic}

            report.add("index_scan", {"queries": queries, "keys": keys}, row)


def bench_dense_forward(s, report):
    """Our dense attention against torch's: whole sequences, a chunk behind a prefix, and a step of decoding."""
    for queries, keys in ((8 * K, 8 * K), (32 * K, 32 * K), (2 * K, 128 * K), (s.shrink, 1024 * K)):
        queries, keys = s.tokens(queries), s.tokens(keys)

        def row(queries=queries, keys=keys):
            def step_of(count):
                q, k, v, _, _ = s.inputs(queries, count)
                cu = (s.bounds(queries), s.bounds(count))

                def step():
                    return msa.dense_attention(q, k, v, *cu)

                step.tensors = (q, k, v)
                return step

            least = max(queries, s.tokens(4 * K))
            guard(s, step_of, lambda count: s.flops(queries, count)["dense"], min(least, keys), keys)
            step = step_of(keys)
            seconds = {"msa": s.clock.replay(step) if queries == 1 else s.clock(step)}
            seconds["dense"], which = Dense(s, *step.tensors).fastest()
            flops = dict.fromkeys(seconds, s.flops(queries, keys)["dense"])
            return {"seconds": seconds, "flops": flops, "speedup": seconds["dense"] / seconds["msa"], "dense_backend": which}

        report.add("dense_forward", {"queries": queries, "keys": keys}, row)


def training_step(s, count):
    q, k, v, q_idx, k_idx = s.inputs(count, count, requires_grad=True)
    cu = (s.bounds(count), s.bounds(count))

    def step():
        chosen = msa.select_blocks(q_idx, k_idx, *cu, s.block, s.topk)
        out, _ = msa.sparse_attention(q, k, v, chosen, *cu, s.block)
        kl = msa.index_kl(q_idx, k_idx, q.detach(), k.detach(), chosen, *cu, s.block)
        torch.autograd.grad((out, kl), (q, k, v, q_idx, k_idx), (out.detach(), torch.ones_like(kl)))

    step.tensors = (q, k, v)
    return step


def bench_training(s, report):
    """Selection, attention, KL and the backward of all over every token, against dense attention forward and backward."""

    def cost(count):
        flops = s.flops(count, count)
        return flops["select"] + 5 * flops["attend"]

    for keys, goal in ((s.tokens(32 * K), 5.0), (s.tokens(128 * K), 12.0)):

        def row(keys=keys):
            guard(s, lambda count: training_step(s, count), cost, s.tokens(4 * K), keys)
            step = training_step(s, keys)
            seconds = {"msa": s.clock(step, repeats=5)}
            seconds["dense"], which = Dense(s, *step.tensors, backward=True).fastest()
            return {"seconds": seconds, "speedup": seconds["dense"] / seconds["msa"], "dense_backend": which}

        report.add("training", {"queries": keys, "keys": keys}, row, ("speedup", goal))


def bench_backward(s, report):
    """Gradients alone: of sparse attention on independent and on realistic selections, and of dense attention."""
    for tokens in (s.tokens(32 * K), s.tokens(128 * K)):
        for kind in ("independent", "realistic"):

            def row(tokens=tokens, kind=kind):
                def step_of(count):
                    attend = attention_of(s, count, count, kind == "realistic")
                    for tensor in attend.tensors:
                        tensor.requires_grad_()
                    out, _ = attend()

                    def step():
                        return torch.autograd.grad(out, attend.tensors, out, retain_graph=True)

                    step.blocks = attend.blocks
                    return step

                guard(s, step_of, lambda count: s.flops(count, count)["attend"], s.tokens(4 * K), tokens)
                step = step_of(tokens)
                flops = 10 * selected_pairs(s, step.blocks, tokens) * s.query_heads * s.dim
                return {"seconds": {"backward": s.clock(step, repeats=5)}, "flops": {"backward": flops}}

            report.add("backward", {"queries": tokens, "keys": tokens, "kind": kind}, row)

    tokens = s.tokens(32 * K)

    def dense():
        def step_of(count):
            attend, cu = attention_of(s, count, count), (s.bounds(count), s.bounds(count))
            out, lse = attend()  # any serve
            return lambda: torch.ops.msa.dense_attention_backward(out, None, *attend.tensors, out, lse, *cu, None, None)

        guard(s, step_of, lambda count: s.flops(count, count)["dense"], s.tokens(4 * K), tokens)
        seconds = s.clock(step_of(tokens), repeats=5)
        return {"seconds": {"backward": seconds}, "flops": {"backward": 2.5 * s.flops(tokens, tokens)["dense"]}}

    report.add("backward", {"queries": tokens, "keys": tokens, "kind": "dense"}, dense)


def bench_index_kl(s, report):
    """Both stages, forward and with the backward. Operations: the teacher's and the student's scores, which the forward takes
    twice (log-sums first) and a backward once more (in the warmup stage once for queries and once for keys), and two products
    of (Q - P)."""
    for tokens, stage in ((32 * K, "sparse"), (128 * K, "sparse"), (8 * K, "warmup"), (32 * K, "warmup")):
        tokens = s.tokens(tokens)

        def row(tokens=tokens, stage=stage):
            def step_of(count):
                q, k, _, q_idx, k_idx = s.inputs(count, count)
                cu = (s.bounds(count), s.bounds(count))
                blocks = None if stage == "warmup" else random_blocks(s, count, count, True)
                leaves = (q_idx.requires_grad_(), k_idx.requires_grad_())

                def forward():
                    return msa.index_kl(*leaves, q, k, blocks, *cu, s.block)

                def both():
                    return torch.autograd.grad(forward(), leaves)

                both.forward, both.blocks = forward, blocks
                return both

            work = "dense" if stage == "warmup" else "attend"
            guard(s, step_of, lambda count: s.flops(count, count)[work], s.tokens(4 * K), tokens)
            both = step_of(tokens)
            blocks = both.blocks
            seconds = {"forward": s.clock(both.forward, repeats=5), "both": s.clock(both, repeats=5)}
            pairs = tokens * (tokens + 1) / 2 if blocks is None else selected_pairs(s, blocks, tokens)
            scores, index = 2 * pairs * (s.query_heads + s.kv_heads) * s.dim, 2 * pairs * s.kv_heads * s.dim
            flops = {"forward": 2 * scores, "both": (4 if blocks is None else 3) * scores + 2 * index}
            return {"seconds": seconds, "flops": flops}

        report.add("index_kl", {"queries": tokens, "keys": tokens, "kind": stage}, row)


PARTS = {
    "topk": bench_topk,
    "index": bench_index,
    "sparse_forward": bench_sparse_forward,
    "decode": bench_decode,
    "prefill": bench_prefill,
    "prefill_whole": bench_whole,
    "training": bench_training,
    "index_scan": bench_index_scan,
    "screening": bench_screening,
    "dense_forward": bench_dense_forward,
    "backward": bench_backward,
    "index_kl": bench_index_kl,
}


def measure_peaks(s):
    """Matrix products a second in bfloat16 and float8, and bytes a second of a copy, all on random data."""
    size = 8192 // s.shrink
    a, b = (torch.randn(size, size, device=s.device, dtype=torch.bfloat16) for _ in range(2))
    peaks = {"bf16_flops": 2 * size**3 / s.clock(lambda: a @ b), "fp8_flops": None}
    try:
        narrow, one = torch.float8_e4m3fn, torch.ones((), device=s.device)
        a, b = a.to(narrow), b.to(narrow).t()
        peaks["fp8_flops"] = 2 * size**3 / s.clock(lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16))
    except (RuntimeError, AttributeError):  # a private function: there is no public one
        pass
    source = torch.randn((1 << 30) // s.shrink, device=s.device)
    target = torch.empty_like(source)
    peaks["copy_bytes"] = 2 * source.nbytes / s.clock(lambda: target.copy_(source))
    return peaks


def describe_machine(s):
    if s.dry:
        return {"in_words": f"dry run on the CPU ({platform.machine()}): the figures mean nothing"}
    about = torch.cuda.get_device_properties(0)
    memory = about.total_memory / 2**30
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    except OSError:
        driver = ""
    words = f"{about.name}, {about.multi_processor_count} multiprocessors, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    words += f", driver {driver}" if driver else ""
    return {"in_words": words, "gpu": about.name, "multiprocessors": about.multi_processor_count, "memory_gib": round(memory, 1),
            "cuda": torch.version.cuda, "driver": driver}


class Report:
    """Rows and goals as they come; the file is complete after each of them."""

    def __init__(self, setting, path, seconds):
        s = setting
        self.setting, self.path, self.deadline = setting, path, time.monotonic() + seconds
        self.peaks = measure_peaks(setting)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False).stdout
        self.data = {
            "dry_run": s.dry, "machine": describe_machine(s), "torch": torch.__version__, "msa": msa.version(),
            "commit": commit.strip(), "command": " ".join(["python", "bench/gpu_bench.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "geometry": {"query_heads": s.query_heads, "kv_heads": s.kv_heads, "head_dim": s.dim, "block_size": s.block,
                         "topk": s.topk, "dtype": "bfloat16"},
            "peaks": self.peaks, "rows": [], "goals": [], "left_out": [], "failed": [],
        }
        self.save()

    def save(self):
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1) + "\n")

    def add(self, part, shape, measure, goal=None):
        """Measures a row, or says why not. `goal`: (unit, least). Raises DeviceLost behind a row that took the device along."""
        row = {"part": part, **shape}
        failed = False
        try:
            if time.monotonic() > self.deadline:
                raise TooSlow("out of time")
            row |= self.rates(measure())
            self.data["rows"].append(row)
            text = self.describe(row)
        except (TooSlow, torch.OutOfMemoryError) as error:
            row["why"] = str(error).split("\n")[0]
            self.data["left_out"].append(row)
            text = "left out: " + row["why"]
        except Exception as error:  # one row's mistake must not lose the others
            failed = True
            row["error"] = f"{type(error).__name__}: {error}"
            self.data["failed"].append(row)
            text = "FAILED: " + row["error"].split("\n")[0]
        if goal:
            self.data["goals"].append({"part": part, **shape, **self.judge(row, *goal)})
        self.save()
        print(f"{part:<15} {' '.join(str(value) for value in shape.values()):<26} {text}", flush=True)
        if failed and self.setting.is_lost():
            raise DeviceLost("the device answers nothing but this error; every row behind it is missing")
        if not self.setting.dry:
            torch.cuda.empty_cache()

    def rates(self, row):
        seconds = row["seconds"]
        rates = {name: amount / seconds[name] for name, amount in row.pop("flops", {}).items()}
        row["tflops"] = {name: rate / 1e12 for name, rate in rates.items()}
        row["of_bf16_peak"] = {name: rate / self.peaks["bf16_flops"] for name, rate in rates.items()}
        traffic = row.pop("traffic", {})
        row["of_copy_peak"] = {name: amount / seconds[name] / self.peaks["copy_bytes"] for name, amount in traffic.items()}
        return row

    def describe(self, row):
        text = " ".join(f"{name} {value * 1e3:.3f} ms" for name, value in row["seconds"].items())
        text += "".join(f", {name} {value:.0f} TFLOP/s" for name, value in row["tflops"].items())
        text += "".join(f", {name} {value:.0%} of copy" for name, value in row["of_copy_peak"].items())
        return text + (f", {row['speedup']:.1f}x {row.get('dense_backend', 'torch.topk')}" if "speedup" in row else "")

    def judge(self, row, unit, least):
        """A dry run judges nothing."""
        figure = None
        if "seconds" in row:
            figure = row["speedup"] if unit == "speedup" else max(row["tflops"].values())
        reached = None if self.setting.dry or figure is None else figure >= least
        return {"unit": unit, "goal": least, "figure": figure, "reached": reached}

    def print_goals(self):
        print("\ngoals:")
        for goal in self.data["goals"]:
            shape = [str(value) for name, value in goal.items() if name not in ("part", "unit", "goal", "figure", "reached")]
            figure = "-" if goal["figure"] is None else f"{goal['figure']:.1f}"
            verdict = {True: "reached", False: "missed", None: "not measured"}[goal["reached"]]
            print(f"  {goal['part']:<15} {' '.join(shape):<26} {figure:>8} of {goal['goal']:g} {goal['unit']}: {verdict}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=150, help="start no row after this long")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not options.dry_run and not (torch.cuda.is_available() and msa.cuda_is_built()):
        print("gpu_bench: skipped: " + ("built without CUDA" if torch.cuda.is_available() else "no GPU on this machine"))
        return 0
    torch.manual_seed(0)
    msa.check_device_data(False)
    setting = Setting(options.dry_run)
    report = Report(setting, options.json, options.seconds)
    peaks, words = report.peaks, report.data["machine"]["in_words"]
    print(f"{words}: bf16 {peaks['bf16_flops'] / 1e12:.0f} TFLOP/s, copy {peaks['copy_bytes'] / 1e12:.2f} TB/s", flush=True)
    try:
        for name in options.only or PARTS:
            PARTS[name](setting, report)
    except DeviceLost as error:
        print(f"gpu_bench: {error}")
    report.print_goals()
    failed = report.data["failed"]
    if failed:
        print(f"\ngpu_bench: FAILED: {len(failed)} of the rows, the first: {failed[0]['error']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
