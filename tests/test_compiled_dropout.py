"""Compiled programs drop what eager ones drop under the same seed, and leave PyTorch's generator where eager does."""

import pytest
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from pyllm import ops
from pyllm.nn import DecoderLayer, EncoderLayer, MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer

pytestmark = pytest.mark.usefixtures("one_thread")

P, E = 0.3, 16
BOUNDS = torch.tensor([0, 3, 7], dtype=torch.int32)

# each of x (B, S, E)
OPERATORS = {
    "attention": lambda x: ops.attention(*[x[:, None]] * 3, dropout_p=P),
    "attention_varlen": lambda x: ops.attention_varlen(*[x[0, :, None]] * 3, BOUNDS, BOUNDS, dropout_p=P),
    "dropout_add": lambda x: ops.dropout_add(x, x, dropout_p=P),
    "add_layer_norm": lambda x: ops.add_layer_norm(x, x, dropout_p=P)[1],
    "add_rms_norm": lambda x: ops.add_rms_norm(x, x, dropout_p=P)[1],
    "gelu": lambda x: ops.gelu(x, dropout_p=P),
    "swiglu": lambda x: ops.swiglu(x, dropout_p=P),
}
LAYERS = {
    "attention": lambda: Attending(MultiheadAttention(E, 2, P, batch_first=True)),
    "encoder": lambda: TransformerEncoderLayer(E, 2, 32, P, batch_first=True),
    "decoder": lambda: Twice(TransformerDecoderLayer(E, 2, 32, P, batch_first=True)),
    "block": lambda: EncoderLayer(E, 2, 32, dropout=P, norm="rms_norm", activation="swiglu", norm_first=True),
    "parallel": lambda: EncoderLayer(E, 2, 32, dropout=P, parallel_residual=True, norm_first=True),
    "crossing": lambda: Twice(DecoderLayer(E, 2, 32, dropout=P, position="t5")),
}


class Attending(Module):
    def __init__(self, attention: Module):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Twice(Module):
    def __init__(self, layer: Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


def results(function, x: Tensor, parameters=()) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Outputs, gradients, and what the generator draws next."""
    torch.manual_seed(5)
    x = x.detach().requires_grad_()
    outs = function(x)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    gradients = torch.autograd.grad(sum(out.square().sum() for out in outs), [x, *parameters])
    return [out.detach() for out in outs], list(gradients), torch.rand(1)


EXACTLY = {"rtol": 0, "atol": 0}


def assert_same(compiled: tuple, eager: tuple, outputs: dict, gradients: dict) -> None:
    """outputs and gradients: their tolerances; a compiler may round what its own kernels compute in another order."""
    torch.testing.assert_close(compiled[0], eager[0], **outputs)
    torch.testing.assert_close(compiled[1], eager[1], **gradients)
    assert torch.equal(compiled[2], eager[2]), "the generator is elsewhere"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition", "inductor"])
def test_operators(backend: str, dynamic: bool):
    """Each is called twice with the same arguments, which are two draws."""
    torch._dynamo.reset()
    x = torch.randn(1, 7, E)

    def every(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(operator(x) for operator in OPERATORS.values() for _ in range(2))

    compiled = torch.compile(every, fullgraph=True, backend=backend, dynamic=dynamic)
    eager = results(every, x)
    for _ in range(2):
        assert_same(results(compiled, x), eager, EXACTLY, {})
    for first, second in zip(eager[0][::2], eager[0][1::2], strict=True):
        assert not torch.equal(first, second)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, backend: str, recomputed: bool):
    torch._dynamo.reset()
    layer, x = LAYERS[name](), torch.randn(2, 7, E)
    run = (lambda x: checkpoint(layer, x, use_reentrant=False)) if recomputed else layer
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    eager = results(layer, x, [*layer.parameters()])
    assert_same(results(compiled, x, [*layer.parameters()]), eager, EXACTLY, EXACTLY)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["encoder", "parallel"])
def test_layers_in_kernels_of_the_compiler(name: str, recomputed: bool):
    torch._dynamo.reset()
    layer, x = LAYERS[name](), torch.randn(2, 7, E)
    run = (lambda x: checkpoint(layer, x, use_reentrant=False)) if recomputed else layer
    compiled = torch.compile(run, fullgraph=True)
    eager = results(layer, x, [*layer.parameters()])
    assert_same(results(compiled, x, [*layer.parameters()]), eager, {}, {})


def test_fused_under_a_compiler_too():
    """torch.nn's dropout, which draws other bits, is not called."""
    for name, make in LAYERS.items():
        torch._dynamo.reset()
        recorded = torch._dynamo.testing.EagerAndRecordGraphs()
        torch.compile(make(), fullgraph=True, backend=recorded)(torch.randn(2, 7, E))
        (graph,) = recorded.graphs
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert torch.nn.functional.dropout not in called, name
        assert any("draw_rng" in str(target) for target in called)


def test_exported():
    layer, x = LAYERS["encoder"](), torch.randn(2, 7, E)
    torch.manual_seed(5)
    expected = layer(x)
    exported = torch.export.export(layer, (x,)).module()
    torch.manual_seed(5)
    assert torch.equal(exported(x), expected)


def test_the_operator_itself():
    x = torch.randn(3)
    torch.library.opcheck(torch.ops.pyllm.draw_rng.default, (x, 0), test_utils=("test_schema", "test_faketensor"))
    assert torch.Tag.nondeterministic_seeded in torch.ops.pyllm.draw_rng.default.tags
