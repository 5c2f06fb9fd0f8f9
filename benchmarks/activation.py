"""Activations with bias and dropout, and dropout_add, against PyTorch's separate calls."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm import ops
from pyllm.benchmarks.measure import Benchmark, Workload, operator_workload, randn

_EAGER = {"relu": F.relu, "gelu": F.gelu}


def _eager_plain(name: str, x: Tensor, bias: Tensor, dropout_p: float) -> Tensor:
    y = _EAGER[name](x + bias)
    return F.dropout(y, dropout_p) if dropout_p else y


def _eager_swiglu(gate: Tensor) -> Tensor:
    gate, up = gate.chunk(2, -1)
    return F.silu(gate) * up


def _build(shape, dtype: torch.dtype, device: str, name: str, dropout_p: float = 0.0) -> Workload:
    rows, width = shape
    if name == "swiglu":
        packed = {"gate": randn(rows, 2 * width, dtype=dtype, device=device)}
        return operator_workload(ops.swiglu, _eager_swiglu, packed)
    inputs = {"x": randn(rows, width, dtype=dtype, device=device), "bias": randn(width, dtype=dtype, device=device)}
    function = partial(getattr(ops, name), dropout_p=dropout_p)
    return operator_workload(function, partial(_eager_plain, name, dropout_p=dropout_p), inputs)


def _moved(shape, name: str, dropout_p: float = 0.0) -> tuple[float, float]:
    """Forward reads the input and writes y; backward reads dy and the input and writes its gradient."""
    rows, width = shape
    inputs = (2 if name == "swiglu" else 1) * rows * width
    return inputs + rows * width, 2 * inputs + rows * width


def _eager_dropout_add(x: Tensor, residual: Tensor, bias: Tensor, dropout_p: float) -> Tensor:
    z = x + bias
    return residual + (F.dropout(z, dropout_p) if dropout_p else z)


def _build_dropout_add(shape, dtype: torch.dtype, device: str, dropout_p: float) -> Workload:
    inputs = {name: randn(*shape, dtype=dtype, device=device) for name in ("x", "residual")}
    inputs["bias"] = randn(shape[1], dtype=dtype, device=device)
    functions = (partial(f, dropout_p=dropout_p) for f in (ops.dropout_add, _eager_dropout_add))
    return operator_workload(*functions, inputs)


def _moved_dropout_add(shape, dropout_p: float) -> tuple[float, float]:
    """Forward reads x and residual and writes y; backward reads dy and writes dx."""
    rows, width = shape
    return 3 * rows * width, 2 * rows * width


_ROWS = {
    "axes": "rows x width",
    "tiny": (1, 64),
    "small": lambda shape: (min(shape[0], 64), shape[1]),
    "grid": tuple((2**e // n, n) for n in (256, 2048, 16384) for e in (14, 18, 22, 27)),
}

BENCHMARKS = (
    Benchmark(
        name="activation",
        shapes=((2048, 3072), (4096, 11008)),
        build=_build,
        moved=_moved,
        variants={
            "gelu": {"name": "gelu"},
            "gelu dropout 0.1": {"name": "gelu", "dropout_p": 0.1},
            "relu dropout 0.1": {"name": "relu", "dropout_p": 0.1},
            "swiglu": {"name": "swiglu"},
        },
        **_ROWS,
    ),
    Benchmark(
        name="dropout_add",
        shapes=((2048, 768), (4096, 4096)),
        build=_build_dropout_add,
        moved=_moved_dropout_add,
        variants={"dropout 0.1": {"dropout_p": 0.1}, "dropout 0": {"dropout_p": 0.0}},
        **_ROWS,
    ),
)
