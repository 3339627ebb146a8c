# SPDX-License-Identifier: Apache-2.0
"""The layer of msa.nn and the example that trains one."""

import os
import re
import subprocess
import sys

import msa
import pytest
import torch
from msa.nn import SparseAttention


def make_layer(**options):
    torch.manual_seed(0)
    arguments = {"block_size": 16, "topk": 2, **options}
    return SparseAttention(64, query_heads=4, kv_heads=2, **arguments)


def is_index(name):
    return name.startswith("indexer.")


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_kl_trains_the_index_branch_and_nothing_else(stage):
    layer = make_layer(stage=stage, index_norm=True, qk_norm=True, bias=True)
    x = torch.randn(2, 50, 64, requires_grad=True)
    output, kl, recall = layer(x)
    assert output.shape == x.shape and recall is None
    kl.backward(retain_graph=True)
    assert x.grad is None
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == is_index(name), name
    layer.zero_grad()
    output.square().sum().backward()
    assert x.grad.abs().sum() > 0
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == is_index(name), name


def test_without_detach_the_kl_reaches_the_input():
    x = torch.randn(1, 50, 64, requires_grad=True)
    make_layer(detach_index_input=False)(x).kl.backward()
    assert x.grad.abs().sum() > 0


def test_batch_and_packed_agree():
    layer = make_layer()
    x = torch.randn(3, 40, 64)
    packed, kl, _ = layer(x.reshape(120, 64), torch.tensor([0, 40, 80, 120], dtype=torch.int32))
    batch = layer(x)
    assert torch.equal(batch.output.reshape(120, 64), packed) and torch.equal(batch.kl, kl)
    alone = layer(x[1]).output  # one sequence: positions start again at 0
    torch.testing.assert_close(alone, batch.output[1])


def test_padding_behind_the_last_sequence():
    layer = make_layer()
    x = torch.randn(60, 64)
    cu = torch.tensor([0, 20, 50], dtype=torch.int32)
    padded, kl, _ = layer(x, cu)
    plain = layer(x[:50], cu)
    torch.testing.assert_close(padded[:50], plain.output)
    torch.testing.assert_close(kl, plain.kl)
    assert padded[50:].abs().max() == 0


def test_enough_blocks_make_sparse_equal_warmup():
    layer = make_layer(topk=4)
    x = torch.randn(1, 64, 64)
    warmup, sparse = layer(x, stage="warmup"), layer(x, stage="sparse")
    torch.testing.assert_close(warmup.output, sparse.output)
    torch.testing.assert_close(warmup.kl, sparse.kl)
    assert not torch.allclose(layer(x, topk=1).output, sparse.output)


def test_causal():
    layer = make_layer().eval()
    x = torch.randn(1, 60, 64)
    changed = x.clone()
    changed[:, 37:] += 1
    assert torch.equal(layer(x).output[:, :37], layer(changed).output[:, :37])


def test_eval_computes_no_kl_unless_asked():
    layer = make_layer().eval()
    x = torch.randn(1, 40, 64)
    assert layer(x).kl is None and layer(x, with_kl=True).kl is not None
    block, score = layer(x, with_recall=True, stage="warmup").recall
    assert 0 <= block <= 1 and 0 <= score <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ablations", [{}, {"index_value_dim": 32, "attention_sink": True}])
def test_low_precision_and_autocast(dtype, ablations):
    x = torch.randn(1, 40, 64)
    output, kl, _ = make_layer(dtype=dtype, index_norm=True, qk_norm=True, **ablations)(x.to(dtype))
    assert output.dtype == dtype and kl.dtype == torch.float32
    layer = make_layer(index_norm=True, qk_norm=True, **ablations)
    with torch.autocast("cpu", dtype):
        output, kl, _ = layer(x)
    assert output.dtype == dtype
    (output.float().square().sum() + kl).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("ablations", [{}, {"index_value_dim": 32, "attention_sink": True}])
def test_compiles(ablations):
    torch._dynamo.reset()
    layer = make_layer(**ablations)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 40, 64)
    expected, got = layer(x), compiled(x)
    torch.testing.assert_close(got.output, expected.output)
    got.kl.backward()
    assert layer.indexer.q_proj.weight.grad.abs().sum() > 0


def test_switches_reach_the_operators():
    x = torch.randn(1, 64, 64)
    plain = make_layer(topk=2).eval()(x).output
    for switch in ({"local_blocks": 2}, {"init_blocks": 1}, {"rotary_dim": 0}, {"rotary_dim": 8}, {"rope_theta": 10.0}):
        assert not torch.equal(make_layer(**switch).eval()(x).output, plain), switch
    assert not torch.equal(make_layer(teacher="max")(x).kl, make_layer()(x).kl)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"query_heads": 3, "kv_heads": 2}, "query_heads = 3"),
        ({"query_heads": 5, "kv_heads": 5}, "hidden_size = 64"),
        ({"query_heads": 8, "kv_heads": 8}, "head_dim = 8"),
        ({"query_heads": 4, "kv_heads": 2, "index_dim": 24}, "index_dim = 24"),
        ({"query_heads": 4, "kv_heads": 2, "rotary_dim": 3}, "rotary_dim = 3"),
        ({"query_heads": 4, "kv_heads": 2, "stage": "late"}, "late"),
        ({"query_heads": 4, "kv_heads": 2, "teacher": "median"}, "median"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseAttention(64, **arguments)


def test_bad_inputs():
    layer = make_layer()
    with pytest.raises(ValueError, match="x has shape"):
        layer(torch.zeros(2, 40, 63))
    with pytest.raises(ValueError, match="cu_seqlens"):
        layer(torch.zeros(2, 40, 64), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="topk"):
        layer(torch.zeros(2, 40, 64), topk=0)


def test_example_trains_a_layer(source_tree):
    environment = {**os.environ, "PYTHONPATH": str(source_tree / "python"), "MSA_LIBRARY": str(msa.library_path())}
    environment["OMP_NUM_THREADS"] = "1"  # tiny tensors: a busy machine would make a second thread wait, and wait for it
    command = [sys.executable, str(source_tree / "examples" / "train_layer.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"(warmup|sparse) +step +\d+ +loss +(\S+) +kl +(\S+) +block recall +(\S+) +score recall +(\S+)", done.stdout)
    assert {row[0] for row in rows} == {"warmup", "sparse"}
    first, last = rows[0], [row for row in rows if row[0] == "warmup"][-1]
    assert float(last[2]) < 0.7 * float(first[2])
    assert float(rows[-1][4]) > float(first[4])


def naive_output(layer, x, stage, blocks):
    """The layer's output on one sequence x [T, hidden] by the plain formulas, [queries, keys] tensors and all."""
    count = x.shape[0]
    rows = torch.arange(count)
    frequencies = layer._rope_theta ** -(torch.arange(0, layer._rotary_dim, 2, dtype=torch.float32) / layer._rotary_dim)

    def rope(t):
        return msa.nn.apply_rope(t, rows, frequencies)

    group = layer.query_heads // layer.kv_heads
    q = rope(layer.q_proj(x).unflatten(-1, (layer.query_heads, -1)))
    k = rope(layer.k_proj(x).unflatten(-1, (layer.kv_heads, -1))).repeat_interleave(group, 1)
    v = layer.v_proj(x).unflatten(-1, (layer.kv_heads, -1)).repeat_interleave(group, 1)
    sees = (rows[:, None] >= rows[None, :]).expand(layer.kv_heads, count, count)
    if stage == "sparse":
        chosen = torch.zeros(layer.kv_heads, count, count, dtype=torch.bool)
        for r in range(layer.kv_heads):
            for p in range(count):
                for block in blocks[r, p].tolist():
                    if block >= 0:
                        chosen[r, p, block * layer.block_size : (block + 1) * layer.block_size] = True
        sees = sees & chosen
    scores = torch.einsum("qhd,khd->hqk", q, k) / layer.head_dim**0.5
    scores = scores.masked_fill(~sees.repeat_interleave(group, 0), -torch.inf)
    if layer.sinks is not None:
        scores = torch.cat((scores, layer.sinks[:, None, None].expand(-1, count, 1)), -1)
    share = scores.softmax(-1)[..., :count]
    output = layer.o_proj(torch.einsum("hqk,khd->qhd", share, v).flatten(1))
    if layer.index_value_dim > 0:
        seen = x.detach() if layer.detach_index_input else x
        q_idx, k_idx = layer.indexer(seen, rows, frequencies)
        index = torch.einsum("qgd,kd->gqk", q_idx, k_idx) / layer.index_dim**0.5
        index = index.masked_fill(~sees, -torch.inf).softmax(-1)
        output = output + layer.indexer.o_proj(torch.einsum("gqk,kd->qgd", index, layer.indexer.v_proj(seen)).flatten(1))
    return output


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("ablations", [{"index_value_dim": 32}, {"attention_sink": True}, {"index_value_dim": 16, "attention_sink": True}])
def test_ablations_equal_the_naive_layer(stage, detach, ablations):
    layer = make_layer(stage=stage, detach_index_input=detach, index_dim=32, **ablations)
    if layer.sinks is not None:
        torch.nn.init.uniform_(layer.sinks, -1, 3)
    count = 70
    x = torch.randn(count, 64)
    rows, cu = torch.arange(count), torch.tensor([0, count], dtype=torch.int32)
    frequencies = layer._rope_theta ** -(torch.arange(0, layer._rotary_dim, 2, dtype=torch.float32) / layer._rotary_dim)
    q_idx, k_idx = layer.indexer(x, rows, frequencies)
    blocks = msa.select_blocks(q_idx, k_idx, cu, cu, 16, topk=2)
    direction, results = torch.randn(count, 64), []
    for forward in (lambda t: layer(t).output, lambda t: naive_output(layer, t, stage, blocks)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_(True)
        output = forward(leaf)
        (output * direction).sum().backward()
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        results.append((output.detach(), leaf.grad, gradients))
    (output, dx, gradients), (expected, expected_dx, expected_gradients) = results
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dx, expected_dx, atol=1e-4, rtol=1e-3)
    assert gradients.keys() == expected_gradients.keys()
    assert ("sinks" in gradients) == (layer.sinks is not None)
    assert ("indexer.v_proj.weight" in gradients) == (layer.index_value_dim > 0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-4, rtol=1e-3, msg=name)


def test_ablations_are_off_by_default():
    names = set(make_layer().state_dict())
    assert not any("sinks" in name or "indexer.v_proj" in name or "indexer.o_proj" in name for name in names)
    with pytest.raises(ValueError, match="index_value_dim = 24"):
        make_layer(index_value_dim=24)
