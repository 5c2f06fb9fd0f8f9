"""Grids of Triton's kernels for huge tensors: CUDA ends their first axis at 2^31 - 1, the others at 65,535."""

import pytest
import torch

from pyllm.kernels import (
    _common,
    activation,
    attention,
    attention_decode,
    cross_entropy,
    dropout_add,
    norm,
    rotary,
    softmax,
)
from pyllm.reference import AttentionCall, DecodeCall

LONG, WIDE = (2**30, 8), (1, 2**30)  # many rows; a vector


def _empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def _rng():
    return _empty(2, dtype=torch.int64)


def _activation(shape):
    x, bias = _empty(shape), _empty(shape[-1])
    activation.activation_bwd(
        activation.activation_fwd(x, None, bias, _rng(), 0.1, "gelu"), x, None, bias, _rng(), 0.1, "gelu"
    )
    activation.activation_bwd(
        activation.activation_fwd(x, None, None, None, 0.0, "gelu"), x, None, None, None, 0.0, "gelu"
    )


def _dropout_add(shape):
    x, bias = _empty(shape), _empty(shape[-1])
    dropout_add.dropout_add_bwd(dropout_add.dropout_add_fwd(x, x, bias, _rng(), 0.1), bias, _rng(), 0.1, x.dtype)
    dropout_add.dropout_add_bwd(dropout_add.dropout_add_fwd(x, x, None, _rng(), 0.1), None, _rng(), 0.1, x.dtype)


def _norm(shape):
    x, weight = _empty(shape), _empty(shape[-1])
    norm.layer_norm_bwd(x, x, weight, weight, *norm.layer_norm_fwd(x, weight, weight, 1e-5)[1:])


def _softmax(shape):
    x = _empty(shape)
    softmax.softmax_bwd(softmax.softmax_fwd(x, None, 1.0, False), x, 1.0)


def _cross_entropy(shape):
    x, target = _empty(shape), _empty(shape[0], dtype=torch.int64)
    cross_entropy.cross_entropy_fwd(x, target, None, None, -100, 0.0, 0.0, True)
    cross_entropy.cross_entropy_bwd(x, _empty((), dtype=torch.float32))
    statistics = _empty(4, shape[0], dtype=torch.float32)
    cross_entropy.cross_entropy_shard_fwd(statistics, x, target, 0)
    cross_entropy.cross_entropy_shard_bwd(x, statistics, target, 0)


def _rotary(batch, length):
    x, tables = _empty(batch, 16, length, 64), _empty(2, length, 32, dtype=torch.float32)
    rotary.rotary_fwd(x, *tables, False, False)
    rotary.rotary_inplace_fwd(x, *tables, True, False)


def _attention(batch, length, mask=None):
    query = _empty(batch, 16, length, 64)
    options = (0.125, 0.0, 0.0, -1, 0, False)
    call = AttentionCall(query, query, query, mask, None, None, None, None, None, None, *options)
    out, lse = attention.attention_fwd(*call, target="sm_90")
    for deterministic in (False, True):
        attention.attention_bwd(out, lse, out, lse, mask is not None, False, deterministic, *call, target="sm_90")


def _decode(batch, capacity):
    query, cache = _empty(batch, 16, 1, 64), _empty(batch, 16, capacity, 64)
    lengths = _empty(batch, dtype=torch.int32)
    call = DecodeCall(query, cache, cache, lengths, None, query, query, *(None,) * 4, 0.125, 0.0, -1, 0, False)
    attention_decode.attention_decode_fwd(*call, target="sm_90")


CALLS = {
    f"{function.__name__[1:]}-{shape}": (function, (shape,))
    for function in (_activation, _dropout_add, _norm, _softmax, _cross_entropy)
    for shape in (LONG, WIDE)
} | {
    "rotary of many": (_rotary, (2**20, 16)),
    "rotary of long": (_rotary, (1, 2**28)),
    "attention of many": (_attention, (2**20, 16)),
    "attention of long": (_attention, (1, 2**28)),
    "attention with a mask": (_attention, (2**16, 64, _empty(2**16, 16, 64, 64))),
    "decode of many": (_decode, (2**20, 512)),
    "decode of long": (_decode, (1, 2**28)),
}


@pytest.mark.parametrize("name", CALLS)
def test_grids_fit(name):
    function, arguments = CALLS[name]
    with _common.captured() as calls:
        function(*arguments)
        grids = [(kernel.__name__, grid) for kernel, _, grid in _common._captured]
        _common._captured.clear()
    assert grids and calls == []
    for kernel, (first, *others) in grids:
        assert 0 < first < 2**31, f"{kernel}: {first}"
        assert all(0 < axis <= 65535 for axis in others), f"{kernel}: {others}"
