# SPDX-License-Identifier: Apache-2.0
"""The programs that ask a GPU by themselves: ptx_test (do the instructions do what the emulator believes) and device_check (do
the operators agree with the reference). Looked for in the folder that MSA_GPU_PROGRAMS names, else beside the library."""

import os
import pathlib
import subprocess

import msa
import pytest

FOLDER = pathlib.Path(os.environ.get("MSA_GPU_PROGRAMS") or msa.library_path().parents[1] / "bin")


@pytest.mark.parametrize("name", ["ptx_test", "device_check"])
def test_program(name):
    program = FOLDER / name
    if not program.is_file():
        pytest.skip(f"no {program}")
    result = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert ", 0 failed" in result.stdout
