# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the shared library of operators, once. Tested in tests/python/test_ops_package.py."""

import functools
import os
from pathlib import Path

import torch

NAMES = ("libmsa_torch.so", "libmsa_torch.dylib", "msa_torch.dll")


def library_path() -> Path:
    """The operators' library: what MSA_LIBRARY names, else in ../../build/lib, else beside the package.

    Raises ImportError, listing where it looked, when there is none.
    """
    named = os.environ.get("MSA_LIBRARY")
    if named:
        path = Path(named)
        if not path.is_file():
            raise ImportError(f"msa: MSA_LIBRARY={named} is not a file")
        return path.resolve()
    package = Path(__file__).resolve().parent
    folders = (package.parent.parent / "build" / "lib", package)
    for folder in folders:
        for name in NAMES:
            if (folder / name).is_file():
                return folder / name
    places = " or ".join(str(folder) for folder in folders)
    raise ImportError(f"msa: no {NAMES[0]} in {places}; run `make build`, or name the file in MSA_LIBRARY")


@functools.cache
def load_library() -> Path:
    """Registers torch.ops.msa.*; returns the library's path. Further calls do nothing."""
    path = library_path()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"msa: could not load {path}: {error}. It must be built against the torch in use, {torch.__version__}: "
            "run `make build` again"
        ) from error
    return path
