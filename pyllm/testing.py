"""Inputs, comparisons and the error budget, shared by tests and benchmarks.

The budget: the largest error against fp64 truth may be twice that of plain PyTorch (pyllm.reference) in the same dtype,
plus a rounding band of one unit in the last place of the largest true value. No tolerance is picked by hand.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyllm.backend import use_backend

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Inputs = dict[str, Tensor | None]

observed: list[float] = []  # every error ratio that was asserted on; the ledger reports the worst


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = True) -> Tensor:
    """Normal random numbers, made in fp64 on the CPU so that all dtypes and devices see the same ones, rounded."""
    return torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype).requires_grad_(grad)


def evaluate(function: Callable, inputs: Inputs, backend: str | None, seed: int = 0) -> tuple[list, list]:
    """(outputs, gradients of the inputs that require one) of function(**inputs) on a backend, dropout seeded.

    The cotangents are random, the same for every backend and dtype. An unused input's gradient is None.
    """
    leaves = {n: t.detach().requires_grad_(t.requires_grad) if t is not None else None for n, t in inputs.items()}
    with use_backend(backend):
        torch.manual_seed(seed)
        outputs = function(**leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]
    if not wanted:
        return outputs, []
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.device, o.dtype) for o in outputs]
    return outputs, list(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))


def check(function: Callable, inputs: Inputs, backend: str | None, seed: int = 0) -> None:
    """Asserts that outputs and every gradient of function(**inputs) on a backend are within the budget."""
    actual = evaluate(function, inputs, backend, seed)
    truth, plain = _truth_and_plain(function, inputs, seed)
    wanted = [n for n, t in inputs.items() if t is not None and t.requires_grad]
    names = [f"output {i}" for i in range(len(actual[0]))] + [f"gradient of {n}" for n in wanted]
    for name, a, t, p in zip(names, [*actual[0], *actual[1]], truth, plain, strict=True):
        if t is None:
            assert a is None or not a.any(), f"{name}: expected no gradient"
        else:
            assert a is not None, f"{name}: no gradient"
            assert a.dtype == p.dtype, f"{name}: dtype {a.dtype}, expected {p.dtype}"
            assert_within_budget(name, a, t, p)


def assert_within_budget(name: str, actual: Tensor, truth: Tensor, plain: Tensor) -> None:
    """Asserts that actual is as near to truth (fp64) as the budget allows; plain is PyTorch's in actual's dtype."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    ratio = error_ratio(actual, truth, plain)
    observed.append(ratio)
    assert ratio <= 1.0, f"{name}: {ratio:.3g} times the error budget"


def error_ratio(actual: Tensor, truth: Tensor, plain: Tensor) -> float:
    """The largest error of actual as a share of its budget; infinite where infinities or NaN do not match truth."""
    if actual.numel() == 0:
        return 0.0
    finite = truth.isfinite()
    if not torch.equal(actual.detach().double()[~finite], truth[~finite]):
        return float("inf")

    def errors(t: Tensor) -> Tensor:
        return (t.detach().double() - truth)[finite].abs()

    if not finite.any():
        return 0.0
    # Plain PyTorch may overflow where truth is finite (fp16): such elements do not widen the budget.
    allowed = 2 * errors(plain).nan_to_num(0.0, posinf=0.0).max()
    band = torch.finfo(actual.dtype).eps * truth[finite].abs().max()
    ratio = (errors(actual).max() / (allowed + band).clamp_min(torch.finfo(torch.float64).tiny)).item()
    return ratio if ratio == ratio else float("inf")


def _truth_and_plain(function: Callable, inputs: Inputs, seed: int) -> tuple[list, list]:
    """Outputs and gradients in fp64 and in the inputs' dtype.

    Nothing is truer than fp64, so for fp64 inputs the error of plain PyTorch is its error in fp32, scaled by the ratio
    of the units in the last place, and half as much again for the error of truth itself.
    """
    if not any(t is not None and t.dtype == torch.float64 for t in inputs.values()):
        truth = evaluate(function, _cast(inputs, torch.float64), "reference", seed)
        plain = evaluate(function, inputs, "reference", seed)
        return [*truth[0], *truth[1]], [*plain[0], *plain[1]]
    truth = evaluate(function, inputs, "reference", seed)
    truth32, plain32 = _truth_and_plain(function, _cast(inputs, torch.float32), seed)
    ulps = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    truth = [*truth[0], *truth[1]]
    return truth, [
        None if t is None else (t + ulps * (p.double() - t32)).to(t.dtype)
        for t, t32, p in zip(truth, truth32, plain32, strict=True)
    ]


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        name: t.detach().to(dtype).requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for name, t in inputs.items()
    }
