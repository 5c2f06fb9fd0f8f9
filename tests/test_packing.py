"""unpad and pad, and stacks that run on tokens without padding: the same numbers where there is a token."""

import threading
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from torch_parity import SMALL, E, H, assert_parity, compare, pair, results

import pyllm
from pyllm.nn import EncoderLayer, Packing, TransformerEncoder, TransformerEncoderLayer, pad, unpad
from pyllm.ops import attention_varlen
from pyllm.testing import assert_within_budget

B, S = 4, 9
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)
PADDING = torch.ones(B, S, dtype=torch.bool)
PADDING[0, :3] = False
PADDING[1, :] = False
ONE_IN_TEN = torch.zeros(B, S, dtype=torch.bool)
ONE_IN_TEN[0, 6:] = True  # 3 of 36
KEPT = torch.arange(S) >= torch.tensor([3, 9, 1, 6])[:, None]
PADDING[3, 4:8] = False  # before and after; sample 2 is nothing but padding


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("width", [(), (5,), (2, 3)], ids=str)
def test_pad_is_the_inverse(width, batch_first):
    x = torch.randn(B, S, *width, dtype=torch.float64, requires_grad=True)
    given = x if batch_first else x.transpose(0, 1)
    tokens, packing = unpad(given, PADDING, batch_first)
    assert torch.equal(tokens, x[~PADDING])
    assert packing.cu_seqlens.tolist() == [0, 3, 12, 12, 16]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.positions.tolist() == [0, 1, 2, *range(9), 4, 5, 6, 7]
    assert packing.share == 16 / 36
    padded = pad(tokens, packing)
    assert padded.shape == given.shape
    padded = padded if batch_first else padded.transpose(0, 1)
    assert torch.equal(padded[~PADDING], x[~PADDING])
    assert not padded[PADDING].any()
    packing = Packing.of(PADDING)
    torch.autograd.gradcheck(lambda t: pad(unpad(t, PADDING)[0] ** 2, packing), (x,))


@pytest.mark.parametrize("padding", [torch.ones(2, 3, dtype=torch.bool), torch.zeros(0, 3, dtype=torch.bool)], ids=str)
def test_nothing_to_pack(padding):
    x = torch.randn(*padding.shape, 5)
    tokens, packing = unpad(x, padding)
    assert tokens.shape == (0, 5)
    assert torch.equal(pad(tokens, packing), torch.zeros_like(x))


def test_errors():
    x = torch.randn(B, S, E)
    with pytest.raises(TypeError, match="bool"):
        unpad(x, PADDING.float())
    with pytest.raises(ValueError, match=r"\(B, S\)"):
        unpad(x, PADDING[0])
    with pytest.raises(ValueError, match=r"\(4, 9\)"):
        unpad(x[:2], PADDING)
    tokens, packing = unpad(x, PADDING)
    with pytest.raises(ValueError, match="16 rows"):
        pad(tokens[1:], packing)


class OnTokens(torch.nn.Module):
    """A stack whose outputs at padded positions are not looked at."""

    def __init__(self, stack, padding, batch_first=True):
        super().__init__()
        self.stack, self.padding, self.batch_first = stack, padding, batch_first

    def forward(self, x, **options):
        out = self.stack(x, src_key_padding_mask=self.padding, **options)
        return (out if self.batch_first else out.transpose(0, 1))[~self.padding]


def stacks(batch_first=True, norm_first=False, dropout=0.0, **options):
    """A stack of pyllm's, and torch's with the same parameters."""
    layers = pair("TransformerEncoderLayer", E, H, 40, dropout, batch_first=batch_first, norm_first=norm_first)
    ours = TransformerEncoder(layers[0], 2, pyllm.nn.LayerNorm(E), **options)
    theirs = torch.nn.TransformerEncoder(layers[1], 2, torch.nn.LayerNorm(E), enable_nested_tensor=False)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.fixture
def packed_calls(monkeypatch):
    """The options of attention on packed tokens."""
    calls = []

    def noting(*args, **options):
        calls.append(options)
        return attention_varlen(*args, **options)

    monkeypatch.setattr(pyllm.ops, "attention_varlen", noting)
    return calls


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_a_stack_packs_and_gives_torchs_numbers(batch_first, norm_first, causal, packed_calls):
    padding = PADDING[[0, 1, 3]]  # torch gives NaN where a sample is nothing but padding
    padding[2, 0] = False  # and where a query's only keys are padding, which causal leaves the first
    ours, theirs = (OnTokens(s, padding, batch_first) for s in stacks(batch_first, norm_first))
    x = torch.randn((3, S, E) if batch_first else (S, 3, E))
    compare(ours, theirs, x, **({"mask": CAUSAL} if causal else {}))
    assert len(packed_calls) == 2, "one for each layer"


def test_padded_positions_hold_zeros_before_the_final_norm(packed_calls):
    """As in torch's own packed inference; a sample of nothing but padding included."""
    stack, _ = stacks()
    x = torch.randn(B, S, E)
    out = stack(x, src_key_padding_mask=PADDING)
    assert torch.equal(out[PADDING], stack.norm.bias.expand_as(out[PADDING]))
    assert packed_calls


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_packed_is_padded(dropout, packed_calls):
    """With attention's dropout too, which does not know of the packing where padding is behind the tokens."""
    stack, _ = stacks()
    for layer in stack.layers:
        layer.self_attn.dropout = dropout
    x, behind = torch.randn(B, S, E), torch.arange(S) >= torch.tensor([3, 9, 0, 6])[:, None]

    def found(dtype, packed):
        stack.enable_nested_tensor = packed
        torch.manual_seed(1)
        return results(OnTokens(stack.to(dtype), behind), [x], {}, dtype)

    actual = found(torch.float32, True)
    assert len(packed_calls) == 2
    assert_parity(actual, [(found(torch.float32, False), found(torch.float64, False))])
    assert len(packed_calls) == 2


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_packed_tokens(training, packed_calls):
    """Each token is dropped by itself with the layers' probability, in training alone."""
    stack, _ = stacks(dropout=0.5)
    stack.train(training)
    x = torch.randn(B, S, E)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(stack(x, src_key_padding_mask=PADDING)[~PADDING])
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2]) != training
    assert {options["dropout_p"] for options in packed_calls} == {0.5 if training else 0.0}


def test_a_batch_of_padding_alone(packed_calls):
    """There is no token to compute: it stays padded, and is finite, where torch gives NaN."""
    stack, _ = stacks()
    x = torch.randn(B, S, E, requires_grad=True)
    out = stack(x, src_key_padding_mask=torch.ones_like(PADDING))
    stack.pack = False
    assert torch.equal(out, stack(x, src_key_padding_mask=torch.ones_like(PADDING)))
    assert out.isfinite().all() and torch.autograd.grad(out.sum(), x)[0].isfinite().all()
    assert not packed_calls


def extended(**options):
    """A stack whose attention has keys of its own."""
    layer = TransformerEncoderLayer(E, H, 40, 0.0, batch_first=True)
    layer.self_attn = pyllm.nn.MultiheadAttention(E, H, batch_first=True, **options)
    return TransformerEncoder(layer, 2)


@pytest.mark.parametrize("options", [{"add_zero_attn": True}, {"add_bias_kv": True}], ids=str)
def test_attention_with_more_keys_than_tokens(options, packed_calls):
    stack = extended(**options)
    layer = torch.nn.TransformerEncoderLayer(E, H, 40, 0.0, batch_first=True)
    layer.self_attn = torch.nn.MultiheadAttention(E, H, batch_first=True, **options)
    theirs = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    theirs.load_state_dict(stack.state_dict())
    compare(OnTokens(stack, PADDING), OnTokens(theirs, PADDING), torch.randn(B, S, E))
    assert not packed_calls


def hooked(stack):
    stack.layers[0].self_attn.register_forward_hook(lambda *_: None)
    return stack


class Sub(TransformerEncoderLayer):
    pass


@pytest.mark.parametrize(
    ("stack", "options"),
    [
        pytest.param(lambda: stacks(enable_nested_tensor=False)[0], {}, id="switched off"),
        pytest.param(lambda: stacks()[0], {"mask": torch.zeros(S, S)}, id="a mask"),
        pytest.param(lambda: stacks()[0], {"src_key_padding_mask": PADDING.float()}, id="float padding"),
        pytest.param(lambda: stacks()[0], {"src_key_padding_mask": torch.zeros_like(PADDING)}, id="no padding"),
        pytest.param(lambda: hooked(stacks()[0]), {}, id="a hook"),
        pytest.param(lambda: TransformerEncoder(Sub(E, H, 40, batch_first=True), 2), {}, id="a subclass"),
        pytest.param(lambda: stacks()[0], {"src_key_padding_mask": ONE_IN_TEN}, id="little padding"),
    ],
)
def test_what_is_not_packed(stack, options, packed_calls):
    out = stack()(torch.randn(B, S, E), **{"src_key_padding_mask": PADDING, **options})
    assert out.isfinite().all()
    assert not packed_calls


def test_a_decoder_that_looks_at_padding_gets_what_torchs_gets(packed_calls):
    """Transformer without memory_key_padding_mask: the memory of padded positions is used, so it is computed."""
    ours, theirs = pair("Transformer", **SMALL, dropout=0.0, batch_first=True)
    padding = PADDING[[0, 1, 3]]
    src, tgt = torch.randn(3, S, E), torch.randn(3, 5, E)
    compare(ours, theirs, src, tgt, src_key_padding_mask=padding)
    assert not packed_calls
    compare(ours, theirs, src, tgt, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    assert packed_calls


@pytest.mark.parametrize("attention_dropout", [0.0, 0.5])
@pytest.mark.parametrize("position", ["none", "rotary", "rotary with gaps", "alibi", "t5"])
def test_a_block_on_tokens(position, attention_dropout):
    """Dropout is the same to the bit where padding is behind the tokens."""
    name, _, gaps = position.partition(" ")
    options = {"position": name, "dropout": 0.0, "attention_dropout": attention_dropout if not gaps else 0.0}
    layer = EncoderLayer(E, H, 40, norm_first=True, activation="swiglu", causal=True, **options)
    x = torch.randn(B, S, E, requires_grad=True)
    padding = torch.arange(S) >= torch.tensor([3, 9, 1, 6])[:, None]
    if gaps:
        padding[1, 2:5] = padding[3, 0] = True
    tokens, packing = unpad(x, padding)
    torch.manual_seed(3)
    expected = layer(x, src_key_padding_mask=padding)[~padding]
    torch.manual_seed(3)
    found = layer(tokens, packing=packing)
    assert_within_budget("tokens", found, expected.double(), expected)
    gradients = [torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]) for out in (found, expected)]
    for actual, plain in zip(*gradients, strict=True):
        assert_within_budget("gradient", actual, plain.double(), [plain_error(plain)])
    with pytest.raises(ValueError, match="with packing"):
        layer(tokens, src_key_padding_mask=padding, packing=packing)


def plain_error(gradient):
    """Sums of this many float32 terms, in another order."""
    return S * B * torch.finfo(torch.float32).eps * gradient.abs().max().item()


class Noting(torch.nn.TransformerEncoderLayer):
    """A layer of the user's, which notes the masks that it gets."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        self.got = src_mask, src_key_padding_mask, is_causal
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)


@pytest.mark.parametrize("mask", [None, CAUSAL, CAUSAL.flip(0), -0.5 * CAUSAL], ids=["none", "causal", "bool", "float"])
@pytest.mark.filterwarnings("ignore:Support for mismatched src_key_padding_mask")  # which torch warns of, too
@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
def test_a_layer_of_the_users_gets_the_masks_that_torch_gives_it(mask, padding):
    theirs = torch.nn.TransformerEncoder(Noting(E, H, 40, batch_first=True), 1, enable_nested_tensor=False)
    ours = TransformerEncoder(Noting(E, H, 40, batch_first=True), 1)
    for model in (theirs, ours):
        model(torch.randn(B, S, E), mask, padding)
    for a, e in zip(ours.layers[0].got, theirs.layers[0].got, strict=True):
        assert a is e if e is None or isinstance(e, bool) else a.dtype == e.dtype and torch.equal(a, e)


def test_threads_that_interleave_get_what_torch_gives(monkeypatch):
    """One encoder, of which one thread's decoder looks at padding, while the other's does not."""
    ours, theirs = pair("Transformer", **SMALL, dropout=0.0, batch_first=True)
    padding, src, tgt = PADDING[[0, 1, 3]], torch.randn(3, S, E), torch.randn(3, 5, E)
    masks = [{"memory_key_padding_mask": padding}, {}]
    entered, left = threading.Event(), threading.Event()
    plain = TransformerEncoder.unread_padding

    @contextmanager
    def unread_padding(self):
        with plain(self):
            entered.set()
            assert left.wait(60)
            yield

    def run(index, results):
        if index == 1:
            assert entered.wait(60)
        results[index] = ours(src, tgt, src_key_padding_mask=padding, **masks[index])
        left.set()

    monkeypatch.setattr(TransformerEncoder, "unread_padding", unread_padding)
    results = [None, None]
    threads = [threading.Thread(target=run, args=(index, results)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, mask in zip(results, masks, strict=True):
        torch.testing.assert_close(result, theirs(src, tgt, src_key_padding_mask=padding, **mask))


WRAPPED = {  # the encoder of a Transformer, in the ways in which it is checkpointed
    "reentrant": lambda model: _checkpointed(model, True),
    "not reentrant": lambda model: _checkpointed(model, False),
    "composable": lambda model: composable_checkpoint(model.encoder),
    "wrapper": lambda model: setattr(model, "encoder", checkpoint_wrapper(model.encoder)),
}


def _checkpointed(model, use_reentrant):
    plain = model.encoder.forward
    model.encoder.forward = lambda src, **masks: checkpoint(
        lambda x: plain(x, **masks), src, use_reentrant=use_reentrant
    )


@pytest.mark.parametrize("memory", ["none", "same", "less"])
@pytest.mark.parametrize("wrap", [None, *WRAPPED])
@pytest.mark.parametrize("patched", [False, True])
def test_a_decoder_reads_what_torchs_reads(patched, wrap, memory):
    """However its encoder is called, in the forward and again in a backward."""
    ours, theirs = pair("Transformer", **SMALL, dropout=0.0, batch_first=True)
    model = deepcopy(theirs) if patched else ours
    if wrap is not None:
        WRAPPED[wrap](model)
    if patched:
        pyllm.patch(model)
    padding, src, tgt = PADDING[[0, 1, 3]], torch.randn(3, S, E), torch.randn(3, 5, E)
    masks = {"same": padding, "less": padding & (torch.arange(S) > 5), "none": None}
    found = []
    for each in (model, theirs):
        x = src.clone().requires_grad_()
        out = each(x, tgt, src_key_padding_mask=padding, memory_key_padding_mask=masks[memory])
        out.sin().sum().backward()  # which a reentrant checkpoint wants
        found.append((out, x.grad, *(p.grad for p in each.parameters())))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("patched", [False, True])
def test_encoding_and_decoding_one_after_the_other(patched, training):
    """The encoder of a Transformer knows that its padding may be read before the whole was ever called."""
    ours, theirs = pair("Transformer", **SMALL, dropout=0.0, batch_first=True)
    model = deepcopy(theirs) if patched else ours
    if patched:
        pyllm.patch(model)
    padding, src, tgt = PADDING[[0, 1, 3]], torch.randn(3, S, E), torch.randn(3, 5, E)
    both = [each.train(training) for each in (model, theirs)]
    found = [each.decoder(tgt, each.encoder(src, src_key_padding_mask=padding)) for each in both]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nested", [True, False], ids=["packs", "padded"])
def test_a_learned_mask_has_its_gradient_also_while_it_is_causal(nested):
    """Where there is padding, as in torch, which drops a causal mask only where there is none."""
    ours, theirs = pair("TransformerEncoderLayer", E, H, 40, 0.0, batch_first=True)
    x, found = torch.randn(B, S, E), []
    for layer, stack in ((ours, TransformerEncoder), (theirs, torch.nn.TransformerEncoder)):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(S).requires_grad_()
        out = stack(layer, 2, enable_nested_tensor=nested and layer is ours)(x, mask, src_key_padding_mask=KEPT)
        found.append(torch.autograd.grad(out.sin().sum(), mask)[0])
    assert found[1].any()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_mask_of_integers_is_refused_as_torch_refuses_it():
    stack, _ = stacks()
    with pytest.raises(AssertionError, match="only bool and floating types of mask are supported"):
        stack(torch.randn(B, S, E), CAUSAL.to(torch.uint8))


@pytest.mark.parametrize("mask", [None, CAUSAL[:5, :5]], ids=["none", "other length"])
def test_a_hint_without_its_mask_is_refused(mask, packed_calls):
    stack, _ = stacks()
    with pytest.raises((RuntimeError, AssertionError)):
        stack(torch.randn(B, S, E), mask, PADDING, is_causal=True)
    assert not packed_calls
