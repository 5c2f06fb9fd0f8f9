"""Layers and functions of inputs with a size of 0: shape, graph and gradients are torch.nn's."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from block_case import DEFAULT, OPTIONS, PARALLEL, SIZES, B, E, everywhere, on
from conftest import WITHOUT_TORCH
from torch import Tensor

import pyllm
import pyllm.nn
import pyllm.nn.functional as PF
from pyllm.nn import DecoderLayer, EncoderLayer, KVCache, LearnedPositions, Rotary, SinusoidalPositions

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HEADS, HIDDEN = 8, 2, 16


def outcome(module, *args, **kwargs) -> list:
    """The results of a call, and the gradients of its floating arguments and the module's parameters."""
    leaves = [t.requires_grad_() for t in args if isinstance(t, Tensor) and t.is_floating_point()]
    leaves += module.parameters() if isinstance(module, torch.nn.Module) else []
    out = module(*args, **kwargs)
    outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    assert all(t.requires_grad for t in outs), "the graph is lost"
    return [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(t) for t in outs])]


def assert_torchs(make, *inputs, **kwargs) -> None:
    """make(torch.nn or pyllm.nn) -> a module or a function. inputs: tensors or the shapes of random ones."""
    found = []
    for nn in (torch.nn, pyllm.nn):
        torch.manual_seed(0)
        module = make(nn)
        args = [x.clone() if isinstance(x, Tensor) else torch.randn(x) for x in inputs]
        found.append(outcome(module, *args, **kwargs))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


ROWS = [
    pytest.param(lambda nn: nn.LayerNorm(WIDTH), (WIDTH,), id="layer_norm"),
    pytest.param(lambda nn: nn.RMSNorm(WIDTH), (WIDTH,), id="rms_norm"),
    pytest.param(lambda nn: nn.LayerNorm((3, WIDTH)), (3, WIDTH), id="layer_norm of two dimensions"),
    pytest.param(lambda nn: nn.RMSNorm((3, WIDTH)), (3, WIDTH), id="rms_norm of two dimensions"),
    pytest.param(lambda nn: nn.LayerNorm(0), (0,), id="layer_norm of no columns"),
    pytest.param(lambda nn: nn.RMSNorm(0), (0,), id="rms_norm of no columns"),
    pytest.param(lambda nn: nn.LayerNorm((0, 3)), (0, 3), id="layer_norm of no rows"),
    pytest.param(lambda nn: nn.RMSNorm((3, 0)), (3, 0), id="rms_norm of two dimensions, one of them 0"),
]


@pytest.mark.parametrize("leading", [(0,), (5, 0), (0, 5), (4,)], ids=str)
@pytest.mark.parametrize(("make", "trailing"), ROWS)
def test_norms(target, make, trailing: tuple, leading: tuple):
    with on(target):
        assert_torchs(make, (*leading, *trailing))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3), (0,)], ids=str)
@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_softmaxes(target, name: str, shape: tuple):
    def make(nn, dim):
        if nn is torch.nn:
            return getattr(nn, name)(dim)
        return nn.Softmax(dim) if name == "Softmax" else lambda x: PF.log_softmax(x, dim)

    for dim in range(-len(shape), len(shape)):
        with on(target):
            assert_torchs(lambda nn, dim=dim: make(nn, dim), shape)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (4, 5, 0), (0, 0), (2, 0, 0), (0, 5, 2, 0)], ids=str)
def test_losses(target, shape: tuple, reduction: str, smoothing: float):
    with on(target):
        index = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
        assert_torchs(lambda nn: nn.CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing), shape, index)


def test_a_target_among_no_classes_is_torchs_error():
    for function in (F.cross_entropy, PF.cross_entropy):
        with pytest.raises(IndexError, match="Target 0 is out of bounds"):
            function(torch.randn(4, 0), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        pytest.param((0, 2, 3, 8), (0, 2, 4, 8), (0, 2, 4, 8), id="batch"),
        pytest.param((2, 0, 3, 8), (2, 0, 4, 8), (2, 0, 4, 8), id="heads"),
        pytest.param((2, 2, 0, 8), (2, 2, 4, 8), (2, 2, 4, 8), id="queries"),
        pytest.param((2, 2, 3, 8), (2, 2, 0, 8), (2, 2, 0, 8), id="keys"),
        pytest.param((2, 2, 0, 8), (2, 2, 0, 8), (2, 2, 0, 8), id="length"),
        pytest.param((2, 2, 3, 0), (2, 2, 4, 0), (2, 2, 4, 0), id="head_dim"),
        pytest.param((2, 2, 3, 0), (2, 2, 4, 0), (2, 2, 4, 5), id="head_dim of queries"),
        pytest.param((2, 2, 3, 8), (2, 2, 4, 8), (2, 2, 4, 0), id="head_dim of values"),
        pytest.param((3, 0, 2, 3, 8), (3, 0, 2, 4, 8), (3, 0, 2, 4, 8), id="leading"),
        pytest.param((0, 8), (4, 8), (4, 8), id="2d"),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_scaled_dot_product_attention(target, masked: bool, query: tuple, key: tuple, value: tuple):
    def make(nn):
        function = (F if nn is torch.nn else PF).scaled_dot_product_attention
        return (lambda q, k, v, mask: function(q, k, v, mask)) if masked else function

    with on(target):
        masks = [torch.ones(query[-2], key[-2], dtype=torch.bool)] if masked else []
        assert_torchs(make, query, key, value, *masks)


LENGTHS = list(itertools.product((1, 0), (2, 0), (3, 0)))[1:]  # batch, queries, keys: one of them 0 or more


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", LENGTHS, ids=str)
@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_multihead_attention(target, sizes: tuple, batch_first: bool):
    batch, queries, keys = sizes

    def shape(length, width=WIDTH):
        return (batch, length, width) if batch_first else (length, batch, width)

    with on(target):
        kinds = (({}, (WIDTH, WIDTH)), ({"kdim": 4, "vdim": 6}, (4, 6)), ({"bias": False}, (WIDTH, WIDTH)))
        for options, widths in kinds:
            for kwargs in ({"need_weights": False}, {}, {"average_attn_weights": False}):
                assert_torchs(
                    lambda nn, o=options: nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **o),
                    *(shape(n, w) for n, w in zip((queries, keys, keys), (WIDTH, *widths), strict=True)),
                    **kwargs,
                )
        masks = {"attn_mask": torch.zeros(queries, keys), "key_padding_mask": torch.zeros(batch, keys).bool()}
        module = pyllm.nn.MultiheadAttention(
            WIDTH, HEADS, batch_first=batch_first, add_bias_kv=True, add_zero_attn=True, dropout=0.1
        )
        out, *gradients = outcome(module, *(torch.randn(shape(n)) for n in (queries, keys, keys)), **masks)[::2]
        assert out.shape == shape(queries)
        assert (batch and queries) or not any(g.any() for g in gradients)


def test_multihead_attention_of_one_empty_sample():
    assert_torchs(lambda nn: nn.MultiheadAttention(WIDTH, HEADS), *[(0, WIDTH)] * 3)


LAYERS = {
    "post-norm": {},
    "batch_first": {"batch_first": True},
    "pre-norm": {"norm_first": True},
    "gelu": {"activation": "gelu"},
}


@pytest.mark.parametrize("sizes", LENGTHS, ids=str)
@pytest.mark.parametrize("name, target", everywhere(LAYERS, "post-norm"))
def test_torchs_layers(name: str, target, sizes: tuple):
    options = LAYERS[name]
    batch, queries, keys = sizes
    src, tgt = ((batch, n, WIDTH) if "batch_first" in options else (n, batch, WIDTH) for n in (keys, queries))
    arguments = (WIDTH, HEADS, HIDDEN, 0.0)
    with on(target):
        if 0 in (batch, keys):
            assert_torchs(lambda nn: nn.TransformerEncoderLayer(*arguments, **options), src)
            assert_torchs(lambda nn: nn.TransformerEncoder(nn.TransformerEncoderLayer(*arguments, **options), 2), src)
        assert_torchs(lambda nn: nn.TransformerDecoderLayer(*arguments, **options), tgt, src)
        assert_torchs(lambda nn: nn.TransformerDecoder(nn.TransformerDecoderLayer(*arguments, **options), 2), tgt, src)
        assert_torchs(lambda nn: nn.Transformer(WIDTH, HEADS, 1, 1, HIDDEN, 0.0, **options), src, tgt)


@pytest.mark.parametrize("save", ["all", "minimal", "recompute"])
@pytest.mark.parametrize("target", DEFAULT)
def test_a_padded_batch_of_nothing(target, save: str):
    """torch's raises here; in training, with dropout, on each memory plan."""
    with on(target):
        layer = pyllm.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, save=save)
        for shape in ((0, 5), (2, 0), (0, 0)):
            padding = torch.ones(shape, dtype=torch.bool)
            x = torch.randn(*shape, WIDTH)
            out, *gradients = outcome(pyllm.nn.TransformerEncoder(layer, 2), x, src_key_padding_mask=padding)
            assert out.shape == x.shape and gradients[0].shape == x.shape and not any(g.any() for g in gradients)


@pytest.mark.parametrize("hidden", [0, HIDDEN])
def test_a_feed_forward_network_of_no_columns(hidden: int):
    assert_torchs(lambda nn: nn.TransformerEncoderLayer(WIDTH, HEADS, hidden, 0.0), (3, 2, WIDTH))


@pytest.mark.parametrize("shape", [(0, 5, E), (B, 0, E), (0, 0, E)], ids=str)
@pytest.mark.parametrize("name, target", everywhere(OPTIONS | PARALLEL, "rotary interleaved", "defaults", "t5"))
def test_blocks(name: str, target, shape: tuple):
    with on(target):
        for kind, inputs in ((EncoderLayer, 1), (DecoderLayer, 2)):
            options = (OPTIONS | PARALLEL)[name]
            if kind is DecoderLayer and options.get("parallel_residual"):
                continue
            block = kind(*SIZES, **options)
            out, *gradients = outcome(block, *(torch.randn(shape) for _ in range(inputs)))
            assert out.shape == shape
            assert [g.shape for g in gradients[inputs:]] == [p.shape for p in block.parameters()]
            assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("shape", [(0, 5, WIDTH), (2, 0, WIDTH)], ids=str)
def test_positions(shape: tuple):
    for module in (SinusoidalPositions(WIDTH, 16), LearnedPositions(16, WIDTH)):
        for positions in (None, torch.zeros(shape[:-1], dtype=torch.int64)):
            out, *gradients = outcome(module, torch.randn(shape), positions)
            assert out.shape == shape and not any(g.any() for g in gradients)
    rotary = Rotary(WIDTH)
    out, gradient = outcome(rotary, torch.randn(shape)[:, None], rotary.tables(torch.arange(shape[1])))
    assert out.shape == gradient.shape == (shape[0], 1, *shape[1:])


def test_unpad_and_pad():
    for shape in ((0, 5), (2, 0), (2, 5)):
        x = torch.randn(*shape, WIDTH, requires_grad=True)
        tokens, packing = pyllm.nn.unpad(x, torch.ones(shape, dtype=torch.bool))
        out = pyllm.nn.pad(tokens, packing)
        assert tokens.shape == (0, WIDTH) and out.shape == x.shape and not out.any()
        out.sum().backward()
        assert not x.grad.any()


@pytest.mark.parametrize("paged", [{}, {"page_size": 16}], ids=["contiguous", "paged"])
@pytest.mark.parametrize("target", DEFAULT)
def test_no_new_tokens_for_a_cache(target, paged: dict):
    with on(target), torch.no_grad():
        layer = EncoderLayer(*SIZES, causal=True, position="rotary").eval()
        cache = KVCache(1, B, 9, layer.self_attn.kv_heads, layer.self_attn.head_dim, **paged)
        for new in (0, 3, 0):
            assert layer(torch.randn(B, new, E), cache=cache, layer=0).shape == (B, new, E)
            cache.advance(new)
        assert cache.lengths.tolist() == [3] * B
