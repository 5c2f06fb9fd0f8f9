"""layer_norm, rms_norm, and both with bias, dropout and residual addition, against PyTorch's separate calls."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm import ops
from pyllm.benchmarks.measure import Benchmark, Workload, liger, operator_workload, randn


def _eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight)


def _eager_add(x: Tensor, residual: Tensor, dropout_p: float, x_bias: Tensor | None) -> Tensor:
    return residual + F.dropout(x if x_bias is None else x + x_bias, dropout_p)


def _eager_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float, x_bias: Tensor | None = None
):
    z = _eager_add(x, residual, dropout_p, x_bias)
    return F.layer_norm(z, z.shape[-1:], weight, bias), z


def _eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, dropout_p: float, x_bias: Tensor | None = None):
    z = _eager_add(x, residual, dropout_p, x_bias)
    return F.rms_norm(z, z.shape[-1:], weight), z


# After the tensors: eps, and for rms_norm an offset of the weight, casts as Llama's, no gradient in the place of dy.
_LIGER = {
    "layer_norm": liger("layer_norm", "LigerLayerNormFunction", 1e-5),
    "rms_norm": liger("rms_norm", "LigerRMSNormFunction", 1e-6, 0.0, "llama", False),
    "add_rms_norm": liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction", 1e-6, 0.0, "llama", False),
}


def _build(
    function,
    eager,
    names,
    shape,
    dtype: torch.dtype,
    device: str,
    dropout_p: float | None = None,
    x_bias: bool = False,
) -> Workload:
    names = (*names, "x_bias") if x_bias else names
    inputs = {n: randn(*(shape if n in ("x", "residual") else shape[1:]), dtype=dtype, device=device) for n in names}
    options = {} if dropout_p is None else {"dropout_p": dropout_p}
    peers = {} if dropout_p or function.__name__ not in _LIGER else {"liger": _LIGER[function.__name__]}
    return operator_workload(partial(function, **options), partial(eager, **options), inputs, peers=peers)


def _norm_moved(shape) -> tuple[float, float]:
    """Forward reads x and writes y; backward reads dy and x and writes dx."""
    rows, width = shape
    return 2 * rows * width, 3 * rows * width


def _add_moved(shape, dropout_p: float, x_bias: bool = False) -> tuple[float, float]:
    """Forward reads x, residual and writes y, z; backward reads dy, dz, z, writes dresidual and, if it differs, dx."""
    rows, width = shape
    return 4 * rows * width, (5 if dropout_p else 4) * rows * width


_ROWS = {
    "axes": "rows x width",
    "shapes": ((2048, 768), (4096, 4096)),
    "tiny": (1, 64),
    "small": lambda shape: (min(shape[0], 64), shape[1]),
    "grid": tuple((2**e // n, n) for n in (256, 2048, 16384) for e in (14, 18, 22, 27)),
}
_VARIANTS = {
    "dropout 0.1": {"dropout_p": 0.1},
    "dropout 0": {"dropout_p": 0.0},
    "bias dropout 0.1": {"dropout_p": 0.1, "x_bias": True},
}


def _norm(function, eager, names) -> Benchmark:
    build = partial(_build, function, eager, names)
    return Benchmark(name=function.__name__, build=build, moved=_norm_moved, **_ROWS)


def _add_norm(function, eager, names) -> Benchmark:
    build = partial(_build, function, eager, names)
    return Benchmark(name=function.__name__, build=build, moved=_add_moved, variants=_VARIANTS, **_ROWS)


BENCHMARKS = (
    _norm(ops.layer_norm, _eager_layer_norm, ("x", "weight", "bias")),
    _norm(ops.rms_norm, _eager_rms_norm, ("x", "weight")),
    _add_norm(ops.add_layer_norm, _eager_add_layer_norm, ("x", "residual", "weight", "bias")),
    _add_norm(ops.add_rms_norm, _eager_add_rms_norm, ("x", "residual", "weight")),
)
