"""Meta and fake tensors through every layer, other default devices and dtypes, and what comes after to_empty."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn import Module

import pyllm
from pyllm.nn import (
    DecoderLayer,
    EncoderLayer,
    KVCache,
    LearnedPositions,
    Rotary,
    SinusoidalPositions,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

B, S, E, H, FF = 2, 5, 8, 2, 16
BATCH_FIRST = {"batch_first": True}
POSITIONS = ("none", "alibi", "t5", "rotary")


def block(kind: type[Module], **options):
    return lambda **factory: kind(E, H, FF, **options, **factory)


def stack(kind: type[Module], layer: type[Module], depth: int = 2):
    return lambda **factory: kind(layer(E, H, FF, **BATCH_FIRST, **factory), depth)


def patched(**factory) -> Module:
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(E, H, FF, **BATCH_FIRST, **factory), 2)
    assert pyllm.patch(model).replaced
    return model


# name -> (make(**factory), names of the inputs)
MODULES = {
    "layer_norm": (lambda **factory: pyllm.nn.LayerNorm(E, **factory), "x"),
    "rms_norm": (lambda **factory: pyllm.nn.RMSNorm(E, **factory), "x"),
    "softmax": (lambda **_: pyllm.nn.Softmax(-1), "x"),
    "cross_entropy": (lambda **_: pyllm.nn.CrossEntropyLoss(label_smoothing=0.1), "loss"),
    "attention": (lambda **factory: pyllm.nn.MultiheadAttention(E, H, 0.1, **BATCH_FIRST, **factory), "attention"),
    "encoder layer": (block(TransformerEncoderLayer, **BATCH_FIRST), "layer"),
    "decoder layer": (block(TransformerDecoderLayer, **BATCH_FIRST), "decoder"),
    "encoder": (stack(TransformerEncoder, TransformerEncoderLayer), "encoder"),
    "decoder": (stack(TransformerDecoder, TransformerDecoderLayer), "decoder"),
    "transformer": (lambda **factory: pyllm.nn.Transformer(E, H, 1, 1, FF, **BATCH_FIRST, **factory), "transformer"),
    "patched": (patched, "encoder"),
    "sinusoidal": (lambda **factory: SinusoidalPositions(E, 16, **factory), "x"),
    "learned": (lambda **factory: LearnedPositions(16, E, **factory), "x"),
    **{f"block, {p}": (block(EncoderLayer, position=p, num_kv_heads=1), "block") for p in POSITIONS},
    **{f"crossing block, {p}": (block(DecoderLayer, position=p, activation="swiglu"), "crossing") for p in POSITIONS},
}


def inputs(kind: str, masked: bool, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[list, dict]:
    """Arguments and keywords."""
    x, memory = (torch.randn(B, S, E, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    padding = torch.zeros(B, S, dtype=torch.bool, device=device)
    padding[1, 2:] = True
    causal = torch.ones(S, S, dtype=torch.bool, device=device).triu(1)
    if kind == "loss":
        return [x.flatten(0, 1), torch.zeros(B * S, dtype=torch.int64, device=device)], {}
    arguments, masks = {
        "x": ([x], {}),
        "attention": ([x] * 3, {"key_padding_mask": padding, "attn_mask": causal}),
        "layer": ([x], {"src_key_padding_mask": padding, "src_mask": causal}),
        "encoder": ([x], {"src_key_padding_mask": padding}),
        "decoder": ([x, memory], {"tgt_mask": causal, "memory_key_padding_mask": padding}),
        "transformer": ([x, memory], {"src_key_padding_mask": padding, "tgt_mask": causal, "src_mask": causal}),
        "block": ([x], {"src_key_padding_mask": padding, "attn_mask": ~causal}),
        "crossing": ([x, memory], {"tgt_key_padding_mask": padding, "memory_key_padding_mask": padding}),
    }[kind]
    return arguments, masks if masked else {}


def results(module: Module, arguments: list, masks: dict) -> list[Tensor]:
    """Outputs and gradients of inputs and parameters, dropout seeded."""
    torch.manual_seed(0)
    out = module(*arguments, **masks)
    outs = list(out) if isinstance(out, tuple) else [out]
    wanted = [t for t in [*dict.fromkeys(arguments), *module.parameters()] if t.requires_grad]
    return [*outs, *torch.autograd.grad(outs[0].sum(), wanted)]


def described(tensors: list[Tensor]) -> list[tuple]:
    return [(tuple(t.shape), t.dtype) for t in tensors]


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_meta(name: str, training: bool, masked: bool):
    """Shapes and dtypes are those of a run with data."""
    make, kind = MODULES[name]
    real = results(make().train(training), *inputs(kind, masked))
    meta = results(make(device="meta").train(training), *inputs(kind, masked, "meta"))
    assert all(t.is_meta for t in meta) and described(meta) == described(real)
    with torch.device("meta"):
        assert described(results(make().train(training), *inputs(kind, masked, "meta"))) == described(real)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_fake(name: str, training: bool, masked: bool):
    make, kind = MODULES[name]
    module, given = make().train(training), inputs(kind, masked)
    real = results(module, *given)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = results(module, *inputs(kind, masked))
        assert all(isinstance(t, FakeTensor) for t in fake) and described(fake) == described(real)
    torch.testing.assert_close(results(module, *given), real, rtol=0, atol=0)  # nothing fake was kept


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith(("block", "crossing", "sin", "learned"))])
def test_made_of_fake_tensors(name: str):
    """torch.nn's own stacks copy layers, which no mode of fake tensors allows."""
    make, kind = MODULES[name]
    with FakeTensorMode():
        assert all(isinstance(t, FakeTensor) for t in results(make(), *inputs(kind, True)))


def generated(kind: type[Module], position: str, factory: dict, paged: dict, given: str = "cpu") -> Tensor:
    """Tokens 4 and 5 of a prompt of 3; given: the device of inputs."""
    torch.manual_seed(0)
    layer = kind(E, H, FF, causal=True, position=position, **factory).eval()
    cache = KVCache(1, B, 9, H, E // H, **factory, **paged)
    place = {"device": given, "dtype": factory.get("dtype", torch.get_default_dtype())}
    memory = [torch.randn(B, S, E, **place)] if kind is DecoderLayer else []
    x = torch.randn(B, 5, E, **place)
    with torch.no_grad():
        for part in x.split((3, 1, 1), 1):
            out = layer(part, *memory, cache=cache, layer=0)
            cache.advance(part.shape[1])
        assert cache.positions(1).shape == (B, 1) and "lengths=[5, 5]" in repr(cache)
        cache.reset(1)
        cache.reset()
    return out


@pytest.mark.parametrize("paged", [{}, {"page_size": 16}], ids=["contiguous", "paged"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", [EncoderLayer, DecoderLayer])
def test_generation(kind: type[Module], position: str, paged: dict):
    real = generated(kind, position, {}, paged)
    assert described([generated(kind, position, {"device": "meta"}, paged, "meta")]) == described([real])
    with torch.device("meta"):
        assert generated(kind, position, {}, paged, "meta").is_meta
        explicit = {"device": "cpu"}
        torch.testing.assert_close(generated(kind, position, explicit, paged), real, rtol=0, atol=0)
    with FakeTensorMode():
        assert described([generated(kind, position, {}, paged)]) == described([real])
    with default_dtype(torch.float64):
        assert generated(kind, position, {}, paged).dtype == torch.float64
        torch.testing.assert_close(generated(kind, position, {"dtype": torch.float32}, paged), real, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_decoding_beside_another_default_device(backend: str):
    with pyllm.use_backend(backend):
        expected = generated(EncoderLayer, "rotary", {}, {"page_size": 16})
        with torch.device("meta"):
            actual = generated(EncoderLayer, "rotary", {"device": "cpu"}, {"page_size": 16})
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_defaults_around_a_forward_alter_nothing(name: str):
    make, kind = MODULES[name]
    module, given = make(), inputs(kind, True)
    expected = results(module, *given)
    for setting in (torch.device("meta"), default_dtype(torch.float64), default_dtype(torch.float16)):
        with setting:
            actual = results(module, *given)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", MODULES)
def test_the_default_dtype_is_that_of_what_is_made(name: str):
    make, kind = MODULES[name]
    torch.manual_seed(1)
    given = inputs(kind, True, dtype=torch.float64)
    torch.manual_seed(2)
    explicit = results(make(dtype=torch.float64), *given)
    with default_dtype(torch.float64):
        torch.manual_seed(2)
        torch.testing.assert_close(results(make(), *given), explicit, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_after_to_empty_what_no_checkpoint_has_is_computed(name: str):
    make, kind = MODULES[name]
    good = make().eval()
    given = inputs(kind, True)
    expected = results(good, *given)
    for assign in (False, True):
        with torch.device("meta"):
            empty = make().eval()
        if not assign:
            empty.to_empty(device="cpu")
        assert not any(empty.load_state_dict(good.state_dict(), assign=assign))
        torch.testing.assert_close(results(empty, *given), expected, rtol=0, atol=0)


def test_positions_follow_the_input():
    """Every device and dtype has its own table, at full precision; those without data are not kept."""
    module = SinusoidalPositions(E, 16)
    exact = SinusoidalPositions(E, 16, dtype=torch.float64)(torch.zeros(1, 5, E, dtype=torch.float64))
    for dtype in (torch.bfloat16, torch.float64, torch.float32, torch.bfloat16):
        torch.testing.assert_close(module(torch.zeros(1, 5, E, dtype=dtype)), exact.to(dtype), rtol=0, atol=0)
    assert module(torch.zeros(1, 5, E, device="meta")).is_meta
    with torch.inference_mode():
        module(torch.zeros(1, 5, E, dtype=torch.float16))
    x = torch.zeros(1, 5, E, dtype=torch.float16, requires_grad=True)
    (module(x) * module(x)).sum().backward()
    assert x.grad.isfinite().all() and not [*module.buffers()] and not module.state_dict()
    compiled = torch.compile(SinusoidalPositions(E, 16), fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(compiled(torch.zeros(1, 5, E, dtype=dtype)), exact.to(dtype))


def test_rotary_tables_have_the_dtype_that_is_asked_for():
    with default_dtype(torch.float16):
        tables = Rotary(E).tables(torch.arange(5))
    torch.testing.assert_close(tables, Rotary(E).tables(torch.arange(5)), rtol=0, atol=0)
