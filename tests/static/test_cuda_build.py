# SPDX-License-Identifier: Apache-2.0
"""What the device compiler makes of the CUDA backend, read without a GPU: it compiles for sm_90a, no kernel spills registers
or keeps arrays in local memory, and the hot ones use Hopper's matrix instructions. Skipped without nvcc."""

import os
import pathlib
import re
import shutil
import subprocess
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda-static"
CUDA_BIN = [os.path.join(os.environ.get(name, "/usr/local/cuda"), "bin") for name in ("CUDA_HOME", "CUDA_PATH")]
# Kernels whose time is matrix products: what must be found in their machine code. Names as in the source; all are templates.
HOT = {
    "score_blocks_kernel": "HGMMA",
    "score_narrow_keys_kernel": "HGMMA",
    "screen_blocks_kernel": "IGMMA",
    "rescore_blocks_kernel": "HGMMA",
    "attend_blocks": "HGMMA",
    "attend_prefix": "HGMMA",
    "attend_shared_tiles": "HGMMA",
    "attend_blocks_backward": "HGMMA",
    "attend_prefix_backward": "HGMMA",
    "kl_pairs": "HGMMA",
}


def find_tool(name):
    triton = pathlib.Path(sysconfig.get_paths()["purelib"]) / "triton/backends/nvidia/bin"  # carries the disassemblers
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *CUDA_BIN, str(triton)]))


NVCC, CUOBJDUMP = find_tool("nvcc"), find_tool("cuobjdump")


def nvcc_release():
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=False).stdout if NVCC else ""
    found = re.search(r"release (\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0, 0)


needs_nvcc = pytest.mark.skipif(nvcc_release() < (12, 5), reason="no nvcc 12.5 or newer on this machine")


@pytest.fixture(scope="module")
def library():
    """libmsa.a with the reference and the CUDA backend alone, and the programs that ask a device; minutes the first time, then
    what has changed."""
    launchers = [f"-DCMAKE_{lang}_COMPILER_LAUNCHER=ccache" for lang in ("CXX", "CUDA") if shutil.which("ccache")]
    options = ["-DMSA_CUDA=ON", "-DMSA_CPU=OFF", "-DMSA_BUILD_TORCH=OFF", "-DMSA_BUILD_FILES=OFF", "-DMSA_BUILD_TESTS=OFF"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-Wno-dev", "-DCMAKE_BUILD_TYPE=Release"]
    for command in (
        [*configure, f"-DCMAKE_CUDA_COMPILER={NVCC}", *options, *launchers],
        ["cmake", "--build", str(BUILD), "--target", "msa", "ptx_test", "device_check"],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return BUILD / "src" / "libmsa.a"


@pytest.fixture(scope="module")
def objects(library):
    if CUOBJDUMP is None:
        pytest.skip("no cuobjdump on this machine")
    return sorted((BUILD / "src").rglob("*.cu.o"))


def is_instance(function, kernel):
    """Whether a mangled name is a kernel template's: its length, its name, and I for its arguments. No other kernel's name that
    begins the same has that."""
    return f"{len(kernel)}{kernel}I" in function


def dump(option, path):
    result = subprocess.run([CUOBJDUMP, option, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs_nvcc
def test_compiles_for_hopper_alone(library, objects):
    """Machine code of sm_90a (which some disassemblers call sm_90) and nothing else."""
    assert library.is_file() and objects
    for path in objects:
        names = re.findall(r"ELF file +\d+: (\S+)", dump("--list-elf", path))
        assert names and all(".sm_90" in name for name in names), path.name


@needs_nvcc
def test_no_kernel_spills(objects):
    """STACK and LOCAL bytes are spilled registers or arrays indexed at run time: local memory, much slower."""
    seen = 0
    for path in objects:
        for name, usage in re.findall(r"Function (\w+):\s*\n\s*(REG.*)", dump("--dump-resource-usage", path)):
            numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
            is_hot = any(is_instance(name, kernel) for kernel in HOT)
            if is_hot or nvcc_release() == (13, 0):  # the others are one compiler's figures
                assert numbers["STACK"] == 0 and numbers["LOCAL"] == 0, f"{path.name}: {name}: {usage}"
            seen += 1
    assert seen > 0


@needs_nvcc
@pytest.mark.parametrize("kernel", HOT)
def test_hot_kernels_use_matrix_instructions(kernel, objects):
    found = 0
    for path in objects:
        if not is_instance(dump("--dump-resource-usage", path), kernel):
            continue
        for function in re.split(r"\n\s*Function : ", dump("--dump-sass", path))[1:]:
            if is_instance(function.split("\n", 1)[0], kernel):
                assert HOT[kernel] in function, f"{path.name}: {function.splitlines()[0]} has no {HOT[kernel]}"
                found += 1
    assert found > 0, f"{kernel} is in no object"


@needs_nvcc
def test_a_softmax_runs_beside_a_product(objects):
    """Dense attention waits for the scores of a tile, takes their exponentials, 64 a thread, and only then waits for the
    product with the values that was issued before. A compiler that moves them behind that wait costs the overlap, silently."""
    if nvcc_release() != (13, 0):
        pytest.skip("how instructions are ordered is one compiler's")
    found = 0
    for path in objects:
        if not is_instance(dump("--dump-resource-usage", path), "attend_prefix"):
            continue
        for function in re.split(r"\n\s*Function : ", dump("--dump-sass", path))[1:]:
            if not is_instance(function.split("\n", 1)[0], "attend_prefix"):
                continue
            between = re.search(r"DEPBAR\.LE gsb0, 0x1(.*?)DEPBAR\.LE gsb0, 0x0", function, re.DOTALL)
            assert between and between.group(1).count("MUFU.EX2") >= 64, function.splitlines()[0]
            found += 1
    assert found > 0
