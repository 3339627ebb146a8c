# SPDX-License-Identifier: Apache-2.0
"""`msa convert`, `msa train` and `msa eval` as a user runs them, on a tiny random Llama checkpoint with a byte-level tokenizer."""

import json
import random
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_support import CONFIG, ENVIRONMENT, MSA, write_checkpoint

WORDS = "the model reads a block of keys and values again because an answer stands far back in the long text".split()


@pytest.fixture(scope="module")
def program():
    assert MSA.exists(), f"{MSA} is not built: run `make build`"
    return MSA


@pytest.fixture(scope="module")
def run(program):
    def run(*arguments, code=0):
        command = [program, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stderr}\n{done.stdout}"
        return json.loads(done.stdout) if "--json" in arguments and code == 0 else done

    return run


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    rng = random.Random(3)
    for i in range(24):
        lines = [" ".join(rng.choice(WORDS) for _ in range(9)) + "." for _ in range(60)]
        (directory / f"document{i}.txt").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture(scope="module")
def converted(run, dense, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    flags = ("--block-size", 16, "--topk", 2, "--calibration-data", text, "--calibration-context", 256)
    report = run("convert", "--from", dense, "--out", out, *flags, "--json")
    assert report["layers"] == [0, 1] and report["topk"] == [2, 2] and not report["unchanged"]
    again = run("convert", "--from", dense, "--out", out, *flags, "--json")
    assert again["unchanged"]
    return out


TRAIN = ("--freeze-backbone", "--context", 192, "--rows", 32, "--cache-windows", 4, "--sparse-cache-windows", 2, "--index-lr", 0.01,
         "--probe-every", 5, "--retrieval-share", 0)


def read_log(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record.pop("seconds")
    return records


def test_converted_checkpoint_keeps_the_base(converted, dense):
    base, msa = load_file(dense / "model.safetensors"), load_file(converted / "model.safetensors")
    for name, tensor in base.items():
        assert torch.equal(tensor, msa[name]), name
    prefix = "model.layers.0.self_attn.indexer."
    assert set(msa) - set(base) >= {prefix + "q_proj.weight", prefix + "k_proj.weight"}
    config = json.loads((converted / "config.json").read_text())
    assert config["index_block_size"] == 16 and config["index_topk_blocks"] in (2, [2, 2])
    assert config["layer_types"] == ["minimax_m3_sparse"] * 2
    assert (converted / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def test_convert_refuses_bad_usage(run, dense, converted, tmp_path):
    assert "exists" in run("convert", "--from", dense, "--out", converted, code=1).stderr
    run("convert", "--from", dense, "--out", tmp_path / "x", "--init", "magic", code=2)
    run("convert", "--out", tmp_path / "x", code=2)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in run("convert", "--from", dense, "--out", tmp_path / "x", "--calibration-data", empty, code=1).stderr
    assert not (tmp_path / "x").exists()


def test_calibrate_ranks_layers(run, dense, text, tmp_path):
    report = run("convert", "--from", dense, "--out", tmp_path / "m", "--block-size", 16, "--topk", 2, "--calibration-data", text,
                 "--calibration-context", 256, "--calibrate", "--boost-layers", 1, "--boost-topk", 6, "--rank-context", 700, "--json")
    first = report["ranking"][0]["layer"]
    assert report["topk"][first] == 6 and report["topk"][1 - first] == 2
    assert report["ranking"][0]["gain"] >= report["ranking"][1]["gain"]


def test_frozen_training_resumes_exactly(run, converted, text, tmp_path):
    flags = ("train", "--model", converted, "--data", text, "--stage", "warmup,sparse", "--steps", "20,10", *TRAIN)
    whole = run(*flags, "--out", tmp_path / "whole", "--json")
    assert whole["finished"] and whole["steps"] == 30
    records = read_log(tmp_path / "whole" / "train.jsonl")
    assert [r["step"] for r in records] == list(range(31))
    assert records[0]["block_recall"] is not None and records[1]["block_recall"] is None
    assert records[20]["held_out_kl"] < records[0]["held_out_kl"]
    assert {r["stage"] for r in records} == {"warmup", "sparse"}


def test_interrupt_saves_and_the_rerun_goes_on(program, run, converted, text, tmp_path):
    flags = ["train", "--model", converted, "--data", text, "--stage", "warmup", "--steps", "150", *TRAIN]
    whole = run(*flags, "--out", tmp_path / "whole", "--json")
    assert whole["finished"]
    out = tmp_path / "parts"
    process = subprocess.Popen([program, *map(str, flags), "--out", str(out)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    log = out / "train.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 20):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "goes on from there" in error
    done = run(*flags, "--out", out, "--json")
    assert done["finished"] and done["steps"] == 150
    assert read_log(log) == read_log(tmp_path / "whole" / "train.jsonl")
    ours, theirs = load_file(out / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    assert "clip" in run(*flags, "--out", out, "--clip", 0.1, code=1).stderr


def test_pretraining_from_a_config(run, text, tmp_path):
    config = CONFIG | {
        "layer_types": ["minimax_m3_sparse"] * 2, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 16,
        "index_topk_blocks": 2, "index_local_blocks": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ("train", "--config", tmp_path / "config.json", "--data", text, "--context", 128, "--batch", 4, "--lr", 3e-3, "--probe-every", 20)
    sparse = run(*flags, "--out", tmp_path / "msa", "--stage", "warmup,sparse", "--steps", "20,20", "--json")
    dense = run(*flags, "--out", tmp_path / "dense", "--attention", "dense", "--steps", "40", "--json")
    for report in (sparse, dense):
        assert report["last"]["held_out_lm_loss"] < report["first"]["held_out_lm_loss"] - 0.5
    assert abs(sparse["last"]["held_out_lm_loss"] - dense["last"]["held_out_lm_loss"]) < 0.3
    half = run(*flags, "--out", tmp_path / "bf16", "--dtype", "bf16", "--steps", "10", "--json")
    assert half["finished"]


def test_ablations_from_scratch_generate_and_resume(run, dense, text, tmp_path):
    config = CONFIG | {
        "layer_types": ["minimax_m3_sparse"] * 2, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 16,
        "index_topk_blocks": 2, "index_local_blocks": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    flags = ("train", "--config", tmp_path / "config.json", "--tokenizer", dense, "--data", text, "--context", 128, "--batch", 2,
             "--stage", "warmup,sparse", "--steps", "6,6", "--lr", 3e-3, "--probe-every", 6)
    ablations = ("--index-value-head", 32, "--attention-sink", "--init-blocks", 1)
    report = run(*flags, *ablations, "--out", out, "--json")
    assert report["finished"] and report["last"]["held_out_lm_loss"] < report["first"]["held_out_lm_loss"]
    written = json.loads((out / "config.json").read_text())
    assert written["index_value_dim"] == 32 and written["attention_sink"] is True and written["index_init_blocks"] == 1
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.1.self_attn.indexer.v_proj.weight"].shape == (32, 32)
    assert tensors["model.layers.1.self_attn.indexer.o_proj.weight"].shape == (32, 64)
    assert tensors["model.layers.0.self_attn.sinks"].shape == (4,) and tensors["model.layers.0.self_attn.sinks"].abs().max() > 0
    for chunk in (7, 512):  # sparse prefill in chunks and decode, on the paged cache with index values
        answer = run("generate", "--model", out, "--prompt", "the model reads a block " * 8, "--max-tokens", 8, "--chunk", chunk, "--json")
        assert len(answer["tokens"]) > 0
    again = run(*flags, *ablations, "--out", out, "--json")
    assert again["steps"] == 12
    assert "index_value_dim" in run(*flags, "--out", out, "--attention-sink", "--init-blocks", 1, code=1).stderr


def test_ablations_on_a_converted_model(run, converted, text, tmp_path):
    flags = ("train", "--model", converted, "--data", text, "--context", 128, "--steps", 3, "--stage", "sparse", "--probe-every", 0)
    ablations = ("--index-value-head", "--attention-sink")
    report = run(*flags, *ablations, "--out", tmp_path / "out", "--json")
    assert report["finished"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["index_value_dim"] == 16  # the head dimension
    for flag in ablations:
        refused = run(*flags, flag, "--freeze-backbone", "--out", tmp_path / "frozen", code=2)
        assert flag in refused.stderr and "--freeze-backbone" in refused.stderr
    assert "--attention dense" in run(*flags, "--index-value-head", "--attention", "dense", "--out", tmp_path / "x", code=2).stderr
    assert "index_value_dim" in run(*flags, "--index-value-head", 24, "--out", tmp_path / "x", code=1).stderr
    window = run(*flags, "--attention", "window", "--out", tmp_path / "window", "--json")
    assert window["finished"] and read_log(tmp_path / "window" / "train.jsonl")[-1]["stage"] == "window"


def test_forced_blocks_are_switches_of_every_command(run, converted, text):
    flags = ("eval", "--model", converted, "--data", text, "--context", 256, "--windows", 1, "--recall-rows", 0, "--json")
    losses = {run(*flags, "--attention", "sparse@3", *more)["modes"]["sparse@3"]["loss"]
              for more in ((), ("--init-blocks", 1), ("--local-blocks", 2), ("--init-blocks", 1, "--local-blocks", 2))}
    window = run(*flags, "--attention", "window@3")["modes"]["window@3"]["loss"]
    assert len(losses) == 4 and window in losses  # everything forced is the first block and the two most recent ones


def test_eval_reports_every_mode(run, converted, text, tmp_path):
    maps = tmp_path / "maps.json"
    report = run("eval", "--model", converted, "--baseline", converted, "--data", text, "--context", 256, "--windows", 2,
                 "--attention", "dense,sparse@1/4,sparse@1/8,window@1/8,oracle@1/8,sparse@16", "--maps", maps, "--map-layers", "0,1", "--json")
    assert list(report["modes"]) == ["dense", "sparse@1/4", "sparse@1/8", "window@1/8", "oracle@1/8", "sparse@16"]
    assert report["modes"]["sparse@16"]["loss"] == pytest.approx(report["modes"]["dense"]["loss"], abs=1e-4)
    recall = report["recalls"]["sparse@1/8"]
    assert 0 < recall["block"] <= 1 and recall["untrained"]["block"] == recall["block"]
    assert report["recalls"]["sparse@16"]["block"] is None
    entry = json.loads(maps.read_text())["maps"][0]
    assert entry["block_size"] == 16 and len(entry["rows"]) == 16
    assert all(row[i] == 1 for i, row in enumerate(entry["rows"]))


def test_eval_tasks(run, converted, text):
    report = run("eval", "--model", converted, "--data", text, "--tasks", "passkey,multikey,variable-tracking", "--lengths", "1200,1600", "--trials", 3,
                 "--attention", "dense,sparse", "--json")
    for task in ("passkey", "multikey", "variable-tracking"):
        for mode in ("dense", "sparse"):
            assert {length: total for length, (_, total) in report[task][mode].items()} == {"1200": 3, "1600": 3}
            assert all(0 <= share <= 1 for share in report["found"][task][mode].values())
    chain = report["trials"]["variable-tracking"]["dense"][0]
    assert len(chain["answers"]) == 5 and chain["hit"] == all(name in chain["answer"] for name in chain["answers"])
    assert report["prompt_tokens"]["sparse"]["computed"] < report["prompt_tokens"]["sparse"]["total"]


def test_eval_refuses_bad_usage(run, converted, tmp_path):
    run("eval", "--model", converted, "--attention", "sparse@0", code=2)
    run("eval", "--model", converted, "--budget", "2", code=2)
    assert str(tmp_path) in run("eval", "--model", converted, "--data", tmp_path, code=1).stderr
    run("train", "--out", tmp_path / "x", code=2)
    run("train", "--model", converted, "--out", tmp_path / "x", "--stage", "warmup", "--steps", "1,2", code=2)
