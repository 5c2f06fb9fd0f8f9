"""Compares pyllm's modules with torch.nn's of the same name: outputs, and gradients of inputs and parameters."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor

import pyllm
from pyllm.testing import SHRINK, assert_within_budget, error_of

DRAWS = 3  # inputs that torch's error is measured on: few, for there are many numbers in a layer's gradients
E, H = 24, 3
SMALL = {"d_model": E, "nhead": H, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 40}

# name -> constructor arguments, for checks of all modules alike
MODULES = {
    "LayerNorm": ((E,), {}),
    "RMSNorm": ((E,), {}),
    "Softmax": ((-1,), {}),
    "MultiheadAttention": ((E, H), {"batch_first": True, "add_bias_kv": True}),
    "TransformerEncoderLayer": ((E, H, 40), {"norm_first": True}),
    "TransformerDecoderLayer": ((E, H, 40), {"activation": "gelu"}),
    "Transformer": ((), SMALL),
}


def pair(name: str, *args, **kwargs) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(pyllm's, torch's) module with the same parameters, none at its initial value, moved by strict loading."""
    ours, theirs = getattr(pyllm.nn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def compare(ours: torch.nn.Module, theirs: torch.nn.Module, *inputs: Tensor, **options) -> None:
    """Asserts that ours(*inputs, **options) is as near to theirs in fp64 as theirs is in its own dtype (the budget).

    A tensor that is given twice is the same tensor in the call. Floating options get gradients too. Theirs is measured
    on a few inputs, of which the first are those given.
    """
    double = deepcopy(theirs).double()

    def measured() -> Iterator[tuple[dict, dict]]:
        for draw in range(DRAWS):
            near = inputs if draw == 0 else _shrunk(inputs, draw)
            yield results(theirs, near, options), results(double, near, options, torch.float64)

    assert_parity(results(ours, inputs, options), measured())


def _shrunk(inputs: Sequence[Tensor], draw: int) -> list[Tensor]:
    """The inputs, their elements made smaller by a random share of up to SHRINK; the same tensor twice stays that."""
    generator = torch.Generator().manual_seed(draw)
    factors = {id(t): 1 - SHRINK * torch.rand(t.shape, generator=generator, device="cpu") for t in inputs}
    made = {id(t): t.detach() * factors[id(t)].to(t) for t in inputs}
    return [made[id(t)] for t in inputs]


def assert_parity(actual: dict[str, Tensor], measured: Iterable[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> None:
    """Asserts that names and dtypes of actual are torch's, and the numbers, taken together, within the budget.

    measured: torch's results, and the same in fp64; first those of the inputs that made actual.
    Each tensor counts in units of its largest true value (a power of two, which is exact): the largest error among 24
    numbers is too much a matter of chance for a budget of its own.
    """
    measured = iter(measured)
    plain, truth = first = next(measured)
    assert actual.keys() == plain.keys() == truth.keys()
    assert {n: (t.shape, t.dtype) for n, t in actual.items()} == {n: (t.shape, t.dtype) for n, t in plain.items()}
    coarsest = max((t.dtype for t in plain.values()), key=lambda dtype: torch.finfo(dtype).eps)

    def joined(tensors: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        units = {name: t.abs().max().log2().floor().exp2() if t.any() else 1.0 for name, t in truth.items()}
        return torch.cat([(t.detach() / units[name]).flatten().to(dtype) for name, t in tensors.items()])

    draws = itertools.chain([first], measured)
    errors = (error_of(joined(p, t, coarsest), joined(t, t, torch.float64)) for p, t in draws)
    expected = joined(truth, truth, torch.float64)
    assert_within_budget("outputs and gradients", joined(actual, truth, coarsest), expected, errors)


def results(module, inputs, options, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs of a module and all gradients, for random cotangents that are the same for every module and dtype."""
    leaves: dict[int, Tensor] = {}

    def leaf(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return leaves.setdefault(id(value), value.detach().to(dtype or value.dtype).requires_grad_())

    tensors = [leaf(t) for t in inputs]
    outputs = module(*tensors, **{name: leaf(value) for name, value in options.items()})
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    found = {f"output {i}": o for i, o in enumerate(outputs)}
    named = {f"gradient of input {i}": t for i, t in enumerate(leaves.values())}
    named |= {f"gradient of {n}": p for n, p in module.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, dtype=torch.float64, generator=generator, device="cpu").to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(named.values()), cotangents, allow_unused=True)
    return found | {name: g for name, g in zip(named, gradients, strict=True) if g is not None}
