# SPDX-License-Identifier: Apache-2.0
"""The main job: a real dense language model becomes an MSA model, is trained, measured and used.

Steps: import SmolLM2-135M-Instruct, convert, train (warmup, then sparse), evaluate at the model's full context, answer a
question about a long document, passkey retrieval, report. Every step leaves its files under --out and a record in
OUT/steps; a rerun continues with the first step whose inputs changed or that did not finish. Standard library only; the
work is done by the program `msa`. Tested on a tiny model in tests/integration/test_main_job.py.
"""

import argparse
import fcntl
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time

import report

ROOT = pathlib.Path(__file__).resolve().parent.parent
FORMAT = 1  # of the step records; a change makes every step run again

# Flags of the steps beyond the programs' own defaults; docs/training.md says what each buys.
CONVERT_FLAGS = ["--calibrate"]
# Most of the steps look at windows as long as the model's context: what is far back is learnt only there. Fewer steps than
# the program's defaults: held-out recall hardly moves after the first hundred.
TRAIN_FLAGS = ["--steps", "200,12", "--cache-windows", "8", "--long-windows", "4", "--long-share", "0.6",
               "--sparse-cache-windows", "3", "--retrieval-share", "0.5", "--cache-mib", "6144", "--probe-every", "40"]

# A machine that is clearly slower (by the seconds that conversion took) trains less, and evaluation takes as many windows
# as the seconds of training leave room for: the whole is to end within a quarter of an hour.
SLOW_CONVERSION = 30
SLOW_TRAIN_FLAGS = ["--steps", "160,12", "--cache-windows", "4", "--long-windows", "3", "--long-share", "0.7",
                    "--sparse-cache-windows", "2", "--retrieval-share", "0.5", "--cache-mib", "6144", "--probe-every", "40"]
WINDOWS_BY_TRAINING = [(250, 3), (275, 2)]

# What the long document is made of by default: a licence text, which every Debian machine has.
DOCUMENT_SOURCES = [pathlib.Path("/usr/share/common-licenses/GPL-3")]
QUESTION = "Where will the harbour committee meet, according to the text?"
FACT = "\n\nNotice: the harbour committee will meet at the old lighthouse on Thursday evening.\n\n"


class StepFailed(Exception):
    """A step's command ended with an error; the message says which."""


def fingerprint(*parts):
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:16]


def write_atomic(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


class Job:
    """Runs steps in order and remembers what finished."""

    def __init__(self, options):
        self.options = options
        self.out = options.out.resolve()
        self.steps = self.out / "steps"
        self.steps.mkdir(parents=True, exist_ok=True)
        self.key = ""  # fingerprint of everything done so far
        self.records = {}
        self.number = 0

    def step(self, name, title, command, outputs=()):
        """Runs `command` (its stdout is one JSON object, or text) unless its record is there. Returns the record."""
        self.number += 1
        self.key = fingerprint(self.key, name, [str(part) for part in command])
        path = self.steps / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            if record["key"] == self.key and all((self.out / output).exists() for output in outputs):
                print(f"[{self.number}] {title}: done before, {record['seconds']:.0f} s", flush=True)
                self.records[name] = record
                return record
        print(f"[{self.number}] {title}", flush=True)
        start = time.monotonic()
        child = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=ROOT)
        try:
            stdout = self.echo(child, name == "generate")
            status = child.wait()
        except KeyboardInterrupt:
            child.wait()  # it got the signal too: it checkpoints and ends
            raise
        if status != 0:
            raise StepFailed(f"step '{name}' ended with exit code {status}: {' '.join(map(str, command))}")
        record = {"key": self.key, "seconds": time.monotonic() - start, "output": stdout}
        write_atomic(path, json.dumps(record))
        self.records[name] = record
        return record

    @staticmethod
    def echo(child, show):
        """Collects the child's stdout; shows it as it comes when it is text for people."""
        pieces = []
        while piece := os.read(child.stdout.fileno(), 4096):
            pieces.append(piece)
            if show:
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
        return b"".join(pieces).decode(errors="replace")

    def forget(self, name):
        """Makes the next run take up this step again."""
        (self.steps / f"{name}.json").unlink(missing_ok=True)

    def result(self, name):
        return json.loads(self.records[name]["output"])


def make_document(out, data, characters):
    """A long document of ordinary text with one sentence, a third of the way in, that the question asks for."""
    text, paths = "", [pathlib.Path(data)] if data else DOCUMENT_SOURCES
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if len(text) < characters and file.is_file():
                text += file.read_bytes()[: 4 * characters].decode(errors="replace") + "\n"
    text = text[:characters]
    place = text.rfind("\n", 0, len(text) // 3) + 1
    prompt = f"{text[:place]}{FACT}{text[place:]}\n\n{QUESTION}"
    path = out / "document.txt"
    if not path.exists() or path.read_text() != prompt:
        write_atomic(path, prompt)
    return path


def read_curve(path):
    """The training log, one JSON object a line; a line cut short by a crash is left out."""
    curve = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                curve.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return curve


def lock(out):
    """Two jobs in one folder would write over each other: the second one is refused."""
    stream = (out / ".lock").open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StepFailed(f"another main job is running in {out}; give this one another folder: make run OUT=...") from None
    return stream


def run_steps(job, options):
    """All steps up to the report."""
    msa, out = ROOT / "build/bin/msa", job.out
    base, initial, model = options.model or out / "model", out / "msa-untrained", out / "msa"
    data = ["--data", options.data] if options.data else []

    if not options.model:
        job.step("import", "Import SmolLM2-135M-Instruct from its GGUF file",
                 [sys.executable, ROOT / "python/msa/import_gguf.py", "--out", base], ["model/model.safetensors"])
    job.step("convert", "Convert: an index branch for every layer, block budget a layer",
             [msa, "convert", "--from", base, "--out", initial, "--block-size", options.block_size, "--topk", options.topk,
              "--force", "--json", *(["--calibration-data", options.data] if options.data else []), *CONVERT_FLAGS],
             ["msa-untrained/config.json"])
    is_slow = job.records["convert"]["seconds"] > SLOW_CONVERSION
    train_flags = options.train_flags or (SLOW_TRAIN_FLAGS if is_slow else TRAIN_FLAGS)
    job.step("train", "Train the index branch: warmup, then sparse; the backbone is frozen",
             [msa, "train", "--model", initial, "--out", model, "--stage", "warmup,sparse", "--freeze-backbone", "--json",
              *data, *train_flags],
             ["msa/config.json"])
    if not job.result("train")["finished"]:
        job.forget("train")
        raise KeyboardInterrupt
    fitting = [n for limit, n in WINDOWS_BY_TRAINING if job.records["train"]["seconds"] <= limit and not is_slow]
    windows = options.windows or max(fitting, default=1)
    job.step("eval", f"Evaluate at {options.context} tokens: dense, MSA at 1/4 and 1/8, and two baselines at 1/8",
             [msa, "eval", "--model", model, "--baseline", initial, "--context", options.context, "--windows", windows,
              "--attention", "dense,sparse@1/4,sparse@1/8,window@1/8,oracle@1/8", "--maps", out / "maps.json",
              "--map-layers", options.map_layers, "--json", *data],
             ["maps.json"])
    document = make_document(out, options.data, options.document_characters)
    job.step("generate", f"Answer a question about a document of {document.stat().st_size // 1000} KB, sparse prefill and decode",
             [msa, "generate", "--model", model, "--prompt-file", document, "--chat", "--max-tokens", 48])
    lengths = ",".join(map(str, options.passkey_lengths))
    job.step("passkey", f"Passkey retrieval at {lengths} tokens, dense and MSA",
             [msa, "eval", "--model", model, "--tasks", "passkey", "--lengths", lengths, "--trials", options.trials,
              "--attention", "dense,sparse", "--json", *data])


def collect(job, options):
    """out/summary.json: the figures of all steps under the names that readers rely on."""
    evaluation, passkey = job.result("eval"), job.result("passkey")
    names = {"dense": "dense", "sparse@1/4": "sparse_1_4", "sparse@1/8": "sparse_1_8", "window@1/8": "window_1_8",
             "oracle@1/8": "oracle_1_8"}
    perplexity = {name: evaluation["modes"][mode]["perplexity"] for mode, name in names.items()}
    perplexity |= {f"{name}_last1024": evaluation["modes"][mode]["perplexity_last1024"] for mode, name in names.items()}
    recall = evaluation["recalls"]["sparse@1/8"]
    speed = {f"prefill_{key}": evaluation["modes"][mode]["tokens_per_second"]
             for key, mode in (("dense", "dense"), ("sparse", "sparse@1/8"))}
    speed |= {key: value for key, value in passkey["tokens_per_second"].items() if key.startswith("decode_")}
    attention = {f"prefill_{key}": evaluation["modes"][mode]["attention_ms_per_token"]
                 for key, mode in (("dense", "dense"), ("sparse", "sparse@1/8"))}
    attention |= passkey["attention_ms_per_token"]
    return {
        "model": "SmolLM2-135M-Instruct" if not options.model else options.model.name,
        "context": options.context,
        "windows": len(evaluation["modes"]["dense"]["window_losses"]),
        "perplexity": perplexity,
        "recall": {"block": recall["block"], "score": recall["score"], "block_untrained": recall["untrained"]["block"],
                   "score_untrained": recall["untrained"]["score"]},
        "passkey": passkey["passkey"],
        "tokens_per_second": speed,
        "attention_ms_per_token": attention,
        "seconds": {name: round(record["seconds"], 1) for name, record in job.records.items()},
    }


def print_summary(summary):
    """The table that people read; the same figures stand in the report."""

    def show(header, rows, widths):
        for row in [header, *rows]:
            print("  " + "".join(str(cell).ljust(w) if i == 0 else str(cell).rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
        print()

    windows = "one held-out window" if summary["windows"] == 1 else f"{summary['windows']} held-out windows"
    print(f"\n{summary['model']} at {summary['context']} tokens, {windows}\n")
    show(["perplexity", "all", "÷ dense", "last 1024", "÷ dense"], report.perplexity_rows(summary["perplexity"]), [38, 10, 10, 11, 10])
    recall = summary["recall"]
    show(["recall of the index at 1/8", "block", "score"],
         [["untrained", report.number(recall["block_untrained"]), report.number(recall["score_untrained"])],
          ["trained", report.number(recall["block"]), report.number(recall["score"])]], [38, 10, 10])
    header, rows = report.passkey_rows(summary["passkey"])
    show(["passkey retrieval", *header[1:]], rows, [24, *[14] * (len(header) - 1)])
    show(["speed", "dense tok/s", "MSA tok/s", "dense attn", "MSA attn", "ratio"],
         report.speed_rows(summary["tokens_per_second"], summary["attention_ms_per_token"]), [16, 14, 12, 13, 12, 9])
    print("  (attention in milliseconds a token)")
    print(f"  {sum(summary['seconds'].values()):.0f} s in all: "
          + ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds"].items()))


def write_report(job, options):
    out = job.out
    summary = collect(job, options)
    curve = read_curve(out / "msa/train.jsonl")
    maps = json.loads((out / "maps.json").read_text())["maps"]
    write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_atomic(out / "report.html", report.render(summary, curve, maps, f"{QUESTION}\n\n{job.records['generate']['output'].strip()}"))
    print_summary(summary)
    print(f"\nreport: {out / 'report.html'}\nsummary: {out / 'summary.json'}")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="where everything goes (default: out)")
    parser.add_argument("--data", help="text file or folder to train and measure on (default: manuals on this machine)")
    parser.add_argument("--model", type=pathlib.Path, help="dense checkpoint to start from, in place of the import")
    parser.add_argument("--context", type=int, default=8192, help="tokens of an evaluation window")
    parser.add_argument("--windows", type=int, help="evaluation windows (default: 1 to 3, as the machine's speed allows)")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--topk", type=int, default=16)
    parser.add_argument("--passkey-lengths", type=lambda text: [int(n) for n in text.split(",")], default=[2048, 4096, 8192])
    parser.add_argument("--trials", type=int, default=10, help="passkey trials a length")
    parser.add_argument("--document-characters", type=int, default=16000)
    parser.add_argument("--map-layers", default="0,7,15,23", help="layers whose selections the report shows")
    parser.add_argument("--train-flags", type=str.split,
                        help="flags of msa train in place of the job's own, one string")
    options = parser.parse_args()
    if options.data and not pathlib.Path(options.data).exists():
        parser.error(f"--data: {options.data} does not exist")
    return options


def main():
    options = parse_options()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        held = lock(options.out)
        job = Job(options)
        run_steps(job, options)
        write_report(job, options)
        held.close()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from here", file=sys.stderr)
        return 130
    except (StepFailed, OSError) as error:
        print(f"\nmain job: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
