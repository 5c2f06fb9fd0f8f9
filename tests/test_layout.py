"""Results and gradients lie in memory as torch's do, so that a view of them that works there works here."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import COMPARED

import pyllm
from pyllm.backend import CannotRun, use_backend
from pyllm.nn.memory import Source, linear
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


LAYERS = {
    "MultiheadAttention": lambda x: pyllm.nn.MultiheadAttention(16, 2, batch_first=True)(x, x, x)[0],
    "MultiheadAttention, sequence first": lambda x: pyllm.nn.MultiheadAttention(16, 2)(x, x, x)[0],
    "TransformerEncoderLayer": lambda x: pyllm.nn.TransformerEncoderLayer(16, 2, 32)(x),
    "TransformerDecoderLayer": lambda x: pyllm.nn.TransformerDecoderLayer(16, 2, 32, norm_first=True)(x, x),
    "TransformerEncoder, packed": lambda x: pyllm.nn.TransformerEncoder(
        pyllm.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1
    )(x, src_key_padding_mask=torch.arange(5) >= torch.tensor([[2], [3]])),
    "EncoderLayer": lambda x: pyllm.nn.EncoderLayer(16, 2, 32)(x),
    "SelfAttention": lambda x: pyllm.nn.EncoderLayer(16, 2, 32).self_attn(x),
    "SelfAttention, no bias": lambda x: pyllm.nn.EncoderLayer(16, 2, 32, out_bias=False).self_attn(x),
    "FeedForward": lambda x: pyllm.nn.EncoderLayer(16, 2, 32).ffn(x),
    "FeedForward, no bias": lambda x: pyllm.nn.EncoderLayer(16, 2, 32, ffn_bias=False).ffn(x),
    "LayerNorm": lambda x: pyllm.nn.LayerNorm(16)(x),
    "linear": lambda x: linear(x, torch.ones(8, 16, requires_grad=True), torch.ones(8, requires_grad=True)),
    "linear, no bias": lambda x: linear(x, torch.ones(8, 16, requires_grad=True), None, Source(torch.clone, (x,))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_results_of_layers_can_be_changed_in_place(name):
    x, found = torch.randn(2, 5, 16, requires_grad=True), []
    for double in (lambda out: out * 2, lambda out: out.mul_(2)):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(double(LAYERS[name](x)).sin().sum(), x)[0])
    torch.testing.assert_close(*found)
