"""What is handed to a kernel: every option of an operator arrives there, forward and backward, under its name."""

import math

import pytest
import torch
from conftest import KERNELS
from torch.utils._python_dispatch import TorchDispatchMode

from pyllm import ops
from pyllm.backend import use_backend
from pyllm.testing import randn


class Recorded(TorchDispatchMode):
    """The arguments by name of every call of the kernels of a namespace."""

    def __init__(self, namespace: str):
        super().__init__()
        self.namespace, self.calls = namespace, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == self.namespace:
            names = [argument.name for argument in function._schema.arguments]
            name = function._schema.name.split("::")[1]
            self.calls.setdefault(name, []).append(dict(zip(names, args, strict=False)) | (kwargs or {}))
        return function(*args, **(kwargs or {}))


def x(*shape):
    return randn(*shape)


def both(name, **options):
    """Of the forward and the backward."""
    return {f"{name}_{way}": options for way in ("fwd", "bwd")}


def qkv():
    return x(2, 4, 5, 8), x(2, 2, 7, 8), x(2, 2, 7, 8)


INDEX = torch.tensor([1, 3, 0])
BAND = {"is_causal": True, "causal_alignment": "bottom_right", "window": (3, 2)}
TABLES = (torch.rand(5, 4), torch.rand(5, 4))

# The call, and for each kernel what must arrive.
CALLS = {
    "layer_norm": (lambda: ops.layer_norm(x(3, 8), x(8), x(8), 0.25), {"layer_norm_fwd": {"eps": 0.25}}),
    "rms_norm": (lambda: ops.rms_norm(x(3, 8), x(8), 0.25), {"rms_norm_fwd": {"eps": 0.25}}),
    "add_layer_norm": (
        lambda: ops.add_layer_norm(x(3, 8), x(3, 8), x(8), x(8), 0.25, dropout_p=0.5, x_bias=x(8))[0],
        {"add_layer_norm_fwd": {"eps": 0.25, "dropout_p": 0.5}, "add_layer_norm_bwd": {"dropout_p": 0.5}},
    ),
    "add_rms_norm": (
        lambda: ops.add_rms_norm(x(3, 8), x(3, 8), x(8), 0.25, dropout_p=0.5)[0],
        {"add_rms_norm_fwd": {"eps": 0.25, "dropout_p": 0.5}, "add_rms_norm_bwd": {"dropout_p": 0.5}},
    ),
    "dropout_add": (
        lambda: ops.dropout_add(x(3, 8), x(3, 8), dropout_p=0.5),
        both("dropout_add", dropout_p=0.5),
    ),
    "swiglu": (
        lambda: ops.swiglu(x(3, 8), dropout_p=0.5),
        both("activation", dropout_p=0.5, kind="swiglu"),
    ),
    "softmax": (
        lambda: ops.softmax(x(3, 8), scale=0.5, is_causal=True),
        {"softmax_fwd": {"scale": 0.5, "is_causal": True}, "softmax_bwd": {"scale": 0.5}},
    ),
    "log_softmax": (
        lambda: ops.log_softmax(x(3, 8), scale=0.5, is_causal=True),
        {"log_softmax_fwd": {"scale": 0.5, "is_causal": True}, "log_softmax_bwd": {"scale": 0.5}},
    ),
    "cross_entropy": (
        lambda: ops.cross_entropy(x(3, 8), INDEX, ignore_index=0, label_smoothing=0.25, z_loss=0.5),
        {"cross_entropy_fwd": {"ignore_index": 0, "label_smoothing": 0.25, "z_loss": 0.5, "gradient": True}},
    ),
    "attention": (
        lambda: ops.attention(*qkv(), **BAND, softcap=2.0, scale=0.5, dropout_p=0.5),
        both("attention", left=3, right=0, bottom_right=True, softcap=2.0, scale=0.5, dropout_p=0.5),
    ),
    "attention of a window": (
        lambda: ops.attention(*qkv(), window=(3, 2)),
        both("attention", left=3, right=2, bottom_right=False, softcap=0.0, scale=1 / math.sqrt(8), dropout_p=0.0),
    ),
    "rotary": (
        lambda: ops.rotary(x(2, 3, 5, 8), *TABLES, interleaved=True),
        {"rotary_fwd": {"interleaved": True}},
    ),
}


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("name", CALLS)
def test_options_arrive(name: str, target):
    backend, device = target
    call, expected = CALLS[name]
    namespace = "pyllm" if backend == "native" else "pyllm_triton"
    with use_backend(backend), torch.device(device), Recorded(namespace) as seen:
        call().sum().backward()
    for kernel, options in expected.items():
        for arguments in seen.calls[kernel]:
            assert {option: arguments[option] for option in options} == options, kernel


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_arrives(deterministic: bool, target):
    """As it is when the backward runs; so do the gradients that are wanted."""
    backend, device = target
    namespace = "pyllm" if backend == "native" else "pyllm_triton"
    for mask, table in ((True, False), (False, True)):
        torch.use_deterministic_algorithms(not deterministic)
        with use_backend(backend), torch.device(device), Recorded(namespace) as seen:
            bias = ops.RelativeBias(randn(32, 4, grad=table), True, 20)
            out = ops.attention(*qkv(), attn_mask=randn(5, 7, grad=mask), relative_bias=bias)
            torch.use_deterministic_algorithms(deterministic)
            out.sum().backward()
        (arguments,) = seen.calls["attention_bwd"]
        wanted = {"deterministic": deterministic, "mask_gradient": mask, "bias_gradient": table}
        assert {name: arguments[name] for name in wanted} == wanted


@pytest.mark.parametrize("target", KERNELS)
def test_options_of_decoding_arrive(target):
    backend, device = target
    lengths = torch.tensor([3, 4], dtype=torch.int32, device=device)
    namespace = "pyllm" if backend == "native" else "pyllm_triton"
    with torch.no_grad(), use_backend(backend), torch.device(device), Recorded(namespace) as seen:
        query, key = torch.randn(2, 4, 2, 8), torch.randn(2, 2, 2, 8)
        caches = torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8)
        tables = torch.rand(16, 4), torch.rand(16, 4)
        options = {"rotary": tables, "rotary_interleaved": True, "window": (3, 2), "softcap": 2.0, "scale": 0.5}
        for is_causal in (True, False):
            ops.attention_decode(query, *caches, lengths, key=key, value=key, is_causal=is_causal, **options)
    for arguments, right in zip(seen.calls["attention_decode_fwd"], (0, 2), strict=True):
        expected = {"interleaved": True, "left": 3, "right": right, "softcap": 2.0, "scale": 0.5}
        assert {option: arguments[option] for option in expected} == expected
