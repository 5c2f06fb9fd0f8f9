"""Compares pyllm's modules with torch.nn's of the same name: outputs, and gradients of inputs and parameters."""

from copy import deepcopy

import torch
from torch import Tensor

import pyllm
from pyllm.testing import assert_within_budget


def pair(name: str, *args, **kwargs) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(pyllm's, torch's) module with the same parameters, none of them at its initial value; the state is moved by
    strict loading."""
    ours, theirs = getattr(pyllm.nn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def compare(ours, theirs: torch.nn.Module, *inputs: Tensor, **options) -> None:
    """Asserts that ours(*inputs, **options) is as near to theirs in fp64 as theirs is in its own dtype (the budget).

    A tensor that is given twice is the same tensor in the call. Floating options get gradients too.
    """
    actual = results(ours, inputs, options)
    plain = results(theirs, inputs, options)
    truth = results(deepcopy(theirs).double(), inputs, options, torch.float64)
    assert actual.keys() == plain.keys() == truth.keys()
    for name, expected in truth.items():
        assert actual[name].dtype == plain[name].dtype, name
        assert_within_budget(name, actual[name], expected, plain[name])


def results(module, inputs, options, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs of a module and all gradients, for random cotangents that are the same for every module and dtype."""
    leaves: dict[int, Tensor] = {}

    def leaf(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return leaves.setdefault(id(value), value.detach().to(dtype or value.dtype).requires_grad_())

    outputs = module(*map(leaf, inputs), **{name: leaf(value) for name, value in options.items()})
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    found = {f"output {i}": o for i, o in enumerate(outputs)}
    named = {f"gradient of input {i}": t for i, t in enumerate(leaves.values())}
    named |= {f"gradient of {n}": p for n, p in module.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(named.values()), cotangents, allow_unused=True)
    return found | {name: g for name, g in zip(named, gradients, strict=True) if g is not None}
