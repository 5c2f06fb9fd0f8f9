"""What a TransformerEncoder gives where there is padding: 0 if it packs, torch.nn's values if it must not."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import pyllm

pytestmark = pytest.mark.usefixtures("one_thread")

B, S, E = 3, 9, 24
PADDING = torch.arange(S) >= torch.tensor([9, 4, 1])[:, None]


def encoder(nested: bool = True, training: bool = True, **options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, 4, 40, 0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).train(training)


def results(model: nn.Module, x: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
    """The output, padded positions and all, and the gradients of all of it."""
    x = x.detach().requires_grad_()
    out = model(x, src_key_padding_mask=PADDING)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


def off(model: nn.TransformerEncoder, how: str) -> nn.Module:
    """The model as pyllm's that does not pack."""
    if how == "pack=False":
        assert not pyllm.patch(model, pack=False).differs
    elif how == "patched before":
        pyllm.patch(model)
        pyllm.patch(model, pack=False)
    elif how == "attribute":
        pyllm.patch(model)
        model.enable_nested_tensor = False
    else:
        layer = pyllm.nn.TransformerEncoderLayer(E, 4, 40, 0.0, batch_first=True)
        ours = pyllm.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(model.training)
        ours.load_state_dict(model.state_dict())
        return ours
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["pack=False", "patched before", "attribute", "constructor"])
def test_torchs_values_everywhere(how: str, training: bool):
    theirs = encoder(nested=False, training=training)
    x = torch.randn(B, S, E)
    expected = results(theirs, x)
    assert expected[0][PADDING].all(), "torch computes there"
    ours = off(deepcopy(theirs) if how == "constructor" else encoder(training=training), how)
    ours.load_state_dict(theirs.state_dict())
    for actual, value in zip(results(ours, x), expected, strict=True):
        torch.testing.assert_close(actual, value)


@pytest.mark.parametrize("training", [True, False])
def test_packed_by_default(training: bool):
    """As torch's own inference does."""
    model, x = encoder(training=training), torch.randn(B, S, E)
    theirs = deepcopy(model)
    pyllm.patch(model)
    out, expected = (m(x, src_key_padding_mask=PADDING) for m in (model, theirs))
    assert not out[PADDING].any()
    torch.testing.assert_close(out[~PADDING], expected[~PADDING])
    with torch.no_grad():
        assert not theirs.eval()(x, src_key_padding_mask=PADDING)[PADDING].any()


def test_the_report_says_so():
    report = pyllm.patch(nn.Sequential(encoder(), nn.LayerNorm(E)))
    assert [*report.differs] == ["0"] and "padded positions are 0 (pack=False: torch.nn's values)" in str(report)
    for model, options in ((encoder(), {"pack": False}), (encoder(nested=False), {}), (nn.LayerNorm(E), {})):
        report = pyllm.patch(model, **options)
        assert report.replaced and not report.differs and "padded" not in str(report)


def test_unpatch_forgets_it():
    model = encoder(nested=True)
    before = set(vars(model))
    pyllm.patch(model, pack=False)
    pyllm.unpatch(model)
    assert set(vars(model)) == before and model.enable_nested_tensor
    pyllm.patch(model)
    assert not model(torch.randn(B, S, E), src_key_padding_mask=PADDING)[PADDING].any()
