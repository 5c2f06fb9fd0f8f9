"""What a layer keeps for its backward, and that what it makes again instead is the same to the bit."""

import pytest
import torch
from conftest import KERNELS
from torch.utils.checkpoint import checkpoint
from torch_parity import E, H, compare, pair, results

import pyllm
from pyllm.benchmarks.timing import saved_memory
from pyllm.nn import DecoderLayer, EncoderLayer, TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer
from pyllm.nn.memory import PLANS

B, L, S = 3, 5, 7
LAYERS = {
    "encoder": lambda **o: TransformerEncoderLayer(E, H, 40, 0.3, activation="gelu", batch_first=True, **o),
    "encoder, pre-norm": lambda **o: TransformerEncoderLayer(E, H, 40, 0.3, batch_first=True, norm_first=True, **o),
    "decoder": lambda **o: TransformerDecoderLayer(E, H, 40, 0.3, batch_first=True, **o),
    "decoder, pre-norm": lambda **o: TransformerDecoderLayer(E, H, 40, 0.3, batch_first=True, norm_first=True, **o),
    "no biases": lambda **o: TransformerEncoderLayer(E, H, 40, 0.3, batch_first=True, bias=False, **o),
    "gated": lambda **o: EncoderLayer(
        E, H, 40, activation="swiglu", norm="rms_norm", norm_first=True, position="rotary", dropout=0.3, **o
    ),
    "parallel": lambda **o: EncoderLayer(E, H, 40, norm_first=True, parallel_residual=True, shared_norm=True, **o),
    "own activation": lambda **o: EncoderLayer(E, H, 40, activation=torch.tanh, **o),
    "cross": lambda **o: DecoderLayer(E, H, 40, norm="rms_norm", activation="gelu_tanh", **o),
}


def inputs(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    lengths = (L, S) if name.startswith(("decoder", "cross")) else (L,)
    return [torch.randn(B, n, E, dtype=dtype, device=device) for n in lengths]


def seeded(module, arguments):
    torch.manual_seed(3)
    return results(module, arguments, {})


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(
    "target, name, dtype",
    # Interpreted, the layers of the most parts are enough: what is made again is the layers' code.
    [
        pytest.param(*target.values, name, dtype, id=f"{target.id}-{name}-{dtype}")
        for target in KERNELS
        for name in LAYERS
        for dtype in (torch.float32, torch.bfloat16)
        if target.values[0] != ("triton", "cpu") or (dtype == torch.float32 and name in ("decoder", "gated"))
    ],
)
def test_plans_agree_to_the_bit(target, name, dtype):
    backend, device = target
    layer = LAYERS[name]().to(device, dtype)
    arguments = inputs(name, device, dtype)
    with pyllm.use_backend(backend):
        layer.save = "all"
        expected = seeded(layer, arguments)
        for layer.save in PLANS[1:]:
            assert_same(seeded(layer, arguments), expected)


@pytest.mark.parametrize("save", PLANS)
def test_the_backend_of_the_forward_makes_it_again(save):
    """Also where another one is asked for by the time of the backward."""
    layer = LAYERS["encoder"](save=save)
    arguments = inputs("encoder")

    class Leaving(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, *args):
            with pyllm.use_backend("reference"):
                return self.layer(*args)

    with pyllm.use_backend("reference"):
        expected = seeded(layer, arguments)
    assert_same(
        {n.replace("layer.", ""): t for n, t in seeded(Leaving(), arguments).items()},
        expected,
    )


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("save", PLANS)
def test_numbers_are_torchs(save, norm_first):
    ours, theirs = pair("TransformerEncoderLayer", E, H, 40, 0.0, batch_first=True, norm_first=norm_first)
    ours.save = save
    compare(ours, theirs, *inputs("encoder"))


@pytest.mark.parametrize("save", PLANS)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_a_stack_hands_on_how_its_results_are_made(save, norm_first):
    layer = LAYERS["encoder, pre-norm" if norm_first else "encoder"](save=save)
    stack = TransformerEncoder(layer, 3)
    assert [layer.save for layer in stack.layers] == [save] * 3
    arguments = inputs("encoder")
    found = seeded(stack, arguments)

    class Alone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = stack.layers

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    assert_same(found, seeded(Alone(), arguments))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_kept_bytes(norm_first):
    """At the proportions of BERT-base: at most 0.55 of torch.nn's, and 0.35 when recomputing."""
    options = {"dropout": 0.1, "activation": "gelu", "batch_first": True, "norm_first": norm_first}
    x = torch.randn(2, 128, 96, requires_grad=True)

    def kept(module, **more):
        layer = module.TransformerEncoderLayer(96, 12, 384, **options, **more)
        return saved_memory(lambda: layer(x), "cpu")

    torchs = kept(torch.nn)
    ours = {save: kept(pyllm.nn, save=save) for save in PLANS}
    assert ours["recompute"] < ours["minimal"] < ours["all"] < torchs
    assert ours["minimal"] <= 0.55 * torchs
    assert ours["recompute"] <= 0.35 * torchs
    unit = x.numel() * x.element_size()
    units = {"all": 16, "minimal": 10, "recompute": 6} if norm_first else {"all": 16, "minimal": 11, "recompute": 7}
    statistics = 2 * 128 * (12 + 4) * 4 + 64  # log-sum-exp; mean and rstd twice; seeds
    for save, expected in units.items():
        assert (expected - 1) * unit <= ours[save] <= (expected - 1) * unit + statistics, save  # x itself is excluded


@pytest.mark.parametrize("save", PLANS)
def test_checkpointing_changes_no_bit(save):
    layer = LAYERS["encoder"](save=save)
    arguments = inputs("encoder")
    expected = seeded(layer, arguments)

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, *inputs):
            return checkpoint(self.layer, *inputs, use_reentrant=False)

    found = {n.replace("layer.", ""): t for n, t in seeded(Checkpointed(), arguments).items()}
    assert_same(found, expected)
    x = arguments[0].requires_grad_()
    kept = saved_memory(lambda: checkpoint(layer, x, use_reentrant=False), "cpu")
    assert kept <= torch.get_rng_state().nbytes + x.nbytes


@pytest.mark.parametrize("save", PLANS)
def test_frozen_weights(save):
    """Gradients of the others are what they are without freezing; the input needs none either."""
    layer = LAYERS["encoder"](save=save)
    (x,) = inputs("encoder")
    every = seeded(layer, [x])
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("linear1.bias" in name or "in_proj" in name)
    torch.manual_seed(3)
    y = layer(x)
    generator = torch.Generator().manual_seed(0)
    y.backward(torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y))
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, every[f"gradient of {name}"]), name
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("save", PLANS)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_autocast(save, norm_first):
    """Parameters and their gradients stay float32; numbers are within the budget of torch.nn's under autocast."""
    ours, theirs = pair("TransformerEncoderLayer", E, H, 40, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    ours.save = save

    class Autocast(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
                return self.layer(x)

    compare(Autocast(ours), Autocast(theirs), *inputs("encoder"))


def test_hooks_and_replaced_modules_are_called():
    layer = LAYERS["encoder"]()
    called = []
    layer.linear1.register_forward_hook(lambda *_: called.append("linear1"))
    layer.self_attn.register_forward_hook(lambda *_: called.append("self_attn"))
    layer.linear2 = torch.nn.Sequential(layer.linear2)
    layer(*inputs("encoder"))
    assert called == ["self_attn", "linear1"]


@pytest.mark.parametrize("save", PLANS)
def test_a_branch_may_change_what_the_next_one_reads(save):
    """In place, where both read one norm: the second is not computed from what the norm made."""
    options = {"dropout": 0.0, "norm_first": True, "parallel_residual": True, "shared_norm": True}
    layer = pyllm.nn.EncoderLayer(E, H, 40, **options, save=save)
    layer.self_attn.register_forward_pre_hook(lambda module, args: (args[0].mul_(1.5), None)[1])
    weight, x = layer.ffn.linear1.weight, torch.randn(2, 5, E, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x).sin().sum(), weight)
    layer.save = "all"
    torch.testing.assert_close(found, torch.autograd.grad(layer(x).sin().sum(), weight)[0])


@pytest.mark.parametrize("make", [LAYERS["encoder"], LAYERS["gated"], LAYERS["decoder"]])
def test_unknown_plan(make):
    with pytest.raises(ValueError, match="save must be one of all, minimal, recompute, got 'some'"):
        make(save="some")
