# SPDX-License-Identifier: Apache-2.0
"""Makes `import msa` work from a source tree whose package is not installed, and offers the backends as a fixture."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SOURCE_TREE = Path(__file__).resolve().parent.parent.parent

if importlib.util.find_spec("msa") is None:
    sys.path.insert(0, str(SOURCE_TREE / "python"))


# The tensors are tiny: a second thread costs more than it brings. Tests of threads ask for theirs.
torch.set_num_threads(1)


@pytest.fixture
def source_tree():
    return SOURCE_TREE


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    """Runs the test once for each backend."""
    monkeypatch.setenv("MSA_BACKEND", request.param)
    return request.param
