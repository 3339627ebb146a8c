# SPDX-License-Identifier: Apache-2.0
"""A tiny random Llama checkpoint with a byte-level tokenizer, for the tests that run the program `msa`."""

import json
import os
import pathlib

import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
MSA = pathlib.Path(os.environ.get("MSA_PROGRAM", ROOT / "build/bin/msa"))

# The model is tiny: a second thread costs more than it brings.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def bytes_to_characters():
    """GPT-2's printable character of each byte."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {}, 0
    for byte in range(256):
        if byte in keep:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(256 + extra)
            extra += 1
    return table


def write_tokenizer(directory):
    characters = bytes_to_characters()
    vocabulary = {characters[byte]: byte for byte in range(256)}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = [
        {"id": 256 + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, t in enumerate(special)
    ]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 260,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "initializer_range": 0.15, "eos_token_id": 258,
}


def write_checkpoint(directory, **changes):
    """A dense checkpoint in a new `directory`; `changes` to CONFIG may not change a shape."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    write_tokenizer(directory)
    generator = torch.Generator().manual_seed(1)
    shapes = {"model.embed_tokens.weight": (260, 32)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (64, 32), prefix + "self_attn.k_proj.weight": (32, 32),
            prefix + "self_attn.v_proj.weight": (32, 32), prefix + "self_attn.o_proj.weight": (32, 64),
            prefix + "mlp.gate_proj.weight": (64, 32), prefix + "mlp.up_proj.weight": (64, 32), prefix + "mlp.down_proj.weight": (32, 64),
        }
    tensors = {name: torch.randn(shape, generator=generator) * 0.15 for name, shape in shapes.items()}
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(32)
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
