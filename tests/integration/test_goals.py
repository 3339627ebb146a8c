# SPDX-License-Identifier: Apache-2.0
"""bench/goals.py: that it runs, and that it judges figures as the goals say; never how fast anything is."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import MSA, ROOT

PROGRAM = ROOT / "bench/goals.py"
spec = importlib.util.spec_from_file_location("goals", PROGRAM)
goals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(goals)

NARROW = {"float32": 100.0, "bf16 dot": 200.0, "int8 dot": 400.0, "bf16 AMX": None, "int8 AMX": None}


def report(*rows, peaks=None, **machine):
    machine = {"threads": 2, "instruction_set": "avx512_bf16", "read_gbytes": 30.0, "peak_gops": peaks or NARROW, **machine}
    return {"machine": machine, "torch": "2", "rows": list(rows)}


def row(section, name, context, seconds=1.0, **fields):
    return {"section": section, "name": name, "context": context, "threads": 2, "seconds": seconds, "speedups": {}, **fields}


def lines_about(work, run, measured, share=1.0):
    return [line for line in goals.judge(run, measured, share) if work in line["work"]]


@pytest.mark.parametrize("peaks,target", [(NARROW, 18), ({**NARROW, "bf16 dot": 120.0}, 8), ({**NARROW, "int8 dot": None}, 8)])
def test_prefill_goals_follow_the_machine(peaks, target):
    layer = row("prefill", goals.LAYER, 32768, peak_fraction=0.5, flop_ratio=6.4, speedups={"torch sdpa bfloat16": 18.0})
    line, *others = lines_about("torch SDPA bf16", "prefill", report(layer, peaks=peaks))
    assert line["goal"] == target and line["figure"] == 18 and line["reached"] is True and line["bound"] == 36
    assert [other["reached"] for other in others] == [None, None] and others[0]["figure"] is None


def test_smaller_geometry_is_asked_for_a_share():
    layer = row("prefill", goals.LAYER, 65536, flop_ratio=5.0, speedups={"dense_attention": 3.0})
    assert [line["reached"] for line in lines_about("own dense attention, 64K", "prefill", report(layer))] == [False]
    (line,) = lines_about("own dense attention, 64K", "prefill", report(layer), share=0.6)
    assert line["reached"] is True and line["goal"] == 3 and line["bound"] is None


@pytest.mark.parametrize("dtypes,figure", [(("bfloat16",), 4.0), (("bfloat16", "float32"), 2.0)])
def test_dense_attention_is_held_against_the_faster_torch(dtypes, figure):
    times = {"bfloat16": 8.0, "float32": 4.0}
    rows = [row("prefill", f"torch sdpa {dtype}", 32768, times[dtype]) for dtype in dtypes]
    (line,) = lines_about("against torch SDPA, 32K", "prefill", report(row("prefill", "dense_attention", 32768, 2.0), *rows))
    assert line["figure"] == figure and line["reached"] is True


def test_growth_is_judged_from_above():
    def measured(layer_end):
        times = {(goals.LAYER, 32768): 1.0, (goals.LAYER, 131072): layer_end}
        times |= {(goals.SELECTION, 32768): 0.5, (goals.SELECTION, 131072): 1.5}
        return report(*(row("prefill", name, context, seconds, flop_ratio=6.0) for (name, context), seconds in times.items()))

    for layer_end, figure, reached in ((2.0, 1.0, True), (2.2, 1.2, False)):
        (line,) = lines_about("growth", "prefill", measured(layer_end))
        assert line["figure"] == pytest.approx(figure) and line["reached"] is reached


def test_training_says_what_was_scaled_and_takes_the_best_peer():
    step = row("training", goals.STEP, 32768, speedups={"torch sdpa bfloat16, fwd + bwd": 7.0, "torch sdpa float32, fwd + bwd": 9.0})
    torch = row("training", "torch sdpa bfloat16, fwd + bwd", 32768, measured=False, scaled_from_context=8192)
    line = lines_about("32K", "training", report(step, torch))[0]
    assert line["figure"] == 7 and line["reached"] is True and line["note"] == "torch scaled from 8K"


def test_decode_time_is_scaled_by_the_machine_and_judged_from_above():
    fields = {"peak_fraction": 0.7, "peak": "read"}
    rows = (row("decode", goals.LAYER, 131072, 5e-3, **fields), row("decode", "msa layer, float8 index keys", 131072, 2e-3, **fields))
    share, time = goals.judge("decode", report(*rows))
    assert share["figure"] == 0.7 and share["reached"] is True
    assert time["figure"] == pytest.approx(2.0) and time["goal"] == pytest.approx(3.0) and time["reached"] is True
    assert time["bound"] == pytest.approx(1.4)


@pytest.mark.parametrize("run", goals.RUNS)
def test_a_run_without_a_report_is_not_measured(run):
    lines = goals.judge(run, None)
    assert lines and all(line["reached"] is None and line["figure"] is None for line in lines)


def run_program(*arguments):
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def test_it_measures_every_goal_and_writes_table_and_json(tmp_path):
    out = tmp_path / "results" / "quick"
    result = run_program("--quick", "--msa", MSA, "--geometry", "smollm2", "--out", out)
    assert result.returncode == 0, result.stderr
    written = json.loads((out.parent / "quick.json").read_text())
    assert written["quick"] is True and written["failures"] == [] and "--quick" in written["command"]
    assert [run["run"] for run in written["runs"]] == list(goals.RUNS) and all(run["report"] for run in written["runs"])
    lines = written["goals"]["smollm2"]
    unmeasured = [line["work"] for line in lines if line["figure"] is None]
    # A selection of microseconds need not take longer in the longer context.
    assert len(lines) == 22 and all("growth" in work for work in unmeasured)
    table = (out.parent / "quick.md").read_text()
    assert table == result.stdout and "## smollm2, goals at 60%" in table and "No figure means anything" in table
    assert all(line["work"] in table for line in lines) and "$ msa bench topk_blocks" in result.stderr


def test_a_failing_run_is_named_and_the_others_go_on(tmp_path):
    program = tmp_path / "msa"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    result = run_program("--only", "topk,threads", "--geometry", "m3", "--msa", program)
    assert result.returncode == 1
    assert "Failed: m3 topk: msa bench ended with status 3" in result.stdout and "m3 threads" in result.stdout
    assert "not measured" in result.stdout


@pytest.mark.parametrize("arguments,named", [(["--only", "sleep"], "'sleep'"), (["--geometry", "m4"], "'m4'")])
def test_unknown_names_are_refused(arguments, named):
    result = run_program(*arguments)
    assert result.returncode == 2 and named in result.stderr
