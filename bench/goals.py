#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The speed goals of the CPU backend, measured: drives `msa bench --json` and prints a table of every goal, its figure,
whether it is reached, and the bound that this machine puts on it. Every ratio is of two times of one process. Tested in
tests/integration/test_goals.py (that it runs, and how it judges; never how fast).

    bench/goals.py --out bench/results/NAME        # both geometries, some ten minutes: NAME.json and NAME.md
    bench/goals.py --only training --geometry m3
    bench/goals.py --quick                         # tiny contexts: whether it works, no figure means anything
"""

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
GEOMETRIES = {"m3": 1.0, "smollm2": 0.6}  # share of a goal that is asked of a geometry
PREFILL = (32768, 65536, 131072)
SELECT = 65536
DECODE = 131072
TRAINING = (16384, 32768)
RUNS = {
    "prefill": ["layer", "dense_attention", "select_blocks", "sparse_attention", "--context", PREFILL],
    "decode": ["decode", "--context", (DECODE,)],
    "threads": ["threads", "--context", (SELECT,)],
    "training": ["backward", "--context", TRAINING, "--torch-whole", max(TRAINING), "--train-whole", max(TRAINING)],
    "topk": ["topk_blocks"],
}
QUICK = 32  # what contexts are divided by in --quick
LAYER, DENSE, SELECTION = "msa layer (select + sparse)", "dense_attention", "select_blocks"
SPARSE, STEP = "sparse_attention (random blocks)", "msa layer with KL, fwd + bwd"


class Rows:
    """Rows of one run of `msa bench --json`, by name and context."""

    def __init__(self, report, contexts=1):
        self.report = report
        self.scale = contexts

    def find(self, section, name, context=None, threads=None):
        for row in self.report["rows"] if self.report else ():
            if row["section"] == section and row["name"].startswith(name):
                if context in (None, row["context"] * self.scale) and threads in (None, row["threads"]):
                    return row
        return None


def has_fast_narrow_products(machine):
    """bf16 and int8 dot products that are worth more than float32's."""
    peak = machine["peak_gops"]
    best = {kind: max(peak[f"{kind} dot"] or 0, peak[f"{kind} AMX"] or 0) for kind in ("bf16", "int8")}
    return all(rate > 1.5 * peak["float32"] for rate in best.values())


def goal(work, figure, target, unit, bound=None, note="", at_most=False):
    """One line of the table; None is what rows that are missing would have said."""
    reached = None if figure is None or target is None else (figure <= target if at_most else figure >= target)
    return {
        "work": work,
        "figure": figure,
        "goal": target,
        "sense": "at most" if at_most else "at least",
        "unit": unit,
        "bound": bound,
        "reached": reached,
        "note": note,
    }


def at_peak(row, figure):
    """What a ratio would be if the row took the least time that the measured peaks allow."""
    return None if row is None or figure is None or not row.get("peak_fraction") else figure / row["peak_fraction"]


def speedup(row, peer):
    return None if row is None else row["speedups"].get(peer)


def words(context):
    return f"{context // 1024}K"


def judge_prefill(rows, share):
    fast = rows.report is not None and has_fast_narrow_products(rows.report["machine"])
    for context, target in zip(PREFILL, (18, 30, 50) if fast else (8, 14, 22)):
        layer = rows.find("prefill", LAYER, context)
        figure = speedup(layer, "torch sdpa bfloat16")
        yield goal(f"MSA prefill against torch SDPA bf16, {words(context)}", figure, target * share, "x", at_peak(layer, figure))
    for context in PREFILL:
        layer = rows.find("prefill", LAYER, context)
        figure = speedup(layer, "dense_attention")
        target = layer["flop_ratio"] * share if layer else None
        name = f"MSA prefill against own dense attention, {words(context)}"
        yield goal(name, figure, target, "x", at_peak(layer, figure), "of the ratio of operations")
    for context in PREFILL:
        dense = rows.find("prefill", DENSE, context)
        peers = [rows.find("prefill", f"torch sdpa {dtype}", context) for dtype in ("bfloat16", "float32")]
        times = [peer["seconds"] for peer in peers if peer]
        figure = min(times) / dense["seconds"] if dense and times else None
        target = (1.5 if fast else 1.0) * share
        yield goal(f"own dense attention against torch SDPA, {words(context)}", figure, target, "x", at_peak(dense, figure))
    for context in PREFILL:
        sparse = rows.find("prefill", SPARSE, context)
        yield peak_goal(f"sparse_attention, random selections, {words(context)}", sparse, 0.6 * share)
    select = rows.find("prefill", SELECTION, SELECT)
    yield peak_goal(f"select_blocks, {words(SELECT)}, full score work", select, 0.5 * share)
    figure = speedup(select, "unscreened")
    name = f"select_blocks against unscreened float32, {words(SELECT)}"
    yield goal(name, figure, 2.5 * share, "x", at_peak(select, figure))
    yield judge_scaling(rows, share)


def peak_goal(name, row, target):
    figure = row.get("peak_fraction") if row else None
    return goal(name, figure, target, "of peak", 1.0, row.get("peak", "") if row else "")


def judge_scaling(rows, share):
    """A query at fixed k may take longer in a longer context by what the selection takes longer, and a tenth for noise."""
    ends = [[rows.find("prefill", name, context) for context in (PREFILL[0], PREFILL[-1])] for name in (LAYER, SELECTION)]
    figure = None
    if all(row for pair in ends for row in pair):
        grown = [long["seconds"] - short["seconds"] for short, long in ends]
        figure = grown[0] / grown[1] if grown[1] > 0 else None
    name = f"growth of the layer over that of its selection, {words(PREFILL[0])} to {words(PREFILL[-1])}"
    return goal(name, figure, 1.1 / share, "x", 1.0, at_most=True)


def judge_decode(rows, share):
    row = None
    for name in ("msa layer, int8 index keys", "msa layer, float8 index keys", LAYER):
        row = row or rows.find("decode", name, DECODE)
    yield peak_goal(f"decode, batch 1, one layer, {words(DECODE)}", row, 0.6 * share)
    # 1.5 ms on a machine that reads 60 GB/s
    target = 1.5 * 60 / rows.report["machine"]["read_gbytes"] / share if rows.report else None
    figure = row["seconds"] * 1e3 if row else None
    bound = figure * row["peak_fraction"] if row and "peak_fraction" in row else None
    note = row["name"] if row else ""
    yield goal(f"the same, time (1.5 ms at 60 GB/s), {words(DECODE)}", figure, target, "ms", bound, note, at_most=True)


def judge_threads(rows, share):
    threads = rows.report["machine"]["threads"] if rows.report else 2
    row = rows.find("threads", LAYER, SELECT, threads)
    figure = speedup(row, "one thread")
    yield goal(f"layer on {threads} threads against one, {words(SELECT)}", figure, 1.85 / 2 * threads * share, "x", threads)


def judge_training(rows, share):
    for context, target in zip(TRAINING, (4, 6)):
        step = rows.find("training", STEP, context)
        figure = min(step["speedups"].values()) if step else None
        peer = rows.find("training", "torch sdpa", context)
        note = "" if peer is None or peer["measured"] else f"torch scaled from {words(peer['scaled_from_context'])}"
        name = f"forward + backward with KL against torch SDPA, {words(context)}"
        yield goal(name, figure, target * share, "x", at_peak(step, figure), note)


def judge_topk(rows, share):
    for shape, target in (("(4096, 1024) k16", 8), ("(4096, 8192) k32", 5)):
        row = rows.find("top-k", f"topk_blocks {shape}")
        figure = speedup(row, "torch.topk")
        yield goal(f"top-k alone against torch.topk, {shape}", figure, target * share, "x", at_peak(row, figure))


JUDGES = {
    "prefill": judge_prefill,
    "decode": judge_decode,
    "threads": judge_threads,
    "training": judge_training,
    "topk": judge_topk,
}


def judge(run, report, share=1.0, contexts=1):
    """Lines of the table from one run; `contexts`: what the run's contexts are to be multiplied by."""
    return list(JUDGES[run](Rows(report, contexts), share))


def arguments_of(run, geometry, quick, torch_dtypes):
    divide = QUICK if quick else 1
    arguments = []
    for value in RUNS[run]:
        if isinstance(value, tuple):
            value = ",".join(str(context // divide) for context in value)
        arguments.append(str(value // divide if isinstance(value, int) else value))
    arguments += ["--geometry", geometry, "--json"]
    if run == "training":
        arguments += ["--torch-dtypes", torch_dtypes]
    if quick:
        arguments += ["--queries", "64", "--repeats", "1", "--budget", "0.1"]
    return arguments


def faster_torch(report):
    """What torch's attention is faster in here: the other one is not worth minutes of training."""
    rows = Rows(report)
    times = {dtype: rows.find("prefill", f"torch sdpa {dtype}") for dtype in ("bfloat16", "float32")}
    if not all(times.values()):
        return "bfloat16,float32"
    return min(times, key=lambda dtype: times[dtype]["seconds"])


def call_bench(program, arguments):
    """The report, or None and what went wrong; progress goes to stderr as it comes."""
    print(f"$ msa bench {' '.join(arguments)}", file=sys.stderr, flush=True)
    try:
        result = subprocess.run([program, "bench", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        return None, str(error)
    if result.returncode != 0:
        return None, f"msa bench ended with status {result.returncode}"
    return json.loads(result.stdout), ""


def describe_machine(machine):
    model = "unknown processor"
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{machine['threads']} threads of {model}, instruction set {machine['instruction_set']}"


def describe_commit():
    def git(*arguments):
        result = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + (" and changes" if git("status", "--porcelain", "-uno") else "")


def format_number(value, unit):
    if value is None:
        return "-"
    if unit == "of peak":
        return f"{value * 100:.0f} %"
    return f"{value:.{2 if value < 10 else 1}f} {unit}" if unit == "ms" else f"{value:.{2 if value < 10 else 1}f}x"


def format_table(result):
    lines = [f"Goals on {result['machine']}"]
    peaks = result["peaks"]
    if peaks:
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in peaks["peak_gops"].items() if rate)
        lines.append(f"(measured peaks, Gop/s: {rates}; read {peaks['read_gbytes']:.1f} GB/s; torch {result['torch']}).")
    lines.append(f"Commit {result['commit']}, {result['date']}, `{result['command']}`.")
    if result["quick"]:
        lines.append(f"Quick: contexts divided by {QUICK}, one run each. No figure means anything.")
    lines.append("")
    lines.append("Bound: the figure if our side took the least time that its operations and bytes need at the measured peaks.")
    for geometry, goals in result["goals"].items():
        share = GEOMETRIES[geometry]
        lines += ["", f"## {geometry}" + ("" if share == 1 else f", goals at {share:.0%}"), ""]
        lines += ["| work | figure | goal | reached | bound | |", "| --- | --- | --- | --- | --- | --- |"]
        for line in goals:
            sense = "<= " if line["sense"] == "at most" else ">= "
            reached = {True: "yes", False: "**no**", None: "not measured"}[line["reached"]]
            cells = [line["work"], format_number(line["figure"], line["unit"]), sense + format_number(line["goal"], line["unit"])]
            cells += [reached, format_number(line["bound"], line["unit"]), line["note"]]
            lines.append("| " + " | ".join(cells) + " |")
    for failure in result["failures"]:
        lines += ["", f"Failed: {failure}"]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description="measure the speed goals of the CPU backend")
    parser.add_argument("--msa", default=os.environ.get("MSA_PROGRAM", str(ROOT / "build/bin/msa")), help="the program")
    parser.add_argument("--only", default=",".join(RUNS), help=f"runs to make, of {', '.join(RUNS)}")
    parser.add_argument("--geometry", default=",".join(GEOMETRIES), help=f"of {', '.join(GEOMETRIES)}")
    parser.add_argument("--quick", action="store_true", help="tiny contexts, to see whether everything runs")
    parser.add_argument("--machine", help="the machine in words, in place of what the system calls it")
    parser.add_argument("--out", help="write OUT.json and OUT.md, too (after every run)")
    options = parser.parse_args()
    runs, geometries = options.only.split(","), options.geometry.split(",")
    for given, known in ((runs, RUNS), (geometries, GEOMETRIES)):
        for name in given:
            if name not in known:
                parser.error(f"'{name}' is none of {', '.join(known)}")
    if options.out:
        pathlib.Path(options.out).parent.mkdir(parents=True, exist_ok=True)

    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": describe_commit(),
        "command": " ".join(["bench/goals.py", *sys.argv[1:]]),
        "quick": options.quick,
        "machine": options.machine or "",
        "peaks": None,
        "torch": "",
        "goals": {},
        "failures": [],
        "runs": [],
    }

    def write():
        if not options.out:
            return
        pathlib.Path(options.out + ".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        pathlib.Path(options.out + ".md").write_text(format_table(result), encoding="utf-8")

    torch_dtypes = "bfloat16,float32"
    try:
        for geometry in geometries:
            goals = result["goals"].setdefault(geometry, [])
            for run in runs:
                if run == "topk" and geometry != geometries[0]:
                    continue  # its shapes are its own
                arguments = arguments_of(run, geometry, options.quick, torch_dtypes)
                report, failure = call_bench(options.msa, arguments)
                if failure:
                    result["failures"].append(f"{geometry} {run}: {failure}")
                else:
                    result["peaks"] = result["peaks"] or report["machine"]
                    result["machine"] = result["machine"] or describe_machine(report["machine"])
                    result["torch"] = report["torch"]
                    if run == "prefill":
                        torch_dtypes = faster_torch(report)
                result["runs"].append({"geometry": geometry, "run": run, "arguments": arguments, "report": report})
                # Top-k has no geometry: what is asked of it is the whole goal.
                share = 1.0 if run == "topk" else GEOMETRIES[geometry]
                goals += judge(run, report, share, QUICK if options.quick and run != "topk" else 1)
                write()
    except KeyboardInterrupt:
        result["failures"].append("interrupted: runs are missing")
        write()
    print(format_table(result), end="")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
