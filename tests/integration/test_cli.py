# SPDX-License-Identifier: Apache-2.0
"""The program from outside: exit codes, messages, and the subcommands that need no model."""

import json
import os
import subprocess

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
    assert report["passed"] == len(report["checks"]) > 100


def test_check_prints_a_table(msa):
    result = msa("check", "--threads", 1)
    assert result.returncode == 0
    assert "sparse_attention.out" in result.stdout and " 0 failed" in result.stdout


def test_bench_prints_figures(msa):
    shape = ["--context", "1024", "--queries", 64, "--query-heads", 4, "--kv-heads", 2, "--head-dim", 64, "--index-dim", 64,
             "--block-size", 64, "--topk", 4, "--repeats", 1]
    report = json.loads(msa("bench", *shape, "--json").stdout)
    names = [row["name"] for row in report["rows"]]
    assert any(name.startswith("torch sdpa") for name in names) and "select_blocks" in names
    assert all(row["seconds"] > 0 for row in report["rows"])
    assert report["machine"]["fma_gflops"] > 0 and report["machine"]["read_gbytes"] > 0
    text = msa("bench", "select_blocks", *shape).stdout
    assert "of peak" in text


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
