"""Inputs, comparisons and the error budget, shared by tests and benchmarks.

The budget: the largest error against fp64 truth may be twice that of plain PyTorch (pyllm.reference) in the same dtype,
plus a rounding band of one unit in the last place of the largest true value. Plain PyTorch's error is the largest over
DRAWS inputs: the ones given, and the same with every element shrunk by a random share of up to SHRINK, which keeps the
problem and draws all roundings anew. A draw only widens the budget, so the next is made where those before do not
suffice. No tolerance is picked by hand.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyllm import reference
from pyllm.backend import use_backend

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

DRAWS = 8  # one draw is a noisy estimate where a test's outputs are few
LEAST_DRAWS = 1  # DRAWS for ratios that are to be compared, as in a ledger
SHRINK = 1 / 64

Inputs = dict[str, Tensor | None]

observed: list[float] = []  # every error ratio that was asserted on, of the budget that it was asserted with


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = True) -> Tensor:
    """Normal random numbers, made in fp64 on the CPU so that all dtypes and devices see the same ones, rounded."""
    return torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype).requires_grad_(grad)


def seed_with(seed: int) -> None:
    """torch.manual_seed, which without a GPU formats and keeps a traceback for each kind that may be found later."""
    (torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed)(seed)


def evaluate(function: Callable, inputs: Inputs, backend: str | None, seed: int = 0) -> tuple[list, list]:
    """(outputs, gradients of the inputs that require one) of function(**inputs) on a backend, dropout seeded.

    The cotangents are random, the same for every backend and dtype. An unused input's gradient is None.
    """
    leaves = {n: t.detach().requires_grad_(t.requires_grad) if t is not None else None for n, t in inputs.items()}
    with use_backend(backend):
        seed_with(seed)
        outputs = function(**leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]
    if not wanted:
        return outputs, []
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.device, o.dtype) for o in outputs]
    return outputs, list(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))


def check(
    function: Callable, inputs: Inputs, backend: str | None, seed: int = 0, truth: Callable[[], list] | None = None
) -> None:
    """Asserts that outputs and every gradient of function(**inputs) on a backend are within the budget.

    truth: gives what `_expected` makes of the same call, for callers that compare several backends with it.
    """
    actual = evaluate(function, inputs, backend, seed)
    expected = _expected(function, inputs, seed) if truth is None else truth()
    wanted = [n for n, t in inputs.items() if t is not None and t.requires_grad]
    names = [f"output {i}" for i in range(len(actual[0]))] + [f"gradient of {n}" for n in wanted]
    for name, a, e in zip(names, [*actual[0], *actual[1]], expected, strict=True):
        if e is None:
            assert a is None or not a.any(), f"{name}: expected no gradient"
        else:
            assert a is not None, f"{name}: no gradient"
            assert a.dtype == e.dtype, f"{name}: dtype {a.dtype}, expected {e.dtype}"
            assert_within_budget(name, a, e.truth, e.plain_errors)


def assert_within_budget(name: str, actual: Tensor, truth: Tensor, plain: Tensor | Iterable[float]) -> None:
    """Asserts that actual is as near to truth (fp64) as the budget allows.

    plain: what PyTorch computes in actual's dtype, or the largest error of that, draw by draw.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    plain_error = 0.0
    for draws, error in enumerate([error_of(plain, truth)] if isinstance(plain, Tensor) else plain, 1):
        plain_error = max(plain_error, error)
        ratio = error_ratio(actual, truth, plain_error)
        if ratio <= 1.0 and draws >= LEAST_DRAWS:
            break
    observed.append(ratio)
    assert ratio <= 1.0, f"{name}: {ratio:.3g} times the error budget"


def error_ratio(actual: Tensor, truth: Tensor, plain_error: float) -> float:
    """The largest error of actual as a share of its budget; infinite where infinities or NaN do not match truth."""
    if actual.numel() == 0:
        return 0.0
    finite = truth.isfinite()
    if not torch.allclose(actual.detach().double()[~finite], truth[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    band = torch.finfo(actual.dtype).eps * truth[finite].abs().max().item()
    budget = max(2 * plain_error + band, torch.finfo(torch.float64).tiny)
    ratio = (actual.detach().double() - truth)[finite].abs().max().item() / budget
    return ratio if ratio == ratio else float("inf")


class Draws:
    """Plain PyTorch's errors of several results on one draw after the other. What has been drawn is kept."""

    def __init__(self, errors: Iterator[list[float]]):
        self._waiting, self._drawn = errors, []

    def of(self, result: int) -> Iterator[float]:
        for draw in range(DRAWS):
            if draw == len(self._drawn):
                self._drawn.append(next(self._waiting))
            yield self._drawn[draw][result]


@dataclass(frozen=True)
class Expected:
    """What an output is in fp64, the dtype that it should have, and plain PyTorch's errors in that dtype."""

    truth: Tensor
    dtype: torch.dtype
    draws: Draws
    index: int

    @property
    def plain_errors(self) -> Iterator[float]:
        return self.draws.of(self.index)


def _expected(function: Callable, inputs: Inputs, seed: int) -> list[Expected | None]:
    """Of every output and gradient, None where there is no gradient.

    Nothing is truer than fp64, so for fp64 inputs the error of plain PyTorch is its error in fp32, scaled by the ratio
    of the units in the last place, and half as much again for the error of truth itself.
    """
    double = any(t is not None and t.dtype == torch.float64 for t in inputs.values())
    unit = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if double else 1.0
    single = _cast(inputs, torch.float32) if double else _copied(inputs)
    truths = _on_reference(function, _cast(inputs, torch.float64), seed)
    plain = _on_reference(function, inputs, seed)

    def errors() -> Iterator[list[float]]:
        if not double:
            yield [error_of(p, t) for p, t in zip(plain, truths, strict=True)]
        for draw in range(0 if double else 1, DRAWS):
            drawn = shrunk(single, draw) if draw else single
            found, true = (_on_reference(function, given, seed) for given in (drawn, _cast(drawn, torch.float64)))
            yield [unit * error_of(p, t) for p, t in zip(found, true, strict=True)]

    draws = Draws(errors())
    return [t if t is None else Expected(t, plain[i].dtype, draws, i) for i, t in enumerate(truths)]


def _on_reference(function: Callable, inputs: Inputs, seed: int) -> list[Tensor | None]:
    with reference.in_own_dtype():
        outputs, gradients = evaluate(function, inputs, "reference", seed)
    return [*outputs, *gradients]


def error_of(plain: Tensor | None, truth: Tensor | None) -> float:
    """The largest error; plain PyTorch may overflow where truth is finite (fp16): that does not widen the budget."""
    if truth is None or truth.numel() == 0:
        return 0.0
    return (plain.detach().double() - truth).abs().nan_to_num(0.0, posinf=0.0).max().item()


def shrunk(inputs: Inputs, draw: int) -> Inputs:
    """The inputs with the elements of floating ones times random numbers from 1 - SHRINK to 1, other for each draw."""
    generator = torch.Generator().manual_seed(draw)

    def one(t: Tensor) -> Tensor:
        factor = 1 - SHRINK * torch.rand(t.shape, generator=generator, dtype=torch.float64)
        return (t.detach().double() * factor.to(t.device)).to(t.dtype).requires_grad_(t.requires_grad)

    return {n: one(t) if t is not None and t.is_floating_point() else t for n, t in inputs.items()}


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        name: t.detach().to(dtype).requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for name, t in inputs.items()
    }


def _copied(inputs: Inputs) -> Inputs:
    return {
        name: None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for name, t in inputs.items()
    }
