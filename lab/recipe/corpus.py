# SPDX-License-Identifier: Apache-2.0
"""Ordinary text of a machine that can build this project, and synthetic retrieval documents.

The text comes from packages that the build itself needs: CMake's manual, the documentation of Perl's modules
and Python's library with the language reference. Whole documents are held out by a hash of their name, so the
split does not depend on the order of the file system.
"""

import ast
import glob
import hashlib
import random
import re
import sysconfig
from pathlib import Path


def _pod_of(text):
    """The documentation part of a Perl file: what stands between =head1 ... and =cut."""
    parts = re.findall(r"^=(?:head1|pod|encoding|over|item|head2)\b.*?(?=^=cut\b|\Z)", text, re.S | re.M)
    return "\n".join(parts)


def documents():
    """Yields (name, text) of every document, longest families first; at least 2 KB each."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    system = Path("/usr/lib/python3.11")
    stdlib = system if system.is_dir() else stdlib
    found = []
    for path in sorted(glob.glob("/usr/share/cmake*/Help/**/*.rst", recursive=True)):
        found.append((path, Path(path).read_text(errors="replace")))
    for path in sorted(glob.glob("/usr/share/perl/5.*/**/*.p[om]*", recursive=True)):
        if not Path(path).is_symlink() and "/perl/5.36/" not in path and "Collate" not in path:
            found.append((path, _pod_of(Path(path).read_text(errors="replace"))))
    topics = (stdlib / "pydoc_data" / "topics.py").read_text()
    for node in ast.walk(ast.parse(topics)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                found.append((f"python-topic/{ast.literal_eval(key)}", ast.literal_eval(value)))
    for path in sorted(glob.glob(f"{stdlib}/**/*.py", recursive=True)):
        if not any(part in path for part in ("/test", "pydoc_data", "-packages", "/encodings/")):
            found.append((path, Path(path).read_text(errors="replace")))
    return [(name, text) for name, text in found if len(text) >= 2048]


def held_out(name):
    """One document in eight is for evaluation only."""
    return hashlib.sha1(Path(name).name.encode()).digest()[0] % 8 == 0


def kind(name):
    return (
        "cmake" if "cmake" in name else "perl" if "/perl" in name else "topic" if "topic" in name else "code"
    )


def windows(
    tokenizer, length, count, seed, evaluation=False, whole=False, kinds=("cmake", "perl", "topic", "code")
):
    """`count` token windows of `length`: documents in random order, joined by the end-of-text token.

    whole: each window is the beginning of one document that is at least `length` long.
    """
    rng = random.Random(seed)
    docs = [doc for doc in documents() if held_out(doc[0]) == evaluation and kind(doc[0]) in kinds]
    rng.shuffle(docs)
    result, tokens = [], []
    for name, text in docs:
        if whole:
            if len(text) < 3 * length:
                continue
            ids = tokenizer.encode(text[: 8 * length]).ids
            if len(ids) >= length:
                result.append((name, ids[:length]))
        else:
            # a piece of at most two windows a document, from a random line, for variety
            start = rng.randrange(max(1, len(text) - 4 * length))
            start = text.find("\n", start) + 1 if start else 0
            tokens += tokenizer.encode(text[start : start + 4 * length]).ids + [0]
            while len(tokens) >= length and len(result) < count:
                result.append((name, tokens[:length]))
                tokens = tokens[length:]
        if len(result) >= count:
            break
    return result[:count]


WORDS = (
    "amber anchor apple arrow autumn badger bamboo basket beacon birch blossom bottle breeze "
    "bridge bronze butter cabin candle canyon carpet castle cedar cherry clover cobalt comet "
    "copper coral cotton crane crystal dagger daisy delta desert dragon eagle ember falcon "
    "feather fennel fiddle finch flint forest garnet ginger glacier granite hammer harbor hazel "
    "heron honey indigo island ivory jasmine jungle kettle lantern lemon lilac lotus magnet "
    "maple marble meadow mirror mosaic nectar needle nickel oasis olive orchid otter oyster "
    "paddle panther pebble pepper pigeon pine planet plum pocket quartz quill rabbit raven "
    "ribbon river rocket saddle saffron salmon silver sparrow spruce summit sunset temple "
    "thistle thunder tiger timber topaz tulip tunnel turtle valley velvet violet walnut willow "
    "window winter"
).split()


def _value(rng):
    style = rng.randrange(4)
    if style == 0:
        return str(rng.randrange(1000, 10 ** rng.randrange(4, 8)))
    if style == 1:
        return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(rng.randrange(5, 9)))
    if style == 2:
        return f"{rng.choice(WORDS)}-{rng.choice(WORDS)}-{rng.randrange(10, 999)}"
    return f"{rng.randrange(10, 99)}-{rng.randrange(100, 999)}-{rng.randrange(10, 99)}"


# (statement, question, answer): none of them shares words with the passkey evaluation
HEAD = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
TEMPLATES = (
    (
        "The locker number of {k} is {v}.",
        "Which locker number does {k} have?",
        "The locker number of {k} is {v}.",
    ),
    ("Invoice {k}: total {v}.", "What was the total of invoice {k}?", "Invoice {k}: total {v}."),
    ("{k} lives at extension {v}.", "Which extension do I dial for {k}?", "{k} lives at extension {v}."),
    ("config.{k} = {v}", "Which value does config.{k} have?", "config.{k} = {v}"),
    (
        "Note: shipment {k} carries the label {v}.",
        "What label is on shipment {k}?",
        "It carries the label {v}.",
    ),
    ("The plate of the {k} van reads {v}.", "What does the plate of the {k} van read?", "It reads {v}."),
)


def retrieval_document(tokenizer, length, rng, filler):
    """A chat of `length` tokens: filler with key-value lines, then questions and answers about some of them.

    filler: token ids of ordinary text, at least `length`. Returns (ids, first row of the tail of questions).
    """

    def encode(text):
        return tokenizer.encode(text).ids

    statement, question, answer = rng.choice(TEMPLATES)
    names = [rng.choice(WORDS) + (f" {rng.choice(WORDS)}" if rng.random() < 0.5 else "") for _ in range(12)]
    pairs = [(name, _value(rng)) for name in names]
    count = rng.choice((1, 2, 4, 8))
    lines = [encode("\n" + statement.format(k=k, v=v) + "\n") for k, v in pairs[:count]]
    asked = rng.sample(pairs[:count], min(count, 4))
    head, tail = encode(HEAD), []
    for turn, (k, v) in enumerate(asked):
        start = "\n\n" if turn == 0 else "<|im_start|>user\n"
        reply = f"<|im_end|>\n<|im_start|>assistant\n{answer.format(k=k, v=v)}<|im_end|>\n"
        tail += encode(start + question.format(k=k) + reply)
    room = length - len(head) - len(tail) - sum(map(len, lines))
    cuts = sorted(rng.randrange(room + 1) for _ in lines)
    body, last = [], 0
    for cut, line in zip(cuts, lines):
        body += filler[last:cut] + line
        last = cut
    body += filler[last:room]
    ids = head + body + tail
    return ids[:length], length - len(tail)
