# SPDX-License-Identifier: Apache-2.0
"""The GGUF import on tiny files: names, shapes, row order, quantisation, tokenizer, atomicity and errors."""

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("import_gguf", ROOT / "python" / "msa" / "import_gguf.py")
import_gguf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(import_gguf)

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MIDDLE, LAYERS = 6, 2, 16, 96, 128, 2
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def byte_alphabet():
    """The 256 characters that byte-level BPE writes the bytes as."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in sorted(printable)] + [chr(256 + i) for i in range(len(rest))]


TOKENS = ["<|end|>", "<|start|>", *byte_alphabet(), "he", "ll", "hell", "hello", "Ġhello"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello"]


def permute_rows(weight, heads):
    """The row order that llama.cpp gives to q and k: rotary pairs (i, i + D/2) become neighbours."""
    dim = weight.shape[0] // heads
    half = dim // 2
    return weight[[h * dim + part * half + i for h in range(heads) for i in range(half) for part in range(2)]]


def make_weights(seed=0, output=False, layers=LAYERS):
    """Hugging Face name -> fp32 array of a tiny Llama."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (len(TOKENS), HIDDEN), "model.norm.weight": (HIDDEN,)}
    if output:
        shapes["lm_head.weight"] = (len(TOKENS), HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes[at + "self_attn.q_proj.weight"] = (HEADS * HEAD_DIM, HIDDEN)
        shapes[at + "self_attn.k_proj.weight"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        shapes[at + "self_attn.v_proj.weight"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        shapes[at + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[at + "mlp.gate_proj.weight"] = (MIDDLE, HIDDEN)
        shapes[at + "mlp.up_proj.weight"] = (MIDDLE, HIDDEN)
        shapes[at + "mlp.down_proj.weight"] = (HIDDEN, MIDDLE)
        shapes[at + "input_layernorm.weight"] = (HIDDEN,)
        shapes[at + "post_attention_layernorm.weight"] = (HIDDEN,)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.2 for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def to_gguf_name(name):
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.weight"
    return f"{GGUF_NAMES[stem]}.weight"


def write_gguf(path, weights, arch="llama", quant=None, edit=None, pre="smollm", metadata=(), tokens=TOKENS):
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    for key, value in metadata:
        writer.add_string(key, value)
    tensors = {to_gguf_name(name): value for name, value in weights.items()}
    for name, value in tensors.items():
        if ".attn_q." in name or ".attn_k." in name:
            tensors[name] = permute_rows(value, HEADS if ".attn_q." in name else KV_HEADS)
    if edit:
        edit(tensors)
    for name, value in tensors.items():
        if quant and value.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(value, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_safetensors(path):
    """A reader of its own, so that the writer is checked against the format and not against itself."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    result = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        kind = "<u2" if entry["dtype"] == "BF16" else "<f4"
        raw = np.frombuffer(data[8 + length + begin : 8 + length + end], kind)
        if entry["dtype"] == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        result[name] = raw.reshape(entry["shape"])
    return result


@pytest.mark.parametrize("output", [False, True])
def test_fp32_weights_come_back_bit_for_bit(tmp_path, output):
    weights = make_weights(output=output)
    file = write_gguf(tmp_path / "a.gguf", weights)
    assert import_gguf.import_gguf(tmp_path / "model", file)
    loaded = read_safetensors(tmp_path / "model" / "model.safetensors")
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["tie_word_embeddings"] is not output
    assert config["rope_theta"] == 50000.0 and config["rms_norm_eps"] == 1e-5
    heads = tuple(config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    assert heads == (HEADS, KV_HEADS, HEAD_DIM)


def test_unpermute_is_the_inverse_for_biases_and_odd_head_counts():
    for heads in (1, 3, 7):
        weight = np.arange(heads * 16 * 5, dtype=np.float32).reshape(heads * 16, 5)
        np.testing.assert_array_equal(import_gguf.unpermute_rows(permute_rows(weight, heads), heads), weight)
        bias = weight[:, 0]
        np.testing.assert_array_equal(import_gguf.unpermute_rows(permute_rows(bias, heads), heads), bias)


@pytest.mark.parametrize("quant", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_quantised_tensors_are_dequantised_then_unpermuted(tmp_path, quant):
    weights = make_weights(1)
    import_gguf.import_gguf(tmp_path / "model", write_gguf(tmp_path / "a.gguf", weights, quant=quant))
    loaded = read_safetensors(tmp_path / "model" / "model.safetensors")
    for name, value in weights.items():
        if value.ndim == 2:  # rows are quantised one by one, so permuting them commutes with it
            value = gguf.quants.dequantize(gguf.quants.quantize(value, quant), quant)
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)


def test_bf16_rounds_to_nearest_even(tmp_path):
    torch = pytest.importorskip("torch")
    special = np.float32([0, -0.0, np.inf, -np.inf, 1e-40])
    values = np.concatenate([np.random.default_rng(2).standard_normal(4096).astype(np.float32), special])
    expected = torch.from_numpy(values).bfloat16().float().numpy()

    def rounded(array):
        return (import_gguf.round_to_bf16(array).astype(np.uint32) << 16).view(np.float32)

    np.testing.assert_array_equal(rounded(values), expected)
    assert np.isnan(rounded(np.float32([np.nan]))).all()
    weights = make_weights(2)
    import_gguf.import_gguf(tmp_path / "model", write_gguf(tmp_path / "a.gguf", weights), "bf16")
    loaded = read_safetensors(tmp_path / "model" / "model.safetensors")
    for name, value in weights.items():
        expected = torch.from_numpy(value).bfloat16().float().numpy()
        np.testing.assert_array_equal(loaded[name], expected, err_msg=name)


def test_transformers_computes_the_logits_of_the_original_weights(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    weights = make_weights(3, output=True)
    import_gguf.import_gguf(tmp_path / "model", write_gguf(tmp_path / "a.gguf", weights))
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=len(TOKENS),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=False,
    )
    original = transformers.LlamaForCausalLM(config).eval()
    original.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    tokens = torch.arange(2, 42)[None]
    with torch.no_grad():
        a, b = ours(tokens).logits, original(tokens).logits
    assert b.abs().max() > 0.1
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
def test_tokenizer_splits_merges_and_returns_the_text(tmp_path, pre):
    tokenizers = pytest.importorskip("tokenizers")
    import_gguf.import_gguf(tmp_path / "model", write_gguf(tmp_path / "a.gguf", make_weights(), pre=pre))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    text = "<|start|>hello hello 2025\n\n  Grüße, 世界! <|end|>"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert [TOKENS[i] for i in ids[:3]] == ["<|start|>", "hello", "Ġhello"]
    assert ids[-1] == TOKENS.index("<|end|>")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE
    assert (config["bos_token"], config["eos_token"]) == ("<|start|>", "<|end|>")


def test_rerun_is_a_no_op_and_never_overwrites(tmp_path):
    file = write_gguf(tmp_path / "a.gguf", make_weights())
    said = []
    assert import_gguf.import_gguf(tmp_path / "model", file)
    stamp = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    assert not import_gguf.import_gguf(tmp_path / "model", file, log=said.append)
    assert "nothing to do" in said[0]
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(import_gguf.ImportFailure, match="is not this import"):
        import_gguf.import_gguf(tmp_path / "model", file, "bf16")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("x")
    with pytest.raises(import_gguf.ImportFailure, match="is not this import"):
        import_gguf.import_gguf(tmp_path / "other", file)
    assert (tmp_path / "other" / "precious").read_text() == "x"


def test_an_interrupted_import_leaves_no_directory_and_does_not_disturb_the_next(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "a.gguf", make_weights())
    with monkeypatch.context() as patch:
        patch.setattr(import_gguf, "unpermute_rows", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_gguf.import_gguf(tmp_path / "model", file)
    assert not (tmp_path / "model").exists()
    assert import_gguf.import_gguf(tmp_path / "model", file)
    assert not (tmp_path / "model.tmp").exists()


def drop(name):
    return lambda tensors: tensors.pop(name)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def narrow(name):
    return lambda tensors: tensors.update({name: tensors[name][:-32]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "mamba"}, "architecture mamba is not supported"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre tekken is not supported"),
        ({"metadata": [("llama.rope.scaling.type", "yarn")]}, r"rope scaling \(yarn\)"),
        ({"edit": drop("blk.1.ffn_up.weight")}, "missing, the first is model.layers.1.mlp.up_proj.weight"),
        ({"edit": rename("blk.1.ffn_up.weight", "blk.2.ffn_up.weight")}, "blk.2.ffn_up.weight has no place"),
        ({"edit": rename("output_norm.weight", "mystery.weight")}, "mystery.weight has no place"),
        ({"edit": narrow("blk.0.attn_k.weight")}, r"blk.0.attn_k.weight has shape \(0, 96\), not \(32, 96\)"),
        ({"tokens": [*TOKENS[:-1], TOKENS[-2]]}, "the same token twice"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(tmp_path, options, message):
    file = write_gguf(tmp_path / "a.gguf", make_weights(), **options)
    with pytest.raises(import_gguf.ImportFailure, match=message):
        import_gguf.import_gguf(tmp_path / "model", file)
    assert not (tmp_path / "model").exists()


def test_unsupported_tensor_types_are_named(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "a.gguf", make_weights(), quant=gguf.GGMLQuantizationType.Q8_0)

    def refuse(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    with pytest.raises(import_gguf.ImportFailure, match=r"type (Q8_0|F32) is not supported"):
        import_gguf.import_gguf(tmp_path / "model", file)
    assert not (tmp_path / "model").exists()


def test_files_that_are_not_there_not_gguf_or_cut_short(tmp_path):
    for name, content, message in (
        ("text.gguf", b"hello, this is text", "not a GGUF file"),
        ("empty.gguf", b"", "not a GGUF file"),
        ("short.gguf", b"GGUF\x03\x00", "damaged GGUF file"),
        ("wild.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60), "damaged GGUF file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(import_gguf.ImportFailure, match=message):
            import_gguf.import_gguf(tmp_path / "model", tmp_path / name)
    with pytest.raises(import_gguf.ImportFailure, match="no such file"):
        import_gguf.import_gguf(tmp_path / "model", tmp_path / "absent.gguf")
    whole = write_gguf(tmp_path / "whole.gguf", make_weights()).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(import_gguf.ImportFailure, match="cut.gguf"):
        import_gguf.import_gguf(tmp_path / "model", tmp_path / "cut.gguf")


def test_command_line_reports_and_returns_codes(tmp_path, capsys):
    file = write_gguf(tmp_path / "a.gguf", make_weights())
    assert import_gguf.main(["--out", str(tmp_path / "model"), "--gguf", str(file)]) == 0
    assert import_gguf.main(["--out", str(tmp_path / "m2"), "--gguf", str(tmp_path / "absent")]) == 1
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        import_gguf.main([])
    assert error.value.code == 2
