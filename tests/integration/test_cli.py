# SPDX-License-Identifier: Apache-2.0
"""The program from outside: exit codes, messages, and the subcommands that need no model."""

import json
import os
import re
import signal
import subprocess
import xml.etree.ElementTree

import pytest

SUBCOMMANDS = ["convert", "train", "generate", "eval", "logits", "bench", "check", "info"]


def test_help_names_every_subcommand(msa):
    result = msa("--help")
    assert result.returncode == 0
    for name in SUBCOMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help(msa, name):
    result = msa(name, "--help")
    assert result.returncode == 0
    assert "--help" in result.stdout and result.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["info", "--fly"], ["bench", "unknown-op"], ["check", "--backend", "gpu"], ["logits"], ["generate"],
     ["convert"], ["train"], ["eval"], ["check", "--threads", "-1"], ["bench", "--dtype", "int8"]],
)
def test_bad_usage_exits_with_2(msa, arguments):
    result = msa(*arguments)
    assert result.returncode == 2
    assert result.stderr.strip() and result.stdout == ""


def test_failures_exit_with_1_and_name_the_cause(msa, tmp_path):
    tokens, model = tmp_path / "tokens", tmp_path / "empty-model"
    tokens.write_text("1 2 3")
    model.mkdir()
    result = msa("logits", "--model", model, "--tokens", tokens, "--out", tmp_path / "o.safetensors")
    assert result.returncode == 1
    assert "empty-model" in result.stderr and "config.json" in result.stderr
    result = msa("info", "--block-size", "24")
    assert result.returncode == 1
    assert "block-size" in result.stderr and "24" in result.stderr


def test_info_says_which_path_a_shape_takes(msa):
    info = json.loads(msa("info", "--json", "--query-heads", 9, "--kv-heads", 3, "--head-dim", 64).stdout)
    assert info["backends"]["cpu"]["active_instruction_set"] in info["backends"]["cpu"]["instruction_sets"]
    assert info["backends"]["cuda"]["available"] is False
    assert info["paths"]["select_blocks"].startswith("cpu/")
    text = msa("info").stdout
    assert "instruction set" in text and "sparse_attention" in text


def cuda_table(root):
    """docs/cuda.md: what the fast kernels of each operator ask for."""
    page, cells = (root / "docs/cuda.md").read_text(), {}
    for names, kernels in re.findall(r"^\| (`.*?) \| (.*?) \| (?:plain|-) \|$", page, re.MULTILINE):
        # A backward asks for what its forward does, and more.
        forward = cells[re.findall(r"`(\w+)_backward`", names)[0]] if kernels.startswith("as the forward") else ""
        cells |= dict.fromkeys(re.findall(r"`(\w+)`", names), forward + kernels)
    return cells


@pytest.mark.parametrize(
    ("arguments", "condition"),
    [([], None), (["--head-dim", 64, "--index-dim", 64], None), (["--query-heads", 256], None),
     (["--head-dim", 96, "--index-dim", 128], "head_dim"), (["--value-dim", 64], "value_dim"), (["--index-dim", 96], "index_dim"),
     (["--block-size", 32], "block_size"), (["--query-heads", 260], "groups to 64")],
)
def test_info_says_of_a_gpu_what_its_page_says(msa, root, arguments, condition):
    paths, table = json.loads(msa("info", "--json", *arguments).stdout)["backends"]["cuda"]["paths"], cuda_table(root)
    assert set(paths) == set(table) and len(table) == 10
    for op, kernels in table.items():
        is_plain = kernels == "none yet" or (condition is not None and condition in kernels)
        assert paths[op].startswith("cuda/plain (" if is_plain else "cuda/fast ("), (op, paths[op], kernels)
        if not is_plain and not op.endswith("_backward"):
            assert ("float8" in paths[op]) == ("float8" in kernels), (op, paths[op], kernels)


def test_instruction_set_override(msa):
    sets = json.loads(msa("info", "--json").stdout)["backends"]["cpu"]["instruction_sets"]
    for name in sets:
        info = json.loads(msa("info", "--json", env={"MSA_ISA": name}).stdout)
        assert info["backends"]["cpu"]["active_instruction_set"] == name
    result = msa("info", env={"MSA_ISA": "mmx"})
    assert result.returncode == 1
    assert "mmx" in result.stderr and sets[0] in result.stderr


def test_check_passes_on_every_instruction_set(msa):
    result = msa("check", "--all-instruction-sets", "--json")
    report = json.loads(result.stdout)
    failed = [check for check in report["checks"] if not check["passed"]]
    assert result.returncode == 0 and failed == []
    ops = {check["op"] for check in report["checks"]}
    assert {"select_blocks", "topk_blocks", "sparse_attention.out", "sparse_attention.dk", "index_kl(prefix).dq_idx"} <= ops
    assert {"select_blocks_oracle", "bits: run again", "bits: each sequence alone", "bits: prefill in chunks"} <= ops
    assert report["passed"] == len(report["checks"]) > 100


def test_check_prints_a_table(msa):
    result = msa("check", "--threads", 1)
    assert result.returncode == 0
    assert "sparse_attention.out" in result.stdout and " 0 failed" in result.stdout


def test_check_says_when_a_gpu_cannot_be_checked(msa):
    cuda = json.loads(msa("info", "--json").stdout)["backends"]["cuda"]
    if cuda["available"]:
        pytest.skip("this machine's GPU runs the backend: tests/cuda checks it")
    result = msa("check", "--backend", "cuda")
    assert result.returncode == 1 and result.stdout == ""
    assert cuda["why"] in result.stderr and "nothing was checked" in result.stderr


BENCH_SHAPE = ["--queries", 64, "--query-heads", 4, "--kv-heads", 2, "--head-dim", 64, "--index-dim", 64, "--block-size", 64,
               "--topk", 4, "--repeats", 1]


def test_bench_times_everything_against_its_peers(msa, tmp_path):
    plot = tmp_path / "plot.svg"
    result = msa("bench", *BENCH_SHAPE, "--context", "512,1024", "--json", "--plot", plot)
    report = json.loads(result.stdout)
    machine = report["machine"]
    assert machine["read_gbytes"] > 0 and machine["peak_gops"]["float32"] > 0
    assert set(machine["peak_gops"]) == {"float32", "bf16 dot", "int8 dot", "bf16 AMX", "int8 AMX"}
    assert report["interrupted"] is False and "timing" in result.stderr
    rows = {(row["section"], row["name"], row["context"], row["threads"]): row for row in report["rows"]}
    for row in report["rows"]:
        assert row["seconds"] > 0 and row["runs"] >= 1 and all(factor > 0 for factor in row["speedups"].values())
        if "peak" in row:  # read, or the arithmetics that the machine has
            assert row["peak_fraction"] > 0
            for name in row["peak"].split(" + "):
                assert name == "read" or machine["peak_gops"][name] > 0, row
    for context in (512, 1024):
        layer = rows["prefill", "msa layer (select + sparse)", context, machine["threads"]]
        assert layer["speedups"].keys() == {"torch sdpa bfloat16", "torch sdpa float32", "dense_attention"}
        torch = rows["prefill", "torch sdpa bfloat16", context, machine["threads"]]
        assert layer["speedups"]["torch sdpa bfloat16"] == pytest.approx(torch["seconds"] / layer["seconds"], rel=1e-6)
        # 2 Hq D N / (Hkv Di N + 4 Hq D k Bk), 4 heads of 64 and 2 index heads of 64, 4 blocks of 64
        assert layer["flop_ratio"] == pytest.approx(2 * 256 * context / (128 * context + 4 * 256 * 256))
        training = rows["training", "msa layer with KL, fwd + bwd", context, machine["threads"]]
        assert len(training["speedups"]) == 2 and training["queries"] == context
        assert ("decode", "msa layer (select + sparse)", context, machine["threads"]) in rows
        if machine["threads"] > 1:
            assert ("threads", "msa layer (select + sparse)", context, 1) in rows
    assert any(name.startswith("topk_blocks") and "torch.topk" in row["speedups"] for (_, name, *_), row in rows.items())
    svg = xml.etree.ElementTree.parse(plot).getroot()
    text = " ".join(svg.itertext())
    assert svg.tag.endswith("svg") and "context, tokens" in text and "MSA (select + sparse)" in text and "1K" in text


def test_bench_trains_on_the_whole_and_says_what_it_scaled(msa):
    """torch is measured up to --torch-whole tokens, and scaled by the pairs of a causal pass beyond; ours is measured."""
    arguments = ["bench", "backward", *BENCH_SHAPE, "--torch-whole", 512, "--torch-dtypes", "float32"]
    rows = json.loads(msa(*arguments, "--context", 1024, "--json").stdout)["rows"]
    torch = {row["context"]: row for row in rows if row["name"].startswith("torch sdpa")}
    assert torch.keys() == {512, 1024} and torch[512]["measured"] and not torch[1024]["measured"]
    assert torch[1024]["scaled_from_context"] == 512 and "scaled_from_context" not in torch[512]
    assert torch[1024]["seconds"] == pytest.approx(torch[512]["seconds"] * 1024 * 1025 / (512 * 513))
    layer = next(row for row in rows if row["name"] == "msa layer with KL, fwd + bwd")
    assert layer["measured"] and layer["queries"] == 1024
    assert layer["speedups"] == {torch[1024]["name"]: pytest.approx(torch[1024]["seconds"] / layer["seconds"])}
    parts = [row for row in rows if "of which" in row["name"]]
    assert len(parts) == 5 and sum(row["seconds"] for row in parts) <= layer["seconds"]
    table = msa(*arguments, "--context", 1024).stdout
    assert "float32, fwd + bwd, from 512" in table
    last = json.loads(msa(*arguments, "--context", 1024, "--train-whole", 512, "--json").stdout)["rows"]
    assert all(row["measured"] and row["queries"] == 64 for row in last)


def test_bench_times_several_ops(msa):
    rows = json.loads(msa("bench", "select_blocks", "decode", *BENCH_SHAPE, "--context", 512, "--json").stdout)["rows"]
    assert {row["section"] for row in rows} == {"prefill", "decode"}
    assert not any("sdpa" in row["name"] for row in rows if row["section"] == "prefill")


def test_bench_prints_a_table(msa):
    text = msa("bench", "layer", *BENCH_SHAPE, "--context", 1024).stdout
    assert "of peak" in text and "vs torch bf16" in text and "msa layer" in text and "read" in text


def test_bench_geometry_is_a_preset_that_options_override(msa):
    arguments = ["bench", "select_blocks", "--geometry", "smollm2", "--context", 512, "--queries", 16, "--repeats", 1, "--json"]
    shape = json.loads(msa(*arguments, "--topk", 5).stdout)["shape"]
    assert [shape[key] for key in ("query_heads", "kv_heads", "head_dim", "block_size", "topk")] == [9, 3, 64, 64, 5]


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["--context", 100], "context 100"),
        (["--query-heads", 5], "query heads 5"),
        (["--head-dim", 40], "head and index dimensions"),
        (["--block-size", 24], "block size 24"),
        (["--topk", 65], "topk 65"),
        (["--plot", "/nowhere/plot.svg"], "/nowhere/plot.svg"),
        (["decode", "--plot", "plot.svg"], "--plot"),
    ],
)
def test_bench_refuses_by_name(msa, arguments, named):
    result = msa("bench", *arguments)
    assert result.returncode == 1 and named in result.stderr and result.stdout == ""


def test_bench_prints_what_there_is_when_interrupted():
    from conftest import MSA

    # Enough repeats for seconds of work behind the interrupt, few enough that what is before it ends soon on a busy machine.
    command = [str(MSA), "bench", "topk_blocks", "--repeats", "100", "--budget", "1000", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        heard = []
        for line in process.stderr:
            heard.append(line)
            if "topk_blocks (4096, 1024)" in line:  # torch.topk of that shape is done
                break
        else:  # it died by itself: say of what
            pytest.fail(f"the bench ended with status {process.wait()}: {''.join(heard)}")
        process.send_signal(signal.SIGINT)
        out, error = process.communicate()
    assert process.returncode in (2, 130) and "interrupted" in error
    report = json.loads(out)
    assert report["interrupted"] is True and report["rows"][0]["name"].startswith("torch.topk")


def test_output_to_a_full_disk_is_an_error(msa):
    if not os.path.exists("/dev/full"):
        pytest.fail("/dev/full is missing: this test needs it")
    from conftest import MSA

    with open("/dev/full", "w") as full:
        result = subprocess.run([str(MSA), "info"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert "standard output" in result.stderr


def test_installed_package_is_found_by_cmake(root, tmp_path):
    """`cmake --install`, then find_package(msa) from a project of its own, runs the example."""
    prefix, project, build = tmp_path / "prefix", tmp_path / "project", tmp_path / "build"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(user CXX)\nfind_package(msa REQUIRED)\n"
        f"add_executable(user {root / 'examples/sparse_layer.cc'})\ntarget_link_libraries(user PRIVATE msa::msa)\n"
    )
    for command in (
        ["cmake", "--install", str(root / "build"), "--prefix", str(prefix)],
        ["cmake", "-S", str(project), "-B", str(build), f"-DCMAKE_PREFIX_PATH={prefix}"],
        ["cmake", "--build", str(build)],
        [str(build / "user")],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "last token attends to blocks" in result.stdout
