# SPDX-License-Identifier: Apache-2.0
"""Paths and a runner of the program, shared by the integration tests."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MSA = pathlib.Path(os.environ.get("MSA_PROGRAM", ROOT / "build/bin/msa"))


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def msa():
    """Runs the program; returns the finished process with text output."""

    def run(*arguments, env=None, **keywords):
        command = [str(MSA), *map(str, arguments)]
        environment = {**os.environ, **(env or {})}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600, **keywords)

    return run
