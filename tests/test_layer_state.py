"""pyllm.nn's modules against torch.nn's of the same name: construction, state, copies, signatures."""

import inspect
import io
import pickle
from copy import deepcopy

import pytest
import torch
from torch_parity import MODULES, SMALL, E, H

import pyllm.nn


@pytest.mark.parametrize("name", MODULES)
def test_initialisation_and_state_are_torchs(name):
    args, kwargs = MODULES[name]
    models = []
    for module in (pyllm.nn, torch.nn):
        torch.manual_seed(5)
        models.append(getattr(module, name)(*args, **kwargs))
    ours, theirs = models
    assert isinstance(ours, getattr(torch.nn, name))
    assert torch.get_rng_state().equal(_rng_after(name, args, kwargs))
    saved = []
    for model in models:
        saved.append(io.BytesIO())
        torch.save(model.state_dict(), saved[-1])
    assert saved[0].getvalue() == saved[1].getvalue()
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert str(ours) == str(theirs)
    for source, destination in ((ours, theirs), (theirs, ours)):
        destination.load_state_dict(source.state_dict(), strict=True)


def _rng_after(name, args, kwargs):
    torch.manual_seed(5)
    getattr(torch.nn, name)(*args, **kwargs)
    return torch.get_rng_state()


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_pickles(name):
    model = getattr(pyllm.nn, name)(*MODULES[name][0], **MODULES[name][1])
    for twin in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", [n for n in MODULES if n != "Softmax"])
def test_factory_arguments(name):
    model = getattr(pyllm.nn, name)(*MODULES[name][0], **MODULES[name][1], device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("name", [*MODULES, "TransformerEncoder", "TransformerDecoder"])
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures(name, method):
    ours, theirs = (inspect.signature(getattr(getattr(m, name), method)).parameters for m in (pyllm.nn, torch.nn))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_every_part_is_pyllms():
    """No torch layer is left inside, and what the user hands in is kept as it is."""
    kinds = {type(m) for m in pyllm.nn.Transformer(**SMALL).modules()}
    assert not kinds & {getattr(torch.nn, name, None) for name in pyllm.nn.__all__}
    custom = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(E, H, batch_first=True), 1)
    assert type(pyllm.nn.Transformer(**SMALL, custom_encoder=custom).encoder) is torch.nn.TransformerEncoder
