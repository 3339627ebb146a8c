# SPDX-License-Identifier: Apache-2.0
"""Speed of the operators on a GPU against torch's own, beside the peaks measured in the same run.

    python bench/gpu_bench.py --json out/gpu/bench.json [--seconds 100] [--only decode]

Geometry: 64 query and 4 kv heads, dimension 128, blocks of 128, topk 16, bfloat16. Times are medians of CUDA events around
single calls, after warm-up, with the L2 cache swept before each call; decode is also timed as a replayed graph. torch's peer
is the fastest of its scaled_dot_product_attention backends (flash, cudnn, efficient) on the same queries and keys. Each row
says its operations or bytes, and what share of the measured peak that is. Rows that do not fit into memory or time say so.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))
import msa  # noqa: E402

HQ, HKV, D, BLOCK, TOPK = 64, 4, 128, 128, 16
K = 1024


class Clock:
    """Median seconds of a call, its inputs out of the cache."""

    def __init__(self):
        self.sweep = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # several times the L2

    def __call__(self, call, repeats=10, budget=3.0):
        call()
        torch.cuda.synchronize()
        times, start = [], time.monotonic()
        while len(times) < repeats and (len(times) < 3 or time.monotonic() - start < budget):
            self.sweep.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
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


def peaks(clock):
    """Matrix products per second in bfloat16 and float8-free copy bytes per second, both on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / clock(lambda: a @ b)
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / clock(lambda: target.copy_(source))
    return {"bf16_flops": product, "copy_bytes": copied}


def bounds(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def tensors(queries, keys, requires_grad=False):
    """q, k, v, q_idx, k_idx."""
    shapes = ((queries, HQ, D), (keys, HKV, D), (keys, HKV, D), (queries, HKV, D), (keys, D))
    return [torch.randn(*s, device="cuda", dtype=torch.bfloat16).requires_grad_(requires_grad) for s in shapes]


def random_blocks(queries, keys, realistic=False):
    """Each row's own choice among what it sees, the local block always in it; `realistic`: sink, the two local blocks and
    stripes that neighbouring rows share."""
    position = torch.arange(keys - queries, keys, device="cuda")
    last = position // BLOCK
    rows = queries
    if realistic:
        stripes = torch.rand(HKV, (queries + 255) // 256, TOPK * 4, device="cuda").repeat_interleave(256, 1)[:, :rows]
    else:
        stripes = torch.rand(HKV, rows, TOPK * 4, device="cuda")
    ids = (stripes * (last + 1)[None, :, None]).to(torch.int32)
    ids[..., 0] = last[None]
    if realistic:
        ids[..., 1] = (last[None] - 1).clamp_min(0)
        ids[..., 2] = 0
    # Ascending and unique: the first TOPK of what is left once repetitions are gone, the local block kept.
    order = ids.sort(-1).values
    fresh = torch.ones_like(order, dtype=torch.bool)
    fresh[..., 1:] = order[..., 1:] != order[..., :-1]
    forced = (order == last[None, :, None]) | (realistic & ((order == 0) | (order == (last[None, :, None] - 1))))
    # What a row takes: by itself, or mostly as the 64 rows around it do.
    taste = torch.rand_like(order, dtype=torch.float32)
    if realistic:
        common = torch.rand(HKV, (rows + 63) // 64, order.shape[-1], device="cuda").repeat_interleave(64, 1)[:, :rows]
        taste = 0.85 * common + 0.15 * taste
    rank = torch.where(fresh, torch.where(forced, -1.0, taste), 2.0)
    taken = rank.argsort(-1)[..., :TOPK]
    picked = torch.where(rank.gather(-1, taken) < 2, order.gather(-1, taken), torch.full_like(taken, 1 << 30, dtype=torch.int32))
    picked = picked.sort(-1).values
    return torch.where(picked == 1 << 30, -1, picked).contiguous()


def sdpa(q, k, v, causal, clock, backward=False):
    """Seconds and name of torch's fastest dense attention on [rows, heads, dim] tensors; causal bottom-right when the
    queries are the last of the keys."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    best, which = math.inf, "none"
    queries, keys = q.shape[0], k.shape[0]
    shaped = [t.detach().transpose(0, 1)[None].contiguous().requires_grad_(backward) for t in (q, k, v)]
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        def call():
            options = {"enable_gqa": True}
            if causal and queries == keys:
                options["is_causal"] = True
            elif causal and queries > 1:
                options["attn_mask"] = causal_lower_right(queries, keys)
            out = torch.nn.functional.scaled_dot_product_attention(*shaped, **options)
            if backward:
                torch.autograd.grad(out, shaped, out)

        try:
            with sdpa_kernel(backend):
                seconds = clock(call, repeats=5)
        except RuntimeError:
            continue
        if seconds < best:
            best, which = seconds, backend.name
    return best, which


def visible_pairs(queries, keys):
    return queries * keys - queries * (queries - 1) / 2


def bench_prefill(clock, add, longest):
    """The last `queries` rows of a context: selection plus sparse attention against dense attention."""
    for keys in (32 * K, 64 * K, 128 * K, 256 * K, 512 * K, 1024 * K):
        if keys > longest:
            continue
        queries = min(keys, 32 * K)
        q, k, v, q_idx, k_idx = tensors(queries, keys)
        cu = (bounds(queries), bounds(keys))
        blocks = msa.select_blocks(q_idx, k_idx, *cu, BLOCK, TOPK)
        select = clock(lambda: msa.select_blocks(q_idx, k_idx, *cu, BLOCK, TOPK))
        attend = clock(lambda: msa.sparse_attention(q, k, v, blocks, *cu, BLOCK))
        dense, which = sdpa(q, k, v, True, clock)
        pairs = visible_pairs(queries, keys)
        flops = {"select": 2 * pairs * HKV * D, "attend": 4 * queries * HQ * D * TOPK * BLOCK, "dense": 4 * pairs * HQ * D}
        add("prefill", {"queries": queries, "keys": keys}, {"select": select, "attend": attend, "dense": dense}, flops,
            dense_backend=which, speedup=dense / (select + attend), flop_ratio=flops["dense"] / (flops["select"] + flops["attend"]))


def bench_decode(clock, add, longest):
    """One token of one sequence, as a replayed graph."""
    for keys in (64 * K, 128 * K, 512 * K, 1024 * K):
        if keys > longest:
            continue
        q, k, v, q_idx, k_idx = tensors(1, keys)
        cu = (bounds(1), bounds(keys))

        def step():
            chosen = msa.select_blocks(q_idx, k_idx, *cu, BLOCK, TOPK)
            return msa.sparse_attention(q, k, v, chosen, *cu, BLOCK)

        sparse = clock.replay(step)
        dense, which = sdpa(q, k, v, False, clock)
        traffic = {"sparse": keys * D * 2 + TOPK * BLOCK * 2 * HKV * D * 2, "dense": keys * HKV * 2 * D * 2}
        add("decode", {"queries": 1, "keys": keys}, {"sparse": sparse, "dense": dense}, {}, traffic, dense_backend=which,
            speedup=dense / sparse)


def with_screening(value, call):
    def run():
        os.environ["MSA_SCREEN"] = value
        try:
            return call()
        finally:
            del os.environ["MSA_SCREEN"]

    return run


def bench_selection(clock, add, longest):
    """Block selection alone: exact scores of every block; screened in int8; and as a call decides, on keys that screening
    helps and on keys (a common part 100 times the differences) that it does not."""
    for keys in (64 * K, 128 * K, 256 * K, 1024 * K):
        if keys > longest:
            continue
        queries = 8 * K
        _, _, _, q_idx, k_idx = tensors(queries, keys)
        cu = (bounds(queries), bounds(keys))
        flops = 2 * visible_pairs(queries, keys) * HKV * D
        for hard in (False, True):
            if hard:
                k_idx = k_idx + 100 * (torch.arange(D, device="cuda") % 3).to(k_idx.dtype)

            def select():
                return msa.select_blocks(q_idx, k_idx, *cu, BLOCK, TOPK)

            assert torch.equal(with_screening("0", select)(), with_screening("1", select)()), "screening changed a bit"
            seconds = {"exact": clock(with_screening("0", select)), "screened": clock(with_screening("1", select)),
                       "auto": clock(select)}
            add("selection", {"queries": queries, "keys": keys, "keys_are": "biased" if hard else "normal"}, seconds,
                dict.fromkeys(seconds, flops), speedup=seconds["exact"] / seconds["auto"])


def bench_index_scan(clock, add, longest):
    """Block selection of decoding and verification, as a replayed graph: bound by reading the index keys once."""
    for keys in (128 * K, 1024 * K):
        if keys > longest:
            continue
        for queries in (1, 4, 16):
            _, _, _, q_idx, k_idx = tensors(queries, keys)
            cu = (bounds(queries), bounds(keys))
            narrow = k_idx.to(torch.float8_e4m3fn)
            seconds = {
                "bf16": clock.replay(lambda: msa.select_blocks(q_idx, k_idx, *cu, BLOCK, TOPK)),
                "float8": clock.replay(lambda: msa.select_blocks(q_idx, narrow, *cu, BLOCK, TOPK)),
            }
            add("index_scan", {"queries": queries, "keys": keys}, seconds, {}, {"bf16": keys * D * 2, "float8": keys * D})


def bench_topk(clock, add, longest):
    for rows, columns, topk in ((128 * K, 1024, 16), (128 * K, 1024, 32), (32 * K, 4096, 16), (16 * K, 8192, 16)):
        scores = torch.randn(rows, columns, device="cuda")
        ours = clock(lambda: msa.topk_blocks(scores, topk))
        theirs = clock(lambda: torch.topk(scores, topk, sorted=False))
        add("topk", {"rows": rows, "blocks": columns, "topk": topk}, {"topk": ours, "torch": theirs}, {},
            {"topk": scores.nbytes + rows * topk * 4}, speedup=theirs / ours)


def union_of_neighbours(blocks):
    """Blocks that eight neighbouring rows select among them, over what one of them does: 1 when they agree, 8 at most."""
    tiles = blocks[:, : blocks.shape[1] // 8 * 8].reshape(HKV, -1, 8 * TOPK).sort(-1).values
    fresh = tiles >= 0
    own = fresh.sum().item()
    fresh[..., 1:] &= tiles[..., 1:] != tiles[..., :-1]
    return 8 * fresh.sum().item() / own


def bench_sparse_forward(clock, add, longest):
    for realistic in (False, True):
        queries = keys = min(128 * K, longest)
        q, k, v, _, _ = tensors(queries, keys)
        cu = (bounds(queries), bounds(keys))
        blocks = random_blocks(queries, keys, realistic)
        seconds = clock(lambda: msa.sparse_attention(q, k, v, blocks, *cu, BLOCK))
        pairs = (blocks >= 0).sum().item() / HKV * BLOCK - queries * BLOCK / 2  # half of the local block
        add("sparse_forward", {"queries": queries, "keys": keys, "selection": "realistic" if realistic else "independent"},
            {"attend": seconds}, {"attend": 4 * pairs * HQ * D}, union=union_of_neighbours(blocks))


def bench_dense_forward(clock, add, longest):
    """Dense attention against torch's: whole sequences, a chunk behind a prefix, a decode step in bfloat16 and float8."""
    for queries, keys in ((8 * K, 8 * K), (32 * K, 32 * K), (2 * K, 128 * K), (1, 128 * K), (1, 1024 * K)):
        if keys > longest:
            continue
        q, k, v, _, _ = tensors(queries, keys)
        cu = (bounds(queries), bounds(keys))
        time_of = clock.replay if queries == 1 else clock
        seconds = {"ours": time_of(lambda: msa.dense_attention(q, k, v, *cu))}
        if queries == 1:
            narrow = [t.to(torch.float8_e4m3fn) for t in (k, v)]
            seconds["float8"] = time_of(lambda: msa.dense_attention(q, *narrow, *cu))
        seconds["torch"], which = sdpa(q, k, v, queries > 1, clock)
        flops = {name: 4 * visible_pairs(queries, keys) * HQ * D for name in ("ours", "torch")}
        traffic = {"ours": keys * HKV * 2 * D * 2, "float8": keys * HKV * 2 * D} if queries == 1 else {}
        add("dense_forward", {"queries": queries, "keys": keys}, seconds, flops, traffic, dense_backend=which,
            speedup=seconds["torch"] / seconds["ours"])


def bench_backward(clock, add, longest):
    """Gradients alone: sparse of independent and realistic selections, dense, and torch's."""
    for keys in (32 * K, 128 * K):
        if keys > longest:
            continue
        q, k, v, _, _ = tensors(keys, keys, requires_grad=True)
        cu = (bounds(keys), bounds(keys))
        for realistic in (False, True):
            blocks = random_blocks(keys, keys, realistic)
            out, _ = msa.sparse_attention(q, k, v, blocks, *cu, BLOCK)
            seconds = clock(lambda: torch.autograd.grad(out, (q, k, v), out, retain_graph=True))
            pairs = (blocks >= 0).sum().item() / HKV * BLOCK - keys * BLOCK / 2
            add("sparse_backward", {"queries": keys, "keys": keys, "selection": "realistic" if realistic else "independent"},
                {"backward": seconds}, {"backward": 10 * pairs * HQ * D})
        if keys > 32 * K:
            continue
        saved = msa.sparse_attention(q, k, v, random_blocks(keys, keys, False), *cu, BLOCK)  # any out and lse serve
        seconds = clock(lambda: torch.ops.msa.dense_attention_backward(saved[0], None, q, k, v, *saved, *cu), repeats=5)
        add("dense_backward", {"queries": keys, "keys": keys}, {"backward": seconds},
            {"backward": 10 * visible_pairs(keys, keys) * HQ * D})


def bench_index_kl(clock, add, longest):
    """Both stages, forward and with the backward. Operations: the teacher's and the student's scores, which the forward takes
    twice (log-sums first) and a backward once more (in the warmup stage once for queries and once for keys), and two
    products of (Q - P)."""
    for keys, warmup in ((32 * K, False), (128 * K, False), (8 * K, True), (32 * K, True)):
        if keys > longest:
            continue
        q, k, _, q_idx, k_idx = tensors(keys, keys)
        cu = (bounds(keys), bounds(keys))
        blocks = None if warmup else random_blocks(keys, keys, realistic=True)
        pairs = visible_pairs(keys, keys) if warmup else (blocks >= 0).sum().item() / HKV * BLOCK - keys * BLOCK / 2
        leaves = (q_idx.requires_grad_(), k_idx.requires_grad_())

        def forward():
            return msa.index_kl(*leaves, q, k, blocks, *cu, BLOCK)

        seconds = {"forward": clock(forward, repeats=5)}
        seconds["both"] = clock(lambda: torch.autograd.grad(forward(), leaves), repeats=5)
        scores, index = 2 * pairs * (HQ + HKV) * D, 2 * pairs * HKV * D
        add("index_kl", {"queries": keys, "keys": keys, "stage": "warmup" if warmup else "sparse"}, seconds,
            {"forward": 2 * scores, "both": (4 if warmup else 3) * scores + 2 * index})


def bench_training(clock, add, longest):
    for keys in (32 * K, 128 * K):
        if keys > longest:
            continue
        q, k, v, q_idx, k_idx = tensors(keys, keys, requires_grad=True)
        cu = (bounds(keys), bounds(keys))

        def step():
            chosen = msa.select_blocks(q_idx, k_idx, *cu, BLOCK, TOPK)
            out, _ = msa.sparse_attention(q, k, v, chosen, *cu, BLOCK)
            kl = msa.index_kl(q_idx, k_idx, q.detach(), k.detach(), chosen, *cu, BLOCK)
            torch.autograd.grad((out, kl), (q, k, v, q_idx, k_idx), (out.detach(), torch.ones_like(kl)))

        sparse = clock(step, repeats=5)
        dense, which = sdpa(q, k, v, True, clock, backward=True)
        add("training", {"queries": keys, "keys": keys}, {"sparse": sparse, "dense": dense}, {}, dense_backend=which,
            speedup=dense / sparse)


PARTS = {
    "topk": bench_topk,
    "decode": bench_decode,
    "prefill": bench_prefill,
    "selection": bench_selection,
    "index_scan": bench_index_scan,
    "sparse_forward": bench_sparse_forward,
    "dense_forward": bench_dense_forward,
    "backward": bench_backward,
    "index_kl": bench_index_kl,
    "training": bench_training,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=100, help="start no part after this long")
    parser.add_argument("--longest", type=int, default=1024 * K, help="longest context, in tokens")
    parser.add_argument("--only", action="append", choices=PARTS)
    options = parser.parse_args()
    if not torch.cuda.is_available() or not msa.cuda_is_built():
        print("gpu_bench: skipped: " + ("built without CUDA" if torch.cuda.is_available() else "no GPU on this machine"))
        return 0
    torch.manual_seed(0)
    msa.check_device_data(False)
    clock, start = Clock(), time.monotonic()
    peak = peaks(clock)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    report = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "msa": msa.version(), "commit": commit,
        "geometry": {"query_heads": HQ, "kv_heads": HKV, "head_dim": D, "block_size": BLOCK, "topk": TOPK, "dtype": "bfloat16"},
        "peaks": peak, "rows": [], "left_out": [],
    }
    print(f"{report['device']}: {peak['bf16_flops'] / 1e12:.0f} TFLOP/s, copy {peak['copy_bytes'] / 1e12:.2f} TB/s", flush=True)

    def save():
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1))

    def add(part, shape, seconds, flops, traffic=None, **more):
        row = {"part": part, **shape, "seconds": seconds, **more}
        row["tflops"] = {name: value / seconds[name] / 1e12 for name, value in flops.items()}
        row["of_bf16_peak"] = {name: value / seconds[name] / peak["bf16_flops"] for name, value in flops.items()}
        row["of_copy_peak"] = {name: value / seconds[name] / peak["copy_bytes"] for name, value in (traffic or {}).items()}
        report["rows"].append(row)
        save()
        text = " ".join(f"{name} {value * 1e3:.3f} ms" for name, value in seconds.items())
        text += "".join(f", {name} {value:.0f} TFLOP/s" for name, value in row["tflops"].items())
        text += "".join(f", {name} {value:.0%} of copy" for name, value in row["of_copy_peak"].items())
        text += f", {more['speedup']:.1f}x" if "speedup" in more else ""
        print(f"{part:<15} {' '.join(str(value) for value in shape.values()):<24} {text}", flush=True)

    for name, part in PARTS.items():
        if options.only and name not in options.only:
            continue
        if time.monotonic() - start > options.seconds:
            report["left_out"].append({"part": name, "why": "out of time"})
            continue
        try:
            part(clock, add, options.longest)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            report["left_out"].append({"part": name, "why": str(error).split("\n")[0]})
            print(f"{name}: left out: {report['left_out'][-1]['why']}", flush=True)
        torch.cuda.empty_cache()
    save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
