# SPDX-License-Identifier: Apache-2.0
"""`msa generate` as a user runs it, on a tiny random checkpoint: what it prints, and how Ctrl-C ends it."""

import json
import signal
import subprocess

import pytest

from checkpoint_support import ENVIRONMENT, MSA, write_checkpoint

LONG = 1 << 20  # tokens that no test waits for


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # No end-of-sequence token: a random model would soon draw it.
    directory = write_checkpoint(tmp_path_factory.mktemp("generate") / "model", max_position_embeddings=LONG, eos_token_id=None)
    assert MSA.exists(), f"{MSA} is not built: run `make build`"
    return directory


def start(model, *arguments):
    command = [MSA, "generate", "--model", model, "--no-chat", "--attention", "dense", *arguments]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)


def ended(process):
    output, errors = process.communicate(timeout=60)
    return process.returncode, output.decode(), errors.decode()


def test_text_ends_at_max_tokens(model):
    code, output, errors = ended(start(model, "--prompt", "the text", "--max-tokens", 5, "--json"))
    report = json.loads(output)
    assert code == 0 and errors == ""
    assert report["stop"] == "max_tokens" and len(report["tokens"]) == 5 and report["prompt_tokens"] == 8


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_interrupt_in_the_prompt_ends_in_good_order(model, tmp_path, flags):
    (tmp_path / "prompt").write_text("a b " * 32768)
    process = start(model, "--prompt-file", tmp_path / "prompt", "--chunk", 1, *flags)
    line = process.stderr.readline().decode()  # told once a second: it is in the middle of the prompt
    assert "of 131072 prompt tokens" in line
    process.send_signal(signal.SIGINT)
    code, output, errors = ended(process)
    assert code == 130
    if flags:
        report = json.loads(output)
        assert report["stop"] == "interrupt" and report["tokens"] == [] and report["text"] == ""
    else:
        assert output == "\n"
        assert "stopped by interrupt" in errors and "prefill: 131072 tokens" not in errors


def test_interrupt_in_the_answer_keeps_the_text(model):
    process = start(model, "--prompt", "b", "--max-tokens", LONG // 2, "--temperature", 1, "--seed", 3)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    code, output, errors = ended(process)
    assert code == 130
    assert first and output.endswith("\n") and "stopped by interrupt" in errors
