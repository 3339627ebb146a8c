# SPDX-License-Identifier: Apache-2.0
"""The plan of the house, checked: who may include whom, and that public headers stand alone on the standard library."""

import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)

# A layer may include itself, include/msa, and what stands behind it here. Arrows point down only; backends never meet.
ALLOWED = {
    "include/msa": set(),
    "src/core": set(),
    "src/reference": {"src/core"},
    "src/cpu": {"src/core"},
    "src/cuda": {"src/core"},
    "src/no_cuda": {"src/cuda"},
    "src/no_cpu": {"src/cpu"},
    "src/ops": {"src/core", "src/reference", "src/cpu", "src/cuda"},
    "src/cache": {"src/core"},
    "src/conformance": {"src/core"},
    "src/model/files": set(),
    "src/model": {"src/core", "src/cache", "src/model/files", "bindings/torch"},
    "bindings/torch": {"src/core"},
    "bench": {"src/core", "src/cpu"},
    "apps/msa": {"src/model", "src/model/files", "src/cache", "src/conformance", "bench"},
}
# Where CUDA and the emulator take each other's place: scalars and threads, instructions, descriptors of the copy engine.
CUDA_FILES = ("src/cuda/device.cuh", "src/cuda/ptx.cuh", "src/cuda/tensor_map.cuh")
# Third-party headers a layer may use, besides the standard library and POSIX.
THIRD_PARTY = {
    "src/cpu": {"hwy"},
    "bench": {"hwy", "ATen", "c10", "torch", "benchmark"},
    "src/model/files": {"nlohmann", "pcre2.h"},
    "src/model": {"ATen", "c10", "torch", "nlohmann"},
    "bindings/torch": {"ATen", "c10", "torch"},
    "apps/msa": {"CLI", "fmt", "nlohmann", "ATen", "c10", "torch"},
}


def layer_of(path):
    """The longest layer that is a prefix of a path relative to the root."""
    matches = [layer for layer in ALLOWED if path == layer or path.startswith(layer + "/")]
    return max(matches, key=len) if matches else None


def sources():
    for top in ("include", "src", "bindings", "bench", "apps"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in (".h", ".cc", ".inc", ".cu", ".cuh"):
                yield path


def is_system(header):
    """Standard library and POSIX headers have no folder (or sys/) and no capital letters."""
    return header.startswith("sys/") or ("/" not in header and header != "pcre2.h")


@pytest.mark.parametrize("path", list(sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_includes_point_down(path):
    relative = str(path.relative_to(ROOT))
    layer = layer_of(relative)
    assert layer is not None, f"{relative} belongs to no layer"
    for bracket, header in INCLUDE.findall(path.read_text()):
        if bracket == "<":
            top = header.split("/")[0]
            assert is_system(header) or top in THIRD_PARTY.get(layer, set()), f"{relative} includes <{header}>"
            continue
        if relative in CUDA_FILES and header.startswith("tests/cuda/emulator/"):
            continue  # what stands in for CUDA where kernels run on a CPU
        target = "include/msa" if header.startswith("msa/") else layer_of(header)
        assert target is not None, f"{relative} includes {header}, which is in no layer"
        allowed = {layer, "include/msa"} | ALLOWED[layer]
        assert target in allowed, f"{relative} ({layer}) may not include {header} ({target})"


def test_cuda_headers_stay_in_their_files():
    """Device code compiles against CUDA or the emulator, so few files decide; of host code, one asks the runtime."""
    for path in sources():
        relative = str(path.relative_to(ROOT))
        names = [header for bracket, header in INCLUDE.findall(path.read_text()) if bracket == "<" and "cu" in header]
        cuda = [name for name in names if re.match(r"cu(da|blas|rand|dnn)?\w*\.h|cuda/|cute/|cutlass/", name)]
        assert not cuda or relative in (*CUDA_FILES, "src/cuda/runtime.cc"), f"{relative}: {cuda}"


def test_every_source_folder_is_a_layer():
    folders = {str(path.parent.relative_to(ROOT)) for path in sources()}
    assert all(layer_of(folder) for folder in folders)


@pytest.mark.parametrize("header", sorted((ROOT / "include/msa").glob("*.h")), ids=lambda p: p.name)
def test_public_header_stands_alone(header, tmp_path):
    source = tmp_path / "alone.cc"
    source.write_text(f'#include "msa/{header.name}"\n#include "msa/{header.name}"\nint main() {{}}\n')
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT / 'include'}", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_library_never_prints_or_exits():
    """Library code reports by exception: no printing, no exit, no abort below the program."""
    forbidden = re.compile(r"\b(std::cout|std::cerr|printf|fprintf|puts|std::exit|std::abort|abort|exit|quick_exit)\s*(\(|<<)")
    for path in sources():
        relative = str(path.relative_to(ROOT))
        if relative.startswith("apps/"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            assert not forbidden.search(code), f"{relative}:{number}: {line.strip()}"


def test_files_open_with_a_purpose():
    """Every source file starts with its licence and a sentence on what it is for."""
    for path in sources():
        lines = path.read_text().splitlines()
        assert lines and "SPDX-License-Identifier: Apache-2.0" in lines[0], path
        assert lines[1].startswith("//") and len(lines[1]) > 12, path


def test_no_machine_paths():
    """Nothing in the tree names a place of one machine."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    pattern = re.compile(r"(/home/\w+|/root/|/work/|C:\\\\Users)")
    for name in filter(None, listed):
        path = ROOT / name
        if name == "tests/static/test_layering.py" or not path.is_file() or path.stat().st_size > 1 << 20:
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        match = pattern.search(text)
        assert not match, f"{name} names {match.group(0)}"
