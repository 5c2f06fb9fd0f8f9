"""cross_entropy, and linear_cross_entropy against the linear layer and the loss one after the other."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm import ops
from pyllm.benchmarks.measure import Benchmark, Workload, operator_workload, randn


class _Product(torch.autograd.Function):
    """A tensor's memory as the result of an operation, as logits are, at no cost."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.new_empty(0).set_(x.detach())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def _build(shape, dtype: torch.dtype, device: str, inplace: bool) -> Workload:
    """In place each call finds the gradient that the last one left, for which it takes as long."""
    target = torch.randint(shape[1], shape[:1], device=device)
    inputs = {"logits": randn(*shape, dtype=dtype, device=device), "target": target}

    def eager(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)

    def in_place() -> Tensor:
        return ops.cross_entropy(_Product.apply(inputs["logits"]), target, inplace=True)

    workload = operator_workload(ops.cross_entropy, eager, inputs)
    return replace(workload, calls=workload.calls | {"pyllm": in_place}) if inplace else workload


def _build_linear(shape, dtype: torch.dtype, device: str) -> Workload:
    tokens, width, classes = shape
    weight = (randn(classes, width, dtype=dtype, device=device, grad=False) * width**-0.5).requires_grad_()
    target = torch.randint(classes, (tokens,), device=device)
    inputs = {"hidden": randn(tokens, width, dtype=dtype, device=device), "weight": weight, "target": target}

    def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), target)

    return operator_workload(ops.linear_cross_entropy, eager, inputs, peers=_chunked())


def _chunked() -> dict[str, Callable]:
    """PyTorch's own function that goes over its logits in chunks, where this PyTorch has it."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}
    options = torch.nn.LinearCrossEntropyOptions()
    return {"chunked": lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options)}


def _moved(shape, **options) -> tuple[float, float]:
    """Forward reads the logits; what a backward adds is their gradient."""
    return torch.Size(shape).numel(), torch.Size(shape).numel()


def _flops(shape) -> tuple[float, float]:
    return 2.0 * torch.Size(shape).numel(), 4.0 * torch.Size(shape).numel()


# There is no backward to be timed alone: the forward makes the gradients.
PASSES = ("forward", "both")

BENCHMARKS = (
    Benchmark(
        name="cross_entropy",
        axes="rows x classes",
        shapes=((2048, 32000),),
        tiny=(4, 8),
        build=_build,
        small=lambda shape: (min(shape[0], 8), shape[1]),
        moved=_moved,
        passes=PASSES,
        variants={"": {"inplace": False}, "in place": {"inplace": True}},
    ),
    Benchmark(
        name="linear_cross_entropy",
        axes="tokens x width x classes",
        shapes=((4096, 768, 32000),),
        tiny=(4, 8, 8),
        build=_build_linear,
        small=lambda shape: (min(shape[0], 32), min(shape[1], 64), min(shape[2], 1000)),
        flops=_flops,
        passes=PASSES,
    ),
)
