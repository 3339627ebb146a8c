# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_check and bench/gpu_bench.py where there is no GPU: the dry runs come to their end, a hang loses nothing but its own
part, results are judged and drawn. Figures in here are made up; none is a measurement."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree

import pytest
import torch
from conftest import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "python")}


def load(name, path):
    sys.path.insert(0, str(ROOT / "python"))
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


gpu_check = load("gpu_check", ROOT / "tools/gpu_check")
gpu_bench = load("gpu_bench", ROOT / "bench/gpu_bench.py")


def run_check(*arguments):
    command = [sys.executable, ROOT / "tools/gpu_check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """One dry run of everything: where it left its files, and the finished process."""
    out = tmp_path_factory.mktemp("gpu")
    return out, run_check("--dry-run", "--out", out)


# bench/gpu_bench.py


def test_a_dry_run_goes_through_every_row(dry_run):
    out, _ = dry_run
    report, text = json.loads((out / "bench.json").read_text()), (out / "bench.log").read_text()
    assert report["left_out"] == [] and report["dry_run"] is True
    assert {row["part"] for row in report["rows"]} == set(gpu_bench.PARTS)
    # Every goal of the table: five contexts and the whole pass, decode, four of top-k, two selections, two of the index, two of
    # training. Other rows have none.
    assert len(report["goals"]) == 5 + 1 + 1 + 4 + 2 + 2 + 2
    assert all(goal["figure"] > 0 and goal["reached"] is None for goal in report["goals"])
    assert all(seconds > 0 for row in report["rows"] for seconds in row["seconds"].values())
    assert report["commit"] and "--dry-run" in report["command"] and "mean nothing" in report["machine"]["in_words"]
    assert "goals:" in text and "not measured" in text and " missed" not in text


class Still:
    """A setting without torch's timing: seconds are what the test says."""

    dry = True
    lost = False

    def is_lost(self):
        return self.lost


def make_report(tmp_path, monkeypatch, seconds=100.0):
    monkeypatch.setattr(gpu_bench, "measure_peaks", lambda setting: {"bf16_flops": 1e12, "fp8_flops": None, "copy_bytes": 1e9})
    report = gpu_bench.Report(gpu_bench.Setting(True), tmp_path / "made-up.json", seconds)
    report.setting = Still()
    return report


def on_file(report):
    return json.loads(report.path.read_text())


def test_rows_have_rates_and_goals_figures(tmp_path, monkeypatch):
    report = make_report(tmp_path, monkeypatch)
    row = {"seconds": {"a": 0.5}, "flops": {"a": 1e12}, "traffic": {"a": 1e9}, "speedup": 3.0}
    report.add("made_up", {"keys": 8}, lambda: dict(row), ("TFLOP/s", 2.5))
    report.add("made_up", {"keys": 9}, lambda: dict(row), ("speedup", 2.5))
    first, second = on_file(report)["rows"]
    assert first["tflops"] == {"a": 2.0} and first["of_bf16_peak"] == {"a": 2.0} and first["of_copy_peak"] == {"a": 2.0}
    assert [goal["figure"] for goal in on_file(report)["goals"]] == [2.0, 3.0] and second["keys"] == 9
    assert [goal["reached"] for goal in on_file(report)["goals"]] == [None, None], "a dry run judges nothing"
    Still.dry = False
    try:
        assert [report.judge(first, *goal)["reached"] for goal in (("TFLOP/s", 2.5), ("speedup", 2.5))] == [False, True]
    finally:
        Still.dry = True


def test_what_cannot_be_measured_is_left_out_with_its_goal(tmp_path, monkeypatch):
    report = make_report(tmp_path, monkeypatch)

    def too_large():
        raise torch.OutOfMemoryError("out of memory\nand more")

    report.add("made_up", {"keys": 8}, too_large, ("speedup", 2.0))
    report.deadline = time.monotonic() - 1
    report.add("made_up", {"keys": 9}, lambda: pytest.fail("it is too late for this"))
    data = on_file(report)
    assert [row["why"] for row in data["left_out"]] == ["out of memory", "out of time"]
    assert data["rows"] == [] and data["failed"] == []
    assert data["goals"] == [
        {"part": "made_up", "keys": 8, "unit": "speedup", "goal": 2.0, "figure": None, "reached": None}
    ]


def test_a_row_that_fails_is_kept_with_its_error(tmp_path, monkeypatch):
    report = make_report(tmp_path, monkeypatch)

    def wrong():
        raise RuntimeError("illegal address\nand more")

    report.add("made_up", {"keys": 8}, wrong, ("speedup", 2.0))
    report.add("made_up", {"keys": 9}, lambda: {"seconds": {"a": 0.5}})
    data = on_file(report)
    assert data["failed"] == [{"part": "made_up", "keys": 8, "error": "RuntimeError: illegal address\nand more"}]
    assert [row["keys"] for row in data["rows"]] == [9] and data["left_out"] == [] and data["goals"][0]["figure"] is None
    monkeypatch.setattr(Still, "lost", True)
    with pytest.raises(gpu_bench.DeviceLost):
        report.add("made_up", {"keys": 10}, wrong)
    assert [row["keys"] for row in on_file(report)["failed"]] == [8, 10], "what took the device along is on file"


def test_memory_that_no_dense_backend_finds_is_no_failure(monkeypatch):
    """The fastest of none: out of memory leaves the row out, another refusal fails it."""
    setting = gpu_bench.Setting(True)
    dense = gpu_bench.Dense(setting, *setting.inputs(8, 8)[:3])
    for error, expected in ((torch.OutOfMemoryError("much"), torch.OutOfMemoryError), (RuntimeError("no"), RuntimeError)):

        def refuse(backend, form, error=error):
            raise error

        monkeypatch.setattr(dense, "run", refuse)
        with pytest.raises(expected) as caught:
            dense.fastest()
        assert caught.type is expected


def test_a_failing_row_fails_the_whole_check(tmp_path, monkeypatch, capsys):
    """The benchmark as gpu_check runs it, with a part whose first row raises."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/gpu_bench.py").write_text(f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("gpu_bench", {str(ROOT / "bench/gpu_bench.py")!r})
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

def part(setting, report):
    report.add("made_up", {{"keys": 8}}, lambda: [][1], ("speedup", 2.0))
    report.add("made_up", {{"keys": 9}}, lambda: {{"seconds": {{"a": 1.0}}}})

bench.PARTS = {{"made_up": part}}
sys.exit(bench.main())
""")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    checker = gpu_check.Checker(sys.executable, ENVIRONMENT, tmp_path, True)
    summary = gpu_check.Summary(tmp_path, 300)
    gpu_check.run_parts(["bench"], checker, summary)
    assert summary.end() == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["bench"]
    assert found["ok"] is False and found["status"] == 1 and [row["keys"] for row in found["failed"]] == [8]
    assert "1 rows, 0 of 1 goals reached, 1 failed, the first: IndexError" in found["what"]
    assert "gpu_check: FAILED" in capsys.readouterr().out


def test_a_call_that_would_take_minutes_is_not_begun():
    class Slow:
        dry = False

        @staticmethod
        def clock():
            pass

    Slow.clock.once = lambda call: 0.5
    sizes = []

    def step_of(count):
        sizes.append(count)
        return lambda: None

    gpu_bench.guard(Slow, step_of, lambda count: count, 10, 100)
    with pytest.raises(gpu_bench.TooSlow, match="about 50 s"):
        gpu_bench.guard(Slow, step_of, lambda count: count, 10, 1000)
    assert sizes == [10, 10], "the large size was not touched"


# A step of decoding and a pass over scores are short on every path.
@pytest.mark.parametrize("part", sorted(set(gpu_bench.PARTS) - {"topk", "decode", "index_scan"}))
def test_every_row_asks_first_what_its_call_would_take(part, tmp_path, monkeypatch):
    report = make_report(tmp_path, monkeypatch)

    def guard(setting, step_of, cost_of, small, large):
        assert 0 < cost_of(small) <= cost_of(large)
        raise gpu_bench.TooSlow("asked")

    monkeypatch.setattr(gpu_bench, "guard", guard)
    gpu_bench.PARTS[part](gpu_bench.Setting(True), report)
    data = on_file(report)
    assert data["rows"] == data["failed"] == [] and {row["why"] for row in data["left_out"]} == {"asked"}


@pytest.mark.parametrize("realistic", [False, True])
def test_selections_are_what_the_operators_take(realistic):
    setting = gpu_bench.Setting(True)
    blocks = gpu_bench.random_blocks(setting, 40, 200, realistic)
    assert blocks.shape == (setting.kv_heads, 40, setting.topk) and blocks.dtype == torch.int32
    for row in range(40):
        last = (160 + row) // setting.block
        for ids in blocks[:, row].tolist():
            ids = [i for i in ids if i >= 0]
            assert ids == sorted(set(ids)) and ids[-1] == last and ids[0] >= 0
            assert not realistic or {0, last - 1} <= set(ids)


# msa bench --from


def test_results_of_a_gpu_are_drawn(msa, tmp_path, dry_run):
    made_up = tmp_path / "made-up-not-measured.json"
    rows = [{"part": "prefill", "queries": 32768, "keys": keys,
             "seconds": {"select": keys / 1e9, "attend": 1e-3, "dense": keys / 1e6}} for keys in (65536, 131072, 1048576)]
    rows.append({"part": "topk", "rows": 1, "blocks": 2, "topk": 1, "seconds": {"topk": 1.0, "torch": 1.0}})
    geometry = {"query_heads": 64, "kv_heads": 4, "head_dim": 128, "block_size": 128, "topk": 16, "dtype": "bfloat16"}
    made_up.write_text(json.dumps({"machine": {"in_words": "no machine <made up>"}, "geometry": geometry, "rows": rows}))
    for source, words in ((made_up, ["64K", "1M", "no machine <made up>", "64 query / 4 kv heads", "last 32768 tokens"]),
                          (dry_run[0] / "bench.json", ["4K", "mean nothing"])):
        result = msa("bench", "--from", source, "--plot", tmp_path / "plot.svg")
        assert result.returncode == 0, result.stderr
        text = " ".join(xml.etree.ElementTree.parse(tmp_path / "plot.svg").getroot().itertext())
        assert all(word in text for word in [*words, "torch SDPA, bfloat16", "MSA (select + sparse)"]), text


def test_results_of_msa_bench_are_drawn_as_it_draws_them(msa, tmp_path):
    shape = ["--queries", 16, "--query-heads", 2, "--kv-heads", 1, "--head-dim", 32, "--index-dim", 32, "--block-size", 16,
             "--topk", 2]
    run = msa("bench", "layer", *shape, "--repeats", 1, "--context", "64,128", "--json", "--plot", tmp_path / "then.svg")
    (tmp_path / "bench.json").write_text(run.stdout)
    result = msa("bench", "--from", tmp_path / "bench.json", "--plot", tmp_path / "now.svg")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "now.svg").read_text() == (tmp_path / "then.svg").read_text()


def test_what_is_no_result_is_refused(msa, tmp_path):
    plot = tmp_path / "plot.svg"
    (tmp_path / "bad.json").write_text('{"geometry": 1}')
    for source, words in ((tmp_path / "none.json", "cannot read"), (tmp_path / "bad.json", "no result")):
        result = msa("bench", "--from", source, "--plot", plot)
        assert result.returncode == 1 and words in result.stderr and not plot.exists()
    assert msa("bench", "--from", tmp_path / "bad.json").returncode == 2


# tools/gpu_check


def test_a_dry_run_does_every_part(dry_run):
    out, result = dry_run
    assert result.returncode == 0, result.stdout + result.stderr
    parts = json.loads((out / "gpu_check.json").read_text())["parts"]
    assert list(parts) == ["ptx", "check", "tests", "bench", "sanitize"] and all(part["ok"] for part in parts.values())
    assert int(parts["tests"]["what"].split()[0]) > int(parts["sanitize"]["what"].split()[1]) > 20
    assert len(parts["bench"]["goals"]) == 17
    assert result.stdout.rstrip().endswith("gpu_check: passed") and "dry run, no device" in result.stdout


def test_bad_usage_and_no_time(tmp_path):
    assert run_check("fly").returncode == 2
    result = run_check("--dry-run", "--budget", 1, "--out", tmp_path, "ptx", "tests")
    assert result.returncode == 1 and result.stdout.count("left out: no time left") == 4, "told at once, and in the summary"


def test_a_hang_ends_with_all_it_started(tmp_path):
    """The limit of a part holds for its children, too."""
    pid = tmp_path / "pid"
    hang = "import subprocess; child = subprocess.Popen(['sleep', '60']); "
    hang += f"open({str(pid)!r}, 'w').write(str(child.pid)); child.wait()"
    status, seconds = gpu_check.run("hang", [sys.executable, "-c", hang], tmp_path, 3)
    assert status is None and seconds < 30
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", pid.read_text()], capture_output=True, text=True, check=False).stdout
        if not state.strip() or state.startswith("Z"):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child lives on")


def test_one_part_does_not_take_the_others_along(tmp_path, monkeypatch, capsys):
    class Parts:
        out = tmp_path

        def ptx(self, limit):
            raise ValueError("a mistake")

        def check(self, limit):
            return True, {"limit": limit}, "5 passed"

    summary = gpu_check.Summary(tmp_path, 100)
    monkeypatch.setitem(gpu_check.LIMITS, "check", 40)
    gpu_check.run_parts(["ptx", "check"], Parts(), summary)
    assert summary.end() == 1
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert not parts["ptx"]["ok"] and "a mistake" in parts["ptx"]["what"]
    assert parts["check"] == {"ok": True, "what": "5 passed", "limit": 40}
    assert "gpu_check: FAILED" in capsys.readouterr().out


def test_stopped_tests_are_counted_from_their_log(tmp_path):
    log = tmp_path / "tests.log"
    log.write_text("a.py::one PASSED [ 10%]\na.py::two[x] FAILED [ 20%]\na.py::three SKIPPED (no) [ 30%]\na.py::four PASSED\na.py::five")
    assert gpu_check.count_tests(tmp_path / "none.xml", log) == (2, 1, 1)
    junit = tmp_path / "tests.xml"
    junit.write_text("<testsuite><testcase/><testcase><failure/></testcase><testcase><skipped/></testcase></testsuite>")
    assert gpu_check.count_tests(junit, log) == (1, 1, 1)


def test_programs_report_their_last_line(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setattr(gpu_check, "BUILD", tmp_path)
    checker = gpu_check.Checker(sys.executable, dict(os.environ), tmp_path, False)
    assert checker.ptx(5)[0::2] == (False, "was not built")
    for body, expected in (("echo 'x ... ok'; echo '3 passed, 0 failed'", (True, "3 passed, 0 failed")),
                           ("echo '2 passed, 1 failed'; exit 1", (False, "2 passed, 1 failed")),
                           ("echo 'boxes ... '; sleep 60", (False, "ran out of time"))):
        (programs / "ptx_test").write_text("#!/bin/sh\n" + body + "\n")
        (programs / "ptx_test").chmod(0o755)
        ok, found, words = checker.ptx(2)
        assert (ok, words) == expected and found["seconds"] < 30
    assert found["end"].startswith("boxes"), "where it hung"
