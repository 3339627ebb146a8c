# SPDX-License-Identifier: Apache-2.0
"""The Python package: how it finds its library, what it documents."""

import doctest
import inspect
import os
import subprocess
import sys

import msa
import pytest
import torch
from msa import _library

FUNCTIONS = [name for name in msa.__all__ if inspect.isfunction(getattr(msa, name)) and name != "library_path"]


def test_version():
    assert msa.__version__ == msa.version() and len(msa.__version__.split(".")) == 3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name):
    function = getattr(msa, name)
    assert function.__doc__
    documented = function.__doc__
    for parameter in inspect.signature(function).parameters.values():
        if parameter.annotation in (torch.Tensor, "Tensor") and not parameter.name.startswith("cu_seqlens"):
            assert f"{parameter.name}:" in documented, parameter.name
    if name not in ("version", "cuda_is_built", "check_device_data"):
        assert "Returns:" in documented and "[" in documented


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_follow_the_schemas(name):
    """Names, order, defaults and keyword-only arguments of a function are its operator's."""
    schema = getattr(torch.ops.msa, name).default._schema
    parameters = list(inspect.signature(getattr(msa, name)).parameters.values())
    assert [p.name for p in parameters] == [a.name for a in schema.arguments]
    for parameter, argument in zip(parameters, schema.arguments):
        assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only, parameter.name
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        assert parameter.default == default, parameter.name


@pytest.mark.parametrize("module", [msa.ops, msa.nn], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    torch.manual_seed(0)
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0 and result.failed == 0


def test_library_named_in_the_environment(monkeypatch, tmp_path):
    library = tmp_path / "elsewhere.so"
    library.touch()
    monkeypatch.setenv("MSA_LIBRARY", str(library))
    assert _library.library_path() == library
    monkeypatch.setenv("MSA_LIBRARY", str(tmp_path / "missing.so"))
    with pytest.raises(ImportError, match="MSA_LIBRARY=.*missing.so is not a file"):
        _library.library_path()


def test_library_in_the_source_tree_or_beside_the_package(monkeypatch, tmp_path):
    monkeypatch.delenv("MSA_LIBRARY", raising=False)
    package = tmp_path / "tree" / "python" / "msa"
    package.mkdir(parents=True)
    monkeypatch.setattr(_library, "__file__", str(package / "_library.py"))
    with pytest.raises(ImportError, match="make build"):
        _library.library_path()
    (package / "libmsa_torch.so").touch()
    assert _library.library_path() == package / "libmsa_torch.so"
    built = tmp_path / "tree" / "build" / "lib" / "libmsa_torch.so"
    built.parent.mkdir(parents=True)
    built.touch()
    assert _library.library_path() == built


def test_a_broken_library_is_an_import_error(source_tree, tmp_path):
    broken = tmp_path / "libmsa_torch.so"
    broken.write_bytes(b"not a library")
    environment = {**os.environ, "MSA_LIBRARY": str(broken), "PYTHONPATH": str(source_tree / "python")}
    done = subprocess.run([sys.executable, "-c", "import msa"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "ImportError: msa: could not load" in done.stderr
