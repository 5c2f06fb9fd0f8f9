"""pyllm.patch and pyllm.unpatch on models of torch.nn's layers."""

import io
import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch_parity import compare

import pyllm

E, H, L, B = 24, 3, 5, 4


class OwnNorm(nn.LayerNorm):
    def forward(self, input):
        return -super().forward(input)


class Model(nn.Module):
    """One of everything that can be replaced, and what cannot."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(E, H, 1, 1, 40, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.norms = nn.Sequential(nn.LayerNorm(E), nn.RMSNorm(E), OwnNorm(E))
        self.shared = self.norms[0]
        self.linear = nn.Linear(E, E)
        self.softmax = nn.Softmax(-1)

    def forward(self, x):
        x = self.transformer(x, x)
        x = x + self.attention(x, x, x)[0]
        return self.softmax(self.linear(self.shared(self.norms(x))))


def classes(model):
    return [type(m) for m in model.modules()]


def test_patch_keeps_the_model_and_its_numbers():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(B, L, E)
    original, before = deepcopy(model), dict(model.named_parameters())
    saved = [io.BytesIO(), io.BytesIO()]
    torch.save(model.state_dict(), saved[0])
    report = pyllm.patch(model)
    torch.save(model.state_dict(), saved[1])
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert saved[0].getvalue() == saved[1].getvalue()
    replaced = {name for name, module in original.named_modules() if type(module) in [*_torch_layers(), nn.Dropout]}
    assert set(report.replaced) == replaced
    assert not {type(m) for m in model.modules()} & set(_torch_layers())
    assert list(report.left) == ["norms.2"] and "subclass of torch.nn.LayerNorm" in report.left["norms.2"]
    compare(model, original, x)
    compare(model.eval(), original.eval(), x)


def _torch_layers():
    return [getattr(nn, name) for name in pyllm.nn.__all__ if name != "functional" and hasattr(nn, name)]


def test_report_reads_well():
    text = str(pyllm.patch(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4), OwnNorm(4))))
    assert text.splitlines()[:2] == ["replaced 2 modules, left 1", "  2 x LayerNorm"]
    assert "left 2: " in text and "OwnNorm" in text
    assert str(pyllm.patch(nn.Linear(2, 2))) == "replaced 0 modules"


def test_dropouts_of_layers_alone_are_replaced():
    model = nn.Sequential(nn.Dropout(0.1), nn.TransformerEncoderLayer(E, H, 40, batch_first=True))
    before = classes(model)
    assert "1.dropout1" in pyllm.patch(model).replaced and type(model[0]) is nn.Dropout
    assert not [m for m in model[1].modules() if type(m) is nn.Dropout]
    pyllm.unpatch(model)
    assert classes(model) == before


def test_patching_again_replaces_a_new_dropout():
    layer = nn.TransformerEncoderLayer(E, H, 40, batch_first=True)
    pyllm.patch(layer)
    layer.dropout1 = nn.Dropout(0.2)
    assert pyllm.patch(layer).replaced == {"dropout1": "Dropout"}
    assert not pyllm.patch(layer).replaced
    assert len(pyllm.unpatch(layer).replaced) == 7 and type(layer.dropout1) is nn.Dropout


def test_an_activation_of_the_users_stays_what_it_is():
    activation = nn.Dropout(0.1)
    layer = pyllm.nn.TransformerEncoderLayer(E, H, 40, activation=activation, batch_first=True)
    assert layer.activation is activation and type(activation) is nn.Dropout
    pyllm.patch(nn.Sequential(layer))
    assert type(activation) is nn.Dropout


class OwnEncoder(nn.TransformerEncoder):
    pass


@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_of_torchs_over_layers_of_ours(training):
    """It hands them a NestedTensor where it evaluates a padded batch."""
    model = OwnEncoder(nn.TransformerEncoderLayer(E, 4, 40, 0.0, batch_first=True), 2).train(training)
    x, padding = torch.randn(B, L, E), torch.arange(L) >= torch.tensor([5, 2, 1, 3])[:, None]
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        assert list(pyllm.patch(model).left) == [""]
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)


def test_patch_reaches_hooks_optimizers_and_the_root():
    norm = nn.LayerNorm(E)
    calls = []
    norm.register_forward_hook(lambda *_: calls.append("forward"))
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    assert pyllm.patch(norm).replaced == {"": "LayerNorm"}
    assert isinstance(norm, pyllm.nn.LayerNorm)
    norm(torch.randn(2, E)).square().sum().backward()
    before = norm.weight.detach().clone()
    optimizer.step()
    assert calls == ["forward"]
    assert not torch.equal(before, norm.weight)


def test_unpatch_restores_exactly():
    model, x = Model().eval(), torch.randn(B, L, E)
    expected, kinds, state = model(x), classes(model), [sorted(m.__dict__) for m in model.modules()]
    replaced = pyllm.patch(model).replaced
    assert pyllm.patch(model).replaced == {}, "patching twice is patching once"
    assert set(pyllm.unpatch(model).replaced) == set(replaced)
    assert classes(model) == kinds
    assert [sorted(m.__dict__) for m in model.modules()] == state
    assert torch.equal(model(x), expected)
    assert pyllm.unpatch(model).replaced == {}


@pytest.mark.parametrize("copy", [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_a_patched_model(copy):
    model, x = Model().eval(), torch.randn(B, L, E)
    kinds = classes(model)
    pyllm.patch(model)
    twin = copy(model)
    assert classes(twin) == classes(model)
    assert torch.equal(twin(x), model(x))
    pyllm.unpatch(twin)
    assert classes(twin) == kinds and classes(model) != kinds


def test_unpatch_keeps_what_was_built_as_pyllms():
    model = nn.Sequential(pyllm.nn.LayerNorm(E), nn.LayerNorm(E))
    pyllm.patch(model)
    assert list(pyllm.unpatch(model).replaced) == ["1"]
    assert classes(model) == [nn.Sequential, pyllm.nn.LayerNorm, nn.LayerNorm]


def test_a_patched_encoder_leaves_torchs_fast_path():
    """Where torch gives NaN for an all-padded sample."""
    layer = nn.TransformerEncoderLayer(E, 4, 40, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1] = True
    x = torch.randn(B, L, E)
    pyllm.patch(encoder)
    with torch.no_grad():
        out = encoder(x, src_key_padding_mask=padding)
    assert out.isfinite().all()
    pyllm.unpatch(encoder)
    assert encoder.use_nested_tensor and encoder.enable_nested_tensor


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.LayerNorm(4, dtype=torch.complex64), "complex64"),
        (lambda: _with_own_forward(nn.Softmax(-1)), "forward was replaced"),
        (lambda: nn.utils.parametrize.register_parametrization(nn.LayerNorm(4), "weight", nn.ReLU()), "subclass"),
    ],
    ids=["dtype", "forward", "parametrized"],
)
def test_left_and_why(make, why):
    module = make()
    kind = type(module)
    report = pyllm.patch(module)
    assert type(module) is kind
    assert not report.replaced and why in report.left[""]


def _with_own_forward(module):
    module.forward = torch.sin
    return module


def test_a_class_changed_after_patch_is_left_and_said():
    norm = nn.LayerNorm(4)
    pyllm.patch(norm)
    norm.__class__ = OwnNorm
    assert "OwnNorm" in pyllm.unpatch(norm).left[""]


@pytest.mark.parametrize("function", [pyllm.patch, pyllm.unpatch])
def test_only_modules_can_be_patched(function):
    with pytest.raises(TypeError, match=r"must be a .*Module, got list"):
        function([nn.LayerNorm(4)])
