# SPDX-License-Identifier: Apache-2.0
"""Checkpoints across implementations: what the `safetensors` package writes we read, and what we write it reads."""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOL = pathlib.Path(os.environ.get("MSA_BUILD_DIR", ROOT / "build")) / "bin" / "msa_tokenize_tool"


def copy(source, target, max_shard_bytes):
    assert TOOL.exists(), f"{TOOL} is not built"
    return subprocess.run([TOOL, "copy", source, target, str(max_shard_bytes)], capture_output=True, text=True, timeout=60)


def sample_tensors():
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    tensors = {f"layers.{i}.weight": torch.randn(7 + i, 5, generator=generator).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors["ids"] = torch.arange(-3, 4, dtype=torch.int64)
    tensors["bytes"] = torch.arange(3, dtype=torch.uint8)
    tensors["flags"] = torch.tensor([True, False, True])
    tensors["f8"] = torch.randn(3, generator=generator).to(torch.float8_e4m3fn)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["naïve 'name'"] = torch.ones(1)
    return tensors


def load_directory(directory):
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return safetensors.torch.load_file(directory / "model.safetensors")
    tensors = {}
    for name, shard in json.loads(index.read_text())["weight_map"].items():
        with safetensors.safe_open(directory / shard, "pt") as file:
            tensors[name] = file.get_tensor(name)
            assert file.metadata() == {"format": "pt"}
    return tensors


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].contiguous().view(torch.uint8).equal(b[name].contiguous().view(torch.uint8)) if a[name].dim() else a[name] == b[name]


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100, 1])
def test_round_trip(tmp_path, max_shard_bytes):
    source, target, again = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for directory in (source, target, again):
        directory.mkdir()
    safetensors.torch.save_file(sample_tensors(), source / "model.safetensors", {"format": "pt", "note": "kept"})
    assert copy(source, target, max_shard_bytes).returncode == 0
    assert_equal(load_directory(target), sample_tensors())
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes < 10**9)
    assert copy(target, again, 10**9).returncode == 0  # and our shards read back
    assert_equal(load_directory(again), sample_tensors())
    for path in target.glob("*.safetensors"):
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0


def test_rewriting_leaves_one_checkpoint(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir(), target.mkdir()
    safetensors.torch.save_file(sample_tensors(), source / "model.safetensors")
    for max_shard_bytes in (100, 10**9, 200, 100):
        assert copy(source, target, max_shard_bytes).returncode == 0
        names = {path.name for path in target.iterdir()}
        if max_shard_bytes == 10**9:
            assert names == {"model.safetensors"}
        else:
            index = json.loads((target / "model.safetensors.index.json").read_text())
            assert names == {"model.safetensors.index.json", *index["weight_map"].values()}
        assert_equal(load_directory(target), sample_tensors())


def test_refuses_what_the_package_refuses(tmp_path):
    """Random damage to a header: whenever we accept a file, the package does too, with the same bytes."""
    rng = np.random.default_rng(1)
    good, target = tmp_path / "good", tmp_path / "out"
    good.mkdir(), target.mkdir()
    safetensors.torch.save_file({"a": torch.arange(4.0), "b": torch.ones(2, 3)}, good / "model.safetensors")
    data = bytearray((good / "model.safetensors").read_bytes())
    header = int.from_bytes(data[:8], "little")
    bad = tmp_path / "bad"
    bad.mkdir()
    accepted = 0
    for _ in range(150):
        damaged = bytearray(data)
        damaged[rng.integers(0, 8 + header)] = rng.choice(np.frombuffer(b'0123456789{}[]",:F ', dtype=np.uint8))
        (bad / "model.safetensors").write_bytes(damaged)
        done = copy(bad, target, 10**9)
        assert done.returncode in (0, 1), done.stderr
        if done.returncode == 0:
            accepted += 1
            assert_equal(load_directory(target), safetensors.torch.load_file(bad / "model.safetensors"))
    assert accepted < 150
