"""Transformer layers in training mode, pyllm.nn against torch.nn on the same parameters."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

import pyllm.nn
from pyllm import testing
from pyllm.benchmarks.measure import Benchmark, Workload, randn

HEAD_DIM = 64


def _build(name: str, streams: int, shape, dtype: torch.dtype, device: str, norm_first=False, dropout=0.1) -> Workload:
    """streams: how many inputs the layer takes (a decoder layer's second one is the encoder's output)."""
    batch, length, width = shape
    arguments = (width, width // HEAD_DIM, 4 * width, dropout)
    options = {"batch_first": True, "norm_first": norm_first, "dtype": dtype, "device": device}
    theirs, ours = (getattr(nn, name)(*arguments, **options) for nn in (torch.nn, pyllm.nn))
    ours.load_state_dict(theirs.state_dict(keep_vars=True), assign=True)  # the very same parameters
    inputs = [randn(batch, length, width, dtype=dtype, device=device) for _ in range(streams)]
    parameters = dict(theirs.named_parameters())

    def check(backend: str | None) -> None:
        named = {f"input {i}": x for i, x in enumerate(inputs)}

        def function(**tensors: Tensor) -> Tensor:
            return functional_call(ours, {n: tensors[n] for n in parameters}, tuple(tensors[n] for n in named))

        testing.check(function, named | parameters, backend)

    calls: dict[str, Callable] = {"eager": partial(theirs, *inputs), "pyllm": partial(ours, *inputs)}
    return Workload(calls, [*inputs, *parameters.values()], check)


def _flops(streams: int, shape, norm_first: bool = False, dropout: float = 0.1) -> tuple[float, float]:
    """Matrix products: an attention's projections and its two products for each stream, and the two of width 4."""
    batch, length, width = shape
    projections = 2 * batch * length * width * width * (4 * streams + 8)
    attention = 4 * batch * length * length * width * streams
    return projections + attention, 2 * projections + 2.5 * attention


def _layer(name: str, layer: str, streams: int) -> Benchmark:
    return Benchmark(
        name=name,
        axes="batch x length x width",
        shapes=((8, 256, 768),),
        tiny=(1, 8, HEAD_DIM),
        build=partial(_build, layer, streams),
        small=lambda shape: (2, min(shape[1], 128), shape[2]),
        flops=partial(_flops, streams),
        variants={
            "post-norm": {},
            "pre-norm": {"norm_first": True},
            "pre-norm dropout 0": {"norm_first": True, "dropout": 0.0},
        },
    )


BENCHMARKS = (
    _layer("encoder_layer", "TransformerEncoderLayer", 1),
    _layer("decoder_layer", "TransformerDecoderLayer", 2),
)
