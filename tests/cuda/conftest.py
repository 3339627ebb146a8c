# SPDX-License-Identifier: Apache-2.0
"""Tests that need a GPU: skipped, each by name, where there is none or the library was built without CUDA. They share the
operator tests' inputs (tests/python/ops_support.py)."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SOURCE_TREE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCE_TREE / "tests" / "python"))
if importlib.util.find_spec("msa") is None:
    sys.path.insert(0, str(SOURCE_TREE / "python"))


def why_not():
    """Why this machine cannot run them; None when it can."""
    if not torch.cuda.is_available():
        return "no GPU on this machine"
    if torch.cuda.get_device_capability() != (9, 0):
        return "the GPU is no Hopper (compute capability 9.0)"
    import msa

    return None if msa.cuda_is_built() else "the library was built without CUDA"


def pytest_configure(config):
    config.addinivalue_line("markers", "reduced: small enough to run under compute-sanitizer")


def pytest_collection_modifyitems(items):
    reason = why_not()
    if reason is not None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def reference_on_the_host(monkeypatch):
    """Tensors on the CPU go to the float64 reference, which is what the GPU is held against."""
    monkeypatch.setenv("MSA_BACKEND", "reference")
