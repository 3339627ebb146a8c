# SPDX-License-Identifier: Apache-2.0
"""The main job on a tiny random model: every step runs, the summary has every figure, a rerun does nothing, an interrupted
run goes on, two jobs in one folder are refused."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest

CONTEXT = 256
JOB_FLAGS = ["--context", str(CONTEXT), "--block-size", "16", "--topk", "2", "--passkey-lengths", "1024,1536", "--trials", "2",
             "--map-layers", "0,1", "--document-characters", "600"]
TRAIN_FLAGS = "--retrieval-share 0.5 --steps 6,2 --context 512 --cache-windows 3 --sparse-cache-windows 1 --rows 16 --probe-every 2 --probe-rows 16"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Enough text for a held-out part: small documents of generated sentences."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "river stone lantern quiet harbour morning letter seven window copper garden winter paper road".split()
    for document in range(40):
        lines = [" ".join(words[(document * 7 + line * 3 + i * (line % 5 + 1)) % len(words)] for i in range(12)) + "."
                 for line in range(60)]
        (folder / f"document{document:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random Llama with a byte-level tokenizer that knows ChatML."""
    torch = pytest.importorskip("torch")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=96, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
                         tie_word_embeddings=True, eos_token_id=258, bos_token_id=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>",
        "chat_template": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"}))
    return folder


def job_command(root, out, model, corpus):
    return [sys.executable, str(root / "tools/main_job.py"), "--out", str(out), "--model", str(model), "--data", str(corpus),
            "--train-flags", TRAIN_FLAGS, *JOB_FLAGS]


def run_job(*arguments):
    return subprocess.run(job_command(*arguments), capture_output=True, text=True, check=False, timeout=600)


def test_every_step_and_the_rerun(root, tiny_model, corpus, tmp_path):
    out = tmp_path / "out"
    result = run_job(root, out, tiny_model, corpus)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((out / "summary.json").read_text())
    for name in ("dense", "sparse_1_4", "sparse_1_8", "window_1_8", "oracle_1_8"):
        assert math.isfinite(summary["perplexity"][name]) and math.isfinite(summary["perplexity"][name + "_last1024"])
    assert set(summary["recall"]) == {"block", "score", "block_untrained", "score_untrained"}
    assert all(0 <= value <= 1 for value in summary["recall"].values())
    for mode in ("dense", "sparse"):
        assert {length: trials for length, (_, trials) in summary["passkey"][mode].items()} == {"1024": 2, "1536": 2}
    assert all(summary["tokens_per_second"][f"{p}_{m}"] > 0 for p in ("prefill", "decode") for m in ("dense", "sparse"))
    assert list(summary["seconds"]) == ["convert", "train", "eval", "generate", "passkey"]
    page = (out / "report.html").read_text()
    assert "<svg" in page and "layer 0, group 0" in page and "Recall on held-out rows" in page
    assert "perplexity" in result.stdout and "passkey" in result.stdout

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = run_job(root, out, tiny_model, corpus)
    assert again.returncode == 0 and again.stdout.count("done before") == 5
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == times


def test_an_interrupted_run_goes_on(root, tiny_model, corpus, tmp_path):
    out = tmp_path / "out"
    job = subprocess.Popen(job_command(root, out, tiny_model, corpus), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (out / "steps/convert.json").exists():
        assert job.poll() is None and time.monotonic() < deadline, job.stdout.read()
        time.sleep(0.02)
    second = run_job(root, out, tiny_model, corpus)
    assert second.returncode == 1 and "another main job is running" in second.stderr
    if job.poll() is None:
        import os

        os.killpg(job.pid, signal.SIGINT)
    output, _ = job.communicate(timeout=300)
    assert job.returncode in (0, 130), output
    result = run_job(root, out, tiny_model, corpus)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "done before" in result.stdout and (out / "summary.json").exists()


def test_bad_arguments(root, tmp_path):
    command = [sys.executable, str(root / "tools/main_job.py"), "--out", str(tmp_path / "out")]
    result = subprocess.run([*command, "--data", str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "none does not exist" in result.stderr
