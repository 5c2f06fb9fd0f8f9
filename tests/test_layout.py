"""Results and gradients lie in memory as torch's do, so that a view of them that works there works here."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import COMPARED

import pyllm
from pyllm.backend import CannotRun, use_backend
from pyllm.operator_cases import CASES

OURS = pyllm.nn.functional

INPUTS = {
    "contiguous": lambda: torch.randn(2, 3, 4, 5),
    "channels-last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(2, 4, 3).transpose(1, 2),
    "expanded": lambda: torch.randn(1, 3, 4).expand(2, 3, 4),
    "sliced": lambda: torch.randn(2, 3, 9)[..., 1:5],
}
# The reference is a specification of numbers alone.
every_target = pytest.mark.parametrize("target", COMPARED)

FUNCTIONS = {
    "softmax last": lambda ns, x: ns.softmax(x, -1),
    "softmax first": lambda ns, x: ns.softmax(x, 0),
    "softmax second": lambda ns, x: ns.softmax(x, 1),
    "log_softmax second": lambda ns, x: ns.log_softmax(x, 1),
    "layer_norm": lambda ns, x: ns.layer_norm(x, x.shape[-1:]),
    "layer_norm of two": lambda ns, x: ns.layer_norm(x, x.shape[-2:]),
    "rms_norm": lambda ns, x: ns.rms_norm(x, x.shape[-1:]),
    "rms_norm weighted": lambda ns, x: ns.rms_norm(x, x.shape[-1:], torch.ones(x.shape[-1], device=x.device)),
}
HEADS = {
    "contiguous": lambda: torch.randn(2, 3, 5, 8),
    "heads together": lambda: torch.randn(2, 5, 3, 8).transpose(1, 2),
    "packed": lambda: torch.randn(2, 5, 3, 3, 8)[:, :, 1].transpose(1, 2),
    "expanded heads": lambda: torch.randn(2, 1, 5, 8).expand(2, 3, 5, 8),
    "columns apart": lambda: torch.randn(2, 3, 8, 5).mT,
    "three dimensions": lambda: torch.randn(3, 5, 8),
}


def strides(function, make, device):
    """Of the result in inference and training, and of the gradient."""
    torch.manual_seed(0)
    x = make().to(device)
    with torch.no_grad():
        alone = function(x)
    x.requires_grad_()
    y = function(x)
    (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y))
    return alone.stride(), y.stride(), gradient.stride()


@every_target
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in INPUTS.items()])
@pytest.mark.parametrize("call", [pytest.param(c, id=name.replace(" ", "-")) for name, c in FUNCTIONS.items()])
def test_rows(target, call, make):
    backend, device = target
    with use_backend(backend):
        assert strides(partial(call, OURS), make, device) == strides(partial(call, F), make, device)


@every_target
@pytest.mark.parametrize("make", [pytest.param(make, id=name.replace(" ", "-")) for name, make in HEADS.items()])
def test_attention(target, make):
    backend, device = target
    with use_backend(backend):
        ours, theirs = (
            strides(lambda x, ns=ns: ns.scaled_dot_product_attention(x, x, x), make, device) for ns in (OURS, F)
        )
    assert ours[:2] == theirs[:2]


@every_target
def test_a_view_after_a_softmax_over_rows(target):
    backend, device = target
    routing = torch.nn.Sequential(torch.nn.Softmax(1), torch.nn.Flatten())
    x = torch.randn(2, 3, 4, device=device)
    expected = torch.softmax(x, 1).view(2, -1)
    pyllm.patch(routing)
    with use_backend(backend):
        torch.testing.assert_close(routing[0](x).view(2, -1), expected)


# Whose backward needs a result, as those of PyTorch's functions do: theirs, or of norms the sum that is normalised.
KEEP_A_RESULT = {
    *("add_layer_norm", "add_rms_norm", "attention", "attention_varlen", "attention_weights", "log_softmax"),
    *("merge_attention", "relu", "softmax"),
}


@every_target
@pytest.mark.parametrize("case", [case for case in CASES if case.shapes], ids=lambda case: case.name.replace(" ", "-"))
def test_results_can_be_changed_in_place(case, target):
    backend, device = target
    inputs = case.inputs(torch.float32, device)
    leaves = [t for t in inputs.values() if t.requires_grad]

    def gradients(double):
        torch.manual_seed(0)
        try:
            with use_backend(backend):
                outputs = case.call(**inputs)
        except CannotRun:  # by name; the default passes such a call on
            outputs = case.call(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum(double(out).sin().sum() for out in outputs)
        return torch.autograd.grad(total, leaves, allow_unused=True)

    expected = gradients(lambda out: out * 2)
    try:
        actual = gradients(lambda out: out.mul_(2))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        assert case.op in KEEP_A_RESULT, error
        return
    for a, e in zip(actual, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(a, e)
