"""torch.fx, torch.jit.trace and torch.jit.script take pyllm's layers as they take torch.nn's."""

import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch_parity import E, H, compare

import pyllm
from pyllm import ops
from pyllm.backend import recording
from pyllm.nn import functional, plain
from pyllm.operator_cases import CASES
from pyllm.testing import assert_within_budget

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but"),
]

LAYER = (E, H, 40, 0.0)


def _stack(name):
    def make(module):
        return getattr(module, name)(getattr(module, f"{name}Layer")(*LAYER, batch_first=True), 2)

    return make


# name -> how either package makes it
DROP_INS = {
    "LayerNorm": lambda module: module.LayerNorm(E),
    "RMSNorm": lambda module: module.RMSNorm(E),
    "Softmax": lambda module: module.Softmax(-1),
    "MultiheadAttention": lambda module: module.MultiheadAttention(E, H, batch_first=True),
    "TransformerEncoderLayer": lambda module: module.TransformerEncoderLayer(*LAYER, batch_first=True),
    "TransformerDecoderLayer": lambda module: module.TransformerDecoderLayer(*LAYER, batch_first=True),
    "TransformerEncoder": _stack("TransformerEncoder"),
    "TransformerDecoder": _stack("TransformerDecoder"),
    "Transformer": lambda module: module.Transformer(E, H, 1, 1, 40, 0.0, batch_first=True),
    "CrossEntropyLoss": lambda module: module.CrossEntropyLoss(),
}
OWN = {
    "EncoderLayer": lambda: pyllm.nn.EncoderLayer(E, H, 40, dropout=0.0, activation="swiglu", norm="rms_norm"),
    "DecoderLayer": lambda: pyllm.nn.DecoderLayer(E, H, 40, dropout=0.0, position="t5"),
    "SinusoidalPositions": lambda: pyllm.nn.SinusoidalPositions(E),
    "LearnedPositions": lambda: pyllm.nn.LearnedPositions(16, E),
}


def test_every_module_is_here():
    modules = {n for n in pyllm.nn.__all__ if isinstance(getattr(pyllm.nn, n), type)} - {"KVCache", "Packing"}
    inside = {"Rotary", "RelativePositionBias"}  # take or return what no graph holds
    assert DROP_INS.keys() | OWN.keys() | inside == modules


class Net(nn.Module):
    """A layer between others, and called with all it needs."""

    def __init__(self, name: str, layer: nn.Module):
        super().__init__()
        self.first, self.layer, self.count = nn.Linear(E, E), layer, arguments(name)

    def forward(self, x, index):
        x = self.first(x)
        if self.count == 0:
            return self.layer(x.flatten(0, 1), index.flatten())
        out = self.layer(*[x] * self.count)
        return out[0] if self.count == 3 else out


def arguments(name: str) -> int:
    if name == "CrossEntropyLoss":
        return 0
    return 3 if name == "MultiheadAttention" else 2 if "Decoder" in name or name == "Transformer" else 1


def nets(name: str) -> tuple[nn.Module, nn.Module]:
    """(pyllm's, torch's) in one model, with the same parameters."""
    ours, theirs = Net(name, DROP_INS[name](pyllm.nn)), Net(name, DROP_INS[name](nn))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(length: int = 5, batch: int = 2):
    return torch.randn(batch, length, E), torch.randint(E, (batch, length))


# --- torch.fx ---


def shape_of(graph: torch.fx.Graph) -> list[tuple]:
    return [(node.op, str(node.target), len(node.args), [*node.kwargs]) for node in graph.nodes]


@pytest.mark.parametrize("name", DROP_INS)
def test_fx_makes_torchs_nodes(name):
    ours, theirs = nets(name)
    traced = torch.fx.symbolic_trace(ours)
    assert shape_of(traced.graph) == shape_of(torch.fx.symbolic_trace(theirs).graph)
    x = inputs()
    assert torch.equal(traced(*x), ours(*x))
    assert torch.equal(pickle.loads(pickle.dumps(traced))(*x), ours(*x))


@pytest.mark.parametrize("name", DROP_INS)
def test_fx_traces_a_patched_model(name):
    _, model = nets(name)
    expected = shape_of(torch.fx.symbolic_trace(model).graph)
    pyllm.patch(model)
    assert shape_of(torch.fx.symbolic_trace(model).graph) == expected


@pytest.mark.parametrize("name", OWN)
def test_fx_takes_own_modules_as_leaves(name):
    net, x = Net(name, OWN[name]()), inputs()
    traced = torch.fx.symbolic_trace(net)
    assert ("call_module", "layer") in [(node.op, node.target) for node in traced.graph.nodes]
    assert torch.equal(traced(*x), net(*x))


def test_fx_takes_keyword_arguments():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = pyllm.nn.TransformerEncoderLayer(*LAYER, batch_first=True)

        def forward(self, x, padding):
            return self.layer(src=x, src_key_padding_mask=padding)

    net, x, padding = Masked(), inputs()[0], torch.tensor([[False] * 5, [False, False, True, True, True]])
    assert torch.equal(torch.fx.symbolic_trace(net)(x, padding), net(x, padding))


class Doubled(pyllm.nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def _hooked():
    norm = pyllm.nn.LayerNorm(E)
    norm.register_forward_hook(lambda module, args, out: 2 * out)
    return norm


def _replaced():
    norm = pyllm.nn.LayerNorm(E)
    original = norm.forward
    norm.forward = lambda x: 2 * original(x)
    return norm


@pytest.mark.parametrize("make", [lambda: Doubled(E), _hooked, _replaced], ids=["subclass", "hook", "own forward"])
def test_fx_does_what_is_around_a_norm_once(make):
    net, x = Net("LayerNorm", make()), inputs()
    assert torch.equal(torch.fx.symbolic_trace(net)(*x), net(*x))


def test_fx_traces_a_norm_that_is_the_model():
    norm, (x, _) = pyllm.nn.LayerNorm(E), inputs()
    assert torch.equal(torch.fx.symbolic_trace(norm)(x), norm(x))


@pytest.mark.parametrize("what", ["a trace", "a patch of torch's class"])
def test_layers_are_fused_again_after(what, monkeypatch):
    """Even if that was the first that was seen of the class."""
    layer, (x, _) = pyllm.nn.TransformerEncoderLayer(*LAYER, batch_first=True), inputs()
    plain._written.pop(nn.Linear, None)
    if what == "a trace":
        torch.fx.symbolic_trace(Net("LayerNorm", pyllm.nn.LayerNorm(E)))
    else:
        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight, self.bias))
            layer(x)
    with recording() as calls:
        layer(x)
    assert [call.op for call in calls] == ["attention", "add_layer_norm", "activation", "add_layer_norm"]


FUNCTIONS = {
    "layer_norm": lambda x: functional.layer_norm(x, (E,)),
    "rms_norm": lambda x: functional.rms_norm(x, (E,)),
    "softmax": lambda x: functional.softmax(x, -1),
    "log_softmax": lambda x: functional.log_softmax(x, dim=-1),
    "cross_entropy": lambda x: functional.cross_entropy(x[0], torch.arange(5)),
    "scaled_dot_product_attention": lambda x: functional.scaled_dot_product_attention(x, x, x),
    "ops.add_layer_norm": lambda x: ops.add_layer_norm(x, x)[0],
    "ops.attention": lambda x: ops.attention(x[None], x[None], x[None], is_causal=True),
    "ops.dropout_add": lambda x: ops.dropout_add(x, x),
    "ops.gelu": lambda x: ops.gelu(x, approximate="tanh"),
    "ops.layer_norm": lambda x: ops.layer_norm(x),
    "ops.softmax": lambda x: ops.softmax(x, is_causal=False),
    "ops.swiglu": lambda x: ops.swiglu(x, x),
}


class Calling(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x):
        return FUNCTIONS[self.name](x)


def _on_tensors(case):
    """(the call as a function of all its tensors, these, without a gradient)."""
    inputs = case.inputs(torch.float32)

    def function(*tensors):
        torch.manual_seed(3)
        return case.call(**dict(zip(inputs, tensors, strict=True)))

    return function, [t.detach() for t in inputs.values()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_functionalize_and_make_fx_of_operators(case):
    function, tensors = _on_tensors(case)
    copies = [[t.clone() for t in tensors] for _ in range(4)]
    expected = function(*copies[0])
    assert_equal = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert_equal(torch.func.functionalize(function)(*copies[1]), expected)
    traced = make_fx(function, tracing_mode="real")(*tensors)
    torch.manual_seed(3)
    assert_equal(traced(*copies[2]), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = function(*copies[3])
    described = [(o.shape, o.dtype) for o in (fake if isinstance(fake, tuple) else (fake,))]
    assert described == [(o.shape, o.dtype) for o in (expected if isinstance(expected, tuple) else (expected,))]


BROADCAST = {  # sizes that a trace knows as symbols, beside numbers
    "rotary": lambda x: ops.rotary(x, torch.ones(2, 5, 2), torch.ones(2, 5, 2)),
    "alibi": lambda x: ops.attention(x, x, x, alibi_slopes=torch.ones(2, 2)),
    "attention mask": lambda x: ops.attention(x, x, x, attn_mask=torch.zeros(8, 8)[:5, :5]),
    "softmax mask": lambda x: ops.softmax(x, attn_mask=torch.zeros(8)[:4]),
    "functional": lambda x: functional.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(8, 8)[:5, :5]),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_a_symbol_fits_a_number(name):
    torch._dynamo.reset()
    x = torch.randn(2, 2, 5, 4)
    compiled = torch.compile(BROADCAST[name], fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), BROADCAST[name](x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fx_makes_nodes_of_functions(name):
    traced, (x, _) = torch.fx.symbolic_trace(Calling(name)), inputs()
    module, _, function = name.rpartition(".")
    target = getattr(ops if module else functional, function)
    assert target in [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert torch.equal(traced(x), FUNCTIONS[name](x))


# --- TorchScript ---


def saved_and_loaded(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


class Fixed(nn.Module):
    """A net on an index that stays."""

    def __init__(self, net: nn.Module, index: torch.Tensor):
        super().__init__()
        self.net, self.index = net, index

    def forward(self, x):
        return self.net(x, self.index)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", DROP_INS)
def test_a_jit_trace_is_torchs(name, recorded, training):
    """On other sizes than those it was traced with, with gradients, and saved."""
    ours, theirs = (net.train(training) for net in nets(name))
    with torch.set_grad_enabled(recorded):
        traced = saved_and_loaded(torch.jit.trace(ours, inputs(), check_trace=False))
    x, index = inputs(batch=3)
    compare(Fixed(traced, index), Fixed(theirs, index), x)


@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_jit_trace_of_functions(name, recorded, target):
    """Of PyTorch's operators on every backend, with gradients; explain says so."""
    backend, device = target
    net, (x, _) = Calling(name), inputs()
    with pyllm.use_backend(backend), torch.set_grad_enabled(recorded), recording() as calls:
        traced = saved_and_loaded(torch.jit.trace(net, x.to(device), check_trace=False))
    assert [call.backend for call in calls] == ["reference"]
    assert "composed of PyTorch's operators under" in calls[0].reason and "torch.jit.trace" in calls[0].reason
    with pyllm.use_backend("reference"):
        compare(traced, net, x.to(device))


@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", OWN)
def test_a_jit_trace_of_own_modules(name, recorded):
    net, (x, index) = Net(name, OWN[name]()), inputs()
    with torch.set_grad_enabled(recorded):
        traced = saved_and_loaded(torch.jit.trace(net, (x, index), check_trace=False))
    with pyllm.use_backend("reference"):
        compare(Fixed(traced, index), Fixed(net, index), x)


@pytest.mark.parametrize("name", DROP_INS)
def test_scripting_is_torchs(name):
    """It leaves the module and its submodules what they are."""
    ours, theirs = DROP_INS[name](pyllm.nn), DROP_INS[name](nn)
    theirs.load_state_dict(ours.state_dict())
    before = [(n, type(m), m) for n, m in ours.named_modules()]
    scripted, (x, index) = saved_and_loaded(torch.jit.script(ours)), inputs()
    call = (x[0], index[0]) if name == "CrossEntropyLoss" else [x] * arguments(name)
    found, expected = (out if isinstance(out, tuple) else (out,) for out in (scripted(*call), theirs(*call)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [(n, type(m), m) for n, m in ours.named_modules()] == before


def test_scripting_a_model_with_layers_in_it():
    layers = [make(pyllm.nn) for name, make in DROP_INS.items() if arguments(name) == 1]
    model, (x, _) = nn.Sequential(*layers, nn.Linear(E, E)).eval(), inputs()
    truth = model.double()(x.double())
    plain = model.float()(x)
    assert_within_budget("output", saved_and_loaded(torch.jit.script(model))(x), truth, plain)


def test_scripting_shares_parameters():
    norm = pyllm.nn.LayerNorm(E)
    model = nn.Sequential(nn.Linear(E, E), norm)
    scripted, (x, _) = torch.jit.script(model), inputs()
    with torch.no_grad():
        norm.weight.mul_(3)
    assert torch.equal(scripted(x), torch.nn.functional.layer_norm(model[0](x), (E,), norm.weight, norm.bias))
    assert type(model[1]) is nn.LayerNorm and model[1].weight is norm.weight
    assert pyllm.patch(model).replaced == {"1": "LayerNorm"}


@pytest.mark.parametrize("name", OWN)
def test_scripting_own_modules_is_refused(name):
    with pytest.raises(NotImplementedError, match=f"{name} is not for torch.jit.script: use torch.export or"):
        torch.jit.script(nn.Sequential(OWN[name]()))


class Inheriting(pyllm.nn.LayerNorm):
    pass


class OwnForward(pyllm.nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def test_scripting_subclasses():
    with pytest.raises(NotImplementedError, match=r"Inheriting is not for torch\.jit\.script"):
        torch.jit.script(nn.Sequential(Inheriting(E)))
    norm, (x, _) = OwnForward(E), inputs()
    assert torch.equal(torch.jit.script(norm)(x), norm(x))


def bounds(*places: int) -> torch.Tensor:
    return torch.tensor(places, dtype=torch.int32)


TRACED_LENGTHS = {
    "attention_varlen": (
        lambda x, n: ops.attention_varlen(x, x, x, n, n, is_causal=True),
        ((6, 2, 8), bounds(0, 2, 6)),
        ((6, 2, 8), bounds(0, 5, 6)),
    ),
    "attention_decode": (
        lambda x, n: ops.attention_decode(x[:, :, :1], x, x, n, window=(3, 0)),
        ((2, 2, 16, 8), bounds(3, 5)),
        ((2, 2, 16, 8), bounds(9, 2)),
    ),
}


TRACES = {
    "jit": lambda call, example: torch.jit.trace(call, example, check_trace=False),
    "fx": lambda call, example: make_fx(call)(*example),
}


@pytest.mark.parametrize("how", TRACES)
@pytest.mark.parametrize("name", TRACED_LENGTHS)
def test_a_trace_follows_lengths(name, how):
    call, example, other = TRACED_LENGTHS[name]
    example, other = ((torch.randn(shape), lengths) for shape, lengths in (example, other))
    traced = TRACES[how](call, example)
    for given in (example, other):
        torch.testing.assert_close(traced(*given), call(*given))


def test_make_fx_packs_nothing():
    layer = pyllm.nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True)
    encoder = pyllm.nn.TransformerEncoder(layer, 2)
    x, paddings = (
        torch.randn(2, 4, E),
        torch.tensor([[[0, 0, 0, 1], [0, 1, 1, 1]], [[0, 1, 1, 1], [0, 0, 0, 0]]]).bool(),
    )
    traced = make_fx(lambda x, padding: encoder(x, src_key_padding_mask=padding))(x, paddings[0])
    for padding in paddings:
        torch.testing.assert_close(traced(x, padding)[~padding], encoder(x, src_key_padding_mask=padding)[~padding])
