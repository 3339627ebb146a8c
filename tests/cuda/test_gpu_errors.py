# SPDX-License-Identifier: Apache-2.0
"""What a GPU's tensors hold is checked there, with the words of the host; and tensors of a call are on one device."""

import msa
import ops_support as support
import pytest
import torch
from ops_support import Shape, make_inputs

SHAPE = Shape(((40, 150), (3, 70)))


def arguments():
    inputs = make_inputs(SHAPE)
    return {
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        "blocks": support.random_blocks(inputs),
        "cu_seqlens_q": inputs.cu[0],
        "cu_seqlens_k": inputs.cu[1],
        "block_size": 16,
    }


def message(values, move):
    with pytest.raises(RuntimeError) as error:
        msa.sparse_attention(**{name: move(value) for name, value in values.items()})
    return str(error.value).split("\n")[0]


def to_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def broken():
    def change(name, value):
        values = arguments()
        values[name] = value
        return values

    def with_ids(*ids):
        values = arguments()
        values["blocks"][1, 42, :] = torch.tensor(ids, dtype=torch.int32)
        return values

    return {
        "starts at 1": change("cu_seqlens_q", torch.tensor([1, 40, 43], dtype=torch.int32)),
        "decreases": change("cu_seqlens_q", torch.tensor([0, 43, 40], dtype=torch.int32)),
        "beyond the rows": change("cu_seqlens_k", torch.tensor([0, 150, 100000], dtype=torch.int32)),
        "more queries than keys": change("cu_seqlens_k", torch.tensor([0, 20, 90], dtype=torch.int32)),
        "invisible": with_ids(0, 1, 5),
        "negative": with_ids(0, -7, 2),
        "twice": with_ids(1, 1, 2),
        "descending": with_ids(2, 1, 0),
        "behind -1": with_ids(0, -1, 2),
    }


@pytest.mark.reduced
@pytest.mark.parametrize("what", broken())
def test_messages_are_those_of_the_host(what):
    values = broken()[what]
    assert message(values, to_gpu) == message(values, lambda value: value)


@pytest.mark.reduced
def test_ids_out_of_range_touch_nothing_when_unchecked():
    previous = msa.check_device_data(False)
    try:
        for what in ("invisible", "negative"):
            values = broken()[what]
            out, _ = msa.sparse_attention(**{name: to_gpu(value) for name, value in values.items()})
            assert out.isfinite().all()
    finally:
        msa.check_device_data(previous)


@pytest.mark.parametrize("name", ["q", "k", "blocks", "cu_seqlens_q", "cu_seqlens_k"])
def test_a_tensor_on_another_device_is_named(name):
    values = {key: to_gpu(value) for key, value in arguments().items()}
    values[name] = values[name].cpu()
    with pytest.raises(RuntimeError, match=f"sparse_attention: {name}: is on cpu"):
        msa.sparse_attention(**values)


def test_autograd_checks_devices_too():
    values = {key: to_gpu(value) for key, value in arguments().items()}
    values["q"].requires_grad_()
    values["v"] = values["v"].cpu()
    with pytest.raises(RuntimeError, match="sparse_attention: v: is on cpu"):
        msa.sparse_attention(**values)
