"""Rotary embedding of queries as a projection leaves them, against the usual composition of PyTorch's calls."""

from functools import partial

import torch
from torch import Tensor

from pyllm import ops
from pyllm.benchmarks.measure import Benchmark, Workload, operator_workload
from pyllm.nn import Rotary


def _eager_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return x * torch.cat([cos, cos], -1).to(x.dtype) + turned * torch.cat([sin, sin], -1).to(x.dtype)


def _eager_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


def _build(shape, dtype: torch.dtype, device: str, interleaved: bool) -> Workload:
    batch, heads, length, dim = shape
    x = torch.randn(batch, length, heads, dim, dtype=dtype, device=device).transpose(1, 2).requires_grad_()
    cos, sin = Rotary(dim).tables(torch.arange(length, device=device))
    tables = {"cos": cos, "sin": sin}
    eager = partial(_eager_neighbours if interleaved else _eager_halves, **tables)
    return operator_workload(partial(ops.rotary, interleaved=interleaved, **tables), eager, {"x": x})


def _moved(shape, interleaved: bool) -> tuple[float, float]:
    """Forward reads x and writes y; backward reads dy and writes dx."""
    size = torch.Size(shape).numel()
    return 2 * size, 2 * size


BENCHMARKS = (
    Benchmark(
        name="rotary",
        axes="batch x heads x length x head_dim",
        shapes=((8, 12, 256, 64), (4, 32, 1024, 128)),
        tiny=(1, 1, 4, 8),
        build=_build,
        small=lambda shape: (1, 2, *shape[2:]),
        moved=_moved,
        variants={"halves": {"interleaved": False}, "neighbours": {"interleaved": True}},
    ),
)
