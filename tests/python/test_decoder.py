# SPDX-License-Identifier: Apache-2.0
"""`msa logits` against the transformers package, on tiny random checkpoints of every family the decoder runs."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM3VLForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig

transformers.logging.set_verbosity_error()
PROGRAM = os.environ.get("MSA_PROGRAM", str(Path(__file__).parents[2] / "build" / "bin" / "msa"))
VOCAB = 307  # neither even nor a multiple of anything
TOLERANCE = 1e-3  # of the largest logit

BASE = dict(
    vocab_size=VOCAB,
    intermediate_size=112,
    num_hidden_layers=3,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)

DENSE_MODELS = {
    "llama_odd_heads_tied": lambda: LlamaForCausalLM(
        LlamaConfig(
            **BASE, hidden_size=144, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True
        )
    ),
    "llama_biases": lambda: LlamaForCausalLM(
        LlamaConfig(
            **BASE,
            hidden_size=80,
            num_attention_heads=5,
            num_key_value_heads=5,
            attention_bias=True,
            mlp_bias=True,
        )
    ),
    "llama3_rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **BASE,
            hidden_size=80,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rope_parameters=LLAMA3_ROPE,
        )
    ),
    "llama_linear_rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **BASE,
            hidden_size=96,
            num_attention_heads=6,
            num_key_value_heads=1,
            head_dim=16,
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.5),
        )
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(
            **BASE, hidden_size=80, num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=None
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**BASE, hidden_size=80, num_attention_heads=5, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**BASE, hidden_size=56, num_attention_heads=7, num_key_value_heads=7, head_dim=48)
    ),
}


def randomise(model):
    """Fresh models have unit norms and zero biases, which would hide a tensor that is not read."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in list(model.parameters()) + list(model.buffers()):
            if not tensor.is_floating_point() or tensor.ndim == 0:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.add_(0.2 * noise)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    if hasattr(model.model, "rotary_emb"):  # its buffers are computed, not stored
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval()


def run_logits(directory, tokens, *options):
    directory = Path(directory)
    tokens_file, out = directory / "tokens.txt", directory / "logits.safetensors"
    tokens_file.write_text(" ".join(map(str, tokens)) + "\n")
    command = [PROGRAM, "logits", "--model", directory, "--tokens", tokens_file, "--out", out, *options]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return load_file(out)["logits"]


def make_tokens(count, seed=3):
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def assert_close(ours, theirs, tolerance=TOLERANCE):
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    error = (ours - theirs).abs().max().item() / theirs.abs().max().item()
    assert error <= tolerance, f"off by {error:.2e} of the largest logit"


@pytest.mark.parametrize("name", DENSE_MODELS)
def test_dense_families_equal_transformers(name, tmp_path):
    torch.manual_seed(0)
    model = randomise(DENSE_MODELS[name]())
    model.save_pretrained(tmp_path)
    tokens = make_tokens(150)
    assert_close(run_logits(tmp_path, tokens), expected_logits(model, tokens))


@pytest.mark.parametrize("chunk", [0, 1, 7, 64, 1000])
def test_chunking_does_not_change_the_logits(chunk, tmp_path):
    torch.manual_seed(0)
    model = randomise(DENSE_MODELS["llama_odd_heads_tied"]())
    model.save_pretrained(tmp_path)
    tokens = make_tokens(130)
    assert_close(run_logits(tmp_path, tokens, "--chunk", chunk), expected_logits(model, tokens))


def test_sharded_bfloat16_files(tmp_path):
    torch.manual_seed(0)
    model = randomise(DENSE_MODELS["qwen3"]()).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = make_tokens(90)
    exact = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(run_logits(tmp_path, tokens), expected_logits(exact, tokens))


def test_bfloat16_computation_is_as_good_as_transformers(tmp_path):
    """Both round to bfloat16 in their own places; ours must not be further from float32 than twice theirs."""
    torch.manual_seed(0)
    randomise(DENSE_MODELS["llama3_rope"]()).to(torch.bfloat16).save_pretrained(tmp_path)
    tokens = make_tokens(90)
    ours = run_logits(tmp_path, tokens, "--dtype", "bfloat16")
    theirs = expected_logits(LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), tokens)
    exact = expected_logits(LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), tokens)
    rms = lambda error: error.pow(2).mean().sqrt().item()
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


def make_m3(**changes):
    config = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        num_experts_per_tok=2,
        num_local_experts=5,
        dense_intermediate_size=96,
        shared_intermediate_size=40,
        routed_scaling_factor=1.7,
        rotary_dim=16,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "full_attention"],
        index_n_heads=2,
        index_head_dim=32,
        index_block_size=16,
        index_topk_blocks=3,
        index_local_blocks=1,
        swiglu_limit=1.5,  # low enough to clamp
        bos_token_id=1,
        eos_token_id=2,
    )
    config.update(changes)
    torch.manual_seed(0)
    return randomise(MiniMaxM3VLForCausalLM(MiniMaxM3VLTextConfig(**config)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(index_topk_blocks=2, index_local_blocks=2, tie_word_embeddings=True),
        dict(index_block_size=32, index_head_dim=48, index_topk_blocks=4),
        dict(num_attention_heads=3, num_key_value_heads=3, index_n_heads=3, head_dim=16, rotary_dim=16,
             rope_parameters=dict(rope_type="default", rope_theta=5e6, partial_rotary_factor=1.0)),
    ],
    ids=["base", "two_local_blocks_tied", "wider_index", "no_groups_full_rotary"],
)
def test_minimax_m3_equals_transformers(changes, tmp_path):
    model = make_m3(**changes)
    model.save_pretrained(tmp_path)
    tokens = make_tokens(300)
    theirs = expected_logits(model, tokens)
    ours = run_logits(tmp_path, tokens)
    assert_close(ours, theirs)
    assert_close(run_logits(tmp_path, tokens, "--chunk", 0), theirs)
    # The comparison says something only where selection matters.
    dense = run_logits(tmp_path, tokens, "--attention", "dense")
    assert (dense - theirs).abs().max() > 10 * TOLERANCE * theirs.abs().max()


def published_names(state, experts):
    """The tensors of the published checkpoint: one matrix an expert, gate and up apart, index_* names."""
    out = {}
    for name, tensor in state.items():
        name = name.replace("model.", "language_model.model.", 1) if name.startswith("model.") else "language_model." + name
        name = name.replace(".self_attn.indexer.", ".self_attn.index_")
        if ".mlp.experts.gate_up_proj" in name:
            stem = name.replace(".mlp.experts.gate_up_proj", ".block_sparse_moe.experts.")
            for expert in range(experts):
                gate, up = tensor[expert].chunk(2, 0)
                out[f"{stem}{expert}.w1.weight"], out[f"{stem}{expert}.w3.weight"] = gate, up
        elif ".mlp.experts.down_proj" in name:
            stem = name.replace(".mlp.experts.down_proj", ".block_sparse_moe.experts.")
            for expert in range(experts):
                out[f"{stem}{expert}.w2.weight"] = tensor[expert]
        elif name.endswith("gate_up_proj.weight"):
            stem = name.removesuffix("gate_up_proj.weight").replace(".mlp.shared_experts.", ".block_sparse_moe.shared_experts.")
            out[stem + "gate_proj.weight"], out[stem + "up_proj.weight"] = tensor.chunk(2, 0)
        else:
            name = name.replace(".mlp.gate.e_score_correction_bias", ".block_sparse_moe.e_score_correction_bias")
            name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
            name = name.replace(".mlp.shared_experts.", ".block_sparse_moe.shared_experts.")
            out[name] = tensor
    return {name: tensor.contiguous() for name, tensor in out.items()}


def test_minimax_m3_published_names(tmp_path):
    model = make_m3()
    model.save_pretrained(tmp_path)
    tokens = make_tokens(200)
    expected = expected_logits(model, tokens)
    tensors = published_names(load_file(tmp_path / "model.safetensors"), 5)
    tensors["vision_tower.vision_model.pre_layrnorm.weight"] = torch.zeros(3)  # other parts of the model are passed over
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_close(run_logits(tmp_path, tokens), expected)


def naive_sparse_logits(model, index, tokens, block, topk, tiles):
    """A Llama model whose attention is masked to the index branch's choice, by hand (SPEC sections 2 and 3)."""
    config, n = model.config, len(tokens)
    positions = torch.arange(n)[None]
    hidden = model.model.embed_tokens(torch.tensor([tokens]))
    cos, sin = model.model.rotary_emb(hidden, positions)

    def rotate(x):  # [heads, n, head_dim]
        half = x.shape[-1] // 2
        return x * cos[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[0]

    causal = torch.ones(n, n, dtype=torch.bool).tril()
    block_of = torch.arange(n) // block
    for i, layer in enumerate(model.model.layers):
        x = layer.input_layernorm(hidden)[0]
        attention, d = layer.self_attn, config.head_dim
        q, k, v = (p(x).view(n, -1, d).transpose(0, 1) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = rotate(q), rotate(k)
        q_idx = (x @ index[i]["q"].T).view(n, config.num_key_value_heads, tiles, d)
        k_idx = (x @ index[i]["k"].T).view(n, 1, tiles, d)
        q_idx, k_idx = (rotate(t.permute(1, 2, 0, 3)).transpose(1, 2).flatten(-2) for t in (q_idx, k_idx))
        scores = (q_idx @ k_idx.transpose(-1, -2)).masked_fill(~causal, float("-inf"))
        blocks = -(-n // block)
        padded = torch.nn.functional.pad(scores, (0, blocks * block - n), value=float("-inf"))
        best = padded.view(-1, n, blocks, block).amax(-1)
        best[:, torch.arange(n), block_of] = float("inf")
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(min(topk, blocks), -1).indices, True)
        keep = (chosen[..., block_of] & causal).repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 0)
        group = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        weights = (q @ k.transpose(-1, -2) * d**-0.5).masked_fill(~keep, float("-inf")).softmax(-1)
        hidden = hidden + attention.o_proj((weights @ v).transpose(0, 1).reshape(1, n, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))[0]


@pytest.mark.parametrize("tiles", [1, 2])
def test_llama_with_an_index_branch(tiles, tmp_path):
    torch.manual_seed(0)
    model = randomise(DENSE_MODELS["llama_odd_heads_tied"]())
    model.save_pretrained(tmp_path)
    block, topk, dim = 16, 3, 16 * tiles
    generator = torch.Generator().manual_seed(5)
    index = [
        {"q": torch.randn(3 * dim, 144, generator=generator), "k": torch.randn(dim, 144, generator=generator)}
        for _ in range(3)
    ]
    tensors = load_file(tmp_path / "model.safetensors")
    for i, branch in enumerate(index):
        tensors[f"model.layers.{i}.self_attn.indexer.q_proj.weight"] = branch["q"]
        tensors[f"model.layers.{i}.self_attn.indexer.k_proj.weight"] = branch["k"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= dict(
        index_n_heads=3,
        index_head_dim=dim,
        index_block_size=block,
        index_topk_blocks=[topk, topk, topk],
        index_local_blocks=1,
        index_rope_tiles=tiles,
        layer_types=["minimax_m3_sparse"] * 3,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = make_tokens(200)
    with torch.no_grad():
        theirs = naive_sparse_logits(model, index, tokens, block, topk, tiles)
    assert_close(run_logits(tmp_path, tokens), theirs)
    assert_close(run_logits(tmp_path, tokens, "--attention", "dense"), expected_logits(model, tokens))
    # A budget of everything is dense attention, and a window is neither.
    assert_close(run_logits(tmp_path, tokens, "--topk", 13), expected_logits(model, tokens))
    window = run_logits(tmp_path, tokens, "--attention", "window")
    assert (window - theirs).abs().max() > 10 * TOLERANCE * theirs.abs().max()
    assert_close(window[: topk * block], expected_logits(model, tokens)[: topk * block])


def fails_with(directory, *words):
    tokens = Path(directory) / "tokens.txt"
    tokens.write_text("1 2 3")
    command = [PROGRAM, "logits", "--model", str(directory), "--tokens", str(tokens), "--out", str(tokens) + ".out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def test_broken_checkpoints_are_named(tmp_path):
    torch.manual_seed(0)
    model = DENSE_MODELS["llama_odd_heads_tied"]()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    missing = {name: tensor for name, tensor in whole.items() if name != "model.layers.1.mlp.up_proj.weight"}
    save_file(missing, file)
    fails_with(tmp_path, "model.layers.1.mlp.up_proj.weight", "missing")
    save_file(whole | {"model.layers.0.self_attn.k_proj.weight": torch.zeros(47, 144)}, file)
    fails_with(tmp_path, "model.layers.0.self_attn.k_proj.weight", "[47, 144]", "[48, 144]")
    save_file(whole | {"model.layers.0.self_attn.q_norm.weight": torch.zeros(16)}, file)
    fails_with(tmp_path, "model.layers.0.self_attn.q_norm.weight", "not known")
    save_file(whole | {"model.norm.weight": torch.zeros(144, dtype=torch.int32)}, file)
    fails_with(tmp_path, "model.norm.weight", "I32")


def test_token_ids_are_checked(tmp_path):
    torch.manual_seed(0)
    DENSE_MODELS["llama_odd_heads_tied"]().save_pretrained(tmp_path)
    tokens = tmp_path / "tokens.txt"
    for text, word in [(f"1 {VOCAB}", str(VOCAB)), ("1 -1", "-1"), ("1 x", "entry 1"), ("", "no token")]:
        tokens.write_text(text)
        command = [PROGRAM, "logits", "--model", tmp_path, "--tokens", tokens, "--out", tmp_path / "out.safetensors"]
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert result.returncode == 1 and word in result.stderr, result.stderr
