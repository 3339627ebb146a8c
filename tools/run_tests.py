# SPDX-License-Identifier: Apache-2.0
"""Runs the test suites and ends with one line: "N passed, N failed[, N skipped]".

Suites: unit (C++ tests and examples of the release build), emulation (the CUDA kernels, run by an emulator on the CPU),
static (layering, public headers, what the CUDA compiler makes of the kernels), python (operators, models,
operators on a GPU, command line, main job on a tiny model), asan (unit tests under address and undefined-behaviour sanitizers), tsan (threaded
tests under the thread sanitizer), fuzz (a short run of each fuzzer). Output of a suite is shown when it fails; every log
stays in build/test-logs.
"""

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
LOGS = BUILD / "test-logs"
# What the thread sanitizer looks at: every test that runs an operator with more than one thread.
TSAN_FILTER = "*Thread*:*thread*:*Invarian*:*Bitwise*"
TAIL_LINES = 60
FUZZERS = ("fuzz_safetensors", "fuzz_config", "fuzz_tokenizer", "fuzz_text")


class Count:
    """Tests passed, failed and skipped."""

    def __init__(self, passed=0, failed=0, skipped=0):
        self.passed, self.failed, self.skipped = passed, failed, skipped

    def add(self, other):
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped

    def __str__(self):
        text = f"{self.passed} passed, {self.failed} failed"
        return text + (f", {self.skipped} skipped" if self.skipped else "")


def run_logged(name, command, env=None):
    """Runs a command with its output in a log; returns its exit status."""
    log = LOGS / f"{name}.log"
    with log.open("wb") as stream:
        status = subprocess.run(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env
        ).returncode
    if status != 0:
        lines = log.read_text(errors="replace").splitlines()
        print(f"--- {name} exited with {status}; the last lines of {log.relative_to(ROOT)}:")
        print("\n".join(lines[-TAIL_LINES:]))
    return status


def read_junit(path, status):
    """Counts a JUnit file; a runner that failed without one, or without a failed test in it, is one failure."""
    count = Count()
    if path.exists():
        for case in ElementTree.parse(path).iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                count.failed += 1
            elif case.find("skipped") is not None or case.get("status") in ("notrun", "disabled"):
                count.skipped += 1
            else:
                count.passed += 1
    if status != 0 and count.failed == 0:
        count.failed = 1
    return count


def run_gtest(name, binary, arguments=(), env=None):
    junit = LOGS / f"{name}.xml"
    junit.unlink(missing_ok=True)
    status = run_logged(name, [str(binary), f"--gtest_output=xml:{junit}", "--gtest_brief=1", *arguments], env)
    return read_junit(junit, status)


def run_sharded(name, binary, env=None):
    """A long binary whose tests use one thread each: its tests dealt out to a process a CPU."""
    shards = os.cpu_count() or 1
    base = dict(os.environ if env is None else env, GTEST_TOTAL_SHARDS=str(shards))
    count = Count()
    with concurrent.futures.ThreadPoolExecutor(shards) as pool:
        for part in pool.map(
            lambda i: run_gtest(f"{name}-{i}", binary, env=dict(base, GTEST_SHARD_INDEX=str(i))), range(shards)
        ):
            count.add(part)
    return count


def run_pytest(name, *paths):
    junit = LOGS / f"{name}.xml"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x" if os.environ.get("MSA_FAIL_FAST") else "-q"]
    status = run_logged(name, [*command, "-p", "no:cacheprovider", f"--junitxml={junit}", *paths])
    return read_junit(junit, status)


def run_ctest(name, build, *arguments):
    junit = LOGS / f"{name}.xml"
    junit.unlink(missing_ok=True)
    command = ["ctest", "--test-dir", str(build), "--output-on-failure", "--output-junit", str(junit)]
    return read_junit(junit, run_logged(name, [*command, *arguments]))


def build_preset(preset, targets=("all",)):
    """Configures a preset and builds targets of it; returns False (and shows the log) when that fails."""
    jobs = str(os.cpu_count() or 1)
    return (
        run_logged(f"configure-{preset}", ["cmake", "--preset", preset, "-Wno-dev"]) == 0
        and run_logged(f"build-{preset}", ["cmake", "--build", f"build-{preset}", "-j", jobs, "--target", *targets]) == 0
    )


def suite_unit():
    count = Count()
    for binary in ("msa_tests", "files_tests", "model_tests"):
        count.add(run_gtest(binary, BUILD / "bin" / binary))
    count.add(run_ctest("examples", BUILD, "-R", "^example_"))
    return count


def suite_static():
    return run_pytest("static", "tests/static")


def suite_python():
    count = run_pytest("python", "tests/python")
    count.add(run_pytest("gpu", "tests/cuda"))
    count.add(run_pytest("integration", "tests/integration"))
    return count


def suite_emulation():
    build = ["cmake", "--build", str(BUILD), "-j", str(os.cpu_count() or 1), "--target", "cuda_emulation_tests"]
    if run_logged("build-emulation", build) != 0:
        return Count(failed=1)
    return run_sharded("emulation", BUILD / "bin" / "cuda_emulation_tests")


def suite_asan():
    if not build_preset("asan"):
        return Count(failed=1)
    env = dict(os.environ, ASAN_OPTIONS="detect_leaks=1:allocator_may_return_null=1", UBSAN_OPTIONS="print_stacktrace=1")
    count = Count()
    for binary in ("msa_tests", "files_tests"):
        count.add(run_sharded(f"asan-{binary}", ROOT / "build-asan" / "bin" / binary, env=env))
    return count


def suite_tsan():
    if not build_preset("tsan"):
        return Count(failed=1)
    return run_gtest("tsan-msa_tests", ROOT / "build-tsan" / "bin" / "msa_tests", [f"--gtest_filter={TSAN_FILTER}"])


def suite_fuzz():
    if not build_preset("fuzz", FUZZERS):
        return Count(failed=1)
    return run_ctest("fuzz", ROOT / "build-fuzz", "-R", "^fuzz_")


SUITES = {
    "static": suite_static,
    "unit": suite_unit,
    "python": suite_python,
    "emulation": suite_emulation,
    "asan": suite_asan,
    "tsan": suite_tsan,
    "fuzz": suite_fuzz,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=SUITES, help="run only this one (may be repeated)")
    options = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    total = Count()
    for name in options.suite or SUITES:
        start = time.monotonic()
        print(f"{name:<8} ...", flush=True)
        count = SUITES[name]()
        print(f"{name:<8} {count} ({time.monotonic() - start:.0f} s)", flush=True)
        total.add(count)
    print(total)
    return 0 if total.failed == 0 and total.passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
