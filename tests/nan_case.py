"""What the tests of NaN and infinity share."""

import math

import pytest
import torch
from conftest import WITHOUT_TORCH
from torch import Tensor

from pyllm import testing
from pyllm.testing import assert_within_budget, evaluate

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.bfloat16)
fused = pytest.mark.parametrize("target", WITHOUT_TORCH)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def as_composed(function, composed, inputs: dict, target: tuple[str, str]) -> None:
    """Asserts that outputs and gradients on a backend are those of PyTorch's operators in fp64: NaN where they are."""
    backend, device = target
    inputs = {n: t.detach().to(device).requires_grad_(t.requires_grad) for n, t in inputs.items()}
    truths = _results(composed, _double(inputs), None)

    def errors():
        for draw in range(testing.DRAWS):
            drawn = testing.shrunk(inputs, draw) if draw else inputs
            results = _results(composed, drawn, None), _results(composed, _double(drawn), None)
            yield [testing.error_of(p, t.nan_to_num(0.0)) for p, t in zip(*results, strict=True)]

    draws = testing.Draws(errors())
    for i, (a, t) in enumerate(zip(_results(function, inputs, backend), truths, strict=True)):
        assert torch.equal(a.isnan(), t.isnan()), f"result {i}: NaN where there is none, or none where there is"
        assert_within_budget(f"result {i}", *(x.masked_fill(t.isnan(), 0.0) for x in (a, t)), draws.of(i))


def _double(inputs: dict) -> dict:
    return {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in inputs.items()}


def _results(function, inputs: dict, backend: str | None) -> list[Tensor]:
    outputs, gradients = evaluate(function, inputs, backend)
    return [*outputs, *gradients]
