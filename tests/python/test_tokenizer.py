# SPDX-License-Identifier: Apache-2.0
"""Our tokenizer against the `tokenizers` package: equal ids and equal text, token for token.

Tokenizers are trained here on a small corpus with the pre-tokenizers that real models use, then run on more than a
megabyte of text made to be hard: code, many scripts, emoji, runs of white space, digits, control characters, combining
marks out of order, and special tokens inside the text. The program under test is msa_tokenize_tool.
"""

import json
import os
import pathlib
import random
import subprocess
import unicodedata

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOL = pathlib.Path(os.environ.get("MSA_BUILD_DIR", ROOT / "build")) / "bin" / "msa_tokenize_tool"

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def run_tool(arguments, data):
    assert TOOL.exists(), f"{TOOL} is not built"
    done = subprocess.run([TOOL, *map(str, arguments)], input=data, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def encode(path, text, *flags):
    return [int(word) for word in run_tool(["encode", path, *flags], text.encode()).split()]


def decode(path, ids, *flags):
    return run_tool(["decode", path, *flags], " ".join(map(str, ids)).encode())


def source_code():
    return "".join(path.read_text() for path in sorted(pathlib.Path(json.__file__).parent.glob("*.py")))


def hard_text(size, seed=0, specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "naïve")):
    """About `size` characters. Scripts stay within what Unicode 14 and 15 agree on."""
    rng = random.Random(seed)
    ranges = [(0x41, 0x7B), (0xA1, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x66A), (0x905, 0x970),
              (0xE01, 0xE3A), (0x10A0, 0x10FF), (0x1100, 0x11F9), (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x20A0, 0x20BF),
              (0x2150, 0x218B), (0x2460, 0x24FF), (0x3040, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFB00, 0xFB06),
              (0xFF01, 0xFF5E), (0x1D7CE, 0x1D7FF), (0x1F300, 0x1F64F), (0x1F900, 0x1F9FF), (0xE000, 0xE010)]
    spaces = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u180e\u2003\u200b\u2028\u202f\u205f\u3000\ufeff"
    words = source_code().split(" ")
    marks = [chr(code) for code in range(0x300, 0x36F)]
    pieces = []
    total = 0
    while total < size:
        kind = rng.randrange(12)
        if kind <= 3:
            piece = " ".join(rng.choices(words, k=rng.randrange(1, 30)))
        elif kind == 4:
            low, high = rng.choice(ranges)
            piece = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 20)))
        elif kind == 5:
            piece = "".join(rng.choices(spaces, k=rng.randrange(1, 8)))
        elif kind == 6:
            piece = rng.choice(" \n\t") * rng.choice([1, 2, 3, 16, 17, 100, 1000])
        elif kind == 7:
            piece = "".join(rng.choices("0123456789٣५", k=rng.randrange(1, 12)))
        elif kind == 8:
            piece = "".join(chr(rng.randrange(0x20)) for _ in range(3)) + "\x7f\x80\x9f"
        elif kind == 9:
            piece = rng.choice(["'s", "'S", "'T", "'Re", "'ſ", "don't", "I'LL", "''d", " 'm", "👩‍👩‍👧‍👦", "🏳️‍🌈", "e\u0301\u0327", "ﬁ", "Å"])
        elif kind == 10:
            piece = "".join(rng.choice("aeouk가각กकАa") + "".join(rng.choices(marks, k=rng.randrange(4))) for _ in range(8))
        else:
            piece = rng.choice(["", " ", "  ", "x", "\n"]) + rng.choice(specials) + rng.choice(["", " ", "  ", "x", "\n"])
        pieces.append(piece)
        total += len(piece)
    return "".join(pieces)


def train(pre_tokenizer, *, normalizer=None, vocab_size=3000, initial_alphabet=True, added=(), **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if initial_alphabet else []
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet)
    corpus = source_code() if not initial_alphabet else source_code() + hard_text(100_000, seed=7)
    tokenizer.train_from_iterator([corpus[i : i + 5000] for i in range(0, len(corpus), 5000)], trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), behavior, invert=invert)


def byte_level(use_regex=False, add_prefix_space=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def sequence(*steps):
    return pre_tokenizers.Sequence(list(steps))


def with_template(tokenizer):
    bos = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
    eos = ("<|im_end|>", tokenizer.token_to_id("<|im_end|>"))
    template = processors.TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=[bos, eos])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


STRIPPED = [AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False), AddedToken("na", single_word=True),
            AddedToken("nai\u0308ve", normalized=True), AddedToken("self", single_word=True, normalized=False)]

CASES = {
    "gpt2": lambda: train(byte_level(use_regex=True)),
    "gpt2_prefix_space": lambda: train(byte_level(use_regex=True, add_prefix_space=True), added=STRIPPED),
    "llama3": lambda: with_template(train(sequence(split(LLAMA3), byte_level()), ignore_merges=True)),
    "qwen": lambda: train(sequence(split(QWEN), byte_level()), normalizer=normalizers.NFC(), added=STRIPPED),
    "o200k": lambda: train(sequence(split(O200K), byte_level())),
    "smollm": lambda: train(sequence(pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True))),
    "deepseek": lambda: train(
        sequence(split(r"\p{N}{1,3}"), split(r"[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK), byte_level())),
    "digits_prefix": lambda: train(
        sequence(pre_tokenizers.Digits(individual_digits=False), byte_level(add_prefix_space=True))),
    "removed": lambda: train(sequence(split(r"\S+", "removed", invert=True), byte_level())),
    "merged": lambda: train(sequence(split(r"[\s,]", "merged_with_previous"), split(r"\w+", "merged_with_next"),
                                     pre_tokenizers.Split("(", "contiguous"), byte_level())),
    "unknown_fused": lambda: train(byte_level(), initial_alphabet=False, unk_token="<|endoftext|>", fuse_unk=True),
    "unknown": lambda: train(byte_level(), initial_alphabet=False, unk_token="<|endoftext|>"),
    "dropped": lambda: train(byte_level(), initial_alphabet=False),
}


def first_difference(ours, theirs):
    at = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
    return f"at {at}: ours {ours[at - 3 : at + 6]}, theirs {theirs[at - 3 : at + 6]}"


@pytest.mark.parametrize("case", CASES)
def test_equals_tokenizers(case, tmp_path):
    tokenizer = CASES[case]()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    # White space runs of one megabyte belong to one case; the others take a smaller share of the same kinds.
    texts = [hard_text(1_100_000 if case in ("qwen", "llama3") else 150_000, seed=len(case)), "", " ", "\n\n\n", "a",
             "  leading", "trailing  ", "<|im_start|>", "<|im_start|><|im_end|>x<|im_start|>", " <tool> <tool>  na self naïve"]
    for text in texts:
        theirs = tokenizer.encode(text).ids
        ours = encode(path, text)
        assert ours == theirs, first_difference(ours, theirs)
    ids = tokenizer.encode(texts[0]).ids[:50_000]
    for ids in (ids, ids[::-1]):  # backwards: most characters are broken
        for flags, skip in (([], False), (["--skip-special"], True)):
            expected = tokenizer.decode(ids, skip_special_tokens=skip).encode()
            assert decode(path, ids, *flags) == expected
            assert decode(path, ids, "--stream", *flags) == expected


def test_older_merge_form_and_options(tmp_path):
    tokenizer = with_template(train(sequence(split(LLAMA3), byte_level())))
    document = json.loads(tokenizer.to_str())
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    text = hard_text(50_000, seed=3)
    assert encode(path, text) == tokenizer.encode(text).ids
    assert encode(path, text, "--no-add-special") == tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = True
    assert encode(path, text, "--no-parse-special") == tokenizer.encode(text).ids


def test_broken_utf8_counts_as_replacement(tmp_path):
    tokenizer = train(byte_level(use_regex=True))
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    data = bytes(random.Random(5).choices(range(256), k=20_000))
    ids = [int(word) for word in run_tool(["encode", path], data).split()]
    assert ids == tokenizer.encode(data.decode(errors="replace")).ids


def test_long_runs_take_linear_time(tmp_path):
    tokenizer = train(sequence(split(QWEN), byte_level()))
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    for unit in (" ", "a", "\n", " \n", "=", "a1"):
        text = unit * (1_000_000 // len(unit))
        ids = encode(path, text)  # run_tool has a time limit
        assert decode(path, ids).decode() == text


def test_nfc_equals_unicodedata():
    rng = random.Random(11)
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    text = "\n".join(map(chr, codes))
    marks = [code for code in codes if unicodedata.combining(chr(code))]
    pairs = [code for code in codes if unicodedata.decomposition(chr(code))]
    jamo = [0x1100, 0x1161, 0x11A8, 0xAC00, 0x9C7, 0x9BE, 0x41]
    for _ in range(30_000):
        mixed = [chr(rng.choice(rng.choice([marks, pairs, jamo]))) for _ in range(rng.randrange(1, 7))]
        text += "\n" + "".join(mixed) + unicodedata.normalize("NFD", "".join(mixed))
    assert run_tool(["nfc"], text.encode()).decode() == unicodedata.normalize("NFC", text)
