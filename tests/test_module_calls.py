"""What a fused layer leaves out is called wherever a call would do more than the sublayer's class says."""

from collections import Counter
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode
from torch_parity import E, H, compare, pair

import pyllm
from pyllm.nn import DecoderLayer, EncoderLayer, KVCache, Rotary
from pyllm.testing import assert_within_budget

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but"),
]

LAYER = (E, H, 40, 0.0)
STACK = {"d_model": E, "nhead": H, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 40}


def _stack(name):
    def make(module):
        layer = getattr(module, f"{name}Layer")(*LAYER, batch_first=True)
        return getattr(module, name)(layer, 2, module.LayerNorm(E))

    return make


# name -> how either package makes it
DROP_INS = {
    "MultiheadAttention": lambda module: module.MultiheadAttention(E, H, batch_first=True),
    "TransformerEncoderLayer": lambda module: module.TransformerEncoderLayer(*LAYER, batch_first=True),
    "TransformerEncoderLayer, pre-norm": lambda module: module.TransformerEncoderLayer(
        *LAYER, nn.GELU(), batch_first=True, norm_first=True
    ),
    "TransformerDecoderLayer": lambda module: module.TransformerDecoderLayer(*LAYER, "gelu", batch_first=True),
    "TransformerDecoderLayer, pre-norm": lambda module: module.TransformerDecoderLayer(
        *LAYER, batch_first=True, norm_first=True
    ),
    "TransformerEncoder": _stack("TransformerEncoder"),
    "TransformerDecoder": _stack("TransformerDecoder"),
    "Transformer": lambda module: module.Transformer(**STACK, dropout=0.0, batch_first=True),
}
BLOCKS = {
    "EncoderLayer": lambda: EncoderLayer(E, H, 40, dropout=0.0),
    "EncoderLayer, rotary": lambda: EncoderLayer(
        E, H, 40, dropout=0.0, position="rotary", norm="rms_norm", activation="swiglu", norm_first=True
    ),
    "EncoderLayer, parallel": lambda: EncoderLayer(E, H, 40, dropout=0.0, parallel_residual=True, norm_first=True),
    "DecoderLayer": lambda: DecoderLayer(E, H, 40, dropout=0.0, activation=nn.SiLU()),
}


def inputs(name: str, grad: bool = False) -> list[torch.Tensor]:
    count = 3 if name == "MultiheadAttention" else 2 if "Decoder" in name or name == "Transformer" else 1
    return [torch.randn(2, length, E, requires_grad=grad) for length in (5, 7, 7)[:count]]


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """(pyllm's, torch's) with the same parameters."""
    ours, theirs = DROP_INS[name](pyllm.nn), DROP_INS[name](nn)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


# --- hooks of all modules ---

REGISTER = {
    "pre": (hooks.register_module_forward_pre_hook, lambda seen: lambda module, args: seen(module)),
    "forward": (hooks.register_module_forward_hook, lambda seen: lambda module, args, out: seen(module)),
    "backward": (hooks.register_module_full_backward_hook, lambda seen: lambda module, *gradients: seen(module)),
    "backward pre": (hooks.register_module_full_backward_pre_hook, lambda seen: lambda module, gradient: seen(module)),
}


def calls(model: nn.Module, arguments, kind: str) -> list[str]:
    """Names of the modules in the order in which hooks of all modules see them."""
    names, seen = {module: name for name, module in model.named_modules()}, []
    register, hook = REGISTER[kind]
    handle = register(hook(lambda module: seen.append(names[module])))
    try:
        out = model(*arguments)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("name", DROP_INS)
def test_hooks_of_all_modules_see_torchs_calls(name, kind):
    ours, theirs = both(name)
    arguments = inputs(name, grad=True)
    found, expected = calls(ours, arguments, kind), calls(theirs, arguments, kind)
    assert expected
    if "backward" in kind:  # in the order of autograd's nodes, of which an operator has fewer
        found, expected = Counter(found), Counter(expected)
    assert found == expected


@pytest.mark.parametrize("name", BLOCKS)
def test_hooks_of_all_modules_see_a_blocks_modules(name):
    block = BLOCKS[name]()
    found = set(calls(block, inputs(name), "forward"))
    assert found == {n for n, _ in block.named_modules()}


@pytest.mark.parametrize("name", DROP_INS)
def test_the_flop_counter_names_torchs_modules(name):
    def counted(model):
        with FlopCounterMode(display=False, depth=9) as counter:
            out = model(*inputs(name, grad=True))
            (out[0] if isinstance(out, tuple) else out).sum().backward()
        counts = counter.get_flop_counts()
        return counts.keys(), {n: sum(c.values()) for n, c in counts.items() if "linear" in n}

    ours, theirs = both(name)
    assert counted(ours) == counted(theirs)


@pytest.mark.parametrize("name", DROP_INS)
def test_numbers_under_hooks_are_torchs(name):
    ours, theirs = both(name)
    handle = hooks.register_module_forward_hook(lambda module, args, out: None)
    try:
        compare(ours, theirs, *inputs(name))
    finally:
        handle.remove()


# --- methods replaced on a class ---


REPLACED = "Linear Dropout LayerNorm GELU MultiheadAttention TransformerEncoderLayer TransformerDecoderLayer"


@pytest.mark.parametrize("kind", [*REPLACED.split(), "TransformerEncoder", "TransformerDecoder", "Transformer"])
@pytest.mark.parametrize("name", DROP_INS)
def test_a_forward_replaced_on_torchs_class_runs(name, kind, monkeypatch):
    ours, theirs = both(name)
    kind = getattr(nn, kind)
    arguments, original, seen = inputs(name), kind.forward, []

    def doubled(self, *args, **kwargs):
        seen.append(self)
        out = original(self, *args, **kwargs)
        return (2 * out[0], out[1]) if isinstance(out, tuple) else 2 * out

    monkeypatch.setattr(kind, "forward", doubled)
    theirs(*arguments)
    expected = len(seen)
    seen.clear()
    ours(*arguments)
    assert len(seen) == expected
    compare(ours, theirs, *arguments)


@pytest.mark.parametrize("method", ["__call__", "_call_impl"])
@pytest.mark.parametrize("kind", [nn.Module, nn.Linear, nn.LayerNorm, nn.Dropout], ids=lambda kind: kind.__name__)
def test_a_call_replaced_on_a_class_runs(kind, method, monkeypatch):
    ours, theirs = both("TransformerEncoderLayer")
    (x,), original, seen = inputs("TransformerEncoderLayer"), getattr(kind, method), []

    def called(self, *args, **kwargs):
        seen.append(type(self).__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, method, called)
    theirs(x)
    expected = seen.copy()
    seen.clear()
    ours(x)
    assert seen == expected


@pytest.mark.parametrize(
    ("name", "block"),
    [("TransformerEncoderLayer", block) for block in ("_sa_block", "_ff_block")]
    + [("TransformerDecoderLayer", block) for block in ("_sa_block", "_mha_block", "_ff_block")],
)
def test_a_block_replaced_on_torchs_class_runs(name, block, monkeypatch):
    ours, theirs = both(name)
    monkeypatch.setattr(getattr(nn, name), block, lambda self, x, *args, **kwargs: x.sin())
    compare(ours, theirs, *inputs(name))


def test_patch_leaves_classes_whose_methods_were_replaced(monkeypatch):
    original = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: original(self, x))
    model = nn.Sequential(nn.LayerNorm(E), nn.RMSNorm(E))
    report = pyllm.patch(model)
    assert list(report.replaced) == ["1"]
    assert report.left == {"0": "a method of torch.nn.LayerNorm was replaced"}


# --- one sublayer that does something else: twice what it would ---


class Twice(nn.Module):
    """As LoRA and quantisation put a module in the place of another."""

    def __init__(self, inner: nn.Module | None = None):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * (x if self.inner is None else self.inner(x))


def _subclass(module, **methods):
    module.__class__ = type("Own", (type(module),), methods)


def _on_instance(module, method):
    original = getattr(module, method)
    setattr(module, method, lambda *args, **kwargs: 2 * original(*args, **kwargs))


def _parametrised(module):
    for name in [name for name, _ in module.named_parameters()]:
        parametrize.register_parametrization(module, name, Twice())


def _old_hook(module):
    """As prune and the older weight_norm set the weight before each call."""
    parameters = list(module.named_parameters())
    for name, parameter in parameters:
        del module._parameters[name]
        module.register_parameter(f"{name}_original", parameter)

    def double(module, args):
        for name, parameter in parameters:
            setattr(module, name, 2 * parameter)

    double(module, ())
    module.register_forward_pre_hook(double)


CHANGES = {
    "forward hook": lambda module: module.register_forward_hook(lambda module, args, out: 2 * out),
    "forward hook with kwargs": lambda module: module.register_forward_hook(
        lambda module, args, kwargs, out: 2 * out, with_kwargs=True
    ),
    "weight set before the call": _old_hook,
    "parametrised": _parametrised,
    "forward of the instance": lambda module: _on_instance(module, "forward"),
    "call of the instance": lambda module: _on_instance(module, "_call_impl"),
    "compiled": lambda module: module.__dict__.update(_compiled_call_impl=Twice(deepcopy(module))),
    "forward of a subclass": lambda module: _subclass(
        module, forward=lambda self, x: 2 * super(type(self), self).forward(x)
    ),
    "call of a subclass": lambda module: _subclass(module, __call__=lambda self, x: 2 * nn.Module.__call__(self, x)),
    "wrapped": None,
}


def sites(model: nn.Module) -> list[str]:
    """The sublayers that multiply by a weight and add a bias: twice both is twice the result."""
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.LayerNorm, nn.RMSNorm))]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [*(n for n in DROP_INS if "Layer" in n or "Attention" in n), *BLOCKS])
def test_a_changed_sublayer_is_called(name, change):
    plain = DROP_INS[name](pyllm.nn) if name in DROP_INS else BLOCKS[name]()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    arguments = inputs(name)

    def output(model, dtype=torch.float32):
        out = model(*(x.to(dtype) for x in arguments))
        return out[0] if isinstance(out, tuple) else out

    assert sites(plain)
    for site in sites(plain):
        doubled, changed = deepcopy(plain), deepcopy(plain)
        with torch.no_grad():
            for parameter in doubled.get_submodule(site).parameters():
                parameter.mul_(2)
        if change == "wrapped":
            changed.set_submodule(site, Twice(changed.get_submodule(site)))
        else:
            CHANGES[change](changed.get_submodule(site))
        truth = output(deepcopy(doubled).double(), torch.float64)
        assert_within_budget(f"output with {site}", output(changed), truth, output(doubled))


@pytest.mark.parametrize("name", [n for n in DROP_INS if "Attention" in n or "Layer" in n])
def test_the_output_projection_gets_gradients_through_a_hook(name):
    """And the attention that returns weights calls it too."""
    model, seen = DROP_INS[name](pyllm.nn), []
    for _, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            module.out_proj.register_full_backward_hook(lambda module, *gradients: seen.append(module))
    out = model(*inputs(name, grad=True))
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert len(seen) == (2 if "Decoder" in name else 1)


TRAINED = {
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "older weight_norm": nn.utils.weight_norm,
    "older spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("site", ["self_attn.out_proj", "linear1", "linear2"])
@pytest.mark.parametrize("change", TRAINED)
def test_what_recomputes_a_weight_trains(change, site):
    """As in a layer of torch.nn that calls its output projection."""

    class Calling(nn.MultiheadAttention):
        def forward(self, x, *_, **options):
            weight, bias = self.in_proj_weight, self.in_proj_bias
            qkv = nn.functional.linear(x, weight, bias).unflatten(-1, (3, H, -1)).movedim(-3, 0).transpose(-3, -2)
            out = nn.functional.scaled_dot_product_attention(*qkv)
            return self.out_proj(out.transpose(1, 2).flatten(-2)), None

    ours, theirs = pair("TransformerEncoderLayer", *LAYER, batch_first=True)
    theirs.self_attn.__class__ = Calling
    x = torch.randn(2, 5, E)

    def train(model, dtype):
        torch.manual_seed(2)  # spectral_norm's vectors
        model = deepcopy(model)
        TRAINED[change](model.get_submodule(site))
        model.to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            y = model(x.to(dtype))
            (y * x).mean().backward()
            optimizer.step()
        return y

    assert_within_budget("output", train(ours, x.dtype), train(theirs, torch.float64), train(theirs, x.dtype))


class Unhashable:
    __hash__ = None

    def __call__(self, x):
        return x.sin()


class OwnPartial(partial):
    def __call__(self, x):
        return -super().__call__(x)


@pytest.mark.parametrize(
    "activation", [Unhashable(), OwnPartial(nn.functional.gelu, approximate="tanh")], ids=["no hash", "partial"]
)
def test_other_callables_are_activations(activation):
    compare(*pair("TransformerEncoderLayer", *LAYER, activation), *inputs("TransformerEncoderLayer"))


class Faster(Rotary):
    def forward(self, x, tables):
        return super().forward(x, tuple(table.flip(-1) for table in tables))


@pytest.mark.parametrize("change", ["hook", "subclass"])
def test_generation_calls_a_changed_position(change):
    """Token by token it gives what the whole sequence gives."""
    layer = EncoderLayer(E, H, 40, dropout=0.0, position="rotary", causal=True).eval()
    if change == "hook":
        layer.self_attn.position.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        layer.self_attn.position.__class__ = Faster
    x, cache = torch.randn(2, 5, E), KVCache(1, 2, 8, H, E // H)
    with torch.no_grad():
        found = []
        for part in x.split([3, 1, 1], 1):
            found.append(layer(part, cache=cache, layer=0))
            cache.advance(part.shape[1])
        whole = layer(x)
        truth = layer.double()(x.double())
    assert_within_budget("output", torch.cat(found, 1), truth, whole)


# --- packed stacks: what is the user's own sees a padded batch ---


class OverTheSequence(nn.Module):
    def forward(self, x):
        return x - x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    "site", ["norm1", "norm2", "dropout1", "linear1", "dropout", "linear2", "activation", "_ff_block"]
)
def test_a_stack_with_modules_of_the_users_stays_padded(site):
    ours = pyllm.nn.TransformerEncoder(pyllm.nn.TransformerEncoderLayer(*LAYER, batch_first=True), 2)
    layer = nn.TransformerEncoderLayer(*LAYER, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    theirs.load_state_dict(ours.state_dict())
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 2:] = True
    for model in (ours, theirs):
        for layer in model.layers:
            own = OverTheSequence()
            old = getattr(layer, site)
            setattr(layer, site, nn.Sequential(own, old) if isinstance(old, nn.Module) else own.forward)
    x = torch.randn(2, 5, E)
    compare(ours, theirs, x, src_key_padding_mask=padding)


# --- masks ---


class Attending(nn.Module):
    """A self-attention of the user's, which notes its masks."""

    batch_first = True

    def forward(self, query, key, value, **options):
        self.got = options
        return query * 1.0, None


def _own_block(self, x, attn_mask, key_padding_mask, is_causal=False):
    self.got = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal}
    return x * 1.0


@pytest.mark.parametrize("how", ["self_attn", "_sa_block", "hook"])
@pytest.mark.parametrize(
    "mask", [None, torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.ones(5, 5)], ids=["none", "bool", "float"]
)
@pytest.mark.parametrize("padding", [None, torch.arange(5) >= torch.tensor([[5], [2]])], ids=["full", "padded"])
@pytest.mark.filterwarnings("ignore:Support for mismatched src_key_padding_mask")
def test_what_a_layer_calls_gets_the_masks_that_torch_gives_it(padding, mask, how):
    got = []
    for module in (pyllm.nn, nn):
        kind = module.TransformerEncoderLayer
        if how == "_sa_block":
            kind = type("Own", (kind,), {"_sa_block": _own_block})
        layer = kind(*LAYER, batch_first=True)
        if how == "self_attn":
            layer.self_attn = Attending()
        if how == "hook":
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, options: setattr(module, "got", options), with_kwargs=True
            )
        layer(torch.randn(2, 5, E), mask, padding)
        got.append(layer.got if how == "_sa_block" else layer.self_attn.got)
    for name in ("attn_mask", "key_padding_mask"):
        ours, theirs = (found[name] for found in got)
        assert ours is theirs is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))
